"""Constraints on the law of ratings of the whole population, kept by dual ascent.

    maximise ρ₀(F)   subject to   ρᵢ(F) ≥ cᵢ

The Lagrangian ρ₀ + Σ λᵢ (ρᵢ − cᵢ) is climbed by the policy for fixed multipliers, while each multiplier rises as long
as its constraint is broken and falls while it holds with room to spare.

Reference: Chow et al. 2018, "Risk-Constrained Reinforcement Learning with Percentile Risk Criteria", JMLR 18(167).
Deviation: the multipliers move in log space, so that they stay positive without a projection, and per standard
deviation of the constraint's influence, so that one step size serves ratings and probabilities.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reward.distribution import RewardDistribution
from rlhf.influence import check_population_scope, expected_influence, statistics
from rlhf.measures import Below, RiskMeasure, RiskSpecError, text_of
from rlhf.risk import parse_risk

Z95 = 1.959963984540054
# The scale of a constraint's influence is averaged over steps: one batch without a bad answer must not blow up a step.
SCALE_DECAY = 0.9
_FORM = re.compile(r"\s*(?P<measure>.+?)\s*(?P<sign>>=|<=)\s*(?P<bound>[^<>=]+?)\s*")


@dataclass(frozen=True)
class Constraint:
    """One bound on a measure of the population, always "at least" inside.

    Attributes:
        measure: ρ, higher is better.
        bound: c, the least value allowed.
        flipped: the user wrote the bound on −ρ: `below:T <= p` bounds a probability, and the measure `below:T` is
            minus that probability.
    """

    measure: RiskMeasure
    bound: float
    flipped: bool = False

    @property
    def name(self) -> str:
        return self.measure.spec

    @property
    def spec(self) -> str:
        if self.flipped:
            return f"{self.name} <= {text_of(-self.bound)}"
        return f"{self.name} >= {text_of(self.bound)}"

    def as_written(self, value: float) -> float:
        """A value of ρ in the sign in which the user wrote the bound."""
        # + 0.0 turns -0.0 into 0.0, which would read as a negative share.
        return (-value if self.flipped else value) + 0.0


def parse_constraint(spec: str) -> Constraint:
    """`cvar:0.05 >= -1.0`: a measure at least a bound; `below:-2 <= 0.01`: a share of ratings at most a bound.

    Raises:
        RiskSpecError: malformed, a bound in the wrong direction or out of reach, or a measure without an influence
            function.
    """
    form = _FORM.fullmatch(spec) if isinstance(spec, str) else None
    if form is None:
        raise RiskSpecError(f"cannot read the constraint {spec!r}; write 'cvar:0.05 >= -1.0' or 'below:-2 <= 0.01'")
    measure = parse_risk(form["measure"])
    check_population_scope(measure)
    try:
        bound = float(form["bound"])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise RiskSpecError(f"the bound of the constraint {spec!r} must be a finite number, got {form['bound']!r}")
    share = isinstance(measure, Below)
    if share != (form["sign"] == "<="):
        wanted = "'below:T <= P', the share of ratings at or below T" if share else f"'{measure.spec} >= {bound:g}'"
        raise RiskSpecError(f"the constraint {spec!r} would keep ratings bad; write {wanted}")
    if share and not 0 <= bound <= 1:
        raise RiskSpecError(f"the constraint {spec!r} bounds a share, which lies in [0, 1]")
    return Constraint(measure, -bound if share else bound, flipped=share)


@dataclass(frozen=True)
class Reading:
    """What one batch says about a constraint, in the sign of its spec.

    Attributes:
        value: the measure of the population.
        low, high: 95 % interval, by the delta method over prompts; NaN with fewer than two prompts.
        state: "holds" or "violated" where the interval lies on one side of the bound, else "undecided".
        shortfall: c − ρ, positive where the constraint is broken; the same sign for every spec.
        spread: standard deviation of the answers' influence on the measure.
    """

    value: float
    low: float
    high: float
    state: str
    shortfall: float
    spread: float


def read_constraint(
    constraint: Constraint, population: RewardDistribution, laws: RewardDistribution, groups: Tensor | None = None
) -> Reading:
    """The constraint in one batch, with an interval.

    The influence values of the answers have ρ(F) as their mean and carry its sampling error to first order, so

        ρ̂ ± 1.96 · sd / √m,    sd over the m prompts' mean influences

    Args:
        constraint: what is asked.
        population: batch shape (), the law of `laws`.
        laws: (N,) the answers' laws, finite.
        groups: (N,) prompt of each answer; None: each its own.

    Reference: the delta method by influence functions, van der Vaart 1998, "Asymptotic Statistics", section 20.
    """
    worth = expected_influence(constraint.measure, laws, statistics(constraint.measure, population)).double()
    # Not ρ of the population's law, which is brought to dense levels: a share of 0.01 would be lost in their grid.
    value, spread = worth.mean().item(), _spread(worth)
    if groups is not None:
        _, index = torch.unique(groups, return_inverse=True)
        count = int(index.max()) + 1
        size = torch.zeros(count, dtype=torch.float64).index_add_(0, index, torch.ones_like(worth))
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, index, worth)
        # Prompts with more answers weigh more, as they do in the population.
        worth = worth.mean() + (total - size * worth.mean()) * count / len(worth)
    error = Z95 * worth.std().item() / math.sqrt(len(worth)) if len(worth) > 1 else math.nan
    low, high = value - error, value + error
    state = "holds" if low >= constraint.bound else "violated" if high < constraint.bound else "undecided"
    ends = sorted((constraint.as_written(low), constraint.as_written(high)))
    return Reading(constraint.as_written(value), *ends, state, constraint.bound - value, spread)


class DualAscent:
    """Multipliers of several constraints.

        log λ ← clip(log λ + η clip((c − ρ(F)) / s, −1, 1), log λ_min, log λ_max)

    s is the standard deviation of the constraint's influence over the answers, averaged over steps.

    Args:
        constraints: the constraints.
        step_size: η; a multiplier changes by at most the factor exp(η) in one step.
        start: first multiplier of each. A low one lets the policy run into a bad tail before the constraint pulls.
        bounds: λ_min and λ_max. The upper one keeps a constraint that cannot be met from drowning the objective for
            good; the lower one lets a multiplier that was not needed come back in time.

    Raises:
        RiskSpecError: the same measure bounded twice, or numbers out of range.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        step_size: float = 0.1,
        start: float = 1.0,
        bounds: tuple[float, float] = (1e-3, 1e2),
    ):
        names = [constraint.name for constraint in constraints]
        for name in names:
            if names.count(name) > 1:
                raise RiskSpecError(f"{name} is bounded by several constraints; keep the tightest one")
        if not (math.isfinite(step_size) and step_size > 0):
            raise RiskSpecError(f"the step size of constraints must be positive, got {step_size}")
        if not 0 < bounds[0] <= start <= bounds[1] < math.inf:
            given = f"{bounds[0]}, {start}, {bounds[1]}"
            raise RiskSpecError(f"multipliers need 0 < lowest <= start <= highest, got {given}")
        self.constraints, self.step_size, self.bounds = list(constraints), step_size, bounds
        self._log = [math.log(start)] * len(names)
        # Sums of the scales and of their weights, corrected for the start as in `PopulationTracker`.
        self._scales = [[0.0, 0.0] for _ in range(len(names) + 1)]

    @property
    def multipliers(self) -> list[float]:
        return [math.exp(log) for log in self._log]

    def pull(
        self, laws: RewardDistribution, population: RewardDistribution, ramp: float = 1.0
    ) -> tuple[Tensor, float]:
        """What the constraints add to each answer, Σ λᵢ uᵢ, (N,), and how large that is, Σ λᵢ sᵢ.

        Args:
            laws: (N,) laws of the answers.
            population: batch shape ().
            ramp: factor on all multipliers, for a warm-up.
        """
        total, size = laws.values.new_zeros(laws.batch_shape), 0.0
        for i, (constraint, multiplier) in enumerate(zip(self.constraints, self.multipliers, strict=True)):
            of_population = statistics(constraint.measure, population)
            worth = expected_influence(constraint.measure, laws, of_population).to(total.dtype)
            total = total + ramp * multiplier * worth
            # Before the first step the batch itself says how large things are.
            size += ramp * multiplier * (self._scale(i + 1) or _spread(worth))
        return total, size

    def size_beside(self, objective: Tensor, size: float) -> float:
        """How much larger the Lagrangian is than the objective alone, 1 + Σ λᵢ sᵢ/s₀. Utilities are divided by it.

        s₀ and sᵢ are standard deviations over answers, of the objective and of the constraints. The division changes
        no optimum and keeps the size of the reward beside the KL penalty: without it, multipliers that grow drown the
        penalty; divided by 1 + Σ λᵢ, a constraint on a small share of ratings could never outweigh it.

        Args:
            objective: (N,) u₀.
            size: Σ λᵢ sᵢ, of all constraints that are added to it.
        """
        return 1.0 + size / (self._scale(0) or _spread(objective) or 1.0)

    def read(
        self, population: RewardDistribution, laws: RewardDistribution, groups: Tensor | None = None
    ) -> list[Reading]:
        """What one batch says about each constraint; arguments as for `read_constraint`."""
        return [read_constraint(constraint, population, laws, groups) for constraint in self.constraints]

    def step(self, objective: Tensor, readings: Sequence[Reading], ramp: float = 1.0) -> None:
        """Move every multiplier by what a batch says.

        Args:
            objective: (N,) u₀, whose spread is remembered for `size_beside`.
            readings: of the same batch, from `read`.
            ramp: share of the multipliers that the policy felt. A multiplier moves by that share of its step: one
                that nothing follows would only wind up to its bound.
        """
        low, high = map(math.log, self.bounds)
        self._remember(0, _spread(objective))
        for i, reading in enumerate(readings):
            self._remember(i + 1, reading.spread)
            scale, shortfall = self._scale(i + 1), reading.shortfall
            # Without any spread only the sign is known.
            move = math.copysign(1.0, shortfall) if scale == 0 and shortfall else shortfall / (scale or 1.0)
            step = ramp * self.step_size * min(max(move, -1.0), 1.0)
            self._log[i] = min(max(self._log[i] + step, low), high)

    def _remember(self, place: int, spread: float) -> None:
        total, weight = self._scales[place]
        self._scales[place] = [SCALE_DECAY * total + spread, SCALE_DECAY * weight + 1.0]

    def _scale(self, place: int) -> float:
        """Average spread of the objective (0) or of a constraint (1, 2, ...); 0 before the first step."""
        total, weight = self._scales[place]
        return total / weight if weight else 0.0

    def state_dict(self) -> dict[str, object]:
        return {"constraints": [c.spec for c in self.constraints], "log": list(self._log), "scales": self._scales}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: the state belongs to other constraints.
        """
        own = [constraint.spec for constraint in self.constraints]
        if state["constraints"] != own:
            raise ValueError(f"the checkpoint holds multipliers for {state['constraints']}, this run has {own}")
        logs = [float(log) for log in state["log"]]
        scales = [[float(total), float(weight)] for total, weight in state["scales"]]
        if (len(logs), len(scales)) != (len(self._log), len(self._scales)):
            raise ValueError(f"{len(logs)} multipliers and {len(scales)} scales for {len(own)} constraints")
        self._log, self._scales = logs, scales


def _spread(values: Tensor) -> float:
    """Standard deviation of (N,) numbers that are finite, 0 of one."""
    values = values[values.isfinite()].double()
    return values.std(correction=0).item() if len(values) else 0.0
