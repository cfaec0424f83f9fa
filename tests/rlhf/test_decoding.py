"""Sampling against a loop without cache or batch, rows that leave the batch, and ranks that wait for each other."""

import inspect
import math
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from rlhf import decoding
from rlhf.decoding import DecodingLoop, draw, generate
from rlhf.rollout import left_pad

PAD, EOS = 0, 1
PROMPTS = [[4, 5, 6, 7, 8], [9, 10], [11], [12, 13, 14], [5, 5], [6]]
MAX = 12


def generation_config(**settings):
    return GenerationConfig(pad_token_id=PAD, eos_token_id=[EOS], disable_compile=True, **settings)


def sampling(**settings):
    return generation_config(**{"max_new_tokens": MAX, "do_sample": True, "top_k": 0} | settings)


def sharp(model):
    """Random weights that care what they are asked: the plain initialisation is uniform to three digits."""
    model.lm_head.weight.data *= 12
    return model.eval()


def llama(**overrides):
    return sharp(tiny_llama(tie_word_embeddings=False, **overrides))


def gpt2():
    # Learnt positions: a shift by the left padding, which rotary ones hide, changes every number.
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=18, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False, eos_token_id=EOS,
        bos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.transformer.wpe.weight.data *= 20
    return sharp(model)


def numbers(rows=6, seed=2):
    return torch.rand(rows, MAX, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loop(policy, prompt, uniforms):
    """One row, one token at a time, the whole text read anew for each, by running sums."""
    ids, drawn = list(prompt), []
    for u in uniforms.tolist():
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([ids])).logits[0, -1].double()
        running = list(accumulate(logits.softmax(-1).tolist()))
        token = next(v for v, mass in enumerate(running) if mass > u)
        ids.append(token)
        drawn.append(token)
        if token == EOS:
            break
    return drawn


@pytest.mark.parametrize(("make", "seed"), [(llama, 2), (gpt2, 8)])
@pytest.mark.parametrize("drop_ended", [True, False])
def test_completions_equal_a_loop_without_cache_or_batch(make, seed, drop_ended):
    policy, uniforms = make(), numbers(seed=seed)
    ids, mask, finished = generate(
        policy, *left_pad(PROMPTS, PAD), sampling(), [EOS], uniforms=uniforms, drop_ended=drop_ended
    )
    expected = [by_loop(policy, prompt, row) for prompt, row in zip(PROMPTS, uniforms, strict=True)]
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == expected
    assert finished.tolist() == [row[-1] == EOS for row in expected]
    assert (ids[~mask] == PAD).all()
    assert len({len(row) for row in expected}) > 2, "the lengths must differ for rows to leave one by one"


def shapes_of(policy, monkeypatch):
    shapes, forward = [], policy.forward

    def spy(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    # `generate` looks at the signature of the forward for the arguments that it takes.
    spy.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(policy, "forward", spy)
    return shapes


def test_ended_rows_leave_the_batch(monkeypatch):
    policy, uniforms = llama(), numbers()
    shapes = shapes_of(policy, monkeypatch)
    _, mask, _ = generate(policy, *left_pad(PROMPTS, PAD), sampling(), [EOS], uniforms=uniforms)
    lengths = mask.sum(1).tolist()
    # The pass that draws token t reads the rows that have more than t tokens before it.
    assert shapes[0] == (6, 5)
    assert shapes[1:] == [(sum(n > t for n in lengths), 1) for t in range(1, max(lengths))]
    shapes.clear()
    generate(policy, *left_pad(PROMPTS, PAD), sampling(), [EOS], uniforms=uniforms, drop_ended=False)
    assert shapes == [(6, 5)] + [(6, 1)] * (max(lengths) - 1)


def test_generation_stops_when_all_rows_have_ended(monkeypatch):
    policy = tiny_llama()
    calls, forward = [], policy.forward

    def spy(*args, **kwargs):
        output = forward(*args, **kwargs)
        # The first prompt ends at its first token and leaves, the second at its third.
        output.logits[:] = -50.0
        output.logits[-1, -1, EOS if len(calls) == 2 else 5] = 50.0
        if len(calls) == 0:
            output.logits[0, -1, EOS] = 50.0
        calls.append(tuple(kwargs["input_ids"].shape))
        return output

    monkeypatch.setattr(policy, "forward", spy)
    spy.__signature__ = inspect.signature(forward)
    prompt_ids, prompt_mask = left_pad([[4, 5, 6], [7]], PAD)
    ids, mask, finished = generate(
        policy, prompt_ids, prompt_mask, generation_config(max_new_tokens=9, do_sample=True), [EOS]
    )
    assert calls == [(2, 3), (1, 1), (1, 1)], "later steps read one token each: the KV cache is on"
    assert ids.tolist() == [[EOS, PAD, PAD], [5, 5, EOS]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    assert finished.tolist() == [True, True]


def test_greedy_completion_does_not_depend_on_padding():
    policy = llama(seed=3)
    config = generation_config(max_new_tokens=6, do_sample=False)
    together = generate(policy, *left_pad(PROMPTS, PAD), config, [EOS])
    for row, prompt in enumerate(PROMPTS):
        alone = generate(policy, *left_pad([prompt], PAD), config, [EOS])
        assert together[0][row][together[1][row]].tolist() == alone[0][0][alone[1][0]].tolist()


def test_rows_stay_where_a_processor_remembers_them(monkeypatch):
    # A repetition penalty knows the length of each row's prompt by the row's place.
    policy, uniforms = llama(), numbers()
    shapes = shapes_of(policy, monkeypatch)
    config = sampling(repetition_penalty=5.0)
    dropped, kept = (
        generate(policy, *left_pad(PROMPTS, PAD), config, [EOS], uniforms=uniforms, drop_ended=drop)
        for drop in (True, False)
    )
    assert dropped[1].sum(1).min() < dropped[1].sum(1).max()
    assert dropped[0].tolist() == kept[0].tolist()
    assert {rows for rows, _ in shapes} == {6}
    # The reason: as soon as a row has left, this processor refuses the others.
    monkeypatch.setattr(decoding, "ROW_WISE", (*decoding.ROW_WISE, RepetitionPenaltyLogitsProcessor))
    with pytest.raises(ValueError, match="batch size"):
        generate(policy, *left_pad(PROMPTS, PAD), config, [EOS], uniforms=uniforms)


def test_a_least_length_holds_for_rows_that_move_up(monkeypatch):
    policy, uniforms = llama(), numbers()
    shapes = shapes_of(policy, monkeypatch)
    config = sampling(min_new_tokens=3, min_p=1e-6)
    dropped, kept = (
        generate(policy, *left_pad(PROMPTS, PAD), config, [EOS], uniforms=uniforms, drop_ended=drop)[0].tolist()
        for drop in (True, False)
    )
    assert dropped == kept
    assert min(row.index(EOS) for row in dropped if EOS in row) >= 3
    assert len({rows for rows, _ in shapes}) > 2


def test_without_numbers_the_global_generator_gives_them():
    policy, prompts = llama(), left_pad(PROMPTS, PAD)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(generate(policy, *prompts, sampling(), [EOS])[0].tolist())
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(1)
    uniforms = torch.rand(len(PROMPTS), MAX, dtype=torch.float64)
    assert generate(policy, *prompts, sampling(), [EOS], uniforms=uniforms)[0].tolist() == draws[0]


def test_a_static_cache_keeps_its_rows():
    policy, uniforms = llama(), numbers()
    usual = generate(policy, *left_pad(PROMPTS, PAD), sampling(), [EOS], uniforms=uniforms)
    static = generate(
        policy, *left_pad(PROMPTS, PAD), sampling(cache_implementation="static"), [EOS], uniforms=uniforms
    )
    assert static[0].tolist() == usual[0].tolist()


def test_a_rank_that_is_done_steps_until_the_last_one_is(monkeypatch):
    policy, uniforms = llama(), numbers()
    alone = generate(policy, *left_pad(PROMPTS, PAD), sampling(), [EOS], uniforms=uniforms)
    shapes, counts = shapes_of(policy, monkeypatch), []
    others = alone[0].shape[1] + 3  # passes that another rank needs

    def all_reduce(count):
        counts.append(int(count))
        count += int(len(counts) < others)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    waiting = generate(policy, *left_pad(PROMPTS, PAD), sampling(), [EOS], uniforms=uniforms, synced_ranks=True)
    assert waiting[0].tolist() == alone[0].tolist()
    assert len(shapes) == others
    assert counts == [1] * (others - 4) + [0] * 4
    assert shapes[-3:] == [(1, 1)] * 3


# ---- The draw ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "law"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_p": 0.85}, [0.0, 4 / 9, 2 / 9, 3 / 9]),
    ],
)
def test_the_law_of_the_drawn_tokens(settings, law, monkeypatch):
    # Every row is the same prompt, the numbers lie evenly in (0, 1), and the model answers with a known law.
    n, policy = 2000, tiny_llama(vocab_size=4)
    forward = policy.forward

    def known(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:] = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
        return output

    known.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(policy, "forward", known)
    uniforms = ((torch.arange(n) + 0.5) / n).double().unsqueeze(-1)
    config = sampling(max_new_tokens=1, **settings)
    ids, _, _ = generate(policy, *left_pad([[2]] * n, PAD), config, [EOS], uniforms=uniforms)
    shares = torch.bincount(ids[:, 0], minlength=4) / n
    assert shares.tolist() == pytest.approx(law, abs=1.01 / n)


def test_draw_never_gives_a_forbidden_token_and_refuses_what_is_no_law():
    scores = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]] * 2)
    assert draw(scores, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            draw(torch.full((2, 4), broken), torch.zeros(2, dtype=torch.float64))


def test_a_number_next_to_one_never_falls_behind_the_last_token():
    # Sums of many float32 probabilities end a little off 1, and the product with u may round up to the sum itself.
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 3000, generator=generator)
    scores[:, -7:] = -math.inf
    tokens = draw(scores, torch.full((500,), 1 - 2**-53, dtype=torch.float64))
    assert int(tokens.max()) == 2992


# ---- What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2}])
def test_several_candidates_are_refused(settings):
    with pytest.raises(ValueError, match="a completion is one draw"):
        generate(llama(), *left_pad(PROMPTS, PAD), sampling(**settings), [EOS])


def test_a_model_without_a_kv_cache_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=18, hidden_size=16, num_hidden_layers=1, state_size=4))
    ids = torch.tensor([[4, 5]])
    with pytest.raises(ValueError, match="MambaForCausalLM takes no past_key_values"):
        DecodingLoop(numbers(1))(model, ids, [], [], SimpleNamespace(pad_token_id=PAD))
