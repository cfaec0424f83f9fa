"""Memory, network and time of a PPO step on paper for any size, and the memory measured where it can be run.

    python benchmarks/memory_model.py                                       # measure, and compare with the formula
    python benchmarks/memory_model.py --model_size 8e9 --config zero3 --gpus 8     # one set-up on paper
    python benchmarks/memory_model.py --model_size 70e9 --config ddp --gpus 64 --lora 16 --weight_bytes 2
    python benchmarks/memory_model.py --recommend                           # the tables of docs/scaling.md

The formulas are in scale_formulas.py, the cases in memory_cases.py. Each measurement is two PPO steps in processes of
their own, on the CPU, in float32 unless the case says otherwise: the most that a rank held resident less what it held
before the first model was loaded. The model is SmolLM2-135M (runs/quickstart/data/policy, which `make quickstart` or
recipes/prepare_data.py unpacks), or another size with its vocabulary and random weights.
Writes benchmarks/results/memory_model.json after every case; cases that it holds are kept (`--again` repeats them).
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from measuring import RESULTS, hardware, write_result
from memory_cases import CASES, PRETRAINED, Case, write_model
from scale_formulas import MODES, SHAPES, Machine, Plan, Shape, memory, nearest_shape, throughput, traffic

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
RUNS = Path("runs/benchmarks/memory_model")
POLICY = Path("runs/quickstart/data/policy")
CONFIG_FILES = {"one": "cpu", "ddp": "ddp_cpu"}
# Set-ups in the order in which docs/scaling.md tries them: the first that fits is the fastest of those.
LADDER = (("ddp", True), ("zero1", True), ("zero2", True), ("zero3", True), ("zero3", False), ("zero3_offload", False))


def main() -> None:
    options = parsed()
    if options.recommend:
        print("\n\n".join([recommendation(0), recommendation(16), throughputs(), measured_table()]))
    elif options.model_size:
        name, shape = nearest_shape(options.model_size)
        print(f"{name}, {shape.parameters / 1e9:.2f}e9 parameters\n{set_up(shape, chosen(options))}")
    else:
        measure(options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = Plan()
    parser.add_argument("--model_size", type=float, help="parameters, such as 8e9: print, do not measure")
    parser.add_argument("--config", choices=MODES, default="zero3", help="accelerate config; one: a single process")
    parser.add_argument("--gpus", type=int, default=8)
    for name in ("precision", "weight_bytes", "lora", "critic", "rows", "micro_batch", "prompt", "completion"):
        parser.add_argument(f"--{name}", type=type(getattr(plan, name)), default=getattr(plan, name))
    parser.add_argument("--epochs", type=int, default=plan.epochs)
    parser.add_argument("--reward_size", type=float, default=0.0, help="parameters of the reward model")
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--recommend", action="store_true", help="print the tables of docs/scaling.md")
    parser.add_argument("--policy", type=Path, default=POLICY, help="folder of SmolLM2-135M, to measure")
    parser.add_argument("--again", action="store_true", help="measure cases again that have a result")
    return parser.parse_args()


# ---- On paper -----------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> Plan:
    """The plan of the command line."""
    names = ("precision", "weight_bytes", "lora", "critic", "rows", "micro_batch", "prompt", "completion", "epochs")
    return Plan(
        mode=options.config,
        ranks=options.gpus,
        reward=options.reward_size,
        checkpointing=not options.no_checkpointing,
        **{name: getattr(options, name) for name in names},
    )


def set_up(shape: Shape, plan: Plan) -> str:
    """Memory, traffic and time of one set-up, as a table."""
    lines = ["", "memory of a rank, GB"]
    lines += [f"  {name:32}{size / 1e9:10.2f}" for name, size in memory(shape, plan).items()]
    lines += ["", "sent by a rank for one rollout and its updates, GB"]
    lines += [f"  {name:32}{size / 1e9:10.2f}" for name, size in traffic(shape, plan).items()]
    lines += ["", "seconds of one rollout and its updates, under the assumptions of Machine"]
    seconds = throughput(shape, plan)
    speed = seconds.pop("tokens per second")
    lines += [f"  {name:32}{value:10.2f}" for name, value in seconds.items()]
    return "\n".join([*lines, "", f"generated tokens a second, all ranks: {speed:,.0f}"])


def smallest_plan(shape: Shape, gpus: int, lora: int) -> tuple[Plan, float] | None:
    """The first set-up of the ladder whose peak fits into nine tenths of a card, with that peak; None: none does."""
    for mode, gather in (("one", True),) if gpus == 1 else LADDER:
        # Frozen weights can be bfloat16; trained ones lose small updates in it.
        width = 2 if lora else 4
        plan = Plan(mode, gpus, lora=lora, weight_bytes=width, gather=gather, reward=shape.parameters)
        peak = memory(shape, plan)["peak"]
        if peak <= 0.9 * Machine.capacity:
            return plan, peak
    return None


def label(plan: Plan) -> str:
    """Name of the accelerate config, with a star where weights are gathered for every token."""
    name = "gpu" if plan.mode == "one" else plan.mode
    return f"`{name}`" + ("" if plan.gather else "*")


def recommendation(lora: int) -> str:
    """A Markdown table: size of the model against GPUs, the first config that fits and its peak."""
    what = f"LoRA of rank {lora} on bfloat16 weights" if lora else "full fine-tuning"
    lines = [f"| {what} | 1 GPU | 8 GPUs | 64 GPUs |", "|---|---|---|---|"]
    for name, shape in SHAPES.items():
        cells = []
        for gpus in (1, 8, 64):
            found = smallest_plan(shape, gpus, lora)
            cells.append("does not fit" if found is None else f"{label(found[0])}, {found[1] / 1e9:.0f} GB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def throughputs() -> str:
    """A Markdown table of time on paper, for the config that fits."""
    lines = ["| policy | GPUs | config | generation | scoring | update | network | tokens/s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, gpus, lora in (
        ("SmolLM2-1.7B", 1, 0),
        ("Llama-3.1-8B", 8, 0),
        ("Llama-3.1-8B", 8, 16),
        ("Llama-3.1-8B", 64, 0),
        ("Llama-3.1-70B", 8, 16),
        ("Llama-3.1-70B", 64, 0),
        ("Llama-3.1-70B", 64, 16),
    ):
        found = smallest_plan(SHAPES[name], gpus, lora)
        if found is None:
            continue
        time = throughput(SHAPES[name], found[0])
        parts = (f"{time[part]:.0f} s" for part in ("generation", "scoring", "update", "network"))
        config = label(found[0]) + (", LoRA" if lora else "")
        lines.append(f"| {name} | {gpus} | {config} | {' | '.join(parts)} | {time['tokens per second']:,.0f} |")
    return "\n".join(lines)


def measured_table() -> str:
    """A Markdown table of the stored measurements, the smallest model first."""
    stored = json.loads((RESULTS / "memory_model.json").read_text())["cases"]
    lines = ["| model | case | tokens | micro-batch | formula | measured | ratio |", "|---|---|---|---|---|---|---|"]
    for key in sorted(stored, key=lambda key: CASES[key].shape.parameters):
        found, (model, name, plan) = stored[key], CASES[key]
        sizes = (
            f"{found['formula_bytes'] / 1e9:.2f} GB | {found['measured_bytes'] / 1e9:.2f} GB | {found['ratio']:.2f}"
        )
        lines.append(f"| {model} | {name} | {plan.prompt} + {plan.completion} | {plan.micro_batch} | {sizes} |")
    return "\n".join(lines)


# ---- Measured -----------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    if not options.policy.is_dir():
        raise SystemExit(f"{options.policy} is not there; run recipes/prepare_data.py, or name a folder with --policy")
    path = RESULTS / "memory_model.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() and not options.again else {"cases": {}}
    result |= {"command": "python benchmarks/memory_model.py", "policy": PRETRAINED, "hardware": hardware()}
    for key, case in CASES.items():
        found, plan = result["cases"].get(key), case.plan
        if found is None:
            ranks = run(key, plan, policy_of(case, options.policy))
            result["versions"] = ranks[0].pop("versions")
            found = {"measured_bytes": most(ranks, "peak_bytes"), "trained": ranks[0]["trained"]}
            found |= {f"peak_of_{part}_bytes": most(ranks, f"{part}_bytes") for part in ("loading", "preparing")}
            found["processor"] = hardware()["processor"]
        # The formula is stored as the code has it now, whenever the measurement was made.
        parts = memory(case.shape, plan)
        on_paper = in_one_memory(parts)
        found |= {
            "formula_bytes": on_paper,
            "ratio": on_paper / found["measured_bytes"],
            "components": parts,
            "ranks": plan.ranks,
            "tokens": [plan.prompt, plan.completion],
            "rows": [plan.rows, plan.micro_batch],
        }
        result["cases"][key] = found
        write_result("memory_model", result)
        sizes = f"{on_paper / 1e9:7.2f} on paper, {found['measured_bytes'] / 1e9:.2f} GB measured"
        print(f"{key:50}{sizes}, ratio {found['ratio']:.2f}", flush=True)


def in_one_memory(parts: dict[str, float]) -> float:
    """Bytes of a rank on a CPU, whose device memory and host memory are the same."""
    return parts["peak"] + parts["host"]


def most(ranks: list[dict[str, Any]], name: str) -> int:
    """The largest of what the ranks found, each less what it held before it loaded a model."""
    return max(rank[name] - rank["start_bytes"] for rank in ranks)


def policy_of(case: Case, pretrained: Path) -> Path:
    """Folder of the case's model, which is written first if need be."""
    return pretrained if case.model == PRETRAINED else write_model(case.shape, pretrained, RUNS / case.model)


def run(name: str, plan: Plan, policy: Path) -> list[dict[str, Any]]:
    """What the ranks of one case wrote."""
    folder = RUNS / name.replace(", ", "_").replace(": ", "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank_*.json"):
        old.unlink()
    settings = {
        "output_dir": str(folder / "output"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
        "num_ppo_epochs": plan.epochs,
        "max_steps": 2,
        "max_completion_length": plan.completion,
        "generation_kwargs": {"min_new_tokens": plan.completion},
        "critic": plan.critic,
        "activation_checkpointing": plan.checkpointing,
        "ds3_gather_for_generation": plan.gather,
        "model_init_kwargs": {"dtype": "bfloat16" if plan.weight_bytes == 2 else "float32"},
        "pad_token": "<|endoftext|>",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    prompts = [" ".join(["word"] * plan.prompt)] * (2 * plan.rows * plan.ranks)
    task = {"policy": str(policy), "lora": plan.lora, "prompts": prompts, "settings": settings}
    task["fsdp_on_cpu"] = plan.mode == "fsdp2"
    (folder / "task.json").write_text(json.dumps(task))
    launch(plan, folder)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(plan.ranks)]


def launch(plan: Plan, folder: Path) -> None:
    """Start the ranks from the shipped config, with the CPU in place of the GPUs."""
    shipped = ROOT / "accelerate_configs" / f"{CONFIG_FILES.get(plan.mode, plan.mode)}.yaml"
    config = yaml.safe_load(shipped.read_text())
    config |= {"use_cpu": True, "num_processes": plan.ranks, "mixed_precision": "no"}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "accelerate.yaml"]
    command += ["--main_process_port", port, HERE / "memory_worker.py", folder / "task.json", folder / "rank"]
    # glibc gives freed memory back at once, so that the peak is what was in use, not what had been.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_TRIM_THRESHOLD_": "0"}
    # DeepSpeed compiles an operator with the `ninja` of this environment.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "log").open("w") as log:
        done = subprocess.run(list(map(str, command)), env=environment, stdout=log, stderr=log, check=False)
    if done.returncode != 0:
        last = "\n".join((folder / "log").read_text().splitlines()[-15:])
        raise SystemExit(f"the ranks failed ({done.returncode}); the end of {folder / 'log'}:\n{last}")


if __name__ == "__main__":
    main()
