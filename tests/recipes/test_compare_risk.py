"""Measures compared before training, as people run it: from a completions file to a table."""

import json

import numpy as np
import pytest
import torch
from distributed.launching import load_recipe
from tiny import candidate_rows, tiny_qrm, tiny_tokenizer

from eval.records import write_jsonl
from eval.signal import first_order_gain, prompt_draws
from eval.study_figures import tilt_figure
from eval.tilt import tilt, tilted_change
from reward.distribution import RewardDistribution
from rlhf.command_line import RecipeParser
from rlhf.influence import expected_influence, population_law, statistics
from rlhf.reward_function import RiskReward
from rlhf.risk import parse_risk

recipe = load_recipe("compare_risk")
WORDS = ["the", "a", "red", "green", "blue", "good", "bad", "fine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model, a judge, and three completions for each of eight prompts."""
    path = tmp_path_factory.mktemp("compare")
    for name, seed in (("reward", 2), ("judge", 9)):
        tiny_qrm(seed=seed).save_pretrained(path / name)
        tiny_tokenizer().save_pretrained(path / name)
    rows = candidate_rows(WORDS)
    write_jsonl(path / "base.jsonl", rows)
    write_jsonl(path / "one.jsonl", [row for row in rows if row["sample"] == 0])
    return path


def run(folder, output, **changes):
    settings = {
        "completions": folder / "base.jsonl",
        "reward_model": folder / "reward",
        "judge": f"qrm:{folder / 'judge'}",
        "output_dir": output,
        "rating_threshold": 0.0,
        "resamples": 200,
        "use_cpu": "true",
        "risks": ["cvar:0.2", "population:cvar:0.2"],
    } | changes
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    recipe.main(*RecipeParser(recipe.GROUPS).parse_args_and_config(flags))


def laws_of(folder, name):
    rows = [json.loads(line) for line in (folder / "base.jsonl").read_text().splitlines()]
    law = RiskReward(str(folder / name)).distribution([r["prompt"] for r in rows], [r["completion"] for r in rows])
    return RewardDistribution(law.levels.double(), law.values.double())


def test_the_table_is_about_both_scopes_and_the_judge(folder, tmp_path, capsys):
    run(folder, tmp_path)
    result = json.loads((tmp_path / "compare_risk.json").read_text())
    assert [row["measure"] for row in result["measures"]] == ["mean", "cvar:0.2", "population:cvar:0.2"]
    assert (result["prompts"], result["n"]) == (8, 3)
    mean, response, population = result["measures"]
    assert mean["best_of_n_change"]["tail"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 24, "prompts": 8}

    laws, judged, measure = laws_of(folder, "reward"), laws_of(folder, "judge"), parse_risk("cvar:0.2")
    everybody = statistics(measure, population_law(laws))
    scores, draws = judged.mean().numpy().reshape(8, 3), prompt_draws(8, 200)
    tail = -judged.cdf(torch.tensor(0.0)).numpy().reshape(8, 3)
    for row, utilities in ((response, measure(laws)), (population, expected_influence(measure, laws, everybody))):
        utilities = utilities.numpy().reshape(8, 3)
        for name, outcome in (("slope_of_mean", scores), ("slope_of_tail", tail)):
            expected = first_order_gain(utilities, outcome, draws)
            assert (row[name]["low"], row[name]["high"]) == pytest.approx(expected.interval, rel=1e-4)
            assert row[name]["value"] == pytest.approx(expected.value, rel=1e-4)
        chosen = utilities.argmax(1)
        assert row["best_of_n"]["mean"] == pytest.approx(scores[np.arange(8), chosen].mean(), rel=1e-4)
    assert response["slope_of_mean"] != population["slope_of_mean"]
    printed = capsys.readouterr().out
    assert "8 prompts, 3 completions each" in printed
    assert "by the judge's own laws" in printed
    assert "best of 3 by the mean" in printed


def test_no_reward_model_follows_the_judge_better_than_the_judge_itself(folder, tmp_path):
    """Of all utilities the outcome itself has the steepest slope, and the best of n by it is the best there is."""
    run(folder, tmp_path, risks=["below:0"])
    result = json.loads((tmp_path / "compare_risk.json").read_text())
    by_reward, by_judge = result["measures"], result["measures_by_the_judges_laws"]
    assert [row["measure"] for row in by_judge] == ["mean", "below:0"]
    judged = laws_of(folder, "judge")
    scores, tail = judged.mean().numpy().reshape(8, 3), judged.cdf(torch.tensor(0.0)).numpy().reshape(8, 3)
    mean, below = by_judge
    assert mean["best_of_n"]["mean"] == pytest.approx(scores.max(1).mean(), rel=1e-4)
    assert below["best_of_n"]["tail"] == pytest.approx(tail.min(1).mean(), rel=1e-4)
    assert mean["slope_of_mean"]["value"] == pytest.approx(np.sqrt(2 * scores.var(1, ddof=1).mean()), rel=1e-4)
    assert below["slope_of_tail"]["value"] == pytest.approx(np.sqrt(2 * tail.var(1, ddof=1).mean()), rel=1e-4)
    assert mean["slope_of_mean"]["value"] > by_reward[0]["slope_of_mean"]["value"]


def test_best_policies_at_a_kl(folder, tmp_path, capsys):
    run(folder, tmp_path, kl=[0.3, 2.0], risks=["cvar:0.2", "population:cvar:0.5"])
    result = json.loads((tmp_path / "compare_risk.json").read_text())
    near = [row for row in result["tilts"] if row["kl"] == 0.3]
    assert [(row["laws"], row["measure"]) for row in near] == [
        (laws, name) for laws in ("reward model", "judge") for name in ("mean", "cvar:0.2", "population:cvar:0.5")
    ]
    laws, scores = laws_of(folder, "reward"), laws_of(folder, "judge").mean().numpy().reshape(8, 3)
    by_mean, by_tail = (tilt(parse_risk(spec)(laws).numpy().reshape(8, 3), 0.3) for spec in ("mean", "cvar:0.2"))
    assert near[0]["outcomes"]["mean"] == pytest.approx((by_mean * scores).sum(1).mean(), rel=1e-4)
    assert near[0]["change"]["tail"]["value"] == 0
    low = (scores <= np.quantile(scores, 0.05)).astype(float)
    assert result["threshold"] == pytest.approx(np.quantile(scores, 0.05), rel=1e-4)
    expected = tilted_change(low, by_tail, by_mean, prompt_draws(8, 200))
    assert near[1]["change"]["rate"]["value"] == pytest.approx(expected.value, rel=1e-3)
    # Three completions show 1.1 nats at most, and say so; the rest of the table is made all the same.
    assert all("up to a KL of" in row["refused"] for row in result["tilts"] if row["kl"] == 2.0)
    assert (tmp_path / "best_policies.png").read_bytes().startswith(b"\x89PNG")
    left, right = tilt_figure(result["tilts"]).axes
    assert [line.get_label() for line in left.lines] == ["mean", "cvar:0.2", "population:cvar:0.5"]
    assert [float(line.get_ydata()[0]) for line in right.lines] == [row["outcomes"]["rate"] for row in near[:3]]
    assert float(right.lines[0].get_xdata()[0]) == near[0]["outcomes"]["mean"]
    assert [list(line.get_xdata()) for line in left.lines] == [[0.3]] * 3
    with pytest.raises(ValueError, match="no best policy"):
        tilt_figure([row for row in result["tilts"] if row["kl"] == 2.0])
    printed = capsys.readouterr().out
    assert "best policies at 0.3 nats by the laws of the judge" in printed
    assert "generate more per prompt" in printed


def test_best_policies_from_a_policy_that_has_moved(folder, tmp_path):
    """A threshold from elsewhere, and how far from the base the best policies at a KL from the tuned one are."""
    scores = laws_of(folder, "judge").mean().numpy().reshape(8, 3)
    threshold = float(np.median(scores))
    run(folder, tmp_path, kl=[0.3], risks=["cvar:0.2"], threshold=threshold)
    result = json.loads((tmp_path / "compare_risk.json").read_text())
    assert (result["threshold"], result["reference_quantile"]) == (threshold, None)
    weights = tilt(parse_risk("cvar:0.2")(laws_of(folder, "reward")).numpy().reshape(8, 3), 0.3)
    row = result["tilts"][1]
    assert row["outcomes"]["rate"] == pytest.approx((weights * (scores <= threshold)).sum(1).mean(), rel=1e-4)
    # The rows are 0, 0.25 and 0.5 nats from their base.
    moved = np.array([0.0, 0.25, 0.5])
    assert row["kl_to_base"] == pytest.approx(0.3 + (weights * moved).sum(1).mean(), rel=1e-4)
    rows = [json.loads(line) | {"kl_k1_sum": None} for line in (folder / "base.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "unknown.jsonl", rows)
    run(folder, tmp_path, completions=tmp_path / "unknown.jsonl", kl=[0.3], risks=["cvar:0.2"])
    assert json.loads((tmp_path / "compare_risk.json").read_text())["tilts"][1]["kl_to_base"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completions": "one.jsonl"}, "one completion per prompt"),
        ({"judge": "reward"}, "the judge is the reward model"),
        ({"judge": "vader"}, "predicts no laws"),
        ({"risks": ["cvar:2"]}, "cvar"),
        ({"resamples": 0}, "at least 1"),
        ({"confidence": 1.5}, "level"),
        ({"kl": [0.5, 0.0]}, "distances above 0"),
        ({"reference_quantile": 1.0}, "between 0 and 1"),
        ({"threshold": float("nan")}, "a finite score"),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, tmp_path, changes, message):
    if changes.get("completions"):
        changes = {"completions": folder / changes["completions"]}
    if changes.get("judge") == "reward":
        changes = {"judge": f"qrm:{folder / 'reward'}"}
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path, **changes)
    assert not (tmp_path / "compare_risk.json").exists()
