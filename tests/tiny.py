"""Tiny models and tokenizers built from a config: real architectures, random weights, no download."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reward.modeling import QRMForSequenceClassification
from rlhf.config import PPOConfig
from rlhf.trainer import PPOTrainer

WORDS = [
    "the",
    "a",
    "red",
    "green",
    "blue",
    "good",
    "bad",
    "fine",
    "film",
    "is",
    "was",
    "very",
    "not",
    "risky",
    "safe",
]


def tiny_tokenizer(words: list[str] | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Word-level tokenizer with pad, EOS and unknown tokens that all differ."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *(words or WORDS)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def tiny_llama(vocab_size: int | None = None, *, seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """Two-layer Llama with grouped-query attention."""
    settings = {
        "vocab_size": vocab_size or len(WORDS) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    } | overrides
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings))


def tiny_qrm(*, seed: int = 0, **config: object) -> QRMForSequenceClassification:
    """A quantile reward model on a tiny trunk, with heads that answer differently for different texts."""
    settings = {"quantile_levels": [0.05, 0.1, 0.3, 0.5, 0.8]} | config
    model = QRMForSequenceClassification.from_backbone(tiny_llama(seed=seed, initializer_range=0.3), **settings)
    torch.manual_seed(seed)
    for parameter in model.quantile_head.parameters():
        torch.nn.init.normal_(parameter)
    return model


PROMPTS = ["the film is", "a very good", "the red", "not bad", "a film", "was the film very"]


def tiny_prompts(copies: int = 8) -> Dataset:
    """Prompts of different lengths, with a column that reward functions can see."""
    rows = PROMPTS * copies
    return Dataset.from_dict({"prompt": rows, "row": list(range(len(rows)))})


def count_good(prompts: list, completions: list[str], **columns: object) -> list[float]:
    """A reward that the policy can learn: how often it says "good", less a little for each word."""
    return [text.split().count("good") - 0.1 * len(text.split()) for text in completions]


def tiny_config(output_dir: object, **overrides: object) -> PPOConfig:
    """Settings of a run that takes about a second."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "max_completion_length": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    } | overrides
    return PPOConfig(**settings)


def tiny_trainer(output_dir: object, *, reward: object = count_good, model: object = None, **overrides: object):
    """A PPO trainer on a tiny Llama; `overrides` are settings of `PPOConfig` or arguments of `PPOTrainer`."""
    of_trainer = {"eval_dataset", "peft_config", "processing_class", "train_dataset", "callbacks"}
    arguments = {name: overrides.pop(name) for name in of_trainer & set(overrides)}
    tokenizer = arguments.pop("processing_class", None) or tiny_tokenizer()
    return PPOTrainer(
        model=model if model is not None else tiny_llama(),
        reward_funcs=reward,
        args=tiny_config(output_dir, **overrides),
        train_dataset=arguments.pop("train_dataset", tiny_prompts()),
        processing_class=tokenizer,
        **arguments,
    )


def logged(trainer: PPOTrainer, name: str) -> list[float]:
    """Every logged value of one metric, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def candidate_rows(words: list[str]) -> list[dict]:
    """Rows of a completions file: each word is a prompt and has three completions."""
    return [
        {
            "prompt_id": first,
            "sample": sample,
            "prompt": first,
            "completion": f" {words[(i + 2 * sample + 1) % len(words)]} film {'is not very ' * sample}",
            "completion_tokens": 2 + sample,
            "finished": True,
            "kl_k1_sum": 0.25 * sample,
            "kl_k3_mean": 0.1,
            "source": "somewhere",
            "decoding": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "versions": {},
            "fingerprint": "0" * 16,
        }
        for i, first in enumerate(words)
        for sample in range(3)
    ]
