"""The evaluation recipe as people start it: from YAML and flags, a second time, on one rank and on two."""

import json

import pytest
import torch
import yaml
from distributed.launching import ROOT, cpu_config, launch, load_recipe
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from trl import TrlParser

from eval.records import read_jsonl
from reward.modeling import QRMForSequenceClassification
from rlhf.command_line import RecipeParser

recipe = load_recipe("evaluate")
GROUPS = (recipe.PolicyArguments, recipe.PromptArguments, recipe.JudgeArguments, recipe.OutputArguments)
NUMBERS = ("logprob", "base_logprob", "kl_k1_sum", "kl_k3_mean")


def save_policy(folder, seed):
    model = tiny_llama(seed=seed, tie_word_embeddings=False)
    model.lm_head.weight.data *= 12
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a tuned model with its log, an adapter, a judge, prompts, and a YAML file that names them."""
    path = tmp_path_factory.mktemp("evaluate")
    base = save_policy(path / "base", 0)
    save_policy(path / "tuned", 1)
    history = [{"step": i, "reward/utility_mean": 0.1 * i, "kl/reference": 0.2 * i} for i in range(1, 6)]
    (path / "tuned" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    torch.manual_seed(3)
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(path / "base")
    adapter.save_pretrained(path / "adapter")
    judge = QRMForSequenceClassification.from_backbone(tiny_llama(seed=7), quantile_levels=[0.1, 0.5, 0.9])
    judge.quantile_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    judge.save_pretrained(path / "judge")
    tiny_tokenizer().save_pretrained(path / "judge")
    words = ["the", "a", "red", "green", "blue", "good", "bad", "fine", "film"]
    prompts = [{"prompt": f"{a} {b}", "prompt_id": f"{a}-{b}"} for a in words for b in words[:4]]
    (path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    rows = [{"level": t, "coverage": t, "low": t - 0.1, "high": t + 0.1} for t in (0.1, 0.5, 0.9)]
    (path / "calibration.json").write_text(json.dumps({"coverage": rows, "sources": {}}))
    settings = {
        "policies": [f"base={path / 'base'}", f"tuned={path / 'tuned'}", f"cvar:0.1={path / 'adapter'}"],
        "dataset_name": str(path / "prompts.jsonl"),
        "max_new_tokens": 6,
        "batch_size": 8,
        "judge": f"qrm:{path / 'judge'}",
        "rating_threshold": -0.5,
        "cvar_alpha": 0.25,
        "resamples": 200,
        "calibration": str(path / "calibration.json"),
        "output_dir": str(path / "out"),
        "use_cpu": True,
    }
    (path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    return path


def parsed(folder, *flags):
    return TrlParser(GROUPS).parse_args_and_config(["--config", str(folder / "evaluate.yaml"), *map(str, flags)])


def report_of(output):
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(folder):
    recipe.main(*parsed(folder))
    return folder / "out"


def test_a_run_leaves_completions_scores_report_and_page(finished, capsys):
    report = report_of(finished)
    assert [p["name"] for p in report["policies"]] == ["base", "tuned", "cvar:0.1"]
    assert [p["n"] for p in report["policies"]] == [36, 36, 36]
    assert report["policies"][0]["kl"] == 0.0
    assert all(p["kl_ci"][0] <= p["kl"] <= p["kl_ci"][1] for p in report["policies"])
    assert report["policies"][1]["kl"] > 0.1
    assert report["threshold_source"] == "quantile 0.05 of base"
    assert set(report["seconds"]) == {
        *(f"{stage} {name}" for stage in ("generate", "judge") for name in ("base", "tuned", "cvar:0.1")), "report",
    }  # fmt: skip
    assert len(report["comparisons"]) == 12
    for name in ("base", "tuned", "cvar_0.1"):
        rows, scores = (read_jsonl(finished / part / f"{name}.jsonl") for part in ("completions", "scores"))
        assert [r["prompt_id"] for r in rows] == [s["prompt_id"] for s in scores]
        assert len({r["fingerprint"] for r in rows}) == 1
    page = (finished / "report.html").read_text()
    for heading in ("Training", "Calibration of the reward model", "The worst completions"):
        assert f">{heading}</h2>" in page


def test_a_second_run_loads_no_model_and_finds_the_same(finished, folder, monkeypatch, capsys):
    before, files = report_of(finished), sorted(finished.rglob("*.jsonl"))
    written = [path.stat().st_mtime_ns for path in files]

    def refuse(*_, **__):
        raise AssertionError("a finished stage loaded a model")

    monkeypatch.setattr("eval.generation.load_policy", refuse)
    monkeypatch.setattr("eval.judges.RiskReward", refuse)
    recipe.main(*parsed(folder))
    after = report_of(finished)
    assert [path.stat().st_mtime_ns for path in files] == written
    assert after["policies"] == before["policies"]
    assert {k: v for k, v in after["seconds"].items() if k != "report"} == {
        k: v for k, v in before["seconds"].items() if k != "report"
    }
    table = capsys.readouterr().out
    assert "cvar:0.1 - tuned" in table
    assert str(finished / "report.html") in table


def test_a_flag_beats_the_file_and_changed_settings_start_again(finished, folder, tmp_path):
    flags = ["--policies", f"base={folder / 'base'}", "--max_prompts", 10, "--output_dir", tmp_path, "--threshold", -9]
    recipe.main(*parsed(folder, *flags))
    first = report_of(tmp_path)
    assert (first["policies"][0]["n"], first["threshold"], first["threshold_source"]) == (10, -9.0, "absolute")
    texts = [row["completion"] for row in read_jsonl(tmp_path / "completions" / "base.jsonl")]
    recipe.main(*parsed(folder, *flags, "--seed", 5, "--num_samples", 2))
    rows = read_jsonl(tmp_path / "completions" / "base.jsonl")
    assert len(rows) == len(read_jsonl(tmp_path / "scores" / "base.jsonl")) == 20
    assert [row["completion"] for row in rows][:10] != texts
    assert report_of(tmp_path)["policies"][0]["worst_of"] == 2


def test_stages_of_other_programs_join_the_report(finished, folder, tmp_path):
    (tmp_path / "earlier.json").write_text('{"train qrm": 61.25}')
    flags = ["--policies", f"base={folder / 'base'}", "--output_dir", tmp_path / "out"]
    recipe.main(*parsed(folder, *flags, "--stage_seconds", tmp_path / "earlier.json"))
    assert list(report_of(tmp_path / "out")["seconds"]) == ["train qrm", "generate base", "judge base", "report"]
    assert report_of(tmp_path / "out")["seconds"]["train qrm"] == 61.2


def test_training_logs_are_found_where_they_are(folder, tmp_path):
    sources = {"tuned": str(folder / "tuned"), "base": str(folder / "base")}
    assert list(recipe.training_histories(recipe.PolicyArguments(), sources)) == ["tuned"]
    for step in (9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    named = recipe.PolicyArguments(training_runs=[f"base={tmp_path}"])
    assert recipe.training_histories(named, sources) == {"base": [{"step": 10}]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policies", "base"], "takes NAME=PATH"),
        (["--policies", "a:b=x", "a_b=y"], "two entries would both be called 'a_b'"),
        (["--policies", "base=./nowhere"], "nowhere does not exist"),
        (["--reference", "other"], "reference 'other' is not among the policies base, tuned"),
        (["--base", "/no/model"], "/no/model does not exist"),
        (["--judge", "qmr:x"], "unknown judge"),
        (["--judge", "qrm:/no/judge"], "does not exist"),
        (["--judge_reads", "prompt"], "judge_reads is"),
        (["--cvar_alpha", "0"], "lower-tail mass in"),
        (["--confidence", "95"], "confidence level lies in"),
        (["--reference_quantile", "5"], "reference_quantile lies in"),
        (["--threshold", "nan"], "finite score"),
        (["--rating_threshold", "inf"], "finite rating"),
        (["--max_prompts", "1"], "at least 2"),
        (["--temperature", "-1"], "temperature must be"),
        (["--resamples", "5"], "resamples must be at least 100"),
        (["--calibration", "/no/calibration.json"], "calibration.json does not exist"),
        (["--training_runs", "other=x"], "none of the policies"),
        (["--training_runs", "base=/no/run"], "holds no trainer_state.json"),
        (["--dataset_name", "/no/prompts.jsonl"], "does not exist"),
    ],
)
def test_bad_input_is_refused_before_any_model_is_loaded(folder, monkeypatch, flags, message, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("long work began")

    monkeypatch.setattr("eval.generation.load_policy", refuse)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipe.main(*parsed(folder, "--output_dir", tmp_path, *flags))


@pytest.mark.parametrize("missing", ["policies", "dataset_name", "judge"])
def test_what_is_required_is_named(folder, tmp_path, missing):
    settings = yaml.safe_load((folder / "evaluate.yaml").read_text())
    del settings[missing]
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=f"--{missing} is required"):
        recipe.main(*parsed(tmp_path))


def test_prompts_without_the_column_are_refused(folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="'prompt' column"):
        recipe.main(*parsed(folder, "--dataset_name", tmp_path / "texts.jsonl", "--output_dir", tmp_path))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/evaluate.yaml")), ids=lambda p: p.parent.name)
def test_shipped_settings_are_known_and_valid(path):
    policy, prompt, judging, output = TrlParser(GROUPS).parse_args_and_config(["--config", str(path)])
    assert recipe.named_paths("policies", policy.policies)
    assert 0 < judging.cvar_alpha <= 1
    assert prompt.dataset_name
    assert output.output_dir


def test_help_documents_every_flag():
    parser = RecipeParser(GROUPS, description=recipe.__doc__)
    text = parser.format_help()
    assert "completions/NAME.jsonl   one row per completion" in text
    undocumented = [a.dest for a in parser._actions if not a.help or len(a.help) < 15]
    assert undocumented == []


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_find_what_one_does(finished, folder, tmp_path):
    config = cpu_config("ddp_cpu", tmp_path, ranks=2)
    output = launch(
        config,
        ROOT / "recipes" / "evaluate.py",
        "--config",
        folder / "evaluate.yaml",
        "--output_dir",
        tmp_path / "out",
    )
    assert output.count("verdict") == 1  # one table, from one process
    for name in ("base", "tuned", "cvar_0.1"):
        for part, fields in (("completions", NUMBERS), ("scores", ("score",))):
            one, two = (read_jsonl(root / part / f"{name}.jsonl") for root in (finished, tmp_path / "out"))
            assert [(r["prompt_id"], r.get("completion")) for r in one] == [
                (r["prompt_id"], r.get("completion")) for r in two
            ]
            for field in fields:
                assert [r[field] for r in one] == pytest.approx([r[field] for r in two], abs=1e-4)
    single, double = report_of(finished), report_of(tmp_path / "out")
    for one, two in zip(single["policies"], double["policies"], strict=True):
        assert one["mean_ci"] == pytest.approx(two["mean_ci"], abs=1e-4)
        assert one["extremely_negative_rate"] == two["extremely_negative_rate"]
