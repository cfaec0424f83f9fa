"""What a launch asks for, read from the shipped accelerate configs by accelerate's own launcher."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from tiny import tiny_config, tiny_trainer

from rlhf.preflight import actual_launch, asked_launch, check_mode

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
ZERO = "DeepSpeed ZeRO-{} (offload: optimizer {}, parameters {})"
ASKED = {
    "cpu": ("one process", 1),
    "gpu": ("one process", 1),
    "ddp_cpu": ("data parallelism", 2),
    "ddp": ("data parallelism", 8),
    "zero1": (ZERO.format(1, "none", "none"), 8),
    "zero2": (ZERO.format(2, "none", "none"), 8),
    "zero3": (ZERO.format(3, "none", "none"), 8),
    "zero3_offload": (ZERO.format(3, "cpu", "cpu"), 8),
    "fsdp2": ("FSDP version 2", 8),
    "multi_node": (ZERO.format(3, "none", "none"), 16),
}


def variables_of(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` would tell its processes, with the number of them from torchrun."""
    given = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{config}.yaml"), "x.py"])
    args, _, _ = _validate_launch_command(given)
    args.num_cpu_threads_per_process, args.deepspeed_fields_from_accelerate_config = 1, ""
    if args.use_deepspeed:
        variables = prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu or args.use_fsdp:
        variables = prepare_multi_gpu_env(args)
    else:
        variables = prepare_simple_launcher_cmd_env(args)[1]
    return {**variables, "WORLD_SIZE": str(args.num_processes)}


def test_every_shipped_config_is_here():
    assert set(ASKED) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("config", ASKED)
def test_what_a_shipped_config_asks_for(config, tmp_path):
    assert asked_launch(variables_of(config), tiny_config(tmp_path), 1) == ASKED[config]


def test_settings_and_files_of_the_users_own_may_hold_any_variant(tmp_path):
    given = tiny_config(tmp_path)
    assert asked_launch({}, given, 4) == ("data parallelism", 4)
    file = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "mine.json", "WORLD_SIZE": "2"}
    assert asked_launch(file, given, 1) == ("DeepSpeed", 2)
    given.deepspeed = {"zero_optimization": {"stage": 3}}
    assert asked_launch({"WORLD_SIZE": "2"}, given, 1) == ("DeepSpeed", 2)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"WORLD_SIZE": "2"}, "data parallelism with 2 process"),
    ],
)
def test_a_wish_that_accelerate_dropped_is_named(wish, said, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    assert actual_launch(trainer.accelerator) == ("one process", 1)
    check_mode(trainer.args, trainer.accelerator)
    for name, value in wish.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"asked for.*{said}.*made it one process with 1"):
        check_mode(trainer.args, trainer.accelerator)


def test_fsdp_without_an_accelerator_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"FSDP version 2.*on accelerators only.*zero3\.yaml"):
        tiny_trainer(tmp_path, model="no such folder, and nobody looks")
