"""Best of n as people run it: from a completions file to a selected one, and on to the judge."""

import json

import pytest
import torch
from distributed.launching import load_recipe
from tiny import candidate_rows, tiny_qrm, tiny_tokenizer
from trl import TrlParser

from eval.records import read_jsonl, write_jsonl
from eval.selection import best_of_n_kl
from rlhf.reward_function import RiskReward

recipe, evaluation = load_recipe("best_of_n"), load_recipe("evaluate")
WORDS = ["the", "a", "red", "green", "blue", "good", "bad", "fine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model, a judge, and three completions for each of eight prompts."""
    path = tmp_path_factory.mktemp("best_of_n")
    for name, seed in (("reward", 2), ("judge", 9)):
        tiny_qrm(seed=seed).save_pretrained(path / name)
        tiny_tokenizer().save_pretrained(path / name)
    rows = candidate_rows(WORDS)
    write_jsonl(path / "base.jsonl", rows)
    return path


def run(folder, output, *flags):
    settings = ["--completions", folder / "base.jsonl", "--reward_model", folder / "reward", "--output", output]
    parser = TrlParser((recipe.SelectionArguments,))
    recipe.main(*parser.parse_args_and_config([str(x) for x in [*settings, "--use_cpu", "true", *flags]]))


def test_response_scope_takes_the_highest_utility(folder, tmp_path, capsys):
    run(folder, tmp_path / "best.jsonl", "--risk", "cvar:0.2")
    rows, found = read_jsonl(folder / "base.jsonl"), read_jsonl(tmp_path / "best.jsonl")
    reward = RiskReward(str(folder / "reward"), "cvar:0.2")
    utilities = torch.tensor(reward([r["prompt"] for r in rows], [r["completion"] for r in rows])).reshape(8, 3)
    assert [r["sample"] for r in found] == utilities.argmax(dim=1).tolist()
    assert len({r["sample"] for r in found}) > 1
    assert [r["prompt_id"] for r in found] == WORDS
    for r, of_prompt in zip(found, utilities, strict=True):
        assert r["selection"]["utility"] == pytest.approx(of_prompt.max().item(), rel=1e-5)
        assert r["selection"]["models"] == [str(folder / "reward")]
        assert r["kl_k1_sum"] == pytest.approx(0.25 * r["sample"] + best_of_n_kl(3))
        assert r["model"] == "best"
    printed = capsys.readouterr().out
    assert "the best of 3" in printed
    assert "8 prompts, 9.0 tokens drawn for each, at most 0.43 nats" in printed


def test_population_scope_has_the_better_population(folder, tmp_path, capsys):
    values = {}
    for scope in recipe.SCOPES:
        run(folder, tmp_path / f"{scope}.jsonl", "--risk", "cvar:0.3", "--risk_scope", scope, "--name", scope)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("the best of 3"))
        values[scope] = float(line.split()[5])
        assert {r["selection"]["scope"] for r in read_jsonl(tmp_path / f"{scope}.jsonl")} == {scope}
    assert values["population"] >= values["response"]


def test_the_selection_is_judged_beside_its_source(folder, tmp_path, capsys):
    run(folder, tmp_path / "best.jsonl", "--n", 2)
    groups = (
        evaluation.PolicyArguments,
        evaluation.PromptArguments,
        evaluation.JudgeArguments,
        evaluation.OutputArguments,
    )
    files = ["--completions", f"base={folder / 'base.jsonl'}", f"best={tmp_path / 'best.jsonl'}"]
    common = [*files, "--resamples", 200, "--output_dir", tmp_path / "out", "--use_cpu", "true"]

    def evaluate(*flags):
        evaluation.main(*TrlParser(groups).parse_args_and_config([str(x) for x in [*common, *flags]]))

    evaluate("--judge", f"qrm:{folder / 'judge'}")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(p["name"], p["n"], p["prompts"]) for p in report["policies"]] == [("base", 24, 8), ("best", 8, 8)]
    selected = read_jsonl(tmp_path / "best.jsonl")
    assert report["policies"][1]["kl"] == pytest.approx(sum(r["kl_k1_sum"] for r in selected) / 8)
    assert any("best: the best of 2 by mean, response scope, at 2 times" in note for note in report["warnings"])
    assert {c["policy"] for c in report["comparisons"]} == {"best"}
    with pytest.raises(ValueError, match=r"best was selected by .*reward, which cannot judge its own selection"):
        evaluate("--judge", f"qrm:{folder / 'reward'}")
    with pytest.raises(ValueError, match="two entries would both be called 'best'"):
        evaluate("--judge", "vader", "--policies", "best=x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--risk", "cvar:2"], "lower-tail mass"),
        (["--risk_scope", "prompt"], "response or population, got 'prompt'"),
        (["--risk", "python:math:fsum", "--risk_scope", "population"], "response scope only"),
        (["--n", 4], "best of 4 needs 4 completions"),
        (["--reward_model", "/nowhere/model"], "/nowhere/model"),
        (["--completions", "/nowhere/rows.jsonl"], "does not exist"),
        (["--output", "best.txt"], r"another .jsonl file"),
        (["--max_rounds", 0], "at least 1"),
    ],
)
def test_bad_settings_end_in_one_line(folder, tmp_path, flags, message, monkeypatch):
    monkeypatch.setattr(recipe, "candidate_laws", None)  # nothing may get that far
    with pytest.raises(SystemExit, match=message) as error:
        run(folder, tmp_path / "best.jsonl", *flags)
    assert str(error.value).startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_the_output_does_not_replace_the_candidates(folder):
    with pytest.raises(SystemExit, match=r"another .jsonl file"):
        run(folder, folder / "base.jsonl")


def test_drawing_within_a_kl(folder, tmp_path, capsys):
    for seed in (0, 1):
        run(folder, tmp_path / f"soft{seed}.jsonl", "--kl", 0.2, "--seed", seed, "--risk_scope", "population")
    assert "one of 3" in (printed := capsys.readouterr().out)
    assert "at most 0.20 nats" in printed
    first, second = (read_jsonl(tmp_path / f"soft{seed}.jsonl") for seed in (0, 1))
    assert [r["sample"] for r in first] != [r["sample"] for r in second]
    for r in first:
        assert r["kl_k1_sum"] == pytest.approx(0.25 * r["sample"] + 0.2)
        assert (r["selection"]["kl"], r["selection"]["seed"]) == (0.2, 0)
    with pytest.raises(SystemExit, match="up to a KL of"):
        run(folder, tmp_path / "far.jsonl", "--kl", 5)
    with pytest.raises(SystemExit, match="distance above 0"):
        run(folder, tmp_path / "far.jsonl", "--kl", -1)
