"""A risk measure of a quantile reward model as a reward function, in our trainer's and in TRL's own."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import logged, tiny_llama, tiny_prompts, tiny_qrm, tiny_tokenizer, tiny_trainer
from transformers import LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from reward.distribution import RewardDistribution
from reward.sources import DistributionSource
from rlhf.influence import expected_influence, population_law, statistics
from rlhf.reward_function import RiskReward
from rlhf.risk import MEASURES, parse_risk

PROMPTS = ["the red film", "a very", "the film was not", "good"]
COMPLETIONS = [" is bad", " good film was fine", " safe", " a"]


def risk_reward(risk="cvar:0.1", **settings):
    return RiskReward(tiny_qrm(), risk=risk, tokenizer=tiny_tokenizer(), **settings)


@pytest.fixture(scope="module")
def saved_qrm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qrm")
    tiny_qrm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("risk", [measure.example for measure in MEASURES.values()])
def test_reward_is_the_risk_of_each_text_alone(risk):
    model, tokenizer = tiny_qrm(), tiny_tokenizer()
    rewards = risk_reward(risk)(PROMPTS, COMPLETIONS)
    for prompt, completion, reward in zip(PROMPTS, COMPLETIONS, rewards, strict=True):
        output = model(**tokenizer(prompt + completion, return_tensors="pt", return_token_type_ids=False))
        law = RewardDistribution(levels=model.levels, values=output.quantiles[0])
        assert reward == pytest.approx(parse_risk(risk)(law).item(), abs=1e-5)


def test_order_and_batch_size_change_nothing():
    rewards = risk_reward(batch_size=32)(PROMPTS, COMPLETIONS)
    assert len(set(rewards)) == 4
    assert risk_reward(batch_size=1)(PROMPTS, COMPLETIONS) == pytest.approx(rewards, abs=1e-5)
    backwards = risk_reward(batch_size=3)(PROMPTS[::-1], COMPLETIONS[::-1])
    assert backwards[::-1] == pytest.approx(rewards, abs=1e-5)


def test_long_text_loses_its_beginning():
    reward = risk_reward(max_length=3)
    logged_values = {}
    rewards = reward(PROMPTS, COMPLETIONS, log_metric=logged_values.__setitem__)
    assert rewards[0] == pytest.approx(risk_reward()(["film"], [" is bad"])[0], abs=1e-5)
    assert logged_values["reward/truncated_share"] == 0.75


def test_telemetry_is_exact():
    seen = {}
    reward = risk_reward("cvar:0.2", tail_threshold=0.5)
    reward(PROMPTS, COMPLETIONS, log_metric=seen.__setitem__)
    law = reward.distribution(PROMPTS, COMPLETIONS)
    assert seen["reward/rating_mean"] == pytest.approx(law.mean().mean().item(), abs=1e-6)
    assert seen["reward/rating_std"] == pytest.approx(law.std().mean().item(), abs=1e-6)
    assert seen["reward/tail_mass"] == pytest.approx(law.cdf(0.5).mean().item(), abs=1e-6)
    assert 0 < seen["reward/tail_mass"] < 1
    assert 0 <= seen["reward/crossing_rate"] <= 1


def test_messages_are_read_through_the_reward_models_template():
    tokenizer = tiny_tokenizer(["user", "assistant", "the", "film", "good"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    reward = RiskReward(tiny_qrm(), risk="mean", tokenizer=tokenizer)
    prompts = [[{"role": "user", "content": "the film"}]]
    completions = [[{"role": "assistant", "content": "good"}]]
    expected = reward(["user the film"], [" assistant good"])
    assert reward(prompts, completions) == pytest.approx(expected, abs=1e-6)


def test_saved_model_is_loaded_with_its_tokenizer(saved_qrm):
    reward = RiskReward(saved_qrm, risk="cvar:0.1")
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(risk_reward()(PROMPTS, COMPLETIONS), abs=1e-6)
    assert reward.__name__ == "risk_cvar:0.1"
    assert not any(p.requires_grad for p in reward.model.parameters())


@pytest.fixture(scope="module")
def scalar_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scalar")
    config = tiny_llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_scalar_model_serves_the_mean_and_nothing_else(scalar_model):
    assert len(RiskReward(scalar_model, risk="mean")(PROMPTS, COMPLETIONS)) == 4
    with pytest.raises(ValueError, match=r"'cvar:0\.1' needs a quantile reward model, but .* of type 'llama'"):
        RiskReward(scalar_model, risk="cvar:0.1")
    with pytest.raises(ValueError, match="predicts one number"):
        RiskReward(LlamaForSequenceClassification.from_pretrained(scalar_model), risk="quantile:0.1")


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [(["a"], ["b", "c"], "1 prompts but 2 completions")],
)
def test_counts_must_match(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        risk_reward()(prompts, completions)


def test_tokenizer_without_a_pad_token_is_refused():
    with pytest.raises(ValueError, match="no pad token"):
        RiskReward(tiny_qrm(), tokenizer=tiny_tokenizer(pad_token=None))


def test_ppo_with_a_quantile_reward_model(tmp_path):
    trainer = tiny_trainer(tmp_path, reward=risk_reward("cvar:0.1", tail_threshold=0.0), max_steps=2)
    trainer.train()
    assert len(logged(trainer, "reward/rating_mean")) == 1
    assert logged(trainer, "reward/tail_mass")[0] > 0
    assert logged(trainer, "reward/crossing_rate")


def test_ppo_with_a_mixture_of_reward_models(tmp_path, saved_qrm, scalar_model):
    spec = f"mixture:0.75*{saved_qrm}+0.25*{scalar_model}"
    trainer = tiny_trainer(tmp_path, reward=RiskReward(spec, risk="cvar:0.1"), max_steps=2)
    trainer.train()
    assert logged(trainer, "reward/rating_std")[0] > 0
    assert len(logged(trainer, "reward/crossing_rate")) == 1
    # A path or a spec on its own is a reward function too, that of the mean.
    plain = tiny_trainer(tmp_path, reward=spec, max_steps=1)
    law = RiskReward(spec).distribution(PROMPTS, COMPLETIONS)
    scores, _ = plain.reward_functions(PROMPTS, COMPLETIONS, [[1]] * 4, {})
    assert scores.tolist() == pytest.approx(law.mean().tolist(), abs=1e-6)


# 2026-11: TRL 1.16 still asks for activation checkpointing by the names that transformers 5.23 deprecated.
@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing|is_gradient).* is deprecated:FutureWarning")
@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_the_same_object_rewards_trls_own_trainers(tmp_path, saved_qrm, trainer_class, config_class):
    policy = tmp_path / "policy"
    tiny_llama(initializer_range=0.3).save_pretrained(policy)
    tiny_tokenizer().save_pretrained(policy)
    reward = RiskReward(saved_qrm, risk="cvar:0.1", tail_threshold=0.0)
    args = config_class(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=5,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=reward,
        args=args,
        train_dataset=tiny_prompts(),
        processing_class=tiny_tokenizer(),
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(logged(trainer, "rewards/risk_cvar:0.1/mean")) == 3
    assert len(logged(trainer, "reward/rating_mean")) == 3
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


# ---- Population scope, attributes, several ranks ------------------------------------------------------------------


def test_population_scope_is_the_expected_influence():
    reward = risk_reward("cvar:0.2", scope="population")
    rewards = reward(PROMPTS, COMPLETIONS)
    laws = reward.distribution(PROMPTS, COMPLETIONS)
    known = statistics(parse_risk("cvar:0.2"), population_law(laws).to(torch.float64))
    expected = expected_influence(parse_risk("cvar:0.2"), laws, known)
    assert rewards == pytest.approx(expected.tolist(), abs=1e-5)
    # Far apart, not merely beyond rounding.
    assert rewards != pytest.approx(risk_reward("cvar:0.2")(PROMPTS, COMPLETIONS), abs=0.1)
    assert reward.__name__ == "risk_population cvar:0.2"


def test_evaluation_leaves_the_population_as_it_is():
    reward = risk_reward("cvar:0.2", scope="population")
    reward(PROMPTS, COMPLETIONS)
    before = reward.state_dict()
    reward(PROMPTS[:2], COMPLETIONS[1:3], is_evaluation=True)
    assert reward.state_dict() == before
    reward(PROMPTS[:2], COMPLETIONS[1:3])
    assert reward.state_dict() != before


def two_attributes(risk, **settings):
    model = tiny_qrm(attribute_names=["help", "harm"], quantile_levels=[0.1, 0.5, 0.9])
    return RiskReward(model, risk=risk, tokenizer=tiny_tokenizer(), **settings)


def test_each_attribute_has_its_measure():
    reward = two_attributes("help=mean; harm=0.5*cvar:0.2")
    laws = reward.source.attribute_distributions(PROMPTS, COMPLETIONS)
    expected = laws[:, 0].mean() + 0.5 * parse_risk("cvar:0.2")(laws[:, 1])
    seen = {}
    assert reward(PROMPTS, COMPLETIONS, log_metric=seen.__setitem__) == pytest.approx(expected.tolist(), abs=1e-5)
    assert seen["reward/rating_mean/harm"] == pytest.approx(laws[:, 1].mean().mean().item(), abs=1e-5)
    with pytest.raises(AttributeError, match="measure per attribute"):
        _ = reward.risk


def test_rows_weigh_attributes():
    weights = [[1.0, 0.0], [0.0, 1.0], [2.0, -1.0], {"harm": 3.0}]
    reward = two_attributes("help=mean; harm=cvar:0.2")
    laws = reward.source.attribute_distributions(PROMPTS, COMPLETIONS)
    parts = torch.stack([laws[:, 0].mean(), parse_risk("cvar:0.2")(laws[:, 1])], dim=1)
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0], [0.0, 3.0]])
    expected = (parts * table).sum(1)
    got = reward(PROMPTS, COMPLETIONS, attribute_weights=weights)
    assert got == pytest.approx(expected.tolist(), abs=1e-5)


def test_row_weights_leave_constraints_in_force():
    weights = [[1.0, 0.0]] * 4
    free = two_attributes("help=mean; harm=mean")(PROMPTS, COMPLETIONS, attribute_weights=weights)
    reward = two_attributes("help=mean; harm=mean", constraints=["harm=mean >= 5"])
    laws = reward.source.attribute_distributions(PROMPTS, COMPLETIONS)
    bound = reward(PROMPTS, COMPLETIONS, attribute_weights=weights)
    own, pull = laws[:, 0].mean(), laws[:, 1].mean()
    assert free == pytest.approx(own.tolist(), abs=1e-5)
    expected = (own + pull) / (1 + pull.std(correction=0) / own.std(correction=0))
    assert bound == pytest.approx(expected.tolist(), abs=1e-4)
    # Evaluation weighs alike: two multipliers later the constraint counts more.
    later = reward(PROMPTS[:2], COMPLETIONS[:2], attribute_weights=weights[:2], is_evaluation=True)
    pressed = math.exp(0.1)
    expected = (own + pressed * pull) / (1 + pressed * pull.std(correction=0) / own.std(correction=0))
    assert later == pytest.approx(expected.tolist()[:2], abs=1e-4)


def test_weights_without_a_measure_are_refused_and_constraints_need_none():
    reward = two_attributes("help=mean", constraints=["harm=mean >= 5"])
    bound = reward(PROMPTS, COMPLETIONS, attribute_weights=[{"help": 1.0}] * 4)
    assert bound != pytest.approx(two_attributes("help=mean")(PROMPTS, COMPLETIONS), abs=1e-3)
    for risk, constraints in (("help=mean", []), ("help=mean", ["harm=mean >= 5"])):
        with pytest.raises(ValueError, match=r"give 'harm' a weight, but the risk .* has no measure for it"):
            two_attributes(risk, constraints=constraints)(PROMPTS, COMPLETIONS, attribute_weights=[[1.0, 0.5]] * 4)
    with pytest.raises(ValueError, match="has the attributes help, harm"):
        two_attributes("help=mean", constraints=["humour=mean >= 5"])


def test_attributes_in_population_scope_are_worth_their_own_influence():
    spec = {"help": "cvar:0.3", "harm": "mean_variance:0.5"}
    reward = two_attributes(
        "help=cvar:0.3; harm=mean_variance:0.5", scope="population", constraints=["help=mean >= 9"]
    )
    laws = reward.source.attribute_distributions(PROMPTS, COMPLETIONS)
    weights = torch.tensor([[1.0, 2.0], [0.5, 0.0], [0.0, 1.0], [2.0, 1.0]])
    worth = []
    for place, name in enumerate(spec):
        measure, own = parse_risk(spec[name]), laws[:, place]
        worth.append(expected_influence(measure, own, statistics(measure, population_law(own))))
    own = (torch.stack(worth, dim=1) * weights).sum(1)
    pull = laws[:, 0].mean()
    expected = (own + pull) / (1 + pull.std(correction=0) / own.std(correction=0))
    got = reward(PROMPTS, COMPLETIONS, attribute_weights=weights.tolist())
    assert got == pytest.approx(expected.tolist(), abs=1e-4)


def test_ppo_with_weights_of_attributes_from_the_dataset(tmp_path):
    prompts = tiny_prompts()
    rows = [[1.0, 0.0] if place % 2 else [0.25, 0.75] for place in range(len(prompts))]
    reward = two_attributes("help=cvar:0.3; harm=mean", scope="population", constraints=["harm=mean >= 90"])
    seen = []

    def spy(*args, **columns):
        seen.extend(columns["attribute_weights"])
        return type(reward).__call__(reward, *args, **columns)

    trainer = tiny_trainer(
        tmp_path, reward=spy, train_dataset=prompts.add_column("attribute_weights", rows), max_steps=3
    )
    trainer.train()
    assert {tuple(row) for row in seen} == {(1.0, 0.0), (0.25, 0.75)}
    assert reward.objectives["harm"].dual.multipliers == pytest.approx([math.exp(0.2)])  # two rollouts
    assert "constraint/mean/multiplier/harm" in {name for row in trainer.state.log_history for name in row}


def test_warnings_name_their_attribute():
    with pytest.warns(UserWarning, match=r"^harm: 'cvar:0.05' looks at the worst 0.05 of readers of an answer"):
        two_attributes("help=mean; harm=cvar:0.05")(PROMPTS, COMPLETIONS)


def test_row_weights_replace_the_gate_of_a_single_measure():
    reward = two_attributes("cvar:0.2")
    laws = reward.source.attribute_distributions(PROMPTS, COMPLETIONS)
    got = reward(PROMPTS, COMPLETIONS, attribute_weights=[[0.25, 0.75]] * 4)
    mixed = RewardDistribution(laws.levels, 0.25 * laws.values[:, 0] + 0.75 * laws.values[:, 1])
    assert got == pytest.approx(parse_risk("cvar:0.2")(mixed).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0]] * 4, "one number for each of help, harm"),
        ([None] * 4, "one number for each of help, harm"),
        ([{"humour": 1.0}] * 4, "name 'humour'"),
        ([[1.0, math.nan]] * 4, "finite"),
    ],
)
def test_broken_row_weights_say_what_is_wrong(weights, message):
    with pytest.raises(ValueError, match=message):
        two_attributes("cvar:0.2")(PROMPTS, COMPLETIONS, attribute_weights=weights)


def test_weights_need_attributes():
    class Scalar(DistributionSource):
        name, levels, telemetry = "one number", torch.tensor([0.5]), {}

        def distribution(self, prompts, completions):
            return RewardDistribution(self.levels, torch.zeros(len(prompts), 1))

        def prepare(self, accelerator):
            pass

    with pytest.raises(ValueError, match="no attributes to weigh"):
        RiskReward(Scalar())(PROMPTS, COMPLETIONS, attribute_weights=[[1.0]] * 4)
    with pytest.raises(ValueError, match="one number has no attributes of its own"):
        RiskReward(Scalar(), risk="help=mean")
    with pytest.raises(ValueError, match="has the attributes help, harm"):
        two_attributes("humour=mean")


def test_constraint_is_told_in_words(caplog):
    reward = risk_reward("mean", constraints=["below:-100 <= 0.5", "mean >= 100"])
    with caplog.at_level("INFO", logger="rlhf"):
        reward(PROMPTS, COMPLETIONS)
    assert "constraint below:-100 <= 0.5: holds, now 0 [0, 0] over 4 answers" in caplog.text
    assert "constraint mean >= 100: violated" in caplog.text


def test_answers_to_one_prompt_widen_the_logged_interval():
    seen, alone = {}, {}
    reward = risk_reward("mean", constraints=["mean >= 0"])
    reward([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], COMPLETIONS, log_metric=seen.__setitem__)
    law = reward.distribution([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], COMPLETIONS)
    by_prompt = law.mean().reshape(2, 2).mean(1)
    error = 1.959964 * by_prompt.std().item() / math.sqrt(2)
    assert seen["constraint/mean/low"] == pytest.approx(by_prompt.mean().item() - error, abs=1e-4)
    risk_reward("mean", constraints=["mean >= 0"])(PROMPTS, COMPLETIONS, log_metric=alone.__setitem__)
    assert alone["constraint/mean/high"] != pytest.approx(seen["constraint/mean/high"], abs=1e-2)


@pytest.mark.parametrize("scope", ["response", "population"])
def test_two_ranks_have_one_population(scope, monkeypatch):
    alone = risk_reward("cvar:0.2", scope=scope, constraints=["below:-1 <= 0.1"])
    expected = [alone(PROMPTS, COMPLETIONS) for _ in range(2)][1]
    ranks = [risk_reward("cvar:0.2", scope=scope, constraints=["below:-1 <= 0.1"]) for _ in range(2)]
    halves = [(PROMPTS[:1], COMPLETIONS[:1]), (PROMPTS[1:], COMPLETIONS[1:])]
    got = {}
    for _ in range(2):
        sent = []
        # First what each rank sends, then what each makes of it; the states change in the second pass only.
        monkeypatch.setattr("rlhf.reward_function.gather_objects", lambda own, _, sent=sent: sent.append(own) or [own])
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        for rank, half in zip(ranks, halves, strict=True):
            rank(*half)
        for rank, state in zip(ranks, states, strict=True):
            rank.load_state_dict(state)
        monkeypatch.setattr("rlhf.reward_function.gather_objects", lambda own, _, sent=sent: sent)
        for index, (rank, half) in enumerate(zip(ranks, halves, strict=True)):
            place = SimpleNamespace(process_index=index, is_main_process=index == 0)
            monkeypatch.setattr("rlhf.reward_function.PartialState", lambda place=place: place)
            got[index] = rank(*half)
    assert got[0] + got[1] == pytest.approx(expected, abs=1e-5)
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_two_ranks_weigh_their_own_rows(monkeypatch):
    def reward():
        return two_attributes("help=mean; harm=cvar:0.3", scope="population", constraints=["harm=mean >= 5"])

    weights = [[1.0, 0.0], [0.0, 2.0], [0.5, 0.5], [3.0, 1.0]]
    expected = reward()(PROMPTS, COMPLETIONS, attribute_weights=weights)
    sent = []
    monkeypatch.setattr("rlhf.reward_function.gather_objects", lambda own, _: sent.append(own) or [own])
    for rows in (slice(0, 1), slice(1, 4)):
        reward()(PROMPTS[rows], COMPLETIONS[rows], attribute_weights=weights[rows])
    monkeypatch.setattr("rlhf.reward_function.gather_objects", lambda own, _: sent)
    place = SimpleNamespace(process_index=1, is_main_process=False)
    monkeypatch.setattr("rlhf.reward_function.PartialState", lambda: place)
    second = reward()(PROMPTS[1:], COMPLETIONS[1:], attribute_weights=weights[1:])
    assert second == pytest.approx(expected[1:], abs=1e-5)


def test_failure_of_another_rank_is_told(monkeypatch):
    reward = risk_reward("mean")
    broken = ("OSError: disk", {}, [1], None)
    monkeypatch.setattr("rlhf.reward_function.gather_objects", lambda own, _: [own, broken])
    with pytest.raises(RuntimeError, match=r"failed on rank 1 \(OSError: disk\)"):
        reward(PROMPTS, COMPLETIONS)


def test_resumed_run_keeps_population_multipliers_and_schedule(tmp_path):
    def reward():
        return risk_reward(
            "cvar:0.2", scope="population", constraints=["cvar:0.1 >= 0"], schedule="linear", schedule_span=(0.0, 0.9)
        )

    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    through = tiny_trainer(tmp_path / "a", reward=reward(), **settings)
    through.train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    resumed = tiny_trainer(tmp_path / "b", reward=reward(), resume_from_checkpoint=str(checkpoint), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    ends = [trainer.reward_functions.state_dict() for trainer in (through, resumed)]
    assert ends[0] == ends[1]
    for name in ("constraint/cvar:0.1/multiplier", "risk/nu"):
        assert logged(resumed, name)[-2:] == logged(through, name)[-2:]
        assert len(set(logged(through, name))) > 1
    other = tiny_trainer(
        tmp_path / "c", reward=risk_reward("mean"), resume_from_checkpoint=str(checkpoint), **settings
    )
    with pytest.raises(ValueError, match="this run on"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_a_scheduled_run_of_another_length_says_that_it_jumps():
    def at(reward, step, max_steps):
        state = SimpleNamespace(global_step=step, max_steps=max_steps)
        reward(PROMPTS, COMPLETIONS, trainer_state=state)

    first, plain = risk_reward("cvar:0.2", schedule="linear"), risk_reward("cvar:0.2")
    for reward in (first, plain):
        at(reward, 0, 8)
        at(reward, 4, 8)
    second = risk_reward("cvar:0.2", schedule="linear")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.warns(UserWarning, match=r"end after 8 steps and now ends after 16: .* jumps from 0\.5 to 0\.25"):
        at(second, 4, 16)
    # Once, and not where nothing depends on the length.
    at(second, 6, 16)
    at(plain, 4, 16)
    warming = risk_reward("mean", constraints=["mean >= 0"], constraint_warmup=(0.0, 0.5))
    at(warming, 0, 8)
    with pytest.warns(UserWarning, match="jumps from"):
        at(warming, 4, 6)
