"""Choices with a known answer: every risk measure, in both scopes, must lead PPO to the answer it is known to prefer.

One prompt, five answers whose ratings take two values each:

    bold   3 with 0.85, -5.5 with 0.15      the best mean
    edge   1.2 with 0.95, -9 with 0.05      good for 19 readers of 20, a disaster for one
    lucky  3.6 with 0.25, 0 with 0.75       spread, but all of it upwards
    safe   0.25 or 0.75, evenly             hardly any spread
    bad    -3                               for nobody

By hand, with g(p) = p^η / (p^η + (1 − p)^η)^(1/η) the weight of winning with probability p under `cpw`, and Φ the
normal distribution:

    mean             bold   0.85 · 3 − 0.15 · 5.5
    mean_variance    safe   ½ − L/16, a spread of ¼ to both sides
    mean_std         safe   ½ − L/4
    semideviation    lucky  0.9 − L √(0.75 · 0.9²): three quarters fall short by 0.9
    entropic         safe   −log ½(e^−0.25 + e^−0.75)
    expectile:0.1    safe   0.1 · ½ (0.75 − e) = 0.9 · ½ (e − 0.25)
    below:0.1        safe   no rating that low; lucky has 0.75 of them
    wang             safe   0.75 − ½ Φ(L), as w(½) = Φ(L)
    power:2          safe   0.75 − ½ (1 − (½)³), the worst of three readers
    cpw              lucky  3.6 g(0.25)
    spectral         lucky  0.7 of its mean and 0.3 of its worst tenth, which is 0

A quantile of discrete ratings moves in jumps, and the lower tail of a population with enough ratings on one value does
not move at all (see the last section). So for `quantile` and `cvar` each value is spread evenly over ±0.4:

    quantile:0.1     edge   1.2 − 0.4 + 0.8 · 0.05/0.95, the rating after a nineteenth of the upper value
    cvar:0.1         safe   0.25 − 0.4 + 0.8 · ½ · 0.1/0.5, the mean of the lowest fifth of the lower value

Population scope. Under one prompt the law of all ratings of a policy is the mixture of the laws of its answers. All
measures here but `cpw` are quasi-convex in that law, so that no mixture is better than the best of its answers:

    cvar             max over ν of ν − E (ν − Z)₊/α, a maximum of functions linear in the law; sums of them likewise
    wang, power      −∫ w(F(z)) dz + constant with a concave w
    mean_variance    E Z − L E Z² + L (E Z)²;    mean_std likewise, as the root of a concave function is concave
    entropic         −log of something linear
    expectile, quantile    {F : ρ(F) ≥ c} and its complement are half-spaces: E gains ≥ E losses at c; F(c) ≤ α

So both scopes end on the same answer here. Convexity has a price: gradients may lead to a lesser corner.
"""

import itertools
import math

import numpy as np
import pytest
import reference_risk
import torch
from bandits import Bandit, policies, train
from scipy import stats

from rlhf.influence import expected_influence, statistics
from rlhf.objective import RiskObjective
from rlhf.population import PopulationTracker
from rlhf.risk import MEASURES, RiskSpecError, parse_risk

ARMS = {
    "bold": {3.0: 0.85, -5.5: 0.15},
    "edge": {1.2: 0.95, -9.0: 0.05},
    "lucky": {3.6: 0.25, 0.0: 0.75},
    "safe": {0.25: 0.5, 0.75: 0.5},
    "bad": {-3.0: 1.0},
}
SEEDS = [1, 2, 3]
SCOPES = ["response", "population"]


def normal(x):
    return float(stats.norm.cdf(x))


def cpw_gain(p, eta=0.71):
    return p**eta / (p**eta + (1 - p) ** eta) ** (1 / eta)


# Spec: the best answer and its utility, the second best and its utility, by the equations above.
BEST = {
    "mean": ("bold", 0.85 * 3 - 0.15 * 5.5, "lucky", 0.9),
    "quantile:0.1": ("edge", 0.8 + 0.8 / 19, "safe", -0.15 + 0.8 * 0.2),
    "cvar:0.1": ("safe", -0.15 + 0.8 * 0.1, "lucky", -0.4 + 0.8 * 0.5 * 0.1 / 0.75),
    "mean_variance:0.5": ("safe", 0.5 - 0.5 / 16, "lucky", 0.9 - 0.5 * 3 / 16 * 3.6**2),
    "mean_std:1": ("safe", 0.25, "lucky", 0.9 - 3.6 * math.sqrt(3 / 16)),
    "semideviation:0.5": ("lucky", 0.9 - 0.45 * math.sqrt(0.75), "safe", 0.5 - 0.125 * math.sqrt(0.5)),
    "entropic:1": (
        "safe",
        -math.log((math.exp(-0.25) + math.exp(-0.75)) / 2),
        "lucky",
        -math.log(0.75 + 0.25 * math.exp(-3.6)),
    ),
    "expectile:0.1": ("safe", 0.3, "lucky", 0.09 / 0.7),
    "below:0.1": ("safe", 0.0, "edge", -0.05),
    "wang:1.25": ("safe", 0.75 - 0.5 * normal(1.25), "lucky", 3.6 * (1 - normal(stats.norm.ppf(0.75) + 1.25))),
    "power:2": ("safe", 0.75 - 0.5 * 0.875, "lucky", 3.6 / 64),
    "cpw:0.71": ("lucky", 3.6 * cpw_gain(0.25), "bold", 8.5 * cpw_gain(0.85) - 5.5),
    "spectral:0.7@1,0.3@0.1": ("lucky", 0.63, "safe", 0.7 * 0.5 + 0.3 * 0.25),
}


def one_prompt(spec):
    blur = 0.4 if spec in ("quantile:0.1", "cvar:0.1") else 0.0
    return Bandit.of([list(ARMS.values())], [1.0], blur)


@pytest.mark.parametrize("spec", BEST)
def test_the_best_two_answers_are_those_of_the_header(spec):
    utilities = dict(zip(ARMS, parse_risk(spec)(one_prompt(spec).laws())[0].tolist(), strict=True))
    winner, utility, runner_up, second = BEST[spec]
    assert sorted(utilities, key=utilities.get)[-2:] == [runner_up, winner]
    # Jumps are bridged over a mass of 2e-7.
    assert (utilities[winner], utilities[runner_up]) == pytest.approx((utility, second), abs=1e-5)


def test_every_measure_has_a_bandit_and_the_mean_is_alone_in_its_choice():
    assert {parse_risk(spec).__class__ for spec in BEST} == set(MEASURES.values())
    assert [spec for spec, (winner, *_) in BEST.items() if winner == "bold"] == ["mean"]


@pytest.mark.parametrize("spec", [spec for spec in BEST if spec not in ("quantile:0.1", "cvar:0.1")])
def test_no_mixture_of_answers_is_better_for_the_population_than_the_best_answer(spec):
    name, _, argument = spec.partition(":")
    numbers = [
        tuple(map(float, part.split("@"))) if "@" in part else float(part) for part in argument.split(",") if part
    ]
    bandit, steps = one_prompt(spec), 5
    outcomes, laws = bandit.outcomes.numpy(), bandit.probabilities[0].numpy()
    for bars in itertools.combinations(range(steps + 4), 4):
        policy = (np.diff([-1, *bars, steps + 4]) - 1) / steps
        mixed = reference_risk.discrete_utility(name, numbers, outcomes, policy @ laws)
        assert mixed <= BEST[spec][1] + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("spec", BEST)
def test_policy_ends_on_the_best_answer(spec, scope, seed):
    policy = train(one_prompt(spec), parse_risk(spec), scope, seed)[0]
    assert policy[list(ARMS).index(BEST[spec][0])] > 0.9


def test_a_function_of_unknown_influence_is_refused_before_the_first_step(monkeypatch, tmp_path):
    (tmp_path / "own_measure.py").write_text("def worst(law):\n    return law.values[..., 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    measure = parse_risk("python:own_measure:worst")
    assert train(one_prompt("mean"), measure, "response", seed=1)[0].argmax() == list(ARMS).index("safe")
    with pytest.raises(RiskSpecError, match="python:own_measure:worst has no known influence function"):
        train(one_prompt("mean"), measure, "population", seed=1)


# Through the objective of a trainer, whose population is an average over rollouts


def train_as_users_do(spec, decay, seed, steps, learning_rate):
    """The probability of the best answer and the name of the likeliest, with the utilities of `RiskObjective`."""
    objective = RiskObjective(spec, "population", decay=decay)

    def worth_of(laws, drawn):
        objective.learn(laws[drawn])
        return objective.evaluate(laws)

    *_, policy = policies(one_prompt(spec), worth_of, seed, steps=steps, learning_rate=learning_rate)
    return policy[0, list(ARMS).index(BEST[spec][0])].item(), list(ARMS)[policy[0].argmax()]


DECAY = PopulationTracker().decay
SLOW, FAST = {"steps": 60, "learning_rate": 0.8}, {"steps": 16, "learning_rate": 3.0}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decay", sorted({DECAY, 0.5}))
@pytest.mark.parametrize("spec", ["mean", "cvar:0.1", "entropic:1", "expectile:0.1", "spectral:0.7@1,0.3@0.1"])
def test_policy_ends_on_the_best_answer_with_the_population_of_many_rollouts(spec, decay, seed):
    best, _ = train_as_users_do(spec, decay, seed, **SLOW)
    assert best > 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_quantile_needs_a_population_that_keeps_up(seed):
    # Its influence is a step at ν. While ν lags behind the policy, no answer that is drawn crosses it, or all do. At a
    # decay of 0.9 all seeds ended on "safe", the second best.
    assert train_as_users_do("quantile:0.1", 0.5, seed, **SLOW)[0] > 0.9
    assert train_as_users_do("quantile:0.1", 0.9, seed, **SLOW)[1] == "safe"


def test_a_policy_faster_than_its_population_is_led_astray():
    # Sixteen large steps are over before a population of decay 0.9 has seen what the policy became: it looks at a tail
    # that "bold" and "edge" had, and "lucky" is well above that. The average of the last two or so rollouts is enough.
    assert all(train_as_users_do("expectile:0.1", 0.9, seed, **FAST)[1] == "lucky" for seed in SEEDS)
    assert all(train_as_users_do("expectile:0.1", 0.5, seed, **FAST)[0] > 0.9 for seed in SEEDS)


# Where the scopes must choose differently


# A hard prompt that comes once in four times, an easy one otherwise, and α = 0.2.
#
#     hard   flat      all readers at -1.5              own tail -1.5
#            divisive  one in five at -2, the rest at 1   own tail -2
#     easy   careful   all at 2                         own tail 2,    mean 2
#            generous  one in five at 1.5, the rest at 6  own tail 1.5,  mean 5.1
#
# Response scope looks at own tails alone and wants (flat, careful). In the population a flat answer puts a quarter of
# all ratings at -1.5, so that the worst fifth is -1.5. A divisive one puts 1/20 at -2 and the rest of the worst fifth
# at 1: (0.05 · -2 + 0.15 · 1)/0.2 = 0.25. Both easy answers lie above that, and the tail does not see them.
# With 0.1 of the mean added the population wants (divisive, generous), the reverse of both choices:
#
#     response    hard  -1.5 for flat, 0.1 · 0.4 + 0.9 · -2 = -1.76 for divisive
#                 easy  2 for careful, 0.1 · 5.1 + 0.9 · 1.5 = 1.86 for generous
#     population  0.1 · (0.25 · 0.4 + 0.75 · 5.1) + 0.9 · 0.25 = 0.6175 for (divisive, generous)
#                 0.1 · (0.25 · -1.5 + 0.75 · 2) + 0.9 · -1.5 = -1.2375 for (flat, careful)
HARD = [{-1.5: 1.0}, {-2.0: 0.2, 1.0: 0.8}]
EASY = [{2.0: 1.0}, {1.5: 0.2, 6.0: 0.8}]
MIXED_SPEC = "0.1*mean+0.9*cvar:0.2"


def two_prompts(hard=HARD):
    return Bandit.of([hard, EASY], [0.25, 0.75])


def population_utility(bandit, divisive, generous):
    """0.1 mean + 0.9 cvar:0.2 of all ratings, from the definition."""
    policy = torch.tensor([[1 - divisive, divisive], [1 - generous, generous]], dtype=torch.float64)
    law = bandit.outcomes.numpy(), bandit.mixed(policy).numpy()
    return 0.1 * law[0] @ law[1] + 0.9 * reference_risk.discrete_utility("cvar", [0.2], *law)


def test_the_scopes_rank_deterministic_policies_as_the_header_says():
    bandit = two_prompts()
    own = parse_risk(MIXED_SPEC)(bandit.laws())
    assert own.flatten().tolist() == pytest.approx([-1.5, -1.76, 2.0, 1.86], abs=1e-5)
    utilities = {corner: population_utility(bandit, *corner) for corner in itertools.product((0, 1), repeat=2)}
    assert max(utilities, key=utilities.get) == (1, 1)
    assert utilities[1, 1] == pytest.approx(0.6175)
    assert utilities[0, 0] == pytest.approx(-1.2375)


def test_no_mixed_policy_is_better_and_the_utility_is_convex():
    bandit, grid = two_prompts(), np.linspace(0, 1, 21)
    table = np.array([[population_utility(bandit, h, e) for e in grid] for h in grid])
    assert table.max() == pytest.approx(0.6175)
    assert np.unravel_index(table.argmax(), table.shape) == (20, 20)
    # The middle of any two policies is no better than their mean: along both axes and along both diagonals.
    for twist in (table, table.T, table[::-1]):
        for line in [*twist, *(np.diagonal(twist, k) for k in range(-18, 19))]:
            assert (line[1:-1] <= (line[2:] + line[:-2]) / 2 + 1e-9).all()
    # And not linear: with few flat answers the tail ends above them.
    assert table[10, 10] < (table[0, 10] + table[20, 10]) / 2 - 0.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("scope", "choice"), [("response", 0), ("population", 1)])
def test_each_scope_ends_on_its_own_choice_for_both_prompts(scope, choice, seed):
    policy = train(two_prompts(), parse_risk(MIXED_SPEC), scope, seed)
    assert policy[:, choice].min() > 0.9


def test_answers_with_equal_own_tails_weigh_differently_in_the_population():
    # With the flat answer at -2 both have an own tail of -2, and response scope has nothing to choose between.
    bandit, measure = two_prompts([{-2.0: 1.0}, HARD[1]]), parse_risk("cvar:0.2")
    own = measure(bandit.laws())
    assert own[0, 0].item() == pytest.approx(own[0, 1].item(), abs=1e-5)
    policy = torch.full((2, 2), 0.5, dtype=torch.float64)
    known = statistics(measure, bandit.population(policy))
    # 0.15 of all ratings are at -2 and the next outcome is 1, where a tail of 0.2 ends. The flat answer falls short
    # of it by 3 for all readers, the divisive one for a fifth; easy answers do not, whatever their own tail.
    worth = expected_influence(measure, bandit.laws(), known)
    assert known["cvar:0.2/nu"].item() == 1.0
    assert worth.flatten().tolist() == pytest.approx([1 - 3 / 0.2, 1 - 3 * 0.2 / 0.2, 1.0, 1.0], abs=1e-5)
    assert own[1, 0].item() == pytest.approx(own[1, 1].item() + 0.5, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_of_equal_own_tails_the_population_prefers_the_one_with_fewer_readers_in_the_tail(seed):
    policy = train(two_prompts([{-2.0: 1.0}, HARD[1]]), parse_risk("cvar:0.2"), "population", seed)
    assert policy[0, 1] > 0.9


# What a gradient of a population's tail does not see


def test_a_tail_on_one_rating_has_no_gradient():
    # Half safe, half lucky: 3/8 of all ratings are exactly 0 and the worst tenth is among them, whatever the policy
    # does nearby. Safe alone would be better by 0.25.
    bandit, measure = Bandit.of([list(ARMS.values())], [1.0]), parse_risk("cvar:0.1")
    policy = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    worth = expected_influence(measure, bandit.laws(), statistics(measure, bandit.population(policy)))[0]
    assert worth[2].item() == pytest.approx(0.0, abs=1e-5)
    assert worth[3].item() == pytest.approx(0.0, abs=1e-5)
    assert measure(bandit.laws())[0, 3].item() == pytest.approx(0.25)


def test_a_tail_full_of_one_answer_leads_to_the_lesser_corner():
    # A hard prompt in half of all cases. While a fifth of all ratings and more are at -1.5, the tail ends there: only
    # the -2 of divisive answers falls short, and each gradient step makes them rarer. The better corner is the other.
    bandit, measure = Bandit.of([HARD, EASY], [0.5, 0.5]), parse_risk("cvar:0.2")
    policy = train(bandit, measure, "population", seed=1)
    assert policy[0, 0] > 0.9
    corners = torch.eye(2, dtype=torch.float64)
    utilities = [measure(bandit.population(torch.stack([hard, corners[0]]))).item() for hard in corners]
    assert utilities == pytest.approx([-1.5, (0.1 * -2 + 0.1 * 1) / 0.2], abs=1e-5)
