"""A fault on one of two ranks: both do the same, and neither waits for the other for ever."""

import json
from pathlib import Path

import pytest
from distributed.launching import cpu_config, launch
from tiny import tiny_llama, tiny_tokenizer

SCRIPT = Path(__file__).with_name("fault_run.py")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


# Shipped config, how its ranks share the work, options: the sharded ones gather weights for every token of any rank.
MODES = {
    "ddp_cpu": ("MULTI_CPU", None, ()),
    "zero2": ("DEEPSPEED", 2, ()),
    "zero3": ("DEEPSPEED", 3, ("--by_layer",)),
    "fsdp2": ("FSDP", None, ("--fsdp_on_cpu",)),
}
FAULTS = ("empty", "no_tail", "exclude", "raise", "model", "slow", "too_large", "gradient")


@pytest.mark.parametrize("config", MODES)
def test_a_fault_on_one_rank_is_a_fault_of_both(tmp_path, config):
    kind, stage, options = MODES[config]
    output = tmp_path / "out"
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    launch(cpu_config(config, tmp_path, 2), SCRIPT, output, *options, *FAULTS, timeout=300)
    ranks = [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(2)]
    sharded = config in ("zero3", "fsdp2")
    for fault in FAULTS:
        first, second = (rank[fault] for rank in ranks)
        assert (first["kind"], first["zero_stage"]) == (kind, stage)
        assert first["weights"] is not None
        assert second["weights"] == (None if sharded else first["weights"]), fault
        for name in ("stopped", "step", "same", "finite"):
            assert first[name] == second[name], (fault, name)
        assert first["finite"]
        assert first["same"] == (fault == "too_large"), fault

    check_rewards(ranks[0], output)
    check_updates(ranks[0], output, names_gradients=config == "ddp_cpu")
    check_samples(ranks[0])


def check_rewards(seen: dict, output: Path) -> None:
    """Reward functions that fail on rank 1: they stop both, or leave out what rank 1 has."""
    stopped = seen["raise"]
    assert stopped["stopped"].startswith(
        "reward function 'failing' failed at the first attempt (ConnectionError: 503) on rank 1."
    )
    assert stopped["step"] == 1
    assert (output / "raise" / "checkpoint-1" / "ppo_state.json").is_file()

    model = seen["model"]
    assert "(RuntimeError: the reward model failed on rank 1 (ConnectionError: 503)) on rank 0;" in model["stopped"]
    assert "failed at the first attempt (ConnectionError: 503) on rank 1." in model["stopped"]
    assert model["step"] == 1
    assert (output / "model" / "checkpoint-1" / "ppo_state.json").is_file()

    # Late once in the second rollout, which its repetition saves; late twice in the third.
    slow = seen["slow"]
    assert slow["stopped"].startswith(
        "reward function 'slow' failed 2 times (TimeoutError: no answer within 1 s) on rank 1."
    )
    assert slow["step"] == 2
    assert slow["reward/attempts"] == [1.0, 1.5]
    assert slow["reward/failed_share"] == [0.0, 0.0]
    assert (output / "slow" / "checkpoint-2" / "ppo_state.json").is_file()

    excluded = seen["exclude"]
    assert (excluded["stopped"], excluded["step"]) == (None, 3)
    assert excluded["update/skipped_share"] == [0.0] * 3
    assert excluded["reward/failed_share"] == [0.0, 0.5, 0.5]


def check_updates(seen: dict, output: Path, names_gradients: bool) -> None:
    """Updates that are not finite on rank 1: both skip them."""
    skipped = seen["too_large"]
    assert skipped["stopped"].startswith("2 updates in a row had no finite loss and gradient and were skipped")
    assert skipped["step"] == 2
    assert skipped["update/skipped_share"] == [1.0, 1.0]
    assert (output / "too_large" / "checkpoint-2" / "ppo_state.json").is_file()
    assert (output / "too_large" / "nonfinite" / "step_000001_rank_1" / "report.json").is_file()

    gradient = seen["gradient"]
    assert (gradient["stopped"], gradient["step"]) == (None, 3)
    assert gradient["update/skipped_share"] == [0.0, 1.0, 0.0]
    report = json.loads((output / "gradient" / "nonfinite" / "step_000002_rank_1" / "report.json").read_text())
    assert report["first"]["quantity"] == "gradient"
    # Where every gradient is NaN by then, or gone, no parameter is blamed.
    assert bool(report["first"]["detail"]) == names_gradients
    assert report["first"]["detail"].startswith(" of policy.model.layers.1." if names_gradients else "")


def check_samples(seen: dict) -> None:
    """Nothing on rank 1 that a statistic could be taken over."""
    empty, no_tail = seen["empty"], seen["no_tail"]
    for run in (empty, no_tail):
        assert (run["stopped"], run["step"]) == (None, 3)
        assert run["update/skipped_share"] == [0.0] * 3
    # Every completion of rank 1 is its stop token alone, and one of rank 0 has at most 6.
    assert all(length < 4 for length in empty["completion/length_mean"])
    # The tail is that of rank 0 alone.
    assert no_tail["constraint/below:0/value"] == [0.5] * 3
