"""Risk measures that follow from moments, quantiles and tails of a predicted law of ratings.

A measure gives a utility in reward units, higher is better. `alpha` is always a lower-tail mass in (0, 1]: 0.1 looks
at the worst tenth, 1 at everything. Measures that reweigh the ranks of readers are in `rlhf/distortions.py`; specs and
sums in `rlhf/risk.py`.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor

from reward.distribution import RewardDistribution
from rlhf.shortfall import mean_shortfall, shortfall_at_values, square_shortfall

# The largest factor of a measure: beyond, its product with a variance may leave float32, and infinity less infinity
# is no number.
LARGEST = 1e6
# The largest weight of gains in an expectile: beyond, rounding decides where gains and shortfalls balance.
LARGEST_GAIN_WEIGHT = 1 - 1e-9


class RiskSpecError(ValueError):
    """A risk spec that cannot be read, or a number in it that is out of range."""


class RiskMeasure(ABC):
    """A utility for a reward distribution: higher is better.

    Each measure declares the properties below for all its parameters; the tests hold it to them, and to a
    counterexample where it declares False.

    Attributes:
        parameters: Names of the numbers after the colon in the spec, in order.
        example: A spec, shown to a user who mistyped one.
        monotone: Raising any quantile never lowers the utility.
        translation: Adding c to every rating adds c to the utility.
        homogeneous: Multiplying every rating by c > 0 multiplies the utility by c.
        averse: Never above the mean.
    """

    parameters: ClassVar[tuple[str, ...]]
    example: ClassVar[str]
    monotone: bool
    translation: bool
    homogeneous: bool
    averse: bool

    @property
    @abstractmethod
    def spec(self) -> str:
        """Canonical spec; `rlhf.risk.parse_risk` of it gives the same measure."""

    @abstractmethod
    def __call__(self, distribution: RewardDistribution) -> Tensor:
        """Laws of batch shape (...) -> (...) utility."""

    @classmethod
    def read(cls, name: str, argument: str | None) -> "RiskMeasure":
        """The measure from what stands after the colon of its spec.

        Raises:
            RiskSpecError: not as many numbers as `parameters`, or one out of range.
        """
        numbers = argument.split(",") if argument else []
        if len(numbers) != len(cls.parameters) or not all(is_number(number) for number in numbers):
            wanted = " and ".join(f"the number {parameter}" for parameter in cls.parameters) or "nothing"
            raise RiskSpecError(f"{name} takes {wanted} after the colon")
        return cls(*(float(number) for number in numbers))

    def __repr__(self) -> str:
        return f"<risk {self.spec}>"


@final
class Mean(RiskMeasure):
    """The expected rating, E Z: indifferent to how ratings spread.

    >>> Mean()(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(1.)
    """

    parameters = ()
    example = "mean"
    monotone = translation = homogeneous = averse = True

    @property
    def spec(self) -> str:
        return "mean"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        return distribution.mean()


@final
class Quantile(RiskMeasure):
    """The rating that a share `alpha` of readers stays at or below (value at risk).

        Q(α) = inf {z : P(Z ≤ z) ≥ α}

    Says how bad the edge of the tail is, nothing about what lies beyond it. Not averse: it may exceed the mean.

    >>> Quantile(0.5)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(1.)
    """

    parameters = ("alpha",)
    example = "quantile:0.1"
    monotone = translation = homogeneous = True
    averse = False

    def __init__(self, alpha: float):
        self.alpha = tail_mass(alpha, "quantile")

    @property
    def spec(self) -> str:
        return f"quantile:{text_of(self.alpha)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        return distribution.quantile(self.alpha)


@final
class CVaR(RiskMeasure):
    """Mean rating of the worst `alpha` share (expected shortfall).

        CVaR_α(Z) = (1/α) ∫₀^α Q(t) dt

    `alpha` is not a confidence level (0.9), and the result is not a loss: no sign is flipped. 1 is the mean; towards 0
    it tends to the lowest quantile that is known.

    Reference: Acerbi & Tasche 2002, arXiv:cond-mat/0104295.

    >>> CVaR(0.5)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(-0.5000)
    """

    parameters = ("alpha",)
    example = "cvar:0.1"
    monotone = translation = homogeneous = averse = True

    def __init__(self, alpha: float):
        self.alpha = tail_mass(alpha, "cvar")

    @property
    def spec(self) -> str:
        return f"cvar:{text_of(self.alpha)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        return distribution.lower_tail_mean(self.alpha)


@final
class MeanVariance(RiskMeasure):
    """The expected rating less a price for spread.

        E Z − λ Var Z

    Spread upwards costs as much as spread downwards, so a law that is better everywhere may get a lower utility: not
    monotone. λ is in inverse reward units, so its effect depends on the rating scale.

    >>> MeanVariance(0.3)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(0.2000)
    """

    parameters = ("variance_weight",)
    example = "mean_variance:0.5"
    monotone = homogeneous = False
    translation = averse = True

    def __init__(self, variance_weight: float):
        self.variance_weight = spread_price(variance_weight, "mean_variance")

    @property
    def spec(self) -> str:
        return f"mean_variance:{text_of(self.variance_weight)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        return distribution.mean() - self.variance_weight * distribution.variance()


@final
class Entropic(RiskMeasure):
    """The sure rating that an exponential utility finds as good as the law (certainty equivalent).

        −(1/η) log E exp(−η Z)

    Towards η = 0 it is the mean, and for large η the lowest known quantile. The whole law counts, low ratings
    exponentially more. η is in inverse reward units.

    Reference: Föllmer & Schied 2002, doi:10.1007/s007800200072.

    >>> Entropic(1.0)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(-0.0253)
    """

    parameters = ("risk_aversion",)
    example = "entropic:1"
    monotone = translation = averse = True
    homogeneous = False

    def __init__(self, risk_aversion: float):
        if not (math.isfinite(risk_aversion) and risk_aversion > 0):
            raise RiskSpecError(
                f"entropic:E needs a finite E > 0, got {risk_aversion}; E towards 0 is the measure `mean`"
            )
        self.risk_aversion = float(risk_aversion)

    @property
    def spec(self) -> str:
        return f"entropic:{text_of(self.risk_aversion)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        # Beyond these bounds the value no longer changes in float64, while the product with a rating leaves float32.
        rate = min(max(self.risk_aversion, 1e-18), 1e18)
        return -distribution.log_mean_exp(-rate) / rate


@final
class MeanStd(RiskMeasure):
    """The expected rating less a price for spread, in reward units.

        E Z − λ √Var Z

    As `MeanVariance`, but λ has no unit and the price grows with the spread, not with its square. Not monotone either.
    The gradient at a point mass is taken as that of the mean.

    >>> MeanStd(0.5)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(0.1835)
    """

    parameters = ("std_weight",)
    example = "mean_std:1"
    monotone = False
    translation = homogeneous = averse = True

    def __init__(self, std_weight: float):
        self.std_weight = spread_price(std_weight, "mean_std")

    @property
    def spec(self) -> str:
        return f"mean_std:{text_of(self.std_weight)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        return distribution.mean() - self.std_weight * distribution.std()


@final
class Semideviation(RiskMeasure):
    """The expected rating less a price for spread below it; spread above costs nothing.

        μ − λ (E ((μ − Z)₊)²)^½,    μ = E Z

    Monotone for λ ≤ 1 only: beyond, raising one rating raises μ, and with it the shortfall of all others, too much.

    Reference: Ogryczak & Ruszczyński 1999, doi:10.1016/S0377-2217(98)00167-2.

    >>> Semideviation(1.0)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(-0.1547)
    """

    parameters = ("deviation_weight",)
    example = "semideviation:1"
    translation = homogeneous = averse = True

    def __init__(self, deviation_weight: float):
        self.deviation_weight = spread_price(deviation_weight, "semideviation")
        self.monotone = self.deviation_weight <= 1

    @property
    def spec(self) -> str:
        return f"semideviation:{text_of(self.deviation_weight)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        mean = distribution.mean()
        square = square_shortfall(distribution, mean)
        constant = square == 0
        # As in `RewardDistribution.std`: the root has no derivative at zero.
        deviation = torch.where(constant, 0.0, torch.where(constant, 1.0, square).sqrt())
        return mean - self.deviation_weight * deviation


@final
class Expectile(RiskMeasure):
    """The rating that balances what lies above it, at price τ, against what lies below it, at price 1 − τ.

        e :  τ E (Z − e)₊ = (1 − τ) E (e − Z)₊

    0.5 is the mean; below 0.5 shortfalls count (1 − τ)/τ times as much as gains. It is to the mean what a quantile is
    to the median, sees how bad the tail is, and uses the whole law. Averse for τ ≤ 0.5.

    Found exactly: between neighbouring quantiles the condition is a quadratic equation.

    Reference: Newey & Powell 1987, doi:10.2307/1911031.

    >>> Expectile(0.2)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(0.0293)
    """

    parameters = ("gain_weight",)
    example = "expectile:0.1"
    monotone = translation = homogeneous = True

    def __init__(self, gain_weight: float):
        if not 0.0 < gain_weight <= LARGEST_GAIN_WEIGHT:
            raise RiskSpecError(f"expectile:T needs a weight of gains T in (0, 1), got {gain_weight}")
        self.gain_weight = float(gain_weight)
        self.averse = self.gain_weight <= 0.5

    @property
    def spec(self) -> str:
        return f"expectile:{text_of(self.gain_weight)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        # In float64: with a price near one, the slope is as small as a float32's rounding of the balance.
        law = distribution.to(torch.float64)
        root = self._root(law.detach())
        # One Newton step from the root: it stays where it is and gets the derivative of an implicit function.
        slope = self.gain_weight + (1 - 2 * self.gain_weight) * law.detach().cdf(root)
        return (root + self.balance(law, root) / slope).to(distribution.values.dtype)

    def balance(self, distribution: RewardDistribution, at: Tensor) -> Tensor:
        """τ E (Z − e)₊ − (1 − τ) E (e − Z)₊ at e = `at`, zero at the expectile and falling; (...)."""
        shortfall = mean_shortfall(distribution, at.unsqueeze(-1)).squeeze(-1)
        return self.gain_weight * (distribution.mean() - at) - (1 - 2 * self.gain_weight) * shortfall

    def _root(self, law: RewardDistribution) -> Tensor:
        tau, values, levels = self.gain_weight, law.values, law.levels
        balance = tau * (law.mean().unsqueeze(-1) - values) - (1 - 2 * tau) * shortfall_at_values(law)
        # The balance falls from value to value; the root lies behind the last one where it is not negative.
        piece = (balance >= 0).sum(dim=-1, keepdim=True).sub(1).clamp(0)
        following = (piece + 1).clamp_max(levels.shape[0] - 1)
        start = values.gather(-1, piece)
        width = values.gather(-1, following) - start
        left = balance.gather(-1, piece).clamp_min(0.0)
        linear = tau + (1 - 2 * tau) * levels[piece]
        # Of x in  left = linear x + curve x²/2  the root that stays finite as the curve vanishes.
        density = (levels[following] - levels[piece]) / width.clamp_min(torch.finfo(width.dtype).tiny)
        curve = (1 - 2 * tau) * torch.where(width > 0, density, 0.0)
        step = 2 * left / (linear + (linear.square() + 2 * curve * left).clamp_min(0.0).sqrt())
        return (start + torch.minimum(step, width)).squeeze(-1)


@final
class Below(RiskMeasure):
    """Minus the share of readers whose rating is at or below a threshold.

        −P(Z ≤ z)

    Counts the bad ratings and ignores how bad they are. A probability, not a rating: between −1 and 0.

    >>> Below(0.0)(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(-0.3750)
    """

    parameters = ("threshold",)
    example = "below:-2"
    monotone = True
    translation = homogeneous = averse = False

    def __init__(self, threshold: float):
        if not math.isfinite(threshold):
            raise RiskSpecError(f"below:T needs a finite rating T, got {threshold}")
        self.threshold = float(threshold)

    @property
    def spec(self) -> str:
        return f"below:{text_of(self.threshold)}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        return -distribution.cdf(self.threshold)


def tail_mass(alpha: float, name: str) -> float:
    """A lower-tail mass, checked."""
    if not 0.0 < alpha <= 1.0:
        raise RiskSpecError(f"{name}:A needs a lower-tail mass A in (0, 1], got {alpha}")
    return float(alpha)


def spread_price(weight: float, name: str) -> float:
    """A price for spread, checked."""
    if not 0.0 <= weight <= LARGEST:
        raise RiskSpecError(f"{name}:L needs a finite L >= 0, at most {LARGEST:g}, got {weight}")
    return float(weight)


def is_number(text: str) -> bool:
    """Whether `float` can read it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def text_of(number: float) -> str:
    """Shortest text that reads back as the same number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)
