"""Checkpoints that pass their checksums and are wrong all the same: resumed from, or refused in one sentence."""

import json
import logging
import math
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_qrm, tiny_tokenizer, tiny_trainer

from rlhf.durability import MANIFEST, files_of, flushed_checksums, seal
from rlhf.reward_function import RiskReward

JSON_FILES = ("ppo_state.json", "trainer_state.json", "critic/config.json")
TENSOR_FILES = (
    "model.safetensors", "critic/model.safetensors", "optimizer.safetensors", "scheduler.safetensors",
    "rank_0.safetensors", "rollout_0.safetensors",
)  # fmt: skip
VALUES = st.sampled_from([None, True, -1, 3, 10**400, 0.5, -2.5, math.nan, math.inf, "", "x", [], [1], {}, {"a": 1}])


def trainer_in(folder, **changes):
    reward = RiskReward(
        tiny_qrm(), "cvar:0.3", scope="population", constraints=["below:0 <= 0.2"], tokenizer=tiny_tokenizer()
    )
    settings = {"num_mini_batches": 2, "gradient_accumulation_steps": 1, "kl_target": 0.5, "kl_gain": 1.0, **changes}
    return tiny_trainer(folder, reward=reward, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In the middle of the second rollout."""
    folder = tmp_path_factory.mktemp("sound")
    trainer_in(folder, max_steps=5, save_strategy="steps", save_steps=5).train()
    assert set(JSON_FILES + TENSOR_FILES) <= set(files_of(folder / "checkpoint-5"))
    return folder / "checkpoint-5"


def places(tree, path=()):
    """Where a value of a JSON file could be exchanged."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def exchanged(tree, path, value, remove):
    """A copy of the tree with one value exchanged or removed."""
    if not path:
        return value
    copy, (key, *rest) = tree.copy(), path
    if remove and not rest:
        del copy[key]
    else:
        copy[key] = exchanged(tree[key], rest, value, remove)
    return copy


def resume(checkpoint, folder, edit) -> str | None:
    """Resume from an edited copy, sealed anew: None if the run went on, or why it was refused."""
    shutil.rmtree(folder, ignore_errors=True)
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    edit(copy)
    (copy / MANIFEST).unlink()
    seal(copy, flushed_checksums(copy, files_of(copy)))
    trainer = trainer_in(folder, max_steps=6, resume_from_checkpoint="auto")
    try:
        trainer.train("auto")
    except ValueError as error:
        return str(error)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    return None


def is_clear(refusal: str, checkpoint) -> bool:
    """One line that names the checkpoint."""
    return "\n" not in refusal and checkpoint.name in refusal


@pytest.fixture
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_the_sound_checkpoint_is_resumed(checkpoint, tmp_path):
    assert resume(checkpoint, tmp_path / "copy", lambda folder: None) is None


@pytest.mark.parametrize("name", [name for name in TENSOR_FILES if name != "scheduler.safetensors"])
def test_half_a_file_is_refused(checkpoint, tmp_path, name):
    def edit(copy):
        with safe_open(copy / name, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in sorted(file.keys())[1:]}, file.metadata()
        save_file(tensors, copy / name, metadata=metadata)

    refusal = resume(checkpoint, tmp_path / "copy", edit)
    assert refusal is not None
    assert is_clear(refusal, checkpoint)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@settings(max_examples=40)
@given(name=st.sampled_from(JSON_FILES), data=st.data())
def test_an_edited_json_file_is_used_or_refused(checkpoint, tmp_path_factory, name, data):
    tree = json.loads((checkpoint / name).read_text())
    path = data.draw(st.sampled_from([p for p in places(tree) if len(p) < 2 or p[0] != "log_history"]))
    changed = exchanged(tree, path, data.draw(VALUES), data.draw(st.booleans()))
    folder = tmp_path_factory.getbasetemp() / "edited"
    refusal = resume(checkpoint, folder, lambda copy: (copy / name).write_text(json.dumps(changed)))
    assert refusal is None or is_clear(refusal, checkpoint)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@settings(max_examples=25)
@given(name=st.sampled_from(TENSOR_FILES), data=st.data())
def test_an_edited_tensor_file_is_used_or_refused(checkpoint, tmp_path_factory, name, data):
    tensors = load_file(checkpoint / name)
    # A scheduler has no tensors; what it has is the structure beside them.
    key = data.draw(st.sampled_from(sorted(tensors) or [None]))
    edits = ["removed", "cut", "flat", "another dtype", "renamed"] if key else []
    how = data.draw(st.sampled_from([*edits, "no structure", "text"]))

    def edit(copy):
        content, path, tensor = dict(tensors), copy / name, tensors.get(key)
        if how == "text":
            path.write_text("weights")
            return
        if how != "no structure":
            del content[key]
        if how == "cut":
            content[key] = tensor[..., :-1].contiguous() if tensor.dim() else tensor.reshape(1)
        elif how == "flat":
            content[key] = tensor.reshape(-1, 1)
        elif how == "another dtype":
            content[key] = tensor.to("cpu").double() if not tensor.dtype.is_floating_point else tensor.long()
        elif how == "renamed":
            content["x"] = tensor
        save_file(content, path, metadata={"format": "pt"})

    refusal = resume(checkpoint, tmp_path_factory.getbasetemp() / "edited", edit)
    # Half a model would train on, from random numbers in the other half.
    assert refusal is not None or how not in ("removed", "renamed")
    assert refusal is None or is_clear(refusal, checkpoint)
