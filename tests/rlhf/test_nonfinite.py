"""Updates without a finite loss and gradient: nothing changes, it is counted, kept, and ends the run in time."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny import count_good, logged, tiny_config, tiny_tokenizer, tiny_trainer
from transformers import TrainerCallback

from rlhf.nonfinite import REMEDIES, NonFiniteError, UpdateGuard

ONE_UPDATE = {"num_ppo_epochs": 1, "lr_scheduler_type": "linear"}


def spike_at(*rollouts):
    """A reward that is finite in these rollouts, but whose square is not."""
    calls = []

    def spiking(prompts, completions, **columns):
        calls.append(0)
        return [1e30] * len(prompts) if len(calls) in rollouts else count_good(prompts, completions)

    return spiking


class Snapshots(TrainerCallback):
    """Everything that an update may change, after each step."""

    def __init__(self):
        self.taken = []

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        parts = model.state_dict(), optimizer.state_dict(), lr_scheduler.state_dict()
        self.taken.append(copy.deepcopy(parts))


def assert_bits_equal(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_bits_equal(first[name], second[name])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_bits_equal(a, b)
    else:
        assert first == second


def test_a_skipped_update_changes_no_bit_and_training_goes_on(tmp_path):
    snapshots = Snapshots()
    trainer = tiny_trainer(tmp_path, reward=spike_at(2), callbacks=[snapshots], max_steps=3, **ONE_UPDATE)
    with pytest.warns(UserWarning, match="Update 2 is skipped on all ranks; first not finite: .* on rank 0"):
        trainer.train()
    first, second, third = snapshots.taken
    assert first[1]["state"]
    assert_bits_equal(first, second)
    assert any(not torch.equal(second[0][name], third[0][name]) for name in second[0])
    assert second[2]["last_epoch"] == 1
    assert third[2]["last_epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in third[0].values())
    assert logged(trainer, "update/skipped_share") == [0.0, 1.0, 0.0]
    assert len(logged(trainer, "grad_norm")) == 2
    steps = [json.loads(json.dumps(entry, allow_nan=False)) for entry in trainer.state.log_history]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3]


def test_without_the_guard_one_such_update_ruins_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(UpdateGuard, "skips", lambda *_: False)
    trainer = tiny_trainer(tmp_path, reward=spike_at(1), max_steps=1, **ONE_UPDATE)
    trainer.train()
    assert any(tensor.isnan().any() for tensor in trainer.model.state_dict().values())


def test_the_run_stops_in_time_with_a_checkpoint_and_the_batches_and_can_go_on(tmp_path):
    trainer = tiny_trainer(
        tmp_path, reward=spike_at(2, 3, 4), max_steps=6, max_skipped_updates=1, logging_steps=10, **ONE_UPDATE
    )
    message = "2 updates in a row had no finite loss and gradient .* First not finite: .* look at"
    with pytest.warns(UserWarning, match="Update 2 is skipped"), pytest.raises(NonFiniteError, match=message):
        trainer.train()
    folders = sorted(folder.name for folder in (tmp_path / "nonfinite").iterdir())
    assert folders == ["step_000002_rank_0", "step_000003_rank_0"]
    kept = tmp_path / "nonfinite" / "step_000003_rank_0"
    report = json.loads((kept / "report.json").read_text(), parse_constant=pytest.fail)
    tensors = load_file(kept / "micro_batch_0.safetensors")
    assert report["first"]["quantity"] in REMEDIES
    assert report["first"]["rank"] == 0
    assert tensors["scores"].tolist() == pytest.approx([1e30] * 4)
    row = report["rows"][0]
    assert row["score"] == pytest.approx(1e30)
    mask = tensors["completion_mask"][0]
    assert tensors["input_ids"][0, -len(mask) :][mask].tolist() == row["completion_ids"]
    assert len(row["old_logprobs"]) == len(row["new_logprobs"]) == len(row["completion_ids"])
    assert tiny_tokenizer().decode(row["prompt_ids"]) == row["prompt"]
    # The last log is written before the stop, and the checkpoint of its step is one to go on from.
    assert trainer.state.log_history[-1]["update/skipped_share"] == pytest.approx(2 / 3)
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-3")}
    mended = tiny_trainer(tmp_path, reward=spike_at(), max_steps=4, **resume, **ONE_UPDATE)
    mended.train(**resume)
    assert mended.state.global_step == 4
    assert logged(mended, "update/skipped_share")[-1] == 0.0


def test_a_gradient_alone_is_found_and_its_parameter_named(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, max_skipped_updates=0, **ONE_UPDATE)
    layers = trainer.model.policy.model.layers
    layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(NonFiniteError, match=r"gradient of policy\.model\.layers\.1\.mlp\.up_proj\.weight and 0 of"):
        trainer.train()
    assert_bits_equal(before, dict(trainer.model.state_dict()))
    report = json.loads((tmp_path / "nonfinite" / "step_000001_rank_0" / "report.json").read_text())
    # Every micro-batch of the update may be the cause.
    assert {row["micro_batch"] for row in report["rows"]} == {0, 1}
    assert all(math.isfinite(float(loss)) for loss in report["this_rank"]["losses"])


def test_an_update_without_a_score_is_skipped_and_blamed_on_the_rewards(tmp_path):
    trainer = tiny_trainer(tmp_path, reward=lambda prompts, **c: [None] * len(prompts), max_skipped_updates=0)
    with (
        pytest.warns(UserWarning, match="8 of 8 rewards"),
        pytest.raises(NonFiniteError, match=r"First not finite: rewards on rank 0\. No completion of the update"),
    ):
        trainer.train()


def guard_of(tmp_path, **accelerator):
    settings = {"distributed_type": DistributedType.NO, "mixed_precision": "no", "num_processes": 1}
    settings |= {"process_index": 0, "is_main_process": True} | accelerator
    return UpdateGuard(tiny_config(tmp_path), SimpleNamespace(**settings), tiny_tokenizer())


def test_a_loss_scalers_search_is_no_fault_but_a_weight_of_nan_is(tmp_path):
    model = torch.nn.Linear(2, 1)
    scaled = guard_of(tmp_path, mixed_precision="fp16")
    assert scaled.skips(math.inf, model, 1)
    assert not scaled.counts
    model.bias.data.fill_(math.nan)
    with pytest.warns(UserWarning, match=r"first not finite: weights \(bias\) on rank 0"):
        assert scaled.skips(math.inf, model, 2)
    assert scaled.counts


def test_an_engine_that_applied_such_an_update_is_refused(tmp_path):
    guard = guard_of(tmp_path, distributed_type=DistributedType.DEEPSPEED, optimizer_step_was_skipped=False)
    assert not guard.skips(1.0, torch.nn.Linear(1, 1), 1)
    with pytest.raises(NonFiniteError, match="DeepSpeed applied update 2 with a gradient of norm nan"):
        guard.skips(math.nan, torch.nn.Linear(1, 1), 2)


def test_one_broken_rollout_does_not_end_a_run(tmp_path):
    assert tiny_config(tmp_path, num_ppo_epochs=2).skipped_updates_allowed == 3
    assert tiny_config(tmp_path, num_ppo_epochs=4, num_mini_batches=2).skipped_updates_allowed == 8
    assert tiny_config(tmp_path, max_skipped_updates=0).skipped_updates_allowed == 0
    with pytest.raises(ValueError, match="max_skipped_updates must be 0 or more"):
        tiny_config(tmp_path, max_skipped_updates=-1)
