"""Policies, reward models and prompts for `ppo_step.py`, written to disk so that every process loads the same."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from reward.modeling import QRMForSequenceClassification

PROMPT_TOKENS = 8
LEVELS = [step / 20 for step in range(1, 20)]


def prepare_models(policy: str, folder: Path) -> dict[str, Any]:
    """A real policy, and reward models of its size with fresh heads: a one-label classifier and a quantile model.

    Returns:
        Folders `policy`, `reward` and `qrm`, the `pad_token`, and `prompts` that all have `prompt_tokens` tokens.
    """
    data = Path(policy).parent / "rl_prompts"
    if not Path(policy).is_dir() or not data.is_dir():
        raise SystemExit(f"{policy} or {data} is missing; `python recipes/prepare_data.py` makes them.")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    own = folder / "-".join(Path(policy).resolve().parts[-3:])
    return write_rewards(policy, own, tokenizer) | {
        "prompts": prompts_of_equal_length(load_from_disk(data)["prompt"][:], tokenizer),
        "prompt_tokens": PROMPT_TOKENS,
    }


def prepare_tiny(folder: Path) -> dict[str, Any]:
    """A Llama of two layers with random weights, 512 words and random prompts."""
    words = [f"w{number}" for number in range(509)]
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, model_max_length=256, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"],
    )
    policy = folder / "policy"
    LlamaForCausalLM(config).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    drawn = random.Random(0)
    prompts = [" ".join(drawn.choices(words, k=PROMPT_TOKENS)) for _ in range(256)]
    return write_rewards(str(policy), folder, tokenizer) | {
        "prompts": prompts_of_equal_length(prompts, tokenizer),
        "prompt_tokens": PROMPT_TOKENS,
    }


def write_rewards(policy: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Reward models on the policy's trunk, unless they are there already."""
    paths = {"policy": policy, "reward": str(folder / "reward"), "qrm": str(folder / "qrm")}
    pad_token = tokenizer.pad_token if tokenizer.pad_token != tokenizer.eos_token else None
    if pad_token is None:
        raise SystemExit(f"the tokenizer of {policy} needs a pad token other than EOS: TRL 1.12.0 tells pads by id")
    written, source = folder / "rewards_written", str(Path(policy).resolve())
    if not written.is_file() or written.read_text() != source:
        torch.manual_seed(0)
        classifier = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
        classifier.config.pad_token_id = tokenizer.pad_token_id
        qrm = QRMForSequenceClassification.from_backbone(
            policy, quantile_levels=LEVELS, backbone_kwargs={"dtype": torch.float32}
        )
        for parameter in qrm.quantile_head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        for model, name in ((classifier, "reward"), (qrm, "qrm")):
            model.save_pretrained(paths[name])
            tokenizer.save_pretrained(paths[name])
        written.write_text(source)
    return paths | {"pad_token": pad_token}


def prompts_of_equal_length(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts of exactly `PROMPT_TOKENS` tokens.

    Raises:
        ValueError: there is none.
    """
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length == PROMPT_TOKENS]
    if not kept:
        raise ValueError(f"no prompt has {PROMPT_TOKENS} tokens")
    return kept
