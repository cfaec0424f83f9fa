"""The reward model evaluation as people start it: ratings, pairs or both, and what it refuses before it loads."""

import json

import pytest
import torch
import yaml
from distributed.launching import ROOT, load_recipe
from tiny import tiny_qrm, tiny_tokenizer
from trl import TrlParser

from eval.laws import predicted_laws
from reward.calibration import calibration_report
from reward.data import RatingCollator, load_ratings, rating_dataset, rating_row, tokenize_texts
from reward.training import constant_quantiles, predict_quantiles
from rlhf.command_line import RecipeParser
from rlhf.reward_function import RiskReward

recipe = load_recipe("evaluate_reward")
GROUPS = (recipe.ModelArguments, recipe.RatingArguments, recipe.PreferenceArguments, recipe.OutputArguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model, ratings in two splits, preference pairs, and a YAML file that names them."""
    path = tmp_path_factory.mktemp("evaluate_reward")
    tiny_qrm(pooling="mean").save_pretrained(path / "qrm")
    tiny_tokenizer().save_pretrained(path / "qrm")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(80):
        kind, mean = [("good", 2.0), ("bad", -2.0), ("fine", 0.5)][index % 3]
        text = " ".join(["the film is", "a very"][index % 2 : 1 + index % 2] + [kind] * (1 + index // 6))
        ratings = (mean + torch.randn(4 + index % 4, generator=generator)).tolist()
        rows.append(rating_row(text, ratings, source="xy"[index % 2], split="test" if index % 2 else "train"))
    rating_dataset(rows).save_to_disk(str(path / "ratings"))
    pairs = [
        {"prompt": "the film is ", "chosen": f"good {w}", "rejected": f"bad {w}", "subset": ["math-prm", "own"][i % 2]}
        for i, w in enumerate(["red", "green", "blue", "safe", "risky", "fine", "a", "the"])
    ]
    pairs.append({"prompt": "a ", "chosen": "film", "rejected": "film", "subset": "own"})
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {
        "reward_model": str(path / "qrm"),
        "batch_size": 4,
        "dataset_name": str(path / "ratings"),
        "dataset_split": "test",
        "train_dataset_split": "train",
        "preference_dataset_name": str(path / "pairs.jsonl"),
        "risks": ["mean", "cvar:0.2"],
        "resamples": 150,
        "output_dir": str(path / "out"),
        "use_cpu": True,
    }
    (path / "evaluate_reward.yaml").write_text(yaml.safe_dump(settings))
    return path


def parsed(folder, *flags):
    return TrlParser(GROUPS).parse_args_and_config(
        ["--config", str(folder / "evaluate_reward.yaml"), *map(str, flags)]
    )


@pytest.fixture(scope="module")
def finished(folder):
    recipe.main(*parsed(folder))
    return json.loads((folder / "out" / "reward_report.json").read_text())


def test_numbers_are_those_of_the_path_that_training_takes(folder, finished):
    """The same texts through `tokenize_texts` and `predict_quantiles`, and the report that training writes."""
    model, tokenizer = tiny_qrm(pooling="mean"), tiny_tokenizer()
    train, held_out = (load_ratings(folder / "ratings", split=split) for split in ("train", "test"))
    ids, truncated = tokenize_texts(held_out["text"][:], tokenizer, 64)
    quantiles, crossing_rate = predict_quantiles(model, ids, RatingCollator(tokenizer), batch_size=4, device="cpu")
    constant = constant_quantiles(train["ratings"][:], model.config.quantile_levels)
    theirs = calibration_report(
        quantiles, held_out["ratings"][:], held_out["source"][:], model.levels, constant, crossing_rate
    )
    ours = finished["ratings"]
    assert truncated == 0
    assert ours["texts"] == 40
    for key in ("pinball", "skill", "crossing_rate", "std_correlation"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-5)
    assert [row["coverage"] for row in ours["coverage"]] == [row["coverage"] for row in theirs["coverage"]]
    assert ours["margin_over_homoscedastic"]["residual_texts"] == 40
    assert 0 < ours["crossing_rate"] < 1
    assert ours["truncated_share"] == finished["preferences"]["truncated_share"] == 0


def test_pairs_are_judged_by_the_law_of_prompt_and_answer(folder, finished):
    reward = RiskReward(str(folder / "qrm"))
    words = ["red", "green", "blue", "safe", "risky", "fine", "a", "the"]
    chosen, rejected = (
        predicted_laws(reward, ["the film is "] * 8, [f"{kind} {word}" for word in words])[0]
        for kind in ("good", "bad")
    )
    measures = finished["preferences"]["measures"]
    by_mean = (chosen.mean() > rejected.mean()).float().mean().item()
    by_tail = (chosen.lower_tail_mean(0.2) > rejected.lower_tail_mean(0.2)).float().mean().item()
    assert by_mean > 0.5, "a symmetric accuracy would not notice chosen and rejected changing places"
    assert (measures["mean"]["accuracy"], measures["cvar:0.2"]["accuracy"]) == pytest.approx((by_mean, by_tail))
    part = measures["cvar:0.2"]
    assert {name: cell["n"] for name, cell in part["subsets"].items()} == {"math-prm": 4, "own": 4}
    assert set(part["rewardbench"]["sections"]) == {"Reasoning"}
    assert finished["preferences"]["equal_pairs_left_out"] == 1
    assert any("two equal answers" in warning for warning in finished["warnings"])
    page = (folder / "out" / "reward_report.html").read_text()
    for heading in ("Calibration", "Sharpness and spread", "Preference pairs"):
        assert f">{heading}</h2>" in page


def test_ratings_alone_without_a_training_split(folder, tmp_path, capsys):
    flags = ["--output_dir", tmp_path / "out", "--confidence", 0.8, "--max_length", 4]
    groups = parsed(folder, *flags)
    groups[1].train_dataset_split = groups[2].preference_dataset_name = None
    recipe.main(*groups)
    report = json.loads((tmp_path / "out" / "reward_report.json").read_text())
    assert (report["preferences"], report["ratings"]["margin_over_homoscedastic"]) == (None, None)
    assert report["ratings"]["crps"]["level"] == 0.8
    long = [len(text.split()) > 4 for text in load_ratings(folder / "ratings", split="test")["text"]]
    assert report["ratings"]["truncated_share"] == pytest.approx(sum(long) / 40)
    assert [("No training split" in w or "lost their beginning" in w) for w in report["warnings"]] == [True, True]
    printed = capsys.readouterr().out
    assert "| held-out ratings |" in printed
    assert "lost their beginning to max_length" in printed


def test_residuals_may_come_from_some_training_texts_constants_come_from_all(folder, tmp_path, finished):
    groups = parsed(folder, "--output_dir", tmp_path / "out", "--max_train_texts", 10)
    groups[2].preference_dataset_name = None
    recipe.main(*groups)
    ratings = json.loads((tmp_path / "out" / "reward_report.json").read_text())["ratings"]
    assert ratings["margin_over_homoscedastic"]["residual_texts"] == 10
    assert ratings["skill"] == pytest.approx(finished["ratings"]["skill"], abs=1e-9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward_model", ""], "--reward_model is required"),
        (["--risks", "mean", "cvra:0.1"], "cvra"),
        (["--risks", "mean", "mean"], "each once"),
        (["--confidence", "95"], "confidence level"),
        (["--train_dataset_split", "test"], "flatter the baseline"),
        (["--dataset_split", "nowhere"], "no split 'nowhere'"),
        (["--preference_dataset_split", "nowhere"], "nowhere"),
        (["--ratings_column", "stars"], "no column 'stars'"),
        (["--max_train_texts", "1"], "at least 2"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(recipe, "RiskReward", lambda *args, **kwargs: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match=message):
        recipe.main(*parsed(folder, "--output_dir", tmp_path / "out", *flags))


def test_bad_data_is_refused_before_a_model_is_loaded(folder, tmp_path, finished, monkeypatch):
    monkeypatch.setattr(recipe, "RiskReward", lambda *args, **kwargs: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match="is not empty"):
        recipe.main(*parsed(folder))
    for rows, flag, message in (
        ([{"prompt": "p", "chosen": "a"}], "--preference_dataset_name", "chosen and rejected"),
        ([{"prompt": "p", "chosen": "a", "rejected": ""}], "--preference_dataset_name", "an answer is empty"),
        ([{"text": " ", "ratings": [1.0]}, {"text": "a", "ratings": [2.0]}], "--train_dataset_name", "non-empty"),
    ):
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        groups = parsed(folder, "--output_dir", tmp_path / "out", flag, tmp_path / "bad.jsonl")
        if flag == "--train_dataset_name":
            groups[1].train_dataset_split = None
        with pytest.raises(ValueError, match=message):
            recipe.main(*groups)
    groups = parsed(folder, "--output_dir", tmp_path / "out")
    groups[1].dataset_name = groups[2].preference_dataset_name = None
    with pytest.raises(ValueError, match="or both"):
        recipe.main(*groups)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*/evaluate_reward.yaml")), ids=lambda p: p.parent.name
)
def test_shipped_settings_are_known_and_valid(path, tmp_path):
    flags = ["--config", str(path), "--output_dir", str(tmp_path)]
    groups = TrlParser(GROUPS).parse_args_and_config(flags)
    assert [measure.spec for measure in recipe.check_arguments(*groups)] == groups[2].risks
    assert groups[0].reward_model


def test_help_documents_every_flag():
    parser = RecipeParser(GROUPS, description=recipe.__doc__)
    assert "reward_report.json   every number" in parser.format_help()
    assert [action.dest for action in parser._actions if not action.help or len(action.help) < 15] == []


def test_ratings_of_several_attributes_are_refused(folder, tmp_path):
    rows = [rating_row(f"a {w}", {"fine": [1.0, 2.0 + i], "safe": [float(i)]}) for i, w in enumerate(["red", "blue"])]
    rating_dataset(rows).save_to_disk(str(tmp_path / "two"))
    groups = parsed(folder, "--dataset_name", tmp_path / "two", "--output_dir", tmp_path / "out")
    groups[1].dataset_split = groups[1].train_dataset_split = None
    with pytest.raises(ValueError, match="several attributes, \\['fine', 'safe'\\]"):
        recipe.main(*groups)


def test_conversations_are_rated_under_the_template_of_the_reward_model(folder, tmp_path, finished):
    """Without a template there is no way to read them, and the message says so before the model is loaded."""
    messages = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    rows = [{"text": messages, "ratings": [float(i), 2.0]} for i in range(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = parsed(folder, "--dataset_name", tmp_path / "chats.jsonl", "--output_dir", tmp_path / "out")
    groups[1].dataset_split = groups[1].train_dataset_split = None
    with pytest.raises(ValueError, match="no chat template"):
        recipe.main(*groups)
