"""Take one of n completions of each prompt by a risk measure of their predicted ratings: no training at all.

    python recipes/best_of_n.py --completions runs/evaluation/completions/base.jsonl \\
        --reward_model runs/quickstart/qrm --risk cvar:0.1 --risk_scope population --n 4 --output best_of_4.jsonl

The completions are those that `evaluate.py --num_samples 4` writes. The selected ones go back to it, to be judged by
another model than the one that selected them, beside any policies:

    ... recipes/evaluate.py --config ... --completions best_of_4=best_of_4.jsonl

With --kl 2 it is not the best that is taken: one is drawn by the weights of the best policy within 2 nats of the one
that drew them, which goes far where it pays (eval/tilt.py). That takes many completions: n show at most log n nats.

Prints what the reward model thinks of its own choice, which is no measurement.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from eval.completions import candidates, models_of, read_completions, selected_rows
from eval.laws import candidate_laws
from eval.records import Row, write_jsonl
from eval.selection import MAX_ROUNDS, SCOPES, Selection, select_best, select_within
from reward.distribution import RewardDistribution
from rlhf.command_line import run
from rlhf.influence import check_population_scope, population_law
from rlhf.preflight import check_launch
from rlhf.reward_function import RiskReward
from rlhf.risk import RiskMeasure, parse_risk


@dataclass
class SelectionArguments:
    """What is selected from, and by what."""

    completions: str = field(
        default=None, metadata={"help": "JSONL of evaluate.py with several completions per prompt (required)."}
    )
    reward_model: str = field(
        default=None,
        metadata={
            "help": "Reward model that selects: a folder, a hub id or another source, as in ppo.py (required). "
            "Not the judge."
        },
    )
    risk: str = field(default="mean", metadata={"help": "Risk measure, as in ppo.py."})
    risk_scope: str = field(
        default="response",
        metadata={
            "help": "response: the measure of each answer's own law. population: of the law of all ratings of the "
            "selected answers."
        },
    )
    n: int | None = field(
        default=None, metadata={"help": "Completions per prompt to select from. Unset: all that there are."}
    )
    skip: int = field(default=0, metadata={"help": "Completions per prompt to pass over before the first of the n."})
    kl: float | None = field(
        default=None,
        metadata={"help": "Draw by the best weights at this KL, nats per completion. Unset: take the best."},
    )
    seed: int = field(default=0, metadata={"help": "Of the draws of --kl."})
    output: str = field(default=None, metadata={"help": "JSONL to write, one completion per prompt (required)."})
    name: str | None = field(default=None, metadata={"help": "What tables call it. Unset: the file's name."})
    max_rounds: int = field(default=MAX_ROUNDS, metadata={"help": "Most rounds of a climb in population scope."})
    batch_size: int = field(default=32, metadata={"help": "Texts per forward pass of the reward model."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a text. Unset: the context."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the reward model's weights."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where a GPU is visible."})


def main(args: SelectionArguments) -> None:
    """Check, ask the reward model, select, write."""
    try:
        measure = check_arguments(args)
        groups = candidates(read_completions(args.completions), args.n, args.skip)
        state = PartialState(cpu=True) if args.use_cpu else PartialState()
        check_launch(args)
        laws = candidate_laws(reward_of(args), groups)
        if args.kl is None:
            selection = select_best(laws, measure, args.risk_scope, max_rounds=args.max_rounds)
        else:
            selection = select_within(laws, measure, args.kl, args.risk_scope, seed=args.seed)
    except (ValueError, OSError) as error:
        # Everything here is about the input, and the message says all.
        raise SystemExit(f"error: {error}") from None
    if state.is_main_process:
        settings: Row = {
            "risk": measure.spec,
            "scope": args.risk_scope,
            "reward_model": args.reward_model,
            "models": models_of(args.reward_model),
            "from": args.completions,
        }
        if args.kl is not None:
            settings |= {"kl": args.kl, "seed": args.seed}
        rows = selected_rows(groups, selection, args.name or Path(args.output).stem, settings)
        write_jsonl(args.output, rows)
        print(f"{selection_table(measure, laws, groups, selection)}\n\n{args.output}", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()


def check_arguments(args: SelectionArguments) -> RiskMeasure:
    """Refuse what could not work before anything is loaded; the measure of --risk."""
    for name in ("completions", "reward_model", "output"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is required.")
    if Path(args.output).suffix != ".jsonl" or Path(args.output).resolve() == Path(args.completions).resolve():
        raise ValueError(f"--output is another .jsonl file than --completions, got {args.output!r}.")
    if args.risk_scope not in SCOPES:
        raise ValueError(f"--risk_scope is {' or '.join(SCOPES)}, got {args.risk_scope!r}.")
    if args.kl is not None and not 0 < args.kl < math.inf:
        raise ValueError(f"--kl is a distance above 0, in nats per completion, got {args.kl}")
    if args.batch_size < 1 or args.max_rounds < 1:
        raise ValueError("--batch_size and --max_rounds must be at least 1.")
    measure = parse_risk(args.risk)
    if args.risk_scope == "population":
        check_population_scope(measure)
    models_of(args.reward_model)
    return measure


def reward_of(args: SelectionArguments) -> RiskReward:
    """The reward model that selects."""
    return RiskReward(
        args.reward_model,
        args.risk,
        batch_size=args.batch_size,
        max_length=args.max_length,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )


def selection_table(
    measure: RiskMeasure, laws: RewardDistribution, groups: list[list[Row]], selection: Selection
) -> str:
    """All ratings of the first completions and of the selected ones, as the reward model predicts them."""
    first = torch.zeros_like(selection.chosen)
    width = max(len(measure.spec), 9)
    selected = f"the best of {len(groups[0])}" if selection.kl is None else f"one of {len(groups[0])}"
    lines = [f"{'all ratings together':22}{'mean':>9}  {measure.spec:>{width}}{'tokens':>9}"]
    for label, chosen in (("the first completion", first), (selected, selection.chosen)):
        population = population_law(laws[torch.arange(len(groups)), chosen])
        tokens = sum(group[i]["completion_tokens"] for group, i in zip(groups, chosen.tolist(), strict=True))
        values = f"{population.mean().item():+9.2f}  {measure(population).item():+{width}.2f}"
        lines.append(f"{label:22}{values}{tokens / len(groups):9.1f}")
    drawn = sum(row["completion_tokens"] for group in groups for row in group) / len(groups)
    lines += [
        f"by the reward model itself; {len(groups)} prompts, {drawn:.1f} tokens drawn for each, at most "
        f"{selection.kl_bound():.2f} nats from what drew them"
    ]
    if not selection.settled:
        lines.append(f"the climb had not settled after {selection.rounds} rounds; the best selection seen was taken")
    return "\n".join(lines)


GROUPS = (SelectionArguments,)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
