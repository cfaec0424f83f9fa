"""What two measured trainers say about each other: medians, ratios with their spread, and when not to compare."""

import random
import statistics
from collections.abc import Sequence
from typing import Any

PHASES = ("generation", "scoring", "reference", "old_logprobs_and_values", "update", "rest")
Run = dict[str, Any]


def measured_steps(run: Run, steps: int) -> list[dict[str, float]]:
    """Phase -> seconds of the steps after the warm-up, which is the first.

    Raises:
        ValueError: fewer steps were run.
    """
    if len(run["steps"]) < 1 + steps:
        raise ValueError(f"{steps} steps after one warm-up were asked for, the run has {len(run['steps'])} in all")
    return run["steps"][1 : 1 + steps]


def check_same_tokens(ours: Sequence[Run], peer: Sequence[Run], expected: int) -> None:
    """Refuse a comparison whose sides did not generate the same number of tokens in every step.

    Raises:
        ValueError: some step of some run generated another number of tokens than `expected`.
    """
    for side, runs in (("ours", ours), ("peer", peer)):
        for run in runs:
            different = sorted({count for count in run["tokens"] if count != expected})
            if different or not run["tokens"]:
                found = ", ".join(map(str, different)) or "no"
                raise ValueError(
                    f"{side} generated {found} tokens in a step instead of {expected}: the sides did not do the same "
                    "work and are not compared"
                )


def step_seconds(runs: Sequence[Run], steps: int) -> list[float]:
    """Seconds of every measured step of all runs."""
    return [sum(step.values()) for run in runs for step in measured_steps(run, steps)]


def phase_medians(runs: Sequence[Run], steps: int) -> dict[str, float]:
    """Median seconds of each phase over the measured steps of all runs."""
    rows = [step for run in runs for step in measured_steps(run, steps)]
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in PHASES}


def ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Median of ours over median of the peer's, and the lowest and highest ratio of a pair of neighbouring runs.

    Args:
        ours: one number per round.
        peer: one number per round, measured right after ours.
    """
    pairs = [a / b for a, b in zip(ours, peer, strict=True)]
    return {"ratio": statistics.median(ours) / statistics.median(peer), "low": min(pairs), "high": max(pairs)}


def side(runs: Sequence[Run], steps: int, rate: float | None) -> dict[str, Any]:
    """Numbers of one trainer over its runs.

    Args:
        runs: its runs, one per round.
        steps: measured steps of each.
        rate: operations per second of large matrix products in the dtype of the run, measured on the same machine.

    Returns:
        Medians over steps; `update_share_of_matrix_rate`: operations of the matrix products of one update, counted
        while it ran, divided by its median seconds and by `rate`.
    """
    seconds = step_seconds(runs, steps)
    phases = phase_medians(runs, steps)
    result = {
        "step_seconds": statistics.median(seconds),
        "all_step_seconds": seconds,
        "tokens_per_second": statistics.median(runs[0]["tokens"]) / statistics.median(seconds),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "peak_bytes_before_the_first_step": statistics.median(run["setup_bytes"] for run in runs),
        "trained_parameters": runs[0]["trained_parameters"],
        "phases": phases,
        "log": [run["log"] for run in runs],
        "versions": runs[0]["versions"],
    }
    counted = [run["arithmetic"] for run in runs if run["arithmetic"]]
    if counted and rate:
        result["operations"] = counted[0]
        result["update_share_of_matrix_rate"] = counted[0].get("update", 0.0) / phases["update"] / rate
    return result


def comparison(ours: Sequence[Run], peer: Sequence[Run], steps: int, rates: Sequence[float]) -> dict[str, Any]:
    """Ours against the peer, over rounds in which one ran right after the other.

    Args:
        ours: runs of our trainer, one per round.
        peer: runs of the peer, one per round.
        steps: measured steps of each run.
        rates: measured rate of matrix products in our dtype and in the peer's.
    """
    mine, theirs = side(ours, steps, rates[0]), side(peer, steps, rates[1])
    times = [[statistics.median(step_seconds([run], steps)) for run in runs] for runs in (ours, peer)]
    memory = [[run["peak_bytes"] for run in runs] for runs in (ours, peer)]
    time_ratio, memory_ratio = ratio(*times), ratio(*memory)
    return {
        "time_ratio": time_ratio["ratio"],
        "time_ratio_spread": [time_ratio["low"], time_ratio["high"]],
        "memory_ratio": memory_ratio["ratio"],
        "memory_ratio_spread": [memory_ratio["low"], memory_ratio["high"]],
        "tokens_per_second": mine["tokens_per_second"],
        "peer_tokens_per_second": theirs["tokens_per_second"],
        "phases": {
            name: {"ours": own, "peer": other, "ratio": own / other if other else None}
            for (name, own), other in zip(mine["phases"].items(), theirs["phases"].values(), strict=True)
        },
        "ours": mine,
        "peer": theirs,
    }


def risk_share(run: Run, steps: int) -> dict[str, float]:
    """Share of a step that the risk measure takes, without the reward model: median and largest over the steps."""
    rows = measured_steps(run, steps)
    shares = [row.get("risk", 0.0) / sum(row.values()) for row in rows]
    return {
        "share": statistics.median(shares),
        "largest_share": max(shares),
        "risk_seconds": statistics.median(row.get("risk", 0.0) for row in rows),
        "step_seconds": statistics.median(sum(row.values()) for row in rows),
    }


def spread_lengths(shortest: int, longest: int, count: int) -> list[int]:
    """`count` lengths evenly from shortest to longest, in an arbitrary order that is always the same.

    Raises:
        ValueError: fewer than two lengths, or a range that is none.
    """
    if count < 2 or not 1 <= shortest < longest:
        raise ValueError(f"{count} lengths from {shortest} to {longest} cannot be spread")
    lengths = [round(shortest + (longest - shortest) * place / (count - 1)) for place in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


def table(configurations: dict[str, Any], targets: dict[str, dict[str, float]]) -> str:
    """The comparisons as text, phase by phase."""
    lines = []
    for name, row in configurations.items():
        if "time_ratio" not in row:
            continue
        target = targets.get(name, {})
        lines.append(f"\n{name}: seconds per step, ours against the peer")
        for phase, part in row["phases"].items():
            ratio_text = f"{part['ratio']:.2f}" if part["ratio"] is not None else "-"
            lines.append(f"  {phase:<26}{part['ours']:>10.3f}{part['peer']:>10.3f}{ratio_text:>8}")
        mine, theirs = row["ours"], row["peer"]
        for label, key, scale in (
            ("step", "step_seconds", 1),
            ("tokens per second", "tokens_per_second", 1),
            ("peak memory, GB", "peak_bytes", 1e9),
        ):
            lines.append(f"  {label:<26}{mine[key] / scale:>10.3f}{theirs[key] / scale:>10.3f}")
        shares = [part.get("update_share_of_matrix_rate") for part in (mine, theirs)]
        if None not in shares:
            lines.append(f"  {'update, share of matmul rate':<28}{shares[0]:>8.0%}{shares[1]:>10.0%}")
        for kind in ("time_ratio", "memory_ratio"):
            low, high = row[f"{kind}_spread"]
            wanted = f", target {target[kind]:g}" if kind in target else ""
            lines.append(f"  {kind} {row[kind]:.3f} [{low:.3f}, {high:.3f}]{wanted}")
    return "\n".join(lines)
