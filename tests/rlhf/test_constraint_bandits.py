"""Constraints whose best mixture of answers is known: PPO and dual ascent must find it, multipliers included.

One prompt, three answers, by their ratings:

    bold  4 with 0.7, -3 with 0.3        mean 1.9
    mid   1.5 with 0.6, -1 with 0.4      mean 0.5
    safe  0

Of ratings with bold b and mid m, a share 0.3 b is at -3 and 0.4 m at -1. As long as less than a quarter is below 0,
the worst quarter ends at 0 and

    cvar:0.25 = (−3 · 0.3 b − 0.4 m) / 0.25        below:-2 = 0.3 b        mean = 1.9 b + 0.5 m

which is linear, so that a bound on either fixes b where there is no mid answer. With a bound on both, and the one on
the tail above -1, both are met with equality: at b and m each bound buys more mean than the other answer would.

The KL to the uniform policy, at price β, makes the policy come to rest instead of circling: under a Lagrangian that is
linear in the policy every mixture is as good as any other once the multipliers are right. It moves no optimum that the
constraints fix, only the multipliers, and these are known too: with u = (mean + Σ λᵢ uᵢ)/(1 + Σ λᵢ), the utility of
each answer above that of the safe one is β times its log odds against it.
"""

import itertools
import math

import numpy as np
import pytest
import reference_risk
import torch
from bandits import Bandit, lagrangian, policies, sampled_population

from rlhf.constraints import DualAscent, parse_constraint
from rlhf.objective import RiskObjective

BOLD, MID, SAFE = {4.0: 0.7, -3.0: 0.3}, {1.5: 0.6, -1.0: 0.4}, {0.0: 1.0}
SEEDS = [1, 2, 3]
KL = 0.2
TWO = ["cvar:0.25 >= -0.8", "below:-2 <= 0.03"]


def climb(arms, specs, seed, steps, start, step_size):
    """Policies (steps, Y), multipliers (steps, C) and the last reading of each constraint."""
    bandit = Bandit.of([arms], [1.0])
    dual = DualAscent([parse_constraint(spec) for spec in specs], step_size=step_size, start=start)
    multipliers, last = [], []

    def worth_of(laws, drawn):
        population = sampled_population(laws, drawn.bincount(minlength=len(laws)))
        worth = lagrangian(dual, laws.mean(), laws, population)
        last[:] = dual.read(population, laws[drawn])
        dual.step(laws.mean()[drawn], last)
        multipliers.append(dual.multipliers)
        return worth

    found = policies(bandit, worth_of, seed, steps=steps, learning_rate=0.3, epochs=1, kl_coef=KL)
    found = torch.stack([policy[0] for policy in found])
    return found, torch.tensor(multipliers), last


def feasible_best(arms, tail=None, share=None, grid=41):
    """The policy of the highest mean that keeps the bounds, by trying all on a grid, from the definitions."""
    outcomes = sorted({outcome for arm in arms for outcome in arm})
    laws = np.array([[arm.get(outcome, 0.0) for outcome in outcomes] for arm in arms])
    best = (-math.inf, None)
    for counts in itertools.product(range(grid), repeat=len(arms) - 1):
        if sum(counts) >= grid:
            continue
        policy = np.array([*counts, grid - 1 - sum(counts)]) / (grid - 1)
        mixed = policy @ laws
        kept = tail is None or reference_risk.discrete_utility("cvar", [0.25], outcomes, mixed) >= tail - 1e-9
        kept &= share is None or -reference_risk.discrete_utility("below", [-2.0], outcomes, mixed) <= share + 1e-9
        if kept:
            best = max(best, (mixed @ outcomes, policy.tolist()))
    return best[1]


# Arms, constraints, their bounds; steps, first multiplier, step size; best policy. By hand: b = 0.25 · 1.2/0.9 = 1/3;
# b = 0.09/0.3; and b = 0.03/0.3, m = (0.25 · 0.8 − 0.9 b)/0.4.
PROBLEMS = {
    "tail": ([BOLD, SAFE], ["cvar:0.25 >= -1.2"], {"tail": -1.2}, (80, 1.0, 0.1), [1 / 3, 2 / 3]),
    "share": ([BOLD, SAFE], ["below:-2 <= 0.09"], {"share": 0.09}, (80, 10.0, 0.1), [0.3, 0.7]),
    "both": ([BOLD, MID, SAFE], TWO, {"tail": -0.8, "share": 0.03}, (120, 1.0, 0.3), [0.1, 0.275, 0.625]),
}


def multipliers_by_hand(problem, policy):
    """From β log(πᵢ/π_safe) (1 + Σ λ s/s₀) = mean − Σ λ cost, linear in λ; s are standard deviations under π.

    An answer costs 3 · 0.3/0.25 (bold) or 0.4/0.25 (mid) of the tail, and bold 0.3 of the share.
    """
    policy = np.array(policy)
    arms = len(policy) - 1

    def spread(values):
        values = np.append(values[:arms], 0.0)
        return math.sqrt(policy @ values**2 - (policy @ values) ** 2)

    odds = KL * np.log(policy[:-1] / policy[-1])
    means, tail, share = np.array([1.9, 0.5]), np.array([3.6, 1.6]), np.array([0.3, 0.0])
    costs = {"tail": [tail], "share": [share], "both": [tail, share]}[problem]
    matrix = np.stack([cost[:arms] + odds * spread(cost) / spread(means) for cost in costs], axis=-1)
    return np.linalg.solve(matrix, means[:arms] - odds)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_best_mixture_is_the_one_of_the_header(problem):
    arms, _, bounds, _, best = PROBLEMS[problem]
    # Steps of the grid that divide the optimum.
    grid = 31 if problem != "both" else 41
    assert feasible_best(arms, grid=grid, **bounds) == pytest.approx(best, abs=1e-9)
    assert feasible_best(arms, grid=grid) == [1.0] + [0.0] * (len(arms) - 1)
    assert min(multipliers_by_hand(problem, best)) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_dual_ascent_finds_the_best_mixture_and_its_multipliers(problem, seed):
    arms, specs, _, pace, best = PROBLEMS[problem]
    found, multipliers, _ = climb(arms, specs, seed, *pace)
    # Batches of 192 answers: over forty steps the policy is known to 0.01 or so, a multiplier to a sixth.
    assert found[-40:].mean(dim=0).tolist() == pytest.approx(best, abs=0.03)
    expected = multipliers_by_hand(problem, best)
    assert multipliers[-40:].log().mean(dim=0).exp().tolist() == pytest.approx(expected.tolist(), rel=0.2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("problem", "settings", "steps"),
    [("tail", {}, 200), ("share", {}, 200), ("both", {"constraint_step_size": 0.3}, 120)],
)
def test_the_objective_of_a_trainer_finds_them_too(problem, settings, steps, seed):
    # As users get it: first multiplier, step size and the population over rollouts by default. Of two bounds, the
    # multiplier of the share is still on its way after 200 rollouts at the default step: hence a larger one.
    arms, specs, _, _, best = PROBLEMS[problem]
    objective, multipliers = RiskObjective("mean", constraints=specs, **settings), []

    def worth_of(laws, drawn):
        objective.learn(laws[drawn])
        multipliers.append(objective.dual.multipliers)
        return objective.evaluate(laws)

    bandit = Bandit.of([arms], [1.0])
    found = policies(bandit, worth_of, seed, steps=steps, learning_rate=0.3, epochs=1, kl_coef=KL)
    found = torch.stack([policy[0] for policy in found])
    # Over sixty steps the policy is known to 0.01 or so and a multiplier to a sixth, as above.
    assert found[-60:].mean(dim=0).tolist() == pytest.approx(best, abs=0.03)
    expected = multipliers_by_hand(problem, best)
    last = torch.tensor(multipliers[-60:]).log().mean(dim=0).exp()
    assert last.tolist() == pytest.approx(expected.tolist(), rel=0.2)  # a sixth, as said above


@pytest.mark.parametrize("seed", SEEDS)
def test_what_cannot_be_met_drives_its_multiplier_to_the_bound_and_is_reported(seed):
    # No policy has a tail above 0.
    found, multipliers, readings = climb([BOLD, SAFE], ["cvar:0.25 >= 0.5"], seed, steps=45, start=1.0, step_size=0.2)
    assert multipliers[-1].item() == pytest.approx(100.0)
    assert found[-1, 1] > 0.9
    assert readings[0].state == "violated"
    assert readings[0].high < 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_what_holds_anyway_costs_nothing_and_is_reported(seed):
    # No rating is below -3.
    found, multipliers, readings = climb([BOLD, SAFE], ["cvar:0.25 >= -3.5"], seed, steps=45, start=1.0, step_size=0.2)
    assert multipliers[-1].item() == pytest.approx(1e-3)
    assert found[-1, 0] > 0.9
    assert readings[0].state == "holds"
    assert readings[0].low > -3.5


def test_a_policy_beyond_the_edge_of_the_tail_is_not_led_back():
    # More than 5/6 bold answers put a quarter of all ratings at -3. The tail ends there and no answer changes it: the
    # constraint is broken and the multiplier at its bound, but only the mean and the KL are left to climb.
    constraint = parse_constraint("cvar:0.25 >= -1.2")
    laws = Bandit.of([[BOLD, SAFE]], [1.0]).laws()[0]
    dual = DualAscent([constraint], start=100.0)
    gaps = []
    for bold in (160, 180):
        population = sampled_population(laws, torch.tensor([bold, 200 - bold]))
        utility = lagrangian(dual, laws.mean(), laws, population)
        gaps.append((utility[0] - utility[1]).item())
        assert constraint.measure(population).item() < -1.2
    # Spreads of two answers are half their distance: 1.9 and 3.6, and none of the tail beyond the edge.
    assert gaps == pytest.approx([(1.9 - 100 * 3.6) / (1 + 100 * 3.6 / 1.9), 1.9], abs=1e-3)
