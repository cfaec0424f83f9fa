"""Specs of risk measures: from a string such as `cvar:0.1` to the measure that it names, sums of measures included.

To add a measure, write one class in `rlhf/measures.py` or `rlhf/distortions.py` and enter it in `MEASURES`.
"""

import importlib
import math
import re
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from reward.distribution import RewardDistribution
from rlhf.distortions import CPW, Power, Spectral, Wang
from rlhf.measures import (
    LARGEST,
    Below,
    CVaR,
    Entropic,
    Expectile,
    Mean,
    MeanStd,
    MeanVariance,
    Quantile,
    RiskMeasure,
    RiskSpecError,
    Semideviation,
    text_of,
)


@final
class WeightedSum(RiskMeasure):
    """Several measures added up, Σ wᵢ ρᵢ(Z).

    With non-negative weights that sum to one it keeps every property that all its terms have. A negative weight gives
    up monotonicity and aversion; another sum of weights gives up translation and aversion.

    >>> parse_risk("0.5*mean+0.5*cvar:0.5")(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([-1.0, 3.0])))
    tensor(0.2500)
    """

    parameters = ()
    example = "0.5*mean+0.5*cvar:0.1"

    def __init__(self, terms: list[tuple[float, RiskMeasure]]):
        if not terms:
            raise RiskSpecError(_explain("a weighted sum needs at least one term"))
        for weight, measure in terms:
            if not 0 < abs(weight) <= LARGEST:
                problem = f"the weight of {measure.spec} must be finite, not zero and at most {LARGEST:g}"
                raise RiskSpecError(_explain(f"{problem}: {weight}"))
        self.terms = [(float(weight), measure) for weight, measure in terms]
        positive = all(weight > 0 for weight, _ in terms)
        sums_to_one = math.isclose(sum(weight for weight, _ in terms), 1.0, rel_tol=1e-6)
        measures = [measure for _, measure in terms]
        self.monotone = positive and all(measure.monotone for measure in measures)
        self.translation = sums_to_one and all(measure.translation for measure in measures)
        self.homogeneous = all(measure.homogeneous for measure in measures)
        self.averse = positive and sums_to_one and all(measure.averse for measure in measures)

    @property
    def spec(self) -> str:
        text = ""
        for weight, measure in self.terms:
            sign = "-" if weight < 0 else "+" if text else ""
            factor = "" if abs(weight) == 1 else f"{text_of(abs(weight))}*"
            text += f"{sign}{factor}{measure.spec}"
        return text

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        return torch.stack([weight * measure(distribution) for weight, measure in self.terms]).sum(dim=0)


@final
class PythonFunction(RiskMeasure):
    """A user's own function of the distribution, found by module and name.

    The function takes a `RewardDistribution` of batch shape (...) and returns a floating tensor (...), higher is
    better. Nothing is known about its properties, so none is declared.
    """

    parameters = ()
    example = "python:my_module:my_function"
    monotone = translation = homogeneous = averse = False

    def __init__(self, module: str, function: str):
        self.module, self.name = module, function
        self.function = _import_function(module, function)

    @property
    def spec(self) -> str:
        return f"python:{self.module}:{self.name}"

    def __call__(self, distribution: RewardDistribution) -> Tensor:
        utility = self.function(distribution)
        if not isinstance(utility, Tensor) or not utility.is_floating_point():
            got = utility.dtype if isinstance(utility, Tensor) else type(utility).__name__
            raise RiskSpecError(f"{self.spec} must return a floating-point tensor, one utility per law, got {got}")
        if utility.shape != distribution.batch_shape:
            raise RiskSpecError(
                f"{self.spec} must return one utility per law, shape {tuple(distribution.batch_shape)}, "
                f"got {tuple(utility.shape)}"
            )
        return utility


MEASURES: dict[str, type[RiskMeasure]] = {
    "mean": Mean,
    "quantile": Quantile,
    "cvar": CVaR,
    "mean_variance": MeanVariance,
    "mean_std": MeanStd,
    "semideviation": Semideviation,
    "entropic": Entropic,
    "expectile": Expectile,
    "below": Below,
    "wang": Wang,
    "power": Power,
    "cpw": CPW,
    "spectral": Spectral,
}

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SIGNED = rf"-?(?:{_NUMBER}|nan|inf)"
_ARGUMENT = rf"{_SIGNED}(?:[,@]{_SIGNED})*|[A-Za-z_][\w.]*:[A-Za-z_]\w*"
_TERM = re.compile(
    rf"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z_]+)(?::(?P<argument>{_ARGUMENT}))?\s*"
)


def parse_risk(spec: str) -> RiskMeasure:
    """The measure that a spec names, such as `cvar:0.1` or `0.5*mean+0.5*cvar:0.1`.

    Raises:
        RiskSpecError: unknown or malformed; the message lists every valid form with an example.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise RiskSpecError(_explain(f"a risk spec is a non-empty string, got {spec!r}"))
    terms: list[tuple[float, RiskMeasure]] = []
    position = 0
    while position < len(spec):
        term = _TERM.match(spec, position)
        if term is None or (terms and not term["sign"]):
            raise RiskSpecError(_explain(f"cannot read {spec[position:]!r} in the risk spec {spec!r}"))
        weight = float(term["weight"] or 1.0) * (-1.0 if term["sign"] == "-" else 1.0)
        terms.append((weight, _parse_measure(term["name"], term["argument"], spec)))
        position = term.end()
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    return WeightedSum(terms)


def _parse_measure(name: str, argument: str | None, spec: str) -> RiskMeasure:
    if name == "python":
        if argument is None or ":" not in argument:
            raise RiskSpecError(_explain(f"{spec!r} names no function; write python:MODULE:FUNCTION"))
        return PythonFunction(*argument.split(":"))
    if name not in MEASURES:
        raise RiskSpecError(_explain(f"unknown risk measure {name!r} in {spec!r}"))
    try:
        return MEASURES[name].read(name, argument)
    except RiskSpecError as error:
        raise RiskSpecError(_explain(f"cannot read {spec!r}: {error}")) from None


def _import_function(module: str, function: str) -> Callable[[RewardDistribution], Tensor]:
    try:
        found = getattr(importlib.import_module(module), function)
    # Whatever the module raises while it is imported, the user needs to know which spec asked for it.
    except Exception as error:
        raise RiskSpecError(
            f"cannot load python:{module}:{function} ({type(error).__name__}: {error}); the module must be importable "
            "from the folder of the script or through PYTHONPATH"
        ) from error
    if not callable(found):
        raise RiskSpecError(f"python:{module}:{function} is a {type(found).__name__}, not a function")
    return found


def _explain(problem: str) -> str:
    examples = [measure.example for measure in (*MEASURES.values(), WeightedSum, PythonFunction)]
    return f"{problem}. Valid risk specs, by example: {', '.join(examples)}"
