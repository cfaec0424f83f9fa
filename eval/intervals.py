"""Estimates with their uncertainty: Wilson intervals and the prompt-clustered bootstrap.

Completions of one prompt resemble each other, so the prompt, not the completion, is the unit that is drawn
independently. Every interval here treats it so: rates through an effective sample size, everything else by
resampling whole prompts.

Arrays in, `Estimate` out. Nothing here knows about models, files or reports.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(n,) scores and (R, n) non-negative weights -> (R,) values, one per row of weights."""

# Rows of bootstrap weights are made in blocks of about this many numbers (64 MB), so that memory does not grow
# with the number of resamples.
BLOCK_NUMBERS = 8_000_000


@dataclass(frozen=True)
class Estimate:
    """A number that never travels without its interval and its sample size.

    Attributes:
        value: The estimate itself.
        low, high: Ends of the two-sided interval.
        level: Confidence level of the interval, 0.95 unless asked otherwise.
        n: Completions that entered, after exclusion.
        prompts: Distinct prompts among them: the number of independent draws.
        method: How the interval was made: "wilson", "wilson-effective", "bca", "percentile", "newcombe".
        excluded: Completions left out because their score was NaN or infinite.
        effective_n: Independent draws that carry as much information about a rate; None where it plays no part.
        n_reference: Completions of the other policy, for a difference.
    """

    value: float
    low: float
    high: float
    level: float
    n: int
    prompts: int
    method: str
    excluded: int = 0
    effective_n: float | None = None
    n_reference: int | None = None

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PromptSample:
    """Finite scores with the index of the prompt that each one belongs to.

    Attributes:
        scores: (n,) finite float64.
        prompt_index: (n,) integers in [0, m).
        prompts: The m distinct prompt ids, in order of first appearance.
        excluded: Scores dropped for being NaN or infinite.
    """

    scores: np.ndarray
    prompt_index: np.ndarray
    prompts: tuple[Hashable, ...]
    excluded: int

    @classmethod
    def collect(cls, scores: Sequence[float] | np.ndarray, prompt_ids: Sequence[Hashable] | None = None) -> Self:
        """Checks the scores, drops the non-finite ones and numbers the prompts.

        Args:
            scores: (n,) one per completion.
            prompt_ids: (n,) prompt of each completion; None makes every completion a prompt of its own.

        Raises:
            ValueError: Lengths differ, nothing was given, nothing finite is left, or fewer than two prompts are
                left: no interval exists for a single independent draw.
        """
        scores = finite_or_nan(scores)
        ids = list(range(len(scores))) if prompt_ids is None else list(prompt_ids)
        if len(ids) != len(scores):
            raise ValueError(f"{len(scores)} scores came with {len(ids)} prompt ids: give one prompt id per score")
        if len(scores) == 0:
            raise ValueError("no scores were given, so there is nothing to estimate; check that completions exist")
        keep = np.isfinite(scores)
        if not keep.any():
            raise ValueError(f"all {len(scores)} scores are NaN or infinite; the judge failed on every completion")
        numbers: dict[Hashable, int] = {}
        index = [numbers.setdefault(ids[i], len(numbers)) for i in np.flatnonzero(keep)]
        if len(numbers) < 2:
            raise ValueError(
                "an interval needs finite scores for at least two prompts, and all of these belong to "
                f"{next(iter(numbers))!r}; evaluate on more prompts"
            )
        return cls(scores[keep], np.asarray(index), tuple(numbers), int((~keep).sum()))


def finite_or_nan(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """(n,) float64 copy in which None and infinities have become NaN."""
    values = np.array([math.nan if s is None else s for s in scores], dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must be one-dimensional, one per completion; got shape {values.shape}")
    values[~np.isfinite(values)] = np.nan
    return values


def wilson_interval(successes: float, n: float, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval for a proportion: the p₀ that a two-sided z-test does not reject.

        centre = (k + z²/2) / (n + z²)
        half   = z / (n + z²) · √(k (n − k) / n + z²/4)

    Never leaves [0, 1] and has width at k = 0, where the textbook p ± z·se has none. `successes` and `n` need
    not be whole numbers, which admits an effective sample size.

    Args:
        successes: k in [0, n].
        n: Independent draws, > 0.
        level: Confidence level in (0, 1).

    Returns:
        Lower and upper end.

    Reference: Wilson 1927, JASA 22:209; Brown, Cai & DasGupta 2001, Statistical Science 16:101, section 3.1.1.
    """
    check_level(level)
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n > 0, got successes={successes}, n={n}")
    z = float(ndtri(0.5 + level / 2))
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    # At k = 0 and k = n one end is exactly 0 or 1; the subtraction leaves a rounding error there.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def effective_sample_size(flags: np.ndarray, prompt_index: np.ndarray, *, level: float = 0.95) -> float:
    """Independent draws that would fix a rate as well as these clustered ones do.

        d     = [m/(m−1) · Σᵢ (Σⱼ (yᵢⱼ − p))² / n²] / [p (1 − p) / n]     design effect; m prompts, n completions
        ρ     = (d − 1) / (b − 1) within [0, 1]                           resemblance; b = Σ nᵢ² / n per prompt
        ρ*    = (k ρ + 2) / (k + 2)                                       k events (or non-events, if fewer)
        n_eff = n / (1 + ρ* (b − 1)) · (z / t_{m−1})²

    Few events say little about how they cluster, so ρ is drawn towards complete resemblance as if by two further
    events; with none it is 1, and n_eff about the number of prompts. The last factor pays for estimating the variance
    from m prompts. With one completion per prompt n_eff is n.

    Args:
        flags: (n,) zeros and ones.
        prompt_index: (n,) integers in [0, m).
        level: Level of the interval that will use the result.

    Reference: Rao & Scott 1992, Biometrics 48:577 (effective sample size); Korn & Graubard 1998, Survey
        Methodology 24:193 (degrees of freedom); Dean & Pagano 2015, J. Survey Statistics and Methodology 3:484
        (Wilson's interval on it).
    Deviations: the two pseudo-events. Simulated for rates of 0.5 to 8 %, ρ of 0 to 0.8 and 100 × 4 or 250 × 8
        completions, 95 % intervals cover 93.7 to 99.2 % with them, 88.9 to 97.3 % with ρ as estimated and n_eff = m
        where no event is seen, and 70 to 97 % with n_eff = n there, as Korn & Graubard have it.
    """
    n, sizes = len(flags), np.bincount(prompt_index)
    prompts = len(sizes)
    if prompts == n:
        return float(n)
    per_prompt = float((sizes**2).sum()) / n
    events = min(flags.sum(), n - flags.sum())
    resemblance = 0.0
    if events > 0:
        rate = flags.mean()
        residuals = np.bincount(prompt_index, weights=flags - rate)
        variance = prompts / (prompts - 1) * float((residuals**2).sum()) / n**2
        design_effect = variance / (rate * (1 - rate) / n)
        resemblance = min(1.0, max(0.0, (design_effect - 1) / (per_prompt - 1)))
    resemblance = (events * resemblance + 2) / (events + 2)
    upper = 0.5 + level / 2
    return n / (1 + resemblance * (per_prompt - 1)) * float(ndtri(upper) / stdtrit(prompts - 1, upper)) ** 2


def weighted_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of the scores under each row of weights: (n,), (R, n) -> (R,)."""
    return weights @ scores / weights.sum(-1)


def weighted_cvar(scores: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """Mean of the worst `alpha` share of the weight: (n,), (R, n) -> (R,).

        CVaR_α = (1/α) ∫₀^α Q(t) dt,   Q the step quantile function of the weighted sample

    Exact at any alpha: the score at the edge counts with the fraction of its weight that lies below alpha.
    """
    order = np.argsort(scores, kind="stable")
    weights = weights[:, order]
    above = np.cumsum(weights, axis=-1)
    budget = alpha * above[:, -1:]
    taken = np.clip(budget - (above - weights), 0.0, weights)
    return taken @ scores[order] / budget[:, 0]


def weighted_quantile(scores: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """Smallest score at which the weight reaches the share `alpha`: (n,), (R, n) -> (R,)."""
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[:, order], axis=-1)
    # Without the tolerance alpha = 0.3 of ten equal weights asks for 3.0000000000000004 of them.
    target = alpha * reached[:, -1:] * (1 - 1e-12)
    return scores[order][np.argmax(reached >= target, axis=-1)]


def cvar_statistic(alpha: float) -> Statistic:
    """`weighted_cvar` at a fixed lower-tail mass, for the bootstrap."""
    return partial(weighted_cvar, alpha=check_alpha(alpha))


def quantile_statistic(alpha: float) -> Statistic:
    """`weighted_quantile` at a fixed lower-tail mass, for the bootstrap."""
    return partial(weighted_quantile, alpha=check_alpha(alpha))


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray,
    prompt_ids: Sequence[Hashable] | None = None,
    statistic: Statistic = weighted_mean,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> Estimate:
    """A statistic of the scores with an interval from resampling whole prompts.

    Each resample draws m prompts with replacement and takes all completions of each, so completions of one
    prompt stay together. The same seed and the same number of prompts give the same draws.

    Args:
        scores: (n,) one per completion; NaN and infinities are left out and counted.
        prompt_ids: (n,) prompt of each completion; None makes every completion a prompt of its own.
        statistic: What to estimate: `weighted_mean`, `cvar_statistic(0.1)`, `quantile_statistic(0.05)`, or your own.
        level: Confidence level in (0, 1).
        resamples: Bootstrap draws.
        seed: Seed of the draws.
        method: "bca" corrects for bias and skewness; "percentile" does not. Where the correction does not exist
            (all draws on one side of the estimate) the percentile interval is given and named.

    Raises:
        ValueError: Nothing finite to estimate, fewer than two prompts, or an impossible level.

    Reference: Efron 1987, JASA 82:171 (BCa); Field & Welsh 2007, JRSS-B 69:369 (resampling clusters).
    """
    sample = PromptSample.collect(scores, prompt_ids)
    check_level(level)
    m = len(sample.prompts)

    def replicate(counts: np.ndarray) -> np.ndarray:
        return statistic(sample.scores, counts[:, sample.prompt_index])

    value, low, high, used = _interval(replicate, m, len(sample.scores), level, resamples, seed, method)
    return Estimate(value, low, high, level, len(sample.scores), m, used, sample.excluded)


def paired_difference(
    scores: Sequence[float] | np.ndarray,
    prompt_ids: Sequence[Hashable],
    reference_scores: Sequence[float] | np.ndarray,
    reference_prompt_ids: Sequence[Hashable],
    statistic: Statistic = weighted_mean,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> Estimate:
    """statistic(policy) − statistic(reference) on the prompts that both answered, resampled in pairs.

    One draw of prompts serves both policies, so what makes a prompt easy or hard cancels. Prompts that only one
    policy has (after non-finite scores are left out) do not enter.

    Args:
        scores, prompt_ids: (n,) the policy.
        reference_scores, reference_prompt_ids: (n',) the policy it is compared with; n' may differ from n.
        statistic, level, resamples, seed, method: As in `bootstrap_interval`.

    Raises:
        ValueError: Fewer than two prompts in common, or nothing finite on one side.
    """
    check_level(level)
    ours = PromptSample.collect(scores, prompt_ids)
    theirs = PromptSample.collect(reference_scores, reference_prompt_ids)
    answered = set(theirs.prompts)
    shared = [prompt for prompt in ours.prompts if prompt in answered]
    if len(shared) < 2:
        raise ValueError(
            f"a paired comparison needs at least two prompts that both policies answered, found {len(shared)}; "
            "generate both on the same prompts"
        )
    column = {prompt: i for i, prompt in enumerate(shared)}
    sides = [_restrict(side, column) for side in (ours, theirs)]

    def replicate(counts: np.ndarray) -> np.ndarray:
        ours, theirs = (statistic(values, counts[:, index]) for values, index in sides)
        return ours - theirs

    n, n_reference = (len(values) for values, _ in sides)
    value, low, high, used = _interval(replicate, len(shared), n + n_reference, level, resamples, seed, method)
    excluded = ours.excluded + theirs.excluded
    return Estimate(value, low, high, level, n, len(shared), used, excluded, n_reference=n_reference)


def check_alpha(alpha: float) -> float:
    """`alpha` itself if it is a lower-tail mass, else a ValueError."""
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha is a lower-tail mass in (0, 1], for example 0.1 for the worst tenth; got {alpha}")
    return alpha


def check_level(level: float) -> None:
    """Refuses a confidence level outside (0, 1)."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"a confidence level lies in (0, 1), for example 0.95; got {level}")


def _restrict(sample: PromptSample, column: dict[Hashable, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the shared prompts and their column in the shared order."""
    columns = np.array([column.get(prompt, -1) for prompt in sample.prompts])[sample.prompt_index]
    return sample.scores[columns >= 0], columns[columns >= 0]


def _interval(
    replicate: Callable[[np.ndarray], np.ndarray],
    prompts: int,
    width: int,
    level: float,
    resamples: int,
    seed: int,
    method: str,
) -> tuple[float, float, float, str]:
    """Value, low, high and method actually used; `replicate` maps (R, m) prompt counts to (R,) values."""
    if method not in ("bca", "percentile"):
        raise ValueError(f"method is 'bca' or 'percentile', got {method!r}")
    if resamples < 100:
        raise ValueError(f"an interval from {resamples} resamples would be noise; use at least 100, better 2000")
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK_NUMBERS // max(prompts, width))
    value = float(replicate(np.ones((1, prompts)))[0])
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    draws = np.concatenate([replicate(_prompt_counts(rng, size, prompts)) for size in blocks])
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        corrected = _bca_tails(replicate, value, draws, prompts, rows, tails)
        method, tails = ("percentile", tails) if corrected is None else ("bca", corrected)
    low, high = np.quantile(draws, tails)
    return value, float(low), float(high), method


def _prompt_counts(rng: np.random.Generator, size: int, prompts: int) -> np.ndarray:
    """(size, m) how often each prompt was drawn, m draws per row."""
    drawn = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts).astype(np.float64)


def _bca_tails(
    replicate: Callable[[np.ndarray], np.ndarray],
    value: float,
    draws: np.ndarray,
    prompts: int,
    rows: int,
    tails: np.ndarray,
) -> np.ndarray | None:
    """Bias-corrected, accelerated tail masses, or None where they do not exist.

    z₀ = Φ⁻¹(share of draws below the estimate), draws equal to it counting half;
    a  = Σ d³ / 6 (Σ d²)^{3/2}, d the jackknife deviations over prompts;
    α' = Φ(z₀ + (z₀ + z_α) / (1 − a (z₀ + z_α))).
    """
    # A weighted sum of the same numbers in another order differs in the last digits; those count as equal.
    gap = draws - value
    equal = np.abs(gap) <= 1e-12 * max(1.0, abs(value))
    share = float(((gap < 0) & ~equal).mean() + equal.mean() / 2)
    if not 0.0 < share < 1.0:
        return None
    left_out = []
    for start in range(0, prompts, rows):
        stop = min(prompts, start + rows)
        counts = np.ones((stop - start, prompts))
        counts[np.arange(stop - start), np.arange(start, stop)] = 0.0
        left_out.append(replicate(counts))
    jackknife = np.concatenate(left_out)
    deviations = jackknife.mean() - jackknife
    # The acceleration has no unit; cubes of large scores would overflow.
    deviations = deviations / max(float(np.abs(deviations).max()), np.finfo(float).tiny)
    spread = float((deviations**2).sum())
    # Deviations whose squares leave float64 say nothing about the skewness.
    if not 0.0 < spread < math.inf:
        return None
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    bias = float(ndtri(share))
    shifted = bias + ndtri(tails)
    stretch = 1 - acceleration * shifted
    return None if (stretch <= 0).any() else ndtr(bias + shifted / stretch)
