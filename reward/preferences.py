"""Preference pairs in TRL's format: reading, checking, and tokens with the place at which a gate reads the prompt.

A preference dataset is a `datasets.Dataset` with the columns `prompt` (text, empty where it is only implied), `chosen`
and `rejected` (whole texts, the prompt included, as the reward model reads them), `margin` (by how much the chosen
score should lead, 0 where none is given) and `conversation` (whether a chat template rendered them).
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt, is_conversational

from reward.data import (
    RatingCollator,
    normalise_text,
    pad_ratings,
    render_conversation,
    split_of,
    tokenize_texts,
)
from reward.tables import is_messages, read_dataset, select_split

FEATURES = Features(
    {
        "prompt": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
        "margin": Value("float32"),
        "conversation": Value("bool"),
    }
)
EQUAL_PAIRS = (
    "{count} pairs have equal chosen and rejected {what}, such as rows {rows}: nothing is preferred there. Remove "
    "them, or drop them with --drop_equal_pairs true."
)


def preference_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """One row of a preference dataset from a row in TRL's preference format.

    Args:
        row: `chosen` and `rejected`, both text or both lists of messages. With `prompt` they are the answers; without,
            whole texts or conversations that begin alike. `margin` is optional.
        tokenizer: Renders conversations with its chat template; the reward model's.

    Raises:
        ValueError: A column is missing, a side is empty, the sides differ in kind, or there is no prompt in common.
    """
    for side in ("chosen", "rejected"):
        if side not in row:
            raise ValueError(f"there is no column {side!r}; TRL's preference format needs chosen and rejected.")
        if isinstance(row[side], dict) or not isinstance(row[side], str | list | None):
            raise ValueError(f"{side} is neither text nor a list of messages with role and content.")
        if not row[side] or not _says_something(row[side]):
            raise ValueError(f"{side} is empty.")
        if not isinstance(row[side], str) and not is_messages(row[side]):
            raise ValueError(f"{side} is neither text nor a list of messages with role and content.")
    margin = row.get("margin")
    if margin is not None and not (isinstance(margin, int | float) and math.isfinite(margin)):
        raise ValueError(f"margin must be a finite number, got {margin!r}.")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    kinds = [is_conversational({"chosen": side}) for side in (chosen, rejected)]
    if kinds[0] != kinds[1]:
        raise ValueError("one of chosen and rejected is text, the other a list of messages.")
    if not kinds[0]:
        if not isinstance(chosen, str) or not isinstance(rejected, str) or not isinstance(prompt or "", str):
            raise ValueError("prompt, chosen and rejected must all be text, or all be lists of messages.")
        texts = {"prompt": prompt or "", "chosen": (prompt or "") + chosen, "rejected": (prompt or "") + rejected}
    else:
        # Some sets carry the prompt as text beside conversations that hold it: these imply it.
        if not prompt or isinstance(prompt, str):
            parts = extract_prompt({"chosen": chosen, "rejected": rejected})
            prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
        if not prompt:
            raise ValueError("chosen and rejected have no first message in common, so there is no prompt.")
        texts = {
            "prompt": render_conversation(prompt, tokenizer),
            "chosen": render_conversation(prompt + chosen, tokenizer),
            "rejected": render_conversation(prompt + rejected, tokenizer),
        }
    return texts | {"margin": 0.0 if margin is None else float(margin), "conversation": kinds[0]}


def _says_something(side: str | list) -> bool:
    if isinstance(side, str):
        return bool(side.strip())
    last = side[-1]
    return not isinstance(last, dict) or bool(str(last.get("content") or last.get("tool_calls") or "").strip())


def preference_dataset(rows: Iterable[dict[str, Any]], *, drop_equal_pairs: bool = False) -> Dataset:
    """A preference dataset from rows made by `preference_row`.

    Raises:
        ValueError: There is no row, or pairs have equal sides and are not to be dropped.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("the preference dataset is empty.")
    kept = _without_equal(rows, [row["chosen"] == row["rejected"] for row in rows], "texts", drop_equal_pairs)
    if len({rows[index]["conversation"] for index in kept}) > 1:
        raise ValueError("some pairs are conversations and some are text; train on one kind at a time.")
    return Dataset.from_list([rows[index] for index in kept], features=FEATURES)


def load_preferences(
    path_or_id: str | Path,
    *,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    drop_equal_pairs: bool = False,
) -> Dataset:
    """A preference dataset from a folder, a file or the hub, checked and rendered.

    Args:
        path_or_id: A folder written by `save_to_disk`, a `.jsonl`, `.json`, `.csv` or `.parquet` file, or a hub id, in
            TRL's preference format.
        split: As in `load_ratings`.
        tokenizer: Renders conversations with its chat template; the reward model's.
        drop_equal_pairs: Leave out pairs whose two sides are equal, instead of refusing them.

    Raises:
        ValueError: A column or the split is missing, or a row is no valid pair (its index is named).
        FileNotFoundError: A path that looks local does not exist.
    """
    dataset, split = read_dataset(path_or_id, split)
    missing = [name for name in ("chosen", "rejected") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"{path_or_id} has no column {missing}; it has {dataset.column_names}: no preference format.")
    dataset = select_split(dataset, split, path_or_id)
    rows = []
    for index, row in enumerate(dataset):
        try:
            rows.append(preference_row(row, tokenizer))
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {index} of {path_or_id}: {error}") from None
    return preference_dataset(rows, drop_equal_pairs=drop_equal_pairs)


def split_pairs(pairs: Dataset, shares: dict[str, float]) -> dict[str, Dataset]:
    """Parts of a preference dataset, by the hash of the prompt: pairs of one prompt stay together.

    Args:
        pairs: A preference dataset.
        shares: Name and share of each part.

    Raises:
        ValueError: A part with a positive share got no pair.
    """
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for index, (prompt, chosen, rejected) in enumerate(
        zip(pairs["prompt"][:], pairs["chosen"][:], pairs["rejected"][:], strict=True)
    ):
        # Without a prompt, the two texts in either order are the pair's name.
        key = prompt or hashlib.sha256("\n".join(sorted(map(normalise_text, (chosen, rejected)))).encode()).hexdigest()
        parts[split_of(key, shares)].append(index)
    empty = [name for name, rows in parts.items() if shares[name] > 0 and not rows]
    if empty:
        raise ValueError(f"{len(pairs)} pairs are too few to be split into {shares}: {empty} got none.")
    return {name: pairs.select(rows) for name, rows in parts.items()}


@dataclass(frozen=True)
class TokenizedPairs:
    """Pairs as tokens, and what it took.

    Args:
        rows: Columns `chosen_ids`, `rejected_ids`, `chosen_gate`, `rejected_gate` (column of the token that closes the
            prompt, −1 where it was cut off or there is none), `margin`, `length` (of the longer side).
        truncated: Texts, of 2N, that were longer than allowed and lost their beginning.
        without_prompt: Pairs with a side whose prompt is gone.
        equal: Pairs dropped because truncation or unknown tokens made their sides equal.
    """

    rows: Dataset
    truncated: int
    without_prompt: int
    equal: int


def tokenize_preferences(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    marker: Sequence[int] | None = None,
    drop_equal_pairs: bool = False,
) -> TokenizedPairs:
    """Tokens of both sides of each pair, cut on the left, and where the prompt ends in them.

    With a marker, the gate's column is the first token of its last occurrence: the one that closes the last user
    turn. Without, it is the last token that the prompt alone and the whole text have in common, so that a token which
    runs across the border belongs to the answer.

    Args:
        pairs: A preference dataset.
        tokenizer: The reward model's.
        max_length: Most tokens of a side.
        marker: From `answer_marker`, for conversations.
        drop_equal_pairs: As in `load_preferences`, for sides that are equal as tokens.

    Raises:
        ValueError: Sides are equal as tokens, or an uncut text has no marker.
    """
    columns, truncated = {}, 0
    for side in ("chosen", "rejected"):
        columns[f"{side}_ids"], cut = tokenize_texts(pairs[side][:], tokenizer, max_length)
        truncated += cut
    equal = [c == r for c, r in zip(columns["chosen_ids"], columns["rejected_ids"], strict=True)]
    kept = _without_equal(equal, equal, "tokens", drop_equal_pairs)
    for side in ("chosen", "rejected"):
        columns[f"{side}_gate"] = _gate_columns(pairs, side, columns[f"{side}_ids"], tokenizer, marker)
    lost = sum(columns["chosen_gate"][index] < 0 or columns["rejected_gate"][index] < 0 for index in kept)
    columns["margin"] = pairs["margin"][:]
    columns["length"] = [
        max(len(c), len(r)) for c, r in zip(columns["chosen_ids"], columns["rejected_ids"], strict=True)
    ]
    rows = Dataset.from_dict(columns).select(kept)
    return TokenizedPairs(rows, truncated, without_prompt=lost, equal=len(pairs) - len(kept))


def _without_equal(rows: Sequence[Any], equal: Sequence[bool], what: str, drop: bool) -> list[int]:
    """Indices of the pairs that differ; an error names some of the others, unless they may be dropped."""
    bad = [index for index, same in enumerate(equal) if same]
    if bad and not drop:
        raise ValueError(EQUAL_PAIRS.format(count=len(bad), what=what, rows=bad[:5]))
    if len(bad) == len(rows):
        raise ValueError(f"all {len(bad)} pairs have equal chosen and rejected {what}; nothing is left.")
    return [index for index, same in enumerate(equal) if not same]


def _gate_columns(
    pairs: Dataset,
    side: str,
    cut_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    marker: Sequence[int] | None,
) -> list[int]:
    whole_ids = tokenizer(pairs[side][:], return_attention_mask=False, verbose=False)["input_ids"]
    if marker is not None:
        columns = [last_occurrence(ids, marker) for ids in cut_ids]
        for index, column in enumerate(columns):
            if column < 0 and len(cut_ids[index]) == len(whole_ids[index]):
                raise ValueError(
                    f"{side} of pair {index} does not contain the tokens {list(marker)} that stand between the last "
                    "user turn and the answer, although nothing was cut; does its last turn belong to the assistant?"
                )
        return columns
    other = "rejected" if side == "chosen" else "chosen"
    references = [p or o for p, o in zip(pairs["prompt"][:], pairs[other][:], strict=True)]
    reference_ids = tokenizer(references, return_attention_mask=False, verbose=False)["input_ids"]
    columns = []
    for whole, cut, reference in zip(whole_ids, cut_ids, reference_ids, strict=True):
        shared = 0
        while shared < min(len(whole), len(reference)) and whole[shared] == reference[shared]:
            shared += 1
        removed = len(whole) - len(cut)
        # A special token at the front survives a cut; it is no part of the prompt.
        front = int(bool(cut) and cut[0] in tokenizer.all_special_ids)
        columns.append(shared - 1 - removed if shared - 1 - removed >= front else -1)
    return columns


def last_occurrence(ids: Sequence[int], marker: Sequence[int]) -> int:
    """Index of the first token of the last `marker` in `ids`, −1 if there is none."""
    size, marker, ids = len(marker), list(marker), list(ids)
    starts = range(len(ids) - size, -1, -1)
    return next((at for at in starts if ids[at] == marker[0] and ids[at : at + size] == marker), -1)


def answer_marker(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that a chat template puts between the last user turn and any answer; the first closes the turn.

    They are read off the template: what it writes after a user's words both when an answer follows and when one is
    asked for. White space at the end is left out, because it may share a token with the answer.

    Raises:
        ValueError: There is no chat template, or it writes nothing between the two.
    """
    question, answer = "QUESTION", "ANSWER"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = render_conversation(turns, tokenizer)
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    between, waiting = whole.split(question)[-1].split(answer)[0], asked.split(question)[-1]
    shared = 0
    while shared < min(len(between), len(waiting)) and between[shared] == waiting[shared]:
        shared += 1
    ids = tokenizer(between[:shared].rstrip(), add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the chat template puts nothing between a user turn and an answer, so a gate has no place.")
    return ids


class PairCollator(RatingCollator):
    """Rows with rated texts, preference pairs or both -> one padded batch, so that a step is one forward pass.

    `input_ids` and `attention_mask` (B·r + 2·B·p, L) hold the rated texts of the B rows, then the chosen, then the
    rejected sides; `labels` (same rows, ...) their ratings, NaN for pairs; `margins` (B,) those of the pairs. Every
    rank runs the same number of forward passes whatever its rows are, as sharded weights need.

    Args:
        tokenizer: The reward model's tokenizer; it needs a pad token.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad the token ids on the tokenizer's side and the ratings with NaN."""
        texts = [row[name] for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows[0] for row in rows]
        batch = dict(self.tokenizer.pad({"input_ids": texts}, return_tensors="pt"))
        if "ratings" in rows[0]:
            ratings = pad_ratings([row["ratings"] for row in rows])
            absent = torch.full((len(texts) - len(rows), *ratings.shape[1:]), torch.nan)
            batch["labels"] = torch.cat([ratings, absent])
        if "chosen_ids" in rows[0]:
            batch["margins"] = torch.tensor([row["margin"] for row in rows])
        return batch


def side_by_side(ratings: Dataset, pairs: Dataset) -> Dataset:
    """One rated text and one pair in every row, for steps that learn from both.

    The shorter of the two is gone through again until the longer one ends, so an epoch is a pass over the longer.

    Args:
        ratings: Columns `input_ids`, `ratings`, `length`.
        pairs: Columns `chosen_ids`, `rejected_ids`, `margin`, `length`.
    """
    count = max(len(ratings), len(pairs))
    texts = ratings.select([index % len(ratings) for index in range(count)])
    answers = pairs.select([index % len(pairs) for index in range(count)])
    length = [max(pair) for pair in zip(texts["length"][:], answers["length"][:], strict=True)]
    columns = {name: texts[name][:] for name in ("input_ids", "ratings")}
    columns |= {name: answers[name][:] for name in ("chosen_ids", "rejected_ids", "margin")}
    return Dataset.from_dict(columns | {"length": length})
