"""Which risk measures can matter for a policy, a reward model and a judge: before anything is trained.

    python recipes/compare_risk.py --completions runs/evaluation/completions/base.jsonl \\
        --reward_model runs/quickstart/qrm --judge qrm:runs/quickstart/judge \\
        --risks mean cvar:0.1 population:cvar:0.1 --output_dir runs/compare_risk

The completions are those that `evaluate.py --num_samples 8` writes for the policy before training. Every measure ranks
the completions of each prompt by its utility, in response scope or, behind `population:`, by its expected influence at
the law of all of them; the judge, another model, says what came of it:

    slope of the mean   what the policy's mean rating gains for each root of a nat of KL when it begins to follow this
                        utility as well as any policy could
    slope of the tail   the same for the share of readings at or below --rating_threshold, as a fall
    best of n           that share, and the mean rating, of the completions with the highest utility, against those
                        with the highest mean: relative changes

and, for each --kl, how far the best policy at that KL would go: the completions weighed anew by their utility
(eval/tilt.py), its mean rating, its share of readings at or below --rating_threshold and its share of completions at
or below the --reference_quantile of all of them, against the policy that follows the mean as far:

    --kl 0.5 1 2        takes many completions per prompt: n of them show at most log n nats

with 95 % bootstrap intervals over prompts. A second table follows the judge's own laws in place of the reward model's:
what a reward model without any error could gain by each measure, by this judge, from these completions: how much the
errors of the reward model cost. Training adds its own noise to both, and what it learns about prompts that it has not
seen. Writes compare_risk.json and the judge's scores into --output_dir; with --kl, best_policies.png too.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from eval.completions import candidates, check_judge, models_of, read_completions
from eval.intervals import Estimate, check_level
from eval.judges import judge_completions, parse_judge
from eval.laws import candidate_laws
from eval.records import Row, write_text
from eval.signal import first_order_gain, prompt_draws, selected_change
from eval.study_figures import save, tilt_figure
from eval.tilt import tilt_by, tilted_change
from reward.distribution import RewardDistribution
from rlhf.command_line import run
from rlhf.influence import check_population_scope, expected_influence, population_law, statistics
from rlhf.preflight import check_launch
from rlhf.reward_function import RiskReward
from rlhf.risk import RiskMeasure, parse_risk

POPULATION = "population:"


@dataclass
class CompareArguments:
    """What is compared, on what."""

    completions: str = field(
        default=None, metadata={"help": "JSONL of evaluate.py with several completions per prompt (required)."}
    )
    reward_model: str = field(default=None, metadata={"help": "Reward model of the training to come (required)."})
    judge: str = field(
        default=None,
        metadata={"help": "Judge with laws, as in evaluate.py, that is another model: qrm: or source: (required)."},
    )
    risks: list[str] = field(
        default_factory=lambda: ["cvar:0.1", "cvar:0.5", "mean_std:1", "population:cvar:0.1", "population:cvar:0.5"],
        metadata={"help": "Risk measures; population:SPEC for population scope. The mean is always among them."},
    )
    rating_threshold: float = field(default=-2.0, metadata={"help": "A reading at or below it is extremely negative."})
    kl: list[float] = field(
        default_factory=list, metadata={"help": "KLs to the base, nats per completion, at which to compare measures."}
    )
    reference_quantile: float = field(
        default=0.05, metadata={"help": "Completions this low among all are extremely negative (for --kl)."}
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Score at or below which a completion is extremely negative, where it is known from elsewhere. "
            "Unset: by reference_quantile."
        },
    )
    output_dir: str = field(default=None, metadata={"help": "Folder to write to (required)."})
    n: int | None = field(default=None, metadata={"help": "Completions per prompt. Unset: all that there are."})
    confidence: float = field(default=0.95, metadata={"help": "Level of the intervals."})
    resamples: int = field(default=2000, metadata={"help": "Bootstrap draws of prompts."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    batch_size: int = field(default=32, metadata={"help": "Texts per forward pass."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a text. Unset: the context."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the reward model's weights."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where a GPU is visible."})


def main(args: CompareArguments) -> None:
    """Check, ask both models, compare, write."""
    measures = check_arguments(args)
    groups = candidates(read_completions(args.completions), args.n)
    if len(groups[0]) < 2:
        raise ValueError(
            f"{args.completions} has one completion per prompt, and measures are compared within prompts; generate "
            "more with evaluate.py --num_samples 4"
        )
    rows = [row for group in groups for row in group]
    judge = parse_judge(args.judge, batch_size=args.batch_size, max_length=args.max_length)
    if set(models_of(args.reward_model)) & set(models_of(args.judge.partition(":")[2])):
        raise ValueError("the judge is the reward model, which cannot see its own mistakes; give another --judge.")
    check_judge(rows, judge, args.completions)
    state = PartialState(cpu=True) if args.use_cpu else PartialState()
    check_launch(args)
    reading = {"batch_size": args.batch_size, "max_length": args.max_length, "dtype": args.dtype}
    reward = RiskReward(args.reward_model, "mean", trust_remote_code=args.trust_remote_code, **reading)
    laws = candidate_laws(reward, groups)
    judgement = judge_completions(judge, rows, path=Path(args.output_dir, "scores.jsonl"), name="all")
    masses = judgement.tail_mass(args.rating_threshold)
    shape = laws.batch_shape
    scores = judgement.scores.reshape(shape)
    threshold = float(np.quantile(scores, args.reference_quantile)) if args.threshold is None else args.threshold
    outcomes = {"mean": scores, "tail": masses.reshape(shape)}
    if state.is_main_process:
        table = compare(measures, laws, outcomes, args)
        judged = RewardDistribution(judgement.distribution.levels, judgement.distribution.values.reshape(*shape, -1))
        ceiling = compare(measures, judged, outcomes, args)
        with_rate = outcomes | {"rate": (scores <= threshold).astype(np.float64)}
        tilts = [
            {"laws": name, **row}
            for name, of in (("reward model", laws), ("judge", judged))
            for row in compare_tilts(measures, of, with_rate, args, distances(rows, shape))
        ]
        result: Row = {
            "completions": args.completions,
            "reward_model": args.reward_model,
            "judge": args.judge,
            "rating_threshold": args.rating_threshold,
            "prompts": shape[0],
            "n": shape[1],
            "level": args.confidence,
            "measures": table,
            "measures_by_the_judges_laws": ceiling,
            "reference_quantile": args.reference_quantile if args.threshold is None else None,
            "threshold": threshold,
            "tilts": tilts,
        }
        path = Path(args.output_dir, "compare_risk.json")
        write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        parts = [printed(table, result), "by the judge's own laws", printed(ceiling, result)]
        if tilts:
            parts.append(printed_tilts(tilts))
            if any("outcomes" in row and row["laws"] == "reward model" for row in tilts):
                save(tilt_figure(tilts), path.with_name("best_policies.png"))
        print("\n\n".join([*parts, str(path)]), flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()


def check_arguments(args: CompareArguments) -> dict[str, tuple[str, RiskMeasure]]:
    """Refuse what could not work before anything is loaded; scope and measure of each name, the mean first."""
    for name in ("completions", "reward_model", "judge", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is required.")
    if args.judge.partition(":")[0] not in ("qrm", "source"):
        raise ValueError(f"--judge {args.judge} predicts no laws; the tail needs qrm:PATH or source:SPEC.")
    if args.batch_size < 1 or args.resamples < 1:
        raise ValueError("--batch_size and --resamples must be at least 1.")
    check_level(args.confidence)
    if not all(0 < kl < math.inf for kl in args.kl):
        raise ValueError(f"--kl takes distances above 0, in nats per completion, got {args.kl}")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise ValueError(f"--threshold must be a finite score, got {args.threshold}")
    if not 0 < args.reference_quantile < 1:
        raise ValueError(f"--reference_quantile must lie between 0 and 1, got {args.reference_quantile}")
    measures = {"mean": ("response", parse_risk("mean"))}
    for name in args.risks:
        scope = "population" if name.startswith(POPULATION) else "response"
        measure = parse_risk(name.removeprefix(POPULATION))
        if scope == "population":
            check_population_scope(measure)
        measures.setdefault(name, (scope, measure))
    return measures


def compare(
    measures: dict[str, tuple[str, RiskMeasure]],
    laws: RewardDistribution,
    outcomes: dict[str, np.ndarray],
    args: CompareArguments,
) -> list[Row]:
    """One row per measure."""
    laws = laws.to(torch.float64)
    population = population_law(RewardDistribution(laws.levels, laws.values.flatten(0, 1)))
    draws = prompt_draws(laws.batch_shape[0], args.resamples, args.seed)
    level, rows, by_mean = {"level": args.confidence}, [], None
    for name, (scope, measure) in measures.items():
        if scope == "response":
            utilities = measure(laws)
        else:
            utilities = expected_influence(measure, laws, statistics(measure, population))
        utilities = utilities.numpy()
        chosen = utilities.argmax(1)
        by_mean = chosen if by_mean is None else by_mean
        best = {key: float(values[np.arange(len(chosen)), chosen].mean()) for key, values in outcomes.items()}
        change = {key: selected_change(values, chosen, by_mean, draws, **level) for key, values in outcomes.items()}
        rows.append(
            {
                "measure": name,
                "slope_of_mean": _plain(first_order_gain(utilities, outcomes["mean"], draws, **level)),
                "slope_of_tail": _plain(first_order_gain(utilities, -outcomes["tail"], draws, **level)),
                "best_of_n": best,
                "best_of_n_change": {key: _plain(found) for key, found in change.items()},
            }
        )
    return rows


def compare_tilts(
    measures: dict[str, tuple[str, RiskMeasure]],
    laws: RewardDistribution,
    outcomes: dict[str, np.ndarray],
    args: CompareArguments,
    moved: np.ndarray | None,
) -> list[Row]:
    """One row per KL and measure: what the best policy at that KL would do, and how that differs from the mean's.

    Args:
        measures, laws, outcomes, args: As for `compare`.
        moved: (P, n) log(π/π₀) of each completion; with it a row says how far the best policy at a KL from π is from
            π₀, E log(w/π) + E log(π/π₀).
    """
    laws, rows = laws.to(torch.float64), []
    draws = prompt_draws(laws.batch_shape[0], args.resamples, args.seed)
    for kl in args.kl:
        by_mean = None
        for name, (scope, measure) in measures.items():
            try:
                weights = tilt_by(measure, scope, laws, kl).weights
            except ValueError as error:
                rows.append({"kl": kl, "measure": name, "refused": str(error)})
                continue
            by_mean = weights if name == "mean" else by_mean
            change = {}
            if by_mean is not None:
                change = {
                    key: _plain(tilted_change(values, weights, by_mean, draws, level=args.confidence))
                    for key, values in outcomes.items()
                }
            reached = {key: float((weights * values).sum(1).mean()) for key, values in outcomes.items()}
            total = None if moved is None else kl + float((weights * moved).sum(1).mean())
            rows.append({"kl": kl, "measure": name, "kl_to_base": total, "outcomes": reached, "change": change})
    return rows


def distances(rows: list[Row], shape: tuple[int, ...]) -> np.ndarray | None:
    """(P, n) log(π/π₀) of the completions by what drew them, None where any of them does not know."""
    known = [row["kl_k1_sum"] for row in rows]
    return None if None in known else np.array(known, dtype=np.float64).reshape(shape)


def printed_tilts(rows: list[Row]) -> str:
    """The rows as tables, one per KL and maker of laws."""
    width, lines, last = max(len(row["measure"]) for row in rows), [], None
    keys = {"mean": "mean rating", "tail": "readings in the tail", "rate": "extremely negative"}
    for row in rows:
        if (row["laws"], row["kl"]) != last:
            last = row["laws"], row["kl"]
            lines += ["", f"best policies at {row['kl']:g} nats by the laws of the {row['laws']}, against the mean's"]
            lines.append(f"{'':{width}}  " + "  ".join(f"{title:>24}" for title in keys.values()))
        if "refused" in row:
            cells = [row["refused"]]
        elif row["measure"] == "mean":
            cells = [f"{row['outcomes']['mean']:+.3f}", *(f"{row['outcomes'][key]:.2%}" for key in ("tail", "rate"))]
        else:
            cells = [_cell(row["change"].get(key), 100, "+.0f", " %") for key in keys]
        lines.append(f"{row['measure']:{width}}  " + "  ".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines[1:])


def printed(table: list[Row], result: Row) -> str:
    """The rows as a table."""
    width = max(len(row["measure"]) for row in table)
    n, limit = result["n"], result["rating_threshold"]
    lines = [
        f"{result['prompts']} prompts, {n} completions each; tail: readings <= {limit:g}; by {result['judge']}",
        "",
        f"{'':{width}}  {'mean per √nat':>22}  {'fall of tail, points':>22}  "
        f"{f'best of {n}: mean':>24}  {f'best of {n}: tail':>24}",
    ]
    for row in table:
        cells = [
            _cell(row["slope_of_mean"], 1, "+.2f"),
            _cell(row["slope_of_tail"], 100, "+.2f"),
            *(_cell(row["best_of_n_change"][key], 100, "+.0f", " %") for key in ("mean", "tail")),
        ]
        widths = (22, 22, 24, 24)
        lines.append(
            f"{row['measure']:{width}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )
    best = table[0]["best_of_n"]
    lines += ["", f"best of {n} by the mean: mean rating {best['mean']:+.2f}, tail {best['tail']:.1%}"]
    return "\n".join(lines)


def _plain(estimate: Estimate | None) -> Row | None:
    """For JSON, which has no infinity: an open end is None."""
    if estimate is None:
        return None
    ends = {
        name: end if math.isfinite(end) else None for name, end in (("low", estimate.low), ("high", estimate.high))
    }
    return {"value": estimate.value, **ends, "n": estimate.n, "prompts": estimate.prompts}


def _cell(found: Row | None, scale: float, style: str, unit: str = "") -> str:
    if found is None:
        return "none"
    low, high = ("open" if found[end] is None else f"{scale * found[end]:{style}}" for end in ("low", "high"))
    return f"{scale * found['value']:{style}}{unit} [{low}, {high}]"


GROUPS = (CompareArguments,)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
