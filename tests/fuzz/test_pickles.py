"""Files of a checkpoint that can only be read as pickles: what they would run is refused and does not run."""

import contextlib
import os
import pickle

import pytest
import torch
from datasets import Dataset
from tiny import tiny_qrm, tiny_tokenizer

from reward.data import RatingCollator
from reward.training import QRMTrainer, QRMTrainingArguments


class Payload:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "the code ran"


def write_torch(path, content):
    torch.save(content, path)


def write_plain(path, content):
    """As torch wrote before it had an archive."""
    path.write_bytes(pickle.dumps(content, protocol=2))


WRITERS = pytest.mark.parametrize("write", [write_torch, write_plain])


def test_the_payload_works(tmp_path, marker):
    write_torch(tmp_path / "optimizer.pt", {"state": Payload(marker)})
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert marker.is_dir()


@pytest.fixture(scope="module")
def engine():
    """What reads every file of a DeepSpeed checkpoint."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from rlhf.deepspeed_files import PlainCheckpointEngine

    return PlainCheckpointEngine(TorchCheckpointEngine(), contextlib.nullcontext)


@WRITERS
def test_a_partition_of_deepspeed_that_would_run_code_is_refused(engine, tmp_path, marker, write):
    path = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    write(path, {"optimizer_state_dict": {"zero_stage": 2, "base_optimizer_state": Payload(marker)}})
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        engine.load(str(path), map_location="cpu")
    assert not marker.exists()


def test_a_partition_of_deepspeed_as_it_writes_it_is_read(engine, tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = str(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    engine.save({"loss_scaler": LossScaler(2.0), "zero_stage": ZeroStageEnum(2), "moments": torch.ones(2)}, path)
    read = engine.load(path)
    assert (read["loss_scaler"].cur_scale, read["zero_stage"]) == (2.0, 2)
    assert read["moments"].tolist() == [1.0, 1.0]


def reward_trainer(folder, **settings):
    rows = [{"input_ids": [3, 4, 5], "ratings": [1.0, 2.0], "length": 3}] * 4
    return QRMTrainer(
        model=tiny_qrm(),
        args=QRMTrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=2,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=RatingCollator(tiny_tokenizer()),
    )  # fmt: skip


@WRITERS
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_the_reward_trainer_that_would_run_code_is_refused(tmp_path, marker, name, write):
    reward_trainer(tmp_path / "run", max_steps=1, save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert {path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl")} == {
        "optimizer.pt", "scheduler.pt", "rng_state.pth",
    }  # fmt: skip
    write(checkpoint / name, {"state": Payload(marker), "cpu": Payload(marker)})
    trainer = reward_trainer(tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match=f"{checkpoint}.* cannot be resumed from.*mkdir.* could run code"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()
