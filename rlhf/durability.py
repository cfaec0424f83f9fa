"""Checkpoints that are complete or ignored: written aside, sealed with checksums, and only then given their name.

    output_dir/_unfinished/checkpoint-8/...      while ranks write
    output_dir/_unfinished/checkpoint-8/manifest.json     last: size and SHA-256 of every file
    output_dir/checkpoint-8                      after one rename

Everything is flushed to the disk before the rename, so a folder under its final name is whole even if the machine
loses power. The checksums find what happens later: a truncated copy, a lost file, a flipped bit. They guard against
accidents; whoever can write the folder can also write its manifest.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

MANIFEST = "manifest.json"
# Uploads to a hub leave names with a leading underscore out.
UNFINISHED = "_unfinished"


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int | None:
    """The optimiser step in the name of a folder; None where it is not the name of a checkpoint."""
    prefix, _, number = checkpoint.name.partition("-")
    return int(number) if prefix == "checkpoint" and number.isascii() and number.isdigit() else None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders with the name of a checkpoint, the highest step first."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((path for path in found if step_of(path) is not None), key=step_of, reverse=True)


# ---- Writing ------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    """Names of all files below a folder, in an order that every rank agrees on."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flushed_checksums(folder: Path, names: Sequence[str]) -> dict[str, dict]:
    """Size and SHA-256 of files, which are on the disk when this returns."""
    result = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            result[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": _digest(file)}
    return result


def seal(folder: Path, checksums: dict[str, dict]) -> None:
    """Write the manifest, last of all files: a folder without one was never finished."""
    path = folder / MANIFEST
    with path.open("w") as file:
        json.dump({"files": dict(sorted(checksums.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        _flush_folder(inner)
    _flush_folder(folder)


def publish(folder: Path, output_dir: str | Path) -> Path:
    """Give a sealed folder its place in `output_dir`; one of the same name makes way."""
    final = Path(output_dir, folder.name)
    if final.exists():
        # Two renames are not one. A kill between them leaves the sealed folder aside, where `newest_sound` finds it.
        replaced = folder.with_name(f"replaced-{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    folder.rename(final)
    _flush_folder(final.parent)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return final


def rotate(output_dir: str | Path, step: int, limit: int | None, keep: str | None = None) -> None:
    """Delete the oldest checkpoints up to `step` beyond `limit`, but for the folder `keep`.

    Checkpoints of later steps, which a run that went back has left behind, are neither counted nor deleted: with them
    the newest would be one that this run never wrote.
    """
    if limit is None or limit <= 0:
        return
    own = [path for path in checkpoints(output_dir) if step_of(path) <= step]
    for path in own[limit:]:
        if keep is None or path.resolve() != Path(keep).resolve():
            shutil.rmtree(path, ignore_errors=True)


# ---- Reading ------------------------------------------------------------------------------------------------------


def damage(checkpoint: str | Path) -> str | None:
    """Why a checkpoint cannot be trusted, naming the file; None: every file is as it was written."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    path = folder / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing, so it was never finished (or another program wrote it)"
    try:
        files = json.loads(path.read_bytes())["files"]
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{MANIFEST} cannot be read"
    if not wanted:
        return f"{MANIFEST} names no file"
    for name, (size, _) in wanted.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    for name, (_, digest) in wanted.items():
        try:
            with (folder / name).open("rb") as file:
                if _digest(file) != digest:
                    return f"the content of {name} has changed (SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def newest_sound(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The sound checkpoint of the highest step, and a sentence for each later one that was skipped.

    Call it while no run writes into the folder.
    """
    for path in checkpoints(Path(output_dir, UNFINISHED)):
        # Sealed, but killed before the rename.
        if (path / MANIFEST).is_file() and not Path(output_dir, path.name).exists() and damage(path) is None:
            publish(path, output_dir)
    skipped = []
    for path in checkpoints(output_dir):
        reason = damage(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path} is skipped: {reason}.")
    return None, skipped


def wants_resume(value: str | bool | None) -> bool:
    """Whether a value of `resume_from_checkpoint` asks for a checkpoint at all."""
    return bool(value) and str(value).lower() != "false"


def checkpoint_to_resume(value: str | bool | None, output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` asks for, and sentences for the user.

    Args:
        value: a folder; True or 'true': the newest sound checkpoint of `output_dir`; 'auto': that too, but a run
            that has written no checkpoint yet starts anew; None, False or 'false': none.
        output_dir: of the run.

    Raises:
        ValueError: the folder is damaged, or nothing sound is there. Work is never thrown away silently: where
            checkpoints exist and all are damaged, 'auto' fails as 'true' does.
    """
    if not wants_resume(value):
        return None, []
    mode = str(value).lower()
    if mode not in ("true", "auto"):
        return _explicit(Path(value), output_dir), []
    newest, skipped = newest_sound(output_dir)
    if newest is not None:
        return newest, [*skipped, f"Resuming from {newest}."]
    if mode == "auto" and not skipped:
        return None, [f"{output_dir} holds no checkpoint yet; training starts anew."]
    raise ValueError(
        " ".join([f"{output_dir} holds no sound checkpoint to resume from.", *skipped])
        + " Start anew without resume_from_checkpoint, with overwrite_output_dir or another output_dir."
    )


def _explicit(checkpoint: Path, output_dir: str | Path) -> Path:
    reason = damage(checkpoint)
    if reason is None:
        return checkpoint
    folder = checkpoint.parent if checkpoint.parent.is_dir() else output_dir
    newest, _ = newest_sound(folder)
    advice = f"The newest sound one is {newest}." if newest else f"{folder} holds no sound one; start anew."
    raise ValueError(f"The checkpoint {checkpoint} cannot be resumed: {reason}. {advice}")


def _digest(file: object) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    """A rename or a new file is on the disk only when the folder that lists it is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
