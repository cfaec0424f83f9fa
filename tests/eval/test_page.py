"""The page: self-contained, well formed, and proof against what models write."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import ATTACK, opened

from eval.figures import CURVES, INK, SERIES, mixture_cdf, training_figure
from eval.judges import Judgement
from eval.page import text, write_page
from eval.report import Measurement, PolicyResult, build_report
from eval.tail import absolute_threshold, frozen_threshold
from reward.distribution import RewardDistribution

LEVELS = [0.1, 0.3, 0.5, 0.7, 0.9]


class StubJudge:
    spec, unit = f"python:{ATTACK}:f", f"unit {ATTACK}"


def result(name, shift, law=True):
    rng = np.random.default_rng(4)
    centres = rng.normal(size=60) + shift
    rows = [
        {
            "prompt_id": str(i), "sample": 0, "prompt": f"p{i} {ATTACK}",
            "completion": f"c{i} {ATTACK}\ud800\x00\x1b[31m", "completion_tokens": 5,
            "finished": i % 2 == 0, "source": ATTACK, "decoding": {},
            "kl_k1_sum": abs(shift), "kl_k3_mean": 0.1,
        }
        for i in range(60)
    ]  # fmt: skip
    values = torch.from_numpy(centres[:, None] + np.linspace(-1, 1, 5)).float()
    laws = RewardDistribution(levels=torch.tensor(LEVELS), values=values)
    return PolicyResult(name, rows, Judgement(centres, laws if law else None))


def coverage_rows(error):
    return [{"level": t, "coverage": t + error, "low": t + error - 0.02, "high": t + error + 0.02} for t in LEVELS]


CALIBRATION = {
    "levels": LEVELS, "coverage": coverage_rows(0.01), "pinball": 0.35, "skill": 0.3, "texts": 90,
    "sources": {"tweets": {"coverage": coverage_rows(-0.02)}, ATTACK: {"coverage": coverage_rows(0.03)}},
}  # fmt: skip

HISTORY = [
    {
        "step": i,
        "loss": 1.0,
        **{keys[0]: 0.1 * i for keys in CURVES.values()},
        "reward/rating_mean": None if i % 2 else 0.3,
    }
    for i in range(1, 9)
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = [result("base", 0.0), result(f"tuned {ATTACK}", 0.7)]
    threshold = frozen_threshold(results[0].scores, 0.05)
    measurement = Measurement(threshold, rating_threshold=-2.0, resamples=100)
    report = build_report(results, measurement, StubJudge(), seconds={ATTACK: 1.0}, settings={ATTACK: ATTACK})
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, report, results, histories={results[1].name: HISTORY}, calibration=CALIBRATION, title=ATTACK)
    return path


class Checker(HTMLParser):
    """Collects tags, attributes and text, and complains about tags that do not close."""

    def __init__(self, source):
        super().__init__()
        self.stack, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in ("meta",):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_and_has_every_section(page):
    checker = Checker(page.read_text())
    assert checker.stack == []
    ids = [value for _, name, value in checker.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for tag, name, value in checker.attributes if tag == "a" and name == "href"}
    assert links == {"results", "ratings", "training", "frontier", "calibration", "worst", "method"} <= set(ids)
    assert checker.tags.count("svg") == 6
    assert [v for t, n, v in checker.attributes if t == "svg" and n == "role"] == ["img"] * 6
    assert all(v for t, n, v in checker.attributes if t == "svg" and n == "aria-label")
    references = re.findall(r'(?:href="|url\()#([\w-]+)', page.read_text())
    assert len(references) > 50
    assert set(references) <= set(ids)


def test_the_page_fetches_and_runs_nothing(page):
    source = page.read_text()
    checker = Checker(source)
    assert not {"script", "img", "iframe", "link", "object", "embed", "base", "form"} & set(checker.tags)
    assert [
        a for a in checker.attributes if a[1].startswith("on") or (a[2] or "").strip().startswith("javascript:")
    ] == []
    addresses = [v for _, n, v in checker.attributes if n in ("src", "href", "xlink:href", "action") and v[0] != "#"]
    assert addresses == []
    assert "http" not in source.replace("http-equiv", "")
    assert "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []


def test_what_models_wrote_is_shown_as_text(page):
    source = page.read_text()
    assert "<script" not in source.lower()
    assert "<img" not in source.lower()
    assert "&lt;script&gt;document.title=&#x27;owned&#x27;&lt;/script&gt;" in source
    words = "".join(Checker(source).words)
    # Title, heading, lead, each name in tables and figures, prompts, completions, settings.
    assert words.count("<script>document.title='owned'</script>") > 20
    assert "\x00" not in source
    assert "\x1b" not in source
    assert "\ufffd\ufffd\ufffd[31m" in words


def test_text_escapes_everything_a_browser_could_obey():
    assert text("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert (
        text("tab\tnewline\nkept \x07\x7f\x9f dropped, ünï 漢")
        == "tab\tnewline\nkept \ufffd\ufffd\ufffd dropped, ünï 漢"
    )


def test_colours_follow_the_page(page):
    source = page.read_text()
    assert INK not in source
    assert not any(placeholder in source for placeholder in SERIES)
    used = set(re.findall(r"var\((--[\w-]+)\)", source))
    light, dark = source.split("prefers-color-scheme: dark", 1)
    for variable in used:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark.split("}")[0] + dark.split("}")[1]


@pytest.mark.parametrize("missing", ["nothing", "laws", "kl"])
def test_sections_without_data_are_left_out(tmp_path, missing):
    results = [result("base", 0.0, law=missing != "laws"), result("tuned", 0.5, law=missing != "laws")]
    if missing == "kl":
        for r in results:
            for row in r.completions:
                row["kl_k1_sum"] = None
    measurement = Measurement(frozen_threshold(results[0].scores, 0.05), resamples=100)
    write_page(tmp_path / "r.html", build_report(results, measurement, StubJudge()), results)
    checker = Checker((tmp_path / "r.html").read_text())
    links = {value for tag, name, value in checker.attributes if tag == "a" and name == "href"}
    expected = {"#results", "#ratings", "#worst", "#method"} | (set() if missing == "kl" else {"#frontier"})
    assert links == expected


def test_worst_completions_come_first_and_failures_not_at_all(tmp_path):
    r = result("base", 0.0)
    scores = r.scores.copy()
    scores[5], scores[9], scores[11] = -50.0, -40.0, np.nan
    r = PolicyResult("base", r.completions, Judgement(scores))
    report = build_report([r], Measurement(frozen_threshold(scores, 0.05), resamples=100), StubJudge())
    write_page(tmp_path / "r.html", report, [r], worst=2)
    shown = re.findall(r"</span>c(\d+) ", (tmp_path / "r.html").read_text())
    assert shown == ["5", "9"]


@pytest.mark.parametrize("threshold", [-900.0, -2.0, 0.0, 900.0])
@pytest.mark.parametrize("constant", [False, True])
def test_thresholds_outside_the_scores_and_constant_scores_can_be_drawn(tmp_path, threshold, constant):
    r = result("base", 0.0)
    r = PolicyResult("base", r.completions, Judgement(np.ones(60)) if constant else r.judgement)
    report = build_report([r], Measurement(absolute_threshold(threshold), resamples=100), StubJudge())
    write_page(tmp_path / "r.html", report, [r])
    # A line that no axis reaches would squeeze the figure flat, which matplotlib reports as a warning.
    assert ("threshold −" in (tmp_path / "r.html").read_text()) == (threshold == -2.0 and not constant)


def test_training_figure_takes_the_first_logged_key_and_skips_absent_ones():
    history = [{"step": i, "reward/score_mean": float(i), "kl/reference": float("nan")} for i in range(4)]
    svg = training_figure({"a": history}, ["base", "a"])
    assert "utility" in svg
    assert "KL" not in svg
    assert training_figure({"a": [{"step": 1, "loss": 2.0}]}, ["a"]) is None
    assert training_figure({}, ["a"]) is None


def test_mixture_is_the_mean_of_the_laws():
    law = RewardDistribution(levels=torch.tensor([0.25, 0.75]), values=torch.tensor([[0.0, 1.0], [2.0, 2.0]]))
    broken = RewardDistribution(levels=law.levels, values=torch.cat([law.values, torch.full((1, 2), torch.nan)]))
    for laws in (law, broken):
        assert mixture_cdf(laws, np.array([-1.0, 0.5, 1.0, 2.0])) == pytest.approx([0.0, 0.25, 0.5, 1.0])


@pytest.mark.slow
def test_a_real_browser_shows_the_attack_and_does_not_run_it(page, tmp_path):
    shown = opened(page, tmp_path / "profile")
    assert re.search(r"<title>(.*?)</title>", shown, flags=re.DOTALL).group(1) != "owned"
    assert shown.count("&lt;script&gt;document.title='owned'&lt;/script&gt;") > 20
    # The same page with the escaping undone: the browser does run scripts, so the test above can fail.
    bare = tmp_path / "bare.html"
    bare.write_text("<!DOCTYPE html><title>t</title><script>document.title='owned'</script>")
    assert "<title>owned</title>" in opened(bare, tmp_path / "profile")


def test_a_browser_that_is_meant_to_be_there_is_missed(page, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for value, outcome in (("", pytest.skip.Exception), ("0", pytest.skip.Exception), ("1", pytest.fail.Exception)):
        monkeypatch.setenv("REQUIRE_BROWSER", value)
        with pytest.raises(outcome, match="no chromium on this machine"):
            opened(page, tmp_path / "profile")


def test_the_calibration_of_training_is_what_the_page_draws():
    from eval.figures import calibration_figure
    from reward.calibration import calibration_report

    levels = torch.tensor(LEVELS)
    quantiles = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).sort(-1).values
    ratings = [[0.0, 1.0, -1.0]] * 30
    report = calibration_report(quantiles, ratings, ["x", "y"] * 15, levels, torch.linspace(-1, 1, 5))
    svg = calibration_figure(json.loads(json.dumps(report)))
    assert "all texts" in svg
    assert ">y<" in svg
