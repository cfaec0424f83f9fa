"""Weigh prompts by how much of the extremely negative mass their answers hold, so that rollouts look there more often.

    python recipes/weigh_prompts.py --policy runs/quickstart/data/policy \\
        --dataset_name runs/quickstart/data/rl_prompts --reward_model runs/quickstart/qrm \\
        --rating_threshold -2 --output_dir runs/tail_prompts

    ... recipes/ppo.py --config ... --dataset_name runs/tail_prompts --prompt_weight_column prompt_weight

The policy answers each prompt `num_samples` times, and the reward model says which share mᵢ of the readings lies at or
below the threshold. The weight of prompt i of N is

    wᵢ = N · ((1 − s) mᵢ / Σ m + s / N)

with the uniform share s, so that weights average 1 and none is below s: m from a few answers is a noisy estimate, and
a prompt without a weight would never be seen again. Training then maximises the average over prompts with these
weights, not the average over prompts; evaluation is not affected.

Writes a data set with the columns of the given one, `prompt_weight` and `tail_mass`, and beside it the completions
that it looked at, with which an interrupted call goes on.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from eval.completions import candidates, models_of
from eval.generation import Decoding, as_prompt_dataset, generate_completions
from eval.laws import candidate_laws
from eval.policies import check_source
from reward.tables import check_prompts, read_dataset
from rlhf.command_line import run
from rlhf.preflight import check_launch
from rlhf.reward_function import RiskReward

WEIGHT, MASS = "prompt_weight", "tail_mass"


@dataclass
class WeighArguments:
    """Whose answers to which prompts are looked at, and by what."""

    policy: str = field(default=None, metadata={"help": "Policy that is to be trained: folder or hub id (required)."})
    dataset_name: str = field(default=None, metadata={"help": "Training prompts, as in ppo.py (required)."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the data set."})
    reward_model: str = field(default=None, metadata={"help": "Reward model of the training (required)."})
    rating_threshold: float = field(
        default=None, metadata={"help": "Ratings at or below it are extremely negative (required)."}
    )
    output_dir: str = field(
        default=None, metadata={"help": "Folder for the weighted data set and the completions (required)."}
    )
    num_samples: int = field(default=2, metadata={"help": "Answers to each prompt."})
    uniform_share: float = field(
        default=0.25, metadata={"help": "Share of the rollouts in which all prompts are equally likely; above 0."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer; as in the training."})
    temperature: float = field(default=1.0, metadata={"help": "As in the training."})
    seed: int = field(default=0, metadata={"help": "Of the answers."})
    batch_size: int = field(default=64, metadata={"help": "Prompts generated, or texts read, together."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the policy's and the reward model's weights."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where a GPU is visible."})


def main(args: WeighArguments) -> None:
    """Check, answer, read, weigh, write."""
    try:
        rows = load_prompts(args)
        state = PartialState(cpu=True) if args.use_cpu else PartialState()
        check_launch(args)
        masses = tail_masses(args, rows)
        weights = prompt_weights(masses, args.uniform_share)
    except (ValueError, OSError) as error:
        # Everything here is about the input, and the message says all.
        raise SystemExit(f"error: {error}") from None
    if state.is_main_process:
        keep = [name for name in rows.column_names if name not in (WEIGHT, MASS)]
        rows = rows.select_columns(keep).add_column(WEIGHT, weights.tolist()).add_column(MASS, masses.tolist())
        rows.save_to_disk(args.output_dir)
        print(f"{told(masses, weights, args)}\n\n{args.output_dir}", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()


def load_prompts(args: WeighArguments) -> Dataset:
    """The prompts, once every argument has been checked."""
    for name in ("policy", "dataset_name", "reward_model", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is required.")
    if args.rating_threshold is None:
        raise ValueError(
            "--rating_threshold is required: the rating at or below which an answer is extremely negative."
        )
    if not 0 < args.uniform_share <= 1:
        raise ValueError(f"--uniform_share must be in (0, 1], got {args.uniform_share:g}.")
    if args.batch_size < 1:
        raise ValueError("--batch_size must be at least 1.")
    if Path(args.output_dir).resolve() == Path(args.dataset_name).resolve():
        raise ValueError("--output_dir is the folder of --dataset_name; the prompts themselves are not overwritten.")
    check_source(args.policy)
    models_of(args.reward_model)
    rows, column_split = read_dataset(args.dataset_name, args.dataset_split)
    if column_split is not None:
        rows = rows.filter(lambda row: row["split"] == column_split)
    check_prompts(rows, args.dataset_name)
    return rows


def tail_masses(args: WeighArguments, rows: Dataset) -> Tensor:
    """(N,) share of the predicted ratings of each prompt's answers at or below the threshold."""
    reward = RiskReward(
        args.reward_model, batch_size=args.batch_size, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    completions = generate_completions(
        args.policy,
        # Numbered anew: ids of the data set, if it has any, need not be unique across its parts.
        as_prompt_dataset(list(rows["prompt"])),
        decoding=Decoding(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            num_samples=args.num_samples,
            seed=args.seed,
        ),
        path=Path(f"{args.output_dir}.completions.jsonl"),
        batch_size=args.batch_size,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    return candidate_laws(reward, candidates(completions)).cdf(args.rating_threshold).double().mean(1)


def prompt_weights(masses: Tensor, uniform_share: float) -> Tensor:
    """(N,) weights of mean 1: `uniform_share` for every prompt, the rest in proportion to its mass.

    Raises:
        ValueError: no mass at all.
    """
    total = masses.sum()
    if not total > 0:
        raise ValueError("the reward model sees no reading at or below the threshold in any answer; raise it.")
    return len(masses) * (1 - uniform_share) * masses / total + uniform_share


def told(masses: Tensor, weights: Tensor, args: WeighArguments) -> str:
    """How unevenly the mass lies, and what the weights do about it."""
    count = max(1, len(masses) // 4)
    top = masses.sort(descending=True).values[:count].sum() / masses.sum()
    effective = weights.sum() ** 2 / weights.square().sum()
    drawn = (weights * masses).sum() / weights.sum()
    return (
        f"{len(masses)} prompts, {args.num_samples} answers each, ratings at or below {args.rating_threshold:g}\n"
        f"extremely negative mass     {masses.mean():7.2%}\n"
        f"  as rollouts will draw     {drawn:7.2%}\n"
        f"  in the worst quarter      {top:7.0%} of it, on these same answers\n"
        f"weights                     {weights.min():.2f} to {weights.max():.2f}, {effective:.0f} effective prompts"
    )


GROUPS = (WeighArguments,)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
