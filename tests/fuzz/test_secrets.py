"""What must never be written: tokens of the environment and of the settings, into no file of a run."""

import pytest
from tiny import tiny_qrm, tiny_tokenizer, tiny_trainer

from reward.data import RatingCollator, rating_dataset, rating_row
from reward.training import QRMTrainer, QRMTrainingArguments, save_reward_model, tokenize_ratings

SECRETS = {"HF_TOKEN": "hf_5ecretofthehub", "WANDB_API_KEY": "5ecretofwandb", "MY_PASSWORD": "5ecretofmine"}
HUB_TOKEN = "hf_5ecretofthesettings"


@pytest.fixture
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def leaks(folder, printed):
    """Files, and the terminal, that hold a secret."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 5
    files["terminal"] = (printed.out + printed.err).encode()
    wanted = [secret.encode() for secret in (*SECRETS.values(), HUB_TOKEN)]
    return [name for name, content in files.items() if any(secret in content for secret in wanted)]


def test_a_ppo_run_writes_no_secret(tmp_path, environment, capfd):
    trainer = tiny_trainer(
        tmp_path, hub_token=HUB_TOKEN, max_steps=2, save_strategy="steps", save_steps=1, log_completions=True
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    trainer.save_state()
    trainer.create_model_card(model_name="a policy")
    assert leaks(tmp_path, capfd.readouterr()) == []
    # The negative control: the search does see them.
    (tmp_path / "leak.txt").write_text(f"token={HUB_TOKEN}")
    assert leaks(tmp_path, capfd.readouterr()) == ["leak.txt"]


def test_training_a_reward_model_writes_no_secret(tmp_path, environment, capfd):
    tokenizer = tiny_tokenizer()
    ratings = rating_dataset(
        [rating_row(f"the film is {word}", [i, i + 1.0]) for i, word in enumerate(("good", "bad"))]
    )
    rows, _ = tokenize_ratings(ratings, tokenizer, 16)
    args = QRMTrainingArguments(
        output_dir=str(tmp_path), hub_token=HUB_TOKEN, max_steps=2, save_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = QRMTrainer(
        model=tiny_qrm(), args=args, train_dataset=rows, data_collator=RatingCollator(tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    save_reward_model(trainer, tokenizer, str(tmp_path))
    assert leaks(tmp_path, capfd.readouterr()) == []
