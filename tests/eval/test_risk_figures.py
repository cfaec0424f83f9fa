"""The weights that a measure gives to ranks of readers, and the picture of them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.risk_figures import rank_weights, risk_figure, save, tenths
from reward.distribution import RewardDistribution
from rlhf.risk import MEASURES, parse_risk

ROOT = Path(__file__).parents[2]
SPECS = [measure.example for measure in MEASURES.values()]
LAW = RewardDistribution([0.05, 0.3, 0.5, 0.95], torch.tensor([-3.0, -0.5, 1.0, 2.0]))


def test_weights_are_the_spectrum():
    ranks, weights = rank_weights(parse_risk("cvar:0.25"), LAW)
    assert weights[ranks < 0.24] == pytest.approx(4.0, abs=1e-9)
    assert weights[ranks > 0.26] == pytest.approx(0.0, abs=1e-9)
    ranks, weights = rank_weights(parse_risk("power:2"), LAW)
    assert weights == pytest.approx(3 * (1 - ranks) ** 2, abs=1e-2)
    # In the flat tails of the law, below 0.05 and above 0.95, readers agree; their ranks differ all the same.
    ranks, weights = rank_weights(parse_risk("cpw:0.71"), LAW)
    assert (np.diff(weights[:20]) < 0).all()
    assert (np.diff(weights[-20:]) > 0).all()
    _, weights = rank_weights(parse_risk("mean"), LAW)
    assert weights == pytest.approx(1.0, abs=1e-9)


def test_tenths_of_the_readers():
    _, weights = rank_weights(parse_risk("spectral:0.6@1,0.4@0.2"), LAW)
    assert tenths(weights).tolist() == pytest.approx([0.26] * 2 + [0.06] * 8, abs=2e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_weights_of_a_measure_that_moves_with_a_constant_have_mean_one(spec):
    measure = parse_risk(spec)
    _, weights = rank_weights(measure, LAW)
    if measure.translation:
        assert weights.mean() == pytest.approx(1.0, abs=1e-6)
    if measure.monotone:
        assert weights.min() >= -1e-9


def test_what_has_no_weights_is_refused(tmp_path, monkeypatch):
    (tmp_path / "stepwise.py").write_text("def f(law): return (law.values.detach() > 0).double().mean(-1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no weights to show"):
        rank_weights(parse_risk("python:stepwise:f"), LAW)
    with pytest.raises(ValueError, match="weights belong to one law"):
        rank_weights(parse_risk("mean"), LAW[None])


def test_the_picture_names_every_measure(tmp_path):
    figure = risk_figure([parse_risk(spec) for spec in ("cvar:0.1", "below:0", "mean_variance:1", "mean")], LAW, "a")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert len(titles) == 5
    assert titles[0].startswith("ratings")
    assert "below:0" in titles[2]
    save(figure, tmp_path / "new" / "risk.png")
    assert (tmp_path / "new" / "risk.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["risk_weights", "risk_influence"])
def test_pictures_of_the_guide_show_what_the_code_computes(name):
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "docs" / "make_figures.py")
    make_figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_figures)
    curves = {"risk_weights": make_figures.weight_curves, "risk_influence": make_figures.influence_curves}[name]()
    with Image.open(ROOT / "docs" / "images" / f"{name}.png") as picture:
        shown = json.loads(picture.text[make_figures.CURVES])
    assert list(shown) == list(curves) == make_figures.PANELS, "run docs/make_figures.py"
    for measure, numbers in curves.items():
        assert shown[measure] == pytest.approx(numbers, abs=2e-3), f"run docs/make_figures.py: {measure} is stale"
