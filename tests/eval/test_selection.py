"""Best of n: by hand, against all selections, where the scopes part, and how far it may move a policy."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from eval.selection import best_of_n_kl, select_best, select_within
from eval.tilt import tilt_by
from reward.distribution import RewardDistribution
from rlhf.influence import expected_influence, population_law, statistics
from rlhf.risk import RiskSpecError, parse_risk

LEVELS = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
# Two prompts, three answers; no two means, medians or lowest values of a prompt are alike.
BY_HAND = RewardDistribution(
    LEVELS,
    torch.tensor(
        [
            [[-4.0, 3.0, 5.0], [0.0, 1.0, 2.0], [-1.0, 1.5, 2.0]],
            [[1.0, 1.0, 1.0], [0.5, 3.0, 3.0], [-9.0, 2.0, 4.0]],
        ],
        dtype=torch.float64,
    ),
)


def votes(prompts, *answers, half_jump=1e-9):
    """Laws of equally likely ratings, one list per answer, prompt after prompt; (P, n, K).

    Each rating stands at both ends of its share of the mass, so that Q is a staircase.
    """
    values = torch.tensor(answers, dtype=torch.float64)
    count = values.shape[-1]
    starts = torch.arange(count, dtype=torch.float64) / count
    levels = torch.stack([starts + half_jump, starts + 1 / count - half_jump], dim=-1).flatten()
    return RewardDistribution(levels, values.repeat_interleave(2, dim=-1).reshape(prompts, -1, 2 * count))


def random_laws(seed, prompts=4, answers=3, levels=7):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = 0.7 * normal(prompts, answers, 1) + 1.2 * normal(prompts, answers, 1).abs() * normal(
        prompts, answers, levels
    )
    return RewardDistribution(torch.arange(1, levels + 1, dtype=torch.float64) / (levels + 1), values)


def populations(laws):
    """Each of the n^P selections and the law of all its ratings, one by one."""
    prompts, answers = laws.batch_shape
    rows = torch.arange(prompts)
    selections = list(itertools.product(range(answers), repeat=prompts))
    found = [population_law(laws[rows, torch.tensor(selection)]) for selection in selections]
    return selections, RewardDistribution(found[0].levels, torch.stack([law.values for law in found]))


def every_selection(laws, measure, known=None):
    """ρ of the law of all ratings for each of the n^P selections."""
    selections, together = known or populations(laws)
    return dict(zip(selections, measure(together).tolist(), strict=True))


PROBLEMS = functools.cache(lambda seed: (random_laws(seed), populations(random_laws(seed))))


# Response scope


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        # Q is flat up to 0.2 and from 0.9, straight between. E Z = 0.2 q₁ + 0.4 (q₁+q₂)/2 + 0.3 (q₂+q₃)/2 + 0.1 q₃:
        # prompt 1: −0.8 − 0.2 + 1.2 + 0.5 = 0.7;  0 + 0.2 + 0.45 + 0.2 = 0.85;  −0.2 + 0.1 + 0.525 + 0.2 = 0.625.
        # prompt 2: 1;  0.1 + 0.7 + 0.9 + 0.3 = 2;  −1.8 − 1.4 + 0.9 + 0.4 = −1.9.
        ("mean", [1, 1]),
        # The lowest values: −4, 0, −1 and 1, 0.5, −9.
        ("cvar:0.1", [1, 0]),
        # Q(0.6): 3, 1, 1.5 and 1, 3, 2.
        ("quantile:0.6", [0, 1]),
    ],
)
def test_response_scope_by_hand(spec, chosen):
    found = select_best(BY_HAND, parse_risk(spec))
    assert found.chosen.tolist() == chosen
    assert (found.rounds, found.settled) == (0, True)


def test_utilities_are_those_of_the_measure():
    found = select_best(BY_HAND, parse_risk("mean"))
    expected = [[0.7, 0.85, 0.625], [1.0, 2.0, -1.9]]
    np.testing.assert_allclose(found.utilities.numpy(), expected, atol=1e-12)
    # The mean of all ratings is the mean of the two means.
    assert found.value == pytest.approx((0.85 + 2.0) / 2, abs=1e-12)


@pytest.mark.parametrize("scope", ["response", "population"])
def test_the_first_of_equal_answers_wins(scope):
    laws = votes(2, [0.0, 0.0], [1.0, 3.0], [3.0, 1.0], [2.0, 2.0], [2.0, 2.0], [-5.0, 2.0])
    assert select_best(laws, parse_risk("mean"), scope).chosen.tolist() == [1, 0]


@pytest.mark.parametrize("scope", ["response", "population"])
@pytest.mark.parametrize("spec", ["mean", "cvar:0.1", "entropic:1"])
def test_one_answer_is_no_choice(spec, scope):
    laws = random_laws(3)[:, :1]
    found = select_best(laws, parse_risk(spec), scope)
    assert found.chosen.tolist() == [0, 0, 0, 0]
    assert found.value == pytest.approx(float(parse_risk(spec)(population_law(laws[:, 0]))), abs=1e-12)


@pytest.mark.parametrize("scope", ["response", "population"])
def test_an_answer_without_a_law_is_never_selected(scope):
    values = BY_HAND.values.clone()
    values[1, 1, 0] = math.nan
    values[0, 1] = math.inf
    found = select_best(RewardDistribution(LEVELS, values), parse_risk("mean"), scope)
    assert found.chosen.tolist() == [0, 0]
    assert found.utilities[1].tolist()[1] == -math.inf


@pytest.mark.parametrize("scope", ["response", "population"])
def test_half_a_law_is_none(scope):
    # The lowest quantile of the broken answer is the best one, and known.
    values = torch.tensor([[[0.0, 1.0, 2.0], [0.5, 1.0, math.inf]]] * 2, dtype=torch.float64)
    found = select_best(RewardDistribution(LEVELS, values), parse_risk("quantile:0.1"), scope)
    assert found.chosen.tolist() == [0, 0]


# Population scope


@pytest.mark.parametrize(("worst", "own"), [(-4.0, -1.0), (-3.96, -0.99)])
def test_equal_tails_of_their_own_and_unequal_shares_of_the_common_one(worst, own):
    # Both answers to prompt 1 have the mean −1 in their own worst half: (−4 + 0 + 0 + 0)/4 and −1; in the second case
    # the spread one is even a little better there. Prompt 2 is rated −0.5 for sure. The worst half of all sixteen
    # ratings, eight of them:
    #   spread  −4 and seven times −0.5:                −7.5/8 = −0.9375    (−3.96: −0.9325)
    #   level   four times −1 and four times −0.5:      −6/8   = −0.75
    spread, level = [worst, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.5], [-1.0, -1.0, -1.0, -1.0, 3.0, 3.0, 3.0, 3.0]
    laws = votes(2, spread, level, [-0.5] * 8, [-0.6] * 8)
    measure = parse_risk("cvar:0.5")
    assert measure(laws)[0].tolist() == pytest.approx([own, -1.0], abs=1e-7)
    values = every_selection(laws, measure)
    assert values[(0, 0)] == pytest.approx((worst - 3.5) / 8, abs=1e-7)
    assert values[(1, 0)] == pytest.approx(-0.75, abs=1e-7)
    # The mean takes the spread answer, 1.0625 or 1.0675 to 1. So does response scope where there is no tie, which
    # rounding would break one way or the other.
    assert select_best(laws, parse_risk("mean")).chosen.tolist() == [0, 0]
    assert own == -1.0 or select_best(laws, measure).chosen.tolist() == [0, 0]
    found = select_best(laws, measure, "population")
    assert found.chosen.tolist() == [1, 0]
    assert found.value == pytest.approx(-0.75, abs=1e-7)


def test_population_scope_dares_where_another_prompt_fills_the_tail():
    # Prompt 1 can only disappoint: −6. Prompt 2 may have a sure 1, or 9 for most and −2 for a quarter.
    # Response scope, 0.1 E Z + 0.9 · worst quarter: 1 against 0.1 · 6.25 − 0.9 · 2 = −1.175, so the sure answer.
    # The worst quarter of all eight ratings is −6 whatever prompt 2 says, so only its mean counts:
    #   sure 0.1 · (−24 + 4)/8 − 5.4 = −5.65,    daring 0.1 · (−24 + 25)/8 − 5.4 = −5.3875.
    laws = votes(2, [-6.0] * 4, [-6.0] * 4, [1.0] * 4, [-2.0, 9.0, 9.0, 9.0])
    measure = parse_risk("0.1*mean+0.9*cvar:0.25")
    cautious = select_best(laws, measure)
    assert cautious.chosen.tolist() == [0, 0]
    assert cautious.value == pytest.approx(-5.65, abs=1e-6)
    found = select_best(laws, measure, "population")
    assert found.chosen.tolist() == [0, 1]
    assert found.value == pytest.approx(-5.3875, abs=1e-6)


EXACT = ["mean", "entropic:1", "expectile:0.1"]
CONVEX = ["cvar:0.13", "spectral:0.7@1,0.3@0.1", "wang:0.75", "mean_variance:0.5", "0.5*mean+0.5*cvar:0.1"]


@pytest.mark.parametrize("spec", [*EXACT, *CONVEX])
def test_against_all_selections(spec):
    measure = parse_risk(spec)
    for seed in range(3):
        laws, known = PROBLEMS(seed)
        selections = every_selection(laws, measure, known)
        found = select_best(laws, measure, "population")
        best = max(selections.values())
        assert selections[tuple(found.chosen.tolist())] == pytest.approx(found.value, abs=1e-9)
        assert found.settled
        mean, response = select_best(laws, parse_risk("mean")), select_best(laws, measure)
        assert found.value >= max(selections[tuple(s.chosen.tolist())] for s in (mean, response)) - 1e-12
        if spec in EXACT:
            # 400 levels blur the law of all ratings by less than this.
            assert found.value == pytest.approx(best, abs=2e-4)


@pytest.mark.parametrize(
    ("seed", "chosen", "other"),
    [
        (37, [2, 1, 0], [0, 1, 0]),  # climbed to from the mean; the climb from response scope ends at the other
        (33, [0, 2, 2], [0, 0, 1]),  # from response scope; the climb from the mean ends at the other
    ],
)
def test_the_better_of_two_climbs_counts(seed, chosen, other):
    laws, measure = random_laws(seed, prompts=3), parse_risk("cvar:0.2")
    found = select_best(laws, measure, "population")
    assert found.chosen.tolist() == chosen
    values = every_selection(laws, measure)
    assert found.value == pytest.approx(values[tuple(chosen)]) == pytest.approx(max(values.values()))
    assert values[tuple(other)] < found.value - 0.1


def test_what_settles_is_its_own_best_reply():
    laws, measure = random_laws(11, prompts=6), parse_risk("cvar:0.2")
    found = select_best(laws, measure, "population")
    population = population_law(laws[torch.arange(6), found.chosen])
    worth = expected_influence(measure, laws, statistics(measure, population))
    assert worth.argmax(dim=-1).tolist() == found.chosen.tolist()
    torch.testing.assert_close(found.utilities, worth)


def test_one_round_is_kept_to():
    laws, measure = random_laws(2, prompts=6), parse_risk("cvar:0.2")
    found = select_best(laws, measure, "population", max_rounds=1)
    assert found.rounds == 2  # one from each of two starts


def test_a_sure_rating_for_everyone_ends_the_climb():
    laws = votes(2, [1.0, 1.0], [0.0, 0.5], [1.0, 1.0], [0.0, 0.25])
    found = select_best(laws, parse_risk("mean_std:1"), "population")
    assert found.chosen.tolist() == [0, 0]
    assert found.value == pytest.approx(1.0)


# Distance


def exact_law_of_the_selected(probabilities, n, rule):
    """P(the selected answer is v), adding up all n-tuples of draws; rule: tuple -> position."""
    law = np.zeros(len(probabilities))
    for draws in itertools.product(range(len(probabilities)), repeat=n):
        law[draws[rule(draws)]] += math.prod(probabilities[v] for v in draws)
    return law


def divergence(law, base):
    return float(sum(p * math.log(p / q) for p, q in zip(law, base, strict=True) if p > 0))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_no_rule_moves_a_policy_beyond_the_bound(n):
    base = [0.5, 0.3, 0.15, 0.05]
    rng = np.random.default_rng(n)
    table: dict[tuple, int] = {}
    rules = [
        lambda draws: int(np.argmax(draws)),
        lambda draws: int(np.argmin(draws)),
        lambda draws: table.setdefault(draws, int(rng.integers(n))),
    ]
    for rule in rules:
        law = exact_law_of_the_selected(base, n, rule)
        assert law.sum() == pytest.approx(1.0)
        assert divergence(law, base) <= best_of_n_kl(n) + 1e-12
    # The rarest of few answers: ties make the bound loose, and it is no equality.
    assert n == 1 or divergence(exact_law_of_the_selected(base, n, rules[0]), base) < best_of_n_kl(n) - 0.01


def test_the_bound_is_reached_where_nothing_ties():
    # Best of 3 among 4000 equally likely answers: law k ↦ (k³ − (k − 1)³) / 4000³.
    count, n = 4000, 3
    k = np.arange(1, count + 1, dtype=np.float64)
    law = (k**n - (k - 1) ** n) / count**n
    assert divergence(law, np.full(count, 1 / count)) == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert best_of_n_kl(3) == pytest.approx(math.log(3) - 2 / 3)


# Bad input


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: select_best(BY_HAND, parse_risk("mean"), "prompt"), "response or population, got 'prompt'"),
        (lambda: select_best(BY_HAND[0], parse_risk("mean")), r"batch shape \(P, n\), got \(3,\)"),
        (lambda: select_best(BY_HAND[:, :0], parse_risk("mean")), r"got \(2, 0\)"),
        (lambda: select_best(BY_HAND, parse_risk("mean"), "population", max_rounds=0), "at least 1, got 0"),
        (lambda: best_of_n_kl(0), "n >= 1, got 0"),
    ],
)
def test_bad_input_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_a_prompt_without_any_law_is_named():
    values = BY_HAND.values.clone()
    values[1] = math.nan
    with pytest.raises(ValueError, match=r"1 of 2 prompts .* finite cvar:0\.1, the first is number 1"):
        select_best(RewardDistribution(LEVELS, values), parse_risk("cvar:0.1"))


def test_a_function_without_influence_is_refused_in_population_scope():
    measure = parse_risk("python:math:fsum")
    with pytest.raises(RiskSpecError, match="response scope only"):
        select_best(BY_HAND, measure, "population")


# --- Within a KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["response", "population"])
def test_answers_are_drawn_by_the_best_weights(scope):
    """The same four prompts a thousand times over: shares of the answers against the weights, within 5 sigma."""
    laws, measure = random_laws(5), parse_risk("cvar:0.4")
    many = RewardDistribution(laws.levels, laws.values.repeat(1000, 1, 1))
    selection = select_within(many, measure, 0.3, scope, seed=1)
    weights = tilt_by(measure, scope, laws, 0.3).weights
    shares = torch.nn.functional.one_hot(selection.chosen.reshape(1000, 4), 3).double().mean(0).numpy()
    assert np.abs(shares - weights).max() < 5 * 0.5 / np.sqrt(1000)
    assert np.abs(weights - 1 / 3).max() > 0.2
    assert selection.kl_bound() == 0.3
    again = select_within(many, measure, 0.3, scope, seed=1)
    assert torch.equal(again.chosen, selection.chosen)
    assert not torch.equal(select_within(many, measure, 0.3, scope, seed=2).chosen, selection.chosen)


def test_the_bound_of_a_selection_is_that_of_best_of_n_unless_it_has_its_own():
    assert select_best(BY_HAND, parse_risk("mean")).kl_bound() == best_of_n_kl(3)
    assert select_within(BY_HAND, parse_risk("mean"), 0.2).kl_bound() == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"kl": 1.2}, "up to a KL of 1.10"), ({"scope": "all"}, "scope"), ({"laws": BY_HAND[0]}, "batch shape")],
)
def test_what_cannot_be_selected_within_a_kl_is_refused(changes, message):
    arguments = {"laws": BY_HAND, "measure": parse_risk("mean"), "kl": 0.2} | changes
    with pytest.raises(ValueError, match=message):
        select_within(**arguments)
