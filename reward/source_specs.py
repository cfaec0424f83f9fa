"""Sources of reward distributions by name: what a string for a reward model may be."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward.combinations import AverageSource, MixtureSource
from reward.judgment import JudgmentSource
from reward.loading import load_config
from reward.sources import (
    DistributionSource,
    EnsembleSource,
    GaussianSource,
    QuantileModelSource,
    ScalarSource,
    predicts_quantiles,
)

EXAMPLES = (
    "runs/quickstart/qrm",
    "path-or-id?aggregation=mixture",
    "scalar:path-or-id",
    "ensemble:path-a,path-b?scale=1,0.5&offset=0,2",
    "gaussian:path-or-id?spread=log_variance",
    "judgment:path-or-id?scores=1,2,3,4,5",
    "judgment:path-or-id?scores=no:0,yes:1",
    "mixture:0.7*path-a+0.3*judgment:path-b",
    "average:0.5*path-a+0.5*path-b",
)
COMBINATIONS = {"mixture": MixtureSource, "average": AverageSource}


class SourceSpecError(ValueError):
    """A spec that names no source; the message lists the valid ones."""


@dataclass(frozen=True)
class SourceSpec:
    """What a string says about a source, before anything is loaded.

    Attributes:
        text: the string.
        kind: `model` for a plain path, else the word before the colon.
        paths: models of this source itself.
        options: behind the question mark, as arguments of the source.
        terms: weight and spec of each part of a mixture or an average.
    """

    text: str
    kind: str
    paths: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    terms: tuple[tuple[float, "SourceSpec"], ...] = ()

    def all_paths(self) -> list[str]:
        """Every model that the source asks."""
        return [*self.paths, *(path for _, part in self.terms for path in part.all_paths())]

    def predicts_one_number(self, trust_remote_code: bool = False) -> bool:
        """Whether it is a plain path to a model without a law. `scalar:` says that this is meant."""
        if self.kind != "model":
            return False
        return not predicts_quantiles(load_config(self.paths[0], trust_remote_code=trust_remote_code))


def parse_source(spec: str | SourceSpec, **reading: Any) -> DistributionSource:
    """The source that a spec names, loaded.

    Args:
        spec: path or hub id of a reward model, or one of the forms in `EXAMPLES`.
        reading: `tokenizer` (for one model only), `batch_size`, `max_length`, `dtype`, `trust_remote_code`.

    Raises:
        SourceSpecError: the spec is malformed, or names a folder that holds no model.
        ValueError: a model is not what the spec says.
    """
    spec = read_source_spec(spec) if isinstance(spec, str) else spec
    if reading.get("tokenizer") is not None and len(spec.all_paths()) > 1:
        raise ValueError(f"{spec.text} has several models, each read with its own tokenizer; leave tokenizer out")
    if spec.kind in COMBINATIONS:
        parts = [parse_source(part, **reading) for _, part in spec.terms]
        return COMBINATIONS[spec.kind](parts, [weight for weight, _ in spec.terms])
    if spec.kind == "ensemble":
        return EnsembleSource([ScalarSource(path, **reading) for path in spec.paths], **spec.options)
    if spec.predicts_one_number(reading.get("trust_remote_code", False)) and not spec.options:
        return ScalarSource(spec.paths[0], **reading)
    classes = {"model": QuantileModelSource, "scalar": ScalarSource}
    classes |= {"gaussian": GaussianSource, "judgment": JudgmentSource}
    return classes[spec.kind](spec.paths[0], **spec.options, **reading)


def read_source_spec(text: str) -> SourceSpec:
    """A spec in parts, after a check of its form and of the folders it names. Nothing is loaded.

    Raises:
        SourceSpecError: as for `parse_source`.
    """
    text = text.strip()
    if not text:
        raise SourceSpecError(_explain("a reward model is a non-empty string"))
    kind, colon, rest = text.partition(":")
    if not colon or _exists(text):
        kind, rest = "model", text
    elif kind not in OPTIONS or kind == "model":
        raise SourceSpecError(_explain(f"unknown kind of reward model {kind!r} in {text!r}"))
    if kind in COMBINATIONS:
        return SourceSpec(text, kind, terms=tuple(_terms(rest, text)))
    place, _, query = rest.partition("?")
    paths = tuple(path.strip() for path in (place.split(",") if kind == "ensemble" else [place]))
    if not all(paths):
        raise SourceSpecError(_explain(f"{text!r} leaves a path empty"))
    for path in paths:
        _check_path(path, text)
    return SourceSpec(text, kind, paths, _options(kind, query, text))


def _terms(rest: str, text: str) -> list[tuple[float, SourceSpec]]:
    """`0.7*A+0.3*B` as weights and specs; a + only separates where a weight and a * follow."""
    starts = list(re.finditer(r"(?:^|\+)\s*(\d+\.?\d*|\.\d+)\s*\*", rest))
    if not starts or starts[0].start() > 0:
        raise SourceSpecError(_explain(f"{text!r} needs a weight before each part, as in 0.7*path-a+0.3*path-b"))
    ends = [*(start.start() for start in starts[1:]), len(rest)]
    terms = []
    for start, end in zip(starts, ends, strict=True):
        part = rest[start.end() : end].strip()
        inner, _, _ = part.partition(":")
        if inner in COMBINATIONS:
            raise SourceSpecError(_explain(f"{text!r} has {inner} within another; multiply the weights out"))
        terms.append((float(start[1]), read_source_spec(part)))
    total = sum(weight for weight, _ in terms)
    if abs(total - 1) > 1e-5 or any(weight == 0 for weight, _ in terms):
        raise SourceSpecError(_explain(f"weights are above zero and sum to one; those in {text!r} sum to {total:g}"))
    return terms


def _numbers(value: str) -> list[float]:
    return [float(number) for number in value.split(",")]


def _scores(value: str) -> dict[str, float]:
    """`1,2,3` or `no:0,yes:1`."""
    pairs = [(answer.strip(), number or answer) for answer, _, number in (a.partition(":") for a in value.split(","))]
    return {answer: float(number) for answer, number in pairs}


OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "model": {"aggregation": str, "num_levels": int},
    "scalar": {},
    "ensemble": {"scale": _numbers, "offset": _numbers, "weights": _numbers, "num_levels": int},
    "gaussian": {"spread": str, "num_levels": int},
    "judgment": {"scores": _scores, "max_outside_mass": float, "num_levels": int},
    "mixture": {},
    "average": {},
}


def _options(kind: str, query: str, text: str) -> dict[str, Any]:
    options = {}
    for pair in query.split("&") if query else []:
        name, equals, value = pair.partition("=")
        if name not in OPTIONS[kind] or not equals:
            known = ", ".join(OPTIONS[kind]) or "none"
            raise SourceSpecError(_explain(f"unknown option {pair!r} in {text!r}; options of {kind}: {known}"))
        try:
            options[name] = OPTIONS[kind][name](value)
        except ValueError:
            raise SourceSpecError(_explain(f"cannot read {pair!r} in {text!r}")) from None
    return options


def _check_path(path: str, text: str) -> None:
    """Refuses a folder that cannot hold a model, before anything is loaded."""
    folder, within = Path(path), "" if path == text else f"{text}: "
    if _exists(path) and not (folder / "config.json").exists():
        raise SourceSpecError(f"{within}{path} holds no model (config.json is missing)")
    if not _exists(path) and (folder.is_absolute() or len(folder.parts) > 2 or path.startswith(".")):
        raise SourceSpecError(_explain(f"{within}{path} does not exist; give a folder with a model, or a hub id"))


def _exists(path: str) -> bool:
    """Whether a file or folder is there; what cannot even be a name is not."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def _explain(problem: str) -> str:
    return f"{problem}. Valid reward models, by example: {', '.join(EXAMPLES)}"
