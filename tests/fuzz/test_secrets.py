"""What must never be written: tokens of the environment and of the settings, into no file of a run."""

import json
from pathlib import Path

import pytest
import yaml
from distributed.launching import load_recipe
from tiny import tiny_config, tiny_llama, tiny_qrm, tiny_tokenizer, tiny_trainer
from transformers import TrainerCallback
from trl import TrlParser

from reward.data import RatingCollator, rating_dataset, rating_row
from reward.secrets import is_secret, without_secrets
from reward.training import QRMTrainer, QRMTrainingArguments, save_reward_model, tokenize_ratings

SECRETS = {"HF_TOKEN": "hf_5ecretofthehub", "WANDB_API_KEY": "5ecretofwandb", "MY_PASSWORD": "5ecretofmine"}
HUB_TOKEN = "hf_5ecretofthesettings"
MODEL_TOKEN = "hf_5ecretofthemodel"


@pytest.fixture
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def leaks(folder, printed):
    """Files, and the terminal, that hold a secret."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 5
    files["terminal"] = (printed.out + printed.err).encode()
    wanted = [secret.encode() for secret in (*SECRETS.values(), HUB_TOKEN, MODEL_TOKEN)]
    return [name for name, content in files.items() if any(secret in content for secret in wanted)]


class Tracker(TrainerCallback):
    """Stores the settings as W&B and the others do."""

    def on_train_begin(self, args, state, control, **kwargs):
        shown = (args.to_dict(), args.to_sanitized_dict(), args.to_json_string(), str(args), repr(args))
        Path(args.output_dir, "tracked.txt").write_text(str(shown))


def test_a_ppo_run_writes_no_secret(tmp_path, environment, capfd):
    tiny_llama().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    folder = tmp_path / "run"
    trainer = tiny_trainer(
        folder, model=str(tmp_path / "policy"), model_init_kwargs={"token": MODEL_TOKEN}, hub_token=HUB_TOKEN,
        max_steps=2, save_strategy="steps", save_steps=1, log_completions=True, callbacks=[Tracker()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))
    trainer.save_state()
    trainer.create_model_card(model_name="a policy")
    assert leaks(folder, capfd.readouterr()) == []
    # What the run itself uses is untouched, and what is written names what was left out.
    assert trainer.args.model_init_kwargs["token"] == MODEL_TOKEN
    for written in (folder, folder / "checkpoint-1", folder / "checkpoint-2"):
        config = json.loads((written / "ppo_config.json").read_text())
        assert (config["model_init_kwargs"]["token"], config["hub_token"]) == ("<TOKEN>", "<HUB_TOKEN>")
    # The negative control: the search does see them.
    (folder / "leak.txt").write_text(f"token={MODEL_TOKEN}")
    assert leaks(folder, capfd.readouterr()) == ["leak.txt"]


def test_a_resumed_run_takes_its_secrets_from_its_caller(tmp_path):
    tiny_trainer(tmp_path, hub_token=HUB_TOKEN, max_steps=2, save_strategy="steps", save_steps=2).train()
    later = tiny_trainer(tmp_path, hub_token=HUB_TOKEN, max_steps=3, resume_from_checkpoint="auto")
    later.train("auto")
    assert (later.state.global_step, later.args.hub_token) == (3, HUB_TOKEN)


SECRET_NAMES = [
    "token", "hub_token", "HF_TOKEN", "use_auth_token", "auth-token", "apiKey", "api_key", "WANDB_API_KEY",
    "password", "my_password", "client_secret", "aws_access_key_id", "aws_secret_access_key", "token_value",
    "credentials", "refreshToken",
]  # fmt: skip
PLAIN_NAMES = [
    "max_new_tokens", "min_new_tokens", "pad_token", "pad_token_id", "eos_token", "stop_tokens",
    "token_type_ids", "tokenizer", "tokenizer_name", "add_special_tokens", "include_num_input_tokens_seen",
    "forced_bos_token_id", "kl_per_token", "key", "keys_to_ignore", "average_tokens_across_devices",
    "additional_special_tokens", "passes", "secretary",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES + PLAIN_NAMES)
def test_a_secret_is_known_by_its_name(name):
    assert is_secret(name) == (name in SECRET_NAMES)


def test_secrets_are_masked_at_any_depth_and_nothing_else_is(tmp_path):
    init = {"token": "x", "proxies": {"https": "http://me:x@host/"}, "use_auth_token": True, "revision": None}
    generation = {"max_new_tokens": 3, "rules": [{"api_key": "x", "eos_token_id": [1]}]}
    args = tiny_config(
        tmp_path, model_init_kwargs=init, generation_kwargs=generation, pad_token="<pad>", hub_token="x",
        chat_template_kwargs={"password": 1234, "token": None},
    )  # fmt: skip
    shown = args.to_dict()
    assert shown["model_init_kwargs"] == init | {"token": "<TOKEN>", "proxies": {"https": "http://<LOGIN>@host/"}}
    assert shown["generation_kwargs"] == {
        "max_new_tokens": 3,
        "rules": [{"api_key": "<API_KEY>", "eos_token_id": [1]}],
    }
    assert shown["chat_template_kwargs"] == {"password": "<PASSWORD>", "token": None}
    assert (shown["pad_token"], shown["hub_token"]) == ("<pad>", "<HUB_TOKEN>")
    assert args.generation_kwargs["rules"][0]["api_key"] == "x"
    assert without_secrets("https://host/a@b") == "https://host/a@b"


def test_training_a_reward_model_writes_no_secret(tmp_path, environment, capfd):
    tokenizer = tiny_tokenizer()
    ratings = rating_dataset(
        [rating_row(f"the film is {word}", [i, i + 1.0]) for i, word in enumerate(("good", "bad"))]
    )
    rows, _ = tokenize_ratings(ratings, tokenizer, 16)
    args = QRMTrainingArguments(
        output_dir=str(tmp_path), hub_token=HUB_TOKEN, max_steps=2, save_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, lr_scheduler_kwargs={"token": MODEL_TOKEN}, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = QRMTrainer(
        model=tiny_qrm(), args=args, train_dataset=rows, data_collator=RatingCollator(tokenizer),
        processing_class=tokenizer, callbacks=[Tracker()],
    )  # fmt: skip
    trainer.train()
    save_reward_model(trainer, tokenizer, str(tmp_path))
    assert leaks(tmp_path, capfd.readouterr()) == []


@pytest.fixture
def material(tmp_path):
    """A reward model, a policy, ratings and prompts."""
    for name, model in (("qrm", tiny_qrm()), ("policy", tiny_llama())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"text": f"the film is {'very ' * i}good", "ratings": [i, i + 1.0]} for i in range(6)]
    (tmp_path / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": "the film " + "is " * i, "prompt_id": str(i)} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return tmp_path


@pytest.mark.parametrize("name", ["evaluate", "evaluate_reward"])
def test_an_evaluation_writes_no_secret(material, environment, capfd, name):
    settings = {"output_dir": str(material / "out"), "use_cpu": True, "resamples": 100, "batch_size": 3}
    if name == "evaluate":
        settings |= {"policies": [f"base={material / 'policy'}"], "dataset_name": str(material / "prompts.jsonl")}
        settings |= {"judge": f"qrm:{material / 'qrm'}", "max_new_tokens": 3}
    else:
        settings |= {"reward_model": str(material / "qrm"), "dataset_name": str(material / "ratings.jsonl")}
    (material / "settings.yaml").write_text(yaml.safe_dump(settings))
    recipe = load_recipe(name)
    recipe.main(*TrlParser(recipe.GROUPS).parse_args_and_config(["--config", str(material / "settings.yaml")]))
    assert leaks(material, capfd.readouterr()) == []
    assert list((material / "out").glob("*report.html"))
