"""Sources of rating laws: each against its model, one text at a time, and through the reward function."""

import copy
import math
from contextlib import nullcontext
from functools import lru_cache
from types import SimpleNamespace

import pytest
import reference_mixtures
import reference_risk
import torch
from scipy import stats
from tiny import tiny_llama, tiny_qrm, tiny_tokenizer
from transformers import LlamaForSequenceClassification

from reward.combinations import AverageSource, MixtureSource
from reward.judgment import JudgmentSource
from reward.released_model import ReleasedConfig, ReleasedRewardModel
from reward.source_specs import EXAMPLES, SourceSpecError, parse_source, read_source_spec
from reward.sources import (
    SPREADS,
    EnsembleSource,
    GaussianSource,
    QuantileModelSource,
    ScalarSource,
)
from rlhf.reward_function import RiskReward

PROMPTS = ["the red film", "a very", "the film was not", "good"]
COMPLETIONS = [" is bad", " good film was fine very safe", " safe", " a"]
ATTRIBUTES = ["kind", "true", "short"]


@lru_cache
def classifier(seed=0, labels=1):
    config = tiny_llama(initializer_range=0.3).config
    config.num_labels = labels
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config).eval()


@lru_cache
def qrm():
    return tiny_qrm()


@lru_cache
def three_attributes():
    model = tiny_qrm(attribute_names=ATTRIBUTES, gate_temperature=20.0)
    for parameter in model.attribute_gate.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    return model


@lru_cache
def published(kind, gate_activation="softmax"):
    """A published model of three attributes with random weights; a Gaussian with the levels of `load_released`."""
    levels = [k / 100 for k in range(1, 100)] if kind == "gaussian" else [0.1, 0.5, 0.9]
    trunk = tiny_llama(initializer_range=0.3)
    config = ReleasedConfig(
        backbone_config=trunk.config,
        kind=kind,
        quantile_levels=levels,
        attribute_names=ATTRIBUTES,
        gate_activation=gate_activation,
        gate_position="last_token",
    )
    torch.manual_seed(5)
    return ReleasedRewardModel(config, backbone=trunk.model).eval()


def scalar(seed=0, **reading):
    return ScalarSource(classifier(seed), tokenizer=tiny_tokenizer(), **reading)


def judge(**settings):
    words = ["the", "film", "is", "good", "bad", "red", "1", "2", "3", "4", "5", "Rating:", "a", "very", "safe"]
    tokenizer = tiny_tokenizer(words)
    return JudgmentSource(language_model(), tokenizer=tokenizer, **({"max_outside_mass": 1.0} | settings))


@lru_cache
def language_model():
    return tiny_llama(initializer_range=0.6)


SOURCES = {
    "quantile": lambda **r: QuantileModelSource(qrm(), tokenizer=tiny_tokenizer(), **r),
    "attributes": lambda **r: QuantileModelSource(
        three_attributes(), aggregation="mixture", tokenizer=tiny_tokenizer(), **r
    ),
    "scalar": scalar,
    "ensemble": lambda **r: EnsembleSource([scalar(seed, **r) for seed in range(3)]),
    "gaussian": lambda **r: GaussianSource(classifier(1, 2), spread="softplus", tokenizer=tiny_tokenizer(), **r),
    "published gaussian": lambda **r: GaussianSource(published("gaussian", "none"), tokenizer=tiny_tokenizer(), **r),
    "judgment": judge,
    "mixture": lambda **r: MixtureSource([SOURCES["quantile"](**r), judge(**r)], [0.25, 0.75]),
}


def output_of(model, text):
    with torch.no_grad():
        return model(**tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False))


def texts():
    return [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


# --- What holds for every source ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(name):
    together = SOURCES[name]().distribution(PROMPTS, COMPLETIONS)
    # A jump lies in one of 400 cells, whose mean moves by 400 times the last digit of a probability.
    tolerance = 1e-3 if name in ("judgment", "mixture") else 2e-5
    assert together.batch_shape == (4,)
    assert together.values.device.type == "cpu"
    assert together.values.unique(dim=0).shape[0] == 4
    pairs = SOURCES[name](batch_size=2).distribution(PROMPTS[::-1], COMPLETIONS[::-1])
    torch.testing.assert_close(pairs.values.flip(0), together.values, atol=tolerance, rtol=0)
    source = SOURCES[name]()
    for i in range(4):
        alone = source.distribution(PROMPTS[i : i + 1], COMPLETIONS[i : i + 1])
        torch.testing.assert_close(alone.values[0], together.values[i], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_a_reward_function(name):
    source, seen = SOURCES[name](), {}
    law = source.distribution(PROMPTS, COMPLETIONS)
    assert torch.equal(law.levels, source.levels)
    assert isinstance(source.name, str)
    reward = RiskReward(source, risk="cvar:0.1", tail_threshold=0.5)
    # Three opinions know nothing below 1/6, and the reward says so.
    narrow = pytest.warns(UserWarning, match="lowest quantile is at 0.167") if name == "ensemble" else nullcontext()
    with narrow:
        rewards = reward(PROMPTS, COMPLETIONS, log_metric=seen.__setitem__)
    for i, value in enumerate(rewards):
        expected = reference_risk.lower_tail_mean(law.levels.tolist(), law.values[i].tolist(), 0.1)
        assert value == pytest.approx(expected, abs=1e-4)
    if name != "scalar":
        assert all(value < mean - 1e-4 for value, mean in zip(rewards, law.mean().tolist(), strict=True))
    assert seen["reward/truncated_share"] == 0
    assert seen["reward/tail_mass"] == pytest.approx(law.cdf(0.5).mean().item())
    assert reward.__name__ == "risk_cvar:0.1"


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_can_be_placed_and_answers_nothing_with_nothing(name):
    source = SOURCES[name]()
    source.prepare(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None), device=torch.device("cpu")))
    assert source.distribution([], []).values.shape == (0, len(source.levels))
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        source.distribution(["a"], ["b", "c"])


def test_messages_go_through_the_models_own_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"
    source = ScalarSource(classifier(), tokenizer=tokenizer)
    law = source.distribution(
        [[{"role": "user", "content": "the film"}]], [[{"role": "assistant", "content": "is bad"}]]
    )
    expected = output_of(classifier(), "the film <eos> is bad <eos>").logits.item()
    assert law.values.item() == pytest.approx(expected, abs=1e-5)


# --- Models with quantiles ------------------------------------------------------------------------------------------


def test_quantile_model_gives_its_own_quantiles():
    law = SOURCES["quantile"]().distribution(PROMPTS, COMPLETIONS)
    for text, values in zip(texts(), law.values, strict=True):
        torch.testing.assert_close(values, output_of(qrm(), text).quantiles[0], atol=1e-5, rtol=0)
    assert law.levels.tolist() == pytest.approx([0.05, 0.1, 0.3, 0.5, 0.8])


@pytest.mark.parametrize("model", [three_attributes, lambda: published("quantile")])
def test_mixture_of_attributes_equals_the_slow_mixture_and_keeps_the_mean(model):
    source = QuantileModelSource(model(), aggregation="mixture", num_levels=25, tokenizer=tiny_tokenizer())
    average = QuantileModelSource(model(), tokenizer=tiny_tokenizer()).distribution(PROMPTS, COMPLETIONS)
    law, levels = source.distribution(PROMPTS, COMPLETIONS), model().levels.tolist()
    assert law.mean().tolist() == pytest.approx(average.mean().tolist(), abs=1e-5)
    for i in (1, 3):
        output = output_of(model(), texts()[i])
        weights = output.attribute_weights[0].double().tolist()
        laws = [(levels, values.tolist()) for values in output.attribute_quantiles[0]]
        for cell in range(25):
            ends = (max(cell / 25, 1e-12), (cell + 1) / 25)
            expected = reference_mixtures.mixture_cell_mean(laws, weights, *ends)
            assert law.values[i, cell].item() == pytest.approx(expected, abs=1e-4)
    dense = QuantileModelSource(model(), aggregation="mixture", tokenizer=tiny_tokenizer())
    deeper = dense.distribution(PROMPTS, COMPLETIONS).lower_tail_mean(0.1)
    # Never above, and below where the gate does not decide for one attribute alone; the law is discretised.
    assert (deeper < average.lower_tail_mean(0.1) + 1e-3).all()
    assert (deeper < average.lower_tail_mean(0.1) - 0.03).any()


def test_weights_of_a_gate_that_sum_to_two_mix_twice_the_rating():
    model = copy.deepcopy(published("quantile"))
    model.attribute_mixing["logit_scale"].fill_(2.0)
    doubled = QuantileModelSource(model, aggregation="mixture", tokenizer=tiny_tokenizer())
    plain = QuantileModelSource(published("quantile"), aggregation="mixture", tokenizer=tiny_tokenizer())
    values = [source.distribution(PROMPTS, COMPLETIONS).values for source in (doubled, plain)]
    torch.testing.assert_close(values[0], 2 * values[1], atol=1e-4, rtol=0)
    model.attribute_mixing["transform"][0, 1] = -3.0
    with pytest.raises(ValueError, match="subtracts attributes, which no mixture can"):
        doubled.distribution(PROMPTS, COMPLETIONS)


def test_crossings_and_lost_beginnings_are_counted():
    source = QuantileModelSource(qrm(), tokenizer=tiny_tokenizer(), max_length=3, batch_size=3)
    source.distribution(PROMPTS, COMPLETIONS)
    cut = [" ".join(text.split()[-3:]) for text in texts()]
    rates = [output_of(qrm(), text).crossing_rate.item() for text in cut]
    assert source.telemetry["crossing_rate"] == pytest.approx(sum(rates) / 4)
    assert sum(rates) > 0
    assert source.telemetry["truncated_share"] == 0.75


# --- Scalar models, alone and together ------------------------------------------------------------------------------


def scores():
    """(4 texts, 3 models), one at a time."""
    return [[output_of(classifier(seed), text).logits.item() for seed in range(3)] for text in texts()]


def test_scalar_model_is_a_point_mass():
    law = scalar().distribution(PROMPTS, COMPLETIONS)
    assert law.values[:, 0].tolist() == pytest.approx([row[0] for row in scores()], abs=1e-5)
    assert law.variance().tolist() == [0] * 4
    for risk in ("cvar:0.1", "quantile:0.01", "entropic:2"):
        rewards = RiskReward(scalar(), risk=risk)(PROMPTS, COMPLETIONS)
        assert rewards == pytest.approx([row[0] for row in scores()], abs=1e-5)


def test_ensemble_has_the_mean_of_its_members_and_a_little_less_than_their_variance():
    source = EnsembleSource([scalar(seed) for seed in range(3)], scale=[2.0, 1.0, -0.5], offset=[0.0, 0.3, 1.0])
    law = source.distribution(PROMPTS, COMPLETIONS)
    assert law.levels.tolist() == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    for i, (a, b, c) in enumerate(scores()):
        ordered = sorted([2 * a, b + 0.3, 1 - 0.5 * c])
        mean = sum(ordered) / 3
        empirical = sum((s - mean) ** 2 for s in ordered) / 3
        gaps = (ordered[1] - ordered[0]) ** 2 + (ordered[2] - ordered[1]) ** 2
        assert law.values[i].tolist() == pytest.approx(ordered, abs=1e-5)
        assert law.mean()[i].item() == pytest.approx(mean, abs=1e-5)
        assert law.variance()[i].item() == pytest.approx(empirical - gaps / 18, abs=1e-5)
        assert law.variance()[i].item() < empirical
        # The worst sixth is the lowest member; of the worst third, half is that and half the way to the middle one.
        assert law.lower_tail_mean(1 / 6)[i].item() == pytest.approx(ordered[0], abs=1e-5)
        third = (ordered[0] + (ordered[0] * 3 + ordered[1]) / 4) / 2
        assert law.lower_tail_mean(1 / 3)[i].item() == pytest.approx(third, abs=1e-5)
    assert source.telemetry == {"crossing_rate": 0.0, "truncated_share": 0.0}
    # The order in which members are named is not one of quantiles.
    assert law.crossing_rate == 0


def test_members_of_an_ensemble_may_count_unequally():
    law = EnsembleSource([scalar(seed) for seed in range(3)], weights=[0.5, 0.125, 0.375]).distribution(
        PROMPTS, COMPLETIONS
    )
    for i, row in enumerate(scores()):
        expected = 0.5 * row[0] + 0.125 * row[1] + 0.375 * row[2]
        assert law.mean()[i].item() == pytest.approx(expected, abs=1e-5)
        # At a quarter of the mass no staircase of these steps jumps.
        at_quarter = reference_mixtures.discrete_quantile(row, [0.5, 0.125, 0.375], 0.25)
        assert law.quantile(0.25)[i].item() == pytest.approx(at_quarter, abs=1e-5)


def test_a_quantile_model_counts_in_an_ensemble_by_its_mean():
    source = ScalarSource(qrm(), tokenizer=tiny_tokenizer())
    expected = [output_of(qrm(), text).score.item() for text in texts()]
    assert source.distribution(PROMPTS, COMPLETIONS).values[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


# --- Gaussian heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "std"),
    [
        ("log_std", math.exp),
        ("log_variance", lambda raw: math.exp(raw) ** 0.5),
        ("softplus", lambda raw: math.log(1 + math.exp(raw))),
        ("std", abs),
    ],
)
def test_two_labels_are_mean_and_spread(spread, std):
    source = GaussianSource(classifier(2, labels=2), spread=spread, tokenizer=tiny_tokenizer())
    law = source.distribution(PROMPTS, COMPLETIONS)
    for i, text in enumerate(texts()):
        mean, raw = output_of(classifier(2, labels=2), text).logits[0].tolist()
        assert law.mean()[i].item() == pytest.approx(mean, abs=1e-5)
        assert law.std()[i].item() == pytest.approx(std(raw), rel=1e-3)
        # Levels in the middle are exact but for the mean over 1/400 of the mass.
        assert law.quantile(0.2)[i].item() == pytest.approx(stats.norm(mean, std(raw)).ppf(0.2), abs=1e-3)
    assert set(SPREADS) == {"log_std", "log_variance", "softplus", "std"}


def test_published_gaussian_is_the_same_law_with_whole_tails():
    whole = SOURCES["published gaussian"]().distribution(PROMPTS, COMPLETIONS)
    flat = QuantileModelSource(published("gaussian", "none"), tokenizer=tiny_tokenizer()).distribution(
        PROMPTS, COMPLETIONS
    )
    for i, text in enumerate(texts()):
        model = published("gaussian", "none")
        output = output_of(model, text)
        weights = output.attribute_weights[0]
        raw = model.quantile_head(model.encode(**tiny_tokenizer()(text, return_tensors="pt"))[0])[0].unflatten(
            -1, (3, 2)
        )
        mean = (weights * raw[:, 0]).sum().item()
        std = (weights.abs() * raw[:, 1].exp()).sum().item()
        assert whole.mean()[i].item() == pytest.approx(mean, abs=1e-4)
        assert whole.std()[i].item() == pytest.approx(std, rel=1e-3)
        assert whole.lower_tail_mean(0.1)[i].item() == pytest.approx(mean - 1.75498 * std, abs=1e-3 * std)
        assert flat.lower_tail_mean(0.1)[i].item() > mean - 1.73 * std


# --- Mixtures of sources --------------------------------------------------------------------------------------------


def test_mixture_of_sources_is_the_mixture_of_their_laws():
    parts = [SOURCES["quantile"](), judge()]
    law = MixtureSource(parts, [0.25, 0.75]).distribution(PROMPTS, COMPLETIONS)
    laws = [part.distribution(PROMPTS, COMPLETIONS) for part in parts]
    expected = 0.25 * laws[0].mean() + 0.75 * laws[1].mean()
    assert law.mean().tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    for threshold in (-1.0, 1.0, 2.5, 4.0):
        masses = 0.25 * laws[0].cdf(threshold) + 0.75 * laws[1].cdf(threshold)
        # The judge's law and the mixture are each within 1.5/400 of a mass.
        assert law.cdf(threshold).tolist() == pytest.approx(masses.tolist(), abs=3 / 400)


def test_average_of_sources_adds_ratings_of_equal_rank():
    parts = [SOURCES["quantile"](), judge()]
    source = AverageSource(parts, [0.25, 0.75])
    law, laws = source.distribution(PROMPTS, COMPLETIONS), [part.distribution(PROMPTS, COMPLETIONS) for part in parts]
    assert law.levels.equal(source.levels)
    for level in (0.1, 0.33, 0.5, 0.9):
        expected = 0.25 * laws[0].quantile(level) + 0.75 * laws[1].quantile(level)
        assert law.quantile(level).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    mixed = MixtureSource(parts, [0.25, 0.75]).distribution(PROMPTS, COMPLETIONS)
    # The same mean, but what the two disagree about is no spread.
    assert law.mean().tolist() == pytest.approx(mixed.mean().tolist(), abs=1e-5)
    assert (law.std() < mixed.std()).all()


def test_a_mixture_of_one_source_is_that_source():
    law = MixtureSource([SOURCES["quantile"]()], [1.0]).distribution(PROMPTS, COMPLETIONS)
    alone = SOURCES["quantile"]().distribution(PROMPTS, COMPLETIONS)
    assert law.values.equal(alone.values)
    assert law.levels.equal(alone.levels)


def test_telemetry_of_several_sources_is_averaged_over_those_that_know_it():
    source = MixtureSource([SOURCES["quantile"](max_length=3), scalar(), judge()], [0.5, 0.25, 0.25])
    source.distribution(PROMPTS, COMPLETIONS)
    parts = [part.telemetry for part in source.sources]
    assert source.telemetry["truncated_share"] == pytest.approx(0.75 / 3)
    assert source.telemetry["crossing_rate"] == pytest.approx(parts[0]["crossing_rate"] / 2)
    assert source.telemetry["judgment_outside_mass"] == parts[2]["judgment_outside_mass"]


# --- Specs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    models = {"qrm": qrm(), "many": three_attributes(), "a": classifier(0), "b": classifier(1)}
    models |= {"two": classifier(2, labels=2), "lm": language_model()}
    for name, model in models.items():
        model.save_pretrained(root / name)
        (judge().reader.tokenizer if name == "lm" else tiny_tokenizer()).save_pretrained(root / name)
    return root


def expected_sources():
    lm = {"max_outside_mass": 1.0}
    return {
        "{}/qrm": SOURCES["quantile"](),
        "{}/many?aggregation=mixture": SOURCES["attributes"](),
        "{}/a": scalar(0),
        "scalar:{}/b": scalar(1),
        "ensemble:{}/a,{}/b?scale=2,1&offset=0,0.5": EnsembleSource(
            [scalar(0), scalar(1)], scale=[2, 1], offset=[0, 0.5]
        ),
        "gaussian:{}/two?spread=softplus&num_levels=50": GaussianSource(
            classifier(2, 2), spread="softplus", num_levels=50, tokenizer=tiny_tokenizer()
        ),
        "judgment:{}/lm?scores=1,3,5&max_outside_mass=1": judge(scores={"1": 1, "3": 3, "5": 5}, **lm),
        "judgment:{}/lm?scores=bad:-1,good:1&max_outside_mass=1": judge(scores={"bad": -1, "good": 1}, **lm),
        "average:0.75*{}/many?aggregation=mixture+.25*{}/qrm": AverageSource(
            [SOURCES["attributes"](), SOURCES["quantile"]()], [0.75, 0.25]
        ),
        "mixture:0.75*{}/qrm+.25*ensemble:{}/a,{}/b": MixtureSource(
            [SOURCES["quantile"](), EnsembleSource([scalar(0), scalar(1)])], [0.75, 0.25]
        ),
    }


def test_specs_name_the_sources_they_say(folders):
    for spec, expected in expected_sources().items():
        source = parse_source(spec.replace("{}", str(folders)))
        laws = [s.distribution(PROMPTS, COMPLETIONS) for s in (source, expected)]
        assert type(source) is type(expected)
        torch.testing.assert_close(laws[0].values, laws[1].values, atol=1e-5, rtol=0)
        assert laws[0].levels.equal(laws[1].levels)


def test_the_reward_function_takes_specs(folders):
    reward = RiskReward(f"ensemble:{folders}/a,{folders}/b", risk="cvar:0.3")
    expected = RiskReward(EnsembleSource([scalar(0), scalar(1)]), risk="cvar:0.3")(PROMPTS, COMPLETIONS)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(AttributeError, match="ensemble of 2 has several models"):
        assert reward.tokenizer
    assert RiskReward(f"scalar:{folders}/a", risk="cvar:0.1")(PROMPTS, COMPLETIONS)[0] == pytest.approx(
        scores()[0][0], abs=1e-5
    )
    with pytest.raises(ValueError, match="needs a quantile reward model"):
        RiskReward(f"{folders}/a", risk="cvar:0.1")
    with pytest.raises(ValueError, match="give tokenizer and max_length to the source"):
        RiskReward(scalar(), tokenizer=tiny_tokenizer())


def test_every_example_of_a_spec_is_read(folders, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setattr("reward.source_specs._check_path", lambda path, text: None)
    kinds = [read_source_spec(example).kind for example in EXAMPLES]
    assert set(kinds) == {"model", "scalar", "ensemble", "gaussian", "judgment", "mixture", "average"}
    for example, weights in zip(EXAMPLES[-2:], ([0.7, 0.3], [0.5, 0.5]), strict=True):
        spec = read_source_spec(example)
        assert spec.all_paths() == ["path-a", "path-b"]
        assert [weight for weight, _ in spec.terms] == weights


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (" ", "non-empty"),
        ("ensmble:{}/a,{}/b", r"unknown kind of reward model 'ensmble'.*by example:.*mixture:0\.7"),
        ("ensemble:{}/a,", "leaves a path empty"),
        ("ensemble:", "leaves a path empty"),
        ("ensemble:{}/a,{}/none", "none does not exist"),
        ("{}/none", "does not exist.*by example"),
        ("{}", r"config\.json is missing"),
        (
            "{}/qrm?agregation=mixture",
            "unknown option 'agregation=mixture'.*options of model: aggregation, num_levels",
        ),
        ("scalar:{}/a?scale=2", "options of scalar: none"),
        ("ensemble:{}/a,{}/b?scale=2,x", "cannot read 'scale=2,x'"),
        ("judgment:{}/lm?scores=good,bad", "cannot read 'scores=good,bad'"),
        ("mixture:{}/a+{}/b", "needs a weight before each part"),
        ("mixture:0.7*{}/a+0.2*{}/b", "sum to 0.9"),
        ("mixture:1*{}/a+0*{}/b", "above zero"),
        ("mixture:0.5*{}/a+0.5*mixture:1*{}/b", "mixture within another"),
    ],
)
def test_bad_specs_are_refused_with_advice(folders, spec, message):
    with pytest.raises(SourceSpecError, match=message):
        parse_source(spec.replace("{}", str(folders)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda f: parse_source(f"{f}/qrm?aggregation=sum"),
            "aggregation is 'quantile_average' or 'mixture', got 'sum'",
        ),
        (lambda f: parse_source(f"{f}/qrm?aggregation=mixture"), "one attribute: there is nothing to mix"),
        (lambda f: parse_source(f"{f}/a?aggregation=mixture"), "of type 'llama', which predicts one number"),
        (lambda f: parse_source(f"scalar:{f}/two"), "has 2 labels; a scalar reward model has one"),
        (lambda f: parse_source(f"gaussian:{f}/a?spread=std"), "has 1 labels; a Gaussian head has two"),
        (lambda f: parse_source(f"gaussian:{f}/two"), "say what the second output of .* is: spread is one of log_std"),
        (lambda f: parse_source(f"gaussian:{f}/two?spread=iqr"), "spread is one of .*, got 'iqr'"),
        (lambda f: parse_source(f"gaussian:{f}/qrm"), "predicts quantiles, not mean and spread"),
        (lambda f: GaussianSource(published("gaussian", "none"), spread="std", tokenizer=tiny_tokenizer()), "A? ?URM"),
        (lambda f: parse_source(f"judgment:{f}/a"), "is a reward model, not a language model"),
        (lambda f: parse_source(f"judgment:{f}/qrm"), "is a reward model, not a language model"),
        (lambda f: parse_source(f"ensemble:{f}/a,{f}/b?scale=1"), "scale has 1 entries for 2 members"),
        (lambda f: parse_source(f"ensemble:{f}/a,{f}/b?scale=1,0"), "a scale of 0 silences its member"),
        (lambda f: parse_source(f"ensemble:{f}/a,{f}/b?offset=nan,0"), "offset must be finite"),
        (lambda f: parse_source(f"ensemble:{f}/a,{f}/b?weights=0.5,0.4"), "sum to one, got 0.9"),
        (lambda f: parse_source(f"ensemble:{f}/a,{f}/b", tokenizer=tiny_tokenizer()), "leave tokenizer out"),
        (lambda f: EnsembleSource([]), "at least one member"),
        (lambda f: MixtureSource([], []), "at least one source"),
        (lambda f: MixtureSource([scalar(), scalar(1)], [0.5, 0.6]), "sum to one, got 1.1"),
        (lambda f: MixtureSource([scalar(), scalar(1)], [1.5, -0.5]), "not negative"),
    ],
)
def test_what_a_model_is_not_is_refused(folders, build, message):
    with pytest.raises(ValueError, match=message):
        build(folders)
