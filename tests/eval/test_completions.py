"""Completions files read back: what a row needs, who is a candidate, and what a selected row says."""

import json
import math

import pytest
import torch

from eval.completions import candidates, check_judge, models_of, read_completions, read_pairs, selected_rows
from eval.judges import FunctionJudge, SourceJudge
from eval.records import write_jsonl
from eval.selection import Selection


def row(prompt_id, sample, **changes):
    fields = {
        "prompt_id": prompt_id,
        "sample": sample,
        "prompt": f"the {prompt_id}",
        "completion": f" film {sample}",
        "completion_tokens": 3 + sample,
        "finished": True,
        "kl_k1_sum": 0.5 * sample,
        "kl_k3_mean": 0.1,
        "source": "policy",
        "decoding": {"temperature": 1.0},
        "versions": {},
    }
    return {name: value for name, value in (fields | changes).items() if value is not ...}


ROWS = [row("red", 1), row("blue", 0), row("red", 0), row("blue", 1), row("red", 2), row("blue", 2)]


def test_rows_come_back_as_they_were_written(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert read_completions(tmp_path / "rows.jsonl") == ROWS


def test_what_a_report_can_do_without_is_filled_in(tmp_path):
    short = [row("red", 0, kl_k1_sum=..., kl_k3_mean=..., source=..., decoding=..., versions=...)]
    write_jsonl(tmp_path / "rows.jsonl", short)
    (found,) = read_completions(tmp_path / "rows.jsonl")
    assert found == short[0] | {
        "kl_k1_sum": None, "kl_k3_mean": None, "source": None, "decoding": {}, "versions": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (row("blue", 1, completion=...), "line 2: 'completion' must be str, got None"),
        (row(7, 1), "line 2: 'prompt_id' must be str, got 7"),
        (row("blue", True), "line 2: 'sample' must be int, got True"),
        (row("blue", 1, finished=1), "line 2: 'finished' must be bool, got 1"),
        (row("blue", 1, prompt=3.5), "line 2: 'prompt' must be str or list, got 3.5"),
        (row("red", 0), "line 2: prompt 'red', sample 0 is on line 1 already"),
        ([1], "line 2 is no completion but list"),
    ],
)
def test_a_bad_row_is_named(tmp_path, second, message):
    lines = [json.dumps(line) for line in (row("red", 0), second)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        read_completions(tmp_path / "rows.jsonl")


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(ValueError, match="does not exist; evaluate"):
        read_completions(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no completions"):
        read_completions(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("n", "samples"), [(None, [0, 1, 2]), (2, [0, 1]), (1, [0])])
def test_candidates_are_the_first_samples_of_each_prompt(n, samples):
    groups = candidates(ROWS, n)
    assert [[r["prompt_id"] for r in group] for group in groups] == [["red"] * len(samples), ["blue"] * len(samples)]
    assert [[r["sample"] for r in group] for group in groups] == [samples, samples]


@pytest.mark.parametrize(
    ("rows", "n", "message"),
    [
        (ROWS, 4, "best of 4 needs 4 completions of each prompt, and 'red' has 3; .* --num_samples 4"),
        (ROWS[:-1], None, "'red' has 3 completions and 'blue' 2; .* --n 2 at most"),
        (ROWS, 0, "n >= 1, got 0"),
        ([*ROWS, row("red", 3, prompt="another")], 2, "'red' stands for two different prompts"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(rows, n, message):
    with pytest.raises(ValueError, match=message):
        candidates(rows, n)


def test_selections_that_skip_share_no_completion():
    assert [[r["sample"] for r in group] for group in candidates(ROWS, 1, skip=2)] == [[2], [2]]
    assert [[r["sample"] for r in group] for group in candidates(ROWS, skip=1)] == [[1, 2], [1, 2]]
    with pytest.raises(ValueError, match=r"needs 2 completions of each prompt behind the first 2, .* --num_samples 4"):
        candidates(ROWS, 2, skip=2)
    with pytest.raises(ValueError, match="needs 1 completions of each prompt behind the first 3"):
        candidates(ROWS, skip=3)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        candidates(ROWS, 1, skip=-1)


def test_messages_are_answered_by_the_assistant():
    asked = [{"role": "user", "content": "red?"}]
    prompts, completions = read_pairs([row("red", 0, prompt=asked)])
    assert prompts == [asked]
    assert completions == [[{"role": "assistant", "content": " film 0"}]]
    assert read_pairs(ROWS[:1]) == (["the red"], [" film 1"])


def picked(groups, *chosen):
    utilities = torch.tensor([[0.25, 0.5, -1.0][: len(groups[0])]] * len(groups), dtype=torch.float64)
    return Selection(torch.tensor(chosen), utilities, value=0.0)


def test_a_selected_row_by_hand():
    groups = candidates(ROWS)
    red, blue = selected_rows(groups, picked(groups, 1, 2), "best", {"risk": "mean", "models": []})
    bound = math.log(3) - 2 / 3
    assert (red["prompt_id"], red["sample"], red["completion"], red["model"]) == ("red", 1, " film 1", "best")
    assert red["selection"] == {"risk": "mean", "models": [], "n": 3, "utility": 0.5, "tokens_drawn": 3 + 4 + 5}
    # Its own 0.5 nats, and what choosing among three may add; over its 4 tokens.
    assert red["kl_k1_sum"] == pytest.approx(0.5 + bound)
    assert red["kl_k3_mean"] == pytest.approx((0.5 + bound) / 4)
    assert blue["kl_k1_sum"] == pytest.approx(1.0 + bound)
    assert blue["selection"]["utility"] == -1.0
    assert red["fingerprint"] == blue["fingerprint"] != groups[0][1].get("fingerprint")
    assert groups[0][1]["kl_k1_sum"] == 0.5  # the candidate is left as it was


def test_one_of_one_is_the_row_itself():
    groups = candidates(ROWS, 1)
    for group, found in zip(groups, selected_rows(groups, picked(groups, 0, 0), "best", {}), strict=True):
        assert {k: v for k, v in found.items() if k not in ("selection", "model", "fingerprint", "kl_k3_mean")} == {
            k: v for k, v in group[0].items() if k != "kl_k3_mean"
        }


def test_without_a_base_there_is_no_distance():
    groups = candidates([row("red", 0, kl_k1_sum=None, kl_k3_mean=None)])
    (found,) = selected_rows(groups, picked(groups, 0), "best", {})
    assert (found["kl_k1_sum"], found["kl_k3_mean"]) == (None, None)


def test_the_model_that_selected_does_not_judge(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert models_of(f"ensemble:{first},{second}") == [first, second]
    monkeypatch.chdir(tmp_path)
    rows = [row("red", 0, selection={"models": models_of("./first")})]
    with pytest.raises(ValueError, match=r"best was selected by .*first, which cannot judge its own selection"):
        check_judge(rows, SourceJudge(f"ensemble:{first},{second}"), "best")
    check_judge(rows, SourceJudge(second), "best")
    check_judge(rows, FunctionJudge("math", "fsum"), "best")
    check_judge([row("red", 0)], SourceJudge(first), "base")
    assert models_of("someone/model") == ["someone/model"]
