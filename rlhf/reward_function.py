"""A risk measure of the predicted rating distribution as a TRL reward function."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward.distribution import RewardDistribution
from reward.heads import sum_attributes
from reward.loading import load_config
from reward.reading import ModelReader
from reward.source_specs import parse_source, read_source_spec
from reward.sources import QUANTILE_MODELS, DistributionSource, QuantileModelSource, ScalarSource
from rlhf.attributes import WHOLE, build_objectives
from rlhf.measures import RiskMeasure, RiskSpecError
from rlhf.metrics import gather_objects
from rlhf.objective import evaluate_together, learn_together
from rlhf.rollout import prompt_digest

logger = logging.getLogger(__name__)


class RiskReward:
    """A risk measure of the predicted rating distribution, as a reward function for TRL-style trainers.

        response scope:    u(x, y) = ρ(F_xy),   F_xy the rating law that a source predicts for prompt x, completion y
        population scope:  u(x, y) = ρ(F) + ∫ IF(z; F) dF_xy(z),   F the law of ratings over prompts, answers, readers
        attributes:        u(x, y) = Σ_a w_a(x) u_a(x, y), each attribute with a measure of its own; constraints are
                           added unweighted (see `rlhf.objective.learn_together`)

    It has the signature of TRL's reward functions, so the same object serves `PPOTrainer`, `GRPOTrainer` and
    `RLOOTrainer`. The reward model reads text with its own tokenizer and template, whatever the policy's. Every rank
    must call it together, because the population is that of all ranks; a call with `is_evaluation=True` is the rank's
    own and leaves statistics and multipliers as they are. TRL's trainers do not say so: their evaluations count too.

    A dataset may say how much each attribute counts for a row: its column `attribute_weights` holds A numbers, or a
    number by attribute name. They weigh the attributes' measures, not their constraints, or, for a single measure,
    replace the gate.

    Args:
        model: quantile reward model, or path or hub id of one: trained here, or a published QRM, ArmoRM or URM; any
            other source of a distribution, or its spec, such as "ensemble:path-a,path-b" or "judgment:path-or-id"
            (see `reward.source_specs.parse_source`). A plain one-label classifier is accepted for `risk="mean"`
            alone: it predicts no distribution. "scalar:path" says that a law without spread is meant.
        risk: risk measure or its spec, such as "cvar:0.1" (see `rlhf.risk.parse_risk`), or one per attribute,
            "helpfulness=mean; harmlessness=0.5*cvar:0.05".
        scope: "response" or "population" (see `rlhf.objective`).
        tokenizer: the reward model's; unset: loaded beside it.
        batch_size: texts per forward pass. They are sorted by length, so padding costs little.
        max_length: longest text in tokens; unset: the model's context. Longer texts lose their beginning, which
            keeps the answer, and the share that did is logged.
        dtype: of the weights, "auto" takes the checkpoint's.
        tail_threshold: also log the predicted mass at or below this rating, averaged over the batch.
        trust_remote_code: allow models that ship their own Python code.
        objective: constraints, a schedule and what else `rlhf.attributes.build_objectives` takes.

    Raises:
        ValueError: malformed spec, an attribute that the model does not have, or a measure of the distribution for a
            model that predicts none.
    """

    # One rank cannot repeat a call or give it up: all look at the population together.
    every_rank_together = True

    def __init__(
        self,
        model: str | PreTrainedModel | DistributionSource,
        risk: str | RiskMeasure = "mean",
        *,
        scope: str = "response",
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        dtype: str | torch.dtype = "auto",
        tail_threshold: float | None = None,
        trust_remote_code: bool = False,
        **objective: Any,
    ):
        self.objectives = build_objectives(risk, scope, **objective)
        self.tail_threshold = tail_threshold
        if isinstance(model, DistributionSource):
            if tokenizer is not None or max_length is not None:
                raise ValueError("a source reads in its own way; give tokenizer and max_length to the source")
            self.source = model
        else:
            self._check_measure(model, trust_remote_code)
            reading = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
            reading |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
            self.source = _open_source(model, reading)
        self._check_attributes()
        # TRL names the reward's metrics after the function.
        self.__name__ = f"risk_{self.spec}"

    @property
    def spec(self) -> str:
        """Measure, scope, schedule and constraints in one line."""
        if set(self.objectives) == {WHOLE}:
            return self.objectives[WHOLE].spec
        return "; ".join(f"{name}={objective.spec}" for name, objective in self.objectives.items())

    @property
    def risk(self) -> RiskMeasure:
        """The measure of the answer as a whole.

        Raises:
            AttributeError: each attribute has its own.
        """
        if WHOLE not in self.objectives:
            raise AttributeError(f"'{self.spec}' has a measure per attribute; look into `objectives`")
        return self.objectives[WHOLE].measure

    def _check_attributes(self) -> None:
        known = self.source.attribute_names
        for name in self.objectives:
            if name != WHOLE and name not in known:
                has = f"has the attributes {', '.join(known)}" if known else "has no attributes of its own"
                raise RiskSpecError(f"the risk names the attribute '{name}', but {self.source.name} {has}")

    def _check_measure(self, model: str | PreTrainedModel, trust_remote_code: bool) -> None:
        if self.spec in ("mean", "population mean"):
            return
        what = None
        if isinstance(model, str):
            spec = read_source_spec(model)
            if spec.predicts_one_number(trust_remote_code):
                config = load_config(spec.paths[0], trust_remote_code=trust_remote_code)
                what = f"{model} is of type '{config.model_type}', which"
        elif not isinstance(model, QUANTILE_MODELS):
            what = type(model).__name__
        if what is not None:
            raise ValueError(
                f"risk '{self.spec}' needs a quantile reward model, but {what} predicts one number. Train a QRM "
                "with recipes/train_qrm.py, or use risk='mean'."
            )

    @property
    def reader(self) -> ModelReader:
        """The one model that is asked, with its tokenizer."""
        if not hasattr(self.source, "reader"):
            raise AttributeError(f"{self.source.name} has several models; look into `source`")
        return self.source.reader

    @property
    def model(self) -> PreTrainedModel:
        return self.reader.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.reader.tokenizer

    @property
    def max_length(self) -> int:
        return self.reader.max_length

    @property
    def batch_size(self) -> int:
        return self.reader.batch_size

    def prepare(self, accelerator: Any) -> None:
        """Place the reward model for a launch: sharded under ZeRO-3, a copy on each device otherwise."""
        self.source.prepare(accelerator)

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        """Predicted rating law of each prompt and completion, on the CPU, (N, K)."""
        return self.source.distribution(prompts, completions)

    def __call__(
        self, prompts: Sequence, completions: Sequence, completion_ids: Sequence | None = None, **columns: Any
    ) -> list[float]:
        """Utility of each completion, in rating units, higher is better.

        Args:
            prompts: N prompts, text or messages.
            completions: N completions in the same format.
            completion_ids: ignored; the reward model has a tokenizer of its own.
            columns: other columns of the dataset. Read are `attribute_weights`; `log_metric`, a callable that
                receives telemetry; `trainer_state`, for a schedule; and `is_evaluation`.

        Raises:
            RuntimeError: the reward model failed on another rank. Without this word all ranks would wait for it.
        """
        state, log_metric = columns.get("trainer_state"), columns.get("log_metric")
        progress = state.global_step / state.max_steps if state is not None and state.max_steps > 0 else None
        is_evaluation = columns.get("is_evaluation", False)
        try:
            weights = self._attribute_weights(columns.get("attribute_weights"), len(prompts))
            laws = self._laws(prompts, completions, weights)
        except Exception as error:
            if not is_evaluation:
                # The other ranks are about to wait for this one's laws.
                gather_objects((f"{type(error).__name__}: {error}", {}, [], None), PartialState())
            raise
        if is_evaluation:
            utilities = evaluate_together(self.objectives, laws, progress, self._by_attribute(weights))
        else:
            utilities = self._learn(prompts, laws, weights, progress, log_metric)
            if progress is not None:
                for name, objective in self.objectives.items():
                    for warning in objective.plan(state.global_step, state.max_steps):
                        warnings.warn(warning if name == WHOLE else f"{name}: {warning}", stacklevel=2)
        if log_metric is not None:
            self._log_telemetry(laws, log_metric)
        return torch.stack(list(utilities.values())).sum(dim=0).tolist()

    def _laws(self, prompts: Sequence, completions: Sequence, weights: Tensor | None) -> dict[str, RewardDistribution]:
        """The law that each objective looks at, (N,) each."""
        if set(self.objectives) == {WHOLE} and weights is None:
            return {WHOLE: self.source.distribution(prompts, completions)}
        attributes = self.source.attribute_distributions(prompts, completions)
        if WHOLE in self.objectives:
            whole = sum_attributes(weights.to(attributes.values.dtype), attributes.values)
            return {WHOLE: RewardDistribution(attributes.levels, whole)}
        return {name: attributes[:, self.source.attribute_names.index(name)] for name in self.objectives}

    def _learn(
        self,
        prompts: Sequence,
        laws: Mapping[str, RewardDistribution],
        weights: Tensor | None,
        progress: float | None,
        log_metric: Any,
    ) -> dict[str, Tensor]:
        """Utilities of this rank's completions, with the population of all ranks."""
        process = PartialState()
        own = (
            None,
            {name: law.values for name, law in laws.items()},
            [prompt_digest(prompt) for prompt in prompts],
            weights,
        )
        ranks = gather_objects(own, process)
        for rank, (error, *_) in enumerate(ranks):
            if error is not None:
                raise RuntimeError(f"the reward model failed on rank {rank} ({error})")
        groups = torch.tensor([group for _, _, of_rank, _ in ranks for group in of_rank])
        start = sum(len(of_rank) for _, _, of_rank, _ in ranks[: process.process_index])
        everything = {
            name: RewardDistribution(law.levels, torch.cat([values[name] for _, values, _, _ in ranks]))
            for name, law in laws.items()
        }
        if weights is not None:
            weights = torch.cat([of_rank for _, _, _, of_rank in ranks])
        learned = learn_together(self.objectives, everything, groups, progress, self._by_attribute(weights))
        for name, of_attribute in learned.items():
            if process.is_main_process:
                start_of_line = "" if name == WHOLE else f"{name}: "
                for line in of_attribute.lines:
                    logger.info("%s", start_of_line + line)
                for warning in of_attribute.warnings:
                    warnings.warn(start_of_line + warning, stacklevel=3)
            if log_metric is not None:
                for metric, value in of_attribute.numbers.items():
                    log_metric(metric if name == WHOLE else f"{metric}/{name}", value)
        return {name: found.utility[start : start + len(prompts)] for name, found in learned.items()}

    def _by_attribute(self, weights: Tensor | None) -> dict[str, Tensor] | None:
        """(N,) weights of each objective from (N, A) of a dataset; None where they count alike or replace the gate."""
        if weights is None or WHOLE in self.objectives:
            return None
        return {name: weights[:, self.source.attribute_names.index(name)] for name in self.objectives}

    def _attribute_weights(self, column: Sequence | None, count: int) -> Tensor | None:
        """(N, A) weights of a dataset column, or None."""
        if column is None:
            return None
        names = self.source.attribute_names
        if not names:
            raise ValueError(f"the dataset has attribute_weights, but {self.source.name} has no attributes to weigh")
        rows = []
        for row in column:
            if isinstance(row, Mapping):
                unknown = [name for name in row if name not in names]
                if unknown:
                    has = f"{self.source.name} has {', '.join(names)}"
                    raise ValueError(f"attribute_weights name {unknown[0]!r}; {has}")
                row = [row.get(name) or 0.0 for name in names]
            if row is None or len(row) != len(names):
                raise ValueError(f"attribute_weights need one number for each of {', '.join(names)}, got {row!r}")
            rows.append(row)
        weights = torch.tensor(rows, dtype=torch.float64).reshape(count, len(names))
        if not bool(weights.isfinite().all()):
            raise ValueError("attribute_weights must be finite numbers")
        for place, name in enumerate(names):
            measured = WHOLE in self.objectives or getattr(self.objectives.get(name), "measure", None) is not None
            if not measured and bool((weights[:, place] != 0).any()):
                raise ValueError(
                    f"attribute_weights give '{name}' a weight, but the risk '{self.spec}' has no measure for it, so "
                    f"that nothing could be weighed; write '{name}=...' in the risk, or weigh it by 0"
                )
        return weights

    def _log_telemetry(self, laws: Mapping[str, RewardDistribution], log_metric: Any) -> None:
        for name, law in laws.items():
            end = f"/{name}" if name != WHOLE else ""
            finite = law.values.isfinite().all(-1)
            if finite.any():
                log_metric(f"reward/rating_mean{end}", law.mean()[finite].mean().item())
                log_metric(f"reward/rating_std{end}", law.std()[finite].mean().item())
                if self.tail_threshold is not None:
                    log_metric(f"reward/tail_mass{end}", law.cdf(self.tail_threshold)[finite].mean().item())
        for name, value in self.source.telemetry.items():
            log_metric(f"reward/{name}", value)

    def state_dict(self) -> dict[str, object]:
        """Population statistics, multipliers and guards, as plain numbers for a checkpoint."""
        return {name: objective.state_dict() for name, objective in self.objectives.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: the state belongs to another objective.
        """
        if set(state) != set(self.objectives):
            raise ValueError(
                f"the checkpoint has objectives for {sorted(state)}, this run has them for {sorted(self.objectives)}"
            )
        for name, objective in self.objectives.items():
            objective.load_state_dict(state[name])


def _open_source(model: str | PreTrainedModel, reading: dict[str, Any]) -> DistributionSource:
    if isinstance(model, str):
        return parse_source(model, **reading)
    source = QuantileModelSource if isinstance(model, QUANTILE_MODELS) else ScalarSource
    return source(model, **reading)
