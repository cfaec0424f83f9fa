"""A fault on one of two ranks: both do the same, and neither waits for the other for ever."""

import json
from pathlib import Path

import pytest
from distributed.launching import cpu_config, launch
from tiny import tiny_llama, tiny_tokenizer

SCRIPT = Path(__file__).with_name("fault_run.py")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.mark.parametrize(
    ("config", "kind", "stage", "faults"),
    [
        ("ddp_cpu", "MULTI_CPU", None, ("empty", "exclude", "raise", "too_large")),
        ("zero2", "DEEPSPEED", 2, ("empty", "exclude", "raise", "too_large")),
    ],
)
def test_a_fault_on_one_rank_is_a_fault_of_both(tmp_path, config, kind, stage, faults):
    output = tmp_path / "out"
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    launch(cpu_config(config, tmp_path, 2), SCRIPT, output, *faults, timeout=300)
    ranks = [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(2)]
    for fault in faults:
        first, second = (rank[fault] for rank in ranks)
        assert (first["kind"], first["zero_stage"]) == (kind, stage)
        if stage is None:
            assert first["weights"] == second["weights"]
        for name in ("stopped", "step", "same", "finite"):
            assert first[name] == second[name], (fault, name)
        assert first["finite"]

    stopped = ranks[0]["raise"]
    assert stopped["stopped"].startswith(
        "reward function 'failing' failed at the first attempt (ConnectionError: 503) on rank 1."
    )
    assert stopped["step"] == 1
    assert (output / "raise" / "checkpoint-1" / "ppo_state.json").is_file()

    skipped = ranks[0]["too_large"]
    assert skipped["stopped"].startswith("2 updates in a row had no finite loss and gradient and were skipped")
    assert skipped["step"] == 2
    assert skipped["same"]
    assert skipped["update/skipped_share"] == [1.0, 1.0]
    assert (output / "too_large" / "checkpoint-2" / "ppo_state.json").is_file()
    assert (output / "too_large" / "nonfinite" / "step_000001_rank_1" / "report.json").is_file()

    if "empty" in faults:
        empty, excluded = ranks[0]["empty"], ranks[0]["exclude"]
        assert empty["stopped"] is excluded["stopped"] is None
        assert empty["step"] == excluded["step"] == 3
        assert not empty["same"]
        assert not excluded["same"]
        assert empty["update/skipped_share"] == excluded["update/skipped_share"] == [0.0] * 3
        # Every completion of rank 1 is its stop token alone; the tail is that of rank 0 alone.
        assert all(length < 4 for length in empty["completion/length_mean"])
        assert empty["constraint/below:0/value"] == [0.5] * 3
        assert excluded["reward/failed_share"] == [0.0, 0.5, 0.5]
