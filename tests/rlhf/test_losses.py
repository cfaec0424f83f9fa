import math

import pytest
import reference_ppo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.losses import (
    KL_ESTIMATORS,
    apply_missing_eos,
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
    kl_estimate,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlhf.masking import masked_mean_and_var

quick = settings(deadline=None, derandomize=True, max_examples=60)
POISONS = [math.nan, math.inf, -math.inf, 1e30]
MASK = torch.tensor([[1, 1, 1], [1, 0, 1]])


def log(*ratios):
    return torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)


# --- KL estimators --------------------------------------------------------------------------------------------------

# Two laws over five tokens, far enough apart that KL(π‖ref) = 0.690 and KL(ref‖π) = 0.599 differ.
PI_LOGITS = torch.tensor([1.0, 0.2, -0.5, 0.3, -1.5], dtype=torch.float64)
REF_LOGPROBS = torch.tensor([0.1, 0.4, 0.3, 0.05, 0.15], dtype=torch.float64).log()


def divergence(p_logprobs, q_logprobs):
    return (p_logprobs.exp() * (p_logprobs - q_logprobs)).sum()


def expectation(logprobs, per_token):
    """Exact mean over tokens drawn from π, the law itself being held constant as it is for samples."""
    return (logprobs.detach().exp() * per_token).sum()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_equal_the_note(estimator):
    x = torch.tensor([[-1.5, 0.0, 0.4], [2.0, 9.0, -0.1]], dtype=torch.float64)
    expected = [
        [reference_ppo.kl(v, estimator) * m for v, m in zip(r, k, strict=True)]
        for r, k in zip(x.tolist(), MASK.tolist(), strict=True)
    ]
    torch.testing.assert_close(kl_estimate(x, MASK, estimator), torch.tensor(expected, dtype=torch.float64))


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    logprobs = PI_LOGITS.log_softmax(0)
    exact = divergence(logprobs, REF_LOGPROBS).item()
    means = {name: expectation(logprobs, k(logprobs - REF_LOGPROBS)).item() for name, k in KL_ESTIMATORS.items()}
    assert means["k1"] == pytest.approx(exact, rel=1e-12)
    assert means["k3"] == pytest.approx(exact, rel=1e-12)
    assert abs(means["k2"] - exact) > 0.01
    # A control for the direction: with log ref − log π the same mean is another number.
    assert abs(expectation(logprobs, KL_ESTIMATORS["k3"](REF_LOGPROBS - logprobs)).item() - exact) > 0.01


def test_variances_are_ordered_as_the_note_says_for_close_laws():
    logprobs = REF_LOGPROBS + 0.05 * PI_LOGITS
    logprobs = logprobs.log_softmax(0)
    variances = {}
    for name, k in KL_ESTIMATORS.items():
        sample = k(logprobs - REF_LOGPROBS)
        variances[name] = (expectation(logprobs, sample.square()) - expectation(logprobs, sample).square()).item()
    assert variances["k2"] < 0.05 * variances["k1"]
    assert variances["k3"] < 0.05 * variances["k1"]


def gradient(build):
    logits = PI_LOGITS.clone().requires_grad_()
    build(logits.log_softmax(0)).backward()
    return logits.grad


def test_only_k1_in_the_reward_has_the_policy_gradient_of_the_kl():
    exact = gradient(lambda logprobs: divergence(logprobs, REF_LOGPROBS))

    def score_function(k):
        return gradient(lambda lp: expectation(lp, k(lp - REF_LOGPROBS).detach() * lp))

    torch.testing.assert_close(score_function(KL_ESTIMATORS["k1"]), exact)
    assert (score_function(KL_ESTIMATORS["k2"]) - exact).abs().max() > 0.01
    assert (score_function(KL_ESTIMATORS["k3"]) - exact).abs().max() > 0.01


def test_as_a_loss_only_k2_has_the_gradient_of_the_kl():
    def pathwise(k):
        return gradient(lambda lp: expectation(lp, k(lp - REF_LOGPROBS)))

    exact = gradient(lambda lp: divergence(lp, REF_LOGPROBS))
    reverse = gradient(lambda lp: divergence(REF_LOGPROBS, lp))
    torch.testing.assert_close(pathwise(KL_ESTIMATORS["k2"]), exact)
    torch.testing.assert_close(pathwise(KL_ESTIMATORS["k1"]), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(pathwise(KL_ESTIMATORS["k3"]), reverse)
    assert (exact - reverse).abs().max() > 0.01


def test_k3_keeps_its_digits_for_tiny_ratios():
    x = torch.tensor([[1e-4, -1e-4]])
    naive = torch.exp(-x) - 1 + x
    exact = torch.tensor([[reference_ppo.kl(1e-4, "k3"), reference_ppo.kl(-1e-4, "k3")]])
    torch.testing.assert_close(kl_estimate(x, torch.ones(1, 2), "k3"), exact, rtol=2e-3, atol=0)
    assert ((naive - exact).abs() / exact).max() > 0.5  # a control: what exp(−x) − 1 would have given


@quick
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=6))
def test_k2_and_k3_are_never_negative(xs):
    x = torch.tensor([xs])
    for estimator in ("k2", "k3"):
        # −1e-6: expm1(−x) + x of a float32 near zero may round to the other side of it.
        assert (kl_estimate(x, torch.ones_like(x), estimator) >= -1e-6).all()


def test_the_bound_holds_one_token_back_and_can_be_lifted():
    x, mask = torch.tensor([[-80.0, 3.0]]), torch.ones(1, 2)
    assert kl_estimate(x, mask, "k1").tolist() == [[-10.0, 3.0]]
    assert kl_estimate(x, mask, "k1", log_ratio_bound=2.0).tolist() == [[-2.0, 2.0]]
    assert kl_estimate(x, mask, "k1", log_ratio_bound=None).tolist() == [[-80.0, 3.0]]
    assert kl_estimate(10 * x, mask, "k3", log_ratio_bound=None).isinf().any()
    assert kl_estimate(10 * x, mask, "k3").isfinite().all()


def test_an_unknown_estimator_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'k4'; choose one of k1, k2, k3"):
        kl_estimate(torch.zeros(1, 1), torch.ones(1, 1), "k4")


# --- policy loss ----------------------------------------------------------------------------------------------------


def test_policy_loss_and_gradient_by_hand():
    # ε = 0.2, ε_high = 0.3, dual clip 3. dL/d log π = −A r where the ratio decides and 0 where a clip does.
    #   A   r     r A    clip(r) A  min    dual floor −6   loss  clipped  gradient
    #   2   1.5   3      2.6        2.6    –               −2.6  yes      0
    #   2   0.5   1      1.6        1      –               −1    no       −1
    #  −2   1.5   −3     −2.6       −3     −3              3     no       3
    #  −2   0.5   −1     −1.6       −1.6   −1.6            1.6   yes      0
    #  −2   5     −10    −2.6       −10    −6              6     yes      0
    ratios = log(1.5, 0.5, 1.5, 0.5, 5.0).reshape(1, 5)
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0, -2.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]], dtype=torch.float64)
    logprobs = (old + ratios).requires_grad_()
    loss, clipped, ratio, log_ratio = clipped_policy_loss(
        logprobs, old, advantages, 0.2, 0.3, mask=torch.ones(1, 5), dual_clip=3.0
    )
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[-2.6, -1.0, 3.0, 1.6, 6.0]], dtype=torch.float64))
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -1.0, 3.0, 0.0, 0.0]], dtype=torch.float64))
    assert clipped.tolist() == [[True, False, False, True, True]]
    torch.testing.assert_close(ratio, torch.tensor([[1.5, 0.5, 1.5, 0.5, 5.0]], dtype=torch.float64))
    torch.testing.assert_close(log_ratio, ratios)


@quick
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-4, 4)), min_size=1, max_size=7),
    st.floats(0.05, 0.5),
    st.floats(0.05, 0.9),
    st.sampled_from([None, 1.1, 3.0]),
)
def test_policy_loss_equals_the_loop(tokens, low, high, dual_clip):
    columns = [torch.tensor([column], dtype=torch.float64) for column in zip(*tokens, strict=True)]
    mask = torch.ones_like(columns[0])
    actual = clipped_policy_loss(*columns, low, high, mask=mask, dual_clip=dual_clip).loss
    expected = [reference_ppo.policy_loss(*token, low, high, dual_clip) for token in tokens]
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_the_clip_is_symmetric_unless_told_otherwise():
    old, advantages, mask = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    loss = clipped_policy_loss(torch.full((1, 1), 1.0), old, advantages, 0.25, mask=mask).loss
    assert loss.item() == pytest.approx(-1.25)


def test_before_any_update_the_ratio_is_one_and_the_gradient_that_of_the_policy_gradient():
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(2, 3, generator=generator)
    logprobs = (-torch.rand(2, 3, generator=generator)).requires_grad_()
    out = clipped_policy_loss(logprobs, logprobs.detach().clone(), advantages, 0.2, mask=MASK, dual_clip=3.0)
    out.loss.sum().backward()
    assert out.ratio.eq(1).all()
    assert not out.clipped.any()
    torch.testing.assert_close(logprobs.grad, -advantages * MASK)


def test_only_the_new_logprobs_learn():
    logprobs, old, advantages = (torch.full((1, 2), x, requires_grad=True) for x in (-1.0, -1.1, 2.0))
    out = clipped_policy_loss(logprobs, old, advantages, 0.2, mask=torch.ones(1, 2))
    out.loss.sum().backward()
    assert logprobs.grad.ne(0).all()
    assert old.grad is None
    assert advantages.grad is None
    assert not out.ratio.requires_grad
    assert not out.log_ratio.requires_grad


def test_a_broken_token_stays_finite():
    logprobs = torch.tensor([[0.0, -300.0]], requires_grad=True)
    old, advantages, mask = torch.tensor([[-300.0, 0.0]]), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2)
    out = clipped_policy_loss(logprobs, old, advantages, 0.2, mask=mask)
    out.loss.sum().backward()
    assert out.loss.isfinite().all()
    assert logprobs.grad.isfinite().all()
    assert out.log_ratio.tolist() == [[10.0, -10.0]]
    unbounded = clipped_policy_loss(logprobs, old, advantages, 0.2, mask=mask, log_ratio_bound=None)
    assert unbounded.loss.isinf().any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"clip_range": 0.0}, "clip ranges must be positive"),
        ({"clip_range": 0.2, "clip_range_high": -0.1}, "clip ranges must be positive"),
        ({"clip_range": 0.2, "dual_clip": 1.0}, "above 1"),
    ],
)
def test_impossible_clip_ranges_are_refused(kwargs, message):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(one, one, one, mask=one, **kwargs)


# --- value loss -----------------------------------------------------------------------------------------------------


def test_value_loss_and_gradient_by_hand():
    # Old value 1, ε = 0.5. Gradient V − R where the value decides and 0 where the clip does.
    #   V     R   (V − R)²  near  (near − R)²  loss    clipped  gradient
    #   1.2   2   0.64      1.2   0.64         0.32    no       −0.8
    #   3     4   1         1.5   6.25         3.125   yes      0
    #   3     0   9         1.5   2.25         4.5     no       3
    #   −1    −2  1         0.5   6.25         3.125   yes      0
    values = torch.tensor([[1.2, 3.0, 3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[2.0, 4.0, 0.0, -2.0]], dtype=torch.float64)
    old, mask = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4)
    loss, clipped = clipped_value_loss(values, old, returns, 0.5, mask=mask)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[0.32, 3.125, 4.5, 3.125]], dtype=torch.float64))
    torch.testing.assert_close(values.grad, torch.tensor([[-0.8, 0.0, 3.0, 0.0]], dtype=torch.float64))
    assert clipped.tolist() == [[False, True, False, True]]
    plain = clipped_value_loss(values, old, returns, None, mask=mask)
    torch.testing.assert_close(plain.loss, torch.tensor([[0.32, 0.5, 4.5, 0.5]], dtype=torch.float64))
    assert not plain.clipped.any()


@quick
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=7),
    st.sampled_from([None, 0.2, 5.0]),
)
def test_value_loss_equals_the_loop(tokens, clip):
    columns = [torch.tensor([column], dtype=torch.float64) for column in zip(*tokens, strict=True)]
    actual = clipped_value_loss(*columns, clip, mask=torch.ones_like(columns[0])).loss
    expected = [reference_ppo.value_loss(*token, clip) for token in tokens]
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_only_the_new_values_learn():
    values, old, returns = (torch.full((1, 2), x, requires_grad=True) for x in (1.0, 1.1, 2.0))
    clipped_value_loss(values, old, returns, 0.2, mask=torch.ones(1, 2)).loss.sum().backward()
    assert values.grad.ne(0).all()
    assert old.grad is None
    assert returns.grad is None


def test_a_value_clip_of_zero_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="value_clip_range must be positive or None"):
        clipped_value_loss(one, one, one, 0.0, mask=one)


# --- NaN and infinity behind the mask -------------------------------------------------------------------------------


def per_token_terms(name, x, y, z):
    return {
        "k1": lambda: kl_estimate(x, MASK, "k1"),
        "k2": lambda: kl_estimate(x, MASK, "k2"),
        "k3": lambda: kl_estimate(x, MASK, "k3", log_ratio_bound=None),
        "policy": lambda: clipped_policy_loss(x, y, z, 0.2, mask=MASK, log_ratio_bound=None).loss,
        "dual_clip": lambda: clipped_policy_loss(x, y, z, 0.2, mask=MASK, dual_clip=1.5).loss,
        "value": lambda: clipped_value_loss(x, y, z, 0.2, mask=MASK).loss,
        "plain_value": lambda: clipped_value_loss(x, y, z, None, mask=MASK).loss,
        "explained_variance": lambda: explained_variance(x, z, MASK),
    }[name]()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    "name",
    [
        "k1",
        "k2",
        "k3",
        "policy",
        "dual_clip",
        "value",
        "plain_value",
        "explained_variance",
    ],
)
def test_values_behind_the_mask_reach_neither_loss_nor_gradient(name, poison):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(3, 2, 3, generator=generator)
    outcomes = []
    for inputs in (clean, torch.where(MASK.bool(), clean, poison)):
        x, y, z = (part.clone().requires_grad_() for part in inputs)
        result = per_token_terms(name, x, y, z)
        result.sum().backward()
        assert x.grad[~MASK.bool()].eq(0).all()
        outcomes.append((result.detach(), x.grad))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)
    assert outcomes[0][1].ne(0).any()


def test_outside_the_mask_the_loss_is_zero_and_the_ratio_one():
    x, y, z = torch.full((3, 2, 3), 5.0) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    out = clipped_policy_loss(x, y, z, 0.2, mask=MASK)
    assert out.loss[1, 1].item() == 0.0
    assert out.ratio[1, 1].item() == 1.0
    assert not out.clipped[1, 1]
    value = clipped_value_loss(x, y, z, 0.2, mask=MASK)
    assert value.loss[1, 1].item() == 0.0
    assert not value.clipped[1, 1]


# --- log-probabilities and entropy ----------------------------------------------------------------------------------


def logits_and_ids(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(2, 3, 7, generator=generator)
    return logits.to(dtype), torch.tensor([[0, 6, 3], [2, 2, 5]])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logprobs_and_entropy_equal_the_loop(temperature):
    logits, ids = logits_and_ids()
    logprobs, entropies = token_logprobs_and_entropy(logits, ids, temperature)
    for b in range(2):
        for t in range(3):
            row = logits[b, t].tolist()
            expected = reference_ppo.log_softmax(row, temperature)[ids[b, t].item()]
            assert logprobs[b, t].item() == pytest.approx(expected, abs=2e-6)
            assert entropies[b, t].item() == pytest.approx(reference_ppo.entropy(row, temperature), abs=5e-6)
    torch.testing.assert_close(token_logprobs(logits, ids, temperature), logprobs, rtol=0, atol=0)


def test_the_temperature_matters():
    logits, ids = logits_and_ids()
    assert (token_logprobs(logits, ids, 0.7) - token_logprobs(logits, ids)).abs().max() > 0.5


def test_token_logprobs_follow_the_softmax_gradient():
    logits, ids = logits_and_ids(torch.float64)
    logits = logits.float().requires_grad_()
    token_logprobs(logits, ids, 0.7).sum().backward()
    expected = torch.nn.functional.one_hot(ids, 7) - (logits.detach() / 0.7).softmax(-1)
    torch.testing.assert_close(logits.grad, expected / 0.7)


def test_entropy_has_a_gradient_only_when_asked():
    logits, ids = logits_and_ids()
    logits.requires_grad_()
    trained, logged = (token_logprobs_and_entropy(logits, ids, 0.7, entropy_gradient=on)[1] for on in (True, False))
    assert not logged.requires_grad
    torch.testing.assert_close(logged, trained.detach(), rtol=0, atol=0)
    trained.sum().backward()
    # dH/dl = −p (log p + H) / τ
    table = (logits.detach() / 0.7).log_softmax(-1)
    torch.testing.assert_close(logits.grad, -table.exp() * (table + trained.detach()[..., None]) / 0.7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_without_tables_equals_that_of_the_log_softmax(temperature, forbidden, dtype):
    logits, ids = logits_and_ids(dtype)
    if forbidden:
        logits[1, 2, :2] = -torch.inf
    weights = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -0.25]])
    ways = []
    for function in (
        lambda x: token_logprobs_and_entropy(x, ids, temperature, entropy_gradient=False)[0],
        lambda x: (x.double() / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0],
    ):
        given = logits.clone().requires_grad_()
        logprobs = function(given)
        (logprobs * weights).sum().backward()
        ways.append((logprobs.detach().double(), given.grad))
    torch.testing.assert_close(ways[0][0], ways[1][0], rtol=0, atol=2e-6)
    assert ways[0][1].dtype == dtype
    # bfloat16: one rounding of the finished gradient on either side.
    torch.testing.assert_close(
        *(way[1].float() for way in ways), rtol=0, atol=2e-6 if dtype is torch.float32 else 2e-2
    )
    assert ways[0][1].isfinite().all()


def test_logged_entropy_keeps_no_table_for_the_backward_pass():
    logits, ids = logits_and_ids()
    kept = {}
    for trained in (False, True):
        given, sizes = logits.clone().requires_grad_(), {}

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            token_logprobs_and_entropy(given, ids, 0.7, entropy_gradient=trained)
        sizes.pop(given.untyped_storage().data_ptr(), None)
        kept[trained] = sum(sizes.values())
    table = logits.numel() * 4
    assert kept[False] < table
    assert kept[True] >= 2 * table


def test_half_precision_logits_are_normalised_in_float32():
    logits, ids = logits_and_ids(torch.bfloat16)
    logprobs, entropies = token_logprobs_and_entropy(logits, ids, 0.7)
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits.float(), ids, 0.7), rtol=0, atol=0)
    rounded = (logits / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0].float()
    assert (logprobs - rounded).abs().max() > 1e-3  # a control: what bfloat16 arithmetic would have given


def test_a_row_does_not_depend_on_its_neighbours():
    logits, ids = logits_and_ids()
    together = token_logprobs(logits, ids)
    for b in range(2):
        torch.testing.assert_close(token_logprobs(logits[b : b + 1], ids[b : b + 1])[0], together[b], rtol=0, atol=0)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, 1e4 - 1.0, -1e4]]])
    # log σ(1) for the first token; the third is 20,000 nats behind.
    assert token_logprobs(logits, torch.tensor([[0]])).item() == pytest.approx(-math.log1p(math.exp(-1)), rel=1e-3)
    assert token_logprobs(logits, torch.tensor([[2]])).item() == pytest.approx(-2e4, rel=1e-3)


def test_entropy_of_known_laws():
    uniform = entropy(torch.zeros(2, 11))
    torch.testing.assert_close(uniform, torch.full((2,), math.log(11)))
    assert entropy(torch.tensor([50.0, 0.0, 0.0])).item() == pytest.approx(0.0, abs=1e-6)
    # Probabilities ½, ¼, ¼: 1.5 bits.
    assert entropy(torch.tensor([math.log(2), 0.0, 0.0])).item() == pytest.approx(1.5 * math.log(2), rel=1e-6)


def test_forbidden_tokens_add_nothing_to_entropy_or_gradient():
    allowed = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    entropy(allowed).backward()
    logits = torch.tensor([0.3, -1.0, 2.0, -math.inf], requires_grad=True)
    value = entropy(logits)
    value.backward()
    assert value.item() == pytest.approx(reference_ppo.entropy([0.3, -1.0, 2.0]), rel=1e-6)
    torch.testing.assert_close(logits.grad, torch.cat([allowed.grad, torch.zeros(1)]))


# --- missing EOS ----------------------------------------------------------------------------------------------------

SCORES, FINISHED = torch.tensor([2.0, 0.5, -3.0]), torch.tensor([True, False, False])


def test_missing_eos_by_hand():
    assert apply_missing_eos(SCORES, FINISHED, 1.5).tolist() == [2.0, -1.0, -4.5]
    assert apply_missing_eos(SCORES, FINISHED, 4.0, "replace").tolist() == [2.0, -4.0, -4.0]


def test_missing_eos_never_raises_a_score_as_a_factor_would():
    assert (apply_missing_eos(SCORES, FINISHED, 1.5) <= SCORES).all()
    scaled = torch.where(FINISHED, SCORES, 0.5 * SCORES)
    assert (scaled > SCORES).any()


def test_subtracting_keeps_the_order_of_truncated_completions_and_replacing_does_not():
    assert apply_missing_eos(SCORES, FINISHED, 4.0)[1:].unique().numel() == 2
    assert apply_missing_eos(SCORES, FINISHED, 4.0, "replace")[1:].unique().numel() == 1


def test_missing_eos_arguments_are_checked():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        apply_missing_eos(SCORES, FINISHED, -1.0)
    with pytest.raises(ValueError, match="'multiply'; choose 'subtract' or 'replace'"):
        apply_missing_eos(SCORES, FINISHED, 1.0, "multiply")


# --- explained variance ---------------------------------------------------------------------------------------------


def test_explained_variance_of_known_critics():
    returns = torch.tensor([[1.0, 2.0, -4.0], [6.0, 99.0, 0.5]])
    assert explained_variance(returns + 3, returns, MASK).item() == pytest.approx(1.0, abs=1e-6)  # a bias is not seen
    assert explained_variance(torch.full((2, 3), 7.0), returns, MASK).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(-returns, returns, MASK).item() == pytest.approx(-3.0, rel=1e-6)
    assert explained_variance(0.5 * returns, returns, MASK).item() == pytest.approx(0.75, rel=1e-6)


def test_explained_variance_without_variance_is_undefined():
    # Sixty-nine equal numbers: their mean is off by a rounding error, and so their variance is not exactly 0.
    returns, mask = torch.full((3, 23), -0.1), torch.ones(3, 23)
    assert masked_mean_and_var(returns, mask)[1] > 0
    assert explained_variance(torch.rand(3, 23), returns, mask).isnan()


def test_explained_variance_is_global_over_ranks():
    generator = torch.Generator().manual_seed(3)
    returns = torch.randn(5, 3, generator=generator) + torch.arange(5.0)[:, None]
    values = returns + torch.randn(5, 3, generator=generator)
    mask = torch.rand(5, 3, generator=generator) < 0.8
    whole = explained_variance(values, returns, mask)
    shards = list(zip(values.split([2, 0, 3]), returns.split([2, 0, 3]), mask.split([2, 0, 3]), strict=True))
    for part in reference_ppo.on_ranks(lambda shard, all_sum: explained_variance(*shard, all_sum=all_sum), shards):
        torch.testing.assert_close(part, whole)
    assert (explained_variance(*shards[0]) - whole).abs() > 0.01
