"""A study of several ways of training, several seeds each, by one judge: pooled numbers, and each against one arm.

Arrays in, plain numbers for JSON out. What is random is drawn twice: the seeds that trained, and the prompts that were
asked. Both are resampled, so an interval speaks of other seeds and other prompts.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from eval.intervals import Estimate, Statistic, cvar_statistic, weighted_mean
from eval.report import DIRECTIONS, Measurement, PolicyResult
from eval.tail import extremely_negative_rate, newcombe_interval

# Below so many events a bootstrap sees too few different draws, and with none it claims certainty.
FEW_EVENTS = 10
LARGEST_LOSS, SMALLEST_FALL = 0.02, 0.30
SHARES = ("extremely_negative_rate", "rating_mass")


@dataclass(frozen=True, eq=False)
class Run:
    """One policy of the study, as the judge sees its n completions.

    Attributes:
        arm: How it was trained or selected.
        seed: Of its training; None where nothing was trained.
        prompt_ids: n prompts.
        columns: (n,) each: `scores`, `masses` (probability of a rating at or below a threshold), `kl` in nats.
    """

    arm: str
    seed: int | None
    prompt_ids: tuple[Hashable, ...]
    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, arm: str, seed: int | None, result: PolicyResult, rating_threshold: float) -> Self:
        """The completions with a finite score.

        Raises:
            ValueError: A judge without laws.
        """
        masses = result.judgement.tail_mass(rating_threshold)
        if masses is None:
            raise ValueError("the study needs a judge that predicts a distribution: qrm: or source:")
        kept = np.flatnonzero(np.isfinite(result.scores))
        columns = {"scores": result.scores, "masses": masses, "kl": result.column("kl_k1_sum")}
        ids = result.prompt_ids
        return cls(arm, seed, tuple(ids[i] for i in kept), {name: column[kept] for name, column in columns.items()})


def metrics(measurement: Measurement) -> dict[str, tuple[Callable[[Run], np.ndarray], Statistic]]:
    """What is compared: the column of each completion, and how a column becomes a number."""
    limit = measurement.threshold.value
    return {
        "mean": (lambda run: run.columns["scores"], weighted_mean),
        "extremely_negative_rate": (lambda run: (run.columns["scores"] <= limit).astype(np.float64), weighted_mean),
        "rating_mass": (lambda run: run.columns["masses"], weighted_mean),
        "cvar": (lambda run: run.columns["scores"], cvar_statistic(measurement.cvar_alpha)),
        "kl": (lambda run: run.columns["kl"], weighted_mean),
    }


def crossed_draws(seeds: int, prompts: int, resamples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each prompt counts in each draw; the first row counts all alike.

    Seeds and prompts are crossed, because every seed answers every prompt: a completion weighs the product of the two
    counts. Of m seeds m − 1 are drawn. Drawing m of them would give their mean the variance (m − 1)/m · s²/m, a third
    short for three seeds; m − 1 give s²/m. One seed alone is kept, and intervals are then about prompts only.

    Returns:
        (1 + resamples, seeds) and (1 + resamples, prompts).

    Reference: Owen 2007, Annals of Applied Statistics 1:386 (both factors); Rao & Wu 1988, JASA 83:231 (m − 1).
    """
    rng = np.random.default_rng(seed)
    drawn = [
        rng.multinomial(size, np.full(count, 1 / count), size=resamples)
        for count, size in ((seeds, max(seeds - 1, 1)), (prompts, prompts))
    ]
    of_seeds, of_prompts = (np.vstack([np.ones(counts.shape[1]), counts]) for counts in drawn)
    return of_seeds, of_prompts


class Pool:
    """Runs of a study on the same prompts, with draws that all arms share, so that what they share cancels.

    Args:
        runs: At most one per arm and seed.
        measurement: Threshold, tail mass, level, draws.

    Raises:
        ValueError: An arm and seed twice, an arm with and without seeds, or runs on different prompts.
    """

    def __init__(self, runs: Sequence[Run], measurement: Measurement):
        self.measurement, self.metrics = measurement, metrics(measurement)
        self.arms: dict[str, dict[int | None, Run]] = {}
        for run in runs:
            of_arm = self.arms.setdefault(run.arm, {})
            if run.seed in of_arm or (of_arm and (run.seed is None or None in of_arm)):
                raise ValueError(f"the study has two runs of arm {run.arm!r}, seed {run.seed}")
            of_arm[run.seed] = run
        self.prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(runs[0].prompt_ids))} if runs else {}
        for run in runs:
            if set(run.prompt_ids) != set(self.prompts):
                raise ValueError(
                    f"arm {run.arm!r}, seed {run.seed} answered other prompts than {runs[0].arm!r}; evaluate all runs "
                    "on the same ones"
                )
        self._draws: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def values(self, arm: str, metric: str, seeds: Sequence[int]) -> np.ndarray:
        """(1 + R,) the metric under each draw, the first of all runs as they are.

        Args:
            arm: Whose runs; an arm without seeds is the same for each.
            metric: A key of `metrics`.
            seeds: Which of its seeds are pooled.
        """
        of_seeds, of_prompts = self._drawn(len(seeds))
        column, statistic = self.metrics[metric]
        values, weights = [], []
        for i, run in enumerate(self.runs(arm, seeds)):
            index = [self.prompts[prompt] for prompt in run.prompt_ids]
            values.append(column(run))
            weights.append(of_prompts[:, index] if run.seed is None else of_prompts[:, index] * of_seeds[:, [i]])
        return statistic(np.concatenate(values), np.concatenate(weights, axis=1))

    def runs(self, arm: str, seeds: Sequence[int]) -> list[Run]:
        of_arm = self.arms[arm]
        return [of_arm[None]] if None in of_arm else [of_arm[seed] for seed in seeds]

    def seeds(self, arm: str) -> list[int]:
        return sorted(seed for seed in self.arms[arm] if seed is not None)

    def rate(self, arm: str, seeds: Sequence[int]) -> Estimate:
        """Rate of all runs together with Wilson's interval, prompts as clusters."""
        runs = self.runs(arm, seeds)
        scores = np.concatenate([run.columns["scores"] for run in runs])
        ids = [prompt for run in runs for prompt in run.prompt_ids]
        return extremely_negative_rate(scores, self.measurement.threshold, ids, level=self.measurement.level)

    def events(self, arm: str, seeds: Sequence[int]) -> int:
        limit = self.measurement.threshold.value
        return int(sum((run.columns["scores"] <= limit).sum() for run in self.runs(arm, seeds)))

    def _drawn(self, seeds: int) -> tuple[np.ndarray, np.ndarray]:
        seeds = max(seeds, 1)
        if seeds not in self._draws:
            options = self.measurement
            self._draws[seeds] = crossed_draws(seeds, len(self.prompts), options.resamples, options.seed)
        return self._draws[seeds]


def percentile_ends(draws: np.ndarray, level: float) -> tuple[float, float]:
    """Percentile interval in which a draw that is NaN could have been anything: it counts against both ends."""
    unknown = np.isnan(draws)
    low = np.quantile(np.where(unknown, -np.inf, draws), (1 - level) / 2, method="lower")
    high = np.quantile(np.where(unknown, np.inf, draws), (1 + level) / 2, method="higher")
    return float(low), float(high)


def ratio_interval(first: Estimate, second: Estimate) -> tuple[float, float]:
    """Interval for first / second from their own intervals, as if the two were independent.

        low  = b / (a + √(a² − b c)),   a = p₁p₂, b = l₁ (2p₁ − l₁), c = u₂ (2p₂ − u₂)
        high = (a + √(a² − b c)) / c,             b = u₁ (2p₁ − u₁), c = l₂ (2p₂ − l₂)

    No logarithm is taken, so that a count of zero on either side still has an interval: 0 to something for the first,
    something to infinity for the second.

    Reference: Donner & Zou 2012, Statistical Methods in Medical Research 21:347, with the lower end rationalised.
    """
    a = first.value * second.value
    b, c = (first.low * (2 * first.value - first.low), second.high * (2 * second.value - second.high))
    low = 0.0 if b == 0 else b / (a + math.sqrt(max(0.0, a * a - b * c)))
    b, c = (first.high * (2 * first.value - first.high), second.low * (2 * second.value - second.low))
    high = math.inf if c == 0 else (a + math.sqrt(max(0.0, a * a - b * c))) / c
    return low, high


def relative_draws(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """ours / theirs − 1; NaN where theirs is not positive and the change has no meaning."""
    positive = theirs > 0
    return np.where(positive, ours / np.where(positive, theirs, 1.0) - 1, np.nan)


def pooled(pool: Pool, arm: str) -> dict[str, Any]:
    """One entry of `arms`: every metric of all seeds together, with its interval over seeds and prompts."""
    seeds = pool.seeds(arm)
    runs = pool.runs(arm, seeds)
    entry: dict[str, Any] = {"arm": arm, "seeds": seeds, "n": sum(len(run.prompt_ids) for run in runs)}
    for metric in pool.metrics:
        draws = pool.values(arm, metric, seeds)
        if np.isnan(draws[0]):
            entry |= {metric: None, f"{metric}_ci": None}
            continue
        low, high = percentile_ends(draws[1:], pool.measurement.level)
        if metric == "extremely_negative_rate" and pool.events(arm, seeds) < FEW_EVENTS:
            wilson = pool.rate(arm, seeds)
            low, high = _widened((low, high), wilson.interval)
        entry |= {metric: float(draws[0]), f"{metric}_ci": [low, high]}
    return entry


def compared(pool: Pool, arm: str, reference: str, metric: str) -> dict[str, Any]:
    """One entry of `comparisons`: arm − reference over the seeds that both have, and the change as a share.

    `interval` and `relative_interval` are percentiles over draws of seeds and prompts that serve both arms. For the
    rate, where an arm has fewer than `FEW_EVENTS` extremely negative completions, they are widened to contain the
    intervals that follow from the two Wilson intervals (Newcombe for the difference, Donner and Zou for the ratio).
    An end that is infinite is None. `undefined_draws` is the share of draws in which the reference was not positive.

    Raises:
        ValueError: The two have no seed in common.
    """
    ours, theirs = pool.seeds(arm), pool.seeds(reference)
    seeds = [seed for seed in theirs if seed in ours] if ours else theirs
    if theirs and not seeds:
        raise ValueError(f"arms {arm!r} and {reference!r} have no seed in common")
    level = pool.measurement.level
    first, second = pool.values(arm, metric, seeds), pool.values(reference, metric, seeds)
    relative = relative_draws(first, second)
    interval, relative_interval = (percentile_ends(draws[1:], level) for draws in (first - second, relative))
    method, events = "bootstrap", None
    if metric == "extremely_negative_rate":
        events = [pool.events(name, seeds) for name in (arm, reference)]
        if min(events) < FEW_EVENTS:
            rates = pool.rate(arm, seeds), pool.rate(reference, seeds)
            interval = _widened(interval, newcombe_interval(*rates))
            relative_interval = _widened(relative_interval, tuple(end - 1 for end in ratio_interval(*rates)))
            method = "bootstrap and wilson"
    if metric in SHARES:
        # Whatever an unknown draw could have been, a share cannot fall by more than all of it.
        relative_interval = max(relative_interval[0], -1.0), relative_interval[1]
    return {
        "arm": arm,
        "reference": reference,
        "metric": metric,
        "seeds": seeds,
        "value": float(first[0]),
        "reference_value": float(second[0]),
        "difference": float(first[0] - second[0]),
        "interval": list(interval),
        "verdict": verdict(metric, interval),
        "relative_change": _finite(relative[0]),
        "relative_interval": [_finite(end) for end in relative_interval],
        "undefined_draws": float(np.isnan(relative[1:]).mean()),
        "events": events,
        "method": method,
        "by_seed": [_one_seed(pool, arm, reference, metric, seed) for seed in seeds],
    }


def bar(comparisons: Sequence[dict[str, Any]], arm: str, metric: str) -> dict[str, Any]:
    """Whether an arm has the fall of a share that the study looks for, condition by condition.

        mean rating:  at most `LARGEST_LOSS` of the reference's lost, as estimated
        KL:           not above the reference's: the interval of the difference reaches 0 or lies below
        share:        falls by at least `SMALLEST_FALL` of the reference's, as estimated, and its interval excludes 0

    `loss_surely_small` is stricter than the bar: the whole interval of the loss lies within the limit. A condition
    that cannot be judged, such as a loss of a mean rating that is not positive, does not hold.
    """
    found = {entry["metric"]: entry for entry in comparisons if entry["arm"] == arm}
    mean, share, kl = found["mean"], found[metric], found["kl"]
    loss = None if mean["relative_change"] is None else -mean["relative_change"]
    low, high = mean["relative_interval"]
    largest, fall = (None if end is None else -end for end in (low, high)), share["relative_change"]
    loss_high, loss_low = largest
    highest = share["relative_interval"][1]
    conditions = {
        "loss_small": loss is not None and loss <= LARGEST_LOSS,
        "kl_not_above": kl["interval"][0] <= 0,
        "fall_large": fall is not None and fall <= -SMALLEST_FALL,
        "interval_excludes_zero": highest is not None and highest < 0,
    }
    return {
        "arm": arm,
        "metric": metric,
        "loss_of_mean": loss,
        "loss_interval": [loss_low, loss_high],
        "relative_change": fall,
        "relative_interval": share["relative_interval"],
        "kl_difference": kl["difference"],
        "kl_interval": kl["interval"],
        "conditions": conditions,
        "loss_surely_small": loss_high is not None and loss_high <= LARGEST_LOSS,
        "met": all(conditions.values()),
    }


def summary(
    runs: Sequence[Run], measurement: Measurement, *, reference: str = "mean", left_out: Sequence[str] = ("base",)
) -> dict[str, Any]:
    """`arms`, `comparisons` and `bar` of a study.

    Args:
        runs: What is finished. Arms without a seed in common with the reference are pooled, but not compared.
        measurement: As for a report.
        reference: The arm that the others are compared with; without any run of it nothing is compared.
        left_out: Arms that cannot meet the bar, because they are where every arm starts.
    """
    pool = Pool(runs, measurement)
    others = [arm for arm in pool.arms if arm != reference and reference in pool.arms]
    others = [arm for arm in others if not pool.seeds(arm) or set(pool.seeds(arm)) & set(pool.seeds(reference))]
    comparisons = [compared(pool, arm, reference, metric) for arm in others for metric in pool.metrics]
    return {
        "arms": [pooled(pool, arm) for arm in pool.arms],
        "comparisons": comparisons,
        "bar": [bar(comparisons, arm, metric) for arm in others if arm not in left_out for metric in SHARES],
    }


def verdict(metric: str, interval: Sequence[float]) -> str:
    """What the interval of a difference says; of the KL, which is no merit, whether it differs."""
    if interval[0] <= 0 <= interval[1]:
        return "undecided"
    if metric not in DIRECTIONS:
        return "higher" if interval[0] > 0 else "lower"
    return "better" if (interval[0] > 0) == (DIRECTIONS[metric] > 0) else "worse"


def overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two intervals have a point in common."""
    return first[0] <= second[1] and second[0] <= first[1]


def _one_seed(pool: Pool, arm: str, reference: str, metric: str, seed: int) -> dict[str, Any]:
    column, statistic = pool.metrics[metric]
    ours, theirs = (
        statistic(column(run), np.ones((1, len(run.prompt_ids)))) for name in (arm, reference)
        for run in pool.runs(name, [seed])
    )  # fmt: skip
    relative = relative_draws(ours, theirs)[0]
    return {"seed": seed, "difference": float(ours[0] - theirs[0]), "relative_change": _finite(relative)}


def _widened(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    return float(min(first[0], second[0])), float(max(first[1], second[1]))


def _finite(number: float) -> float | None:
    # JSON knows no infinity.
    return float(number) if math.isfinite(number) else None
