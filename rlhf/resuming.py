"""What `PPOTrainer` does so that no interruption loses work: whole checkpoints, exact resume, SIGTERM, full disks."""

import json
import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from rlhf import durability
from rlhf.checkpoint import check_resumable, layout, load_state, load_weights, save_state, save_weights
from rlhf.metrics import gather_objects
from rlhf.preemption import Preempted, Preemption
from rlhf.state_files import load_tree, save_tree

logger = logging.getLogger(__name__)
# torch.save reports a disk that is full by a RuntimeError with one of these words.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream", "write()", "No space left")


class DurableCheckpoints:
    """Saving and resuming, mixed into a trainer of transformers.

    Every rank writes into a folder aside; when all are done, checksums seal it and one rename publishes it. So a
    checkpoint exists wholly or not at all, and older ones are deleted only after it. Where a rank cannot write, all
    ranks give the checkpoint up together and training goes on.
    """

    _aside: Path | None = None  # the folder in which a checkpoint grows, while one does
    _disk_errors: list[str] = []
    _failed_saves = 0  # in a row
    _newest: Path | None = None  # the last checkpoint that this run wrote or resumed from
    _preemption: Preemption | None = None

    # ---- Training ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint where one is asked for.

        Args:
            resume_from_checkpoint: a folder; True or 'true' for the newest sound checkpoint of `output_dir`; 'auto'
                for that too, or a new start where none was written yet.

        Raises:
            ValueError: no sound checkpoint where one is asked for.
            Preempted: SIGTERM came; a checkpoint is written on all ranks. It ends the process with status 143.
        """
        checkpoint = self.sound_checkpoint(resume_from_checkpoint)
        with Preemption(self.accelerator) as self._preemption:
            self.add_callback(self._preemption)
            try:
                output = super().train(checkpoint, *args, **kwargs)
            finally:
                self.remove_callback(self._preemption)
            if self._preemption.stopping:
                self._leave()
        return output

    def sound_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The folder that `train` would resume from, checked file by file on the main process.

        Raises:
            ValueError: see `durability.checkpoint_to_resume`.
        """
        if self._newest is not None and str(resume_from_checkpoint) == str(self._newest):
            return str(self._newest)
        found: tuple = (None, [], None)
        if self.accelerator.is_main_process:
            try:
                found = (*durability.checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir), None)
                if found[0] is not None:
                    check_resumable(found[0], self._layout())
                    with _reading(found[0]):
                        _check_trainer_state(found[0])
            except ValueError as error:
                found = (None, [], str(error))
        checkpoint, messages, error = gather_objects(found, self.accelerator)[0]
        if error is not None:
            raise ValueError(error)
        for message in messages if self.accelerator.is_main_process else ():
            logger.warning(message)
        self._newest = checkpoint
        return None if checkpoint is None else str(checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the checkpoint of the last step: transformers would take one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, model: Any, trial: Any, *args, **kwargs):
        if self._saved_now() and (self.control.should_log or self.control.should_evaluate):
            # The end of an epoch, after its last step was saved: the checkpoint must know of it.
            self.control.should_save = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self._preemption.stopping and not self._saved_now():
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _saved_now(self) -> bool:
        return self._newest is not None and durability.step_of(self._newest) == self.state.global_step

    def _leave(self) -> None:
        saved = self._saved_now()
        if self.accelerator.is_main_process and saved:
            logger.warning(f"Stopped by SIGTERM after step {self.state.global_step}; resume from {self._newest}.")
        # A rank that exits while another still talks to it aborts.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if not saved:
            raise SystemExit(f"error: stopped by SIGTERM, but the checkpoint could not be written; {self._loss()}")
        raise Preempted

    # ---- Writing a checkpoint ---------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        aside = output_dir / durability.UNFINISHED
        folder = aside / durability.checkpoint_name(self.state.global_step)
        self._disk_errors, self._aside = [], aside
        try:
            with self._writing():
                if self.accelerator.is_main_process:
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            # What raises here and not inside comes after the last exchange between ranks.
            with self._writing():
                super()._save_checkpoint(model, trial)
                self._correct_best_path(folder, output_dir)
        finally:
            self._aside = None
        error = self._first_error() or self._seal(folder, output_dir)
        if error is None:
            self._newest, self._failed_saves = output_dir / folder.name, 0
            if self.args.should_save:
                limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
                durability.rotate(output_dir, self.state.global_step, limit, best)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(self._newest))
            return
        self._failed_saves += 1
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            logger.warning(
                f"The checkpoint of step {self.state.global_step} could not be written ({error}); what there was of "
                f"it is removed. Training goes on and tries again at the next save. Failures in a row: "
                f"{self._failed_saves}; {self._loss()}"
            )
        self.accelerator.wait_for_everyone()

    def _seal(self, folder: Path, output_dir: Path) -> str | None:
        """Checksums of all files, each rank its share; then the name. The error, where there was one."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        checksums = {}
        with self._writing():
            checksums = durability.flushed_checksums(folder, durability.files_of(folder)[rank::ranks])
        everything = gather_objects((checksums, self._disk_errors), self.accelerator)
        if self.accelerator.is_main_process and not any(errors for _, errors in everything):
            with self._writing():
                durability.seal(folder, {name: entry for part, _ in everything for name, entry in part.items()})
                durability.publish(folder, output_dir)
        return self._first_error()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error of the disk is kept until all ranks hear of it: a rank that raised would leave them waiting."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITE_ERRORS):
                raise
            self._disk_errors.append(f"{type(error).__name__}: {error}")

    def _first_error(self) -> str | None:
        return next((e for errors in gather_objects(self._disk_errors, self.accelerator) for e in errors), None)

    def _loss(self) -> str:
        if self._newest is None:
            return "there is no checkpoint yet, so a crash would lose all work."
        return f"a crash would lose the work since {self._newest}."

    def _correct_best_path(self, folder: Path, output_dir: Path) -> None:
        """transformers has looked for the best checkpoint where this one grows."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == folder.parent:
            self.state.best_model_checkpoint = str(output_dir / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Not from the folder that is about to move.
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    # ---- Its parts --------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy in plain Hugging Face form, its tokenizer, and the critic in a folder beside it."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self._disk_errors = [] if self._aside is None else self._disk_errors
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(self.accelerator.unwrap_model(self.model), folder, state_dict)
            self.processing_class.save_pretrained(folder)
            # JSON instead of transformers' pickled training_args.bin; to_dict masks secrets.
            (folder / "ppo_config.json").write_text(json.dumps(self.args.to_dict(), indent=2, default=str) + "\n")
        if self._disk_errors and self._aside is None:
            raise OSError(
                f"The policy could not be written to {folder} ({self._disk_errors[0]}). Make room and continue with "
                f"resume_from_checkpoint=true; {self._loss()}"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, accelerator = Path(output_dir), self.accelerator
        if self.is_deepspeed_enabled:
            from rlhf.deepspeed_files import save_engine

            save_engine(self.model_wrapped, folder, self._writing, self.args.should_save)
        elif self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        with self._writing():
            if self.args.should_save and not self.is_fsdp_enabled:
                if not self.is_deepspeed_enabled:
                    save_tree(self.optimizer.state_dict(), folder / "optimizer.safetensors")
                save_tree(self.lr_scheduler.state_dict(), folder / "scheduler.safetensors")
            save_state(
                output_dir,
                self.ppo_state,
                self._rollout,
                self._layout(),
                accelerator.process_index,
                accelerator.is_main_process,
                self.reward_functions.state_dict(),
            )

    def _save_scaler(self, output_dir: str) -> None:
        with self._writing():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """What differs between ranks: random generators, and the averages that the next log will show."""
        state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "loss_since_log": self._tr_loss.detach(),
            "logged_step": self._globalstep_last_logged,
            "skipped_in_a_row": self.update_guard.skipped_in_a_row,
            "metrics": self._train_metrics.state_dict(),
        }
        with self._writing():
            save_tree(state, Path(output_dir, f"rank_{self.accelerator.process_index}.safetensors"))

    # ---- Reading them -----------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in transformers. It is called between the making of DeepSpeed's engine and its loading."""
        if self.is_deepspeed_enabled:
            from rlhf.deepspeed_files import use_plain_files

            use_plain_files(self.accelerator.deepspeed_engine_wrapped.engine, self._writing)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with _reading(resume_from_checkpoint):
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            load_weights(model or self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with _reading(checkpoint):
            if self.is_fsdp_enabled:
                super()._load_optimizer_and_scheduler(checkpoint)
            else:
                if not self.is_deepspeed_enabled:
                    self.optimizer.load_state_dict(load_tree(Path(checkpoint, "optimizer.safetensors")))
                self.lr_scheduler.load_state_dict(load_tree(Path(checkpoint, "scheduler.safetensors")))
            accelerator = self.accelerator
            self.ppo_state, self._rollout, rewards = load_state(
                checkpoint, accelerator.process_index, accelerator.device, self.args
            )
            self.reward_functions.load_state_dict(rewards)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with _reading(checkpoint):
            state = load_tree(Path(checkpoint, f"rank_{self.accelerator.process_index}.safetensors"))
            random.setstate(state["python"])
            np.random.set_state(state["numpy"])
            torch.set_rng_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
            # transformers starts a resumed run as if everything before it had been logged.
            self._tr_loss = state["loss_since_log"].to(self.args.device)
            self._globalstep_last_logged = int(state["logged_step"])
            self._train_metrics.load_state_dict(state["metrics"])
            self.update_guard.skipped_in_a_row = int(state["skipped_in_a_row"])

    def _layout(self) -> dict[str, object]:
        module = self.accelerator.unwrap_model(self.model)
        return layout(self.args, self.accelerator.num_processes, hasattr(module.policy, "peft_config"))


@contextmanager
def _reading(checkpoint: str | Path) -> Iterator[None]:
    """What passes its checksums may still come from another version, or be edited and sealed again.

    Raises:
        ValueError: whatever a reader made of it, in one sentence that says what to do.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The checkpoint {checkpoint} is whole but cannot be loaded ({type(error).__name__}: {message}). Another "
            "version wrote it, or it was edited. Move it away to resume from the one before, or start anew."
        ) from error


def _check_trainer_state(checkpoint: str | Path) -> None:
    """What transformers reads without a look.

    Raises:
        Exception: of any kind.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    numbers = {"global_step": int, "max_steps": int, "epoch": int | float, "log_history": list}
    for name, kind in {**numbers, "train_batch_size": int | None, "stateful_callbacks": dict}.items():
        if not isinstance(getattr(state, name), kind):
            raise TypeError(f"{name} in trainer_state.json is {getattr(state, name)!r:.80}")
