"""The statistics of the study: by hand, by slow loops, and by what the intervals must not claim."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from eval.intervals import Estimate, wilson_interval
from eval.judges import Judgement
from eval.report import Measurement, PolicyResult
from eval.study import (
    FEW_EVENTS,
    Pool,
    Run,
    bar,
    compared,
    crossed_draws,
    overlap,
    percentile_ends,
    pooled,
    ratio_interval,
    relative_draws,
    summary,
    verdict,
)
from eval.tail import absolute_threshold

RATE = "extremely_negative_rate"
MEASUREMENT = Measurement(absolute_threshold(-1.0), cvar_alpha=0.25, rating_threshold=-2.0, resamples=500)


def make(arm, seed, scores, kl=6.0, per_prompt=1):
    scores = np.asarray(scores, dtype=float)
    ids = tuple(f"p{i // per_prompt}" for i in range(len(scores)))
    columns = {"scores": scores, "masses": 1 / (1 + np.exp(3 + scores)), "kl": np.full(len(scores), kl)}
    return Run(arm, seed, ids, columns)


def drawn(arm, seed, centre, *, prompts=60, spread=1.0, kl=6.0):
    noise = np.random.default_rng([ord(arm[0]), seed or 0]).normal(centre, spread, prompts)
    return make(arm, seed, noise, kl)


# Three prompts, seeds 1 and 2. Rates at -1: mean arm 2/3 and 1/3, other arm 1/3 and 0.
GOLDEN = [
    make("mean", 1, [-2.0, -1.0, 3.0]),
    make("mean", 2, [-1.5, 0.5, 5.0]),
    make("other", 1, [-3.0, 1.0, 2.0], kl=5.0),
    make("other", 2, [0.0, 1.0, 2.0], kl=6.5),
]


def test_pooled_and_compared_by_hand():
    pool = Pool(GOLDEN, MEASUREMENT)
    mean, rate, kl, cvar = (
        compared(pool, "other", "mean", metric) for metric in ("mean", "extremely_negative_rate", "kl", "cvar")
    )
    # Means: (0 + 4)/6 and (0 + 3)/6; rates 3/6 and 1/6; KL 6 and 5.75.
    assert (mean["reference_value"], mean["value"]) == pytest.approx((4 / 6, 3 / 6))
    assert mean["relative_change"] == pytest.approx(-1 / 4)
    assert [entry["difference"] for entry in mean["by_seed"]] == pytest.approx([0.0, 1 - 4 / 3])
    assert (rate["difference"], rate["relative_change"]) == pytest.approx((-2 / 6, -2 / 3))
    assert [entry["relative_change"] for entry in rate["by_seed"]] == pytest.approx([-1 / 2, -1.0])
    assert rate["events"] == [1, 3]
    assert kl["difference"] == pytest.approx(-0.25)
    # The worst quarter of six is the worst score and half of the next: (-2 - 1.5/2)/1.5 and (-3 + 0)/1.5.
    assert (cvar["reference_value"], cvar["value"]) == pytest.approx((-2.75 / 1.5, -3 / 1.5))
    entry = pooled(pool, "other")
    assert (entry["arm"], entry["seeds"], entry["n"]) == ("other", [1, 2], 6)
    assert entry["extremely_negative_rate"] == pytest.approx(1 / 6)


def test_only_seeds_that_both_have_are_compared():
    pool = Pool(GOLDEN[:3], MEASUREMENT)
    found = compared(pool, "other", "mean", "mean")
    assert found["seeds"] == [1]
    assert found["difference"] == pytest.approx(0.0)  # seed 1 alone: 0/3 and 0/3
    with pytest.raises(ValueError, match="no seed in common"):
        compared(Pool([GOLDEN[0], GOLDEN[3]], MEASUREMENT), "other", "mean", "mean")


def test_an_arm_without_seeds_meets_each_of_them():
    pool = Pool([*GOLDEN[:2], make("base", None, [-2.0, 0.0, 1.0])], MEASUREMENT)
    found = compared(pool, "base", "mean", "mean")
    assert found["seeds"] == [1, 2]
    assert [entry["difference"] for entry in found["by_seed"]] == pytest.approx([-1 / 3, -1 / 3 - 4 / 3])
    assert pooled(pool, "base")["seeds"] == []


def test_draws_equal_a_loop_over_completions():
    rng = np.random.default_rng(3)
    runs = [make("mean", seed, rng.normal(seed, 2, 10), per_prompt=2) for seed in (1, 2, 3)]
    pool = Pool(runs, MEASUREMENT)
    of_seeds, of_prompts = crossed_draws(3, 5, MEASUREMENT.resamples, MEASUREMENT.seed)
    for metric in ("mean", "cvar"):
        found = pool.values("mean", metric, [1, 2, 3])
        for draw in (0, 1, 7, 400):
            repeated = []
            for s, run in enumerate(runs):
                for i, score in enumerate(run.columns["scores"]):
                    repeated += [score] * int(of_seeds[draw, s] * of_prompts[draw, i // 2])
            repeated.sort()
            share = len(repeated) * (1.0 if metric == "mean" else 0.25)
            taken = sum(max(0.0, min(1.0, share - rank)) * score for rank, score in enumerate(repeated))
            assert found[draw] == pytest.approx(taken / share)


def test_draws_of_seeds_have_the_variance_of_their_mean():
    # Without prompts to vary, the draws' variance is exactly s²/m: over all 3² equally likely draws of two seeds.
    effects = np.array([1.0, 2.0, 6.0])
    exact = np.var([(effects[a] + effects[b]) / 2 for a, b in product(range(3), repeat=2)])
    assert exact == pytest.approx(effects.var(ddof=1) / 3)
    of_seeds, of_prompts = crossed_draws(3, 4, 40_000)
    assert of_seeds[0].tolist() == [1, 1, 1]
    assert set(of_seeds[1:].sum(axis=1)) == {2}
    assert set(of_prompts[1:].sum(axis=1)) == {4}
    # 40,000 draws fix a variance of this law to about 1 %.
    assert (of_seeds[1:] @ effects / 2).var() == pytest.approx(exact, rel=0.03)
    assert crossed_draws(1, 4, 10)[0].tolist() == [[1]] * 11


def test_a_disagreement_of_seeds_widens_the_interval():
    def width(shifts):
        runs = [drawn("mean", seed, 0.0) for seed in (1, 2, 3)]
        runs += [drawn("other", seed, shift) for seed, shift in zip((1, 2, 3), shifts, strict=True)]
        low, high = compared(Pool(runs, MEASUREMENT), "other", "mean", "mean")["interval"]
        return high - low

    assert width([-1.0, 0.5, 2.0]) > 2 * width([0.5, 0.5, 0.5])


def test_pairing_removes_what_prompts_share():
    hard = np.random.default_rng(0).normal(0, 5, 80)
    runs = [make("mean", 1, hard), make("other", 1, hard + np.linspace(0.4, 0.6, 80))]
    low, high = compared(Pool(runs, MEASUREMENT), "other", "mean", "mean")["interval"]
    assert 0.48 < low < 0.5 < high < 0.52
    low, high = pooled(Pool(runs, MEASUREMENT), "mean")["mean_ci"]
    assert high - low > 1.5  # control: alone, each arm is far less certain


def test_no_event_is_no_certainty():
    good = np.linspace(0, 1, 100)
    few = np.where(np.arange(100) < 5, -2.0, good)
    pool = Pool([make("mean", 1, few), make("other", 1, good)], MEASUREMENT)
    found = compared(pool, "other", "mean", RATE)
    assert (found["events"], found["method"], found["relative_change"]) == ([0, 5], "bootstrap and wilson", -1.0)
    # Every draw that says anything says -100 %, and the interval must not: u₁ / √(l₂ (2p₂ − l₂)) − 1 = -0.10.
    (_, most), (least, _) = wilson_interval(0, 100), wilson_interval(5, 100)
    assert found["relative_interval"] == pytest.approx([-1.0, most / math.sqrt(least * (0.1 - least)) - 1])
    assert found["interval"][1] == pytest.approx(-0.05 + math.hypot(most, 0.05 - least))
    # 5 of 100 are drawn 0 times in 0.95¹⁰⁰ = 0.6 % of the draws.
    assert 0 < found["undefined_draws"] < 0.02
    assert pooled(pool, "other")["extremely_negative_rate_ci"] == pytest.approx(wilson_interval(0, 100))


def test_a_reference_without_events_leaves_the_change_open():
    good, few = np.linspace(0, 1, 50), np.where(np.arange(50) < 4, -2.0, 1.0)
    found = compared(Pool([make("mean", 1, good), make("other", 1, few)], MEASUREMENT), "other", "mean",
                     "extremely_negative_rate")  # fmt: skip
    assert found["relative_change"] is None
    assert found["relative_interval"] == [-1.0, None]
    assert found["undefined_draws"] == 1.0


def test_many_events_take_the_paired_bootstrap():
    flags = np.arange(200) % 4 == 0
    assert flags.sum() >= FEW_EVENTS
    half = np.arange(200) % 8 == 0
    runs = [make("mean", 1, np.where(flags, -2.0, 1.0)), make("other", 1, np.where(half, -2.0, 1.0))]
    found = compared(Pool(runs, MEASUREMENT), "other", "mean", "extremely_negative_rate")
    assert (found["method"], found["undefined_draws"], found["verdict"]) == ("bootstrap", 0.0, "better")
    assert found["relative_change"] == pytest.approx(-0.5)
    # 25 of the 50 are gone: the binomial interval of the share that stays.
    low, high = stats.binomtest(25, 50).proportion_ci(method="exact")
    assert found["relative_interval"] == pytest.approx([low - 1, high - 1], abs=0.03)  # 500 draws, another method


@pytest.mark.parametrize(
    ("first", "second"), [((0.02, 0.01, 0.05), (0.08, 0.05, 0.12)), ((0.3, 0.1, 0.9), (0.2, 0.1, 0.5))]
)
def test_ratio_interval_is_where_the_difference_is_undecided(first, second):
    """θ is an end exactly where the interval of p₁ − θ p₂ by Newcombe's rule has an end at 0."""
    p1, p2 = (Estimate(*numbers, 0.95, 100, 100, "wilson") for numbers in (first, second))
    low, high = ratio_interval(p1, p2)
    for theta, ends in (
        (low, (p1.value - p1.low, p2.high - p2.value)),
        (high, (p1.high - p1.value, p2.value - p2.low)),
    ):
        distance = math.hypot(ends[0], theta * ends[1])
        assert abs(p1.value - theta * p2.value) == pytest.approx(distance, rel=1e-9)
    assert low < p1.value / p2.value < high


def test_ratio_interval_at_zero():
    some, none = Estimate(0.04, 0.02, 0.08, 0.95, 99, 99, ""), Estimate(0.0, 0.0, 0.03, 0.95, 99, 99, "")
    # high = u₁ / √(l₂ (2p₂ − l₂)) = 0.03 / √(0.02 · 0.06); low = √(l₁ (2p₁ − l₁)) / u₂ = √(0.02 · 0.06) / 0.03
    assert ratio_interval(none, some) == pytest.approx((0.0, 0.03 / math.sqrt(0.0012)))
    low, high = ratio_interval(some, none)
    assert (low, high) == (pytest.approx(math.sqrt(0.0012) / 0.03), math.inf)
    assert ratio_interval(none, none) == (0.0, math.inf)


def test_unknown_draws_count_against_both_ends():
    draws = np.arange(100.0)
    assert percentile_ends(draws, 0.9) == (4.0, 95.0)
    draws[50:53] = np.nan
    assert percentile_ends(draws, 0.9) == (1.0, 98.0)
    draws[50:60] = np.nan
    assert percentile_ends(draws, 0.9) == (-math.inf, math.inf)
    assert relative_draws(np.array([1.0, 3.0, 0.0]), np.array([2.0, 0.0, -1.0]))[0] == -0.5
    assert np.isnan(relative_draws(np.array([1.0, 3.0, 0.0]), np.array([2.0, 0.0, -1.0]))[1:]).all()


def entry(metric, relative=-0.5, relative_interval=(-0.7, -0.1), difference=0.0, interval=(-0.1, 0.1)):
    return {
        "arm": "a",
        "metric": metric,
        "relative_change": relative,
        "relative_interval": list(relative_interval),
        "difference": difference,
        "interval": list(interval),
    }


@pytest.mark.parametrize(
    ("mean", "share", "kl", "broken"),
    [
        ({}, {}, {}, None),
        ({"relative": -0.03, "relative_interval": (-0.05, -0.01)}, {}, {}, "loss_small"),
        ({"relative": None, "relative_interval": (None, None)}, {}, {}, "loss_small"),
        ({}, {"relative": -0.29}, {}, "fall_large"),
        ({}, {"relative": None, "relative_interval": (-1.0, -0.1)}, {}, "fall_large"),
        ({}, {"relative_interval": (-0.8, 0.01)}, {}, "interval_excludes_zero"),
        ({}, {"relative_interval": (-0.8, None)}, {}, "interval_excludes_zero"),
        ({}, {}, {"interval": (0.1, 0.5)}, "kl_not_above"),
        ({}, {}, {"interval": (-3.0, -1.0)}, None),  # a shorter way is no objection
    ],
)
def test_each_condition_of_the_bar(mean, share, kl, broken):
    mean = {"relative": -0.01, "relative_interval": (-0.04, 0.02)} | mean
    found = bar([entry("mean", **mean), entry(RATE, **share), entry("kl", **kl)], "a", RATE)
    assert [name for name, holds in found["conditions"].items() if not holds] == ([broken] if broken else [])
    assert found["met"] is (broken is None)
    assert found["loss_surely_small"] is False


def test_the_loss_is_surely_small_if_its_whole_interval_is():
    mean = entry("mean", relative=0.02, relative_interval=(-0.019, 0.05))
    found = bar([mean, entry(RATE), entry("kl")], "a", RATE)
    assert found["loss_of_mean"] == -0.02
    assert found["loss_interval"] == [-0.05, 0.019]
    assert found["loss_surely_small"] is True


def test_a_clear_effect_meets_the_bar_and_none_does_not():
    def arms(share):
        runs = []
        for seed in (1, 2, 3):
            rng = np.random.default_rng(seed)
            good = rng.normal(3, 0.3, 300)
            bad = rng.random(300)
            runs += [make("mean", seed, np.where(bad < 0.1, -2.0, good))]
            runs += [make("other", seed, np.where(bad < share, -2.0, good) - (0.1 - share) * 5)]
        return {(e["arm"], e["metric"]): e for e in summary(runs, MEASUREMENT)["bar"]}

    assert arms(0.03)["other", RATE]["met"]
    assert not arms(0.1)["other", RATE]["met"]


def test_summary_leaves_the_base_out_of_the_bar_and_needs_no_reference():
    runs = [*GOLDEN, make("base", None, [-2.0, 0.0, 1.0]), make("late", 9, [0.0, 1.0, 2.0])]
    found = summary(runs, MEASUREMENT)
    assert [e["arm"] for e in found["arms"]] == ["mean", "other", "base", "late"]
    assert {e["arm"] for e in found["comparisons"]} == {"other", "base"}  # seed 9 has no partner
    assert [(e["arm"], e["metric"]) for e in found["bar"]] == [("other", RATE), ("other", "rating_mass")]
    alone = summary(runs[4:], MEASUREMENT)
    assert (alone["comparisons"], alone["bar"], len(alone["arms"])) == ([], [], 2)


def test_runs_that_do_not_belong_together():
    with pytest.raises(ValueError, match="other prompts than 'mean'"):
        Pool([GOLDEN[0], make("other", 1, [1.0, 2.0])], MEASUREMENT)
    with pytest.raises(ValueError, match="two runs of arm 'mean', seed 1"):
        Pool([GOLDEN[0], GOLDEN[0]], MEASUREMENT)
    with pytest.raises(ValueError, match="two runs of arm 'mean', seed None"):
        Pool([GOLDEN[0], make("mean", None, [1.0, 2.0, 3.0])], MEASUREMENT)


def test_failed_scores_leave_the_run_and_laws_are_needed():
    rows = [{"prompt_id": f"p{i}", "kl_k1_sum": float(i)} for i in range(3)]
    with pytest.raises(ValueError, match="predicts a distribution"):
        Run.of("a", 1, PolicyResult("a", rows, Judgement(np.zeros(3))), -2.0)


def test_verdicts_and_overlap():
    assert verdict("mean", (0.1, 0.2)) == verdict(RATE, (-0.2, -0.1)) == "better"
    assert verdict("cvar", (-0.2, -0.1)) == verdict("rating_mass", (0.1, 0.2)) == "worse"
    assert verdict("kl", (0.1, 0.2)) == "higher"
    assert verdict("kl", (-0.1, 0.2)) == "undecided"
    assert overlap((1, 2), (2, 3))
    assert overlap((1, 4), (2, 3))
    assert not overlap((1, 2), (2.1, 3))
