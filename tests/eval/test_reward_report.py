"""The report of a reward model over laws that are true, and its page, figures and table."""

import json
import math
import re

import numpy as np
import pytest
import torch
from browser import ATTACK, opened
from scipy import stats

from eval.preferences import REWARDBENCH_SECTIONS, PreferencePairs
from eval.reward_page import write_reward_page
from eval.reward_report import (
    Intervals,
    RatedTexts,
    preference_report,
    rating_report,
    reward_table,
    spread_bins,
    spread_histogram,
    spread_kept,
    without_nan,
)
from reward.data import pad_ratings
from reward.distribution import RewardDistribution
from rlhf.risk import parse_risk

INTERVALS = Intervals(resamples=200)
LEVELS = torch.arange(1, 40, dtype=torch.float64) / 40


def world(texts, seed, doubt=0.0):
    """Ratings N(m, s²) of 5 to 7 raters; laws N(m + e, s² + d²) with e of spread d; two sources."""
    rng = np.random.default_rng(seed)
    mean, std, raters = rng.normal(size=texts), rng.uniform(0.3, 1.7, size=texts), rng.integers(5, 8, size=texts)
    ratings = [(m + s * rng.normal(size=k)).tolist() for m, s, k in zip(mean, std, raters, strict=True)]
    centre, width = mean + doubt * rng.normal(size=texts), np.sqrt(std**2 + doubt**2)
    values = torch.from_numpy(centre[:, None] + width[:, None] * stats.norm.ppf(LEVELS.numpy()))
    return RatedTexts(ratings, ["x", f"y {ATTACK}"] * (texts // 2), RewardDistribution(LEVELS, values))


@pytest.fixture(scope="module")
def ratings_part():
    train = world(300, 1)
    return rating_report(world(240, 2), INTERVALS, train_ratings=train.ratings, residuals=train, crossing_rate=0.125)


def test_a_true_law_beats_constants_and_residuals_and_covers_its_levels(ratings_part):
    part = ratings_part
    assert part["margin_over_constant"]["estimate"] == pytest.approx(part["skill"], abs=1e-5)
    assert part["margin_over_homoscedastic"]["low"] > 0
    assert part["margin_over_homoscedastic"]["residual_texts"] == 300
    assert set(part["margin_over_homoscedastic"]["sources"]) == {"x", f"y {ATTACK}"}
    assert part["constant_from"] == "training ratings"
    worst = part["coverage_error"]
    assert worst["error"] == pytest.approx(max(abs(row["coverage"] - row["level"]) for row in part["coverage"]))
    assert worst["error"] < 0.05
    assert worst["sources"]["x"]["error"] != worst["error"]
    assert part["crossing_rate"] == 0.125
    spread = part["spread"]["correlation"]
    assert spread["low"] < part["std_correlation"] < spread["high"]
    assert part["std_correlation"] < part["spread"]["raters"]["ceiling"] + 0.1


def test_without_training_ratings_the_constant_is_that_of_the_held_out_ratings():
    held_out = world(60, 4)
    report = rating_report(held_out, INTERVALS)
    assert (report["constant_from"], report["margin_over_homoscedastic"]) == ("held-out ratings", None)
    easier = rating_report(held_out, INTERVALS, train_ratings=[[9.0, 8.0]] * 3)
    assert report["skill"] < easier["skill"]


def test_ratings_around_the_predicted_mean_lie_on_the_diagonal_and_those_around_their_own_below():
    """The law's variance is the raters' plus d²; an estimate around their own mean leaves d² out."""
    held_out = world(4000, 5, doubt=1.0)
    padded = pad_ratings(held_out.ratings)
    rows = spread_bins(held_out.law, padded)
    assert [row["texts"] for row in rows] == [400] * 10
    shares = [row["observed"] / row["predicted"] for row in rows]
    # Laws that end at levels 1/40 and 39/40 have lost some of their spread.
    assert np.mean(shares) == pytest.approx(1 / spread_kept(LEVELS), abs=0.02)  # 4,000 texts: standard error 0.008
    assert all(row["low"] < row["observed"] < row["high"] for row in rows)
    doubt = math.sqrt(np.mean([row["observed"] ** 2 - row["within"] ** 2 for row in rows]))
    assert doubt == pytest.approx(1.0, abs=0.05)  # 4,000 texts of six raters: standard error 0.02
    assert spread_bins(held_out.law[:19], padded[:19]) == []


def test_a_normal_law_loses_its_tails_at_the_first_and_last_level():
    """One level: a point. Many levels: all of it. ±1 at Φ(±1): atoms of 0.1587 there and a uniform of 2/12 between."""
    assert spread_kept(torch.tensor([0.5])) == 0.0
    assert spread_kept(torch.arange(1, 10000) / 10000) == pytest.approx(1.0, abs=1e-3)
    tail = stats.norm.cdf(-1)
    assert spread_kept(torch.tensor([tail, 1 - tail])) == pytest.approx(math.sqrt(2 * tail + (1 - 2 * tail) * 4 / 12))


def test_within_and_observed_by_hand():
    """20 texts with raters −1 and 3 around a law at 0 ± 1: mean square (1 + 9)/2 = 5, unbiased variance 8."""
    law = RewardDistribution(torch.tensor([0.5]), torch.zeros(20, 1))
    rows = spread_bins(law, torch.tensor([[-1.0, 3.0]] * 20))
    assert rows[0] == pytest.approx(
        {"predicted": 0.0, "observed": 5**0.5, "within": 8**0.5, "low": 5**0.5, "high": 5**0.5, "texts": 2}
    )


def test_histogram_shares_sum_to_one_and_leave_out_single_raters():
    law = RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    shares = spread_histogram(law, torch.tensor([[1.0, 5.0], [1.0, math.nan], [3.0, 3.0]]), bins=4)
    assert shares["edges"] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert shares["observed"] == [0.5, 0.0, 0.0, 0.5]
    assert sum(shares["predicted"]) == pytest.approx(1.0)


def pairs_report(subsets):
    count = len(subsets)
    rng = np.random.default_rng(0)
    pairs = PreferencePairs([""] * count, ["a"] * count, ["b"] * count, subsets, equal=3)
    chosen, rejected = (
        RewardDistribution(LEVELS, torch.from_numpy(np.sort(rng.normal(shift, 1, size=(count, 39)))))
        for shift in (0.2, 0)
    )
    return preference_report(pairs, chosen, rejected, [parse_risk(spec) for spec in ("mean", "cvar:0.1")])


def test_preference_report_holds_subsets_and_sections():
    names = [name for subsets in REWARDBENCH_SECTIONS.values() for name in subsets]
    report = pairs_report(names * 4)
    assert (report["pairs"], report["equal_pairs_left_out"]) == (92, 3)
    mean = report["measures"]["mean"]
    assert mean["low"] < mean["accuracy"] < mean["high"]
    assert sum(part["n"] for part in mean["subsets"].values()) == 92
    assert mean["rewardbench"]["score"] == pytest.approx(np.mean(list(mean["rewardbench"]["sections"].values())))
    assert pairs_report(["u", "v"])["measures"]["mean"]["rewardbench"] is None


@pytest.fixture(scope="module")
def report(ratings_part):
    """Every part, with the attack wherever somebody else's text stands."""
    report = {
        "model": f"model {ATTACK}", "created": "2026-01-01", "level": 0.95, "warnings": [f"beware {ATTACK}"],
        "settings": {"dataset": ATTACK}, "ratings": ratings_part,
        "preferences": pairs_report(["alpacaeval-easy", ATTACK] * 10),
    }  # fmt: skip
    return without_nan(report)


def test_page_and_table_show_every_part_and_obey_nobody(report, ratings_part, tmp_path):
    json.dumps(report, allow_nan=False)
    write_reward_page(tmp_path / "page.html", report, title=f"title {ATTACK}")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "http" not in page
    assert page.count("<svg") == 5
    for phrase in ("Sharpness and spread", "Probability integral transform", "RewardBench", "at most 0.", "12.50%"):
        assert phrase in page
    table = reward_table(report)
    assert f"{100 * ratings_part['margin_over_homoscedastic']['estimate']:.2f} % [" in table
    assert "| preference pairs | n | mean | cvar:0.1 |" in table
    assert "RewardBench Chat" in table
    alone = report | {"ratings": None}
    write_reward_page(tmp_path / "pairs.html", alone, title="pairs")
    assert (tmp_path / "pairs.html").read_text().count("<svg") == 1
    assert reward_table(report | {"preferences": None}).startswith("| held-out ratings")


@pytest.mark.slow
def test_a_real_browser_shows_the_attack_and_does_not_run_it(report, tmp_path):
    write_reward_page(tmp_path / "page.html", report, title=f"title {ATTACK}")
    shown = opened(tmp_path / "page.html", tmp_path / "profile")
    assert re.search(r"<title>(.*?)</title>", shown, flags=re.DOTALL).group(1).startswith("title ")
    assert shown.count("&lt;script&gt;document.title='owned'&lt;/script&gt;") > 5


def test_one_number_per_text_still_makes_a_page(tmp_path):
    """A scalar model has no spread: no correlation with it, no sources with one text only, JSON null for NaN."""
    held_out = world(30, 7)
    law = RewardDistribution(torch.tensor([0.5]), held_out.law.mean()[:, None])
    part = rating_report(RatedTexts(held_out.ratings, ["x"] * 30, law), INTERVALS)
    assert part["spread"]["correlation"] is None
    assert math.isnan(part["std_correlation"])
    report = {"model": "m", "created": "", "level": 0.9, "warnings": [], "settings": {}, "preferences": None}
    report = without_nan(report | {"ratings": part})
    assert report["ratings"]["std_correlation"] is None
    write_reward_page(tmp_path / "page.html", report, title="scalar")
    assert "| – |" in reward_table(report)
