"""Rows of results on disk: JSONL written atomically, continued after an interruption, shared by several processes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

Row = dict[str, Any]
Key = tuple[str, int]
"""(prompt_id, sample): what identifies a completion within one policy."""


class WorkError(RuntimeError):
    """The work on some rows failed; the message says how many are done and where they are."""


class BadRowsError(ValueError):
    """The rows are at fault, not the work: every process finds the same in them, and trying again is no use."""


def row_key(row: Row) -> Key:
    return row["prompt_id"], row["sample"]


def fingerprint(settings: Any) -> str:
    """16 hex digits that change when any of the settings does; the settings must be plain JSON values."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def source_identity(source: str | Path | None) -> Any:
    """What changes when the model behind a path does: names, sizes and times of its files; a hub id is itself."""
    if source is None or not Path(source).exists():
        return None if source is None else str(source)
    path = Path(source)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [str(path.resolve()), [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]]


def read_jsonl(path: str | Path) -> list[Row]:
    """All rows of a JSONL file.

    Raises:
        ValueError: A line is not JSON; the message names it.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise ValueError(
                f"{path}, line {number} is not JSON ({reason}); delete the file to make it again"
            ) from error
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes all rows or none: the file appears under its name only when it is complete."""
    write_text(path, "".join(_line(row) for row in rows))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically, with its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Half of a surrogate pair has no UTF-8; written as an escape it is what JSON means by it.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


def read_seconds(path: str | Path | None) -> dict[str, float]:
    """Seconds per stage from a JSON object; empty where there is no file.

    Raises:
        ValueError: The file holds something else.
    """
    if path is None or not Path(path).exists():
        return {}
    try:
        seconds = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        seconds = None
    if not isinstance(seconds, dict) or not all(isinstance(value, int | float) for value in seconds.values()):
        raise ValueError(f'{path} must hold seconds per stage, as {{"stage": 12.3}}')
    return {str(name): float(value) for name, value in seconds.items()}


def complete_rows(
    jobs: Sequence[Row],
    work: Callable[[list[Row]], list[Row]],
    *,
    path: str | Path | None,
    fingerprint: str,
    batch_size: int,
    cost: Callable[[Row], int],
    description: str,
) -> list[Row]:
    """One result row per job, computed by all processes together, reusing what an earlier call left behind.

    A finished file with the same fingerprint is returned as it is; one with another fingerprint is made again. Rows
    that an interrupted call had finished are kept, whatever number of processes it had. Every process must make this
    call, and gets all rows. The folder of `path` must be visible to all of them.

    Args:
        jobs: Rows with `prompt_id` and `sample`, in the order of the result.
        work: Maps a batch of jobs to as many result rows. It may not depend on what else is in the batch.
        path: JSONL file of the result; None keeps it in memory.
        fingerprint: Of everything that the rows depend on; stored in each.
        batch_size: Jobs per call of `work`.
        cost: Jobs of similar cost share a batch; the dearest come first, so that a batch that does not fit in memory
            fails at once.
        description: Label of the progress bar.

    Raises:
        ValueError: Two jobs have the same prompt_id and sample, or `work` says that the rows are bad.
        WorkError: `work` failed on some process. All of them stop, and the rows that are done stay on disk.
    """
    keys = [row_key(job) for job in jobs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"prompt_id {twice[0]!r} occurs twice; give every prompt an id of its own")
    state = PartialState()
    path = None if path is None else Path(path)
    finished, found = _found_rows(path, fingerprint, state)
    if all(key in finished for key in keys):
        return [finished[key] for key in keys]
    missing = sorted((job for job in jobs if row_key(job) not in found), key=cost, reverse=True)
    mine = missing[state.process_index :: state.num_processes]
    part = None if path is None else _part(path, f"rank{state.process_index}")
    rows, failure = _work_off(mine, work, part, fingerprint, batch_size, description, state)
    _stop_together(failure, description, len(rows), len(jobs) - len(missing), len(jobs), path, state)
    if path is None:
        rows = gather_object(rows) if state.num_processes > 1 else rows
        found = {row_key(row): row for row in rows}
        return [found[key] for key in keys]
    state.wait_for_everyone()
    if state.is_main_process:
        found |= _read_parts(path, fingerprint)
        write_jsonl(path, [found[key] for key in keys])
        _delete_parts(path)
    state.wait_for_everyone()
    return read_jsonl(path)


def _work_off(
    jobs: list[Row],
    work: Callable[[list[Row]], list[Row]],
    part: Path | None,
    fingerprint: str,
    batch_size: int,
    description: str,
    state: PartialState,
) -> tuple[list[Row], Exception | None]:
    """This process's rows, and what ended the work early; each batch reaches the disk as soon as it is done."""
    rows, failure = [], None
    handle = None if part is None else part.open("w", encoding="utf-8", errors="backslashreplace")
    try:
        with tqdm(total=len(jobs), desc=description, unit="row", disable=not state.is_main_process) as bar:
            for start in range(0, len(jobs), batch_size):
                batch = jobs[start : start + batch_size]
                results = [{**row, "fingerprint": fingerprint} for row in work(batch)]
                if [row_key(row) for row in results] != [row_key(job) for job in batch]:
                    raise RuntimeError("work() must return one row per job, in order")
                if handle is not None:
                    handle.writelines(_line(row) for row in results)
                    handle.flush()
                rows += results
                bar.update(len(batch))
    except Exception as error:
        failure = error
    finally:
        if handle is not None:
            handle.close()
    return rows, failure


def _stop_together(
    failure: Exception | None, description: str, done: int, earlier: int, total: int, path: Path | None, state: Any
) -> None:
    """End all processes if the work of one has failed; the others would wait for its rows."""
    if isinstance(failure, BadRowsError):
        raise failure
    own = [(state.process_index, None if failure is None else f"{type(failure).__name__}: {failure}", done)]
    ranks = gather_object(own) if state.num_processes > 1 else own
    failed = [(rank, error) for rank, error, _ in ranks if error is not None]
    if not failed:
        return
    places = "; ".join(error if state.num_processes == 1 else f"{error} on rank {rank}" for rank, error in failed)
    kept = earlier + sum(count for _, _, count in ranks)
    advice = f"{kept} of {total} rows are done and kept beside {path}; the same command continues there."
    raise WorkError(f"{description} failed ({places}). {advice if path is not None else ''}".rstrip()) from failure


def _found_rows(path: Path | None, fingerprint: str, state: PartialState) -> tuple[dict[Key, Row], dict[Key, Row]]:
    """Rows with this fingerprint: those of the finished file, and those with the parts of an interrupted call."""
    if path is None:
        return {}, {}
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Parts are gathered in one file first: each rank is about to open a part of its own for writing.
        kept = _read_parts(path, fingerprint)
        _delete_parts(path)
        if kept:
            write_jsonl(_part(path, "earlier"), kept.values())
    state.wait_for_everyone()
    finished = {row_key(row): row for row in _read_whole_lines(path) if row.get("fingerprint") == fingerprint}
    found = finished | _read_parts(path, fingerprint)
    # No rank may write before all have read, or they would share out different lists of jobs.
    state.wait_for_everyone()
    return finished, found


def _read_parts(path: Path, fingerprint: str) -> dict[Key, Row]:
    rows = (row for part in _parts(path) for row in _read_whole_lines(part))
    return {row_key(row): row for row in rows if row.get("fingerprint") == fingerprint}


def _read_whole_lines(path: Path) -> list[Row]:
    """Rows up to the first broken line: a killed process leaves half a line at the end of its part."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    for line in _lines(path):
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError):
            break
    return rows


def _delete_parts(path: Path) -> None:
    for part in _parts(path):
        part.unlink()


def _parts(path: Path) -> list[Path]:
    return [p for p in sorted(path.parent.iterdir()) if p.name.startswith(f".{path.name}.") and p.suffix == ".part"]


def _lines(path: str | Path) -> list[str]:
    # Not `splitlines`: JSON leaves the line separators of Unicode as they are inside a string.
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return text.removesuffix("\n").split("\n") if text else []


def _part(path: Path, label: str) -> Path:
    return path.with_name(f".{path.name}.{label}.part")


def _line(row: Row) -> str:
    # allow_nan=False: a NaN would make a file that other JSON readers refuse.
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
