"""Degenerate evaluations: a number appears only where the data carry it; else an error, a null or a dash."""

import json
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.calibration import calibration_summary, preference_accuracy
from eval.frontier import frontier
from eval.intervals import bootstrap_interval, cvar_statistic, paired_difference, wilson_interval
from eval.judges import Judgement
from eval.page import write_page
from eval.report import Measurement, PolicyResult, build_report, terminal_table
from eval.selection import select_best
from eval.tail import absolute_threshold, extremely_negative_rate, frozen_threshold, quantiles, value_at_risk
from reward.distribution import RewardDistribution
from rlhf.risk import parse_risk


class Judge:
    spec, unit = "python:a:b", "score"


SCORE = st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, -1e300, 1e300]) | st.floats(-10, 10)
TABLES = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), SCORE), max_size=8)
EXAMPLES = settings.default.max_examples


def numbers_in(value: object) -> list[float]:
    """Every float of nested lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, float) else []


def result(name: str, table: list[tuple[str, float | None]], kl: object = None, tokens: int = 2) -> PolicyResult:
    rows = [
        {"prompt_id": prompt, "sample": i, "prompt": prompt, "completion": "c", "completion_tokens": tokens,
         "finished": True, "source": None, "decoding": {}, "kl_k1_sum": kl, "kl_k3_mean": kl}
        for i, (prompt, _) in enumerate(table)
    ]  # fmt: skip
    scores = np.array([math.nan if score is None else score for _, score in table], dtype=np.float64)
    return PolicyResult(name, rows, Judgement(scores))


def supported(table: list) -> bool:
    """Whether finite scores of two prompts are there."""
    return len({prompt for prompt, score in table if score is not None and math.isfinite(score)}) > 1


@settings(max_examples=EXAMPLES // 4)
@given(
    first=TABLES, second=TABLES, threshold=st.floats(-20, 20), kl=st.none() | st.floats(allow_infinity=True),
    tokens=st.integers(0, 2), alpha=st.sampled_from([1e-9, 0.1, 1.0]),
)  # fmt: skip
def test_a_report_has_only_numbers_that_the_scores_carry(
    tmp_path_factory, first, second, threshold, kl, tokens, alpha
):
    results = [result("base", first, kl, tokens), result("tuned", second, kl, tokens)]
    measurement = Measurement(absolute_threshold(threshold), cvar_alpha=alpha, resamples=100)
    try:
        report = build_report(results, measurement, Judge())
    except ValueError:
        # Refused only where two prompts with finite scores are missing on one side, or the two share fewer.
        shared = {p for p, s in first if s is not None and math.isfinite(s)}
        shared &= {p for p, s in second if s is not None and math.isfinite(s)}
        assert not supported(first) or not supported(second) or len(shared) < 2
        return
    assert supported(first)
    assert supported(second)
    assert all(math.isfinite(number) for number in numbers_in(report)), report
    json.dumps(report, allow_nan=False)
    assert "nan" not in terminal_table(report).lower()
    assert len(frontier(report["policies"])) in (0, 2)


def test_a_page_of_equal_scores_can_be_drawn(tmp_path):
    results = [result("base", [("a", 1.0), ("b", 1.0)]), result("tuned", [("a", 1.0), ("b", 1.0)])]
    report = build_report(results, Measurement(absolute_threshold(0.0), resamples=100), Judge())
    assert [entry["verdict"] for entry in report["comparisons"]] == ["undecided"] * 3
    write_page(tmp_path / "r.html", report, results)
    assert "nan" not in (tmp_path / "r.html").read_text().lower().split("<svg")[0].split("<body>")[1]


@settings(max_examples=EXAMPLES // 2)
@given(table=TABLES, alpha=st.floats(-0.5, 1.5) | st.just(math.nan))
def test_estimates_are_refused_or_finite_and_inside_their_interval(table, alpha):
    ids, scores = [p for p, _ in table], [s for _, s in table]
    finite = [s for s in scores if s is not None and math.isfinite(s)]
    for estimate in (
        lambda: bootstrap_interval(scores, ids, resamples=100),
        lambda: bootstrap_interval(scores, ids, cvar_statistic(alpha), resamples=100),
        lambda: paired_difference(scores, ids, scores, ids, resamples=100),
        lambda: extremely_negative_rate(scores, absolute_threshold(0.0), ids),
    ):
        try:
            found = estimate()
        except ValueError:
            continue
        assert supported(table)
        assert found.n == len(finite)
        assert all(math.isfinite(number) for number in (found.value, found.low, found.high))
        assert found.low <= found.high
    for number in (lambda: value_at_risk(scores, alpha), lambda: frozen_threshold(scores, alpha).value):
        try:
            found = number()
        except ValueError:
            continue
        assert found in finite
    try:
        found = quantiles(scores, (0.1, 0.5))
    except ValueError:
        return
    assert set(found.values()) <= set(finite)


@given(successes=st.floats(), n=st.floats(), level=st.floats())
def test_a_proportion_is_refused_or_between_its_ends(successes, n, level):
    try:
        low, high = wilson_interval(successes, n, level=level)
    except ValueError:
        return
    assert 0 <= low <= high <= 1


@given(
    values=st.lists(st.lists(st.floats() | st.floats(-5, 5), min_size=3, max_size=3), max_size=4),
    n=st.integers(1, 2), spec=st.sampled_from(["mean", "cvar:0.1", "entropic:1", "mean_std:1", "below:0"]),
    scope=st.sampled_from(["response", "population"]),
)  # fmt: skip
def test_a_selection_is_refused_or_takes_an_answer_with_a_finite_law(values, n, spec, scope):
    values = values[: len(values) // n * n]
    tensor = torch.tensor(values, dtype=torch.float64).reshape(-1, n, 3)
    laws = RewardDistribution(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), tensor)
    try:
        selection = select_best(laws, parse_risk(spec), scope, num_levels=19)
    except ValueError:
        return
    chosen = laws.values[torch.arange(len(selection.chosen)), selection.chosen]
    assert bool(chosen.isfinite().all())
    if chosen.abs().max() < 1e100:
        assert math.isfinite(selection.value)


@settings(max_examples=EXAMPLES // 4)
@given(
    values=st.lists(st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=2, max_size=2), max_size=4),
    ratings=st.lists(st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=2, max_size=2), max_size=4),
)
def test_a_calibration_is_refused_or_made_of_numbers_or_nothing(values, ratings):
    law = RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor(values).reshape(-1, 2))
    try:
        summary = calibration_summary(law, ratings, torch.tensor([-1.0, 1.0]))
    except ValueError:
        return
    assert all(math.isfinite(number) for number in numbers_in(summary)), summary


@given(wins=st.lists(st.tuples(st.floats(), st.floats()), max_size=5))
def test_an_accuracy_is_refused_or_a_share(wins):
    chosen, rejected = (np.array([pair[i] for pair in wins], dtype=np.float64) for i in (0, 1))
    try:
        found = preference_accuracy(chosen, rejected).overall
    except ValueError:
        assert not np.isfinite(chosen - rejected).all() or not len(wins)
        return
    assert 0 <= found.low <= found.value <= found.high <= 1
