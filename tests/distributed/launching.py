"""Start a script on CPU ranks as a user would, from the configs that the project ships; or load one as a module."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import yaml

ROOT = Path(__file__).parents[2]


def load_recipe(name: str) -> ModuleType:
    """`recipes/NAME.py` as a module; `recipes` is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cpu_config(name: str, folder: Path, ranks: int, **changes: object) -> Path:
    """The shipped accelerate config `name`, changed only in what separates a CPU from a GPU, and by `changes`."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": ranks, "mixed_precision": "no"} | changes
    path = folder / f"{name}_{ranks}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(config: Path, *command: object, timeout: int = 400) -> str:
    """Run `accelerate launch`; its output, or a failed assertion that shows it."""
    process = start(config, *command, port=free_port())
    return finish(process, timeout)


def launch_machines(config: Path, *command: object, machines: int = 2, timeout: int = 400) -> str:
    """Run `accelerate launch` once for each machine, with its rank, all of them on this one; output of the first."""
    port = free_port()
    started = [start(config, *command, port=port, options=("--machine_rank", rank)) for rank in range(machines)]
    outputs = [finish(process, timeout) for process in started]
    return outputs[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(
    config: Path, *command: object, port: int, options: tuple = (), output: object = subprocess.PIPE
) -> subprocess.Popen:
    """Begin an `accelerate launch` with these options of the launcher."""
    arguments = ["--config_file", config, "--main_process_port", port, *options, *command]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)],
        cwd=ROOT,
        # DeepSpeed compiles a small CPU operator with the `ninja` of this environment.
        env=os.environ
        | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            # A checkout beside the installed one tests itself.
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: int) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The launcher ends its ranks; killed outright it would leave them behind.
        process.terminate()
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{output[-6000:]}") from None
    assert process.returncode == 0, output[-6000:]
    return output
