"""Checkpoints are whole or ignored: sealing, every kind of damage, which one a run goes on from."""

import json
import logging
import random
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_trainer

from rlhf.durability import (
    MANIFEST,
    UNFINISHED,
    checkpoint_to_resume,
    checkpoints,
    damage,
    files_of,
    flushed_checksums,
    newest_sound,
    publish,
    rotate,
    seal,
    wants_resume,
)
from rlhf.preflight import check_output_dir
from rlhf.state_files import load_tree, save_tree


def write(output_dir, step, content=b"weights"):
    """A published checkpoint of two files, one of them in a folder of its own."""
    folder = output_dir / UNFINISHED / f"checkpoint-{step}"
    (folder / "critic").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content * 10)
    (folder / "critic" / "model.safetensors").write_bytes(content)
    seal(folder, flushed_checksums(folder, files_of(folder)))
    return publish(folder, output_dir)


def test_a_published_checkpoint_is_sound_and_nothing_is_left_aside(tmp_path):
    final = write(tmp_path, 8)
    assert final == tmp_path / "checkpoint-8"
    assert damage(final) is None
    assert not (tmp_path / UNFINISHED).exists()
    manifest = json.loads((final / MANIFEST).read_text())
    # printf weights | sha256sum
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert manifest["files"]["critic/model.safetensors"] == {"bytes": 7, "sha256": digest}


def break_byte(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "^model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"w"), "^model.safetensors has 1 bytes instead of 70"),
        (lambda f: break_byte(f / "critic" / "model.safetensors"), "content of critic/model.safetensors has changed"),
        (lambda f: (f / MANIFEST).unlink(), "never finished"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a": '), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"files": {}}'), "names no file"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "cannot be read"),
    ],
)
def test_every_kind_of_damage_is_seen_and_the_one_before_is_taken(tmp_path, harm, reason):
    older, newer = write(tmp_path, 9), write(tmp_path, 10)  # 10 > 9 as numbers, not as text
    assert newest_sound(tmp_path) == (newer, [])
    harm(newer)
    found, skipped = newest_sound(tmp_path)
    assert found == older
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{newer} is skipped: ")
    assert re.search(reason, damage(newer))
    assert damage(newer) in skipped[0]
    for value in (True, "true", "auto"):
        assert checkpoint_to_resume(value, tmp_path) == (older, [skipped[0], f"Resuming from {older}."])
    with pytest.raises(
        ValueError, match=r"checkpoint-10 cannot be resumed: .* The newest sound one is .*checkpoint-9"
    ):
        checkpoint_to_resume(str(newer), tmp_path)


def test_any_flipped_bit_is_seen(tmp_path):
    """Of the files, certainly; of the manifest, wherever it would change what is believed."""
    folder = write(tmp_path, 1)
    chance = random.Random(0)
    for name in [*files_of(folder)] * 20:
        before = (folder / name).read_bytes()
        break_byte(folder / name, chance.randrange(len(before)))
        if name != MANIFEST or (folder / name).read_text(errors="replace").split() != before.decode().split():
            assert damage(folder) is not None, name
        (folder / name).write_bytes(before)
    assert damage(folder) is None


def test_without_a_sound_checkpoint_the_choice_is_said(tmp_path):
    assert checkpoint_to_resume("auto", tmp_path) == (
        None,
        [f"{tmp_path} holds no checkpoint yet; training starts anew."],
    )
    with pytest.raises(ValueError, match=r"no sound checkpoint.*Start anew without resume_from_checkpoint"):
        checkpoint_to_resume(True, tmp_path)
    (write(tmp_path, 3) / "model.safetensors").unlink()
    # 'auto' may start a run; it may not throw one away.
    for value in ("true", "auto"):
        with pytest.raises(ValueError, match=r"checkpoint-3 is skipped: model.safetensors is missing.*Start anew"):
            checkpoint_to_resume(value, tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-7"), tmp_path)
    for value in (None, False, "false", "False", ""):
        assert not wants_resume(value)
        assert checkpoint_to_resume(value, tmp_path) == (None, [])


def test_a_kill_between_seal_and_rename_loses_nothing(tmp_path):
    final = write(tmp_path, 5)
    (tmp_path / UNFINISHED).mkdir()
    final.rename(tmp_path / UNFINISHED / "checkpoint-5")
    assert newest_sound(tmp_path) == (final, [])
    # ... and before the seal, the folder aside is no checkpoint.
    half = tmp_path / UNFINISHED / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert newest_sound(tmp_path) == (final, [])


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 5, b"before")
    final = write(tmp_path, 5, b"after")
    assert (final / "critic" / "model.safetensors").read_bytes() == b"after"
    assert damage(final) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_rotation_counts_what_this_run_wrote(tmp_path):
    for step in (2, 4, 6, 8, 30):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    rotate(tmp_path, step=8, limit=2, keep=str(tmp_path / "checkpoint-2"))
    # 30 belongs to a future that the run went back from; 2 is the best one.
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (30, 8, 6, 2)]
    rotate(tmp_path, step=8, limit=None)
    assert len(checkpoints(tmp_path)) == 4


def test_a_state_survives_the_disk_bit_by_bit(tmp_path):
    tensors = torch.rand(2, 3)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": tensors.T}, 5: {}},
        "groups": [{"betas": (0.9, 0.999), "lr": 1e-3 / 3, "params": [0, 5], "maximize": False, "name": None}],
        "shared": [tensors, tensors],
        "numpy": ("MT19937", np.arange(5, dtype=np.uint32), 2, 0, np.float64(0.1)),
        "odd": [float("inf"), -0.0, 2**80, "text", torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16)],
    }
    save_tree(state, tmp_path / "state.safetensors")
    back = load_tree(tmp_path / "state.safetensors")
    assert back["groups"] == state["groups"]
    assert type(back["groups"][0]["betas"]) is tuple
    assert list(back["state"]) == [0, 5]
    assert back["state"][0]["exp_avg"].equal(tensors.T)
    assert back["numpy"][1].dtype == np.uint32
    assert back["numpy"][1].tolist() == [0, 1, 2, 3, 4]
    assert back["numpy"][2:] == (2, 0, 0.1)
    assert back["odd"][:4] == state["odd"][:4]
    assert back["odd"][5].dtype == torch.bfloat16
    save_tree(OrderedDict(a=1), tmp_path / "empty.safetensors")
    assert load_tree(tmp_path / "empty.safetensors") == {"a": 1}
    with pytest.raises(ValueError, match="a state holds a function, which cannot be written without pickle"):
        save_tree({"hook": write}, tmp_path / "no.safetensors")


def test_a_trainer_skips_a_torn_checkpoint_and_says_so(tmp_path, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    through = tiny_trainer(tmp_path / "a", **settings)
    through.train()
    torn = tmp_path / "a" / "checkpoint-4" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"checkpoint-4 cannot be resumed: optimizer.safetensors has .*checkpoint-3\."
    ):
        tiny_trainer(tmp_path / "a", resume_from_checkpoint="true", **settings).train(str(torn.parent))
    resumed = tiny_trainer(tmp_path / "a", resume_from_checkpoint="true", **settings)
    with caplog.at_level(logging.WARNING, "rlhf"):
        resumed.train("true")
    assert f"{torn.parent} is skipped: optimizer.safetensors has" in caplog.text
    assert f"Resuming from {tmp_path}/a/checkpoint-3." in caplog.text
    for name, tensor in resumed.model.state_dict().items():
        assert tensor.equal(through.model.state_dict()[name]), name
    assert damage(torn.parent) is None, "the run wrote it anew"


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    tiny_trainer(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=2).train()
    names = files_of(tmp_path / "a" / "checkpoint-2")
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}


def test_preflight_looks_before_models_are_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint. Start without it, or set it to 'auto'"):
        check_output_dir(tiny_config(tmp_path, resume_from_checkpoint="true"))
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        check_output_dir(tiny_config(tmp_path, resume_from_checkpoint=str(tmp_path)))
    check_output_dir(tiny_config(tmp_path, resume_from_checkpoint="auto"))
    write(tmp_path, 2)
    for value in ("true", "auto", str(tmp_path / "checkpoint-2")):
        check_output_dir(tiny_config(tmp_path, resume_from_checkpoint=value))
    with pytest.raises(ValueError, match="is not empty"):
        check_output_dir(tiny_config(tmp_path, resume_from_checkpoint="false"))
