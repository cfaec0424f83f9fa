"""The PPO recipe as people start it: from YAML and flags, on one rank and on two."""

import json
import subprocess
import sys

import pytest
import yaml
from distributed.launching import ROOT, cpu_config, launch, load_recipe
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_prompts, tiny_qrm, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rlhf.attributes import WHOLE, build_objectives
from rlhf.config import PPOConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, a reward model, prompts and a YAML file that names them."""
    path = tmp_path_factory.mktemp("ppo")
    tiny_llama(initializer_range=0.3).save_pretrained(path / "policy")
    tiny_qrm().save_pretrained(path / "qrm")
    for name in ("policy", "qrm"):
        tiny_tokenizer().save_pretrained(path / name)
    tiny_prompts().save_to_disk(path / "prompts")
    settings = {
        "model_name_or_path": str(path / "policy"),
        "reward_model": str(path / "qrm"),
        "dataset_name": str(path / "prompts"),
        "output_dir": str(path / "out"),
        "dtype": "float32",
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "num_ppo_epochs": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (path / "ppo.yaml").write_text(yaml.safe_dump(settings))
    return path


def history(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def answers(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["prompt"]: row["completion"] for row in rows}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("config", "lora"), [("ddp_cpu", True), ("zero2", True), ("zero3", True), ("zero3", False)])
def test_two_ranks_train_and_save(folder, tmp_path, config, lora):
    output = tmp_path / "out"
    flags = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"] if lora else []
    command = ["recipes/ppo.py", "--config", folder / "ppo.yaml", "--risk", "cvar:0.1", "--output_dir", output, *flags]
    command += ["--log_completions", "true"]
    launch(cpu_config(config, tmp_path, 2), *command)

    entries = history(output)
    assert [entry["step"] for entry in entries if "policy/loss" in entry] == [1, 2, 3, 4]
    assert entries[0]["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert "reward/rating_mean" in entries[0]
    ranks = [answers(output / "completions" / f"step_000000_rank_{rank}.jsonl") for rank in (0, 1)]
    shared = ranks[0].keys() & ranks[1].keys()
    assert shared, "both ranks saw some prompt"
    assert any(ranks[0][prompt] != ranks[1][prompt] for prompt in shared), "ranks sample with seeds of their own"
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    tuned = PeftModel.from_pretrained(policy, output).merge_and_unload() if lora else None
    tuned = tuned or AutoModelForCausalLM.from_pretrained(output)
    assert any(not start[name].equal(tensor) for name, tensor in tuned.state_dict().items())
    assert load_file(output / "critic" / "model.safetensors")["value_head.linear.weight"].abs().sum() > 0


def run_recipe(folder, *flags):
    """The recipe without a launcher; its exit code and the last line it printed."""
    result = subprocess.run(
        [sys.executable, "recipes/ppo.py", "--config", str(folder / "ppo.yaml"), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_bad_flags_end_in_one_clear_message(folder, tmp_path):
    code, output = run_recipe(folder, "--risk", "cvar:1.5", "--output_dir", str(tmp_path / "a"))
    assert code != 0
    assert "error: " in output
    assert "cvar:0.1" in output, "the message shows a valid example"
    assert "Traceback" not in output
    assert not (tmp_path / "a").exists()
    code, output = run_recipe(folder, "--unknown_flag", "1")
    assert code != 0
    assert "unknown_flag" in output


def test_a_reward_model_that_names_nothing_is_refused_before_any_is_loaded(folder, tmp_path):
    recipe = load_recipe("ppo")
    data, model = recipe.DataArguments(dataset_name="prompts"), ModelConfig(model_name_or_path="policy")
    args = PPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    for spec, message in (
        (f"ensmble:{folder}/qrm", r"unknown kind of reward model 'ensmble'.*by example"),
        (f"mixture:0.5*{folder}/qrm+0.5*{folder}/none", "none does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.check_arguments(data, recipe.RewardArguments(reward_model=spec), args, model)


def test_flags_of_the_objective_reach_it():
    recipe = load_recipe("ppo")
    settings = {"risk": "mean", "constraint": ["mean >= 1"], "constraint_step_size": 0.3, "population_decay": 0.25}
    settings |= {"constraint_warmup": [0.2, 0.6], "risk_schedule": "linear", "risk_schedule_from": "cvar:0.5"}
    reward = recipe.RewardArguments(**settings)
    objective = build_objectives(reward.risk, **recipe.risk_settings(reward))[WHOLE]
    assert (objective.warmup, objective.dual.step_size, objective.tracker.decay) == ((0.2, 0.6), 0.3, 0.25)
    assert objective.spec == "cvar:0.5 -> mean (linear, 0 to 1); mean >= 1 (warm-up 0.2 to 0.6)"
    assert recipe.risk_settings(recipe.RewardArguments())["constraint_warmup"] is None
    with pytest.raises(ValueError, match="constraint_warmup takes two shares"):
        recipe.risk_settings(recipe.RewardArguments(constraint_warmup=[0.2]))


@pytest.mark.slow
def test_help_names_every_group_of_settings():
    result = subprocess.run(
        [sys.executable, "recipes/ppo.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0
    for flag in ("--risk", "--reward_model", "--kl_target", "--critic", "--lora_r", "--dataset_name"):
        assert flag in result.stdout
