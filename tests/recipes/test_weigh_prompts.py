"""Weights of prompts by the tail of their answers: by hand, from models, and on into a training."""

import pytest
import torch
from datasets import load_from_disk
from distributed.launching import load_recipe
from tiny import tiny_llama, tiny_prompts, tiny_qrm, tiny_tokenizer, tiny_trainer
from trl import TrlParser

from eval.records import read_jsonl
from rlhf.reward_function import RiskReward

recipe = load_recipe("weigh_prompts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weigh")
    policy = tiny_llama(tie_word_embeddings=False)
    policy.lm_head.weight.data *= 12
    policy.save_pretrained(path / "policy")
    tiny_qrm(seed=2).save_pretrained(path / "reward")
    for name in ("policy", "reward"):
        tiny_tokenizer().save_pretrained(path / name)
    prompts = tiny_prompts()
    prompts.add_column("topic", [f"t{i}" for i in range(len(prompts))]).save_to_disk(path / "prompts")
    return path


def run(folder, output, *flags):
    settings = ["--policy", folder / "policy", "--dataset_name", folder / "prompts"]
    settings += ["--reward_model", folder / "reward", "--output_dir", output, "--max_new_tokens", "6"]
    parser = TrlParser((recipe.WeighArguments,))
    recipe.main(*parser.parse_args_and_config([str(x) for x in [*settings, "--use_cpu", "true", *flags]]))


def test_weights_by_hand():
    # Three quarters of the weight in proportion to the masses, a quarter uniform: N = 4, masses sum to 0.8.
    weights = recipe.prompt_weights(torch.tensor([0.4, 0.0, 0.3, 0.1]), 0.25)
    assert weights.tolist() == pytest.approx([1.75, 0.25, 1.375, 0.625])
    assert recipe.prompt_weights(torch.tensor([0.4, 0.0]), 1.0).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="no reading at or below"):
        recipe.prompt_weights(torch.zeros(3), 0.25)


def test_the_mass_is_that_of_the_answers(folder, tmp_path, capsys):
    output = tmp_path / "weighted"
    run(folder, output, "--rating_threshold", "0.1", "--num_samples", "3", "--uniform_share", "0.5")
    rows, completions = load_from_disk(str(output)), read_jsonl(f"{output}.completions.jsonl")
    prompts = load_from_disk(str(folder / "prompts"))
    assert rows["prompt"] == prompts["prompt"]
    assert rows["topic"] == prompts["topic"]
    assert [c["prompt"] for c in completions] == [p for p in prompts["prompt"] for _ in range(3)]
    law = RiskReward(str(folder / "reward")).distribution(
        [c["prompt"] for c in completions], [c["completion"] for c in completions]
    )
    masses = law.cdf(0.1).reshape(-1, 3).mean(1)
    assert rows["tail_mass"] == pytest.approx(masses.tolist(), abs=1e-6)
    assert max(masses) > min(masses) > 0
    expected = 0.5 + 0.5 * len(masses) * masses / masses.sum()
    assert rows["prompt_weight"] == pytest.approx(expected.tolist(), rel=1e-5)
    printed = capsys.readouterr().out
    assert f"{len(masses)} prompts, 3 answers each, ratings at or below 0.1" in printed
    # Weighing again keeps the columns of the prompts and replaces its own.
    again = tmp_path / "again"
    run(folder, again, "--rating_threshold", "0.1", "--dataset_name", output)
    assert sorted(load_from_disk(str(again)).column_names) == sorted(rows.column_names)
    trainer = tiny_trainer(tmp_path / "run", train_dataset=rows, prompt_weight_column="prompt_weight", max_steps=1)
    trainer.train()
    assert trainer.ppo_state.rollouts == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--rating_threshold is required"),
        (["--rating_threshold", "0", "--uniform_share", "0"], r"--uniform_share must be in \(0, 1\]"),
        (["--rating_threshold", "0", "--policy", "/no/policy"], "/no/policy does not exist"),
        (["--rating_threshold", "0", "--dataset_name", "./none"], "dataset folder none does not exist"),
        (["--rating_threshold", "-50"], "no reading at or below the threshold"),
    ],
)
def test_bad_input_is_told_in_one_line(folder, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run(folder, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_the_prompts_are_not_overwritten(folder):
    with pytest.raises(SystemExit, match="prompts themselves are not overwritten"):
        run(folder, folder / "prompts", "--rating_threshold", "0")
