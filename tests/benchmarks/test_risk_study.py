"""docs/results.md says what the study's JSON says, and `benchmarks/selection_on_top.py` asks what its recipes take."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from distributed.launching import load_recipe

from eval.study_report import told
from rlhf.command_line import RecipeParser

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_study_are_those_of_its_result():
    study = json.loads((ROOT / "benchmarks" / "results" / "risk_study.json").read_text())
    document = (ROOT / "docs" / "results.md").read_text()
    assert told(document, load_recipe("study_risk").tables(study)) == document
    # Three seeds of everything but the base, as asked for.
    assert {arm["arm"]: len(arm["seeds"]) for arm in study["arms"] if arm["arm"] != "base"} == dict.fromkeys(
        ("mean", "cvar_response", "cvar_population", "mean_variance", "constraint", "mixed", "best_of_4_mean",
         "best_of_4_cvar"), 3,
    )  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("selection_on_top")
    for name in ("RUNS", "STUDY"):
        monkeypatch.setattr(module, name, tmp_path / name)
    yield module
    for name in ("selection_on_top", "best_policies"):
        del sys.modules[name]


def test_selection_on_top_asks_what_its_recipes_take_and_keeps_what_is_there(benchmark, monkeypatch, tmp_path):
    compare, evaluate = load_recipe("compare_risk"), load_recipe("evaluate")
    groups = {
        "recipes/compare_risk.py": compare.GROUPS,
        "recipes/evaluate.py": (
            evaluate.PolicyArguments, evaluate.PromptArguments, evaluate.JudgeArguments, evaluate.OutputArguments,
        ),
    }  # fmt: skip
    calls, written = [], []

    def run(script, *flags):
        arguments = RecipeParser(groups[script]).parse_args_and_config([str(flag) for flag in flags])
        calls.append((script.split("/")[1], arguments))
        output = arguments[-1].output_dir if script == "recipes/evaluate.py" else arguments[0].output_dir
        Path(output).mkdir(parents=True, exist_ok=True)
        name = "report.json" if script == "recipes/evaluate.py" else "compare_risk.json"
        Path(output, name).write_text(json.dumps(dict.fromkeys(benchmark.KEPT, 1)))

    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(benchmark, "write_result", lambda name, result: written.append((name, result)))
    with pytest.raises(SystemExit, match="`make study-risk` makes what this needs"):
        benchmark.main([1], 3.0)
    base = tmp_path / "STUDY" / "evaluation" / "base"
    base.mkdir(parents=True)
    (base / "report.json").write_text('{"threshold": -1.25}')
    for seed in (1, 2):
        (tmp_path / "STUDY" / "rescaled" / f"mean-{seed}" / "kl-3").mkdir(parents=True)
    benchmark.main([1, 2], 3.0)
    assert [name for name, _ in calls] == ["evaluate.py", "compare_risk.py"] * 2
    assert calls[0][1][0].policies == [f"mean-1={tmp_path}/STUDY/rescaled/mean-1/kl-3"]
    assert calls[0][1][1].num_samples == 16
    assert calls[1][1][0].threshold == -1.25
    assert Path(calls[3][1][0].completions).name == "mean-2.jsonl"
    benchmark.main([1, 2], 3.0)
    assert len(calls) == 4
    assert [(name, list(result["seeds"])) for name, result in written] == [("selection_on_top", ["1", "2"])] * 2
