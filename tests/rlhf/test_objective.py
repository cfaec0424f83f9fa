"""The objective of a rollout: population over steps, schedules, constraints, guards, and their state."""

import json
import math

import pytest
import reference_risk
import torch
from bandits import lagrangian, staircase

from reward.distribution import RewardDistribution
from rlhf.attributes import WHOLE, build_objectives, split_attributes
from rlhf.constraints import DualAscent, parse_constraint, read_constraint
from rlhf.guards import RiskGuards, effective_sample_size, rank_correlation
from rlhf.influence import population_law
from rlhf.measures import RiskSpecError
from rlhf.objective import RiskObjective, evaluate_together, learn_together
from rlhf.population import PopulationTracker
from rlhf.risk import MEASURES, parse_risk
from rlhf.schedules import RiskSchedule

LEVELS = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])


def point(*values, dtype=torch.float64):
    """Laws without spread at these ratings."""
    return RewardDistribution(LEVELS.double(), torch.tensor(values, dtype=dtype).unsqueeze(-1).expand(-1, 5).clone())


def spread_laws(count=40, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(count, 1, generator=generator, dtype=dtype)
    width = torch.rand(count, 1, generator=generator, dtype=dtype) * 2
    return RewardDistribution(LEVELS.to(dtype), place + width * torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0], dtype=dtype))


# ---- The population over steps ---------------------------------------------------------------------------------


def test_average_over_steps_by_hand():
    tracker = PopulationTracker(decay=0.5)
    assert tracker.law is None
    for value in (8.0, 2.0, -4.0):
        tracker.update(RewardDistribution(torch.tensor([0.25, 0.75]), torch.tensor([value, value + 1])))
    # Weights 1/4, 1/2, 1 over their sum 7/4.
    expected = (8 * 0.25 + 2 * 0.5 - 4 * 1) / 1.75
    assert tracker.law.values.tolist() == pytest.approx([expected, expected + 1], abs=1e-12)


def test_first_law_counts_in_full():
    tracker = PopulationTracker(decay=0.99)
    tracker.update(RewardDistribution(torch.tensor([0.5]), torch.tensor([-3.0])))
    assert tracker.law.values.item() == pytest.approx(-3.0, abs=1e-12)


def test_tracker_continues_bit_by_bit():
    whole, first = PopulationTracker(0.9), PopulationTracker(0.9)
    laws = [population_law(spread_laws(seed=seed)) for seed in range(4)]
    for law in laws:
        whole.update(law)
    for law in laws[:2]:
        first.update(law)
    second = PopulationTracker(0.3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for law in laws[2:]:
        second.update(law)
    assert torch.equal(whole.law.values, second.law.values)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_tracker_refuses_a_decay_without_meaning(decay):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        PopulationTracker(decay)


def test_tracker_refuses_what_is_no_population():
    tracker = PopulationTracker()
    with pytest.raises(ValueError, match="one law"):
        tracker.update(point(1.0, 2.0))
    with pytest.raises(ValueError, match="finite"):
        tracker.update(RewardDistribution(torch.tensor([0.5]), torch.tensor([math.nan])))
    tracker.update(RewardDistribution(torch.tensor([0.5]), torch.tensor([0.0])))
    with pytest.raises(ValueError, match="1 levels before and has 2 others"):
        tracker.update(RewardDistribution(torch.tensor([0.2, 0.5]), torch.tensor([0.0, 1.0])))


# ---- Schedules ---------------------------------------------------------------------------------------------------


def schedule(first, last, **settings):
    return RiskSchedule(parse_risk(first), parse_risk(last), **settings)


@pytest.mark.parametrize(
    ("progress", "spec"), [(0.0, "mean"), (0.25, "cvar:0.775"), (0.5, "cvar:0.55"), (1.0, "cvar:0.1")]
)
def test_alpha_narrows_from_the_mean(progress, spec):
    assert schedule("mean", "cvar:0.1").at(progress).spec == spec


def test_cosine_is_slow_at_both_ends():
    cosine = schedule("cvar:1", "cvar:0.2", shape="cosine", begin=0.2, end=0.6)
    assert cosine.at(0.2).spec == "cvar:1"
    # A quarter of the way: (1 - cos 45°) / 2 = 0.1464...
    assert cosine.weight(0.3) == pytest.approx((1 - math.sqrt(0.5)) / 2, abs=1e-12)
    assert cosine.at(0.4).alpha == pytest.approx(0.6, abs=1e-9)
    assert cosine.at(0.61).spec == "cvar:0.2"


def test_measures_of_different_kinds_are_mixed():
    mixed = schedule("mean", "entropic:2").at(0.25)
    laws = spread_laws()
    expected = 0.75 * laws.mean() + 0.25 * parse_risk("entropic:2")(laws)
    torch.testing.assert_close(mixed(laws), expected, atol=1e-12, rtol=0)
    assert schedule("mean_variance:0", "mean_variance:1").at(0.25).spec == "mean_variance:0.25"
    tails = schedule("spectral:0.5@1,0.5@0.1", "spectral:0.9@1,0.1@0.2").at(0.5)
    expected = (parse_risk("spectral:0.5@1,0.5@0.1")(laws) + parse_risk("spectral:0.9@1,0.1@0.2")(laws)) / 2
    torch.testing.assert_close(tails(laws), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("settings", [{"shape": "step"}, {"begin": 0.5, "end": 0.5}, {"end": 1.5}, {"begin": -0.1}])
def test_schedule_refuses_what_does_not_exist(settings):
    with pytest.raises(RiskSpecError, match="risk schedule"):
        schedule("mean", "cvar:0.1", **settings)


# ---- Constraints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec", "bound"),
    [
        ("cvar:0.05 >= -1.0", "cvar:0.05 >= -1", -1.0),
        ("below:-2<=0.01", "below:-2 <= 0.01", -0.01),
        ("0.5*mean+0.5*cvar:0.1>=1e-1", "0.5*mean+0.5*cvar:0.1 >= 0.1", 0.1),
    ],
)
def test_constraints_are_read(text, spec, bound):
    constraint = parse_constraint(text)
    assert (constraint.spec, constraint.bound) == (spec, bound)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cvar:0.05", "cannot read the constraint"),
        ("cvar:0.05 > -1", "cannot read the constraint"),
        ("cvar:0.05 <= -1", "would keep ratings bad"),
        ("below:-2 >= 0.01", "would keep ratings bad"),
        ("below:-2 <= 1.5", "lies in"),
        ("mean >= nan", "finite number"),
        ("mean >= often", "finite number"),
        ("cvar:5 >= 0", "cvar"),
        ("python:math:floor >= 0", "influence"),
        (3, "cannot read the constraint"),
    ],
)
def test_broken_constraints_say_what_is_wrong(text, message):
    with pytest.raises(RiskSpecError, match=message):
        parse_constraint(text)


def test_a_constraint_in_one_batch_by_hand():
    laws = point(-3.0, 1.0, 1.0, 5.0)
    reading = read_constraint(parse_constraint("below:0 <= 0.5"), population_law(laws), laws)
    # One of four answers lies below: share 0.25, standard deviation 0.5, standard error 0.25.
    assert reading.value == pytest.approx(0.25, abs=1e-9)
    assert (reading.low, reading.high) == pytest.approx((0.25 - 1.959964 * 0.25, 0.25 + 1.959964 * 0.25), abs=1e-6)
    assert reading.state == "undecided"
    assert read_constraint(parse_constraint("mean >= -9"), population_law(laws), laws).state == "holds"
    assert read_constraint(parse_constraint("mean >= 9"), population_law(laws), laws).state == "violated"


def test_answers_of_one_prompt_are_no_independent_evidence():
    laws = point(*([-3.0] * 6 + [1.0] * 6 + [5.0] * 6))
    groups = torch.arange(3).repeat_interleave(6)
    constraint = parse_constraint("mean >= 0")
    by_prompt = read_constraint(constraint, population_law(laws), laws, groups)
    three = point(-3.0, 1.0, 5.0)
    alone = read_constraint(constraint, population_law(three), three)
    assert (by_prompt.low, by_prompt.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    assert read_constraint(constraint, population_law(laws), laws).low > by_prompt.low + 1


def test_interval_of_the_tail_covers():
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(120, 40, generator=generator, dtype=torch.float64)
    # CVaR 20 % of a standard normal law is -φ(z)/0.2 with z its 20 % quantile.
    truth = -1.3998
    covered = 0
    for sample in normal:
        laws = point(*sample.tolist())
        reading = read_constraint(parse_constraint("cvar:0.2 >= 0"), population_law(laws), laws)
        covered += reading.low <= truth <= reading.high
    # 120 trials of 0.95 have a standard deviation of 2 points; the delta method is a little short at 40 answers.
    assert 0.86 <= covered / 120 <= 0.99


def test_multipliers_move_by_hand():
    dual = DualAscent([parse_constraint("mean >= 2")], step_size=0.5, start=1.0)
    laws = point(0.0, 2.0)
    dual.step(laws.mean(), dual.read(population_law(laws), laws))
    # Shortfall 1 at a standard deviation of 1: the largest step.
    assert dual.multipliers == pytest.approx([math.exp(0.5)], abs=1e-9)
    laws = point(0.0, 4.8)
    dual.step(laws.mean(), dual.read(population_law(laws), laws))
    # Scales 1 and 2.4 averaged with weights 0.9 and 1; shortfall -0.4.
    scale = (0.9 * 1 + 2.4) / 1.9
    assert dual.multipliers == pytest.approx([math.exp(0.5 - 0.5 * 0.4 / scale)], abs=1e-9)


def test_multipliers_stay_in_their_bounds():
    dual = DualAscent([parse_constraint("mean >= 100")], step_size=3.0, bounds=(0.05, 7.0))
    laws = point(0.0, 2.0)
    for _ in range(5):
        dual.step(laws.mean(), dual.read(population_law(laws), laws))
    assert dual.multipliers == pytest.approx([7.0])
    dual = DualAscent([parse_constraint("mean >= -100")], step_size=3.0, bounds=(0.05, 7.0))
    for _ in range(5):
        dual.step(laws.mean(), dual.read(population_law(laws), laws))
    assert dual.multipliers == pytest.approx([0.05])


def test_utility_is_the_lagrangian():
    constraints = [parse_constraint("cvar:0.3 >= -1"), parse_constraint("below:-1 <= 0.1")]
    dual = DualAscent(constraints, start=0.5)
    laws = spread_laws()
    population = population_law(laws)
    utility = lagrangian(dual, laws.mean(), laws, population)
    nu = population.quantile(0.3)
    dense = laws.quantile((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)
    tail = nu - (nu - dense).clamp_min(0).mean(-1) / 0.3
    spreads = [part.std(correction=0) for part in (laws.mean(), tail, laws.cdf(-1.0))]
    size = 1 + 0.5 * (spreads[1] + spreads[2]) / spreads[0]
    expected = (laws.mean() + 0.5 * tail - 0.5 * laws.cdf(-1.0)) / size
    torch.testing.assert_close(utility, expected, atol=1e-4, rtol=0)  # the dense grid of 20,000 levels
    torch.testing.assert_close(lagrangian(dual, laws.mean(), laws, population, ramp=0.0), laws.mean())


def test_constraints_refuse_a_measure_bounded_twice():
    with pytest.raises(RiskSpecError, match="bounded by several"):
        DualAscent([parse_constraint("mean >= 1"), parse_constraint("mean >= 2")])
    with pytest.raises(RiskSpecError, match="step size"):
        DualAscent([], step_size=0.0)


# ---- Guards ------------------------------------------------------------------------------------------------------


def test_rank_correlation_with_ties_by_hand():
    # Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: products sum to 3, squares to 4.5 and 5.
    first, second = torch.tensor([0.0, 1.0, 1.0, 9.0]), torch.tensor([5.0, 4.0, 6.0, 7.0])
    assert rank_correlation(first, second) == pytest.approx(3 / math.sqrt(4.5 * 5.0), abs=1e-12)
    assert math.isnan(rank_correlation(torch.ones(3), second[:3]))


def test_effective_sample_size_by_hand():
    assert effective_sample_size(torch.tensor([1.0, -1.0, 1.0, -1.0])) == pytest.approx(4.0)
    # One of ten stands out: (0.9 + 9 * 0.1)² / (0.81 + 9 * 0.01) = 3.6.
    assert effective_sample_size(torch.tensor([1.0] + [0.0] * 9)) == pytest.approx(3.6, abs=1e-6)
    assert effective_sample_size(torch.ones(4)) == 0.0


def look(guards, measure="cvar:0.1", scope="response", utility=None, means=None, lowest=0.05):
    means = torch.arange(40.0) if means is None else means
    return guards.look(parse_risk(measure), scope, means if utility is None else utility, means, lowest)


def test_same_order_as_the_mean_is_told_once_after_some_rollouts():
    guards = RiskGuards(patience=3)
    said = [look(guards)[1] for _ in range(6)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0]
    assert "rank correlation 1.0000" in said[2][0]
    assert all(not look(RiskGuards(patience=1), measure="mean")[1] for _ in range(2))


def test_one_different_rollout_starts_the_count_anew():
    guards = RiskGuards(patience=2)
    other = torch.arange(40.0).flip(0)
    assert not look(guards)[1]
    assert not look(guards, utility=other)[1]
    assert not look(guards)[1]
    assert look(guards)[1]


def test_constant_utilities_and_lone_samples_are_told():
    (line,) = look(RiskGuards(patience=1), utility=torch.ones(40))[1]
    assert "all 40 answers had the same utility" in line
    lone = torch.zeros(40)
    lone[7] = -1.0
    numbers, (line,) = look(RiskGuards(patience=1), utility=lone)
    assert "fewer than a third of the answers carried the gradient of 'cvar:0.1'" in line
    assert "in the last 3.9 of 40" in line
    assert numbers["risk/effective_samples"] == pytest.approx(4 * 39 / 40, abs=1e-4)


def test_a_tail_below_the_lowest_level_is_told():
    other = torch.arange(40.0).flip(0)
    (line,) = look(RiskGuards(), measure="0.5*mean+0.5*cvar:0.01", utility=other)[1]
    assert "worst 0.01" in line
    assert "lowest quantile is at 0.05" in line
    assert not look(RiskGuards(), measure="cvar:0.05", utility=other)[1]
    assert not look(RiskGuards(), measure="cvar:0.01", scope="population", utility=other)[1]


# ---- The objective -----------------------------------------------------------------------------------------------


def test_response_scope_is_the_measure_of_each_law():
    laws = spread_laws()
    utility, numbers, _, _ = RiskObjective("cvar:0.3").learn(laws)
    torch.testing.assert_close(utility, parse_risk("cvar:0.3")(laws), atol=0, rtol=0)
    assert numbers["population/rating_mean"] == pytest.approx(laws.mean().mean().item(), abs=1e-9)


# A parameter off the examples for every measure.
DISCRETE = {"mean": [], "quantile": [0.13], "cvar": [0.13], "mean_variance": [0.4], "mean_std": [0.7]}
DISCRETE |= {"semideviation": [0.8], "entropic": [0.6], "expectile": [0.15], "below": [-1.0], "wang": [0.6]}
DISCRETE |= {"power": [1.7], "cpw": [0.65], "spectral": [(0.6, 1.0), (0.3, 0.31), (0.1, 0.07)]}


assert set(DISCRETE) == set(MEASURES)


@pytest.mark.parametrize("name", DISCRETE)
def test_response_scope_of_random_discrete_laws_equals_the_definition(name):
    generator = torch.Generator().manual_seed(11)
    outcomes = torch.tensor([-3.5, -2.25, -1.0, 0.25, 0.5, 2.0, 3.75], dtype=torch.float64)
    # Some outcomes of some laws have no mass at all, but for the best one.
    weights = torch.rand(30, 7, generator=generator).double() ** 3 * (torch.rand(30, 7, generator=generator) > 0.3)
    weights[:, -1] += 0.01
    probabilities = weights / weights.sum(-1, keepdim=True)
    numbers = DISCRETE[name]
    text = ",".join("@".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in numbers)
    utility = RiskObjective(f"{name}:{text}" if text else name).learn(staircase(outcomes, probabilities)).utility
    for row, found in zip(probabilities.numpy(), utility.tolist(), strict=True):
        if name == "quantile":
            expected = outcomes[int((row.cumsum() < numbers[0]).sum())].item()
        else:
            expected = reference_risk.discrete_utility(name, numbers, outcomes.numpy(), row)
        # Each jump is bridged over a mass of 2e-7.
        assert found == pytest.approx(expected, abs=2e-5)


def test_population_scope_looks_at_the_population_of_all_steps():
    objective = RiskObjective("cvar:0.5", "population", decay=0.5)
    first, second = point(-4.0, 0.0, 2.0, 6.0), point(-2.0, 2.0, 4.0, 8.0)
    objective.learn(first)
    utility, numbers, _, _ = objective.learn(second)
    nu = numbers["risk/cvar:0.5/nu"]
    # Medians of the two populations, jumps from 0 to 2 and from 2 to 4, with weights 1/3 and 2/3.
    assert nu == pytest.approx(
        (
            parse_risk("quantile:0.5")(population_law(first)) + 2 * parse_risk("quantile:0.5")(population_law(second))
        ).item()
        / 3,
        abs=1e-9,
    )
    expected = [nu - max(nu - z, 0.0) / 0.5 for z in (-2.0, 2.0, 4.0, 8.0)]
    assert utility.tolist() == pytest.approx(expected, abs=1e-9)


def test_evaluation_changes_nothing():
    objective = RiskObjective("cvar:0.2", "population", constraints=["cvar:0.1 >= 0"])
    objective.learn(spread_laws())
    before = json.dumps(objective.state_dict())
    utility = objective.evaluate(spread_laws(seed=1))
    assert utility.shape == (40,)
    assert json.dumps(objective.state_dict()) == before


def test_law_without_numbers_has_no_say():
    laws = spread_laws()
    broken = RewardDistribution(laws.levels, laws.values.clone())
    broken.values[3] = math.nan
    kept = torch.arange(40) != 3
    for scope in ("response", "population"):
        utility, _, _, _ = RiskObjective("cvar:0.2", scope).learn(broken)
        assert utility[3].isnan()
        alone, _, _, _ = RiskObjective("cvar:0.2", scope).learn(laws[kept])
        torch.testing.assert_close(utility[kept], alone, atol=0, rtol=0)
    nothing = RewardDistribution(laws.levels, torch.full_like(laws.values, math.nan))
    utility, numbers, _, _ = RiskObjective("cvar:0.2", "population").learn(nothing)
    assert utility.isnan().all()
    assert numbers == {}


def test_schedule_needs_to_know_how_far_training_is():
    objective = RiskObjective("cvar:0.2", schedule=schedule("mean", "cvar:0.2"))
    with pytest.raises(ValueError, match="how far training is"):
        objective.learn(spread_laws())
    laws = spread_laws()
    torch.testing.assert_close(objective.learn(laws, progress=0.0)[0], laws.mean(), atol=1e-12, rtol=0)


def test_state_continues_bit_by_bit():
    def fresh():
        return RiskObjective(
            "cvar:0.2", "population", constraints=["below:-1 <= 0.05"], schedule=schedule("mean", "cvar:0.2")
        )

    whole, first, second = fresh(), fresh(), fresh()
    for step in range(4):
        whole.learn(spread_laws(seed=step), progress=step / 4)
    for step in range(2):
        first.learn(spread_laws(seed=step), progress=step / 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(2, 4):
        last, _, _, _ = second.learn(spread_laws(seed=step), progress=step / 4)
    assert json.dumps(whole.state_dict()) == json.dumps(second.state_dict())
    assert torch.equal(whole.evaluate(spread_laws(seed=3), progress=0.75), second.evaluate(spread_laws(seed=3), 0.75))
    assert last.isfinite().all()
    with pytest.raises(ValueError, match="was trained on"):
        RiskObjective("cvar:0.2").load_state_dict(first.state_dict())


def test_a_checkpoint_with_the_old_levels_of_the_population_is_brought_to_the_new_ones():
    old = RiskObjective("cvar:0.2", "population")
    old.tracker.update(population_law(spread_laws(), 400))
    new = RiskObjective("cvar:0.2", "population")
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert new.tracker.law.quantile(0.2).item() == pytest.approx(old.tracker.law.quantile(0.2).item(), abs=1e-3)
    assert new.tracker.law.mean().item() == pytest.approx(old.tracker.law.mean().item(), abs=1e-3)
    assert new.learn(spread_laws(seed=1)).utility.isfinite().all()


def test_user_functions_have_no_population():
    with pytest.raises(RiskSpecError, match="response scope only"):
        RiskObjective("python:math:floor", "population")
    with pytest.raises(RiskSpecError, match="'response' or 'population'"):
        RiskObjective("mean", "everything")


# ---- Warm-up of constraints -----------------------------------------------------------------------------------


def test_multipliers_do_not_wind_up_while_nothing_follows_them():
    objective = RiskObjective("mean", constraints=["cvar:0.3 >= 50"], constraint_warmup=(0.5, 1.0))
    laws = spread_laws()
    for step in range(50):
        learned = objective.learn(laws, progress=step / 100)
        torch.testing.assert_close(learned.utility, laws.mean(), atol=0, rtol=0)
    assert objective.dual.multipliers == [1.0]
    assert learned.numbers["constraint/cvar:0.3/effective_multiplier"] == 0.0
    assert "multiplier 1, of which 0 counts so far" in learned.lines[0]
    # Half-way through the warm-up half of the multiplier counts, and half of a step is taken.
    learned = objective.learn(laws, progress=0.75)
    assert learned.numbers["constraint/cvar:0.3/effective_multiplier"] == pytest.approx(0.5)
    assert objective.dual.multipliers == pytest.approx([math.exp(0.05)])
    tail = learned.utility - laws.mean()
    assert tail.abs().max() > 0.1
    learned = objective.learn(laws, progress=1.0)
    assert learned.numbers["constraint/cvar:0.3/effective_multiplier"] == pytest.approx(math.exp(0.05))
    assert "so far" not in learned.lines[0]


def test_the_warm_up_is_that_of_the_constraints_alone():
    def utility(progress, **settings):
        objective = RiskObjective("cvar:0.2", constraints=["mean >= 3"], **settings)
        return objective.learn(spread_laws(), progress=progress).utility

    # A schedule of the measure leaves the constraint in full; at its end nothing of it is left.
    there = utility(1.0, schedule=schedule("mean", "cvar:0.2", begin=0.5))
    torch.testing.assert_close(there, utility(None), atol=0, rtol=0)
    at_the_start = utility(0.0, schedule=schedule("mean", "cvar:0.2", begin=0.5))
    laws = spread_laws()
    torch.testing.assert_close(at_the_start, laws.mean(), atol=1e-9, rtol=0)  # (mean + mean) / (1 + 1)
    # A warm-up leaves the measure in full.
    torch.testing.assert_close(utility(0.1, constraint_warmup=(0.2, 0.4)), parse_risk("cvar:0.2")(laws))
    assert not torch.allclose(utility(0.3, constraint_warmup=(0.2, 0.4)), parse_risk("cvar:0.2")(laws), atol=1e-3)


def test_a_warm_up_is_part_of_the_objective_and_needs_a_span():
    objective = RiskObjective("mean", constraints=["mean >= 3"], constraint_warmup=(0.2, 0.4))
    assert objective.spec == "mean; mean >= 3 (warm-up 0.2 to 0.4)"
    with pytest.raises(ValueError, match="warm-up of constraints needs to know how far"):
        objective.learn(spread_laws())
    with pytest.raises(ValueError, match="was trained on"):
        RiskObjective("mean", constraints=["mean >= 3"]).load_state_dict(objective.state_dict())
    with pytest.raises(RiskSpecError, match="a warm-up of constraints needs 0 <= begin < end <= 1"):
        RiskObjective("mean", constraints=["mean >= 3"], constraint_warmup=(0.4, 0.4))


# ---- Guards in training ----------------------------------------------------------------------------------------


def alike(count=24):
    """Laws of one shape, merely shifted: every measure that moves with a constant ranks them as the mean does."""
    place = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return RewardDistribution(LEVELS.double(), place + torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0]).double())


def warnings_of(objective, laws, rollouts=12, **settings):
    return [line for _ in range(rollouts) for line in objective.learn(laws, **settings).warnings]


def test_a_schedule_is_judged_at_its_end():
    objective = RiskObjective("cvar:0.3", schedule=schedule("mean", "cvar:0.3", end=0.5))
    for progress in (0.0, 0.1, 0.4):
        assert not warnings_of(objective, alike(), progress=progress)
    # Rollouts on the way do not count towards the ten at the end.
    assert not warnings_of(objective, alike(), rollouts=9, progress=0.5)
    (line,) = warnings_of(objective, alike(), rollouts=1, progress=0.6)
    assert "'cvar:0.3' (response scope) ranked the answers as their mean rating does" in line
    assert "compare_risk.py" in line


def test_utilities_that_differ_by_rounding_alone_are_equal_to_the_guard_as_to_the_whitening():
    # Around 1000 the numbers of float32 are 0.00006 apart.
    place = 1000.0 + 6.2e-5 * torch.arange(24, dtype=torch.float32).remainder(3).unsqueeze(-1)
    laws = RewardDistribution(LEVELS, place.expand(-1, 5).clone())
    objective = RiskObjective("mean")
    assert len(objective.learn(laws).utility.unique()) > 1
    (line,) = warnings_of(objective, laws)
    assert "had the same utility" in line


def test_a_narrow_tail_of_a_small_rollout_is_told():
    # Two of 24 answers lie in the tail.
    laws = point(-9.0, -8.0, *torch.linspace(0, 3, 22).tolist())
    objective = RiskObjective("cvar:0.1", "population")
    numbers = objective.learn(laws).numbers
    assert 5 < numbers["risk/effective_samples"] < 8
    (line,) = warnings_of(objective, laws)
    assert "fewer than a third of the answers" in line
    assert "of 24" in line
    assert not warnings_of(RiskObjective("mean"), spread_laws(24))
    assert not warnings_of(RiskObjective("cvar:0.5", "population"), spread_laws(24))


def test_the_tail_of_a_constraint_below_the_lowest_level_is_told():
    objective = RiskObjective(
        "mean", constraints=["cvar:0.05 >= -9", "cvar:0.2 >= -9", "spectral:0.5@1,0.5@0.01 >= -9"]
    )
    lines = warnings_of(objective, spread_laws())
    assert ["worst 0.05" in lines[0], "worst 0.01" in lines[1], len(lines)] == [True, True, 2]
    assert "of all ratings" in lines[0]
    assert not warnings_of(objective, spread_laws())


# ---- What reaches the log ----------------------------------------------------------------------------------------


def test_the_log_of_a_constraint_has_the_interval_over_prompts():
    laws, groups = point(*([-3.0] * 2 + [1.0] * 2 + [5.0] * 2)), torch.tensor([7, 7, 3, 3, 9, 9])
    numbers = RiskObjective("mean", constraints=["mean >= 0", "below:-8 <= 0.5"]).learn(laws, groups).numbers
    # Three prompts at -3, 1 and 5: mean 1, standard deviation 4.
    error = 1.959964 * 4 / math.sqrt(3)
    assert numbers["constraint/mean/low"] == pytest.approx(1 - error, abs=1e-5)
    assert numbers["constraint/mean/high"] == pytest.approx(1 + error, abs=1e-5)
    assert numbers["constraint/mean/value"] == pytest.approx(1.0)
    assert (numbers["constraint/mean/holds"], numbers["constraint/below:-8/holds"]) == (0.5, 1.0)
    broken = RiskObjective("mean", constraints=["mean >= 90"]).learn(laws, groups).numbers
    assert broken["constraint/mean/holds"] == 0.0


def test_every_tail_and_every_term_has_a_name_of_its_own_in_the_log():
    def names(risk, progress=None, **settings):
        objective = RiskObjective(risk, "population", **settings)
        numbers = objective.learn(spread_laws(), progress=progress).numbers
        return {name: value for name, value in numbers.items() if name.endswith(("/nu", "/nu_1", "/nu_2", "/mu"))}

    tails = names("spectral:0.6@0.5,0.4@0.2")
    law = population_law(spread_laws())
    expected = {f"risk/spectral:0.6@0.5,0.4@0.2/nu_{i}": law.quantile(a).item() for i, a in ((1, 0.5), (2, 0.2))}
    assert tails == pytest.approx(expected)
    # Two tails of a sum that is mixed in keep their specs; the numbers of one moving measure have one name.
    mixed = names("0.5*cvar:0.2+0.5*cvar:0.5", 0.5, schedule=schedule("mean", "0.5*cvar:0.2+0.5*cvar:0.5"))
    assert list(mixed) == ["risk/cvar:0.2/nu", "risk/cvar:0.5/nu"]
    for progress in (0.3, 0.5, 1.0):
        assert list(names("cvar:0.2", progress, schedule=schedule("cvar:0.9", "cvar:0.2"))) == ["risk/nu"]


def test_start_and_bounds_of_multipliers_are_those_that_were_asked_for():
    settings = {"constraint_start": 10.0, "constraint_bounds": (5.0, 10.5)}
    objective = build_objectives("mean", constraints=["mean >= 90"], **settings)[WHOLE]
    assert objective.dual.multipliers == pytest.approx([10.0])
    objective.learn(spread_laws())
    assert objective.dual.multipliers == pytest.approx([10.5])


# ---- Attributes --------------------------------------------------------------------------------------------------


def test_attributes_are_split():
    split = split_attributes("helpfulness = mean; harmlessness=0.5*cvar:0.05")
    assert split == {"helpfulness": "mean", "harmlessness": "0.5*cvar:0.05"}
    assert split_attributes("cvar:0.1") == {WHOLE: "cvar:0.1"}


@pytest.mark.parametrize("risk", ["a=mean; a=cvar:0.1", "a=mean;", "a=", "=mean; b=mean"])
def test_broken_attribute_specs_say_what_is_wrong(risk):
    with pytest.raises(RiskSpecError, match=r"two measures|cannot read"):
        split_attributes(risk)


def test_constraints_find_their_attribute():
    objectives = build_objectives("a=mean; b=cvar:0.2", constraints=["b=cvar:0.05 >= -1", "a=below:-2 <= 0.1"])
    assert {name: [c.spec for c in o.dual.constraints] for name, o in objectives.items()} == {
        "a": ["below:-2 <= 0.1"],
        "b": ["cvar:0.05 >= -1"],
    }
    warming = build_objectives("a=mean", constraints=["b=cvar:0.05 >= -1"], constraint_warmup=(0.1, 0.5))
    assert [objective.warmup for objective in warming.values()] == [(0.1, 0.5)] * 2
    with pytest.raises(RiskSpecError, match=r"does not fit the risk, which speaks of 'a=\.\.\.'"):
        build_objectives("a=mean", constraints=["cvar:0.05 >= -1"])
    with pytest.raises(RiskSpecError, match="speaks of no attribute"):
        build_objectives("mean", constraints=["a=cvar:0.05 >= -1"])
    with pytest.raises(RiskSpecError, match="needs a schedule"):
        build_objectives("cvar:0.1", schedule_from="cvar:1")


def test_an_attribute_may_have_a_constraint_and_no_measure():
    objectives = build_objectives("a=mean", "population", constraints=["b=mean >= 5"], schedule="linear")
    assert {name: objective.spec for name, objective in objectives.items()} == {
        "a": "population mean -> mean (linear, 0 to 1)",
        "b": "no measure; mean >= 5",
    }
    laws = {"a": spread_laws(), "b": spread_laws(seed=1)}
    learned = learn_together(objectives, laws, progress=0.5)
    total = sum(found.utility for found in learned.values())
    own, bounded = laws["a"].mean(), laws["b"].mean()
    expected = (own + bounded) / (1 + bounded.std(correction=0) / own.std(correction=0))
    torch.testing.assert_close(total, expected, atol=1e-9, rtol=0)
    assert objectives["b"].dual.multipliers == pytest.approx([math.exp(0.1)])
    again = build_objectives("a=mean", "population", constraints=["b=mean >= 5"], schedule="linear")
    for name, objective in again.items():
        objective.load_state_dict(json.loads(json.dumps(objectives[name].state_dict())))
    same = evaluate_together(again, laws, 0.5)
    torch.testing.assert_close(same["b"], evaluate_together(objectives, laws, 0.5)["b"], atol=0, rtol=0)


def test_weights_of_an_answer_do_not_touch_the_constraints():
    laws = {"a": spread_laws(), "b": spread_laws(seed=1)}
    weights = {"a": torch.linspace(0, 2, 40), "b": torch.zeros(40)}

    def learned(constraints):
        objectives = build_objectives("a=mean; b=cvar:0.2", constraints=constraints)
        return sum(found.utility for found in learn_together(objectives, laws, weights=weights).values())

    own = weights["a"] * laws["a"].mean()
    torch.testing.assert_close(learned([]), own.double(), atol=1e-9, rtol=0)
    bounded = laws["b"].mean()
    expected = (own + bounded) / (1 + bounded.std(correction=0) / own.std(correction=0))
    torch.testing.assert_close(learned(["b=mean >= 5"]), expected.double(), atol=1e-9, rtol=0)


def test_a_law_without_numbers_in_one_attribute_has_no_say_in_it():
    laws = {"a": spread_laws(), "b": spread_laws(seed=1)}
    laws["b"].values[3] = math.nan
    objectives = build_objectives("a=mean; b=cvar:0.2", "population", constraints=["b=mean >= 5"])
    total = sum(found.utility for found in learn_together(objectives, laws).values())
    assert total.isnan().nonzero().tolist() == [[3]]
    laws["b"].values[:] = math.nan
    learned = learn_together(objectives, laws)
    assert learned["b"].numbers == {}
    assert learned["b"].utility.isnan().all()
