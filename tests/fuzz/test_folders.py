"""Model folders that were torn, edited or made by a stranger: opened whole, or refused with one clear error."""

import json
import re
import shutil

import pytest
import torch
from distributed.launching import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_qrm, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from eval.judges import parse_judge
from eval.policies import load_policy
from reward.loading import load_config, load_model, load_tokenizer
from reward.source_specs import parse_source
from rlhf import models
from rlhf.config import PPOConfig

# A model whose code leaves a mark when it is imported.
STRANGER = "from pathlib import Path\nPath({mark!r}).touch()\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A reward model and a policy, each with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tiny_qrm().save_pretrained(root / "qrm")
    tiny_llama().save_pretrained(root / "policy")
    for folder in root.iterdir():
        tiny_tokenizer().save_pretrained(folder)
    return root


def open_qrm(folder):
    """A law, from the folder through the front door."""
    source = parse_source(str(folder))
    return source.distribution(["the film"], ["is good"]).values


def opens_or_refuses(read, folder) -> bool:
    """Whether it opens, or is refused in words about a file; whatever else is raised fails the test."""
    try:
        read(folder)
    except (ValueError, OSError) as error:
        # Two kinds of ValueError tell a user nothing about a file.
        return not isinstance(error, UnicodeDecodeError | json.JSONDecodeError)
    return True


def copy_of(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("copy") / folder.name
    shutil.copytree(folder, target)
    return target


DAMAGE = ["cut", "flip", "empty", "gone", "text", "folder"]
FILES = st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])


@settings(max_examples=settings.default.max_examples // 2)
@given(name=FILES, place=st.floats(0, 1), what=st.sampled_from(DAMAGE), byte=st.integers(0, 255))
def test_a_damaged_reward_model_is_opened_or_refused(folders, tmp_path_factory, name, place, what, byte):
    folder = copy_of(folders / "qrm", tmp_path_factory)
    path = folder / name
    content = bytearray(path.read_bytes())
    # Damage to the weights themselves is no damage that anyone could see; it is the header that is of interest.
    at = min(int(place * min(len(content), 3000)), len(content) - 1)
    if what == "flip":
        content[at] = byte
    elif what in ("cut", "empty"):
        content = content[: at if what == "cut" else 0]
    elif what == "text":
        content = bytearray(b"\xff\xfe[1, 2")
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what != "gone":
        path.write_bytes(content)
    assert opens_or_refuses(open_qrm, folder)
    shutil.rmtree(folder.parent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 1000) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = ["quantile_levels", "attribute_names", "backbone_config", "head_layers", "pooling", "head_type", "model_type",
        "gate_temperature", "gate_marker", "non_crossing", "dtype", "architectures", "attribute_transform",
        "head_hidden_size", "gate_hidden_size", "quantile_loss", "num_labels", "id2label"]  # fmt: skip


@settings(max_examples=settings.default.max_examples // 2)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2), whole=st.none() | JSON)
def test_a_config_of_other_values_is_opened_or_refused(folders, tmp_path_factory, changes, whole):
    folder = copy_of(folders / "qrm", tmp_path_factory)
    config = json.loads((folder / "config.json").read_text())
    content = config | changes if whole is None else whole
    (folder / "config.json").write_text(json.dumps(content))
    assert opens_or_refuses(open_qrm, folder)
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("part", ["quantile_head.weight", "backbone.layers.0.mlp.up_proj.weight"])
def test_absent_and_misshapen_weights_are_refused_and_not_made_up(folders, tmp_path_factory, part):
    folder = copy_of(folders / "qrm", tmp_path_factory)
    tensors = load_file(folder / "model.safetensors")
    assert part in tensors
    kept = {name: tensor for name, tensor in tensors.items() if name != part}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights of a QRMForSequenceClassification, such as {part}"):
        open_qrm(folder)
    save_file(tensors | {part: torch.zeros(3, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="damaged or do not fit together"):
        open_qrm(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert bool(open_qrm(folder).isfinite().all())


def test_a_language_model_is_no_judge(folders):
    # transformers would put a random head on it and answer all the same.
    with pytest.raises(ValueError, match="another kind of model"):
        load_model(AutoModelForSequenceClassification, folders / "policy", num_labels=1)


def pickled_only(folder):
    """The same weights as a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_by_every_loader(folders, tmp_path_factory, tmp_path):
    qrm = str(pickled_only(copy_of(folders / "qrm", tmp_path_factory)))
    policy = str(pickled_only(copy_of(folders / "policy", tmp_path_factory)))
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", critic="separate", critic_model=policy)
    readers = [
        lambda: parse_source(qrm),
        lambda: parse_source(f"judgment:{policy}?scores=good:1,bad:0"),
        lambda: parse_judge(f"qrm:{qrm}")(["the film"], ["is good"]),
        lambda: load_policy(policy),
        lambda: models.load_policy(policy, args),
        lambda: models.load_critic_trunk(policy, args),
        lambda: load_model(AutoModelForCausalLM, policy, use_safetensors=False),
    ]
    for read in readers:
        with pytest.raises(ValueError, match="pickled weights can run code and are not opened"):
            read()


def test_a_pickled_or_torn_adapter_is_refused(folders, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folders / "policy"), lora).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert load_policy(tmp_path).model is not None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="cannot open the adapter"):
        load_policy(tmp_path)
    torch.save(weights, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights"):
        load_policy(tmp_path)


def test_code_in_a_folder_is_not_run_unless_it_is_asked_for(folders, tmp_path_factory, tmp_path):
    mark = tmp_path / "ran"
    for name in ("qrm", "policy"):
        folder = copy_of(folders / name, tmp_path_factory)
        for module in ("configuration_x.py", "modeling_x.py"):
            (folder / module).write_text(STRANGER.format(mark=str(mark)))
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.Y",
                   "AutoModelForSequenceClassification": "modeling_x.Y", "AutoModel": "modeling_x.Y"}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "stranger", "auto_map": classes}))
        place = str(folder)
        args = PPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
        readers = [
            lambda place=place: load_config(place),
            lambda place=place: parse_source(place),
            lambda place=place: parse_source(f"scalar:{place}"),
            lambda place=place: parse_judge(f"classifier:{place}"),
            lambda place=place: parse_judge(f"qrm:{place}"),
            lambda place=place: load_policy(place),
            lambda place=place, args=args: models.load_policy(place, args),
        ]
        for read in readers:
            with pytest.raises((ValueError, OSError)):
                read()
    assert not mark.exists()
    # The negative control: asked for, the code does run.
    with pytest.raises(ValueError, match="damaged or do not fit"):
        load_config(place, trust_remote_code=True)
    assert mark.exists()


def test_a_tokenizer_from_a_damaged_file_is_refused(folders, tmp_path_factory):
    folder = copy_of(folders / "policy", tmp_path_factory)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="cannot open the tokenizer"):
        load_tokenizer(folder)


def test_everything_is_loaded_in_one_place():
    """Outside reward/loading.py nothing loads by itself, and nothing reads a pickle."""
    ours = [p for folder in ("reward", "rlhf", "eval", "recipes") for p in sorted((ROOT / folder).rglob("*.py"))]
    # The archives of `embedded` are verified by hash; `released` asks for safetensors itself.
    exempt = {"loading.py", "embedded.py", "released.py", "prepare_data.py"}
    calls = re.compile(r"\b(?:Auto\w+|QRM\w+|Peft(?:Model)|model_class)\.from_pretrained\((?!folder|\")")
    assert [p.name for p in ours if p.name not in exempt and calls.search(p.read_text())] == []
    pickles = re.compile(
        r"torch\.load\(|pickle\.load|joblib|allow_pickle=True|yaml\.(?:load|unsafe_load)\(|eval\(input"
    )
    # DeepSpeed's own files hold tensors in pickles; they are read without running what a pickle may hold.
    readers = {p.name: p.read_text() for p in ours if pickles.search(p.read_text())}
    assert list(readers) == ["deepspeed_files.py"]
    assert readers["deepspeed_files.py"].count("torch.load(") == readers["deepspeed_files.py"].count(
        "weights_only=True)"
    )
    assert calls.search("AutoModel.from_pretrained(name)")
    assert pickles.search("torch.load(path)")
