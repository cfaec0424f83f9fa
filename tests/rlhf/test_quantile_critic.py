"""The quantile critic: it learns conditional laws from samples, its mean drives GAE, and its runs can be continued."""

import pytest
import torch
from tiny import logged, tiny_config, tiny_trainer
from transformers import TrainerCallback

from rlhf.critic import ValueHead
from rlhf.losses import midpoint_levels, quantile_value_loss

QUANTILE = {"critic_head": "quantile", "critic_quantiles": 5}


def noisy(prompts, completions, **columns):
    """A score whose law given the prompt is normal, with a mean that grows with the number of its words."""
    return (torch.tensor([len(p.split()) - 8 / 3 for p in prompts]) + torch.randn(len(prompts))).tolist()


def collect(trainer, rows):
    """One rollout outside of `train`."""
    trainer.model_wrapped = trainer.model
    trainer.model.train()
    return trainer._collect([trainer.train_dataset[i] for i in range(rows)])


def fitted_quantiles(returns, states, huber_kappa, num_quantiles=8):
    """What a head on the states (N, 2) answers after it has seen every return (N, M)."""
    head = ValueHead(2, num_quantiles)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=300)
    mask = torch.ones_like(returns, dtype=torch.bool)
    for _ in range(300):
        predictions = head(states).unsqueeze(1).expand(*returns.shape, num_quantiles)
        loss = quantile_value_loss(predictions, returns, huber_kappa, mask=mask).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head(states).detach()


# States s with returns s + (1/2 + s) E, E exponential: centre, spread and skew differ from state to state, and every
# conditional quantile s - (1/2 + s) log(1 - t) is linear in the state.
STATE = torch.tensor([0.0, 0.4, 1.3])
STATES = torch.stack([STATE, 1 - STATE], dim=1)
RANKS = midpoint_levels(300)
RETURNS = STATE[:, None] - (0.5 + STATE)[:, None] * torch.log1p(-RANKS)


@pytest.fixture(scope="module")
def fitted():
    return fitted_quantiles(RETURNS, STATES, 0.0)


def test_head_recovers_the_conditional_quantiles_of_known_laws(fitted):
    true = STATE[:, None] - (0.5 + STATE)[:, None] * torch.log1p(-midpoint_levels(8))
    # Between neighbouring samples the loss is flat, and at the highest level of the widest law they are 0.1 apart.
    torch.testing.assert_close(fitted, true, atol=0.1, rtol=0)  # loose: the distance of the samples
    # The control: a wide quadratic zone draws every quantile to the mean.
    assert (fitted_quantiles(RETURNS, STATES, 2.0)[:, -1] < true[:, -1] - 0.2).all()


def test_quantiles_of_bootstrapped_returns_are_too_narrow(fitted):
    bootstrapped = fitted_quantiles(0.5 * RETURNS + 0.5 * RETURNS.mean(1, keepdim=True), STATES, 0.0)
    ratio = (bootstrapped[:, -1] - bootstrapped[:, 0]) / (fitted[:, -1] - fitted[:, 0])
    assert ((ratio > 0.4) & (ratio < 0.6)).all()


@pytest.mark.parametrize("head", ["scalar", "quantile"])
def test_mean_of_the_quantiles_drives_gae_and_samples_are_the_targets(tmp_path, head):
    def row_number(prompts, **columns):
        return [i - 3.0 for i in range(len(prompts))]

    settings = {"gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.0, "whiten_advantages": False}
    trainer = tiny_trainer(tmp_path, reward=row_number, **settings, **(QUANTILE if head == "quantile" else {}))
    with torch.no_grad():
        # Unsorted and skewed: their mean is 2, their median 1.
        trainer.model.value_head.linear.bias.copy_(torch.tensor([3.0, -1, 0, 7, 1] if head == "quantile" else [2.0]))
    rollout = collect(trainer, 8)
    lengths = rollout.completion_mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert rollout.values[row, :length].tolist() == [2.0] * length
        score, steps = row - 3, range(length - 1, -1, -1)
        # One-step errors are score - 2 at the end and 0.9 · 2 - 2 = -0.2 before it, summed with decay 0.72.
        advantages = [0.72**k * (score - 2) - 0.2 * (1 - 0.72**k) / 0.28 for k in steps]
        samples = [0.9**k * score for k in steps]
        assert rollout.advantages[row, :length].tolist() == pytest.approx(advantages, abs=1e-5)
        targets = samples if head == "quantile" else [a + 2 for a in advantages]
        assert rollout.returns[row, :length].tolist() == pytest.approx(targets, abs=1e-5)


def test_critic_is_calibrated_on_rollouts_that_it_has_not_seen(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        reward=noisy,
        critic_head="quantile",
        critic_quantiles=10,
        critic_warmup_rollouts=10**6,  # the policy stands still, so that there is one law to learn
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        num_ppo_epochs=1,
        max_completion_length=2,
        max_steps=40,
        vf_coef=1.0,
        learning_rate=0.03,
        lr_scheduler_type="linear",
    )
    trainer.train()

    def late(name):
        return sum(logged(trainer, f"critic/{name}")[-15:]) / 15

    # 15 rollouts of 32 completions: a standard error of 0.014.
    assert late("coverage_0.1") == pytest.approx(0.1, abs=0.04)  # loose: three standard errors
    assert late("coverage_0.9") == pytest.approx(0.9, abs=0.04)  # loose: three standard errors
    assert 0.8 < late("spread") < 1.2
    assert late("explained_variance") > 0.1
    # At first every quantile is 0: the median, whatever its level.
    assert logged(trainer, "critic/coverage_0.1")[0] == logged(trainer, "critic/coverage_0.9")[0]
    assert logged(trainer, "critic/spread")[0] == 0
    assert logged(trainer, "critic/explained_variance") == logged(trainer, "critic/explained_variance_sampled")
    assert set(logged(trainer, "critic/clip_fraction")) == {0.0}


def test_separate_trunk_learns_from_the_quantile_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, critic="separate", max_steps=3, **QUANTILE)
    before = {name: tensor.clone() for name, tensor in trainer.model.critic_trunk.state_dict().items()}
    trainer.train()
    moved = [n for n, tensor in trainer.model.critic_trunk.state_dict().items() if not torch.equal(tensor, before[n])]
    assert any("layers.0" in name for name in moved)
    assert len(logged(trainer, "critic/coverage_0.1")) == 2


def test_micro_batch_size_changes_nothing(tmp_path):
    def run(size, steps):
        trainer = tiny_trainer(
            tmp_path / f"{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            generation_kwargs={"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
            max_steps=2,
            num_ppo_epochs=1,
            **QUANTILE,
        )
        trainer.train()
        return logged(trainer, "critic/loss"), logged(trainer, "grad_norm"), trainer.model.value_head.linear.weight

    whole, parts = run(8, 1), run(2, 4)
    assert parts[0] == pytest.approx(whole[0], abs=1e-5)
    assert parts[1] == pytest.approx(whole[1], abs=1e-5)
    torch.testing.assert_close(parts[2], whole[2], atol=2e-5, rtol=0)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    settings = {"num_ppo_epochs": 2, "max_steps": 6, **QUANTILE}
    through = tiny_trainer(tmp_path / "a", **settings)
    through.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 3

    tiny_trainer(tmp_path / "b", callbacks=[Stop()], **settings).train()
    checkpoint = tmp_path / "b" / "checkpoint-3"
    assert (checkpoint / "rollout_0.safetensors").is_file()
    resumed = tiny_trainer(tmp_path / "b", resume_from_checkpoint=str(checkpoint), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = through.model.state_dict()
    assert expected["value_head.linear.weight"].abs().sum() > 0
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for name in ("critic/loss", "critic/coverage_0.9", "policy/loss"):
        assert logged(resumed, name)[-2:] == logged(through, name)[-2:]

    scalar = tiny_trainer(tmp_path / "c", critic_head="scalar")
    with pytest.raises(ValueError, match="critic_head: 'quantile' saved, 'scalar' now"):
        scalar.train(resume_from_checkpoint=str(checkpoint))
    fewer = tiny_trainer(tmp_path / "d", **settings | {"critic_quantiles": 6})
    with pytest.raises(ValueError, match="critic_quantiles: 5 saved, 6 here"):
        fewer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("setting", "value"), [("critic_head", "normal"), ("critic_quantiles", 4), ("critic_huber_kappa", -0.1)]
)
def test_settings_out_of_range_are_named(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        tiny_config(tmp_path, **{setting: value})
