"""A language model that is asked for a score: the law of its answer, not one answer drawn from it."""

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reward.distribution import RewardDistribution
from reward.loading import load_tokenizer
from reward.mixtures import DENSE_LEVELS, dense_levels, discrete_law
from reward.reading import check_counts, open_reader
from reward.sources import DistributionSource, model_config, model_name, predicts_quantiles

SCORES = {"1": 1.0, "2": 2.0, "3": 3.0, "4": 4.0, "5": 5.0}

TEMPLATE = """\
Rate the answer to the prompt below. The possible ratings are {answers}; the first is the worst, the last the best.

Prompt:
{prompt}

Answer:
{completion}

Reply with the rating alone."""

# What makes a model without a chat template go on with a rating.
PLAIN_CUE = "\n\nRating:"


@final
class JudgmentSource(DistributionSource):
    """The law of the score that a causal language model would give.

        P(Z = score of s) = P(token of s | question) / Σ P(token of s′ | question)

    One forward pass, no sampling: a judge that hesitates between 1 and 5 shows both, where its likeliest answer shows
    one of them and a drawn one another each time. It is the law of one judge's words, not of human ratings: check its
    calibration before its tail is trusted.

    An answer is one token after the question, with or without a space before it; where both forms are one token their
    probabilities are added. What the model would rather say is left out, and `judgment_outside_mass` in the telemetry
    says how much that is. The discretisation is that of `discrete_law`: the mean is exact.

    Args:
        model: causal language model, or path or hub id of one.
        scores: number of each answer, from the worst to the best; the question lists them in this order.
        template: the question, with `{prompt}` and `{completion}`, and `{answers}` where they are to be listed. It is
            the user's turn where the tokenizer has a chat template, the whole text otherwise. Unset: `TEMPLATE`,
            followed by `PLAIN_CUE` where there is no chat template.
        chat_template_kwargs: further arguments of the chat template, such as {"enable_thinking": False}.
        max_outside_mass: the first call is refused, and a later one warned about, where on average more than this
            share of the next-token probability is on no score.
        num_levels: levels of the law.
        reading: as for `QuantileModelSource`. A text that is too long loses the beginning of the prompt, then that of
            the completion; the question stays whole.

    Raises:
        ValueError: a template without its places, answers that are not one token each, a model that cannot be asked,
            or one that does not answer with a score.

    Reference: Wang et al. 2025, arXiv:2503.03064.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        scores: Mapping[str, float] | None = None,
        template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_outside_mass: float = 0.5,
        num_levels: int = DENSE_LEVELS,
        **reading: Any,
    ):
        self.scores = dict(SCORES if scores is None else scores)
        self.outcomes = torch.tensor([float(score) for score in self.scores.values()])
        if len(self.scores) < 2 or not bool(self.outcomes.isfinite().all()):
            raise ValueError(f"scores need two or more answers with finite numbers, got {self.scores}")
        self.name, self.telemetry = model_name(model), {}
        _check_generative(model_config(model, **reading), self.name)
        trust, tokenizer = reading.get("trust_remote_code", False), reading.pop("tokenizer", None)
        tokenizer = tokenizer or load_tokenizer(self.name, trust_remote_code=trust)
        self.chat = tokenizer.chat_template is not None
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.template = (TEMPLATE if self.chat else TEMPLATE + PLAIN_CUE) if template is None else template
        _check_template(self.template, self.chat)
        self.max_outside_mass, self._answered = max_outside_mass, False
        self.levels = dense_levels(num_levels).float()
        if tokenizer.pad_token_id is None:
            # Padding stands on the right behind a mask, where no causal model sees it; any token will do.
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        self.answer_tokens = self._answer_tokens()
        self.reader = open_reader(model, AutoModelForCausalLM, tokenizer=tokenizer, **reading)
        shortest = len(self._question("", ""))
        if shortest >= self.reader.max_length:
            raise ValueError(
                f"the question alone has {shortest} tokens, and {self.reader.max_length} are all that fit; "
                "shorten the template or raise max_length"
            )

    def prepare(self, accelerator: Any) -> None:
        self.reader.prepare(accelerator)

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        probabilities, outside = self.probabilities(prompts, completions)
        if len(outside):
            self._check_answers(outside.nanmean().item())
        return discrete_law(self.outcomes, probabilities, len(self.levels))

    def probabilities(self, prompts: Sequence, completions: Sequence) -> tuple[Tensor, Tensor]:
        """(N, S) probability of each answer among the S answers, and (N,) that of saying something else."""
        check_counts(prompts, completions)
        asked = [self._fitted(as_words(p), as_words(c)) for p, c in zip(prompts, completions, strict=True)]
        self.reader.truncated_share = sum(cut for _, cut in asked) / max(len(asked), 1)
        keep = {}
        if "logits_to_keep" in inspect.signature(self.reader.module.forward).parameters:
            # The output layer is wide; it is only needed where some text of the batch ends.
            keep["logits_to_keep"] = _ends
        rows = self.reader.read([ids for ids, _ in asked], lambda o, m: self._answers(o, m, bool(keep)), **keep)
        table = torch.stack(rows) if rows else torch.empty(0, len(self.scores) + 1)
        outside = 1.0 - table[:, -1]
        self.telemetry = {
            "truncated_share": self.reader.truncated_share,
            "judgment_outside_mass": outside.nanmean().item() if len(outside) else 0.0,
        }
        return table[:, :-1], outside

    def _answers(self, output: Any, mask: Tensor, only_ends: bool) -> Tensor:
        """(B, S + 1): the law over answers, and the probability that it has of all."""
        last = mask.sum(dim=-1) - 1
        place = torch.searchsorted(_ends(mask), last) if only_ends else last
        logprobs = output.logits[torch.arange(len(last), device=last.device), place].float().log_softmax(dim=-1)
        answers = torch.stack([logprobs[:, tokens].logsumexp(dim=-1) for tokens in self.answer_tokens], dim=-1)
        inside = answers.logsumexp(dim=-1, keepdim=True)
        return torch.cat([(answers - inside).exp(), inside.exp()], dim=-1)

    def _question(self, prompt: str, completion: str, answer: str = "") -> list[int]:
        """Tokens of the question, with an answer behind it where one is given."""
        text = _filled(self.template, prompt=prompt, completion=completion, answers=", ".join(self.scores))
        if self.chat:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                **self.chat_template_kwargs,
            )
        return self._tokenizer(text + answer, add_special_tokens=not self.chat)["input_ids"]

    def _answer_tokens(self) -> list[list[int]]:
        """Tokens that begin and end each answer: one, or two where a space before it makes another token."""
        question, found = self._question("", ""), {}
        for answer in self.scores:
            forms = [self._question("", "", answer=form) for form in (answer, f" {answer}")]
            single = [ids[-1] for ids in forms if ids[:-1] == question and ids[-1] != self._tokenizer.unk_token_id]
            found[answer] = sorted(set(single))
        wrong = [repr(answer) for answer, tokens in found.items() if not tokens]
        if wrong:
            raise ValueError(
                f"{self.name} does not write {', '.join(wrong)} as one token after the question; take answers that "
                "are one token, such as digits, or let the template end where such an answer begins"
            )
        tokens = [token for several in found.values() for token in several]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"{self.name} writes different answers among {', '.join(self.scores)} as the same token")
        return list(found.values())

    def _fitted(self, prompt: str, completion: str) -> tuple[list[int], bool]:
        """Tokens of the question that fit, and whether the text had to lose its beginning for that."""
        ids = self._question(prompt, completion)
        if len(ids) <= self.reader.max_length:
            return ids, False
        texts = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
        lost = 0
        # Words cut in two may be tokenised anew into more tokens, so one cut may not be enough.
        while len(ids) > self.reader.max_length:
            lost += len(ids) - self.reader.max_length
            from_prompt = min(lost, len(texts[0]))
            kept = [texts[0][from_prompt:], texts[1][lost - from_prompt :]]
            ids = self._question(*(self._tokenizer.decode(part) for part in kept))
        return ids, True

    def _check_answers(self, outside: float) -> None:
        if outside <= self.max_outside_mass:
            self._answered = True
            return
        problem = (
            f"{self.name} puts {outside:.0%} of its next-token probability on no score ({', '.join(self.scores)}), "
            f"more than max_outside_mass = {self.max_outside_mass:g}"
        )
        if not self._answered:
            raise ValueError(f"{problem}: it does not answer the question; change the template or the scores")
        warnings.warn(problem, stacklevel=3)


def as_words(text: str | list[dict]) -> str:
    """A prompt or completion as the judge reads it: text as it is, one message its content, several a transcript."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


def _filled(template: str, **texts: str) -> str:
    """The template with its places filled in one pass, so that braces in a text are only braces."""
    return re.sub(r"\{(prompt|completion|answers)\}", lambda place: texts[place[1]], template)


def _check_template(template: str, chat: bool) -> None:
    missing = [place for place in ("{prompt}", "{completion}") if place not in template]
    if missing:
        raise ValueError(f"the template of a judgment has no place for {' and '.join(missing)}")
    if not chat and re.search(r"\{(prompt|completion|answers)\}\s*$", template):
        raise ValueError("without a chat template the template must end with words that ask for the score")


def _check_generative(config: Any, name: str) -> None:
    classifier = any("SequenceClassification" in architecture for architecture in config.architectures or ())
    if classifier or predicts_quantiles(config):
        raise ValueError(f"{name} is a reward model, not a language model that can be asked for a score")


def _ends(mask: Tensor) -> Tensor:
    """Columns in which some row has its last token, in order."""
    return (mask.sum(dim=-1) - 1).unique()
