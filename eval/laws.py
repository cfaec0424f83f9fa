"""The rating laws that a reward model predicts for many texts: batches of like length, a progress bar, all ranks."""

from collections.abc import Sequence
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from eval.completions import read_pairs
from eval.records import Row
from reward.distribution import RewardDistribution


class PredictsLaws(Protocol):
    """What `RiskReward` is to this file."""

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        """(N, K) rating laws of N prompts and completions."""


def predicted_laws(
    reward: PredictsLaws, prompts: Sequence, completions: Sequence, *, chunk_size: int = 256, description: str = ""
) -> tuple[RewardDistribution, dict[str, float]]:
    """Predicted law of each prompt and completion, in the order given, the work shared by all ranks.

    Args:
        reward: A `RiskReward`, or anything with its method `distribution`.
        prompts: N texts or message lists; empty texts where a completion stands alone.
        completions: N completions in the same format.
        chunk_size: Texts per call of `distribution`, which batches them once more.
        description: Of the progress bar.

    Returns:
        (N, K) laws on the CPU, on every rank, and what the model says about its own work, averaged over texts, such
        as `crossing_rate` (neighbouring quantiles in the wrong order before the repair) and `truncated_share`.

    Raises:
        ValueError: There is no text, or a predicted quantile is NaN or infinite; a text is named.
    """
    if len(prompts) == 0:
        raise ValueError("there are no texts to predict ratings for.")
    state = PartialState()
    order = sorted(range(len(prompts)), key=lambda i: -_length(prompts[i]) - _length(completions[i]))
    chunks = [order[start : start + chunk_size] for start in range(0, len(order), chunk_size)]
    mine = chunks[state.process_index :: state.num_processes]
    results = []
    bar = tqdm(total=sum(map(len, mine)), desc=description, unit="text", disable=not state.is_local_main_process)
    with bar:
        for rows in mine:
            law = reward.distribution([prompts[i] for i in rows], [completions[i] for i in rows])
            telemetry = getattr(getattr(reward, "source", None), "telemetry", {})
            results.append((rows, law.levels.cpu(), law.values.float().cpu(), dict(telemetry)))
            bar.update(len(rows))
    results = gather_object(results)
    levels = results[0][1]
    values = torch.empty(len(prompts), len(levels))
    told: dict[str, float] = {}
    for rows, _, part, telemetry in results:
        values[rows] = part
        for name, value in telemetry.items():
            told[name] = told.get(name, 0.0) + value * len(rows) / len(prompts)
    broken = (~values.isfinite()).any(-1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the reward model predicts NaN or infinity for {len(broken)} of {len(prompts)} texts, for example "
            f"{str(completions[broken[0]])[:60]!r}; try --dtype float32."
        )
    return RewardDistribution(levels=levels, values=values), told


def candidate_laws(reward: PredictsLaws, groups: Sequence[Sequence[Row]]) -> RewardDistribution:
    """The predicted law of n completions of each of P prompts, batch shape (P, n); see `completions.candidates`.

    Raises:
        ValueError: As in `predicted_laws`.
    """
    prompts, completions = read_pairs([row for group in groups for row in group])
    laws, _ = predicted_laws(reward, prompts, completions, description="predict ratings")
    return RewardDistribution(laws.levels, laws.values.reshape(len(groups), len(groups[0]), -1))


def _length(text: str | list[dict]) -> int:
    return len(text) if isinstance(text, str) else sum(len(str(message["content"])) for message in text)
