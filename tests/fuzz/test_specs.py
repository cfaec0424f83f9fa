"""Specs as nobody should write them: each is read, or refused with one clear error; what is read gives numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.distribution import RewardDistribution
from reward.source_specs import EXAMPLES, SourceSpec, SourceSpecError, read_source_spec
from rlhf.attributes import build_objectives, split_attributes
from rlhf.constraints import parse_constraint
from rlhf.measures import RiskMeasure, RiskSpecError
from rlhf.risk import MEASURES, WeightedSum, parse_risk
from rlhf.schedules import SHAPES, RiskSchedule

NUMBERS = st.one_of(
    st.sampled_from(
        ["0", "1", "0.1", "0.5", "-0", "-1", "1e-45", "5e-324", "1e6", "1e9", "1e39", "1e308", "1e999", "nan"]
    ),
    st.sampled_from(["inf", "-inf", "0.99999999999", "1_0", "٣", "²", "0x1", "1e", ".", "", "1,2", "0.5@1", "1@0.1"]),
    st.floats().map(repr),
    st.floats(0.01, 0.99).map(repr),
)
NAMES = st.sampled_from([*MEASURES, "python", "Mean", "", "model", "qrm"])
TERMS = st.builds("{}:{}".format, NAMES, NUMBERS) | st.sampled_from([m.example for m in MEASURES.values()])
WEIGHTED = st.builds("{}*{}".format, NUMBERS, TERMS) | TERMS
SUMS = st.builds(lambda terms, signs: "".join(s + t for s, t in zip(signs, terms, strict=False)),
                 st.lists(WEIGHTED, min_size=1, max_size=4), st.lists(st.sampled_from(["+", "-", " + ", "", "--"]),
                                                                      min_size=4, max_size=4))  # fmt: skip
NOISE = st.text(max_size=30) | st.text("0123456789.eE+-*:@,;=<> mean_cvarpythoinf\n\0", max_size=40)
SPECS = SUMS | NOISE


def laws(values: torch.dtype = torch.float32) -> st.SearchStrategy[RewardDistribution]:
    """One law with 1 to 19 levels and ratings within ±1e4, often constant."""

    def law(count: int, low: float, spread: float, bend: float) -> RewardDistribution:
        levels = torch.linspace(0, 1, count + 2, dtype=torch.float64)[1:-1]
        return RewardDistribution(levels.to(values), (low + spread * levels**bend).to(values))

    spreads = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]) | st.floats(0, 100)
    return st.builds(law, st.integers(1, 19), st.floats(-1e4, 1e4), spreads, st.sampled_from([0.3, 1.0, 4.0]))


def read(spec: str) -> RiskMeasure | None:
    """The measure, or None where it is refused in the one way that is allowed."""
    try:
        return parse_risk(spec)
    except RiskSpecError:
        return None


@given(spec=SPECS)
def test_a_risk_spec_is_read_or_refused_and_its_canonical_form_is_the_same(spec):
    measure = read(spec)
    if measure is not None:
        assert parse_risk(measure.spec).spec == measure.spec


@given(spec=SUMS, law=laws())
def test_whatever_is_read_gives_a_finite_utility(spec, law):
    measure = read(spec)
    if measure is not None:
        assert bool(measure(law).isfinite()), measure.spec


@given(
    spec=TERMS, law=laws(torch.float64), shift=st.floats(-100, 100), step=st.floats(0, 100), place=st.integers(0, 18)
)
def test_declared_properties_hold_for_whatever_is_read(spec, law, shift, step, place):
    """docs/risk.md: a shift of every rating moves the utility as much; a better rating does not lower it."""
    measure = read(spec)
    if measure is None or isinstance(measure, WeightedSum):
        return
    before = measure(law).item()
    # Prices reach 1e6, and a spread that rounding leaves is multiplied by them.
    size = 1e-6 * (1 + law.values.abs().max().item() + abs(shift) + step) + 1e-9 * abs(before)
    if measure.translation:
        moved = measure(RewardDistribution(law.levels, law.values + shift)).item()
        assert moved == pytest.approx(before + shift, abs=size), measure.spec
    if measure.monotone:
        raised = law.values.clone()
        raised[place % len(raised) :] += step
        assert measure(RewardDistribution(law.levels, raised)).item() >= before - size, measure.spec


def test_a_rating_that_everyone_gives_is_worth_itself_at_any_aversion():
    # 19 equal values average to 2.0000002 in float32; a rate of 1e10 made minus infinity of the difference.
    law = RewardDistribution(torch.linspace(0.05, 0.95, 19), torch.full((19,), 2.0))
    for spec in ("entropic:1e10", "entropic:1e300", "expectile:0.999999999", "power:1e300"):
        assert parse_risk(spec)(law).item() == pytest.approx(2.0, rel=1e-6), spec
    for spec in (
        "mean_variance:1e39",
        "mean_std:2e6",
        "semideviation:1e300",
        "1e39*mean",
        "expectile:0.9999999999999",
    ):
        with pytest.raises(RiskSpecError):
            parse_risk(spec)


@given(spec=st.builds("{}{}{}".format, SPECS, st.sampled_from([" >= ", " <= ", ">=", "=", " > ", ""]), NUMBERS))
def test_a_constraint_is_read_or_refused(spec):
    try:
        constraint = parse_constraint(spec)
    except RiskSpecError:
        return
    assert math.isfinite(constraint.bound)
    assert parse_constraint(constraint.spec).spec == constraint.spec


@given(
    first=TERMS, last=TERMS, shape=st.sampled_from([*SHAPES, "", "step"]), begin=st.floats(), end=st.floats(),
    progress=st.floats(0, 1), law=laws(),
)  # fmt: skip
def test_a_schedule_is_refused_or_always_has_a_measure(first, last, shape, begin, end, progress, law):
    first, last = read(first), read(last)
    if first is None or last is None:
        return
    try:
        schedule = RiskSchedule(first, last, shape, begin, end)
    except RiskSpecError:
        return
    assert bool(schedule.at(progress)(law).isfinite()), (schedule.spec, progress)


ATTRIBUTES = st.lists(st.builds("{}={}".format, st.sampled_from(["a", "b", " ", "a b", ""]), SPECS), max_size=3)


@given(
    risk=ATTRIBUTES.map(";".join) | SPECS, scope=st.sampled_from(["response", "population", ""]),
    constraints=st.lists(st.sampled_from(["cvar:0.1 >= -1", "a=below:-2 <= 0.1", "=>", "b=mean >= nan"]), max_size=2),
    decay=st.floats(), step=st.floats(), schedule=st.sampled_from([None, "linear", "x"]),
    span=st.tuples(st.floats(), st.floats()),
)  # fmt: skip
def test_objectives_are_built_or_refused(risk, scope, constraints, decay, step, schedule, span):
    try:
        objectives = build_objectives(
            risk, scope, constraints=constraints, decay=decay, constraint_step_size=step, schedule=schedule,
            schedule_span=span,
        )  # fmt: skip
    except ValueError:
        return
    assert set(objectives) == set(split_attributes(risk))


PLACES = st.sampled_from(["a", "a/b", ".", "", "/nowhere", "a,b", "~", "scalar:a", "mixture:1*a", "\0", "x" * 300])
QUERIES = st.sampled_from(
    ["", "?", "?num_levels=0", "?num_levels=x", "?num_levels=-1", "?num_levels=" + "9" * 300, "?scale=1,nan",
     "?scale=", "?weights=inf", "?scores=no:0,yes:1", "?scores=1,,2", "?scores=a:nan", "?scores=1,1", "?spread=x",
     "?aggregation=mixture", "?aggregation=x", "?=", "?&&", "?max_outside_mass=nan"]
)  # fmt: skip
KINDS = st.sampled_from(["", "scalar:", "ensemble:", "gaussian:", "judgment:", "model:", "mixture:0.5*", "average:1*"])
SOURCES = st.builds("{}{}{}".format, KINDS, PLACES, QUERIES) | st.sampled_from(EXAMPLES) | NOISE
COMBINED = st.builds(
    "{}:{}*{}+{}*{}".format, st.sampled_from(["mixture", "average"]), NUMBERS, SOURCES, NUMBERS, SOURCES
)


@given(text=SOURCES | COMBINED)
def test_a_source_spec_is_read_or_refused(text):
    try:
        spec = read_source_spec(text)
    except SourceSpecError:
        return
    assert isinstance(spec, SourceSpec)
    assert all(spec.all_paths())
    again = read_source_spec(spec.text)
    assert again.kind == spec.kind
    # Not compared as a whole: a score of NaN would differ from itself.
    assert [weight for weight, _ in again.terms] == [weight for weight, _ in spec.terms]
