"""A step of our PPO against one of TRL 1.12.0's `PPOTrainer`: same model, prompts, lengths and batch, in alternation.

    make bench-ppo        # or: .venv/bin/python benchmarks/ppo_step.py
    .venv/bin/python benchmarks/ppo_step.py --tiny            # the whole plumbing on a tiny Llama
    python benchmarks/ppo_step.py --device cuda --peer_python PATH   # a machine without a package index

TRL 1.12.0 is the last release that had a PPO. It gets an environment of its own under runs/benchmarks, with the
versions of constraints.txt in everything else. Each measurement is a process of its own: one warm-up step, then
`--steps` steps, ours and the peer's in turn, `--rounds` times. Completions have the same forced length on both sides;
where the generated tokens differ, nothing is compared. The peer always runs full fine-tuning in float32 with a
separate value model and a separate reward model of the policy's size, without gradient checkpointing, sample
generations or reports, with the whole batch in one micro-batch. Ours runs, against that same peer:

    like_for_like   full fine-tuning, float32, separate critic, separate reward model
    default         the critic on the policy's trunk
    lora_bf16       LoRA on bfloat16 weights, which serve policy, reference and critic; reward model in bfloat16
    lora_float32    the same in float32, for processors without bfloat16
    lengths         ours against ours: completions that end after 4 to 128 tokens, in micro-batches of a quarter of
                    them, with `length_aware` off (rows padded to the longest, decoded and learnt from so) and on
    risk_overhead   ours alone: share of a step that the risk measure takes, in both scopes, with a constraint

Ours clips the gradient norm, the peer does not. Memory is the most that a process ever held resident, loading
included, or what torch allocated on a GPU. Operations are those of the matrix products of one further step, counted
as it runs (attention on a CPU is not counted); their rate is compared with that of large products in the same dtype.

Writes benchmarks/results/ppo_step_cpu.json or ppo_step_gpu.json, a call with fewer configurations replacing those
alone. With `--tiny` or any other task than the default one it writes under runs/benchmarks/ppo_step instead.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, hardware, timed, write_result
from step_comparison import check_same_tokens, comparison, ratio, risk_share, side, spread_lengths, table
from step_models import prepare_models, prepare_tiny

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
RUNS = Path("runs/benchmarks/ppo_step")
PEER_ENVIRONMENT = Path("runs/benchmarks/trl112_env")
PEER_VERSION = "1.12.0"
PAIRED = ("like_for_like", "default", "lora_bf16", "lora_float32")
CONFIGURATIONS = (*PAIRED, "lengths", "risk_overhead")
TARGETS = {
    "like_for_like": {"time_ratio": 0.90, "memory_ratio": 0.85},
    "default": {"time_ratio": 0.65, "memory_ratio": 0.50},
    "lora_bf16": {"time_ratio": 0.42, "memory_ratio": 0.35},
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LENGTHS = (4, 128)
RISK = {"risk": "cvar:0.1"}
SCOPES = {
    "response": RISK,
    "population": {**RISK, "scope": "population", "constraints": ["cvar:0.05 >= -1.0"]},
}


def main() -> None:
    options = parse()
    models = prepare_tiny(RUNS / "tiny") if options.tiny else prepare_models(options.policy, RUNS)
    peer = peer_python(options) if set(options.configurations) & set(PAIRED) else None
    torch.set_num_threads(options.threads)
    bench = Bench(options, models, peer)
    result = bench.stored()
    for name in options.configurations:
        row = bench.lengths() if name == "lengths" else bench.risk() if name == "risk_overhead" else bench.pair(name)
        result["configurations"][name] = row
        path = bench.write(result)
    print(table(result["configurations"], {} if options.tiny else TARGETS))
    for name in ("lengths", "risk_overhead"):
        if name in options.configurations and name in result["configurations"]:
            print(f"\n{name}: {json.dumps(result['configurations'][name]['summary'])}")
    print(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), help="Default: all.")
    add("--policy", default="runs/quickstart/data/policy", help="Folder of the policy; its prompts lie beside it.")
    add("--tiny", action="store_true", help="A tiny Llama with random weights instead.")
    add("--rows", type=int, default=16, help="Completions of a step.")
    add("--completion_length", type=int, default=24, help="Tokens of each.")
    add("--micro_batch_size", type=int, default=None, help="Completions of a forward pass; unset: all, on both sides.")
    add("--steps", type=int, default=3, help="Measured steps of each process, after one warm-up.")
    add("--rounds", type=int, default=2, help="How often ours and the peer take turns.")
    add("--threads", type=int, default=2, help="Threads of torch.")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="Where both run.")
    add("--peer_python", default=None, help=f"Python that has trl {PEER_VERSION}; unset: an environment is made.")
    options = parser.parse_args()
    options.micro_batch_size = options.micro_batch_size or options.rows
    if options.rows % options.micro_batch_size or min(options.rows, options.steps, options.rounds) < 1:
        parser.error("rows, steps and rounds are at least 1, and micro_batch_size divides rows")
    if options.steps < 3 and not options.tiny:
        parser.error("fewer than 3 measured steps have no median worth reporting; only --tiny may do with less")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    options.default_task = not options.tiny and all(
        getattr(options, name) == parser.get_default(name)
        for name in ("policy", "rows", "completion_length", "threads")
        if name != "threads" or options.device == "cpu"
    )
    return options


def peer_python(options: argparse.Namespace) -> Path:
    """Python of an environment with TRL 1.12.0, made here unless one is named."""
    if options.peer_python:
        python = Path(options.peer_python)
    else:
        python = PEER_ENVIRONMENT / "bin" / "python"
        if not (PEER_ENVIRONMENT / "installed").is_file():
            install_peer()
    asked = "from importlib.metadata import version; print(version('trl'))"
    found = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    if found != PEER_VERSION:
        raise SystemExit(f"{python} has trl {found}, the comparison is with {PEER_VERSION}")
    return python


def install_peer() -> None:
    print(f"installing trl {PEER_VERSION} into {PEER_ENVIRONMENT} ...", flush=True)
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    PEER_ENVIRONMENT.mkdir(parents=True, exist_ok=True)
    constraints = PEER_ENVIRONMENT / "constraints.txt"
    constraints.write_text("\n".join(line for line in pinned if not line.startswith("trl==")) + "\n")
    subprocess.run([sys.executable, "-m", "venv", PEER_ENVIRONMENT], check=True)
    pip = [PEER_ENVIRONMENT / "bin" / "pip", "install", "--quiet", "-c", constraints]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, f"trl=={PEER_VERSION}", "transformers", "accelerate", "datasets"], check=True)
    (PEER_ENVIRONMENT / "installed").touch()


class Bench:
    """Tasks for the workers, their runs, and where the result goes.

    Args:
        options: of the command line.
        models: folders `policy`, `reward` and `qrm`, `prompts` and `pad_token`.
        peer: Python that has the peer.
    """

    def __init__(self, options: argparse.Namespace, models: dict[str, Any], peer: Path | None):
        self.options, self.models, self.peer = options, models, peer
        self.rates: dict[str, float] = {}
        self.folder = RUNS / ("tiny" if options.tiny else "tasks")
        self.folder.mkdir(parents=True, exist_ok=True)

    # ---- Tasks ------------------------------------------------------------------------------------------------

    def task(self, length: int, counted: bool, **changes: Any) -> dict[str, Any]:
        """What both workers need to know."""
        options, models = self.options, self.models
        steps = 1 + options.steps + counted
        needed = steps * options.rows
        settings = {
            "output_dir": str(self.folder / "output"),
            "per_device_train_batch_size": options.micro_batch_size,
            "gradient_accumulation_steps": options.rows // options.micro_batch_size,
            "num_mini_batches": 1,
            "num_ppo_epochs": 1,
            "temperature": 1.0,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "kl_coef": 0.05,
            "use_cpu": options.device == "cpu",
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 1,
        }
        return {
            "policy": models["policy"],
            "reward": models["reward"],
            "pad_token": models["pad_token"],
            "prompts": (models["prompts"] * (needed // len(models["prompts"]) + 1))[:needed],
            "threads": options.threads,
            "device": options.device,
            "dtype": "float32",
            "expected_tokens": options.rows * length,
            "counted_step": steps - 1 if counted else None,
            "settings": settings,
            **changes,
        }

    def our_task(self, counted: bool, length: int | None = None, **settings: Any) -> dict[str, Any]:
        """One of our trainer, with changes of `PPOConfig`."""
        length = length or self.options.completion_length
        task = self.task(length, counted, reward_settings={"batch_size": self.options.rows})
        task["settings"] |= {
            "max_completion_length": length,
            "generation_kwargs": {"min_new_tokens": length},
            "max_steps": len(task["prompts"]) // self.options.rows,
            "overwrite_output_dir": True,
        } | settings
        return task

    def our_configuration(self, name: str, counted: bool) -> dict[str, Any]:
        """The task of a row that is compared with the peer."""
        if name == "like_for_like":
            return self.our_task(counted, critic="separate")
        if name == "default":
            return self.our_task(counted)
        dtype = {"lora_bf16": "bfloat16", "lora_float32": "float32"}[name]
        task = self.our_task(counted, model_init_kwargs={"dtype": dtype})
        task["reward_settings"]["dtype"] = dtype
        return task | {"lora": LORA, "dtype": dtype}

    def peer_task(self, counted: bool) -> dict[str, Any]:
        length = self.options.completion_length
        task = self.task(length, counted)
        task["settings"] |= {
            "response_length": length,
            "total_episodes": len(task["prompts"]),
            "local_rollout_forward_batch_size": self.options.rows,
            "num_sample_generations": 0,
        }
        return task

    # ---- Runs -------------------------------------------------------------------------------------------------

    def run(self, label: str, task: dict[str, Any], python: str | Path = sys.executable, worker: str = "") -> dict:
        """One process: its result, and the load of the machine before it."""
        asked, answer, log = (self.folder / f"{label}.{end}" for end in ("task.json", "result.json", "log"))
        asked.write_text(json.dumps(task))
        answer.unlink(missing_ok=True)
        load = os.getloadavg()[0]
        threads = str(self.options.threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [python, HERE / (worker or "ppo_step_worker.py"), asked, answer]
        with log.open("w") as lines:
            done = subprocess.run(command, env=environment, stdout=lines, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0 or not answer.is_file():
            last = "\n".join(log.read_text().splitlines()[-15:])
            raise SystemExit(f"{label} failed ({done.returncode}); the end of {log}:\n{last}")
        result = json.loads(answer.read_text()) | {"load_before": load}
        seconds = statistics.median(sum(step.values()) for step in result["steps"][1 : 1 + self.options.steps])
        print(f"{label}: {seconds:.2f} s per step, {result['peak_bytes'] / 1e9:.2f} GB, load {load:.1f}", flush=True)
        return result

    def rate(self, dtype: str) -> float:
        """Operations per second of large matrix products: the best seen, because a busy machine only slows them."""
        number = getattr(torch, dtype)
        size, seconds = 256, [0.0]
        # Without hardware for the dtype a product can take a thousand times longer: grow until one takes a while.
        while seconds[-1] < 0.05 and size < (16384 if self.options.device == "cuda" else 4096):
            size *= 2
            factors = [torch.randn(size, size).to(self.options.device, number) for _ in range(2)]
            seconds = [timed(lambda of=factors: of[0] @ of[1])[1] for _ in range(4)][1:]
        self.rates[dtype] = max(self.rates.get(dtype, 0.0), 2 * size**3 / min(seconds))
        print(f"matrix products in {dtype}: {self.rates[dtype] / 1e9:.1f} GFLOP/s", flush=True)
        return self.rates[dtype]

    # ---- Rows -------------------------------------------------------------------------------------------------

    def pair(self, name: str) -> dict[str, Any]:
        """Ours and the peer in turn."""
        ours, peer = [], []
        for turn in range(self.options.rounds):
            counted = turn == 0
            task, peer_task = self.our_configuration(name, counted), self.peer_task(counted)
            ours.append(self.run(f"{name}-ours-{turn}", task))
            peer.append(self.run(f"{name}-peer-{turn}", peer_task, self.peer, "peers/trl_ppo_worker.py"))
        check_same_tokens(ours, peer, task["expected_tokens"])
        rates = [self.rate(dtype) for dtype in (task["dtype"], peer_task["dtype"])]
        row = comparison(ours, peer, self.options.steps, rates)
        row["load_before"] = {
            "ours": [run["load_before"] for run in ours],
            "peer": [run["load_before"] for run in peer],
        }
        row["matrix_rate"] = dict(zip(("ours", "peer"), rates, strict=True))
        row["settings"] = {"ours": described(task), "peer": described(peer_task)}
        if name == "lora_bf16" and self.options.device == "cpu" and not bf16_in_hardware():
            row["note"] = "this processor has no bfloat16 arithmetic (no AVX-512 BF16 or AMX): see lora_float32"
            print(row["note"])
        return row

    def lengths(self) -> dict[str, Any]:
        """Our padded path against length-aware micro-batches, on the same completions."""
        shortest, longest = (2, 16) if self.options.tiny else LENGTHS
        lengths = spread_lengths(shortest, longest, self.options.rows)
        micro = max(1, self.options.rows // 4)
        batches = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": self.options.rows // micro}
        runs: dict[str, list] = {"aware": [], "padded": []}
        for turn in range(self.options.rounds):
            for way in runs:
                aware = {"length_aware": way == "aware"}
                task = self.our_task(turn == 0, longest, **batches, **aware) | {"lengths": lengths}
                task["expected_tokens"] = sum(lengths)
                # The reward model always reads texts of similar length together; both ways gain from it.
                task["reward_settings"]["batch_size"] = micro
                runs[way].append(self.run(f"lengths-{way}-{turn}", task))
        check_same_tokens(runs["aware"], runs["padded"], sum(lengths))
        steps, rate = self.options.steps, self.rate("float32")
        aware, padded = (side(runs[way], steps, rate) for way in ("aware", "padded"))
        norms = [runs[way][0]["log"]["grad_norm"][0] for way in ("aware", "padded")]
        learning = [part["phases"]["update"] + part["phases"]["old_logprobs_and_values"] for part in (aware, padded)]
        summary = {
            "gain": padded["step_seconds"] / aware["step_seconds"],
            "gain_without_generation_and_scoring": learning[1] / learning[0],
            "step_ratio": ratio([aware["step_seconds"]], [padded["step_seconds"]])["ratio"],
            "relative_difference_of_the_first_gradient_norm": abs(norms[0] - norms[1]) / abs(norms[1]),
        }
        return {"summary": summary, "lengths": lengths, "aware": aware, "padded": padded, "settings": described(task)}

    def risk(self) -> dict[str, Any]:
        """Share of a step that the risk measure takes, in both scopes."""
        scopes = {}
        for scope, settings in SCOPES.items():
            task = self.our_task(False) | {"reward": self.models["qrm"], "time_risk": True}
            task["reward_settings"] |= settings
            run = self.run(f"risk-{scope}", task)
            scopes[scope] = risk_share(run, self.options.steps) | {"spec": settings}
        return {"summary": {scope: part["share"] for scope, part in scopes.items()}, "target": 0.01, "scopes": scopes}

    # ---- Result -----------------------------------------------------------------------------------------------

    def stored(self) -> dict[str, Any]:
        """The result as it is on disk if it is one of this task on this machine, so that other rows survive."""
        options = self.options
        names = ("policy", "rows", "completion_length", "micro_batch_size", "steps", "rounds", "threads", "device")
        task = {name: getattr(options, name) for name in names} | {"prompt_tokens": self.models["prompt_tokens"]}
        if options.tiny:
            task["policy"] = "tiny"
        own = {"command": "python benchmarks/ppo_step.py", "task": task, "hardware": hardware(), "targets": TARGETS}
        own["hardware"]["bf16_in_hardware"] = bf16_in_hardware() if options.device == "cpu" else True
        own["configurations"] = {}
        if self.path().is_file():
            there = json.loads(self.path().read_text())
            if all(there.get(name) == own[name] for name in ("task", "hardware")):
                own["configurations"] = there["configurations"]
        return own

    def path(self) -> Path:
        name = f"ppo_step_{'gpu' if self.options.device == 'cuda' else 'cpu'}"
        return (RESULTS if self.options.default_task else self.folder) / f"{name}.json"

    def write(self, result: dict[str, Any]) -> Path:
        """After every row, so that an interrupted run keeps those that are complete."""
        rows = [row for row in result["configurations"].values() if "ours" in row]
        if rows:
            result["versions"] = {side_: rows[-1][side_]["versions"] for side_ in ("ours", "peer")}
        if self.options.default_task:
            return write_result(self.path().stem, result)
        self.path().write_text(json.dumps(result, indent=2) + "\n")
        return self.path()


def described(task: dict[str, Any]) -> dict[str, Any]:
    """The task without its prompts and paths, for the record."""
    kept = {key: value for key, value in task.items() if key not in ("prompts", "policy", "reward", "counted_step")}
    return kept | {"settings": {k: v for k, v in task["settings"].items() if k != "output_dir"}}


def bf16_in_hardware() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


if __name__ == "__main__":
    main()
