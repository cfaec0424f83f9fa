"""What `benchmarks/best_policies.py` asks of the recipes, keeps and averages; and that its result is what is told."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from distributed.launching import load_recipe

from rlhf.command_line import RecipeParser

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("best_policies")
    monkeypatch.setattr(module, "RUNS", tmp_path)
    yield module
    del sys.modules["best_policies"]


def test_every_command_is_one_that_its_recipe_takes_and_what_is_there_is_kept(benchmark, monkeypatch, tmp_path):
    compare, evaluate = load_recipe("compare_risk"), load_recipe("evaluate")
    groups = {
        "recipes/compare_risk.py": compare.GROUPS,
        "recipes/evaluate.py": (
            evaluate.PolicyArguments, evaluate.PromptArguments, evaluate.JudgeArguments, evaluate.OutputArguments,
        ),
    }  # fmt: skip
    calls = []

    def run(script, *flags):
        calls.append(script)
        arguments = RecipeParser(groups[script]).parse_args_and_config([str(flag) for flag in flags])
        if script == "recipes/evaluate.py":
            assert arguments[1].num_samples == 32
            path = Path(arguments[3].output_dir, "completions", "base.jsonl")
            path.parent.mkdir(parents=True)
            path.write_text("")
            return
        compare.check_arguments(arguments[0])
        names = ("prompts", "n", "rating_threshold", "reference_quantile", "threshold", "tilts")
        found = dict.fromkeys(names, arguments[0].n) | {"measures": [], "measures_by_the_judges_laws": []}
        path = Path(arguments[0].output_dir, "compare_risk.json")
        path.parent.mkdir()
        path.write_text(json.dumps(found))

    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.chdir(ROOT)
    first = benchmark.of_seed(1)
    assert calls == ["recipes/evaluate.py", "recipes/compare_risk.py", "recipes/compare_risk.py"]
    assert first["n"] is None
    assert benchmark.of_seed(1) == first
    assert len(calls) == 3


def test_outcomes_are_averaged_over_seeds_that_all_have_them(benchmark):
    def row(measure, mean, rate):
        return {"laws": "judge", "kl": 1.0, "measure": measure, "outcomes": {"mean": mean, "rate": rate}}

    refused = {"laws": "judge", "kl": 1.0, "measure": "cvar:0.1", "refused": "too far"}
    first = [row("mean", 1.0, 0.1), refused, row("below:-2", 1.0, 1.0)]
    second = [row("mean", 2.0, 0.4), row("cvar:0.1", 1.0, 0.1), row("below:-2", 1.0, 1.0)]
    assert benchmark.averaged([first, second]) == [row("mean", 1.5, 0.25)]


def test_the_numbers_of_the_documents_are_those_of_the_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "best_policies.json").read_text())
    rows = [
        next(
            row
            for row in entry["tilts"]
            if (row["laws"], row["kl"], row["measure"]) == ("reward model", 2.0, "population:0.5*mean+0.5*cvar:0.1")
        )
        for entry in result["seeds"].values()
    ]
    falls = [-round(100 * row["change"]["rate"]["value"]) for row in rows]
    assert f"{falls[0]}, {falls[1]} and {falls[2]} % fewer" in re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    cells = " | ".join(
        "{:+.0f} % [{:+.0f}, {:+.0f}]".format(*(100 * row["change"]["rate"][key] for key in ("value", "low", "high")))
        for row in rows
    )
    assert cells in (ROOT / "docs" / "results.md").read_text().replace("**", "")
    # The bar of the study: at least 30 % fewer, an interval that excludes zero, at most 2 % of the mean rating.
    for row in rows:
        assert row["change"]["rate"]["value"] <= -0.30
        assert row["change"]["rate"]["high"] < 0
        assert row["change"]["mean"]["value"] >= -0.02
