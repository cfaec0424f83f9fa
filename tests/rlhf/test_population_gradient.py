"""Climbing the expected influence climbs the measure of the population: on a policy small enough to enumerate.

Three prompts of unequal probability, four answers each, seven possible ratings. The measure of the law of all ratings
is written down from its definition as a function of the logits, and autograd through it is the truth. The other side
is the policy gradient of an ordinary reward, E u(x, y) ∇ log π(y|x), with u from `expected_influence`.
"""

import math

import numpy as np
import pytest
import reference_risk
import torch
from bandits import Bandit, sampled_population

from reward.distribution import RewardDistribution
from reward.mixtures import mixture
from rlhf.influence import expected_influence, population_law, statistics
from rlhf.risk import MEASURES, parse_risk

OUTCOMES = [-3.5, -2.25, -1.0, 0.25, 0.5, 2.0, 3.75]
PROMPT_WEIGHTS = [0.5, 0.3, 0.2]
# No tail ends where an outcome does: there a CVaR has a kink.
TERMS = {
    "mean": ("mean", []),
    "cvar:0.13": ("cvar", [0.13]),
    "mean_variance:0.4": ("mean_variance", [0.4]),
    "mean_std:0.7": ("mean_std", [0.7]),
    "semideviation:0.8": ("semideviation", [0.8]),
    "entropic:0.6": ("entropic", [0.6]),
    "expectile:0.15": ("expectile", [0.15]),
    "below:-1": ("below", [-1.0]),
    "wang:0.6": ("wang", [0.6]),
    "power:1.7": ("power", [1.7]),
    "cpw:0.65": ("cpw", [0.65]),
    "spectral:0.6@1,0.3@0.31,0.1@0.07": ("spectral", [(0.6, 1.0), (0.3, 0.31), (0.1, 0.07)]),
}
SUMS = {
    "0.5*mean+0.5*cvar:0.13": [(0.5, "mean"), (0.5, "cvar:0.13")],
    "entropic:0.6-0.7*power:1.7+2*below:-1": [(1.0, "entropic:0.6"), (-0.7, "power:1.7"), (2.0, "below:-1")],
}
LINEAR = {"mean", "below:-1"}  # the same in both scopes


@pytest.fixture(scope="module")
def bandit():
    generator = np.random.default_rng(11)
    table = generator.dirichlet(np.full(len(OUTCOMES), 0.7), size=(3, 4)).round(4)
    table[..., -1] += 1 - table.sum(axis=-1)
    numbers = [torch.as_tensor(number, dtype=torch.float64) for number in (PROMPT_WEIGHTS, OUTCOMES, table)]
    return Bandit(*numbers)


@pytest.fixture(scope="module")
def logits():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# The measure of a discrete law as a differentiable function of its probabilities


def weight_function(name, level, number):
    if name == "wang":
        return torch.special.ndtr(torch.special.ndtri(level) + number)
    if name == "power":
        return 1 - (1 - level) ** (1 + number)
    gain = (1 - level) ** number
    return 1 - gain / (gain + level**number) ** (1 / number)


def measured(name, numbers, o, p):
    """By the definition: nothing here knows of influence functions, and autograd passes through p."""
    centre = p @ o
    if name == "mean":
        return centre
    if name == "mean_variance":
        return centre - numbers[0] * (p @ (o - centre) ** 2)
    if name == "mean_std":
        return centre - numbers[0] * (p @ (o - centre) ** 2).sqrt()
    if name == "semideviation":
        return centre - numbers[0] * (p @ (centre - o).clamp_min(0) ** 2).sqrt()
    if name == "entropic":
        return -(p @ (-numbers[0] * o).exp()).log() / numbers[0]
    if name == "below":
        return -p[o <= numbers[0]].sum()
    if name == "cvar":
        return torch.stack([nu - p @ (nu - o).clamp_min(0) / numbers[0] for nu in o]).max()
    if name == "spectral":
        return sum(mass * measured("cvar", [alpha], o, p) for mass, alpha in numbers)
    if name == "expectile":
        # The mean with weights τ above it and 1 − τ below. Which outcomes lie above does not change nearby.
        found = reference_risk.discrete_utility(name, numbers, o.numpy(), p.detach().numpy())
        tilted = (numbers[0] + (1 - 2 * numbers[0]) * (o <= found).double()) * p
        return tilted @ o / tilted.sum()
    below = p.cumsum(0)[:-1]
    return o[-1] - weight_function(name, below, numbers[0]) @ o.diff()


def true_gradient(spec, bandit, logits):
    """d ρ(F_π) / d logits by autograd, with ρ(F_π)."""
    logits = logits.clone().requires_grad_()
    mixed = bandit.mixed(logits.softmax(-1))
    parts = SUMS.get(spec, [(1.0, spec)])
    utility = sum(weight * measured(*TERMS[part], bandit.outcomes, mixed) for weight, part in parts)
    utility.backward()
    return logits.grad, utility.item()


def policy_gradient(bandit, logits, worth):
    """Σ p(x) π(y|x) u(x, y) ∇ log π(y|x)."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    (bandit.joint(logprobs.detach().exp()) * worth * logprobs).sum().backward()
    return logits.grad


def test_the_definitions_agree_with_the_slow_reference(bandit, logits):
    mixed = bandit.mixed(logits.softmax(-1))
    for name, numbers in TERMS.values():
        expected = reference_risk.discrete_utility(name, numbers, OUTCOMES, mixed.numpy())
        assert measured(name, numbers, bandit.outcomes, mixed).item() == pytest.approx(expected, abs=1e-12)
    assert {name for name, _ in TERMS.values()} == set(MEASURES) - {"quantile"}


# Exactly


@pytest.mark.parametrize("spec", [*TERMS, *SUMS])
def test_policy_gradient_of_the_influence_is_the_gradient_of_the_measure(bandit, logits, spec):
    measure, policy = parse_risk(spec), logits.softmax(-1)
    known = statistics(measure, bandit.population(policy))
    worth = expected_influence(measure, bandit.laws(), known)
    truth, utility = true_gradient(spec, bandit, logits)
    found = policy_gradient(bandit, logits, worth)
    # Jumps of the laws are bridged over a mass of 2e-7, in an outcome's range of 7.
    assert torch.allclose(found, truth, atol=5e-6)
    assert (bandit.joint(policy) * worth).sum().item() == pytest.approx(utility, abs=2e-5)
    own = policy_gradient(bandit, logits, measure(bandit.laws()))
    assert ((own - truth).norm() > 0.05 * truth.norm()).item() == (spec not in LINEAR)


def even_answers():
    """Laws (3, 4) whose ratings are spread evenly from a to b, prompt weights, logits, a and b.

    All intervals overlap between -2 and 1, and the quantiles lie in there, where the density of the population is
    flat: the band over which it is read off costs nothing.
    """
    generator = torch.Generator().manual_seed(2)
    a = -2 - 2 * torch.rand(3, 4, generator=generator, dtype=torch.float64)
    b = 1 + 3 * torch.rand(3, 4, generator=generator, dtype=torch.float64)
    levels = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64)
    laws = RewardDistribution(levels, a.unsqueeze(-1) + (b - a).unsqueeze(-1) * levels)
    weights = torch.tensor(PROMPT_WEIGHTS, dtype=torch.float64).unsqueeze(-1)
    return laws, weights, torch.randn(3, 4, generator=generator, dtype=torch.float64), a, b


def gradient_of_the_quantile(alpha):
    """From F(ν) = Σ p π (ν − a)/(b − a) = α, solved for ν: linear where all intervals overlap."""
    _, weights, logits, a, b = even_answers()
    leaf = logits.requires_grad_()
    joint = weights * leaf.softmax(-1)
    nu = (alpha + (joint * a / (b - a)).sum()) / (joint / (b - a)).sum()
    assert -2 < nu.item() - 0.02 * (b - a).max() < nu.item() + 0.02 * (b - a).max() < 1
    nu.backward()
    return leaf.grad


@pytest.mark.parametrize("alpha", [0.4, 0.55])
def test_policy_gradient_of_a_quantile(alpha):
    laws, weights, logits, *_ = even_answers()
    measure, joint = parse_risk(f"quantile:{alpha}"), weights * logits.softmax(-1)
    population = mixture([laws[i, j] for i in range(3) for j in range(4)], joint.flatten(), num_levels=4000)
    worth = expected_influence(measure, laws, statistics(measure, population))

    truth = gradient_of_the_quantile(alpha)
    scored = logits.clone().requires_grad_()
    (joint.detach() * worth * scored.log_softmax(-1)).sum().backward()
    assert torch.allclose(scored.grad, truth, atol=5e-6)
    assert truth.abs().max() > 0.02


# From samples


@pytest.fixture(scope="module")
def batches(bandit, logits):
    """Of 24 batches of 1500 answers each: the share of each of the twelve pairs, and the population of the batch."""
    generator = torch.Generator().manual_seed(7)
    joint, laws = bandit.joint(logits.softmax(-1)).flatten(), flat_laws(bandit)
    draws = [torch.multinomial(joint, 1500, replacement=True, generator=generator) for _ in range(24)]
    counts = [draw.bincount(minlength=12) for draw in draws]
    return [(count.double() / 1500, sampled_population(laws, count)) for count in counts]


def flat_laws(bandit):
    laws = bandit.laws()
    return RewardDistribution(laws.levels, laws.values.flatten(0, 1))


def z_scores(bandit, logits, batches, spec, worth_of):
    """How many standard errors REINFORCE is off, (X, Y); each batch is judged by its own population."""
    laws, policy = flat_laws(bandit), logits.softmax(-1)
    # ∇ log π(y|x) for each of the twelve pairs: one-hot less π in the row of the prompt.
    pairs = torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)
    scores = pairs - pairs.sum(dim=-1, keepdim=True) * policy
    gradients = []
    for shares, population in batches:
        worth = worth_of(laws, population)
        gradients.append(torch.einsum("n,nxy->xy", shares * (worth - shares @ worth), scores))
    found = torch.stack(gradients)
    error = found.std(dim=0) / math.sqrt(len(batches))
    return ((found.mean(dim=0) - true_gradient(spec, bandit, logits)[0]) / error).abs()


@pytest.mark.parametrize("spec", [*TERMS, *SUMS])
def test_reinforce_with_the_sampled_population_agrees_to_sampling_error(bandit, logits, batches, spec):
    measure = parse_risk(spec)

    def worth_of(laws, population):
        return expected_influence(measure, laws, statistics(measure, population))

    assert z_scores(bandit, logits, batches, spec, worth_of).max() < 4


@pytest.mark.parametrize(("alpha", "far"), [(0.4, False), (0.55, False), (0.4, True)])
def test_reinforce_on_a_quantile_agrees_to_sampling_error(alpha, far):
    laws, weights, logits, *_ = even_answers()
    measure = parse_risk(f"quantile:{0.9 if far else alpha}")
    laws, joint = RewardDistribution(laws.levels, laws.values.flatten(0, 1)), weights * logits.softmax(-1)
    generator = torch.Generator().manual_seed(8)
    pairs = torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)
    scores = pairs - pairs.sum(dim=-1, keepdim=True) * logits.softmax(-1)
    gradients = []
    for _ in range(24):
        counts = torch.multinomial(joint.flatten(), 1500, replacement=True, generator=generator).bincount(minlength=12)
        worth = expected_influence(measure, laws, statistics(measure, sampled_population(laws, counts)))
        shares = counts.double() / 1500
        gradients.append(torch.einsum("n,nxy->xy", shares * (worth - shares @ worth), scores))
    found = torch.stack(gradients)
    error = found.std(dim=0) / math.sqrt(24)
    off = ((found.mean(dim=0) - gradient_of_the_quantile(alpha)) / error).abs().max()
    # The influence on another quantile is told apart.
    assert off > 8 if far else off < 4


def test_reinforce_tells_a_wrong_influence_from_the_right_one(bandit, logits, batches):
    measure = parse_risk("cvar:0.13")

    def own(laws, population):
        return measure(laws)

    def tail_without_its_mass(laws, population):
        nu = population.quantile(0.13)
        return nu + 0.13 * (expected_influence(measure, laws, {"cvar:0.13/nu": nu}) - nu)

    def another_tail(laws, population):
        return expected_influence(measure, laws, {"cvar:0.13/nu": population.quantile(0.5)})

    for wrong in (own, tail_without_its_mass, another_tail):
        assert z_scores(bandit, logits, batches, "cvar:0.13", wrong).max() > 8


def test_counting_answers_gives_the_population_of_the_batch(bandit):
    flat = flat_laws(bandit)
    counts = torch.tensor([3, 0, 1, 2, 5, 0, 0, 1, 1, 4, 2, 1])
    batch = flat[torch.arange(12).repeat_interleave(counts)]
    assert torch.allclose(sampled_population(flat, counts).values, population_law(batch, 400).values, atol=1e-9)
