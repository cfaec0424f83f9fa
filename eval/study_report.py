"""What a study of several arms and seeds found: a row per run, the training logs behind them, and tables to read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from eval.judges import Judgement
from eval.report import Measurement, PolicyResult, ranged, summarise
from eval.study import overlap
from reward.distribution import RewardDistribution

KEPT = (
    *("n", "prompts", "excluded", "mean", "mean_ci", "extremely_negative_rate", "extremely_negative_rate_ci"),
    *("rating_mass", "rating_mass_ci", "cvar", "cvar_ci", "kl", "kl_ci", "mean_tokens"),
)
OF_THE_REWARD_MODEL = ("mean", "mean_ci", "cvar", "cvar_ci", "rating_mass", "rating_mass_ci")
# Result key -> logged key; one value per rollout.
CURVES = {
    "kl": "kl/reference",
    "kl_coef": "kl/coef",
    "rating_mean": "reward/rating_mean",
    "population_cvar_0.1": "population/rating_cvar_0.1",
    "effective_samples": "risk/effective_samples",
}
RANKS = 200
BEGIN, END = "<!-- begin: make study-risk -->", "<!-- end: make study-risk -->"


def study_row(
    arm: str,
    seed: int | None,
    result: PolicyResult,
    measurement: Measurement,
    *,
    predicted: Judgement,
    history: Sequence[Mapping[str, Any]] = (),
    seconds: float | None = None,
) -> dict[str, Any]:
    """One entry of `rows`.

    Args:
        arm, seed: Which run; seed None where nothing was trained or drawn anew.
        result: Its completions and what the judge said.
        measurement: Threshold, tail mass, level, draws.
        predicted: What the reward model says of the same completions. It rewarded them, so this is no measurement:
            far above the judge, it is what the policy learnt of the reward model's mistakes.
        history: `log_history` of the training.
        seconds: That the training took.
    """
    entry = summarise(result, measurement)
    own = summarise(PolicyResult(result.name, result.completions, predicted), measurement)
    law = predicted.distribution
    return {
        "arm": arm,
        "seed": seed,
        **{key: entry[key] for key in KEPT},
        "reward_model": {
            **{key: own[key] for key in OF_THE_REWARD_MODEL},
            "reading_cvar": reading_cvar(law, measurement.cvar_alpha),
        },
        "training_seconds": seconds,
        "training": training_curves(history),
    }


def reading_cvar(laws: RewardDistribution, alpha: float) -> float:
    """Mean of the worst `alpha` of all readings: the CVaR of the mixture of the answers' laws.

    Each law stands for itself by `RANKS` of its quantiles at equal distances.

    Args:
        laws: (n,); a law that is not finite is left out.
        alpha: Lower-tail mass.
    """
    laws = laws[laws.values.isfinite().all(-1)]
    ranks = (torch.arange(RANKS, dtype=laws.values.dtype) + 0.5) / RANKS
    readings = laws.quantile(ranks).flatten().double().sort().values
    return readings[: max(1, round(alpha * len(readings)))].mean().item()


def training_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What a training logged of each rollout, and of each of its constraints."""
    logged = dict(CURVES)
    for entry in history:
        logged |= {key: key for key in entry if key.startswith("constraint/")}
    curves = {name: [entry[key] for entry in history if entry.get(key) is not None] for name, key in logged.items()}
    return {name: curve for name, curve in curves.items() if curve}


def last_values(history: Sequence[Mapping[str, Any]], key: str, share: float = 0.25) -> float:
    """Mean of a logged number over the last `share` of its entries.

    Raises:
        ValueError: It was never logged.
    """
    values = [entry[key] for entry in history if entry.get(key) is not None]
    if not values:
        raise ValueError(f"the training log has no {key!r}")
    return float(np.mean(values[-max(1, round(share * len(values))) :]))


def flag_distances(rows: Sequence[dict[str, Any]], reference: str = "mean") -> list[str]:
    """Adds `kl_overlaps_reference` to each row: whether its KL interval meets that of the reference arm of its seed.

    A row without a seed is held against each seed of the reference. None where there is nothing to hold against.

    Returns:
        One sentence per row that stands elsewhere, for `warnings`.
    """
    intervals = {row["seed"]: row["kl_ci"] for row in rows if row["arm"] == reference}
    notes = []
    for row in rows:
        against = [ci for seed, ci in intervals.items() if row["seed"] in (None, seed)]
        known = row["kl_ci"] is not None and against and None not in against
        row["kl_overlaps_reference"] = all(overlap(row["kl_ci"], ci) for ci in against) if known else None
        if row["kl_overlaps_reference"] is False and row["seed"] is not None:
            (ci,) = against
            notes.append(
                f"{row['arm']}, seed {row['seed']}: KL {ranged(row['kl'], row['kl_ci'])} nats, {reference} "
                f"[{ci[0]:.2f}, {ci[1]:.2f}]: not at equal KL"
            )
    return notes


def markdown(study: Mapping[str, Any], reference: str = "mean") -> str:
    """The study as two tables and its verdicts, for docs/results.md."""
    worst, mass = f"CVaR {100 * study['cvar_alpha']:g} %", f"ratings ≤ {study['rating_threshold']:g}"
    lines = [
        f"| arm | seeds | mean rating | extremely negative | {worst} | {mass} | KL, nats | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in study["arms"]:
        cells = [
            arm["arm"].replace("_", " "),
            ", ".join(map(str, arm["seeds"])) or "–",
            ranged(arm["mean"], arm["mean_ci"]),
            ranged(arm["extremely_negative_rate"], arm["extremely_negative_rate_ci"], percent=True),
            ranged(arm["cvar"], arm["cvar_ci"]),
            ranged(arm["rating_mass"], arm["rating_mass_ci"], percent=True),
            "–" if arm["kl"] is None else ranged(arm["kl"], arm["kl_ci"]),
            str(arm["n"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| against {reference} | mean rating | extremely negative | {mass} | KL, nats | meets the bar |",
        "|---|---|---|---|---|---|",
    ]
    found = {(entry["arm"], entry["metric"]): entry for entry in study["comparisons"]}
    met = {entry["arm"]: entry["met"] for entry in study["bar"] if entry["metric"] == "extremely_negative_rate"}
    for arm in dict.fromkeys(entry["arm"] for entry in study["comparisons"]):
        kl = found[arm, "kl"]
        cells = [
            arm.replace("_", " "),
            *(_change(found[arm, metric]) for metric in ("mean", "extremely_negative_rate", "rating_mass")),
            f"{kl['difference']:+.2f} [{kl['interval'][0]:.2f}, {kl['interval'][1]:.2f}]",
            {True: "yes", False: "no", None: "–"}[met.get(arm)],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + [f"\n- {note}" for note in study["warnings"]])


def by_reward_model(study: Mapping[str, Any]) -> str:
    """What the reward model says of its own policies, which is no measurement: means over the runs of each arm."""
    worst, mass = f"CVaR {100 * study['cvar_alpha']:g} % of readings", f"ratings ≤ {study['rating_threshold']:g}"
    lines = [f"| arm | runs | mean rating | {worst} | {mass} |", "|---|---|---|---|---|"]
    for arm in dict.fromkeys(row["arm"] for row in study["rows"]):
        runs = [row["reward_model"] for row in study["rows"] if row["arm"] == arm]
        mean, cvar, share = (np.mean([run[key] for run in runs]) for key in ("mean", "reading_cvar", "rating_mass"))
        lines.append(f"| {arm.replace('_', ' ')} | {len(runs)} | {mean:.2f} | {cvar:.2f} | {100 * share:.1f} % |")
    return "\n".join(lines)


def told(document: str, text: str) -> str:
    """A document with the text between its two marks, the lines `BEGIN` and `END`.

    Raises:
        ValueError: It has not each of them once, in this order.
    """
    before, begin, rest = document.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the document needs one line {BEGIN} and one line {END} after it")
    return f"{before}{begin}{text}\n{end}{after}"


def _change(entry: Mapping[str, Any]) -> str:
    """A change in percent with its interval; ∞ where an end does not exist."""
    low, high = entry["relative_interval"]
    ends = f"[{'-∞' if low is None else f'{100 * low:.0f}'}, {'∞' if high is None else f'{100 * high:.0f}'}]"
    change = entry["relative_change"]
    return f"{'–' if change is None else f'{100 * change:+.0f} %'} {ends}"
