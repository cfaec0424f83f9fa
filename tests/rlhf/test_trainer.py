"""The trainer against what it must not change: the gradient, a resumed run, the reference, a completion's numbers."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import (
    PROMPTS,
    WORDS,
    count_good,
    logged,
    tiny_config,
    tiny_llama,
    tiny_prompts,
    tiny_tokenizer,
    tiny_trainer,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback

from rlhf.advantages import token_rewards
from rlhf.config import PPOConfig
from rlhf.durability import MANIFEST, files_of, flushed_checksums, seal
from rlhf.masking import masked_sum
from rlhf.reward_calls import RewardError
from rlhf.rollout import Rollout
from rlhf.trainer import PPOTrainer

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
LORA = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")


class Recorder(TrainerCallback):
    """Gradient of every optimiser step, as the optimiser sees it before clipping."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second, *, atol):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_training_raises_the_reward(tmp_path, critic, peft_config):
    trainer = tiny_trainer(
        tmp_path,
        # Larger weights than usual: an adapter cannot move the logits of a frozen head that is almost zero.
        model=tiny_llama(initializer_range=0.3),
        critic=critic,
        peft_config=peft_config,
        max_steps=40,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
    )
    trainer.train()
    scores = logged(trainer, "reward/score_mean")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.5
    assert logged(trainer, "kl/reference")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "kl/reference")[-1] > 0.05


def test_first_epoch_ratio_is_one(tmp_path):
    trainer = tiny_trainer(tmp_path, temperature=0.7, num_ppo_epochs=3, max_steps=6)
    trainer.train()
    ratios, kls = logged(trainer, "policy/ratio_mean"), logged(trainer, "policy/approx_kl")
    for first in (0, 3):
        assert ratios[first] == pytest.approx(1, abs=1e-5)
        assert kls[first] == pytest.approx(0, abs=1e-6)
    # The control: after a step of the optimiser the same statistic must see the change.
    assert kls[1] > 1e-6
    assert kls[2] > kls[1]


def test_temperature_left_out_of_the_update_would_be_seen(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, temperature=0.5, max_steps=1, num_ppo_epochs=1)
    compute = trainer.compute_loss

    def forgetful(model, inputs, **kwargs):
        trainer.args.temperature = 1.0
        return compute(model, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", forgetful)
    trainer.train()
    assert logged(trainer, "policy/approx_kl")[0] > 1e-5


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_micro_batch_size_changes_nothing(tmp_path, batch, accumulation):
    def run(size, steps):
        recorder = Recorder()
        trainer = tiny_trainer(
            tmp_path / f"{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            generation_kwargs=GREEDY,
            callbacks=[recorder],
            entropy_coef=0.01,
            max_steps=2,
            num_ppo_epochs=1,
        )
        trainer.train()
        return recorder.gradients, logged(trainer, "loss"), weights(trainer)

    whole, parts = run(8, 1), run(batch, accumulation)
    assert_same(whole[0][0], parts[0][0], atol=1e-6)
    assert parts[1] == pytest.approx(whole[1], abs=1e-4)
    assert_same(whole[2], parts[2], atol=2e-5)


def test_every_mini_batch_is_one_optimiser_step_and_uses_each_row_once_an_epoch(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, num_mini_batches=2, num_ppo_epochs=2, max_steps=8)
    seen, compute = [], trainer.compute_loss

    def spy(model, inputs, **kwargs):
        seen.append((trainer.state.global_step, inputs))
        return compute(model, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", spy)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.ppo_state.rollouts == 2
    for epoch_start in (0, 2, 4, 6):
        rows = [part for step, part in seen if step in (epoch_start, epoch_start + 1)]
        returns = torch.cat([part.returns.sum(1) for part in rows])
        assert len(returns) == 16
    # Behind the mask log-probabilities are those of padding, of which each mini-batch has its own width.
    orders = [
        torch.cat([masked_sum(p.old_logprobs, p.completion_mask, dim=1) for s, p in seen if s in steps]).tolist()
        for steps in ((0, 1), (2, 3))
    ]
    assert sorted(orders[0]) == pytest.approx(sorted(orders[1]), rel=1e-6)
    assert orders[0] != pytest.approx(orders[1], rel=1e-6)


def test_terminal_reward_sits_on_the_last_real_token(tmp_path):
    trainer = tiny_trainer(tmp_path, whiten_advantages=False, kl_coef=0.0, gae_lambda=1.0, max_completion_length=8)
    rollout = collect(trainer, 8)
    # The critic starts at 0, so with gamma = lambda = 1 the return of every token is the score.
    for returns, mask in zip(rollout.returns, rollout.completion_mask, strict=True):
        assert mask.any()
        assert returns[mask].unique().numel() == 1
        assert (returns[~mask] == 0).all()
    lengths = rollout.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 1, "the case is only tested when completions differ in length"


def test_values_and_scores_make_advantages_and_targets(tmp_path):
    def row_number(prompts, **columns):
        return [i - 3.0 for i in range(len(prompts))]

    settings = {"gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.0, "whiten_advantages": False}
    trainer = tiny_trainer(tmp_path, reward=row_number, **settings)
    torch.nn.init.constant_(trainer.model.value_head.linear.bias, 2.0)
    rollout = collect(trainer, 8)
    lengths = rollout.completion_mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert rollout.values[row, :length].tolist() == [2.0] * length
        score, steps = row - 3, range(length - 1, -1, -1)
        # One-step errors are score - 2 at the end and 0.9 · 2 - 2 = -0.2 before it, summed with decay 0.72.
        advantages = [0.72**k * (score - 2) - 0.2 * (1 - 0.72**k) / 0.28 for k in steps]
        assert rollout.advantages[row, :length].tolist() == pytest.approx(advantages, abs=1e-5)
        assert rollout.returns[row, :length].tolist() == pytest.approx([a + 2 for a in advantages], abs=1e-5)


def collect(trainer, rows) -> Rollout:
    """One rollout outside of `train`."""
    trainer.model_wrapped = trainer.model
    trainer.model.train()
    dataset = trainer.train_dataset
    return trainer._collect([dataset[i] for i in range(rows)])


def test_values_behind_the_mask_have_no_effect(tmp_path):
    trainer = tiny_trainer(tmp_path, max_completion_length=10)
    rollout = collect(trainer, 8)
    assert not rollout.completion_mask.all()
    trainer._global_tokens = rollout.completion_mask.sum()
    clean = gradient(trainer, rollout)
    hidden = ~rollout.completion_mask
    for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
        getattr(rollout, name)[hidden] = math.nan
    assert_same(clean, gradient(trainer, rollout), atol=0)


def gradient(trainer, rollout):
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, rollout).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_a_completion_does_not_depend_on_its_neighbours(tmp_path):
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=8)
    rollout = collect(trainer, 8)
    num_tokens = rollout.completion_mask.shape[1]
    trainer.model.eval()
    together, _ = trainer.passes.without_graph(rollout.input_ids, rollout.attention_mask, num_tokens)
    for row in range(8):
        keep = rollout.attention_mask[row].clone()
        start = int(keep.float().argmax())  # less padding on the left
        alone, _ = trainer.passes.without_graph(
            rollout.input_ids[row : row + 1, start:], rollout.attention_mask[row : row + 1, start:], num_tokens
        )
        mask = rollout.completion_mask[row]
        torch.testing.assert_close(alone.logprobs[0][mask], together.logprobs[row][mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.values[0][mask], together.values[row][mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (3, {}),
        (4, {}),
        (3, {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2)}),
        (3, {"critic": "separate", "critic_learning_rate": 1e-3}),
        (4, {"normalize_scores": True}),
    ],
    ids=["inside a rollout", "between rollouts", "adapter", "separate critic", "normalized scores"],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, stop, changes):
    settings = {"num_ppo_epochs": 2, "max_steps": 9, "kl_target": 0.5, "num_mini_batches": 1, "max_grad_norm": 0.5}
    settings |= {"kl_gain": 1.0, **changes}
    through = tiny_trainer(tmp_path / "a", **settings)
    through.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == stop

    broken = tiny_trainer(tmp_path / "b", callbacks=[Stop()], **settings)
    broken.train()
    checkpoint = tmp_path / "b" / f"checkpoint-{stop}"
    assert (checkpoint / "rollout_0.safetensors").is_file() == (stop == 3)
    resumed = tiny_trainer(tmp_path / "b", resume_from_checkpoint=str(checkpoint), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert_same(weights(through), weights(resumed), atol=0)
    assert resumed.ppo_state == through.ppo_state
    for name in ("reward/score_mean", "kl/reference", "policy/loss", "grad_norm"):
        assert logged(resumed, name)[-3:] == logged(through, name)[-3:]


def test_second_epoch_of_prompts_has_another_order_and_resume_keeps_it(tmp_path):
    small = {"train_dataset": tiny_prompts(2), "num_ppo_epochs": 1, "max_steps": 4}  # 12 prompts, rollouts of 8
    orders = []

    def spy(prompts, completions, row, **columns):
        orders.append(list(row))
        return count_good(prompts, completions)

    tiny_trainer(tmp_path / "a", reward=spy, **small).train()
    assert len({tuple(order) for order in orders}) == 4
    through, orders[:] = list(orders), []
    tiny_trainer(tmp_path / "b", reward=spy, save_strategy="steps", save_steps=2, **small).train()
    orders.clear()
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    resumed = tiny_trainer(tmp_path / "c", reward=spy, **small)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert orders == through[2:]


def test_reference_is_the_policy_before_training(tmp_path):
    torch.manual_seed(0)
    for peft_config in (None, LORA):
        trainer = tiny_trainer(tmp_path / str(peft_config is None), peft_config=peft_config, learning_rate=1e-2)
        trainer.train()
        rollout = collect(trainer, 8)
        ids = rollout.input_ids
        logits = tiny_llama()(ids, attention_mask=rollout.attention_mask.long()).logits.double().log_softmax(-1)
        width = rollout.completion_mask.shape[1]
        expected = logits[:, -width - 1 : -1].gather(-1, ids[:, -width:, None]).squeeze(-1).float()
        mask = rollout.completion_mask
        # The tiny Llama without position ids sees left padding as positions, so compare unpadded rows alone.
        rows = rollout.attention_mask[:, 0]
        assert rows.any()
        torch.testing.assert_close(
            rollout.ref_logprobs[rows][mask[rows]], expected[rows][mask[rows]], atol=1e-5, rtol=0
        )
        assert not torch.allclose(rollout.old_logprobs[mask], rollout.ref_logprobs[mask], atol=1e-3)


def test_critic_warmup_moves_the_critic_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, critic_warmup_rollouts=2, num_ppo_epochs=1, max_steps=2, learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"value_head.linear.weight", "value_head.linear.bias"}
    later = tiny_trainer(tmp_path / "later", critic_warmup_rollouts=2, num_ppo_epochs=1, max_steps=3)
    later.train()
    assert any("policy" in n for n in before if not torch.equal(before[n], later.model.state_dict()[n]))


def test_critic_learning_rate_belongs_to_the_critic(tmp_path):
    trainer = tiny_trainer(tmp_path, critic_learning_rate=1e-5, learning_rate=1e-3)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    critic = {id(p) for p in trainer.model.critic_parameters()}
    assert {rates[i] for i in critic} == {1e-5}
    assert {rate for i, rate in rates.items() if i not in critic} == {1e-3}
    assert len(rates) == len(list(trainer.model.parameters()))


def test_adam_uses_the_epsilon_of_ppo(tmp_path):
    optimizer = tiny_trainer(tmp_path).create_optimizer()
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}


def test_dropout_is_off_everywhere(tmp_path):
    noisy = {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=18, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, **noisy)
        )

    def passes(**settings):
        trainer = tiny_trainer(tmp_path / str(len(settings)), model=gpt2(), max_completion_length=4, **settings)
        rollout = collect(trainer, 8)
        trainer.model.train()
        batch = rollout.input_ids, rollout.attention_mask, rollout.completion_mask.shape[1]
        return [trainer.model(*batch).logprobs for _ in range(2)]

    first, second = passes()
    assert torch.equal(first, second)
    first, second = passes(disable_dropout=False)
    assert not torch.equal(first, second)


def test_adaptive_kl_follows_the_observed_kl(tmp_path):
    trainer = tiny_trainer(tmp_path, kl_target=0.01, kl_coef=0.1, kl_horizon=20, max_steps=12, learning_rate=1e-2)
    trainer.train()
    coefficients, kls = logged(trainer, "kl/coef"), logged(trainer, "kl/reference")
    assert coefficients[0] == 0.1
    for before, after, kl in zip(coefficients, coefficients[1:], kls, strict=False):
        assert (after > before) == (kl > 0.01)


def test_the_coefficient_in_force_answers_the_last_rollout(tmp_path):
    settings = {"kl_target": 0.01, "kl_coef": 0.1, "kl_horizon": 10**9, "max_steps": 8, "learning_rate": 1e-2}
    trainer = tiny_trainer(tmp_path, kl_gain=1.0, **settings)
    charged = []
    with mock.patch("rlhf.trainer.token_rewards", side_effect=lambda *a: charged.append(a[3]) or token_rewards(*a)):
        trainer.train()
    kls = logged(trainer, "kl/reference")
    # The accumulating controller stands still under so long a horizon; what moves is the answer.
    expected = [0.1, *(0.1 * min(max(kl / 0.01, 0.25), 4) for kl in kls[:-1])]
    assert charged == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 0.11
    assert logged(trainer, "kl/coef") == pytest.approx(charged, rel=1e-6)


def test_saved_policy_is_a_plain_checkpoint_with_the_critic_beside_it(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "critic", "ppo_config.json", "tokenizer.json"} <= names
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(dict(policy.state_dict()), dict(trainer.model.policy.state_dict()), atol=0)
    fresh = tiny_trainer(tmp_path / "fresh")
    fresh.model.load_critic(tmp_path)
    assert torch.equal(fresh.model.value_head.linear.weight, trainer.model.value_head.linear.weight)
    assert trainer.model.value_head.linear.weight.abs().sum() > 0


def test_nonfinite_rewards_are_counted_and_left_out(tmp_path):
    def broken(prompts, completions, row, **columns):
        good = count_good(prompts, completions)
        return [math.inf if r % 3 == 0 else g for r, g in zip(row, good, strict=True)]

    trainer = tiny_trainer(tmp_path, reward=broken, train_dataset=tiny_prompts().select(range(8)))
    with pytest.warns(UserWarning, match=r"3 of 8 rewards are NaN or infinite, the first for prompt '"):
        rollout = collect(trainer, 8)
    kept = rollout.completion_mask.any(1)
    assert kept.tolist() == [row % 3 != 0 for row in range(8)]
    assert rollout.advantages.isfinite().all()
    loss = trainer.compute_loss(trainer.model, rollout)
    assert loss.isfinite()

    strict = tiny_trainer(tmp_path / "strict", reward=broken, nonfinite_rewards="raise")
    with pytest.raises(RewardError, match="nonfinite_rewards='exclude'"):
        collect(strict, 8)


def test_whole_rollout_without_a_reward_changes_no_weight(tmp_path):
    trainer = tiny_trainer(tmp_path, reward=lambda prompts, completions, **c: [None] * len(prompts), max_steps=2)
    before = weights(trainer)
    with (
        pytest.warns(UserWarning, match="8 of 8 rewards"),
        pytest.warns(UserWarning, match="is skipped on all ranks; first not finite: rewards"),
    ):
        trainer.train()
    assert_same(before, weights(trainer), atol=0)


def test_evaluation_reports_held_out_scores(tmp_path):
    held_out = tiny_prompts(1)
    trainer = tiny_trainer(tmp_path, eval_dataset=held_out, eval_strategy="steps", eval_steps=2, tail_threshold=-0.3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_reward/score_mean" in entry]
    assert len(entries) == 2
    assert entries[0]["eval_num_completions"] == len(held_out)
    assert 0 <= entries[0]["eval_reward/below_threshold_rate"] <= 1
    assert not any(name.startswith("policy/") for name in entries[0])


def test_one_held_out_prompt_has_a_score_and_no_tail(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=tiny_prompts(1).select(range(1)), per_device_eval_batch_size=4)
    found = trainer.evaluate()
    assert found["eval_num_completions"] == 1
    assert found["eval_reward/score_mean"] == found["eval_reward/score_min"]
    assert not {"eval_reward/score_std", "eval_reward/score_q05", "eval_reward/score_cvar_0.1"} & set(found)
    # A rollout of eight, as small as they come, has its worst tenth.
    trainer.train()
    assert len(logged(trainer, "reward/score_cvar_0.1")) == 2
    assert logged(trainer, "reward/score_q05") == []


def test_several_generations_of_one_prompt(tmp_path):
    seen = []

    def spy(prompts, completions, **columns):
        seen.append(list(prompts))
        return count_good(prompts, completions)

    tiny_trainer(tmp_path, reward=spy, num_generations=4, max_steps=1, num_ppo_epochs=1).train()
    assert [len(set(seen[0][i : i + 4])) for i in (0, 4)] == [1, 1]
    assert len(set(seen[0])) == 2


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = tiny_tokenizer(["the", "film", "good", "user:", "assistant:"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "the film"}]] * 16})
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    model = tiny_llama(vocab_size=len(tokenizer))
    trainer = tiny_trainer(
        tmp_path, reward=reward, model=model, processing_class=tokenizer, train_dataset=rows, max_steps=1
    )
    trainer.train()
    prompt, completion = seen[0]
    assert prompt == [{"role": "user", "content": "the film"}]
    assert completion[0]["role"] == "assistant"
    ids = collect(trainer, 1).input_ids[0].tolist()
    assert tokenizer.decode(ids[: tokenizer("user: the film assistant:", return_length=True)["length"][0]]) == (
        "user: the film assistant:"
    )


def test_whitened_rewards_keep_their_sign(tmp_path):
    trainer = tiny_trainer(tmp_path, whiten_rewards=True, whiten_advantages=False, gae_lambda=1.0, kl_coef=0.0)
    plain = tiny_trainer(tmp_path / "plain", whiten_advantages=False, gae_lambda=1.0, kl_coef=0.0)
    torch.manual_seed(11)
    scaled = collect(trainer, 8)
    torch.manual_seed(11)
    raw = collect(plain, 8)
    mask = raw.completion_mask
    assert torch.equal(scaled.returns[mask].sign(), raw.returns[mask].sign())
    ratio = scaled.returns[mask] / raw.returns[mask]
    assert ratio.max() - ratio.min() < 1e-4
    assert abs(ratio[0].item() - 1) > 1e-2


BY_WEIGHT = {"prompt_weight_column": "tail"}


def weighted(weights):
    prompts = [f"the film is {word}" for word in WORDS[: len(weights)]]
    return Dataset.from_dict({"prompt": prompts, "tail": weights})


def test_prompts_are_drawn_by_their_weights(tmp_path):
    # Two prompts share all the weight, so a rollout of 8 holds each four times.
    seen = []

    def reward(prompts, completions, **_):
        seen.append(sorted(prompts))
        return [0.0] * len(prompts)

    trainer = tiny_trainer(
        tmp_path, reward=reward, train_dataset=weighted([0, 3.0, 0, 0, 0, 3.0, 0, 0, 0]), max_steps=2, **BY_WEIGHT
    )
    trainer.train()
    assert seen
    assert all(prompts == ["the film is a"] * 4 + ["the film is good"] * 4 for prompts in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "train_dataset is empty"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"] * 9})}, "no column 'prompt'"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["a film"] * 8 + [" "]})}, "row 8: the prompt is empty"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["film " * 70] * 8})}, "8 of 8 prompts exceed 58 tokens"),
        ({"train_dataset": PROMPTS}, r"must be a datasets\.Dataset"),
        ({"train_dataset": tiny_prompts(1)}, "One rollout needs 8 prompts, but train_dataset has 6"),
        ({"processing_class": tiny_tokenizer(pad_token="<eos>")}, "pad token equals the EOS token"),
        ({"processing_class": tiny_tokenizer(pad_token=None)}, "no pad token"),
        ({"max_completion_length": 64}, "leaves no room for a prompt"),
        ({"num_generations": 3}, "does not divide into groups of num_generations=3"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries for 1"),
        ({"reward": []}, "reward_funcs is empty"),
        ({"stop_tokens": ["two words"]}, "not a single token"),
        ({"pad_token": "<none>"}, "not in the tokenizer's vocabulary"),
        ({"prompt_weight_column": "tail"}, "names 'tail', but the training data has prompt"),
        ({"train_dataset": weighted([1.0] * 8 + [-0.5]), **BY_WEIGHT}, "0 or more; row 8 has -0.5"),
        ({"train_dataset": weighted([math.nan] + [1.0] * 8), **BY_WEIGHT}, "row 0 has nan"),
        ({"train_dataset": weighted([0.0] * 9), **BY_WEIGHT}, "every prompt the weight 0"),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **changes)


def test_wrong_number_of_rewards_is_named(tmp_path):
    trainer = tiny_trainer(tmp_path, reward=lambda prompts, completions, **columns: [0.0])
    with pytest.raises(RewardError, match="returned 1 numbers for 8 completions"):
        trainer.train()


def test_occupied_output_dir_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        tiny_trainer(tmp_path)
    assert isinstance(tiny_trainer(tmp_path, overwrite_output_dir=True), PPOTrainer)


def test_checkpoint_of_another_layout_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    other = tiny_trainer(tmp_path / "b", gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 2 saved, 4 now"):
        other.train(resume_from_checkpoint=checkpoint)
    foreign = tmp_path / "checkpoint-2"
    foreign.mkdir()
    (foreign / "weights").write_text("of something else")
    seal(foreign, flushed_checksums(foreign, ["weights"]))
    with pytest.raises(ValueError, match="not a checkpoint of PPOTrainer"):
        trainer.train(resume_from_checkpoint=str(foreign))


@pytest.mark.parametrize(("head", "quantiles"), [("scalar", None), ("quantile", 32)])
def test_checkpoint_from_when_there_were_two_critic_heads(tmp_path, head, quantiles):
    """Written with a scalar head it is resumed as ever; with the quantile head it is refused by name."""
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    edits = {"ppo_state.json": {"critic_head": head}}
    edits["critic/config.json"] = edits["ppo_state.json"] | {"critic_quantiles": quantiles}
    for name, entries in edits.items():
        content = json.loads((checkpoint / name).read_text())
        content.get("layout", content).update(entries)
        (checkpoint / name).write_text(json.dumps(content))
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint, flushed_checksums(checkpoint, files_of(checkpoint)))
    later = tiny_trainer(tmp_path, max_steps=3, resume_from_checkpoint="auto")
    if head == "scalar":
        later.train("auto")
        assert later.state.global_step == 3
    else:
        with pytest.raises(ValueError, match="critic_head='quantile', which no longer exists"):
            later.train("auto")


def test_a_launch_for_gpus_without_one_is_refused(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    with pytest.raises(ValueError, match=r"none is visible.*cpu\.yaml"):
        tiny_trainer(tmp_path / "gpu", use_cpu=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert tiny_trainer(tmp_path / "cpu", use_cpu=False).args.device.type == "cpu"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("clip_range", 0),
        ("temperature", 0),
        ("gamma", 1.5),
        ("kl_estimator", "k4"),
        ("critic", "both"),
        ("dual_clip", 1.1),
        ("reward_clip_range", [1.0, -1.0]),
        ("num_ppo_epochs", 0),
        ("critic_model", "somewhere"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        tiny_config(tmp_path, **{setting: value})


def test_level_and_scale_of_the_scores_mean_nothing_to_a_normalized_run(tmp_path):
    def stretched(prompts, completions, **columns):
        return [1000 * score - 7000 for score in count_good(prompts, completions)]

    settings = {"normalize_scores": True, "max_steps": 4}
    plain = tiny_trainer(tmp_path / "plain", **settings)
    plain.train()
    other = tiny_trainer(tmp_path / "other", reward=stretched, **settings)
    other.train()
    assert_same(weights(plain), weights(other), atol=1e-5)
    # What is logged is the score itself.
    raw = [1000 * score - 7000 for score in logged(plain, "reward/score_mean")]
    assert logged(other, "reward/score_mean") == pytest.approx(raw, rel=1e-5)
    control = tiny_trainer(tmp_path / "control", reward=stretched, max_steps=4)
    control.train()
    with pytest.raises(AssertionError):
        assert_same(weights(plain), weights(control), atol=1e-5)


def test_what_the_prompt_alone_decides_cancels_above_siblings(tmp_path):
    def by_prompt(prompts, completions, **columns):
        return [
            score + 8 * len(prompt.split())
            for prompt, score in zip(prompts, count_good(prompts, completions), strict=True)
        ]

    settings = {"num_generations": 4, "max_steps": 4}
    siblings = {"score_baseline": "siblings", **settings}
    plain = tiny_trainer(tmp_path / "plain", **siblings)
    plain.train()
    other = tiny_trainer(tmp_path / "other", reward=by_prompt, **siblings)
    other.train()
    assert_same(weights(plain), weights(other), atol=1e-5)
    assert logged(other, "reward/score_mean")[0] > 15  # the log keeps the score itself
    control = tiny_trainer(tmp_path / "control", reward=by_prompt, **settings)
    control.train()
    with pytest.raises(AssertionError):
        assert_same(weights(plain), weights(control), atol=1e-5)


def test_siblings_without_any_are_refused():
    with pytest.raises(ValueError, match="num_generations must be 2 or more with score_baseline='siblings', got 1"):
        PPOConfig(score_baseline="siblings")


def test_the_tokenizer_comes_from_where_the_weights_come_from(tmp_path, monkeypatch):
    """A gated model whose token reached the weights alone could not be trained; seen here by what is asked for."""
    tiny_llama().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    tiny_llama(seed=1).save_pretrained(tmp_path / "critic")
    asked = {}

    def spy(of):
        def from_pretrained(place, *args, **kwargs):
            asked[of, Path(place).name] = {key: kwargs.get(key) for key in ("revision", "token")}
            return real[of](place, *args, **kwargs)

        return from_pretrained

    classes = {"tokenizer": AutoTokenizer, "policy": AutoModelForCausalLM, "critic": AutoModel}
    real = {name: of.from_pretrained for name, of in classes.items()}
    for name, of in classes.items():
        monkeypatch.setattr(of, "from_pretrained", spy(name))
    settings = {"token": "hf_secret", "revision": "abc"}
    args = tiny_config(
        tmp_path / "run", model_init_kwargs=settings, critic="separate", critic_model=str(tmp_path / "critic")
    )
    PPOTrainer(str(tmp_path / "policy"), count_good, args, tiny_prompts())
    assert asked["policy", "policy"] == settings
    assert asked["tokenizer", "policy"] == settings
    assert asked["critic", "critic"] == {"token": "hf_secret", "revision": None}
