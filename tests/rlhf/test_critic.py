"""Policy and critic in one forward pass: right tokens, right positions, right gradients."""

import json

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from rlhf.critic import ActorCritic, ValueHead

IDS = torch.tensor([[0, 0, 5, 7, 9, 4, 6], [3, 8, 5, 7, 4, 9, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
NUM_TOKENS = 3


def actor_critic(separate=False):
    model = tiny_llama(initializer_range=0.3)
    module = ActorCritic(model, AutoModel.from_config(model.config) if separate else None)
    torch.nn.init.normal_(module.value_head.linear.weight)
    return module.eval()


def test_logprobs_equal_a_float64_log_softmax_of_each_row_alone():
    module = actor_critic()
    temperature = 0.6
    scores = module(IDS, MASK, NUM_TOKENS, temperature=temperature, with_entropy=True)
    for row in range(2):
        ids = IDS[row][MASK[row]]
        logits = module.policy.double()(ids[None]).logits[0] / temperature
        module.policy.float()
        law = torch.log_softmax(logits, -1)
        for t in range(NUM_TOKENS):
            before = len(ids) - NUM_TOKENS + t - 1
            expected = law[before, ids[before + 1]].item()
            assert scores.logprobs[row, t].item() == pytest.approx(expected, abs=1e-5)
            entropy = -(law[before].exp() * law[before]).sum().item()
            assert scores.entropy[row, t].item() == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_value_is_read_before_its_token_is_known(separate):
    module = actor_critic(separate)
    values = module(IDS, MASK, NUM_TOKENS).values
    changed = IDS.clone()
    changed[:, -2] = 11  # the second of three completion tokens
    others = module(changed, MASK, NUM_TOKENS).values
    torch.testing.assert_close(others[:, :2], values[:, :2], atol=0, rtol=0)
    assert (others[:, 2] - values[:, 2]).abs().min() > 1e-3


def test_separate_critic_does_not_read_the_policy():
    module = actor_critic(separate=True)
    values = module(IDS, MASK, NUM_TOKENS).values
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(module(IDS, MASK, NUM_TOKENS).values, values, atol=0, rtol=0)


def test_fresh_values_are_exactly_zero():
    module = ActorCritic(tiny_llama())
    assert (module(IDS, MASK, NUM_TOKENS).values == 0).all()


@pytest.mark.parametrize(("detach", "reaches"), [(False, True), (True, False)])
def test_detached_trunk_gets_no_value_gradient(detach, reaches):
    module = actor_critic()
    module(IDS, MASK, NUM_TOKENS, detach_trunk=detach).values.sum().backward()
    trunk = [p.grad for p in module.policy.parameters() if p.grad is not None]
    assert any(g.abs().sum() > 0 for g in trunk) == reaches
    assert module.value_head.linear.weight.grad.abs().sum() > 0


def test_learned_positions_count_real_tokens():
    """With absolute positions, padding that shifts them would change every number of the padded row."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=18, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.5)
    module = ActorCritic(GPT2LMHeadModel(config)).eval()
    padded = module(IDS, MASK, NUM_TOKENS).logprobs[0]
    alone = module(IDS[:1, 2:], MASK[:1, 2:], NUM_TOKENS).logprobs[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_padding_ids_are_never_read():
    module = actor_critic()
    other = IDS.clone()
    other[~MASK] = 12
    torch.testing.assert_close(module(other, MASK, NUM_TOKENS).logprobs, module(IDS, MASK, NUM_TOKENS).logprobs)


@pytest.mark.parametrize("separate", [False, True])
def test_critic_round_trip(tmp_path, separate):
    module = actor_critic(separate)
    module.save_critic(tmp_path, module.state_dict())
    kind = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert kind["critic"] == ("separate" if separate else "shared")
    fresh = actor_critic(separate)
    fresh.policy.load_state_dict(module.policy.state_dict())
    fresh.load_critic(tmp_path)
    torch.testing.assert_close(fresh(IDS, MASK, 3).values, module(IDS, MASK, 3).values, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"another critic \(critic: '\w+' saved, '\w+' here\)"):
        actor_critic(not separate).load_critic(tmp_path)
    with pytest.raises(ValueError, match="holds no critic"):
        fresh.load_critic(tmp_path / "nowhere")


def test_value_head_stays_in_float32_under_autocast():
    head = ValueHead(4)
    torch.nn.init.ones_(head.linear.weight)
    hidden = torch.full((1, 4), 1.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).item() == pytest.approx(4.004, abs=1e-6)


def test_head_cast_to_bfloat16_still_multiplies_in_float32():
    head = ValueHead(2)
    torch.nn.init.ones_(head.linear.weight)
    torch.nn.init.constant_(head.linear.bias, 0.5)
    # bfloat16 steps by 2 between 256 and 512: it would answer 256.
    assert head.to(torch.bfloat16)(torch.full((1, 2), 128.0)).tolist() == [256.5]


def test_critic_parameters_are_the_ones_outside_the_policy():
    for separate in (False, True):
        module = actor_critic(separate)
        policy = {id(p) for p in module.policy.parameters()}
        critic = {id(p) for p in module.critic_parameters()}
        assert not policy & critic
        assert policy | critic == {id(p) for p in module.parameters()}


def test_a_model_without_a_language_model_head_is_refused():
    with pytest.raises(ValueError, match="no language-model head"):
        ActorCritic(AutoModel.from_config(tiny_llama().config))


def test_tokenizer_of_these_tests_has_three_special_tokens():
    tokenizer = tiny_tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


@pytest.mark.parametrize("separate", [False, True])
def test_head_reads_a_dense_input_and_generation_copies_no_weight(separate):
    """Torch expands a frozen head's weight over the rows of an input with gaps, which generation makes."""
    module = actor_critic(separate).requires_grad_(False)
    head, dense = module.policy.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda _, inputs: dense.append(inputs[0].is_contiguous()))
    module.generate(input_ids=IDS, attention_mask=MASK.long(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert dense == [True, True]
    gaps = torch.randn(2, 3, module.config.hidden_size)[:, -1:]
    assert not gaps.is_contiguous()  # else the test shows nothing
