"""The files of a DeepSpeed checkpoint: read without running code, and a full disk is no deadlock.

Import it only where DeepSpeed runs; it is not installed everywhere.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine


class PlainCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own files, with `weights_only` reading and errors of the disk handed to `writing`.

    Args:
        engine: the checkpoint engine that it replaces.
        writing: a context that keeps errors of the disk. A rank that raised in the middle of a save would leave the
            others waiting for it.
    """

    def __init__(self, engine: TorchCheckpointEngine, writing: Callable[[], AbstractContextManager]):
        super().__init__()
        self.zipfile_serialization, self._writing = engine.zipfile_serialization, writing

    def save(self, state_dict: object, path: str) -> None:
        with self._writing():
            super().save(state_dict, path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._writing():
            super().makedirs(path, exist_ok)

    def load(self, path: str, map_location: object = None) -> object:
        """Tensors, containers and the few classes of DeepSpeed's own state; anything else is refused."""
        with torch.serialization.safe_globals(_own_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)


def use_plain_files(engine: DeepSpeedEngine, writing: Callable[[], AbstractContextManager]) -> None:
    """Make an engine write and read its checkpoints as above.

    Raises:
        ValueError: the DeepSpeed config chose another kind of checkpoint files.
    """
    if isinstance(engine.checkpoint_engine, PlainCheckpointEngine):
        return
    if type(engine.checkpoint_engine) is not TorchCheckpointEngine:
        name = type(engine.checkpoint_engine).__name__
        raise ValueError(f"DeepSpeed's {name} is not supported; remove 'checkpoint' from the DeepSpeed config.")
    engine.checkpoint_engine = PlainCheckpointEngine(engine.checkpoint_engine, writing)
    # A script that DeepSpeed copies into every checkpoint. The policy lies beside it in plain form already.
    engine._copy_recovery_script = lambda folder: None


def save_engine(
    engine: DeepSpeedEngine,
    folder: Path,
    writing: Callable[[], AbstractContextManager],
    is_main: bool,
) -> None:
    """Every rank's part of the optimiser, and the weights; every rank must call it."""
    engine.save_checkpoint(str(folder), save_latest=False)
    if is_main:
        with writing():
            (folder / "latest").write_text(f"global_step{engine.global_steps}")


def _own_classes() -> list:
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, fragment_address, ZeroStageEnum]
