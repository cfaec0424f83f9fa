"""The reward model recipe as people start it: from YAML and flags, on one rank and on two."""

import json

import pytest
import torch
import yaml
from distributed.launching import ROOT, cpu_config, launch, load_recipe
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import TrlParser

from reward.calibration import calibration_report
from reward.data import RatingCollator, load_ratings, pad_ratings, rating_dataset, rating_row
from reward.features import trunk_features
from reward.modeling import QRMForSequenceClassification
from reward.quantile_regression import fit_linear_quantiles
from reward.training import predict_quantiles, tokenize_ratings

recipe = load_recipe("train_qrm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trunk, ratings in two splits, and a YAML file that names them."""
    path = tmp_path_factory.mktemp("qrm")
    tiny_llama().save_pretrained(path / "trunk")
    tiny_tokenizer().save_pretrained(path / "trunk")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(60):
        kind, mean = [("good", 2.0), ("bad", -2.0), ("fine", 0.5)][index % 3]
        text = " ".join(["the film is", "a very"][index % 2 : 1 + index % 2] + [kind] * (1 + index // 6))
        ratings = (mean + torch.randn(3 + index % 4, generator=generator)).tolist()
        rows.append(
            rating_row(text, ratings, source=["x", "y"][index % 2], split="test" if index % 5 == 0 else "train")
        )
    rating_dataset(rows).save_to_disk(str(path / "ratings"))
    both = [
        rating_row(row["text"], {"mood": row["ratings"], "length": len(row["text"].split()) if n % 3 else None})
        | {"split": row["split"]}
        for n, row in enumerate(rows)
    ]
    rating_dataset(both).save_to_disk(str(path / "attributes"))
    pairs = [
        {"prompt": f"{'very ' * (index % 10)}{'film ' * (1 + index // 10)}", "chosen": "good fine", "rejected": "bad"}
        for index in range(60)
    ]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    settings = {
        "model_name_or_path": str(path / "trunk"),
        "dataset_name": str(path / "ratings"),
        "dataset_split": "train",
        "eval_dataset_split": "test",
        "pooling": "mean",
        "output_dir": str(path / "out"),
        "per_device_train_batch_size": 6,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (path / "qrm.yaml").write_text(yaml.safe_dump(settings))
    return path


def run(folder, *flags):
    """The recipe in this process."""
    groups = (recipe.DataArguments, recipe.HeadArguments, recipe.QRMTrainingArguments, recipe.ModelConfig)
    arguments = ["--config", str(folder / "qrm.yaml"), *map(str, flags)]
    recipe.main(*TrlParser(groups).parse_args_and_config(arguments))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_peft", "true", "--lora_r", "2", "--lora_dropout", "0.0", "--num_frozen_layers", "1"],
        ["--frozen_trunk", "true", "--num_train_epochs", "20", "--learning_rate", "0.02"],
        [
            "--head_type",
            "mlp",
            "--head_layers",
            "-1",
            "1",
            "--num_backbone_layers",
            "1",
            "--quantile_levels",
            "0.1",
            "0.9",
        ],
    ],
    ids=["whole model", "lora", "frozen trunk", "shorter trunk"],
)
def test_a_run_leaves_a_model_its_calibration_and_a_card(folder, tmp_path, flags):
    output = tmp_path / "out"
    run(folder, "--output_dir", output, *flags)
    report = json.loads((output / "calibration.json").read_text())
    assert report["texts"] == 12
    assert set(report["sources"]) == {"x", "y"}
    assert report["skill"] > 0.02
    assert report["trained_on"]["texts"] == 48
    assert f"{report['pinball']:.4f}" in (output / "README.md").read_text()
    # The model on disk is the one that was measured.
    model = AutoModelForSequenceClassification.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    rows = load_ratings(folder / "ratings", split="test")
    constant = torch.zeros(len(model.levels))
    with torch.no_grad():
        quantiles = model(**tokenizer(rows["text"][:], padding=True, return_tensors="pt")).quantiles
    again = calibration_report(quantiles, rows["ratings"][:], rows["source"][:], model.levels, constant)
    assert again["pinball"] == pytest.approx(report["pinball"], rel=1e-4)
    assert report["levels"] == pytest.approx(model.levels.tolist(), abs=1e-6)


def test_heads_are_fitted_anew_on_texts_that_the_trunk_has_not_seen(folder, tmp_path, capsys):
    flags = ["--spread_weight", 0.3, "--ridge", 0.01]
    run(folder, "--output_dir", tmp_path / "a", "--calibration_share", 0.25, *flags)
    assert "36 texts for the trunk, 12 to fit the heads on afterwards." in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer.padding_side = "right"
    rows, _ = tokenize_ratings(load_ratings(folder / "ratings", split="train"), tokenizer, 512)
    kept = rows.train_test_split(0.25, seed=42)["test"]
    features = trunk_features(model, kept["input_ids"][:], RatingCollator(tokenizer), batch_size=8, device="cpu")
    fitted = fit_linear_quantiles(features, pad_ratings(kept["ratings"][:]), model.levels, ridge=[0.01])
    torch.testing.assert_close(model.quantile_head.weight, fitted.weight.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.quantile_head.bias, fitted.bias, atol=1e-5, rtol=0)
    # The report is about the model that was saved.
    report = json.loads((tmp_path / "a" / "calibration.json").read_text())
    held_out = load_ratings(folder / "ratings", split="test")
    ids, _ = tokenize_ratings(held_out, tokenizer, 512)
    quantiles, _ = predict_quantiles(model, ids["input_ids"][:], RatingCollator(tokenizer), batch_size=8, device="cpu")
    again = calibration_report(
        quantiles, held_out["ratings"][:], held_out["source"][:], model.levels, torch.zeros(len(model.levels))
    )
    assert report["pinball"] == pytest.approx(again["pinball"], abs=1e-6)


def test_the_same_seed_gives_the_same_model(folder, tmp_path):
    weights = []
    for name in ("one", "two"):
        run(folder, "--output_dir", tmp_path / name, "--max_steps", 3)
        weights.append(QRMForSequenceClassification.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_interrupted_run_resumes_to_the_same_model(folder, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(folder, "--output_dir", straight, "--max_steps", 6)
    run(folder, "--output_dir", resumed, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3)
    # What an interruption after step 3 leaves behind.
    for path in [
        *resumed.glob("*.json"),
        *resumed.glob("*.safetensors"),
        resumed / "checkpoint-6" / "trainer_state.json",
    ]:
        path.unlink()
    (resumed / "checkpoint-6").rename(tmp_path / "aside")
    run(folder, "--output_dir", resumed, "--max_steps", 6, "--resume_from_checkpoint", "true")
    first = QRMForSequenceClassification.from_pretrained(straight).state_dict()
    second = QRMForSequenceClassification.from_pretrained(resumed).state_dict()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=1e-6)


def test_pairs_beside_ratings_are_learned_and_reported(folder, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--preference_dataset_name", folder / "pairs.jsonl", "--quantile_loss", "huber", "--huber_kappa", 0.2]
    run(folder, "--output_dir", output, *flags, "--eval_strategy", "steps", "--eval_steps", 6, "--max_length", 12)
    report = json.loads((output / "calibration.json").read_text())
    wins = report["preferences"]
    assert wins["accuracy"] > 0.9
    assert wins["low"] < wins["accuracy"] <= wins["high"]
    assert wins["pairs"] + wins["trained_on"] == 60
    assert report["skill"] > 0.02
    card = (output / "README.md").read_text()
    assert f"Of {wins['pairs']} held-out preference pairs" in card
    assert "pinball" in card
    printed = capsys.readouterr().out
    for name in ("eval_loss", "eval_pinball", "eval_skill", "eval_preference_accuracy"):
        assert name in printed
    assert "train: 48 texts, 3 of them cut to 12 tokens." in printed
    assert f"train: {wins['trained_on']} pairs, " in printed


def test_an_interrupted_mixed_run_resumes_to_the_same_model(folder, tmp_path):
    """Both orders, of texts and of pairs, go on where they stood."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--preference_dataset_name", folder / "pairs.jsonl", "--max_steps", 6]
    run(folder, "--output_dir", straight, *flags)
    run(folder, "--output_dir", resumed, *flags, "--save_strategy", "steps", "--save_steps", 3)
    for path in [*resumed.glob("*.json"), *resumed.glob("*.safetensors")]:
        path.unlink()
    (resumed / "checkpoint-6").rename(tmp_path / "aside")
    run(folder, "--output_dir", resumed, *flags, "--resume_from_checkpoint", "true")
    first, second = (QRMForSequenceClassification.from_pretrained(f).state_dict() for f in (straight, resumed))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=1e-6)
    reports = [json.loads((f / "calibration.json").read_text()) for f in (straight, resumed)]
    assert reports[0]["preferences"] == reports[1]["preferences"]


def test_pairs_alone_are_enough(folder, tmp_path):
    output = tmp_path / "out"
    flags = ["--dataset_name", "", "--preference_dataset_name", folder / "pairs.jsonl"]
    run(folder, "--output_dir", output, *flags)
    report = json.loads((output / "calibration.json").read_text())
    assert report["preferences"]["accuracy"] > 0.9
    assert "pinball" not in report
    assert "read its score, not its quantiles" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [[], ["--frozen_trunk", "true"], ["--preference_dataset_name", "pairs.jsonl"]],
    ids=["end to end", "frozen trunk", "with pairs"],
)
def test_several_attributes_are_trained_and_reported_apart(folder, tmp_path, flags):
    output = tmp_path / "out"
    flags = [folder / flag if flag == "pairs.jsonl" else flag for flag in flags]
    # Column `attributes` of the saved data names them.
    run(folder, "--dataset_name", folder / "attributes", "--output_dir", output, "--max_steps", 30, *flags)
    report = json.loads((output / "calibration.json").read_text())
    assert list(report["attributes"]) == ["mood", "length"]
    assert report["attributes"]["mood"]["texts"] == 12
    assert report["attributes"]["length"]["texts"] == 8  # every third text has no rating of it
    assert report["attributes"]["mood"]["skill"] > 0.02
    assert "### length" in (output / "README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.attribute_names == ["mood", "length"]
    with torch.no_grad():
        laws = model(torch.tensor([[5, 6, 8]])).attribute_quantiles
    assert laws.shape == (1, 2, 19)


def test_attributes_come_from_columns_and_take_other_names(folder, tmp_path):
    lines = [
        {"text": "very " * n + "good", "stars": n % 5, "words": [n, n + 1], "split": ["a", "b"][n % 2]}
        for n in range(1, 20)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--dataset_name", tmp_path / "r.jsonl", "--dataset_split", "a", "--eval_dataset_split", "b"]
    flags += ["--ratings_column", "stars", "words", "--attribute_names", "quality", "length", "--max_steps", 1]
    run(folder, "--output_dir", tmp_path / "out", *flags, "--max_length", 4)
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert list(report["attributes"]) == ["quality", "length"]


def test_a_flag_overrides_the_file(folder, tmp_path):
    run(folder, "--output_dir", tmp_path / "out", "--max_steps", 1, "--quantile_levels", 0.2, 0.5, 0.7)
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["levels"] == [0.2, 0.5, 0.7]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--dataset_name", "./nowhere"], FileNotFoundError, "nowhere"),
        (["--dataset_split", "nope"], ValueError, r"no split 'nope'"),
        (["--eval_dataset_split", "train"], ValueError, "held-out ratings are required"),
        (["--dataset_name", ""], ValueError, "--dataset_name is required"),
        (["--model_name_or_path", ""], ValueError, "--model_name_or_path is required"),
        (["--ratings_column", "stars"], ValueError, r"no column 'stars'"),
        (["--quantile_levels", "0.5", "0.5"], ValueError, "increas"),
        (["--quantile_levels", "0.5", "1.5"], ValueError, "0, 1"),
        (["--pooling", "max"], ValueError, "last_token, mean"),
        (["--num_backbone_layers", "9"], ValueError, "1 to 2"),
        (["--num_frozen_layers", "9"], ValueError, "has 2 layers"),
        (["--frozen_trunk", "true", "--use_peft", "true"], ValueError, "exclude each other"),
        (["--max_length", "0"], ValueError, "max_length"),
        (["--head_learning_rate", "-1"], ValueError, "head_learning_rate"),
        (["--truncation_side", "middle"], ValueError, "left or right"),
        (["--ratings_column", "ratings", "ratings"], ValueError, "named more than once"),
        (["--frozen_trunk", "true", "--quantile_loss", "huber"], ValueError, "end-to-end"),
        (["--frozen_trunk", "true", "--preference_dataset_name", "x.jsonl"], ValueError, "train_gate"),
        (["--preference_dataset_name", "./nowhere.jsonl"], FileNotFoundError, "nowhere"),
        (["--spread_weight", "-1"], ValueError, "spread_weight must be 0 or more"),
        (["--calibration_share", "1"], ValueError, "below 1"),
        (["--frozen_trunk", "true", "--calibration_share", "0.1"], ValueError, "not for a frozen trunk"),
        (["--preference_dataset_name", "x.jsonl", "--calibration_share", "0.1"], ValueError, "undo the preference"),
    ],
)
def test_bad_input_is_one_clear_error(folder, tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        run(folder, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_texts_on_both_sides_are_refused(folder, tmp_path):
    rows = [rating_row("the film", [1.0, 2.0], split=split) for split in ("train", "test")]
    rating_dataset(rows).save_to_disk(str(tmp_path / "ratings"))
    with pytest.raises(ValueError, match="1 texts are both trained on and held out"):
        run(folder, "--dataset_name", tmp_path / "ratings", "--output_dir", tmp_path / "out")


def test_a_folder_with_something_in_it_is_kept(folder, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("kept")
    with pytest.raises(ValueError, match="not empty"):
        run(folder, "--output_dir", output)
    run(folder, "--output_dir", output, "--max_steps", 1, "--overwrite_output_dir", "true")
    assert (output / "precious.txt").read_text() == "kept"
    assert (output / "calibration.json").exists()


@pytest.mark.parametrize("name", ["qrm", "judge"])
def test_the_shipped_settings_parse(name):
    groups = (recipe.DataArguments, recipe.HeadArguments, recipe.QRMTrainingArguments, recipe.ModelConfig)
    path = ROOT / "recipes" / "smollm2" / f"{name}.yaml"
    data, _, args, _ = TrlParser(groups).parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    assert data.dataset_split == {"qrm": "reward", "judge": "judge"}[name]
    assert data.eval_dataset_split == "evaluation"
    assert args.output_dir == f"runs/quickstart/{name}"


def test_the_settings_of_the_8b_model_pass_the_checks():
    groups = (recipe.DataArguments, recipe.HeadArguments, recipe.QRMTrainingArguments, recipe.ModelConfig)
    path = ROOT / "recipes" / "llama3_8b" / "qrm.yaml"
    data, _, args, model = TrlParser(groups).parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    recipe.check_arguments(data, args, model)
    assert args.frozen_trunk
    assert args.output_dir == yaml.safe_load((path.parent / "gate.yaml").read_text())["model_name_or_path"]


def test_reward_model_and_judge_share_neither_trunk_nor_texts():
    settings = [
        yaml.safe_load((ROOT / "recipes" / "smollm2" / f"{name}.yaml").read_text()) for name in ("qrm", "judge")
    ]
    for key in ("model_name_or_path", "dataset_split", "output_dir"):
        assert settings[0][key] != settings[1][key]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--frozen_trunk", "true", "--num_train_epochs", "3"],
        ["--calibration_share", "0.25", "--spread_weight", "0.3", "--ridge", "0.01"],
        ["--preference_dataset_name", "pairs.jsonl"],
    ],
    ids=["whole", "frozen", "anew", "pairs"],
)
def test_two_ranks_give_the_model_of_one(folder, tmp_path, flags):
    """Three texts on each of two ranks are the six of one rank: same steps, same held-out numbers."""
    reports = {}
    for ranks, name, size in ((1, "cpu", 6), (2, "ddp_cpu", 3)):
        output = tmp_path / str(ranks)
        # A frozen trunk's heads are fitted on every rank in full, so there the batch stays as it is.
        size = 6 if "--frozen_trunk" in flags else size
        flags = [str(folder / flag) if flag == "pairs.jsonl" else flag for flag in flags]
        launch(
            cpu_config(name, tmp_path, ranks),
            *("recipes/train_qrm.py", "--config", folder / "qrm.yaml", "--output_dir", output),
            *(
                "--per_device_train_batch_size",
                size,
                "--train_sampling_strategy",
                "sequential",
                "--max_steps",
                8,
                *flags,
            ),
        )
        reports[ranks] = json.loads((output / "calibration.json").read_text())
    assert reports[2]["pinball"] == pytest.approx(reports[1]["pinball"], rel=1e-4)
    assert reports[2]["crossing_rate"] == pytest.approx(reports[1]["crossing_rate"], abs=1e-6)
    assert reports[2]["texts"] == 12
    assert ("preferences" in reports[2]) == ("--preference_dataset_name" in flags)
    assert reports[2].get("preferences") == reports[1].get("preferences")
