"""Published layouts, rebuilt small with random weights: the numbers, the places read, the errors, the round trip."""

import copy
import json
import math

import pytest
import reference_released as reference
import torch
from safetensors.torch import save_file
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from reward.configuration import QRMConfig
from reward.modeling import QRMForSequenceClassification
from reward.output import QRMOutput
from reward.released import is_released, load_released
from reward.released_layouts import read_layout
from reward.released_model import ReleasedConfig, ReleasedRewardModel, gate_columns
from rlhf.reward_function import RiskReward
from rlhf.risk import parse_risk

HIDDEN, GATE = 24, 13
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.4,
}
# The vocabulary of the published models, because their markers lie at its end.
LLAMA = SHAPE | {
    "vocab_size": 128257,
    "pad_token_id": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = SHAPE | {"vocab_size": 2600, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "sliding_window": 8}
REMOTE_CODE = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
GATING = {"gating_hidden_dim": GATE, "gating_n_hidden": 3, "gating_newtork": True, "loss": "quantile_regression"}


def llama_config(**custom):
    return LlamaConfig(**LLAMA, rope_theta=5e5).to_dict() | {"auto_map": REMOTE_CODE} | custom


# Name -> config.json, module indices of the gate as (linear without the last, norms, last), attributes, values.
LAYOUTS = {
    "llama3": (
        llama_config(architectures=["LlamaForRewardModelWithGating"], num_objectives=19, num_quantiles=19, **GATING),
        ((0, 3, 6), (2, 5, 8), 9),
        (19, 19),
    ),
    "llama3.1": (
        llama_config(
            architectures=["LlamaForRewardModelWithGating"],
            num_objectives=19,
            num_quantiles=19,
            gating_temperature=5.0,
            attn_implementation="flash_attention_2",
            use_cache=False,
            rope_scaling=LLAMA31_ROPE,
            **GATING,
        ),
        ((0, 3, 6), (2, 5, 8), 9),
        (19, 19),
    ),
    "llama3.1-v2": (
        llama_config(
            architectures=["LlamaForRewardModelWithGating"],
            num_objectives=5,
            num_quantiles=19,
            gating_temperature=3.0,
            **GATING,
        ),
        ((0, 3, 6), (2, 5, 8), 9),
        (5, 19),
    ),
    "gemma2": (
        Gemma2Config(**GEMMA).to_dict()
        | {"architectures": ["Gemma2ForQuantileSequenceClassification"], "auto_map": REMOTE_CODE}
        | {"num_objectives": 5, "num_quantiles": 19, "gating_temperature": 1.0, **GATING},
        ((0, 4, 8), (2, 6, 10), 11),
        (5, 19),
    ),
    "armorm": (
        llama_config(
            architectures=["LlamaForRewardModelWithGating"],
            num_objectives=19,
            gating_temperature=10,
            gating_hidden_dim=GATE,
            gating_n_hidden=3,
        ),
        ((0, 1, 2), (), 3),
        (19, 1),
    ),
}
GATES = {"gemma2": reference.gemma_gate, "armorm": reference.armorm_gate}
TEMPERATURES = {"llama3": 10.0, "llama3.1": 5.0, "llama3.1-v2": 3.0, "gemma2": 1.0, "armorm": 10.0}
each_layout = pytest.mark.parametrize("name", LAYOUTS)


def trunk_tensors(config):
    torch.manual_seed(3)
    model_type = config["model_type"]
    known = AutoConfig.for_model(model_type, **{k: v for k, v in config.items() if k != "model_type"})
    known._attn_implementation = "eager"
    return {f"model.{name}": tensor for name, tensor in AutoModel.from_config(known).state_dict().items()}


def debias(num_attributes, verbosity=4):
    """Identity with a penalty on verbosity: its own entry vanishes, and it lowers every other attribute."""
    transform = torch.eye(num_attributes)
    transform[verbosity] -= torch.linspace(0.2, 0.9, num_attributes)
    transform[verbosity, verbosity] = 0.0
    return transform


def head_tensors(name):
    _, (linears, norms, last), (attributes, values) = LAYOUTS[name]
    generator = torch.Generator().manual_seed(5)

    def normal(*shape, std=1.0):
        return std * torch.randn(*shape, generator=generator)

    offsets = torch.linspace(-0.5, 0.5, values).repeat(attributes)
    heads = {"regression_layer.weight": normal(attributes * values, HIDDEN, std=0.3) + 0.1 * offsets.unsqueeze(-1)}
    heads["gating.logit_scale"] = torch.tensor([1.7])
    width = HIDDEN
    for index in linears:
        heads[f"gating.layers.{index}.weight"] = normal(GATE, width, std=0.6)
        if name == "armorm":
            heads[f"gating.layers.{index}.bias"] = normal(GATE)
        width = GATE
    for index in norms:
        heads |= {f"gating.layers.{index}.{part}": normal(GATE) for part in ("weight", "bias", "running_mean")}
        heads[f"gating.layers.{index}.running_var"] = 0.3 + torch.rand(GATE, generator=generator)
        heads[f"gating.layers.{index}.num_batches_tracked"] = torch.tensor(7)
    heads[f"gating.layers.{last}.weight"] = normal(attributes, width, std=2.0)
    heads[f"gating.layers.{last}.bias"] = normal(attributes)
    if attributes == 19:
        heads["reward_transform_matrix"] = debias(attributes)
    return heads


def write(folder, config, tensors, *, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_custom.py").write_text("raise RuntimeError('code of the checkpoint was run')")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {key: tensors[key] for key in tensors if files[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a checkpoint by layout, its trunk in float32; written when first asked for."""
    written = {}

    def get(name):
        if name not in written:
            config, _, _ = LAYOUTS[name]
            tensors = trunk_tensors(config) | head_tensors(name)
            # Heads lie in several files of the last two, as they do in the published shards.
            shards = {"gemma2": 3, "armorm": 2}.get(name, 1)
            written[name] = write(tmp_path_factory.mktemp(name), config, tensors, shards=shards)
        return written[name]

    return get


@pytest.fixture(scope="module")
def models(folders):
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = QRMForSequenceClassification.from_released(folders(name), dtype=torch.float32)
        return loaded[name]

    return get


def marker_of(name):
    return reference.GEMMA2_MARKER if name == "gemma2" else reference.LLAMA3_MARKER


def chats(name, *sizes, seed=0, turns=1):
    """Rows of ids in a template: [bos] question marker answer eot, with `turns` rounds of it."""
    generator = torch.Generator().manual_seed(seed)
    config, _, _ = LAYOUTS[name]
    marker = marker_of(name)
    rows = []
    for question, answer in sizes:
        row = [config["bos_token_id"]]
        for _ in range(turns):
            row += torch.randint(300, 2000, (question,), generator=generator).tolist() + marker
            row += torch.randint(300, 2000, (answer,), generator=generator).tolist() + marker[:1]
        rows.append(row)
    return rows


def pad(rows, side="right", extra=0, filler=0):
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, columns], mask[index, columns] = torch.tensor(row), 1
    return ids, mask


@torch.no_grad()
def states_of(model, row):
    """(T, H) states of one row without padding, in the trunk's precision."""
    return model.backbone(input_ids=torch.tensor([row])).last_hidden_state[0].double().tolist()


def expected(name, states, row, *, transform="published"):
    """What the reference says about one row: gate, coefficients, values of the attributes, score."""
    tensors = {key: value.double().tolist() for key, value in head_tensors(name).items()}
    matrix = tensors.get("reward_transform_matrix") if transform == "published" else None
    gate_state = states[reference.gate_index(row, marker_of(name))]
    gate = GATES.get(name, reference.llama_gate)(tensors, gate_state, TEMPERATURES[name])
    values = reference.attribute_values(tensors, states[-1], len(gate))
    score = reference.published_score(values, gate, matrix)
    return gate, reference.coefficients(gate, matrix), values, score


def close(actual, wanted, **tolerance):
    return torch.allclose(actual.double(), torch.tensor(wanted, dtype=torch.float64), **tolerance)


SIZES = [(4, 7), (9, 3), (2, 5)]


# The numbers


@each_layout
@torch.no_grad()
def test_forward_equals_the_slow_reference(name, models):
    model = models(name)
    rows = chats(name, *SIZES, turns=2)
    out = model(*pad(rows))
    assert isinstance(out, QRMOutput)
    double = copy.deepcopy(model.backbone).double()
    for index, row in enumerate(rows):
        states = double(input_ids=torch.tensor([row])).last_hidden_state[0].tolist()
        gate, weights, values, score = expected(name, states, row)
        assert max(gate) / min(gate) > 1.5  # a gate that says nothing would hide errors in it
        assert close(out.score[index], score, rtol=1e-4, atol=1e-4)
        assert close(out.attribute_weights[index], weights, rtol=1e-4, atol=1e-5)
        assert close(out.attribute_quantiles[index], [sorted(row) for row in values], rtol=1e-4, atol=1e-4)
        assert close(out.quantiles[index], reference.repaired_quantiles(values, weights), rtol=1e-4, atol=1e-4)
    gates = model.gate(model.encode(*pad(rows))[1])
    assert close(gates[-1], gate, rtol=1e-4, atol=1e-5)


@each_layout
@torch.no_grad()
def test_shapes_levels_and_names(name, models):
    _, _, (attributes, values) = LAYOUTS[name]
    model = models(name)
    out = model(*pad(chats(name, *SIZES)))
    assert out.loss is None
    assert out.score.shape == (3,)
    assert torch.equal(out.logits, out.score.unsqueeze(-1))
    assert out.quantiles.shape == (3, values)
    assert out.attribute_quantiles.shape == (3, attributes, values)
    assert out.attribute_weights.shape == (3, attributes)
    assert all(part.dtype == torch.float32 for part in out.to_tuple())
    assert model.distribution(out).batch_shape == (3,)
    assert model.attribute_distribution(out).batch_shape == (3, attributes)
    wanted = [0.5] if name == "armorm" else [step / 20 for step in range(1, 20)]
    assert close(model.levels, wanted, atol=1e-7)
    names = model.config.attribute_names
    assert len(set(names)) == attributes
    assert names[4] == ("verbosity" if attributes == 5 else "helpsteer-verbosity")
    assert len(model(*pad(chats(name, *SIZES)), return_dict=False)) == 6


@each_layout
@torch.no_grad()
def test_quantiles_have_the_scale_of_the_score(name, models):
    model = models(name)
    rows = chats(name, *SIZES)
    out = model(*pad(rows))
    assert torch.allclose(out.quantiles.mean(dim=-1), out.score, rtol=0, atol=1e-5)
    assert bool((out.quantiles.diff(dim=-1) >= 0).all())
    # The integral of the law weighs its ends, which the flat tails extend, more than the plain mean does.
    law = model.distribution(out)
    middle = (out.quantiles[:, 0] + out.quantiles[:, -1]) / 2
    count = out.quantiles.shape[-1]
    assert torch.allclose(law.mean() - out.score, (middle - out.score) / (count + 1), rtol=0, atol=1e-5)
    if name in ("llama3.1-v2", "gemma2"):
        # Their own code averages over attributes where it should sum, and answers a fifth.
        _, weights, values, score = expected(name, states_of(model, rows[0]), rows[0])
        published = [q / len(weights) for q in reference.summed_quantiles(values, weights)]
        assert math.isclose(5 * sum(published) / len(published), score, rel_tol=1e-9)


@torch.no_grad()
def test_negative_coefficients_take_the_opposite_level(models):
    model = models("llama3.1")
    rows = chats("llama3.1", *SIZES)
    _, weights, values, score = expected("llama3.1", states_of(model, rows[0]), rows[0])
    assert min(weights) < -0.3
    # Sorted attributes and still a sum that falls: level t of a law that enters negatively is not level t.
    naive = reference.summed_quantiles([sorted(row) for row in values], weights)
    flipped = reference.repaired_quantiles(values, weights)
    width = naive[-1] - naive[0]
    assert flipped[-1] - flipped[0] > width + 0.1
    assert math.isclose(sum(naive), sum(flipped), rel_tol=1e-9)
    assert math.isclose(sum(flipped) / len(flipped), score, rel_tol=1e-9)


def by_hand(**settings):
    """Two attributes and three levels on a trunk that is never run; heads that ignore their input."""
    config = ReleasedConfig(
        backbone_config=LlamaConfig(**SHAPE, vocab_size=5),
        quantile_levels=[0.25, 0.5, 0.75],
        attribute_names=["good", "long"],
        gate_marker=[3],
        **settings,
    )
    return ReleasedRewardModel(config).eval()


@torch.no_grad()
def test_aggregation_by_hand():
    model = by_hand(gate_temperature=2.0)
    model.quantile_head.weight.zero_()
    # The second attribute crosses: sorted it is 0, 2, 8.
    model.quantile_head.bias.copy_(torch.tensor([1.0, 2.0, 6.0, 0.0, 8.0, 2.0]))
    model.attribute_gate[0].weight.zero_()
    # exp(2 log 3 / 2) = 3, so the softmax is 3/4 and 1/4; times 4: gate 3 and 1.
    model.attribute_gate[0].bias.copy_(torch.tensor([2 * math.log(3), 0.0]))
    model.attribute_mixing.logit_scale.fill_(4.0)
    model.attribute_mixing.transform.copy_(torch.tensor([[1.0, 0.0], [-0.5, 0.0]]))
    out = model.predict(torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN))
    # T g = (3, -1.5)
    assert close(out.attribute_weights, [[3.0, -1.5]], atol=1e-6)
    # 3·1 − 1.5·8, 3·2 − 1.5·2, 3·6 − 1.5·0
    assert close(out.quantiles, [[-9.0, 3.0, 18.0]], atol=1e-5)
    assert close(out.score, [4.0], atol=1e-5)
    assert close(out.crossing_rate, 0.25)


@torch.no_grad()
def test_a_missing_transform_is_the_identity(folders, tmp_path):
    folder = folders("llama3.1")
    row = chats("llama3.1", (4, 7))[0]
    without = load_released(folder, dtype=torch.float32, use_transform=False)
    _, weights, _, score = expected("llama3.1", states_of(without, row), row, transform=None)
    out = without(torch.tensor([row]))
    assert close(out.score[0], score, rtol=1e-5, atol=1e-5)
    assert close(out.attribute_weights[0], weights, rtol=1e-5, atol=1e-6)
    config, _, _ = LAYOUTS["llama3.1"]
    heads = {key: value for key, value in head_tensors("llama3.1").items() if key != "reward_transform_matrix"}
    stripped = load_released(write(tmp_path, config, trunk_tensors(config) | heads), dtype=torch.float32)
    assert torch.equal(stripped(torch.tensor([row])).quantiles, out.quantiles)


# Where the numbers are read


@each_layout
@torch.no_grad()
def test_padding_and_batch_change_nothing(name, models):
    model = models(name)
    rows = chats(name, *SIZES)
    alone = [model(torch.tensor([row])) for row in rows]
    marker = marker_of(name)
    for side in ("right", "left"):
        # The end of a turn as padding: the first one in the text would pass for the end of the text.
        for filler in (LAYOUTS[name][0]["pad_token_id"], marker[0]):
            out = model(*pad(rows, side, extra=3, filler=filler))
            for index, single in enumerate(alone):
                for one, many in zip(single.to_tuple()[:-1], out.to_tuple()[:-1], strict=True):
                    assert torch.allclose(one[0], many[index], rtol=1e-4, atol=1e-4)
    # A marker in the padding is not part of the text.
    ids, mask = pad(rows, "right", extra=len(marker))
    ids[:, -len(marker) :] = torch.tensor(marker)
    assert torch.allclose(model(ids, mask).score, out.score, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_gate_reads_the_prompt_and_the_head_the_answer(models):
    model = models("llama3.1")
    row = chats("llama3.1", (6, 4))[0]
    base = model(torch.tensor([row]))
    other_answer, other_prompt = list(row), list(row)
    other_answer[-3] += 1
    other_prompt[3] += 1
    assert torch.equal(model(torch.tensor([other_answer])).attribute_weights, base.attribute_weights)
    assert not torch.allclose(model(torch.tensor([other_answer])).score, base.score)
    assert not torch.allclose(model(torch.tensor([other_prompt])).attribute_weights, base.attribute_weights)


@torch.no_grad()
def test_truncation_on_the_left_keeps_the_gate_while_the_marker_is_there(models):
    model = models("llama3.1")
    row = chats("llama3.1", (8, 5))[0]
    marker = reference.gate_index(row, reference.LLAMA3_MARKER)
    for cut in (1, 4, marker):
        states = states_of(model, row[cut:])
        _, _, _, score = expected("llama3.1", states, row[cut:])
        assert close(model(torch.tensor([row[cut:]])).score[0], score, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"rows \[1\] do not contain .*apply_chat_template.*truncate on the left"):
        model(*pad([row, row[marker + 1 :]]))


@torch.no_grad()
def test_a_text_without_marker_or_answer_is_refused(models):
    model = models("llama3.1")
    (row,) = chats("llama3.1", (6, 4))
    with pytest.raises(ValueError, match="without add_generation_prompt"):
        model(torch.tensor([[128000, 400, 500]]))
    # With add_generation_prompt=True after the answer, the last marker closes the answer and not the prompt.
    with pytest.raises(ValueError, match="empty answer"):
        model(torch.tensor([row + reference.LLAMA3_MARKER[1:]]))
    with pytest.raises(ValueError, match="no real token"):
        model(torch.tensor([row, row]), torch.tensor([[1] * len(row), [0] * len(row)]))
    with pytest.raises(ValueError, match="does not fit"):
        model(torch.tensor([row]), torch.ones(1, len(row) + 1))


@torch.no_grad()
def test_given_gate_positions_are_columns_of_the_input(models):
    model = models("llama3.1")
    rows = chats("llama3.1", *SIZES)
    searched = model(*pad(rows))
    ids, mask = pad(rows, "left", extra=2)
    starts = torch.tensor([reference.gate_index(ids[i].tolist(), reference.LLAMA3_MARKER) for i in range(len(rows))])
    given = model(ids, mask, gate_positions=starts)
    assert torch.allclose(given.quantiles, searched.quantiles, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids, mask, gate_positions=starts + 1).quantiles, searched.quantiles)
    for wrong in (torch.zeros(3, dtype=torch.long), starts.new_full((3,), ids.shape[1])):
        with pytest.raises(ValueError, match="columns of real tokens"):
            model(ids, mask, gate_positions=wrong)


def test_gate_columns_by_hand():
    ids = torch.tensor([[7, 8, 5, 7, 8, 9, 0], [7, 7, 8, 6, 0, 7, 8]])
    assert gate_columns(ids, torch.tensor([6, 4]), [7, 8]).tolist() == [3, 1]
    assert gate_columns(ids[:1], torch.tensor([4]), [7, 8]).tolist() == [0]
    # One marker at the end is an empty answer to a single prompt, and reads the right place.
    assert gate_columns(ids[1:], torch.tensor([3]), [7, 8]).tolist() == [1]
    with pytest.raises(ValueError, match=r"rows \[0\] end"):
        gate_columns(ids[:1], torch.tensor([5]), [7, 8])
    with pytest.raises(ValueError, match=r"rows \[0, 1\] do not"):
        gate_columns(ids, torch.tensor([6, 4]), [7] * 9)


# Precision and modes


@torch.no_grad()
def test_bfloat16_trunk_and_float32_heads(tmp_path):
    config, _, _ = LAYOUTS["llama3"]
    trunk = {key: value.bfloat16() for key, value in trunk_tensors(config).items()}
    heads = head_tensors("llama3")
    stored = {key: value.bfloat16() if value.is_floating_point() else value for key, value in heads.items()}
    model = load_released(write(tmp_path, config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}, trunk | stored))
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("backbone")} == {torch.float32}
    row = chats("llama3", (5, 6))[0]
    states = states_of(model, row)
    rounded = {key: value.double().tolist() for key, value in stored.items()}
    gate_state = states[reference.gate_index(row, reference.LLAMA3_MARKER)]
    gate = reference.llama_gate(rounded, gate_state, 10.0)
    values = reference.attribute_values(rounded, states[-1], 19)
    score = reference.published_score(values, gate, rounded["reward_transform_matrix"])
    # Equal states, so only the heads differ; in bfloat16 they would be off by a hundredth.
    for autocast in (False, True):
        features = model.encode(torch.tensor([row]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model.predict(*features)
        assert close(out.score[0], score, rtol=1e-5, atol=1e-5)
    moved = copy.deepcopy(model).to(torch.float32).to(torch.bfloat16)
    assert torch.equal(moved(torch.tensor([row])).score, model(torch.tensor([row])).score)


@torch.no_grad()
def test_training_mode_changes_nothing(models):
    model = copy.deepcopy(models("gemma2"))
    ids, mask = pad(chats("gemma2", *SIZES))
    before = model(ids, mask).score
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    assert torch.equal(model(ids, mask).score, before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_and_opened_as_our_own(name, dtype, folders, tmp_path):
    model = load_released(folders(name), dtype=dtype)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "qrm_released"
    assert "auto_map" not in json.dumps(stored)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is ReleasedRewardModel
    for (key, one), (other, two) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert (key, one.dtype) == (other, two.dtype)
        assert torch.equal(one, two)
    assert {p.dtype for p in again.backbone.parameters()} == {dtype}
    assert {p.dtype for n, p in again.named_parameters() if not n.startswith("backbone")} == {torch.float32}
    batch = pad(chats(name, *SIZES))
    # Weights mapped out of a file lie at other addresses, where matrix products may differ in the last bit.
    assert torch.equal(copy.deepcopy(again)(*batch).quantiles, copy.deepcopy(model)(*batch).quantiles)
    with pytest.raises(ValueError, match="our own format"):
        load_released(tmp_path)
    assert not is_released(again.config)


def test_heads_learn_and_fixed_numbers_stay(models):
    model = copy.deepcopy(models("llama3.1"))
    model(*pad(chats("llama3.1", *SIZES))).score.sum().backward()
    for parameter in (model.quantile_head.weight, model.attribute_gate[0].weight):
        assert bool((parameter.grad != 0).any())
    assert all(parameter.grad is None for parameter in model.attribute_mixing.parameters())


# Gaussian models


def gaussian_checkpoint(folder, *, extra=None, drop=()):
    config = llama_config(id2label={str(i): f"LABEL_{i}" for i in range(10)})
    generator = torch.Generator().manual_seed(11)
    heads = {
        "score.weight": 0.2 * torch.randn(10, HIDDEN, generator=generator),
        "weights.weight": 0.5 * torch.randn(5, HIDDEN, generator=generator),
    }
    heads = {key: value for key, value in heads.items() if key not in drop} | (extra or {})
    return write(folder, config, trunk_tensors(config) | heads), heads


@pytest.mark.parametrize("spread", ["log_std", "log_variance", "std"])
@torch.no_grad()
def test_a_gaussian_model_sums_normal_quantiles(spread, tmp_path):
    folder, heads = gaussian_checkpoint(tmp_path)
    model = load_released(folder, dtype=torch.float32, spread_parameter=spread)
    row = chats("llama3.1", (5, 6))[0]
    out = model(torch.tensor([row]))
    state = states_of(model, row)[-1]
    pairs = reference.linear(state, heads["score.weight"].double().tolist())
    weights = reference.linear(state, heads["weights.weight"].double().tolist())
    means = pairs[0::2]
    spreads = [{"log_std": math.exp(u), "log_variance": math.exp(u / 2), "std": abs(u)}[spread] for u in pairs[1::2]]
    assert min(weights) < 0 < max(weights)
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    std = sum(abs(w) * s for w, s in zip(weights, spreads, strict=True))
    assert close(out.score[0], mean, rtol=1e-4, atol=1e-4)
    assert close(model.distribution(out).mean()[0], mean, rtol=1e-4, atol=1e-4)
    assert close(out.quantiles[0], stats.norm(mean, std).ppf([k / 100 for k in range(1, 100)]).tolist(), atol=1e-4)
    assert model.config.attribute_names[0] == "helpfulness"
    # No marker is looked for: mean, spread and weights are read at the last token.
    assert model(torch.tensor([[128000, 400, 500]])).score.isfinite().all()


def test_a_gaussian_model_of_another_form_is_refused(tmp_path):
    deeper = {f"weights.{i}.weight": torch.zeros(5 if i else 8, 8 if i else HIDDEN) for i in (0, 2)}
    folder, _ = gaussian_checkpoint(tmp_path / "a", extra=deeper, drop=["weights.weight"])
    with pytest.raises(ValueError, match=r"not published: weights\.0\.weight, weights\.2\.weight"):
        load_released(folder)
    folder, _ = gaussian_checkpoint(tmp_path / "b", extra={"score.weight": torch.zeros(5, HIDDEN)})
    with pytest.raises(ValueError, match=r"score\.weight has 5 rows for 5 attributes"):
        load_released(folder)
    folder, _ = gaussian_checkpoint(tmp_path / "c", drop=["weights.weight"])
    with pytest.raises(ValueError, match=r"neither `regression_layer\.weight`"):
        load_released(folder)


# What is refused


def shapes_of(name):
    return {key: tuple(value.shape) for key, value in head_tensors(name).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gating.layers.4.gamma": (GATE,)}, r"without a place.*gating\.layers\.4\.gamma"),
        ({"lm_head.weight": (97, HIDDEN)}, r"without a place.*lm_head\.weight"),
        ({"gating.layers.5.running_var": None}, r"gating\.layers\.5 is incomplete.*running_var is missing"),
        ({"gating.layers.9.weight": None, "gating.layers.9.bias": None}, "no linear layer at its end"),
        ({"regression_layer.weight": (362, HIDDEN)}, "362 rows, which the 19 outputs"),
        ({"regression_layer.weight": (361, HIDDEN + 1)}, r"regression_layer\.weight is \(361, 25\)"),
        ({"gating.layers.3.weight": (GATE, GATE + 1)}, r"gating\.layers\.3\.weight is .* should be \(13, 13\)"),
        ({"gating.layers.2.bias": (GATE + 1,)}, r"gating\.layers\.2\.bias is"),
        ({"reward_transform_matrix": (5, 5)}, r"reward_transform_matrix is \(5, 5\) and should be \(19, 19\)"),
        ({"regression_layer.weight": None}, "neither `regression_layer.weight`"),
    ],
)
def test_tensors_that_do_not_form_a_layout_are_named(change, message):
    shapes = shapes_of("llama3.1") | change
    with pytest.raises(ValueError, match=message):
        read_layout({key: shape for key, shape in shapes.items() if shape is not None}, HIDDEN)


def test_a_batch_norm_before_the_relu_is_refused():
    shapes = {key.replace("layers.2.", "layers.1."): shape for key, shape in shapes_of("llama3.1").items()}
    with pytest.raises(ValueError, match=r"gating\.layers\.1 is a batch norm in a place"):
        read_layout(shapes, HIDDEN)


def test_the_layout_comes_from_names_not_from_indices():
    shapes = shapes_of("gemma2")
    shifted = {
        f"gating.layers.{int(key.split('.')[2]) + 10}.{key.split('.', 3)[3]}" if ".layers." in key else key: shape
        for key, shape in shapes.items()
    }
    layout = read_layout(shifted, HIDDEN)
    assert [linear for linear, _ in layout.gate] == [f"gating.layers.{i}" for i in (10, 14, 18, 21)]
    assert [norm for _, norm in layout.gate] == [f"gating.layers.{i}" for i in (12, 16, 20)] + [None]
    assert (layout.kind, layout.num_attributes, layout.num_values) == ("quantile", 5, 19)


def test_bad_checkpoints_are_refused_before_they_are_read(tmp_path):
    config, _, _ = LAYOUTS["gemma2"]
    trunk, heads = trunk_tensors(config), head_tensors("gemma2")
    lacking = {key: value for key, value in trunk.items() if key != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its gemma2 trunk, such as model\.norm\.weight"):
        load_released(write(tmp_path / "a", config, lacking | heads))
    extra = {"model.layers.0.mlp.router.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"without a place.*model\.layers\.0\.mlp\.router\.weight"):
        load_released(write(tmp_path / "b", config, trunk | heads | extra))
    with pytest.raises(ValueError, match="num_objectives 7, the tensors say 5"):
        load_released(write(tmp_path / "c", config | {"num_objectives": 7}, trunk | heads))
    folder = write(tmp_path / "d", config, trunk | heads)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        load_released(folder)
    folder = write(tmp_path / "e", {k: v for k, v in config.items() if k != "model_type"}, trunk | heads)
    with pytest.raises(ValueError, match="names no model_type"):
        load_released(folder)


def test_settings_of_the_caller(folders):
    folder = folders("gemma2")
    with pytest.raises(ValueError, match="attribute_names has 2 entries; the checkpoint has 5"):
        load_released(folder, attribute_names=["a", "b"])
    with pytest.raises(ValueError, match="quantile_levels has 3 entries; the checkpoint has 19"):
        load_released(folder, quantile_levels=[0.25, 0.5, 0.75])
    with pytest.raises(ValueError, match=r"symmetric about 0\.5"):
        load_released(folder, quantile_levels=[step / 19 - 0.03 for step in range(1, 20)])
    # At these levels the law weighs all values equally, so its mean is the published score.
    middles = [(step - 0.5) / 19 for step in range(1, 20)]
    model = load_released(
        folder, dtype=torch.float32, quantile_levels=middles, gate_temperature=2.5, trust_remote_code=True
    )
    assert model.config.gate_temperature == 2.5
    with torch.no_grad():
        out = model(*pad(chats("gemma2", *SIZES)))
    assert torch.allclose(model.distribution(out).mean(), out.score, rtol=0, atol=1e-5)


def test_a_missing_temperature_is_assumed_and_said(folders, monkeypatch):
    said = []
    logger = transformers_logging.get_logger("reward.released")
    monkeypatch.setattr(logger, "warning", said.append)
    before = transformers_logging.get_verbosity()
    assert load_released(folders("llama3")).config.gate_temperature == 10.0
    assert len(said) == 1
    assert "gating_temperature" in said[0]
    assert transformers_logging.get_verbosity() == before


def test_a_trunk_without_known_marker_asks_for_one(tmp_path):
    config, _, _ = LAYOUTS["llama3.1-v2"]
    config = config | {"model_type": "mistral", "vocab_size": 500, "pad_token_id": 0, "rope_parameters": None}
    folder = write(tmp_path, config, trunk_tensors(config) | head_tensors("llama3.1-v2"))
    with pytest.raises(ValueError, match=r"trunks of type mistral: pass gate_marker="):
        load_released(folder)
    assert load_released(folder, gate_marker=[7, 9]).config.gate_marker == [7, 9]
    (folder / "config.json").write_text(json.dumps(config | {"gating_token_pattern": [8]}))
    assert load_released(folder).config.gate_marker == [8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "histogram"}, "kind is one of"),
        ({"gate_activation": "sigmoid"}, "gate_activation is one of"),
        ({"gate_position": "first"}, "gate_position is one of"),
        ({"spread_parameter": "iqr"}, "spread_parameter is one of"),
        ({"gate_temperature": 0.0}, "gate_temperature must be positive"),
        ({"kind": "point"}, "one level 0.5"),
    ],
)
def test_configs_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        by_hand(**settings)
    with pytest.raises(ValueError, match="load_released"):
        ReleasedRewardModel(ReleasedConfig())


def test_released_folders_are_told_from_others(folders, tmp_path):
    for name, (config, _, _) in LAYOUTS.items():
        assert is_released(config)
        # Under another class name, the keys remain.
        assert is_released(config | {"architectures": ["MyRewardModel"]})
        assert is_released(AutoConfig.from_pretrained(folders(name)))
    folder, _ = gaussian_checkpoint(tmp_path)
    assert is_released(AutoConfig.from_pretrained(folder))
    assert not is_released(LlamaConfig(**SHAPE))
    assert not is_released(LlamaConfig(**SHAPE, num_labels=10))
    assert not is_released(QRMConfig(backbone_config=LlamaConfig(**SHAPE)))


@pytest.mark.parametrize("name", ["llama3.1-v2", "armorm"])
def test_a_published_folder_is_a_reward_function(name, folders, models):
    config, _, _ = LAYOUTS[name]
    # "t1" as a special token would be found inside "t128009".
    words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    rows = chats(name, (5, 4), (3, 9), (8, 2))
    texts = [" ".join(f"t{i}" for i in row) for row in rows]
    risk = "cvar:0.1" if name != "armorm" else "mean"
    reward = RiskReward(str(folders(name)), risk=risk, tokenizer=tokenizer, dtype=torch.float32, max_length=256)
    rewards = reward(prompts=[""] * 3, completions=texts)
    for row, value in zip(rows, rewards, strict=True):
        model = models(name)
        with torch.no_grad():
            law = model.distribution(model(input_ids=torch.tensor([row])))
        assert value == pytest.approx(parse_risk(risk)(law).item(), abs=1e-4)
    assert len({round(value, 3) for value in rewards}) == 3
