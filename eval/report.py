"""What the evaluation found, as `report.json` and as a table for the terminal. `eval.page` makes the web page."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from eval.intervals import (
    Estimate,
    Statistic,
    bootstrap_interval,
    check_alpha,
    cvar_statistic,
    paired_difference,
    weighted_mean,
)
from eval.judges import Judge, Judgement
from eval.records import Row, write_text
from eval.tail import Threshold, extremely_negative_rate, quantiles, rate_difference, rating_mass, worst_of_n

QUANTILE_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)

# Direction of each compared metric: 1 where more is better.
DIRECTIONS = {"mean": 1, "extremely_negative_rate": -1, "cvar": 1, "rating_mass": -1}


@dataclass(frozen=True, eq=False)
class PolicyResult:
    """One policy's completions and what the judge said, in the same order."""

    name: str
    completions: Sequence[Row]
    judgement: Judgement

    @property
    def scores(self) -> np.ndarray:
        return self.judgement.scores

    @property
    def prompt_ids(self) -> list[str]:
        return [row["prompt_id"] for row in self.completions]

    def column(self, name: str) -> np.ndarray:
        """(n,) float64 of one field of the completions, NaN for null."""
        return np.array([math.nan if row[name] is None else row[name] for row in self.completions], dtype=np.float64)


@dataclass(frozen=True)
class Measurement:
    """Settings that every number of a report shares.

    Attributes:
        threshold: At or below it a completion is extremely negative.
        cvar_alpha: Lower-tail mass of the CVaR.
        rating_threshold: A reading is extremely negative when its rating is at or below this; None leaves it out.
        level: Confidence level of all intervals.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """

    threshold: Threshold
    cvar_alpha: float = 0.1
    rating_threshold: float | None = None
    level: float = 0.95
    resamples: int = 2000
    seed: int = 0

    @property
    def bootstrap(self) -> dict[str, Any]:
        return {"level": self.level, "resamples": self.resamples, "seed": self.seed}


def build_report(
    results: Sequence[PolicyResult],
    measurement: Measurement,
    judge: Judge,
    *,
    reference: str | None = None,
    reads: str = "prompt+completion",
    seconds: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All numbers of an evaluation, each with its interval and its sample size.

    Args:
        results: One per policy.
        measurement: Threshold, tail mass, confidence level.
        judge: The judge that gave the scores.
        reference: Name of the policy that the others are compared with; None takes the first.
        reads: What the judge was shown.
        seconds: Duration of each stage.
        settings: Anything else worth recording.

    Returns:
        `policies`, `comparisons`, `threshold`, `judge` and the settings; plain values for JSON.

    Raises:
        ValueError: No policy, a name twice, an unknown reference, or a policy with nothing to estimate from.
    """
    names = [result.name for result in results]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs one or more policies with different names, got {names or 'none'}")
    reference = reference or names[0]
    if reference not in names:
        raise ValueError(f"the reference policy {reference!r} is not among {', '.join(names)}")
    check_alpha(measurement.cvar_alpha)
    ordered = sorted(results, key=lambda result: result.name != reference)
    policies = [_named(result, summarise, result, measurement) for result in results]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "judge": judge.spec,
        "judge_unit": judge.unit,
        "judge_reads": reads,
        "threshold": measurement.threshold.value,
        "threshold_source": measurement.threshold.source,
        "reference": reference,
        "cvar_alpha": measurement.cvar_alpha,
        "rating_threshold": measurement.rating_threshold,
        "level": measurement.level,
        "policies": policies,
        "comparisons": [
            entry for first, second in combinations(ordered, 2) for entry in compare(second, first, measurement)
        ],
        "warnings": _warnings(results, policies, measurement, reference),
        "seconds": {stage: round(value, 1) for stage, value in (seconds or {}).items()},
        "settings": settings or {},
    }


def summarise(result: PolicyResult, measurement: Measurement) -> dict[str, Any]:
    """One entry of `policies`."""
    scores, ids = result.scores, result.prompt_ids
    mean = bootstrap_interval(scores, ids, **measurement.bootstrap)
    rate = extremely_negative_rate(scores, measurement.threshold, ids, level=measurement.level)
    tail = bootstrap_interval(scores, ids, cvar_statistic(measurement.cvar_alpha), **measurement.bootstrap)
    tokens = result.column("completion_tokens")
    entry = {
        "name": result.name,
        "source": result.completions[0].get("source"),
        "n": mean.n,
        "prompts": mean.prompts,
        "excluded": mean.excluded,
        **_with_interval("mean", mean),
        "std": _std(scores[np.isfinite(scores)]),
        **_with_interval("extremely_negative_rate", rate),
        "effective_n": rate.effective_n,
        **_with_interval("cvar", tail),
        "quantiles": {f"{level:g}": value for level, value in quantiles(scores, QUANTILE_LEVELS).items()},
        **_kl(result, measurement),
        "mean_tokens": float(tokens.mean()),
        "finished": float(np.mean([row["finished"] for row in result.completions])),
    }
    masses = _masses(result, measurement)
    if masses is not None:
        entry |= _with_interval("rating_mass", rating_mass(masses, ids, **measurement.bootstrap))
    samples = min(np.unique(np.array(ids)[np.isfinite(scores)], return_counts=True)[1])
    if samples > 1:
        lowest, prompts = worst_of_n(scores, ids, int(samples))
        entry["worst_of"] = int(samples)
        entry |= _with_interval("worst_of_n", bootstrap_interval(lowest, prompts, **measurement.bootstrap))
    return entry


def compare(policy: PolicyResult, reference: PolicyResult, measurement: Measurement) -> list[dict[str, Any]]:
    """policy − reference for each metric, with the prompt-paired interval and what it says.

    `verdict` is "better" or "worse" when the interval excludes zero, else "undecided". Intervals are not adjusted
    for the number of comparisons.
    """
    options = measurement.bootstrap
    pair = (policy.scores, policy.prompt_ids, reference.scores, reference.prompt_ids)
    differences = {
        "mean": paired_difference(*pair, weighted_mean, **options),
        "extremely_negative_rate": rate_difference(*pair, measurement.threshold, **options),
        "cvar": paired_difference(*pair, _cvar(measurement), **options),
    }
    masses, reference_masses = _masses(policy, measurement), _masses(reference, measurement)
    if masses is not None and reference_masses is not None:
        differences["rating_mass"] = paired_difference(
            masses, policy.prompt_ids, reference_masses, reference.prompt_ids, weighted_mean, **options
        )
    return [
        {
            "policy": policy.name,
            "reference": reference.name,
            "metric": metric,
            "difference": estimate.value,
            "interval": list(estimate.interval),
            "verdict": _verdict(estimate, DIRECTIONS[metric]),
            "n": estimate.n,
            "n_reference": estimate.n_reference,
            "prompts": estimate.prompts,
            "method": estimate.method,
        }
        for metric, estimate in differences.items()
    ]


def write_report(path: str | Path, report: dict[str, Any]) -> None:
    """Writes `report.json` atomically."""
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def terminal_table(report: dict[str, Any]) -> str:
    """The report in a hundred-odd columns of plain text: policies, then differences, then warnings."""
    header = [
        "policy",
        "mean",
        f"rate <= {report['threshold']:.2f}",
        f"CVaR {report['cvar_alpha']:g}",
        *([] if report["rating_threshold"] is None else [f"P(rating <= {report['rating_threshold']:g})"]),
        "KL, nats",
        "tokens",
        "n (prompts)",
    ]
    rows = [
        [
            p["name"],
            ranged(p["mean"], p["mean_ci"]),
            ranged(p["extremely_negative_rate"], p["extremely_negative_rate_ci"], percent=True),
            ranged(p["cvar"], p["cvar_ci"]),
            *(
                []
                if report["rating_threshold"] is None
                else [ranged(p["rating_mass"], p["rating_mass_ci"], percent=True) if "rating_mass" in p else "-"]
            ),
            "-" if p["kl"] is None else f"{p['kl']:.2f}",
            f"{p['mean_tokens']:.1f}",
            f"{p['n']} ({p['prompts']})",
        ]
        for p in report["policies"]
    ]
    level = f"{report['level']:.0%}"
    lines = [
        f"judge {report['judge']} ({report['judge_unit']}), threshold {report['threshold']:.3f} "
        f"({report['threshold_source']}), {level} intervals over prompts",
        *_aligned([header, *rows]),
    ]
    if report["comparisons"]:
        table = [["difference", "metric", "value", "verdict"]] + [
            [
                f"{c['policy']} - {c['reference']}",
                c["metric"].replace("_", " "),
                ranged_difference(c["difference"], c["interval"], percent=is_share(c["metric"])),
                c["verdict"],
            ]
            for c in report["comparisons"]
        ]
        lines += ["", *_aligned(table)]
    return "\n".join(lines + [f"note: {warning}" for warning in report["warnings"]])


def is_share(metric: str) -> bool:
    """Whether a metric is a probability, shown in percent."""
    return metric in ("extremely_negative_rate", "rating_mass")


def ranged(value: float, interval: Sequence[float], *, percent: bool = False) -> str:
    """A number with its interval, as "0.52 [0.47, 0.58]" or "1.2 % [0.6, 2.1]"."""
    if percent:
        return f"{_number(100 * value, 1)} % [{_number(100 * interval[0], 1)}, {_number(100 * interval[1], 1)}]"
    return f"{_number(value, 2)} [{_number(interval[0], 2)}, {_number(interval[1], 2)}]"


def ranged_difference(value: float, interval: Sequence[float], *, percent: bool = False) -> str:
    """A signed difference with its interval, as "+0.521 [+0.473, +0.580]"; shares in percentage points, "pp"."""
    scale, digits, unit = (100, 2, " pp") if percent else (1, 3, "")
    number, low, high = (_number(scale * x, digits, "+") for x in (value, *interval))
    return f"{number}{unit} [{low}, {high}]"


def _number(value: float, digits: int, sign: str = "") -> str:
    """Fixed digits, without the minus of a rounded zero."""
    shown = f"{value:{sign}.{digits}f}"
    return shown if float(shown) != 0 else f"{0.0:.{digits}f}"


def _cvar(measurement: Measurement) -> Statistic:
    return cvar_statistic(measurement.cvar_alpha)


def _masses(result: PolicyResult, measurement: Measurement) -> np.ndarray | None:
    if measurement.rating_threshold is None:
        return None
    return result.judgement.tail_mass(measurement.rating_threshold)


def _kl(result: PolicyResult, measurement: Measurement) -> dict[str, Any]:
    """KL to the base: mean of the sequence sums (k1), and per token (k3)."""
    sums, per_token = result.column("kl_k1_sum"), result.column("kl_k3_mean")
    if not np.isfinite(sums).any():
        return {"kl": None, "kl_ci": None, "kl_per_token": None}
    finite = np.isfinite(per_token)
    tokens = result.column("completion_tokens")[finite]
    return {
        **_with_interval("kl", bootstrap_interval(sums, result.prompt_ids, **measurement.bootstrap)),
        # Empty completions alone have no token to divide by.
        "kl_per_token": float((per_token[finite] * tokens).sum() / tokens.sum()) if tokens.sum() > 0 else None,
    }


def _with_interval(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_ci": list(estimate.interval)}


def _verdict(estimate: Estimate, direction: int) -> str:
    if estimate.low <= 0 <= estimate.high:
        return "undecided"
    return "better" if (estimate.value > 0) == (direction > 0) else "worse"


def _warnings(
    results: Sequence[PolicyResult], policies: Sequence[dict], measurement: Measurement, reference: str
) -> list[str]:
    """What a reader must know before trusting the numbers."""
    notes = []
    for result, entry in zip(results, policies, strict=True):
        if entry["excluded"]:
            notes.append(
                f"{result.name}: {entry['excluded']} of {len(result.scores)} completions have no finite score and "
                "are left out of every number"
            )
        decoding = result.completions[0].get("decoding", {})
        cut = decoding.get("top_p", 1.0) < 1 or decoding.get("top_k", 0) > 0 or decoding.get("temperature") == 0
        if cut and entry["kl"]:
            notes.append(f"{result.name}: decoding was not plain sampling, so its KL estimate is biased")
        selection = result.completions[0].get("selection")
        if selection:
            notes.append(
                f"{result.name}: the best of {selection['n']} by {selection['risk']}, {selection['scope']} scope, at "
                f"{selection['n']} times the cost of generation; its KL is an upper bound"
            )
    if measurement.threshold.reference is not None:
        frozen = measurement.threshold
        notes.append(
            f"the threshold is the {frozen.quantile:g} quantile of {frozen.reference}, whose own rate is therefore "
            "about that by construction"
        )
    prompts = min(entry["prompts"] for entry in policies)
    worst = measurement.cvar_alpha * prompts
    # Normal scores, alpha 0.1: the 95 % interval covers 89 % with 100 prompts, 94 % with 300.
    if worst < 20:
        notes.append(
            f"the worst {measurement.cvar_alpha:g} of {prompts} prompts are about {worst:.0f}: the CVaR intervals are "
            "too short; evaluate on more prompts"
        )
    if len({tuple(sorted(set(result.prompt_ids))) for result in results}) > 1:
        notes.append(f"the policies were not run on the same prompts; comparisons with {reference} use shared ones")
    return notes


def _named(result: PolicyResult, function, *arguments):
    """Calls a function and puts the policy's name before its complaint."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"policy {result.name!r}: {error}") from error


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, a rule under the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _std(scores: np.ndarray) -> float:
    """Standard deviation of scores of any size; squares of large ones leave float64."""
    scale = max(float(np.abs(scores).max()), np.finfo(float).tiny)
    return scale * float((scores / scale).std())
