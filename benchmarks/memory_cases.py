"""What `memory_model.py` measures: models of several sizes, and set-ups small enough for two CPU ranks."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from scale_formulas import SHAPES, Plan, Shape
from transformers import AutoConfig, AutoModelForCausalLM

PRETRAINED = "SmolLM2-135M"
# A third and nearly three times of it, with the same vocabulary: embedding and head are two fifths of the smallest.
MODELS = {
    "44M": Shape(16, 384, 1024, 6, 2, 64, 49152, True),
    PRETRAINED: SHAPES[PRETRAINED],
    "SmolLM2-360M": SHAPES["SmolLM2-360M"],
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Case(NamedTuple):
    """One measurement.

    Args:
        model: key of `MODELS`.
        name: of the set-up.
        plan: the set-up.
    """

    model: str
    name: str
    plan: Plan

    @property
    def key(self) -> str:
        """Its name among the stored results."""
        return self.name if self.model == PRETRAINED else f"{self.model}: {self.name}"

    @property
    def shape(self) -> Shape:
        return MODELS[self.model]


SMALL = Plan(
    precision="fp32",
    rows=2,
    micro_batch=1,
    prompt=8,
    completion=8,
    epochs=1,
    checkpointing=False,
    frozen_on_disk=True,
)
LONG = replace(SMALL, micro_batch=2, prompt=112)
PLANS = {
    "full, shared critic": SMALL,
    "full, separate critic": replace(SMALL, critic="separate"),
    "LoRA, shared critic": replace(SMALL, lora=16),
    "LoRA, separate critic": replace(SMALL, lora=16, critic="separate"),
    "LoRA, bfloat16 weights": replace(SMALL, lora=16, weight_bytes=2),
    "full, DDP": replace(SMALL, mode="ddp", ranks=2),
    "LoRA, long prompts": replace(LONG, lora=16),
    "LoRA, long prompts, checkpointing": replace(LONG, lora=16, checkpointing=True),
    "full, ZeRO-1": replace(SMALL, mode="zero1", ranks=2),
    "full, ZeRO-2": replace(SMALL, mode="zero2", ranks=2),
    "full, ZeRO-3": replace(SMALL, mode="zero3", ranks=2),
    "full, ZeRO-3 by layer": replace(SMALL, mode="zero3", ranks=2, gather=False),
    "full, ZeRO-3 with offload": replace(SMALL, mode="zero3_offload", ranks=2),
    "full, ZeRO-3 with offload, by layer": replace(SMALL, mode="zero3_offload", ranks=2, gather=False),
    "full, FSDP2": replace(SMALL, mode="fsdp2", ranks=2),
}
# Two ranks of SmolLM2-360M want most of 24 GB, so it is measured in one process.
SMALLER = (
    "full, shared critic",
    "LoRA, shared critic",
    "LoRA, long prompts",
    "full, DDP",
    "full, ZeRO-2",
    "full, ZeRO-3",
    "full, ZeRO-3 with offload",
    "full, FSDP2",
)
LARGER = ("full, shared critic", "full, separate critic", "LoRA, shared critic", "LoRA, long prompts")


def cases(model: str, names: Iterable[str]) -> dict[str, Case]:
    """Set-ups of one model, by the key of their results."""
    found = (Case(model, name, PLANS[name]) for name in names)
    return {case.key: case for case in found}


CASES = cases(PRETRAINED, PLANS) | cases("44M", SMALLER) | cases("SmolLM2-360M", LARGER)


def write_model(shape: Shape, like: Path, folder: Path) -> Path:
    """A folder with a model of this shape, float32 random weights from one seed, and the tokenizer of `like`.

    Memory does not ask what the weights are, so nothing has to be downloaded.

    Args:
        shape: sizes; its vocabulary must be that of the tokenizer.
        like: folder of a Llama whose other settings the model takes over.
        folder: where to write; one that holds a config already is left as it is.

    Raises:
        ValueError: the vocabulary of `like` is another.
    """
    if (folder / "config.json").is_file():
        return folder
    config = AutoConfig.from_pretrained(like)
    if config.vocab_size != shape.vocab:
        raise ValueError(f"the tokenizer of {like} goes with {config.vocab_size} words, not with {shape.vocab}")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = shape.layers, shape.hidden, shape.mlp
    config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
    config.head_dim, config.tie_word_embeddings = shape.head_dim, shape.tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (like / name).is_file():
            shutil.copy(like / name, folder / name)
    # Under another name first: a folder with a config counts as complete.
    model.save_pretrained(folder / "partial")
    for path in sorted((folder / "partial").iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    (folder / "partial").rmdir()
    return folder
