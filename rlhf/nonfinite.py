"""Updates without a finite loss and gradient: skipped on all ranks together, kept for study, and counted."""

import json
import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedTokenizerBase

from rlhf.config import PPOConfig
from rlhf.metrics import gather_objects
from rlhf.rollout import Rollout

BATCHES_KEPT = 10
"""Updates per run and rank whose micro-batches are saved."""

REMEDIES = {
    "weights": "An earlier update or the model itself brought them in; go back to an earlier checkpoint.",
    "rewards": "No completion of the update has a score: look at the reward functions and at reward/failed_share.",
    "reference log-probabilities": "The reference overflows on these tokens: load it in bfloat16 or float32, not in "
    "float16, and check its weights.",
    "old log-probabilities": "The policy overflows on these tokens, or generation_kwargs let it sample tokens to "
    "which it gives no probability: use bfloat16 or float32, and leave the sampling law as it is.",
    "values": "The critic has diverged: lower critic_learning_rate or vf_coef, and look at the size of the rewards.",
    "returns": "The rewards are too large for sums of their squares: look at reward/score_min and rescale.",
    "advantages": "The rewards are too large for sums of their squares: look at reward/score_min and rescale.",
    "log-probabilities of the update": "The policy of this update overflows: lower learning_rate or max_grad_norm.",
    "values of the update": "The critic of this update overflows: lower critic_learning_rate or vf_coef.",
    "loss": "A ratio or a squared error overflows: lower learning_rate or num_ppo_epochs, set dual_clip, and look at "
    "the size of the rewards.",
    "gradient": "The backward pass overflows: lower learning_rate, use bfloat16 or float32 instead of float16, or try "
    "another attn_implementation.",
}
"""What can be done about each quantity, in the order in which one causes the next."""

WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Ways of sharing the work that leave every gradient as the backward pass made it, until it is clipped here."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row without a finite loss and gradient; the message is a diagnosis."""


@dataclass
class MicroBatch:
    """One micro-batch of an update with what the update made of it."""

    inputs: Rollout
    logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)
    loss: Tensor  # ()

    def first_nonfinite(self) -> str | None:
        """The first of the quantities in the order of causes that is not finite on a token that counts."""
        inputs, mask = self.inputs, self.inputs.completion_mask
        for name, values in (
            ("reference log-probabilities", inputs.ref_logprobs),
            ("old log-probabilities", inputs.old_logprobs),
            ("values", inputs.values),
            ("returns", inputs.returns),
            ("advantages", inputs.advantages),
            ("log-probabilities of the update", self.logprobs),
            ("values of the update", self.values),
        ):
            if not bool(values[mask].isfinite().all()):
                return name
        return None if bool(self.loss.isfinite()) else "loss"


@dataclass(frozen=True)
class Finding:
    """What one rank knows about an update that was not finite."""

    rank: int
    quantity: str | None
    detail: str = ""
    losses: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.quantity}{self.detail} on rank {self.rank}"


class UpdateGuard:
    """Decides for every update whether it is applied, with the same answer on every rank.

    Args:
        args: settings.
        accelerator: of the trainer.
        tokenizer: of the policy, for the texts of a saved micro-batch.

    Attributes:
        skipped_in_a_row: updates skipped since the last one that was applied.
        diagnosis: why the run has to stop; None while it goes on.
    """

    def __init__(self, args: PPOConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase):
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        self.skipped_in_a_row = 0
        self.diagnosis: str | None = None
        self._tokens = torch.tensor(1.0)
        self._watched: list[MicroBatch] = []
        self._kept = 0

    def begin(self, global_tokens: Tensor) -> None:
        """A new update over so many tokens of all ranks."""
        self._tokens, self._watched = global_tokens, []

    def watch(self, inputs: Rollout, logprobs: Tensor, values: Tensor, loss: Tensor) -> Tensor:
        """The loss; one that is not finite, or of an update without a token, with a gradient of NaN.

        That gradient reaches every rank with the next reduction, where a flag would need a collective of its own. No
        bit of any other loss or gradient changes.
        """
        self._watched.append(MicroBatch(inputs, logprobs.detach(), values.detach(), loss.detach()))
        usable = loss.detach().isfinite() & (self._tokens > 0).to(loss.device)
        # Through the values and not as a factor: clips and masks stop gradients of the loss itself, NaN included.
        reached = torch.where(values.isfinite(), values, 0.0).mean()
        return loss + torch.where(usable, 0.0, math.nan) * reached

    def skips(self, norm: Tensor | float | None, model: torch.nn.Module, step: int) -> bool:
        """Whether the update is left out, told after the last backward pass. Every rank must ask.

        Args:
            norm: of the gradient of all ranks.
            model: with the gradients.
            step: number of this update.

        Raises:
            NonFiniteError: DeepSpeed has applied such an update already, and the weights are spoilt.
        """
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # The engine has stepped in the backward pass, and skips by itself.
            skipped = self.accelerator.optimizer_step_was_skipped
            if not skipped and norm is not None and not math.isfinite(norm):
                raise NonFiniteError(
                    f"DeepSpeed applied update {step} with a gradient of norm {norm}. The weights are spoilt: go on "
                    "from an earlier checkpoint, with bf16.check_grad_overflow and zero_optimization."
                    "compute_grad_norm left on in its configuration."
                )
        else:
            skipped = not math.isfinite(norm)
        if not skipped:
            self.skipped_in_a_row = 0
            return False
        own = self._finding(model)
        findings = gather_objects(own, self.accelerator)
        first = min(findings, key=_order)
        if self._scales_losses and first.quantity == "gradient":
            # A loss scaler looks for its scale by overflowing. That is no fault, and it skips by itself.
            return True
        self.skipped_in_a_row += 1
        self._keep(own, findings, step)
        if self.skipped_in_a_row > self.args.skipped_updates_allowed:
            self.diagnosis = (
                f"{self.skipped_in_a_row} updates in a row had no finite loss and gradient and were skipped; the "
                f"weights are those before. First not finite: {first}. {REMEDIES[first.quantity]} "
                f"The micro-batches are in {self._folder(step, first.rank).parent}."
            )
        elif self.accelerator.is_main_process:
            warnings.warn(f"Update {step} is skipped on all ranks; first not finite: {first}.", stacklevel=2)
        return True

    @property
    def counts(self) -> bool:
        """Whether the last update was a fault, as a loss scaler's search for its scale is not."""
        return self.skipped_in_a_row > 0

    @property
    def _scales_losses(self) -> bool:
        return self.accelerator.mixed_precision == "fp16"

    @torch.no_grad()
    def _finding(self, model: torch.nn.Module) -> Finding:
        rank = self.accelerator.process_index
        losses = [str(batch.loss.item()) for batch in self._watched]
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return Finding(rank, "weights", f" ({name.removeprefix('module.')})", losses)
        if not bool(self._tokens > 0):
            return Finding(rank, "rewards", "", losses)
        seen = [quantity for batch in self._watched if (quantity := batch.first_nonfinite()) is not None]
        if seen:
            return Finding(rank, min(seen, key=list(REMEDIES).index), "", losses)
        # Elsewhere a norm of NaN has been multiplied into all of them, or they are gone.
        named = self.accelerator.distributed_type in WHOLE_GRADIENTS
        return Finding(rank, "gradient", _gradient_detail(model) if named else "", losses)

    def _keep(self, own: Finding, findings: list[Finding], step: int) -> None:
        """Save the micro-batches that are not finite; where only the gradient is, all of them may be its cause."""
        self._kept += 1
        only_gradient = all(finding.quantity in ("gradient", "weights", "rewards") for finding in findings)
        chosen = [i for i, b in enumerate(self._watched) if only_gradient or b.first_nonfinite() is not None]
        if not chosen or self._kept > BATCHES_KEPT:
            return
        folder = self._folder(step, own.rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            rows = [row for i in chosen for row in self._write(folder, i, self._watched[i])]
            report = {"step": step, "first": asdict(min(findings, key=_order)), "this_rank": asdict(own), "rows": rows}
            (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
        except OSError as error:
            # The other ranks are not to wait for a disk that is full.
            warnings.warn(f"the micro-batches of update {step} could not be saved: {error}", stacklevel=3)

    def _write(self, folder: Path, number: int, batch: MicroBatch) -> list[dict[str, Any]]:
        """The tensors of a micro-batch, and its rows for people to read."""
        tensors = batch.inputs.state_dict() | {"new_logprobs": batch.logprobs, "new_values": batch.values}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors | {"loss": batch.loss.reshape(1).cpu()}, folder / f"micro_batch_{number}.safetensors")
        mask, width = tensors["completion_mask"], tensors["completion_mask"].shape[1]
        rows = []
        for row in range(len(mask)):
            ids, real = tensors["input_ids"][row], tensors["attention_mask"][row].bool()
            prompt, completion = ids[:-width][real[:-width]].tolist(), ids[-width:][real[-width:]].tolist()
            rows.append(
                {
                    "micro_batch": number,
                    "row": row,
                    "score": _json_number(tensors["scores"][row]),
                    "prompt": self.tokenizer.decode(prompt),
                    "completion": self.tokenizer.decode(completion),
                    "prompt_ids": prompt,
                    "completion_ids": completion,
                    **{name: [_json_number(v) for v in tensors[name][row][mask[row]]] for name in _PER_TOKEN},
                }
            )
        return rows

    def _folder(self, step: int, rank: int) -> Path:
        return Path(self.args.output_dir, "nonfinite", f"step_{step:06d}_rank_{rank}")


_PER_TOKEN = ("old_logprobs", "ref_logprobs", "new_logprobs", "values", "new_values", "returns", "advantages")


class FiniteUpdates:
    """What a trainer of transformers asks its `update_guard` and when; mixed into `PPOTrainer`."""

    update_guard: UpdateGuard

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        """As in transformers, but a norm that is not finite leaves the gradients as they are.

        Clipping by it would turn every gradient into NaN and hide the parameter where it began.
        """
        if self.accelerator.distributed_type not in WHOLE_GRADIENTS:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if norm.isfinite():
            clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradient, None if the update is skipped; asked right before the optimiser's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        skipped = self.update_guard.skips(norm, model, self.state.global_step + 1)
        self._train_metrics.add("update/skipped_share", float(self.update_guard.counts))
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED and self.accelerator.scaler is None:
            # The scheduler asks the optimiser for this word. Without gradients the optimiser's step does nothing, not
            # even to its own counters.
            self.optimizer._is_overflow = skipped
            if skipped:
                model.zero_grad(set_to_none=True)
        return None if skipped else norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; if the run has to stop, it logs and saves a checkpoint first."""
        diagnosis = self.update_guard.diagnosis
        if diagnosis is not None:
            self.control.should_log = self.control.should_save = True
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if diagnosis is not None:
            raise NonFiniteError(diagnosis)


def _order(finding: Finding) -> tuple[int, int]:
    return list(REMEDIES).index(finding.quantity), finding.rank


def _gradient_detail(model: torch.nn.Module) -> str:
    """Which parameters' gradients are not finite, where they are still there."""
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    broken = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
    if not broken:
        return ""
    # The backward pass starts at the output, so the last parameter comes first.
    return f" of {broken[-1].removeprefix('module.')} and {len(broken) - 1} of {len(gradients) - 1} more before it"


def _json_number(value: Tensor) -> float | str:
    """JSON knows no NaN and no infinity."""
    number = value.item()
    return number if math.isfinite(number) else str(number)
