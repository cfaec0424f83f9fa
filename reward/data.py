"""Human ratings as a dataset: one row per text, and every individual rating kept.

A rating dataset is a `datasets.Dataset` with the columns `text`, `source`, `ratings` (list of floats, one per rater),
`mean`, `std` (of those ratings, divided by their number) and `split`. Quantile regression learns from `ratings`; the
two summaries are there to read and to evaluate.

Where texts are rated for several attributes, a column `attributes` holds their A names in every row, `ratings` holds A
lists (empty where a text was not rated for an attribute), and `mean` and `std` A numbers, NaN for an empty list. The
names stand in the rows because nothing else survives selecting, concatenating and every file format.
"""

import bisect
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward.tables import read_dataset, select_split

LARGEST_RATING = torch.finfo(torch.float32).max
# Published and fixed. A text keeps its split in every version of the data, so a model trained on one release is never
# judged on texts that it saw in another.
SPLITS: dict[str, float] = {"reward": 0.40, "judge": 0.35, "rl_prompts": 0.10, "evaluation": 0.15}

FEATURES = Features(
    {
        "text": Value("string"),
        "source": Value("string"),
        "ratings": List(Value("float32")),
        "mean": Value("float32"),
        "std": Value("float32"),
        "split": Value("string"),
    }
)
ATTRIBUTE_FEATURES = Features(
    {
        **FEATURES,
        "ratings": List(List(Value("float32"))),
        "mean": List(Value("float32")),
        "std": List(Value("float32")),
        "attributes": List(Value("string")),
    }
)


def normalise_text(text: str) -> str:
    """The text with case folded and every run of whitespace as one space: equal here means "the same text"."""
    return " ".join(text.casefold().split())


def split_of(text: str, splits: dict[str, float] = SPLITS) -> str:
    """The split that a text belongs to, from the sha256 of its normalised form alone.

    Neither the order of the rows, nor the other rows, nor a seed has a say, so equal texts always share a split.

    Args:
        text: Any text.
        splits: Share of each split, in order; the shares sum to one.
    """
    if not math.isclose(sum(splits.values()), 1.0, abs_tol=1e-9):
        raise ValueError(f"split shares must sum to 1, got {splits}, which sums to {sum(splits.values())}.")
    digest = hashlib.sha256(normalise_text(text).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    upper = 0.0
    for name, share in splits.items():
        upper += share
        if position < upper:
            return name
    return name  # Only when rounding leaves the sum of the shares a hair below one.


def rating_row(
    text: str,
    ratings: Sequence[float] | float | Mapping[str, Sequence[float] | float | None],
    source: str = "",
    split: str | None = None,
) -> dict[str, Any]:
    """One row of a rating dataset.

    Args:
        text: What the raters read.
        ratings: One number per rater; a single number counts as one rater. With several attributes, a mapping from
            their names to the same, and None, NaN or an empty list for an attribute that was not rated.
        source: Where the text comes from; calibration is reported per source.
        split: Name of the split. By default `split_of(text)`.

    Raises:
        ValueError: The text is empty, there is no rating, or a rating is not a finite number.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a rated text must be a non-empty string, got {text!r}.")
    row = {"text": text, "source": source, "split": split_of(text) if split is None else split}
    if isinstance(ratings, Mapping):
        for name in ratings:
            if not isinstance(name, str) or not name:
                raise ValueError(f"attribute names must be non-empty strings, got {name!r} for {text[:60]!r}.")
        values = [_values(text, value, name) for name, value in ratings.items()]
        if not any(values):
            raise ValueError(f"the text {text[:60]!r} has no rating for any of {list(ratings)}; drop the row.")
        mean, std = map(list, zip(*map(_mean_and_std, values), strict=True))
        return row | {"ratings": values, "mean": mean, "std": std, "attributes": list(ratings)}
    values = _values(text, ratings)
    if not values:
        raise ValueError(f"no ratings for the text {text[:60]!r}; drop the row or supply at least one rating.")
    mean, std = _mean_and_std(values)
    return row | {"ratings": values, "mean": mean, "std": std}


def _values(text: str, ratings: Any, attribute: str | None = None) -> list[float]:
    """The ratings as finite floats; of an attribute they may be missing altogether, as None, NaN or an empty list."""
    if attribute is not None and (ratings is None or (isinstance(ratings, float) and math.isnan(ratings))):
        return []
    values = list(ratings) if isinstance(ratings, (Sequence, Tensor)) and not isinstance(ratings, str) else [ratings]
    for value in values:
        # Compared, not converted: a whole number may be too long for any float.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_RATING:
            of = "" if attribute is None else f" of {attribute!r}"
            raise ValueError(f"ratings{of} must be finite numbers, got {value!r} for the text {text[:60]!r}.")
    return [float(value) for value in values]


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def rating_dataset(rows: Iterable[dict[str, Any]]) -> Dataset:
    """A rating dataset from rows made by `rating_row`.

    Raises:
        ValueError: There is no row, the rows do not have the same attributes, or every rating of an attribute is the
            same number, or missing.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("the rating dataset is empty.")
    names = rows[0].get("attributes")
    if names is None and not any("attributes" in row for row in rows):
        _check_variation([row["ratings"] for row in rows])
        return Dataset.from_list(rows, features=FEATURES)
    rows = [_with_attributes(row, names or [], index) for index, row in enumerate(rows)]
    for place, name in enumerate(names):
        _check_variation([row["ratings"][place] for row in rows], name)
    return Dataset.from_list(rows, features=ATTRIBUTE_FEATURES)


def _check_variation(ratings: Sequence[Sequence[float]], attribute: str | None = None) -> None:
    values = {value for row in ratings for value in row}
    of = "" if attribute is None else f" of attribute {attribute!r}"
    if not values:
        raise ValueError(f"there is no rating{of} at all. Is this the right column?")
    if len(values) == 1:
        raise ValueError(
            f"every rating{of} equals {values.pop()}: there is nothing to learn. Is this the right column?"
        )


def _with_attributes(row: dict[str, Any], names: list[str], index: int) -> dict[str, Any]:
    """The row with its attributes in the order of `names`."""
    own = row.get("attributes", [])
    if own == names:
        return row
    if set(own) != set(names):
        missing, unknown = sorted(set(names) - set(own)), sorted(set(own) - set(names))
        raise ValueError(
            f"row {index} lacks the attributes {missing} and has {unknown} beyond those of the first row, {names}: "
            "name the same attributes in every row, and give None where one was not rated."
        )
    order = [own.index(name) for name in names]
    return row | {"attributes": names} | {key: [row[key][i] for i in order] for key in ("ratings", "mean", "std")}


def attribute_names(ratings: Dataset) -> list[str]:
    """Names of the rated attributes, in the order of the lists in `ratings`; ["rating"] where there is only one."""
    return list(ratings[0]["attributes"]) if "attributes" in ratings.column_names else ["rating"]


def load_ratings(
    path_or_id: str | Path,
    *,
    split: str | None = None,
    text_column: str = "text",
    ratings_column: str | Sequence[str] = "ratings",
    attribute_names: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """A rating dataset from a folder, a file or the hub, checked and in the standard columns.

    Args:
        path_or_id: A folder written by `save_to_disk`, a `.jsonl`, `.json`, `.csv` or `.parquet` file, or a hub id.
        split: Keep only this split: a value of the column `split` where there is one, otherwise a split of the hub
            dataset or of the saved `DatasetDict`. "reward+judge" keeps both of two values of the column; None keeps
            all rows.
        text_column: Column with the rated text, or with a conversation as a list of messages.
        ratings_column: Column with a list of numbers per text, or one number per text, or a mapping from attributes
            to either. With several columns, each is an attribute.
        attribute_names: Names of the attributes, where they shall differ from those of the columns.
        tokenizer: Renders conversations with its chat template; the reward model's.

    Raises:
        ValueError: A column or the split is missing, or a row is no valid rating row (its index is named).
        FileNotFoundError: A path that looks local does not exist.
    """
    columns = [ratings_column] if isinstance(ratings_column, str) else list(ratings_column)
    names = _named(columns, attribute_names)
    dataset, split = read_dataset(path_or_id, split)
    for column in (text_column, *columns):
        if column not in dataset.column_names:
            raise ValueError(
                f"{path_or_id} has no column {column!r}; it has {dataset.column_names}. "
                "Name the columns with text_column and ratings_column."
            )
    dataset = select_split(dataset, split, path_or_id)
    rows = []
    for index, row in enumerate(dataset):
        try:
            text = row[text_column]
            if isinstance(text, list):
                text = render_conversation(text, tokenizer)
            ratings = row[columns[0]] if len(columns) == 1 else {n: row[c] for n, c in names.items()}
            if "attributes" in row and columns == ["ratings"]:
                ratings = _by_attribute(row["attributes"], ratings)
            rows.append(rating_row(text, ratings, row.get("source") or "", row.get("split") or None))
        except ValueError as error:
            raise ValueError(f"row {index} of {path_or_id}: {error}") from None
    return rating_dataset(rows)


def _by_attribute(names: Any, ratings: Any) -> dict[str, Any]:
    """Ratings of one row under the names that stand beside them."""
    if not isinstance(names, list) or not isinstance(ratings, list) or len(names) != len(ratings):
        raise ValueError(f"attributes {names!r} and ratings {ratings!r} must be lists of one length.")
    return dict(zip(names, ratings, strict=True))


def _named(columns: list[str], names: Sequence[str] | None) -> dict[str, str]:
    """Attribute -> column, checked before anything is read."""
    names = list(columns if names is None else names)
    repeated = sorted({name for given in (columns, names) for name in given if given.count(name) > 1})
    if repeated:
        raise ValueError(f"the attributes {repeated} are named more than once; each needs a name of its own.")
    if len(names) != len(columns):
        raise ValueError(
            f"attribute_names has {len(names)} names for {len(columns)} rating columns: {names} for {columns}. "
            "Name as many attributes as columns, in their order."
        )
    return dict(zip(names, columns, strict=True))


def render_conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation as text under the chat template, such that tokenizing it gives the template's ids.

    Raises:
        ValueError: There is no chat template.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("the rated texts are conversations, but the reward model's tokenizer has no chat template.")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    # Templates write the first special token out; a tokenizer that adds it as well would double it.
    if tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return text


def pad_ratings(ratings: Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]) -> Tensor:
    """Ratings of texts with different numbers of raters as one tensor, absent raters as NaN.

    Returns:
        (B, M), or (B, A, M) where every text has A lists, of which some may be empty.

    Raises:
        ValueError: A text has no rating.
    """
    if len(ratings) and any(isinstance(part, (list, tuple)) for part in ratings[0]):
        if len({len(row) for row in ratings}) > 1:
            raise ValueError(
                f"every text needs a list per attribute, got {sorted({len(row) for row in ratings})} lists."
            )
        flat = [part for row in ratings for part in row]
        padded = _padded(flat).view(len(ratings), len(ratings[0]), -1)
    else:
        padded = _padded(ratings)
    if padded.isnan().flatten(1).all(dim=-1).any():
        raise ValueError("every text needs at least one rating; an empty list would give it a loss of NaN.")
    return padded


def _padded(ratings: Sequence[Sequence[float]]) -> Tensor:
    padded = torch.full((len(ratings), max((len(row) for row in ratings), default=0) or 1), math.nan)
    for index, row in enumerate(ratings):
        padded[index, : len(row)] = torch.as_tensor(row, dtype=padded.dtype)
    return padded


class RatingCollator:
    """Tokenised rows and their ratings -> one padded batch for the reward model.

    `input_ids` and `attention_mask` are (B, L); `labels` (B, M), or (B, A, M) with several attributes.

    Args:
        tokenizer: The reward model's tokenizer; it needs a pad token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set one (it must differ from the EOS token).")
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad the token ids on the tokenizer's side and the ratings with NaN."""
        batch = dict(self.tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt"))
        if "ratings" in rows[0]:
            batch["labels"] = pad_ratings([row["ratings"] for row in rows])
        return batch


def tokenize_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, *, truncation_side: str = "left"
) -> tuple[list[list[int]], int]:
    """Token ids of each text, special tokens included where the tokenizer adds them, and how many texts were cut.

    Args:
        texts: N texts.
        tokenizer: The reward model's tokenizer.
        max_length: Most tokens of a text.
        truncation_side: What a longer text loses: `left`, its beginning, so that the answer at its end stays whole,
            or `right`, its end.

    Raises:
        ValueError: The side is neither.
    """
    if truncation_side not in ("left", "right"):
        raise ValueError(f"truncation_side is left or right, got {truncation_side!r}.")
    whole = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    long = [index for index, ids in enumerate(whole) if len(ids) > max_length]
    if long:
        side, tokenizer.truncation_side = tokenizer.truncation_side, truncation_side
        try:
            cut = tokenizer(
                [texts[index] for index in long], truncation=True, max_length=max_length, return_attention_mask=False
            )
        finally:
            tokenizer.truncation_side = side
        for index, ids in zip(long, cut["input_ids"], strict=True):
            whole[index] = ids
    return whole, len(long)


def opening_prompts(
    ratings: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int, min_tokens: int
) -> Dataset:
    """The first words of rated texts, as prompts that a policy continues.

    A prompt is exactly `num_tokens` policy tokens long, and a space follows it in the text, so that the policy starts
    with a new word. It re-encodes to the same tokens: what the trainer feeds is what was cut. A repeated prompt counts
    once.

    Args:
        ratings: A rating dataset.
        tokenizer: The policy's tokenizer.
        num_tokens: Length of every prompt.
        min_tokens: Shortest text, in tokens, that gives a prompt; a continuation replaces the rest of the text.

    Returns:
        Columns `prompt`, `prompt_id` (sha256 of the prompt, first 16 digits), `source`, `text_mean` (the mean rating
        of the text that it opens).
    """
    if min_tokens <= num_tokens:
        raise ValueError(f"min_tokens must exceed num_tokens, got {min_tokens} and {num_tokens}.")
    prompts: dict[str, dict[str, Any]] = {}
    encoded = tokenizer(ratings["text"][:], add_special_tokens=False)["input_ids"]
    for ids, source, mean in zip(encoded, ratings["source"][:], ratings["mean"][:], strict=True):
        if len(ids) < min_tokens:
            continue
        prompt = tokenizer.decode(ids[:num_tokens])
        ends_a_word = not prompt[-1:].isspace() and tokenizer.decode(ids[num_tokens])[:1].isspace()
        if not ends_a_word or tokenizer(prompt, add_special_tokens=False)["input_ids"] != ids[:num_tokens]:
            continue
        if normalise_text(prompt) in prompts:
            continue
        prompt_id = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        row = {"prompt": prompt, "prompt_id": prompt_id, "source": source, "text_mean": mean}
        prompts[normalise_text(prompt)] = row
    if not prompts:
        raise ValueError(f"no text of {len(ratings)} is at least {min_tokens} tokens long, so there is no prompt.")
    return Dataset.from_list(list(prompts.values()))


def without_prompts(prompts: Dataset, *, seen_prompts: Iterable[str], seen_texts: Iterable[str]) -> Dataset:
    """The prompts that, after normalising, are neither among `seen_prompts` nor begin one of `seen_texts`."""
    prompts_seen = {normalise_text(prompt) for prompt in seen_prompts}
    texts_seen = sorted(normalise_text(text) for text in seen_texts)
    keep = []
    for index, prompt in enumerate(prompts["prompt"]):
        key = normalise_text(prompt)
        place = bisect.bisect_left(texts_seen, key)
        opens_seen_text = place < len(texts_seen) and texts_seen[place].startswith(key)
        if key not in prompts_seen and not opens_seen_text:
            keep.append(index)
    return prompts.select(keep)
