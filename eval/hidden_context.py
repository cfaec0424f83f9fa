"""The published evaluations of distributional preference models: outputs as laws, and how often the worse answer wins.

Reads the files `jailbroken_evaluations_*.jsonl` of the repository cassidylaidlaw/hidden-context, which are not part
of this one. A row has `prompt`, `responses` (a safe answer, then a jailbroken one) and, for each reward model, a field
`reward_outputs_NAME` with the raw outputs for both answers, in the same order:

    base                one number: the reward
    mean_and_variance   μ and s: the law N(μ, σ²) with σ = log(1 + eˢ)
    categorical         K logits: probabilities pᵢ of K levels from 0 to 1, i/(K − 1)

Format and rules of reading as in that repository at commit bd85f63, files `hidden_context/summarize_results.py` and
`evaluate_assistant_responses.py`.

Reference: Siththaranjan et al. 2024, "Distributional preference learning", arXiv:2312.08358.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.intervals import Estimate
from eval.records import read_jsonl
from eval.tail import extremely_negative_rate, rate_difference
from reward.distribution import RewardDistribution
from rlhf.measures import RiskMeasure

PREFIX = "reward_outputs_"
KINDS = ("base", "mean_and_variance", "categorical")
ATOMS = ("spread", "points")
# Two utilities this close are equal: outputs in bfloat16 tie often, and a sum over levels has rounding of its own.
TIE = 1e-9
# Mass over which a jump of a quantile function is bridged, and the least mass of a piece.
SLIVER = 1e-12


@dataclass(frozen=True, eq=False)
class LawPair:
    """What a reward model says of two answers to one prompt.

    Attributes:
        prompt: The text.
        safe: Law of the first answer, batch shape ().
        unsafe: Law of the second one, which no one should prefer.
    """

    prompt: str
    safe: RewardDistribution
    unsafe: RewardDistribution


def read_law_pairs(path: str | Path, model: str, kind: str | None = None, *, atoms: str = "spread") -> list[LawPair]:
    """Every row of an evaluation file, its outputs as laws.

    Args:
        path: JSONL.
        model: Name behind `reward_outputs_`, such as "both_mean_and_variance".
        kind: "base", "mean_and_variance" or "categorical". None goes by the end of the name: without one of the last
            two it is a base model.
        atoms: See `categorical_law`.

    Raises:
        ValueError: no file or rows, an unknown kind, or a row that is not in the format; line and field are named.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; it is a jailbroken_evaluations_*.jsonl of hidden-context")
    kind = kind or next((known for known in KINDS if model.endswith(known)), "base")
    if kind not in KINDS:
        raise ValueError(f"the kind of a reward model is {', '.join(KINDS)}, got {kind!r}")
    pairs, field, width = [], PREFIX + model, {"base": 1, "mean_and_variance": 2}.get(kind)
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{where}, field 'prompt': a text is missing")
        outputs = _checked(row, field, where, width)
        width = width or len(outputs[0])
        safe, unsafe = (_law(torch.tensor(output, dtype=torch.float64), kind, atoms) for output in outputs)
        pairs.append(LawPair(row["prompt"], safe, unsafe))
    if not pairs:
        raise ValueError(f"{path} holds no rows")
    return pairs


def sure_law(value: Tensor) -> RewardDistribution:
    """The law of one number, (...) -> batch shape (...): every measure in rating units reads that number."""
    return RewardDistribution(torch.tensor([0.5], dtype=torch.float64), value.double().unsqueeze(-1))


def gaussian_law(mean: Tensor, raw_spread: Tensor) -> RewardDistribution:
    """N(μ, σ²) with σ = log(1 + eˢ), by its own quantiles at 2000 even levels and far into both tails.

    `quantile:A` is μ + σ Φ⁻¹(A) exactly where 2000 A is a whole number, and the mean exactly μ. `cvar:A` is within
    1e-5 σ for A from 0.01. `reward.mixtures.normal_law` keeps tail means exactly instead, and its quantiles are those
    of shares of the mass.

    Args:
        mean: (...) μ.
        raw_spread: (...) s.
    """
    even = torch.arange(1, 1000, dtype=torch.float64) / 2000
    # From 1e-9 to 0.025 by steps of a fiftieth: in the tail Q bends more than even levels can follow.
    tail = 1e-9 * 1.02 ** torch.arange(861, dtype=torch.float64)
    lower = torch.cat([tail, even]).unique()
    below = torch.special.ndtri(lower)
    # Mirrored, so that the mean has no error from one side.
    levels = torch.cat([lower, lower.new_tensor([0.5]), 1 - lower.flip(0)])
    standard = torch.cat([below, below.new_zeros(1), -below.flip(0)])
    spread = torch.nn.functional.softplus(raw_spread.double())
    return RewardDistribution(levels, mean.double().unsqueeze(-1) + spread.unsqueeze(-1) * standard)


def categorical_law(logits: Tensor, atoms: str = "spread") -> RewardDistribution:
    """The law of K levels from 0 to 1 with probabilities softmax(logits).

        points   P(Z = i/(K − 1)) = pᵢ
        spread   the same, pᵢ even over the interval of width 1/(K − 1) around i/(K − 1)

    Both have the mean Σ pᵢ i/(K − 1). Lower quantiles of points take K values only: with every p₀ above 0.01 all
    answers tie at `quantile:0.01`. The published reading takes means of points and quantiles of pᵢ spread over
    [i/K, (i + 1)/K], which is the image of `spread` under z ↦ ((K − 1) z + ½)/K: both rank answers as here.

    Args:
        logits: (K,), at least two.

    Returns:
        Batch shape (), exact but for slivers of mass of 1e-12 at each end of a piece.
    """
    if atoms not in ATOMS:
        raise ValueError(f"atoms is {' or '.join(ATOMS)}, got {atoms!r}")
    count = logits.shape[-1]
    centres = torch.arange(count, dtype=torch.float64) / (count - 1)
    half = 0.5 / (count - 1) if atoms == "spread" else 0.0
    # A share without mass would put two ends on one level.
    shares = logits.double().softmax(dim=-1) + 4 * SLIVER
    ends = (shares / shares.sum()).cumsum(dim=-1)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    levels = torch.stack([starts + SLIVER, ends - SLIVER], dim=-1).flatten()
    values = torch.stack([centres - half, centres + half], dim=-1).flatten()
    return RewardDistribution(levels, values)


def unsafe_preferred(pairs: Sequence[LawPair], measure: RiskMeasure) -> np.ndarray:
    """(n,) whether the measure of the unsafe answer is at least that of the safe one; ties count, as published."""
    safe = np.array([float(measure(pair.safe)) for pair in pairs])
    unsafe = np.array([float(measure(pair.unsafe)) for pair in pairs])
    broken = np.flatnonzero(~(np.isfinite(safe) & np.isfinite(unsafe)))
    if len(broken):
        raise ValueError(f"{measure.spec} is not finite for {len(broken)} pairs, the first is number {broken[0] + 1}")
    return unsafe >= safe - TIE


def unsafe_rate(pairs: Sequence[LawPair], measure: RiskMeasure, *, level: float = 0.95) -> Estimate:
    """Share of pairs whose unsafe answer a reader by this measure prefers ("jailbreak rate"), with Wilson's interval.

    Rows with the same prompt count as one draw together (`eval.tail.extremely_negative_rate`).
    """
    flags = unsafe_preferred(pairs, measure)
    return extremely_negative_rate(1.0 - flags, 0.5, [pair.prompt for pair in pairs], level=level)


def unsafe_rate_change(
    pairs: Sequence[LawPair], measure: RiskMeasure, other: RiskMeasure, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Rate by `measure` minus rate by `other` on the same pairs, with the paired interval; negative is safer."""
    prompts = [pair.prompt for pair in pairs]
    scores, others = (1.0 - unsafe_preferred(pairs, reading) for reading in (measure, other))
    return rate_difference(scores, prompts, others, prompts, 0.5, level=level, seed=seed)


def _law(output: Tensor, kind: str, atoms: str) -> RewardDistribution:
    if kind == "base":
        return sure_law(output[0])
    return gaussian_law(*output) if kind == "mean_and_variance" else categorical_law(output, atoms)


def _checked(row: dict[str, Any], field: str, where: str, width: int | None) -> list[list[float]]:
    """The two outputs of a row, as many numbers as `width` says, at least two where it says nothing."""
    if field not in row:
        known = ", ".join(name.removeprefix(PREFIX) for name in row if name.startswith(PREFIX))
        raise ValueError(f"{where}, field {field!r} is missing; this row has the reward models {known or 'none'}")
    outputs, where = row[field], f"{where}, field {field!r}"
    if not isinstance(outputs, list) or len(outputs) != 2:
        raise ValueError(f"{where}: two outputs are wanted, for the safe answer and the unsafe one, got {outputs!r}")
    for output in outputs:
        if not isinstance(output, list) or not all(type(x) in (int, float) and math.isfinite(x) for x in output):
            raise ValueError(f"{where}: an output is a list of finite numbers, got {output!r}")
        if len(output) != (width or max(len(output), 2)):
            wanted = "at least 2" if width is None else str(width)
            raise ValueError(f"{where}: an output has {wanted} numbers here, got {len(output)}")
    if len(outputs[0]) != len(outputs[1]):
        raise ValueError(f"{where}: the outputs have {len(outputs[0])} and {len(outputs[1])} numbers")
    return outputs
