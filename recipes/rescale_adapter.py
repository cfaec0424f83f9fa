"""Bring a trained adapter to a KL of your choice by its strength alone: no training, a few hundred completions a KL.

    python recipes/rescale_adapter.py --policy runs/quickstart/ppo-cvar --kl 1 2 4 \\
        --dataset_name runs/quickstart/data/rl_prompts --max_new_tokens 20 --output_dir runs/frontier/cvar

The tuned policy is W0 + (alpha/r) B A; at a strength c between 0 and 1 it lies on the line from base to tuned policy,
above 1 beyond it. For each KL the recipe finds the c at which completions of the given prompts are so far from the
base on average, so that

- policies trained under different risk measures can be compared at one KL, which no training hits exactly;
- one training shows its whole frontier of reward and tail against KL (give the folders to evaluate.py);
- a policy that went too far can be taken back.

Prompts should be those of the training, or others that the comparison is not made on. Writes OUTPUT_DIR/kl-1,
OUTPUT_DIR/kl-2, ... : adapters like any other, with a record `rescaled.json` of the strength and the KL that was read.
The completions lie in OUTPUT_DIR/readings, and an interrupted call goes on with them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from eval.generation import Decoding, as_prompt_dataset, generate_completions
from eval.policies import adapter_config, check_source
from eval.rescaling import Strength, add_to_record, completion_kl, factor_for, rescale_adapter
from reward.tables import check_prompts, read_dataset
from rlhf.command_line import run
from rlhf.preflight import check_launch


@dataclass
class RescaleArguments:
    """Which adapter, to which KL, on which prompts."""

    policy: str = field(default=None, metadata={"help": "Folder of a LoRA adapter, as ppo.py writes it (required)."})
    kl: list[float] = field(
        default_factory=list, metadata={"help": "KL to the base to reach, nats per completion; several (required)."}
    )
    dataset_name: str = field(default=None, metadata={"help": "Prompts, as in ppo.py (required)."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the data set."})
    output_dir: str = field(default=None, metadata={"help": "Folder for the adapters (required)."})
    max_prompts: int = field(
        default=256, metadata={"help": "Prompts that the KL is averaged over, from the first on."}
    )
    tolerance: float = field(default=0.03, metadata={"help": "Relative distance from the KL that is near enough."})
    largest_factor: float = field(default=2.0, metadata={"help": "Strength beyond which the direction is left."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer; as in the training."})
    temperature: float = field(default=1.0, metadata={"help": "As in the training."})
    seed: int = field(default=0, metadata={"help": "Of the answers."})
    batch_size: int = field(default=64, metadata={"help": "Prompts generated together."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the policy's weights."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where a GPU is visible."})


def main(args: RescaleArguments) -> None:
    """Check, search, write."""
    try:
        prompts = load_prompts(args)
        state = PartialState(cpu=True) if args.use_cpu else PartialState()
        check_launch(args)
        lines = [rescaled(args, kl, prompts, state) for kl in sorted(args.kl)]
    except (ValueError, OSError) as error:
        # Everything here is about the input, and the message says all.
        raise SystemExit(f"error: {error}") from None
    if state.is_main_process:
        print("\n".join(lines), flush=True)
    state.destroy_process_group()


def load_prompts(args: RescaleArguments) -> Dataset:
    """The prompts, once every argument has been checked."""
    for name in ("policy", "kl", "dataset_name", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is required.")
    for kl in args.kl:
        if not 0 < kl < float("inf"):
            raise ValueError(f"--kl must be above 0 nats, got {kl:g}.")
    if not 0 < args.tolerance < 1 or args.largest_factor < 1 or args.max_prompts < 2 or args.batch_size < 1:
        raise ValueError(
            "--tolerance lies in (0, 1), --largest_factor is 1 or more, --max_prompts 2 or more, --batch_size 1 or "
            "more."
        )
    check_source(args.policy)
    if not Path(args.policy).is_dir() or adapter_config(args.policy) is None:
        raise ValueError(f"--policy {args.policy} is no folder with an adapter; a whole model cannot be rescaled.")
    rows, column_split = read_dataset(args.dataset_name, args.dataset_split)
    if column_split is not None:
        rows = rows.filter(lambda row: row["split"] == column_split)
    check_prompts(rows, args.dataset_name)
    if len(rows) < 2:
        raise ValueError(f"{args.dataset_name} has one prompt; a KL with its error takes two or more.")
    return as_prompt_dataset(list(rows["prompt"])[: args.max_prompts])


def rescaled(args: RescaleArguments, kl: float, prompts: Dataset, state: PartialState) -> str:
    """Write the adapter at one KL; a line about it."""
    strength = factor_for(
        kl,
        lambda factor: read_kl(args, factor, prompts, state),
        tolerance=args.tolerance,
        largest=args.largest_factor,
    )
    output = Path(args.output_dir) / f"kl-{kl:g}"
    if state.is_main_process:
        rescale_adapter(args.policy, strength.factor, output)
        add_to_record(output, kl_target=kl, kl=strength.kl, kl_error=strength.kl_error, prompts=len(prompts))
    state.wait_for_everyone()
    return f"{output}: strength {strength.factor:.3f}, KL {strength.kl:.3f} +- {strength.kl_error:.3f} nats"


def read_kl(args: RescaleArguments, factor: float, prompts: Dataset, state: PartialState) -> Strength:
    """The KL of the adapter at a strength, by its own completions."""
    folder = Path(args.output_dir) / "readings" / f"{factor:.6f}"
    if state.is_main_process:
        rescale_adapter(args.policy, factor, folder)
    state.wait_for_everyone()
    rows = generate_completions(
        folder,
        prompts,
        name=f"strength {factor:.4f}",
        decoding=Decoding(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed),
        path=folder.with_name(f"{folder.name}.jsonl"),
        batch_size=args.batch_size,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    found = Strength(factor, *completion_kl(rows))
    if state.is_main_process:
        print(f"strength {factor:.4f}: KL {found.kl:.3f} +- {found.kl_error:.3f} nats", flush=True)
    return found


GROUPS = (RescaleArguments,)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
