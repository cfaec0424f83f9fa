import math

import pytest
import reference_ppo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.advantages import gae, kl_response, next_kl_coef, token_rewards

quick = settings(deadline=None, derandomize=True, max_examples=60)
POISONS = [math.nan, math.inf, -math.inf, 1e30]


def random_batch(seed, rows=5, length=7, dtype=torch.float64):
    """Rewards, values and a mask with gaps, padding on either side and at least one empty row."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, length, generator=generator, dtype=dtype)
    values = torch.randn(rows, length, generator=generator, dtype=dtype)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[seed % rows] = False
    return rewards, values, mask


def right_padded(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# --- token rewards --------------------------------------------------------------------------------------------------


def test_token_rewards_by_hand():
    # Rows: finished early, truncated at full length, empty, with a gap. β = 0.5 and the k1 penalty −0.5 x.
    utility = torch.tensor([10.0, -20.0, math.nan, 30.0])
    log_ratio = torch.tensor([[0.2, -0.4, 9.0], [1.0, 2.0, -3.0], [7.0, 7.0, 7.0], [0.6, 9.0, 0.8]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]])
    expected = [[-0.1, 10.2, 0.0], [-0.5, -1.0, -18.5], [0.0, 0.0, 0.0], [-0.3, 0.0, 29.6]]
    torch.testing.assert_close(token_rewards(utility, log_ratio, mask, 0.5), torch.tensor(expected))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards_equal_the_loop(estimator):
    log_ratio, _, mask = random_batch(3)
    utility = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.25], dtype=torch.float64)
    expected = reference_ppo.token_rewards(utility.tolist(), log_ratio.tolist(), mask.tolist(), 0.3, estimator)
    torch.testing.assert_close(
        token_rewards(utility, log_ratio, mask, 0.3, estimator), torch.tensor(expected, dtype=torch.float64)
    )


def test_the_rewards_of_a_completion_sum_to_its_utility_less_its_kl():
    log_ratio, utility = torch.tensor([[0.3, 0.1, 5.0], [0.2, -0.6, 0.9]]), torch.tensor([4.0, -1.0])
    mask = right_padded([2, 3], 3)
    total = token_rewards(utility, log_ratio, mask, 0.25).sum(1)
    torch.testing.assert_close(total, torch.tensor([4.0 - 0.25 * 0.4, -1.0 - 0.25 * 0.5]))


@pytest.mark.parametrize("width", [4, 5, 9])
def test_finished_and_truncated_completions_are_paid_at_the_same_slot(width):
    # Four real tokens: in a batch of width 4 they fill the row, in a wider one padding follows.
    rewards = token_rewards(torch.tensor([2.0]), torch.zeros(1, width), right_padded([4], width), 0.1)
    assert rewards[:, :4].tolist() == [[0.0, 0.0, 0.0, 2.0]]
    assert rewards[:, 4:].eq(0).all()


def test_log_ratios_are_bounded_unless_told_otherwise():
    utility, mask = torch.zeros(1), torch.ones(1, 2)
    log_ratio = torch.tensor([[200.0, -200.0]])
    assert token_rewards(utility, log_ratio, mask, 1.0).tolist() == [[-10.0, 10.0]]
    assert token_rewards(utility, log_ratio, mask, 1.0, log_ratio_bound=None).tolist() == [[-200.0, 200.0]]
    assert token_rewards(utility, log_ratio, mask, 1.0, "k3").isfinite().all()


def test_utilities_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="one utility per completion"):
        token_rewards(torch.zeros(3, 1), torch.zeros(3, 2), torch.ones(3, 2), 0.1)


# --- generalised advantage estimation -------------------------------------------------------------------------------


def test_gae_by_hand():
    # γ = λ = ½, so the recursion multiplies by ¼.
    # Row 0, full:      δ₂ = 4 − 3 = 1, δ₁ = 0 + ½·3 + 2 = 3.5, δ₀ = 1 + ½·(−2) − 2 = −2
    #                   Â₂ = 1, Â₁ = 3.5 + ¼ = 3.75, Â₀ = −2 + ¼·3.75 = −1.0625
    # Row 1, a gap:     δ₂ = 4 − 3 = 1, δ₀ = 1 + ½·3 − 2 = 0.5;  Â₂ = 1, Â₀ = 0.5 + ¼ = 0.75
    # Row 2, empty.
    # Row 3, two long:  δ₁ = 2 − 5 = −3, δ₀ = 0 + ½·5 − 1 = 1.5;  Â₁ = −3, Â₀ = 1.5 − ¼·3 = 0.75
    rewards = torch.tensor([[1.0, 0.0, 4.0], [1.0, 9.0, 4.0], [1.0, 2.0, 3.0], [0.0, 2.0, 50.0]])
    values = torch.tensor([[2.0, -2.0, 3.0], [2.0, 7.0, 3.0], [4.0, 5.0, 6.0], [1.0, 5.0, 60.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[-1.0625, 3.75, 1.0], [0.75, 0.0, 1.0], [0.0, 0.0, 0.0], [0.75, -3.0, 0.0]]
    assert returns.tolist() == [[0.9375, 1.75, 4.0], [2.75, 0.0, 4.0], [0.0, 0.0, 0.0], [1.75, 2.0, 0.0]]


@quick
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_sum_it_is_defined_by(seed, gamma, gae_lambda):
    rewards, values, mask = random_batch(seed)
    expected = reference_ppo.gae(rewards.tolist(), values.tolist(), mask.tolist(), gamma, gae_lambda)
    for actual, wanted in zip(gae(rewards, values, mask, gamma, gae_lambda), expected, strict=True):
        torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_without_discount_lambda_one_is_reward_to_go_minus_value():
    rewards, values, _ = random_batch(1)
    mask = right_padded([7, 1, 4, 0, 6], 7)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    reward_to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, reward_to_go)
    torch.testing.assert_close(advantages, reward_to_go - values * mask)


def test_lambda_zero_is_the_one_step_error():
    rewards, values, _ = random_batch(2)
    mask = right_padded([7, 7, 7, 7, 7], 7)
    next_values = torch.cat([values[:, 1:], torch.zeros(5, 1)], dim=1)
    advantages, returns = gae(rewards, values, mask, 0.9, 0.0)
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values - values)
    torch.testing.assert_close(returns, rewards + 0.9 * next_values)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0)])
def test_constant_critic_and_a_terminal_reward_have_a_closed_form(gamma, gae_lambda):
    # V = v everywhere and reward u at the end of n tokens: δ = (γ − 1) v before the end and u − v there, hence
    # Â_t = (γ − 1) v (1 − qᵏ) / (1 − q) + qᵏ (u − v) with q = γλ and k = n − 1 − t tokens still to come.
    v, u, q = 3.0, 5.0, gamma * gae_lambda
    mask = right_padded([6, 2], 8)
    rewards = torch.zeros(2, 8, dtype=torch.float64)
    rewards[0, 5] = rewards[1, 1] = u
    advantages, _ = gae(rewards, torch.full((2, 8), v, dtype=torch.float64), mask, gamma, gae_lambda)
    for row, n in enumerate([6, 2]):
        for t in range(n):
            k = n - 1 - t
            expected = (gamma - 1) * v * (1 - q**k) / (1 - q) + q**k * (u - v)
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 1.0])
def test_a_perfect_critic_leaves_no_advantage(gae_lambda):
    rewards, _, mask = random_batch(4)
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, 0.9, 1.0)  # V = 0 and λ = 1: the discounted sum itself
    advantages, targets = gae(rewards, returns, mask, 0.9, gae_lambda)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    torch.testing.assert_close(targets, returns)
    assert returns.abs().max() > 0.5


def test_padding_and_gaps_change_nothing():
    # The same five real tokens, plain, padded on both sides and pulled apart.
    generator = torch.Generator().manual_seed(5)
    rewards, values = torch.randn(2, 1, 5, generator=generator)
    plain = gae(rewards, values, torch.ones(1, 5), 0.9, 0.7)
    slots = torch.tensor([1, 2, 5, 6, 8])
    spread_rewards, spread_values = torch.full((2, 1, 11), 77.0)
    spread_rewards[:, slots], spread_values[:, slots] = rewards, values
    mask = torch.zeros(1, 11)
    mask[:, slots] = 1
    spread = gae(spread_rewards, spread_values, mask, 0.9, 0.7)
    for wide, narrow in zip(spread, plain, strict=True):
        torch.testing.assert_close(wide[:, slots], narrow, rtol=0, atol=0)
    # A control: without the mask, the values on padding leak into the completion.
    leaked, _ = gae(spread_rewards, spread_values, torch.ones(1, 11), 0.9, 0.7)
    assert (leaked[:, slots] - plain[0]).abs().max() > 1


def test_a_completion_has_the_same_advantages_in_any_batch():
    rewards, values, mask = random_batch(6)
    together = gae(rewards, values, mask, 0.97, 0.9)
    for b in range(5):
        alone = gae(rewards[b : b + 1], values[b : b + 1], mask[b : b + 1], 0.97, 0.9)
        torch.testing.assert_close(alone[0], together[0][b : b + 1], rtol=0, atol=0)


def test_a_shift_of_every_utility_shifts_returns_but_whitens_away():
    # With V trained on the shifted returns, advantages are untouched: why only the shape of a utility matters.
    rewards, values, _ = random_batch(7)
    mask = right_padded([3, 7, 5, 1, 6], 7)
    base, returns = gae(rewards, values, mask, 1.0, 0.9)
    shifted = rewards.clone()
    shifted[torch.arange(5), mask.sum(1) - 1] += 100.0
    moved, moved_returns = gae(shifted, values + 100.0, mask, 1.0, 0.9)
    torch.testing.assert_close(moved, base, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved_returns, returns + 100.0 * mask, rtol=0, atol=1e-9)


def test_two_thousand_tokens_stay_accurate_in_float32():
    generator = torch.Generator().manual_seed(8)
    rewards = 0.01 * torch.randn(2, 2000, generator=generator, dtype=torch.float64)
    values = 5 + torch.randn(2, 2000, generator=generator, dtype=torch.float64)
    mask = right_padded([2000, 1733], 2000)
    exact, _ = gae(rewards, values, mask, 1.0, 1.0)
    single, _ = gae(rewards.float(), values.float(), mask, 1.0, 1.0)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max().item() < 1e-4


def test_half_precision_inputs_are_computed_in_float32():
    rewards, values, mask = random_batch(9)
    advantages, returns = gae(rewards.bfloat16(), values.bfloat16(), mask, 1.0, 0.95)
    expected, _ = gae(rewards.bfloat16().float(), values.bfloat16().float(), mask, 1.0, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages, expected, rtol=0, atol=0)


def test_targets_carry_no_gradient():
    rewards, values, mask = random_batch(10)
    advantages, returns = gae(rewards, values.requires_grad_(), mask, 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


@pytest.mark.parametrize("poison", POISONS)
def test_values_behind_the_mask_have_no_effect(poison):
    rewards, values, mask = random_batch(11)
    dirty_rewards, dirty_values = (torch.where(mask, x, poison) for x in (rewards, values))
    expected = gae(rewards, values, mask, 0.99, 0.95)
    for actual, wanted in zip(gae(dirty_rewards, dirty_values, mask, 0.99, 0.95), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)

    utility = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    dirty_utility = torch.where(mask.any(1), utility, poison)
    for estimator in ("k1", "k2", "k3"):
        torch.testing.assert_close(
            token_rewards(dirty_utility, dirty_rewards, mask, 0.1, estimator),
            token_rewards(utility, rewards, mask, 0.1, estimator),
            rtol=0,
            atol=0,
        )


# --- adaptive KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.05)),  # a tenth above it: error 0.1, 500 of 10,000 completions
        (5.4, 0.1 * (1 - 0.1 * 0.05)),
        (600.0, 0.1 * (1 + 0.2 * 0.05)),  # clipped
        (-3.0, 0.1 * (1 - 0.2 * 0.05)),  # k1 averages may be negative
        (math.inf, 0.1 * (1 + 0.2 * 0.05)),
        (math.nan, 0.1),
    ],
)
def test_next_kl_coef_by_hand(observed, expected):
    assert next_kl_coef(0.1, observed, target=6.0, horizon=10_000, n=500) == pytest.approx(expected, rel=1e-12)


def test_kl_coef_holds_a_linear_system_at_its_target():
    # A policy whose KL falls as the coefficient grows: KL = 0.6 / β, so the target 6 is held at β = 0.1.
    kl_coef = 1.0
    for _ in range(2000):
        kl_coef = next_kl_coef(kl_coef, 0.6 / kl_coef, target=6.0, horizon=1000, n=64)
    assert kl_coef == pytest.approx(0.1, rel=1e-6)


def test_kl_coef_stays_positive_for_a_batch_beyond_the_horizon():
    assert next_kl_coef(0.1, 0.0, target=6.0, horizon=10, n=1000) == pytest.approx(0.08)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 10), (-1.0, 10), (1.0, 0)])
def test_kl_targets_and_horizons_must_be_positive(target, horizon):
    with pytest.raises(ValueError, match="must be positive"):
        next_kl_coef(0.1, 1.0, target=target, horizon=horizon, n=1)


@pytest.mark.parametrize(
    ("observed", "gain", "expected"),
    [
        (6.0, 1.0, 1.0),
        (12.0, 1.0, 2.0),
        (12.0, 0.5, math.sqrt(2)),
        (2.0, 2.0, 1 / 9),
        (60.0, 1.0, 4.0),  # clipped
        (-1.0, 1.0, 0.25),
        (12.0, 0.0, 1.0),
        (math.nan, 1.0, 1.0),
    ],
)
def test_kl_response_by_hand(observed, gain, expected):
    assert kl_response(observed, 6.0, gain) == pytest.approx(expected, rel=1e-12)


def test_kl_response_damps_a_system_that_lags():
    # KL moves a quarter of the way to 0.6 / (coefficient in force) each rollout; the target 6 is held at 0.1.
    def highest(gain: float) -> tuple[float, float]:
        kl, kl_coef, factor, seen = 0.0, 0.03, 1.0, []
        for _ in range(400):
            kl += (0.6 / (kl_coef * factor) - kl) / 4
            kl_coef = next_kl_coef(kl_coef, kl, target=6.0, horizon=24, n=12)
            factor = kl_response(kl, 6.0, gain)
            seen.append(kl)
        return max(seen), seen[-1]

    (without, _), (with_it, rests_at) = highest(0.0), highest(1.0)
    assert rests_at == pytest.approx(6.0, rel=1e-6)
    assert with_it - 6 < 0.8 * (without - 6)
