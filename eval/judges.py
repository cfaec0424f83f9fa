"""Who says how bad a completion is: a source of rating laws, any classifier, a lexicon, or a function of yours.

A judge should not be the reward model that trained the policy: a policy learns its reward model's mistakes, and
asking that model whether the policy got better is asking the wrong one.
"""

import asyncio
import importlib
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import apply_chat_template, is_conversational

from eval.records import Row, complete_rows, fingerprint, source_identity
from reward.distribution import RewardDistribution
from reward.loading import load_config, load_model, load_tokenizer
from reward.source_specs import SourceSpecError, read_source_spec
from reward.sources import predicts_quantiles
from rlhf.reward_calls import read_rewards
from rlhf.reward_function import RiskReward

Reads = Literal["prompt+completion", "completion"]

EXAMPLES = (
    "qrm:runs/quickstart/judge",
    "source:mixture:0.7*path-a+0.3*path-b",
    "classifier:path-or-id",
    "classifier:path-or-id:label",
    "classifier:path-or-id:-label",
    "vader",
    "python:my_module:my_function",
)


class JudgeSpecError(ValueError):
    """A judge spec that cannot be used; the message lists the valid ones."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a judge thinks of n completions, higher is better.

    Attributes:
        scores: (n,) float64; NaN where the judge failed.
        distribution: The n predicted rating laws; None for a judge that gives one number.
    """

    scores: np.ndarray
    distribution: RewardDistribution | None = None

    @property
    def failures(self) -> int:
        """Completions without a finite score."""
        return int((~np.isfinite(self.scores)).sum())

    def tail_mass(self, rating: float) -> np.ndarray | None:
        """(n,) probability of a rating at or below `rating`, NaN where the judge failed; None without laws."""
        if self.distribution is None:
            return None
        return self.distribution.cdf(rating).double().cpu().numpy()


class Judge(ABC):
    """Scores completions: higher is better.

    Attributes:
        spec: The string it was made from.
        unit: What a score is, for axis labels and tables.
    """

    spec: str
    unit: str

    @abstractmethod
    def __call__(self, prompts: Sequence, completions: Sequence) -> Judgement:
        """Judge n completions.

        Args:
            prompts: n texts or message lists.
            completions: n texts, or lists of one assistant message where the prompts are message lists.
        """

    def identity(self) -> Any:
        """What changes when the judge does."""
        return self.spec


@final
class SourceJudge(Judge):
    """The rating law that a quantile reward model, or any other source, predicts; the score is its mean.

    Models are loaded with the first completion: a finished score file costs nothing.
    """

    unit = "predicted mean rating"

    def __init__(self, source: str, *, spec: str | None = None, batch_size: int = 32, max_length: int | None = None):
        self.spec, self.batch_size, self.max_length = spec or f"source:{source}", batch_size, max_length
        try:
            self.source = read_source_spec(source)
        except SourceSpecError as error:
            raise JudgeSpecError(f"{self.spec}: {error}") from None

    @cached_property
    def reward(self) -> RiskReward:
        return RiskReward(self.source.text, "mean", batch_size=self.batch_size, max_length=self.max_length)

    def __call__(self, prompts: Sequence, completions: Sequence) -> Judgement:
        levels, readable = self.reward.source.levels, _readable(prompts, completions)
        values = torch.full((len(prompts), len(levels)), math.nan)
        if readable:
            values[readable] = self.reward.distribution(*_chosen(prompts, completions, readable)).values
        law = RewardDistribution(levels=levels, values=values)
        return Judgement(law.mean().double().numpy(), law)

    def identity(self) -> Any:
        models = [source_identity(path) for path in self.source.all_paths()]
        return [self.spec, models[0] if len(models) == 1 else models, self.max_length]


@final
class ClassifierJudge(Judge):
    """A sequence-classification model's verdict.

    The score is
        for a model with one label            its logit, the form of scalar reward models,
        for a label named in the spec         P(label), or −P(label) when the spec writes it with a minus, as in
                                              ":-toxic", because less of it is better,
        for labels that are numbers           Σ number · P(label), as for "1 star" to "5 stars".

    Probabilities are a softmax over labels, or a sigmoid each when the config says multi_label_classification.
    """

    def __init__(self, path: str, label: str | None = None, *, batch_size: int = 32, max_length: int | None = None):
        self.path, self.batch_size, self.max_length = path, batch_size, max_length
        self.spec = f"classifier:{path}" + (f":{label}" if label else "")
        _check_model(path, self.spec)
        self.config = load_config(path)
        if self.config.model_type == "qrm":
            raise JudgeSpecError(f"{path} is a quantile reward model; write qrm:{path} to get its distribution")
        self.weights, self.unit = _label_weights(self.config, label, self.spec)
        self.tokenizer = load_tokenizer(path)
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        if self.tokenizer.pad_token is None:
            raise JudgeSpecError(f"the tokenizer of {path} has no pad token, so texts cannot be batched; set one")

    @cached_property
    def model(self) -> PreTrainedModel:
        model = load_model(AutoModelForSequenceClassification, self.path, dtype="auto").eval()
        return model.to(PartialState().device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence, completions: Sequence) -> Judgement:
        texts, templated = judged_texts(prompts, completions, self.tokenizer)
        order = sorted(_readable(prompts, completions), key=lambda i: len(texts[i]))
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None) or math.inf
        scores = np.full(len(texts), np.nan)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in chosen],
                add_special_tokens=not templated,
                truncation=True,
                max_length=self.max_length or int(min(context, self.tokenizer.model_max_length, 10**6)),
                padding=True,
                return_tensors="pt",
            ).to(self.model.device)
            scores[chosen] = self._score(self.model(**batch).logits.float()).double().cpu().numpy()
        return Judgement(scores)

    def identity(self) -> Any:
        return [self.spec, source_identity(self.path), self.max_length]

    def _score(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, labels) -> (B,)."""
        if self.weights is None:
            return logits[:, 0]
        independent = self.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if independent else logits.softmax(-1)
        return probabilities @ torch.tensor(self.weights, device=logits.device)


@final
class VaderJudge(Judge):
    """Compound sentiment of the VADER lexicon, from −1 (most negative) to 1.

    Reference: Hutto & Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis", ICWSM.
    """

    spec = "vader"
    unit = "VADER compound sentiment, −1 to 1"

    def __init__(self):
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise JudgeSpecError("the judge 'vader' needs a package: pip install vaderSentiment==3.3.2") from error
        self.analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence, completions: Sequence) -> Judgement:
        texts = [as_text(p) + as_text(c) for p, c in zip(prompts, completions, strict=True)]
        return Judgement(np.array([self.analyzer.polarity_scores(text)["compound"] for text in texts]))


@final
class FunctionJudge(Judge):
    """A Python function that returns one number per completion, None or NaN where it cannot judge.

    It is called with those of `prompts`, `completions` and `texts` that it names (all of them if it takes
    `**kwargs`), so reward functions in TRL's form can judge. It may be async.
    """

    def __init__(self, module: str, function: str):
        self.spec, self.unit = f"python:{module}:{function}", f"score of {function}"
        try:
            self.function: Callable[..., Any] = getattr(importlib.import_module(module), function)
        # Whatever the module raises while it is imported, the user needs to know which spec asked for it.
        except Exception as error:
            raise JudgeSpecError(
                f"cannot load {self.spec} ({type(error).__name__}: {error}); the module must be importable from the "
                "folder of the script or through PYTHONPATH"
            ) from error
        if not callable(self.function):
            raise JudgeSpecError(f"{self.spec} is a {type(self.function).__name__}, not a function")

    def __call__(self, prompts: Sequence, completions: Sequence) -> Judgement:
        texts = [as_text(p) + as_text(c) for p, c in zip(prompts, completions, strict=True)]
        offered = {"prompts": prompts, "completions": completions, "texts": texts}
        parameters = inspect.signature(self.function).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            offered = {name: value for name, value in offered.items() if name in parameters}
        result = self.function(**offered)
        if inspect.isawaitable(result):
            # A thread of its own, because notebooks already run an event loop in this one.
            with ThreadPoolExecutor(1) as thread:
                result = thread.submit(asyncio.run, _settle(result)).result()
        return Judgement(read_rewards(self.spec, result, len(texts))[0].numpy())

    def identity(self) -> Any:
        return [self.spec, source_identity(getattr(inspect.getmodule(self.function), "__file__", None))]


def parse_judge(spec: str, *, batch_size: int = 32, max_length: int | None = None) -> Judge:
    """The judge that a spec names. Models are checked now and loaded with the first completion.

    Args:
        spec: "qrm:PATH", "source:SPEC" with any source of `reward.source_specs.parse_source`, "classifier:PATH_OR_ID",
            "classifier:PATH_OR_ID:LABEL", "vader" or "python:MODULE:FUNCTION".
        batch_size: Texts per forward pass, for judges that are models.
        max_length: Longest text in tokens; a longer one loses its beginning. None takes the model's context.

    Raises:
        JudgeSpecError: The spec is none of these, or what it names cannot be loaded.
    """
    kind, _, rest = spec.strip().partition(":")
    if kind == "vader" and not rest:
        return VaderJudge()
    if kind == "qrm" and rest:
        _check_quantile_model(rest, f"qrm:{rest}")
        return SourceJudge(rest, spec=f"qrm:{rest}", batch_size=batch_size, max_length=max_length)
    if kind == "source" and rest:
        return SourceJudge(rest, batch_size=batch_size, max_length=max_length)
    if kind == "classifier" and rest:
        path, label = rest, None
        if ":" in rest and not Path(rest).exists():
            path, _, label = rest.rpartition(":")
        return ClassifierJudge(path, label, batch_size=batch_size, max_length=max_length)
    if kind == "python" and rest.count(":") == 1 and not rest.startswith(":") and not rest.endswith(":"):
        return FunctionJudge(*rest.split(":"))
    raise JudgeSpecError(f"unknown judge {spec!r}. Valid judge specs, by example: {', '.join(EXAMPLES)}")


def judge_completions(
    judge: Judge,
    rows: Sequence[Row],
    *,
    reads: Reads = "prompt+completion",
    path: str | Path | None = None,
    batch_size: int = 256,
    name: str = "policy",
) -> Judgement:
    """A judge's view of completions, in their order; computed by all processes together and kept on disk.

    Score row: prompt_id, sample, score (null where the judge failed), quantiles and levels of the predicted law
    (null for a judge without one), judge, fingerprint.

    Args:
        judge: See `parse_judge`.
        rows: Completions, from `generation.generate_completions`.
        reads: Whether the judge sees the prompt as well. Classifiers of toxicity are usually shown the completion
            alone, or a toxic prompt counts against the policy.
        path: JSONL file for the scores; reused while judge and completions stay the same.
        batch_size: Completions handed to the judge at a time.
        name: Label of the progress bar.
    """
    if reads not in ("prompt+completion", "completion"):
        raise ValueError(f"reads is 'prompt+completion' or 'completion', got {reads!r}")

    def work(jobs: list[Row]) -> list[Row]:
        judgement = judge(*_judged_pairs(jobs, reads))
        law = judgement.distribution
        results = []
        for i, (job, score) in enumerate(zip(jobs, judgement.scores.tolist(), strict=True)):
            valid = math.isfinite(score)
            quantiles = law.values[i].tolist() if law is not None and valid else None
            results.append(
                {
                    "prompt_id": job["prompt_id"],
                    "sample": job["sample"],
                    "score": score if valid else None,
                    "quantiles": quantiles,
                    "levels": None if law is None else law.levels.tolist(),
                    "judge": judge.spec,
                }
            )
        return results

    content = [[row["prompt_id"], row["sample"], row["prompt"], row["completion"]] for row in rows]
    scored = complete_rows(
        rows,
        work,
        path=path,
        fingerprint=fingerprint([judge.identity(), reads, content]),
        batch_size=batch_size,
        cost=lambda row: len(row["completion"]),
        description=f"judge {name}",
    )
    return judgement_from_rows(scored)


def judgement_from_rows(rows: Sequence[Row]) -> Judgement:
    """The judgement that score rows record."""
    scores = np.array([math.nan if row["score"] is None else row["score"] for row in rows], dtype=np.float64)
    levels = next((row["levels"] for row in rows if row["levels"] is not None), None)
    if levels is None:
        return Judgement(scores)
    failed = [math.nan] * len(levels)
    values = torch.tensor([row["quantiles"] or failed for row in rows])
    return Judgement(scores, RewardDistribution(levels=torch.tensor(levels), values=values))


def judged_texts(prompts: Sequence, completions: Sequence, tokenizer: Any) -> tuple[list[str], bool]:
    """Texts that a model reads, and whether a chat template (which brings its special tokens) made them."""
    if len(prompts) > 0 and is_conversational({"prompt": prompts[0]}):
        pairs = zip(prompts, completions, strict=True)
        return [apply_chat_template({"messages": p + c}, tokenizer)["text"] for p, c in pairs], True
    return [p + c for p, c in zip(prompts, completions, strict=True)], False


def as_text(prompt: str | list[dict]) -> str:
    """A prompt or completion as one readable string; messages one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt) + "\n"


def _readable(prompts: Sequence, completions: Sequence) -> list[int]:
    """Rows with any text at all: a model has no opinion on nothing, and some fail on it."""
    return [i for i, (p, c) in enumerate(zip(prompts, completions, strict=True)) if (as_text(p) + as_text(c)).strip()]


def _chosen(prompts: Sequence, completions: Sequence, rows: list[int]) -> tuple[list, list]:
    return [prompts[i] for i in rows], [completions[i] for i in rows]


def _judged_pairs(jobs: list[Row], reads: Reads) -> tuple[list, list]:
    texts = [job["completion"] for job in jobs]
    if reads == "completion":
        return [""] * len(jobs), texts
    prompts = [job["prompt"] for job in jobs]
    if not isinstance(prompts[0], str):
        return prompts, [[{"role": "assistant", "content": text}] for text in texts]
    return prompts, texts


def _label_weights(config: Any, label: str | None, spec: str) -> tuple[list[float] | None, str]:
    """Weight of each label's probability in the score (None: the raw logit), and the score's unit."""
    names = [config.id2label[i] for i in range(config.num_labels)]
    if label is None and len(names) == 1:
        return None, "score"
    if label is None:
        numbers = [re.fullmatch(r"\D*?(-?\d+(?:\.\d+)?)\s*(?:stars?|points?)?", name.strip()) for name in names]
        # "LABEL_0" and its like are what a config says when nobody has named the labels.
        if any(n is None for n in numbers) or any(name.startswith("LABEL_") for name in names):
            raise JudgeSpecError(
                f"{spec} has the labels {', '.join(names)}, which are not ratings; say which one to score, for "
                f"example {spec}:{names[-1]}, or {spec}:-{names[0]} if less of it is better"
            )
        return [float(n.group(1)) for n in numbers], "expected rating"
    sign, wanted = (-1.0, label[1:]) if label not in names and label.startswith("-") else (1.0, label)
    if wanted not in names:
        raise JudgeSpecError(f"{spec}: no label {wanted!r}; the model has {', '.join(names)}")
    return [sign * (name == wanted) for name in names], f"{'−' if sign < 0 else ''}P({wanted})"


def _check_quantile_model(path: str, spec: str) -> None:
    _check_model(path, spec)
    if not predicts_quantiles(load_config(path)):
        raise JudgeSpecError(f"{path} predicts no distribution; write classifier:{path} to use its score")


def _check_model(path: str, spec: str) -> None:
    """Refuses a folder that cannot hold a model, before anything is loaded."""
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").exists():
        raise JudgeSpecError(f"{spec}: {path} holds no model (config.json is missing)")
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or path.startswith(".")):
        raise JudgeSpecError(f"{spec}: {path} does not exist; give a folder with a model, or a hub id")


async def _settle(result: Any) -> Any:
    return await result
