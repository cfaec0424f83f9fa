"""The gate recipe as people start it: from a model with several attributes and a file of pairs to a gated model."""

import itertools
import json

import pytest
import torch
from distributed.launching import ROOT, load_recipe
from tiny import tiny_qrm, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import TrlParser

from reward.distribution import RewardDistribution
from reward.preferences import preference_row

NAMES = ["helpfulness", "verbosity"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
WORDS = ["<user>", "<assistant>", "<end>", "the", "film", "is", "good", "bad", "fine", "very", "not", "risky"]


recipe = load_recipe("train_gate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and pairs in which questions about films prefer the first attribute and the others the second."""
    path = tmp_path_factory.mktemp("gate")
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = TEMPLATE
    model = tiny_qrm(attribute_names=NAMES, quantile_levels=[0.1, 0.5, 0.9], gate_hidden_size=16, gate_temperature=0.5)
    model.save_pretrained(path / "qrm")
    tokenizer.save_pretrained(path / "qrm")
    rows = []
    answers = list(itertools.product(WORDS[3:], WORDS[3:]))
    generator = torch.Generator().manual_seed(0)
    for index in range(240):
        words = " ".join(answers[index * 7 % len(answers)])
        question = [f"is the film {words}", f"{words} very risky"][index % 2]
        first, second = torch.randint(len(answers), (2,), generator=generator).tolist()
        if first == second:
            continue
        talks = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(answers[place])}]
            for place in (first, second)
        ]
        texts = preference_row({"chosen": talks[0], "rejected": talks[1]}, tokenizer)
        ids = tokenizer([texts["chosen"], texts["rejected"]], return_tensors="pt", padding=True)
        with torch.no_grad():
            laws = RewardDistribution(levels=model.levels, values=model(**ids).attribute_quantiles).mean()
        better = int(laws[1, index % 2] > laws[0, index % 2])
        rows.append({"chosen": talks[better], "rejected": talks[1 - better]})
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = [{"prompt": "film " * n, "chosen": "very good", "rejected": "bad"} for n in range(1, 40)]
    (path / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    return path


def run(folder, output, *flags):
    """The recipe in this process."""
    arguments = {
        "--model_name_or_path": folder / "qrm",
        "--preference_dataset_name": folder / "pairs.jsonl",
        "--output_dir": output,
        "--num_steps": 60,
        "--batch_size": 40,
        "--learning_rate": 0.02,
        "--validation_share": 0.2,
        "--test_share": 0.3,
        "--use_cpu": "true",
    }
    line = [str(part) for pair in arguments.items() for part in pair] + [str(flag) for flag in flags]
    recipe.main(*TrlParser((recipe.PairArguments, recipe.GateArguments)).parse_args_and_config(line))
    return json.loads((output / "gate.json").read_text())


def test_a_run_leaves_a_gated_model_and_its_held_out_accuracy(folder, tmp_path, capsys):
    report = run(folder, tmp_path / "out")
    assert report["accuracy"] > 0.8
    assert report["low"] < report["accuracy"] < report["high"]
    # Nothing that ignores the question can know which attribute counts.
    assert max(numbers["accuracy"] for numbers in report["without_gate"].values()) < report["accuracy"] - 0.05
    assert set(report["without_gate"]) == {"equal weights", *NAMES}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report['accuracy']:.1%}" in card
    assert "| equal weights |" in card
    assert "0 pairs dropped" in capsys.readouterr().out
    # The model on disk reads the question by itself, and has the weights that were measured.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.gate_marker == tokenizer("<end> <assistant>")["input_ids"]
    before = AutoModelForSequenceClassification.from_pretrained(folder / "qrm").eval()
    texts = [f"<user> {q} <end> <assistant> good <end>" for q in ("is the film fine", "fine very risky")]
    with torch.no_grad():
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        output, untouched = model(**inputs), before(**inputs)
    assert output.attribute_weights[0, 0] > 0.7
    assert output.attribute_weights[1, 1] > 0.7
    torch.testing.assert_close(output.attribute_quantiles, untouched.attribute_quantiles)


def test_verbosity_is_taken_out_and_stays_out(folder, tmp_path):
    report = run(
        folder, tmp_path / "out", "--debias_attribute", "verbosity", "--num_steps", 5, "--gate_hidden_size", 8
    )
    assert report["penalties"]["verbosity"] == 0.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.attribute_transform[1] == [-report["penalties"]["helpfulness"], 0.0]
    assert model.config.gate_hidden_size == model.attribute_gate[0].out_features == 8


def test_texts_are_weighed_by_the_pooled_state_and_long_ones_counted(folder, tmp_path, capsys):
    flags = ["--preference_dataset_name", folder / "plain.jsonl", "--num_steps", 2, "--max_length", 6]
    report = run(folder, tmp_path / "out", *flags)
    assert report["gate_marker"] is None
    assert "texts cut to 6 tokens" in capsys.readouterr().out


def test_the_card_keeps_the_calibration_of_the_attributes(folder, tmp_path):
    part = {
        "texts": 1,
        "ratings": 2,
        "pinball": 0.125,
        "pinball_constant": 0.5,
        "skill": 0.75,
        "skill_half_width": 0.1,
    }
    part |= {"mean_correlation": 0.5, "std_correlation": 0.25, "sources": {}}
    part |= {"coverage": [{"level": 0.5, "coverage": 0.5, "low": 0.4, "high": 0.6}]}
    report = {"trunk": "t", "levels": [0.5], "crossing_rate": 0.0, "attributes": dict.fromkeys(NAMES, part)}
    report["trained_on"] = {"dataset": "d", "split": "s", "texts": 9}
    source = folder / "qrm" / "calibration.json"
    source.write_text(json.dumps(report))
    try:
        run(folder, tmp_path / "out", "--num_steps", 1)
    finally:
        source.unlink()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "### helpfulness" in card
    assert "| all | 1 | 2 | 0.1250 |" in card
    assert "its gate trained by Bradley-Terry on" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", ""], "--model_name_or_path is required"),
        (["--debias_attribute", "length"], r"one of \['helpfulness', 'verbosity'\], got 'length'"),
        (["--gate_position", "start"], "auto, marker or pooled"),
        (["--num_steps", "0"], "num_steps must be positive"),
        (["--validation_share", "0.8"], "leave pairs to train on"),
        (["--max_length", "3"], "lose their prompt when cut to 3 tokens"),
        (["--gate_temperature", "-1"], "gate_temperature must be positive"),
    ],
)
def test_bad_input_is_one_clear_error(folder, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "gate.json").exists()


def test_the_shipped_settings_pass_the_checks():
    path = ROOT / "recipes" / "llama3_8b" / "gate.yaml"
    groups = (recipe.PairArguments, recipe.GateArguments)
    data, gate = TrlParser(groups).parse_args_and_config(["--config", str(path)])
    recipe.check_arguments(data, gate)
    assert gate.debias_attribute == "verbosity"
    assert gate.learning_rate == 1e-3


def test_a_marker_needs_conversations(folder, tmp_path):
    flags = ["--preference_dataset_name", folder / "plain.jsonl", "--gate_position", "marker"]
    with pytest.raises(ValueError, match="needs conversations"):
        run(folder, tmp_path / "out", *flags)


def test_a_model_with_one_attribute_is_refused(folder, tmp_path):
    tiny_qrm().save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="rates one attribute"):
        run(folder, tmp_path / "out", "--model_name_or_path", tmp_path / "one")


def test_pairs_on_both_sides_are_refused_and_a_full_folder_kept(folder, tmp_path):
    with pytest.raises(ValueError, match="both trained on and held out"):
        run(folder, tmp_path / "out", "--eval_preference_dataset_name", folder / "pairs.jsonl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("kept")
    with pytest.raises(ValueError, match="not empty"):
        run(folder, tmp_path / "full")
    with pytest.raises(ValueError, match="a folder of its own"):
        run(folder, folder / "qrm", "--overwrite_output_dir", "true")
