"""Rows of a folder, a file or a hub id, and what is refused in them before any work is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


def read_dataset(path_or_id: str | Path, split: str | None) -> tuple[Dataset, str | None]:
    """Rows of a folder written by `save_to_disk`, a JSON, CSV or parquet file, or a hub id.

    Returns:
        The rows, and the split that still has to be selected by a column `split`, if any.

    Raises:
        ValueError: The split is missing, or several exist and none is chosen.
        FileNotFoundError: A path that looks local does not exist.
    """
    path = Path(path_or_id)
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.is_dir():
        with _clear_errors(path):
            loaded = load_from_disk(str(path))
    elif path.suffix in formats:
        if not path.is_file():
            raise FileNotFoundError(f"the dataset file {path} does not exist.")
        _check_content(path, formats[path.suffix])
        with _clear_errors(path):
            loaded = load_dataset(formats[path.suffix], data_files=str(path), split="train")
    elif path.is_absolute() or str(path_or_id).startswith(("./", "../", "runs/")):
        raise FileNotFoundError(
            f"the dataset folder {path} does not exist; `recipes/prepare_data.py` makes those of the quickstart."
        )
    else:
        loaded = load_dataset(str(path_or_id))
    if not isinstance(loaded, DatasetDict):
        return loaded, split
    if split is None or len(loaded) == 1:
        parts = list(loaded.values())
        if len(parts) > 1:
            raise ValueError(f"{path_or_id} has the splits {list(loaded)}; choose one with split=.")
        return parts[0], split if "split" in parts[0].column_names else None
    if split not in loaded:
        raise ValueError(f"{path_or_id} has no split {split!r}; it has {list(loaded)}.")
    return loaded[split], None


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """One ValueError for whatever a damaged file makes pandas, pyarrow or datasets raise."""
    try:
        yield
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:
        # datasets raises an error of its own that says nothing from the one that does.
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        raise ValueError(
            f"cannot read {path} as a dataset ({type(cause).__name__}: {reason}); check that the file is whole and "
            "every row has the same columns"
        ) from error


def _check_content(path: Path, kind: str) -> None:
    """Refuses an empty file, and JSON that is no row and no list of rows, which some readers do not survive."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise ValueError(f"the dataset file {path} is empty.")
    if kind == "json" and start[:1] not in (b"{", b"["):
        raise ValueError(f"{path} holds no rows: JSON rows are objects, {{...}}, one per line or in one list.")


def check_prompts(rows: Dataset, path_or_id: str | Path) -> None:
    """Refuses prompts that are neither text nor messages, before a model sees the first.

    Raises:
        ValueError: There is no column `prompt`, no row, or a prompt of another form (its index is named).
    """
    if "prompt" not in rows.column_names:
        raise ValueError(f"{path_or_id} has no column 'prompt'; it has {rows.column_names}.")
    if not len(rows):
        raise ValueError(f"{path_or_id} holds no prompts.")
    for index, prompt in enumerate(rows["prompt"]):
        if not isinstance(prompt, str) and not is_messages(prompt):
            raise ValueError(
                f"row {index} of {path_or_id}: a prompt is text or a list of messages with role and content, got "
                f"{repr(prompt)[:80]}."
            )


def is_messages(value: Any) -> bool:
    """Whether a value is a non-empty list of messages, each with a role and a content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def select_split(dataset: Dataset, split: str | None, path_or_id: str | Path) -> Dataset:
    """The rows whose column `split` has this value, or one of several joined by a plus sign; all of them for None.

    Raises:
        ValueError: There is no such value, or no such column.
    """
    if split is None:
        return dataset
    known = sorted(set(dataset["split"])) if "split" in dataset.column_names else []
    wanted = set(split.split("+"))
    if not wanted <= set(known):
        raise ValueError(f"{path_or_id} has no split {split!r}; it has {known or 'no column `split`'}.")
    return dataset.select([index for index, name in enumerate(dataset["split"]) if name in wanted])
