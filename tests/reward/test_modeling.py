"""The quantile reward model on tiny trunks: what it returns, what it ignores, how it is stored and trained."""

import copy
import json
import math

import pytest
import reference_risk
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    T5Config,
    Trainer,
    TrainingArguments,
)

from reward.configuration import QRMConfig
from reward.distribution import RewardDistribution
from reward.modeling import QRMForSequenceClassification

LEVELS = [0.05, 0.2, 0.5, 0.75, 0.9]
NAMES = ["helpful", "harmless", "honest"]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BACKBONES = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "bert": BertConfig(**SHAPE),
    # Learned positions that are counted from the first column, or from the first token that is not padding.
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "roberta": RobertaConfig(**SHAPE, pad_token_id=0),
}
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def make(backbone="llama", *, attributes=NAMES, seed=0, dtype=torch.float32, **settings):
    """A random model whose weights are large enough for its outputs to differ between texts."""
    torch.manual_seed(seed)
    trunk = AutoModel.from_config(BACKBONES[backbone]).to(dtype)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    settings = {"quantile_levels": LEVELS, "attribute_names": attributes} | settings
    model = QRMForSequenceClassification.from_backbone(trunk, **settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not trunk and "Float32" in type(module).__name__:
                module.weight.normal_(std=0.3)
                module.bias.normal_()
    return model


def tokens(seed, *lengths):
    """Rows of random real tokens; 0 never occurs, so that it can pad."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 97, (length,), generator=generator) for length in lengths]


def pad(rows, side="right", extra=0, filler=0):
    """(input_ids, attention_mask) with `extra` columns more than the longest row needs."""
    width = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, columns], mask[index, columns] = row, 1
    return ids, mask


@torch.no_grad()
def numbers(model, *inputs, **named):
    """Every number a text gets, (B, everything)."""
    out = model(*inputs, **named)
    parts = (out.score, out.logits, out.quantiles, out.attribute_quantiles, out.attribute_weights)
    return torch.cat([part.flatten(1) if part.dim() > 1 else part.unsqueeze(1) for part in parts], dim=1)


def load(folder, loader=AutoModelForSequenceClassification, **named):
    """The stored model, its weights copied out of the mapped file: there they lie at any address, and matrix products
    over addresses that are not multiples of 64 differ in the last bit."""
    return copy.deepcopy(loader.from_pretrained(folder, **named))


# What comes out


@each_backbone
@pytest.mark.parametrize("head_type", ["linear", "mlp"])
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_output_shapes_and_order(backbone, head_type, pooling):
    model = make(backbone, head_type=head_type, pooling=pooling)
    out = model(*pad(tokens(0, 4, 7)))
    assert out.loss is None
    assert out.score.shape == (2,)
    assert out.logits.shape == (2, 1)
    assert out.quantiles.shape == (2, 5)
    assert out.attribute_quantiles.shape == (2, 3, 5)
    assert out.attribute_weights.shape == (2, 3)
    assert out.crossing_rate.shape == ()
    assert bool((out.quantiles.diff(dim=-1) >= 0).all())
    assert bool((out.attribute_quantiles.diff(dim=-1) >= 0).all())
    assert torch.equal(out.logits[:, 0], out.score)
    assert out.score[0] != out.score[1]


def test_score_is_the_mean_of_the_distribution():
    for attributes in (["rating"], NAMES):
        model = make(attributes=attributes)
        out = model(*pad(tokens(1, 4, 7, 2)))
        law = model.distribution(out)
        assert torch.equal(law.values, out.quantiles)
        assert law.levels.tolist() == pytest.approx(LEVELS)
        assert torch.equal(law.mean(), out.score)
        for row in range(3):
            expected = reference_risk.mean(LEVELS, out.quantiles[row].tolist())
            assert out.score[row].item() == pytest.approx(expected, abs=1e-5)


def test_aggregate_is_the_weighted_sum_of_equal_levels():
    model = make()
    out = model(*pad(tokens(2, 4, 7)))
    for row in range(2):
        for level in range(5):
            expected = sum(out.attribute_weights[row, a] * out.attribute_quantiles[row, a, level] for a in range(3))
            assert out.quantiles[row, level].item() == pytest.approx(expected.item(), abs=1e-6)
    assert model.attribute_distribution(out).batch_shape == (2, 3)


def test_gate_weights_are_a_softmax_that_follows_the_text_and_the_temperature():
    inputs = pad(tokens(3, 4, 7))
    out = make()(*inputs)
    assert bool((out.attribute_weights >= 0).all())
    assert torch.allclose(out.attribute_weights.sum(-1), torch.ones(2))
    assert not torch.allclose(out.attribute_weights[0], out.attribute_weights[1], atol=1e-3)
    cold, hot = make(gate_temperature=0.1)(*inputs), make(gate_temperature=1e6)(*inputs)
    assert cold.attribute_weights.max() > out.attribute_weights.max()
    assert torch.allclose(hot.attribute_weights, torch.full((2, 3), 1 / 3), atol=1e-4)
    assert torch.equal(cold.attribute_quantiles, out.attribute_quantiles)


def test_one_attribute_has_no_gate():
    model = make(attributes=["rating"])
    out = model(*pad(tokens(3, 4, 7)))
    assert model.attribute_gate is None
    assert torch.equal(out.attribute_weights, torch.ones(2, 1))
    assert torch.equal(out.quantiles, out.attribute_quantiles[:, 0])


def test_crossing_rate_counts_what_the_head_got_wrong():
    model = make(attributes=["rating"])
    model.reset_to_constant(torch.tensor([1.0, 3.0, 2.0, 4.0, 0.0]))  # pairs: right, wrong, right, wrong
    out = model(*pad(tokens(3, 4, 7)))
    assert out.crossing_rate.item() == pytest.approx(0.5)
    assert out.quantiles.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_reset_to_constant_forgets_the_text(head_type):
    model = make(head_type=head_type)
    wanted = torch.arange(15.0).reshape(3, 5)
    model.reset_to_constant(wanted)
    out = model(*pad(tokens(3, 4, 7)))
    assert torch.equal(out.attribute_quantiles, wanted.expand(2, 3, 5))


def test_increments_cannot_cross_and_start_from_the_constant():
    model = make(non_crossing="increments")
    wanted = torch.arange(15.0).reshape(3, 5)
    model.reset_to_constant(wanted)
    out = model(*pad(tokens(3, 4, 7)))
    assert torch.allclose(out.attribute_quantiles, wanted.expand(2, 3, 5), atol=1e-4)
    model.quantile_head.weight.data.normal_(std=10)
    crossed = make()
    crossed.quantile_head.load_state_dict(model.quantile_head.state_dict())
    assert crossed(*pad(tokens(3, 4, 7))).crossing_rate > 0  # the control: the same numbers as plain quantiles
    assert model(*pad(tokens(3, 4, 7))).crossing_rate == 0


def test_tuple_output():
    model = make()
    inputs = pad(tokens(3, 4, 7))
    assert torch.equal(model(*inputs, return_dict=False)[1], model(*inputs).score)


# What must not matter


@each_backbone
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_a_row_does_not_depend_on_its_batch_or_its_padding(backbone, pooling):
    model = make(backbone, pooling=pooling, head_layers=[-1, 1])
    row, *others = tokens(4, 5, 9, 1, 3)
    alone = numbers(model, row.unsqueeze(0))
    for side in ("right", "left"):
        for rows, extra, filler in (([row], 0, 0), ([row], 6, 0), ([row, *others], 0, 0), ([row, *others], 3, 41)):
            ids, mask = pad(rows, side, extra, filler)
            assert torch.allclose(numbers(model, ids, mask)[:1], alone, atol=1e-5)
    swapped = pad([*others, row], "left")
    assert torch.allclose(numbers(model, *swapped)[-1:], alone, atol=1e-5)
    assert not torch.allclose(numbers(model, *pad(others))[:1], alone, atol=1e-2)


def test_the_mask_decides_what_is_padding_not_the_pad_token():
    # The text really contains token 0 at its end. Guessing from ids would drop it.
    model = make()
    model.config.pad_token_id = 0
    row = torch.tensor([[5, 6, 0]])
    whole = numbers(model, row, torch.ones_like(row))
    assert torch.equal(whole, numbers(model, row))
    assert not torch.allclose(whole, numbers(model, row, torch.tensor([[1, 1, 0]])), atol=1e-2)
    assert not torch.allclose(whole, numbers(model, torch.tensor([[5, 6]])), atol=1e-2)


def test_padding_in_the_middle_is_skipped():
    model = make()
    ids, mask = torch.tensor([[5, 99 % 97, 6, 7]]), torch.tensor([[1, 0, 1, 1]])
    assert torch.allclose(numbers(model, ids, mask), numbers(model, torch.tensor([[5, 6, 7]])), atol=1e-5)


def test_the_pooled_token_is_the_last_real_one():
    model = make(attributes=["rating"])
    head, ids = model.quantile_head, torch.tensor([[5, 6, 7, 0, 0]])
    with torch.no_grad():
        states = model.backbone(input_ids=ids[:, :3]).last_hidden_state
        out = model(ids, torch.tensor([[1, 1, 1, 0, 0]]))
        assert torch.allclose(head(states[:, 2]).sort(-1).values, out.quantiles, atol=1e-5)
        model.config.pooling = "mean"
        out = model(ids, torch.tensor([[1, 1, 1, 0, 0]]))
        assert torch.allclose(head(states.mean(1)).sort(-1).values, out.quantiles, atol=1e-5)


def test_head_layers_are_concatenated_in_order():
    model = make(attributes=["rating"], head_layers=[-1, 0, 2])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = model.backbone(input_ids=ids, output_hidden_states=True)
        wanted = [states.last_hidden_state, states.hidden_states[0], states.hidden_states[2]]
        features, _ = model.encode(ids)
    assert torch.allclose(features, torch.cat([state[:, -1] for state in wanted], dim=-1), atol=1e-6)


@each_backbone
def test_token_types_and_embeddings_move_with_the_tokens(backbone):
    model = make(backbone)
    row, other = tokens(5, 4, 6)
    embed = model.get_input_embeddings()
    for side in ("left", "right"):
        ids, mask = pad([row, other], side)
        alone = numbers(model, row.unsqueeze(0))
        assert torch.allclose(numbers(model, inputs_embeds=embed(ids), attention_mask=mask)[:1], alone, atol=1e-5)
    if backbone == "bert":
        kinds = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 1])]
        alone = numbers(model, row.unsqueeze(0), token_type_ids=kinds[0].unsqueeze(0))
        ids, mask = pad([row, other], "left")
        assert torch.allclose(numbers(model, ids, mask, token_type_ids=pad(kinds, "left")[0])[:1], alone, atol=1e-5)
        assert not torch.allclose(alone, numbers(model, row.unsqueeze(0)), atol=1e-2)


def test_gate_reads_the_token_it_is_told_under_either_padding():
    # A causal trunk: with the gate on the end of the prompt, weights do not change with the completion.
    model = make()
    prompt, first, second = tokens(6, 3, 4, 2)
    rows = [torch.cat([prompt, first]), torch.cat([prompt, second])]
    at_prompt_end = torch.tensor([2, 2])
    right, mask = pad(rows, "right", extra=2)
    out = model(right, mask, gate_positions=at_prompt_end)
    assert torch.allclose(out.attribute_weights[0], out.attribute_weights[1], atol=1e-6)
    assert not torch.allclose(out.attribute_quantiles[0], out.attribute_quantiles[1], atol=1e-2)
    left, left_mask = pad(rows, "left", extra=2)
    shifted = at_prompt_end + (left_mask == 0).sum(-1)
    assert torch.allclose(
        numbers(model, left, left_mask, gate_positions=shifted),
        numbers(model, right, mask, gate_positions=at_prompt_end),
        atol=1e-5,
    )
    pooled = model(right, mask)
    assert not torch.allclose(pooled.attribute_weights[0], pooled.attribute_weights[1], atol=1e-3)
    assert torch.allclose(pooled.attribute_quantiles, out.attribute_quantiles)


# Precision


def test_heads_compute_in_float32_on_a_bfloat16_trunk():
    model, half = make(), make(dtype=torch.bfloat16)
    assert half.backbone.dtype == torch.bfloat16
    assert half.quantile_head.weight.dtype == torch.float32
    inputs = pad(tokens(7, 4, 8))
    exact, rounded = model(*inputs), half(*inputs)
    assert rounded.quantiles.dtype == rounded.score.dtype == rounded.attribute_weights.dtype == torch.float32
    assert torch.allclose(exact.quantiles, rounded.quantiles, atol=0.3)  # bfloat16 states, weights around 0.3
    # In bfloat16 a value near 100 moves in steps of a half: neighbours 0.01 apart would be one.
    half.reset_to_constant(100 + 0.01 * torch.arange(5.0))
    assert bool((half(*inputs).quantiles.diff(dim=-1) > 0.005).all())


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_heads_stay_float32_when_moved_or_under_autocast(head_type):
    model = make(head_type=head_type)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "backbone" not in name}
    assert model.to(torch.bfloat16) is model
    assert model.backbone.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if "backbone" not in name:
            assert torch.equal(parameter, before[name]), name
    assert model.to("cpu", torch.bfloat16).quantile_head is model.quantile_head
    out = model(*pad(tokens(7, 4, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(*pad(tokens(7, 4, 8))).quantiles.dtype == torch.float32
    # A cast by another route rounds the stored weights, but the sums are still float32.
    cast = model.bfloat16()(*pad(tokens(7, 4, 8)))
    assert cast.quantiles.dtype == torch.float32
    assert torch.allclose(cast.quantiles, out.quantiles, atol=0.2)  # weights of three digits, 32 summands
    assert model.to(torch.float32).backbone.dtype == torch.float32


# Storage


@each_backbone
def test_saved_and_loaded_it_is_the_same_model(backbone, tmp_path):
    model = make(backbone, head_type="mlp", pooling="mean", head_layers=[-1, 1], gate_num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    inputs = pad(tokens(8, 4, 7), "left")
    for loader in (AutoModelForSequenceClassification, QRMForSequenceClassification):
        loaded = load(tmp_path, loader)
        assert type(loaded) is QRMForSequenceClassification
        assert torch.equal(numbers(loaded, *inputs), numbers(model, *inputs))
        assert loaded.state_dict().keys() == model.state_dict().keys()
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, QRMConfig)
    assert config.num_labels == 1
    for name in ("quantile_levels", "attribute_names", "pooling", "head_layers", "head_type"):
        assert getattr(config, name) == getattr(model.config, name)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).config.num_labels == 1


def test_loaded_in_bfloat16_the_heads_are_untouched(tmp_path):
    model = make(head_type="mlp")
    model.save_pretrained(tmp_path / "exact")
    half = load(tmp_path / "exact", dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        if "backbone" in name:
            assert parameter.dtype == torch.bfloat16, name
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name
    half.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half")
    inputs = pad(tokens(8, 4, 7))
    assert again.backbone.dtype == torch.bfloat16
    assert torch.equal(numbers(again, *inputs), numbers(half, *inputs))


def test_a_trunk_is_read_from_a_folder_with_its_weights(tmp_path):
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(BACKBONES["llama"])
    language_model.save_pretrained(tmp_path)
    model = QRMForSequenceClassification.from_backbone(tmp_path, quantile_levels=LEVELS)
    taken = QRMForSequenceClassification.from_backbone(language_model, quantile_levels=LEVELS)
    assert not model.training
    assert taken.backbone is language_model.model
    for name, weight in language_model.model.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name
    short = QRMForSequenceClassification.from_backbone(
        tmp_path, num_backbone_layers=2, backbone_kwargs={"dtype": torch.bfloat16}
    )
    assert short.config.backbone_config.num_hidden_layers == 2
    assert short.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_wrapping_a_live_trunk_changes_neither_its_weights_nor_its_attention(kernel):
    torch.manual_seed(0)
    trunk = AutoModel.from_config(BACKBONES["llama"], attn_implementation=kernel).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = trunk(input_ids=ids).last_hidden_state
        QRMConfig(backbone_config=trunk.config)
        assert trunk.config._attn_implementation == kernel
        model = QRMForSequenceClassification.from_backbone(trunk)
        assert torch.equal(model.backbone(input_ids=ids).last_hidden_state, before)
    assert trunk.config._attn_implementation == model.config._attn_implementation == kernel


def test_heads_are_made_where_the_trunk_is():
    trunk = AutoModel.from_config(BACKBONES["llama"]).to("meta")
    model = QRMForSequenceClassification.from_backbone(trunk, attribute_names=NAMES)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("backbone", ["llama", "bert", "gpt2"])
def test_a_shorter_trunk_is_the_beginning_of_the_longer_one(backbone, tmp_path):
    whole = make(backbone, attributes=["rating"], head_layers=[2])
    short = QRMForSequenceClassification.from_backbone(whole.backbone, num_backbone_layers=2, quantile_levels=LEVELS)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        deep = whole.backbone(input_ids=ids, output_hidden_states=True).hidden_states[2]
        last = short.backbone(input_ids=ids).last_hidden_state
        # Decoders put a norm behind their last layer, wherever that is.
        norm = {"llama": "norm", "gpt2": "ln_f"}.get(backbone)
        assert torch.allclose(last, getattr(whole.backbone, norm)(deep) if norm else deep, atol=1e-6)
    short.save_pretrained(tmp_path)
    assert torch.equal(numbers(load(tmp_path), ids), numbers(short, ids))


# Training


def test_loss_is_the_pinball_loss_of_the_ratings_that_exist():
    model = make()
    ids, mask = pad(tokens(9, 4, 7))
    labels = torch.randn(2, 3, 4)
    labels[0, 1, 2:] = math.nan
    labels[1, 2] = math.nan
    out = model(ids, mask, labels=labels)
    with torch.no_grad():
        raw = model.quantile_head(model.encode(ids, mask)[0]).reshape(2, 3, 5)
    rows = [(i, a) for i in range(2) for a in range(3) if (i, a) != (1, 2)]
    losses = [reference_risk.pinball(raw[i, a].tolist(), labels[i, a].tolist(), LEVELS) for i, a in rows]
    assert out.loss.item() == pytest.approx(sum(losses) / 5, abs=1e-6)
    assert bool((raw.diff(dim=-1) < 0).any())  # the loss sees values before they are sorted
    out.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_ratings_of_one_attribute_need_no_attribute_axis():
    model = make(attributes=["rating"])
    inputs, labels = pad(tokens(9, 4, 7)), torch.randn(2, 6)
    assert torch.equal(model(*inputs, labels=labels).loss, model(*inputs, labels=labels.unsqueeze(1)).loss)
    none = model(*inputs, labels=torch.full((2, 6), math.nan)).loss
    assert none.item() == 0.0
    none.backward()


def test_heads_alone_on_stored_features_give_the_same_output():
    model = make()
    ids, mask = pad(tokens(9, 4, 7))
    position = torch.tensor([1, 2])
    with torch.no_grad():
        stored = model.encode(ids, mask, gate_positions=position)
        whole, heads = model(ids, mask, gate_positions=position), model.predict(*stored)
    for name in ("score", "quantiles", "attribute_quantiles", "attribute_weights"):
        assert torch.equal(getattr(whole, name), getattr(heads, name)), name


@each_backbone
def test_every_parameter_learns(backbone):
    # One without a gradient stops DDP at the second step.
    model = make(backbone).train()
    out = model(*pad(tokens(9, 4, 7)), labels=torch.randn(2, 3, 4))
    (out.loss + out.score.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_accumulation_under_the_trainer_does_not_change_the_step(tmp_path):
    # Trainer hands the loss its normaliser only to models that ask for it; a QRM takes the mean over its texts.
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ratings}
        for ids, ratings in zip(tokens(9, 5, 5, 5, 5), torch.randn(4, 3, 6), strict=True)
    ]
    steps = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = make()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        before = model.quantile_head.weight.detach().clone()
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        steps.append(model.quantile_head.weight.detach() - before)
    assert steps[0].abs().max() > 1e-3
    assert torch.allclose(*steps, atol=1e-6)
    assert trainer.predict(rows).predictions[1].shape == (4,)  # logits, then score
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_gradient_checkpointing_gives_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            # Renamed in transformers 5.2x; the old name still works and warns.
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
            assert model.backbone.layers[0].gradient_checkpointing
        model(*pad(tokens(9, 4, 7)), labels=torch.ones(2, 3, 4)).loss.backward()
        gradients.append(model.backbone.layers[0].self_attn.q_proj.weight.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-7)


def test_a_lora_step_changes_adapter_and_heads_and_is_stored(tmp_path):
    base = make()
    frozen = base.backbone.layers[0].self_attn.q_proj.weight.clone()
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["quantile_head", "attribute_gate"],
    )
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in before} >= {"modules_to_save", "layers"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs, labels = pad(tokens(9, 4, 7)), torch.randn(2, 3, 4)
    for _ in range(2):  # the first step moves B away from zero, only then A has a gradient
        optimizer.zero_grad()
        out = model(*inputs, labels=labels)
        (out.loss + out.score.sum()).backward()
        optimizer.step()
    unmoved = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert unmoved == []
    assert torch.equal(base.backbone.layers[0].self_attn.q_proj.base_layer.weight, frozen)
    merged = model.eval().merge_and_unload()
    assert isinstance(merged, QRMForSequenceClassification)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert torch.equal(numbers(loaded, *inputs), numbers(merged, *inputs))


def test_heads_on_a_frozen_trunk_learn_the_quantiles_of_two_texts():
    # Two texts, two known laws: after training, each text gets its own. Their spreads differ by a factor of three, so
    # a model that moved all quantiles of a text together would be off by more than one.
    generator = torch.Generator().manual_seed(0)
    ratings = torch.stack([torch.randn(500, generator=generator), 2 + 3 * torch.randn(500, generator=generator)])
    model = make(attributes=["rating"])
    model.reset_to_constant(ratings.flatten().quantile(torch.tensor(LEVELS)))
    with torch.no_grad():
        features, _ = model.encode(*pad(tokens(9, 4, 7)))
    optimizer = torch.optim.Adam(model.quantile_head.parameters(), lr=0.05)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        optimizer.zero_grad()
        model.predict(features, labels=ratings).loss.backward()
        optimizer.step()
    out = model.predict(features)
    expected = ratings.quantile(torch.tensor(LEVELS), dim=1).T
    assert torch.allclose(out.quantiles, expected, atol=0.25)  # half a percent of the mass of the wide law
    assert out.crossing_rate.item() == 0.0


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile_levels": [0.5, 0.1]}, "strictly increase"),
        ({"quantile_levels": [0.0, 0.5]}, "strictly inside"),
        ({"quantile_levels": []}, "non-empty"),
        ({"attribute_names": []}, "attribute_names"),
        ({"attribute_names": ["a", "a"]}, "attribute_names"),
        ({"attribute_names": [""]}, "attribute_names"),
        ({"attribute_names": "rating"}, "attribute_names"),
        ({"pooling": "max"}, "pooling is one of"),
        ({"head_type": "conv"}, "head_type is one of"),
        ({"head_layers": []}, "head_layers"),
        ({"head_layers": [4]}, r"-4 to 3"),
        ({"head_layers": [-5]}, r"-4 to 3"),
        ({"head_hidden_size": 0}, "head_hidden_size"),
        ({"gate_hidden_size": 0}, "gate_hidden_size"),
        ({"gate_num_hidden_layers": -1}, "gate_num_hidden_layers"),
        ({"gate_temperature": 0.0}, "gate_temperature"),
        ({"backbone_config": T5Config(d_model=8, num_layers=1)}, "encoder-decoder"),
    ],
)
def test_bad_configs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QRMConfig(**({"backbone_config": BACKBONES["llama"]} | settings))


def test_bad_trunks_are_refused():
    with pytest.raises(ValueError, match="from_backbone"):
        QRMForSequenceClassification(QRMConfig())
    trunk = AutoModel.from_config(BACKBONES["llama"])
    with pytest.raises(ValueError, match="1 to 3, got 4"):
        QRMForSequenceClassification.from_backbone(trunk, num_backbone_layers=4)
    with pytest.raises(ValueError, match="already a model"):
        QRMForSequenceClassification.from_backbone(trunk, backbone_kwargs={"dtype": torch.bfloat16})


def test_bad_batches_are_refused():
    model = make()
    ids, mask = pad(tokens(9, 4, 7))
    mask[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] have no real token"):
        model(ids, mask)
    with pytest.raises(ValueError, match="does not fit tokens"):
        model(ids, torch.ones(2, 3))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(attention_mask=mask)
    with pytest.raises(ValueError, match="do not fit 2 texts with 3 attributes"):
        model(ids, labels=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one column per row"):
        model(ids, gate_positions=torch.tensor([1]))
    for bad in ([5, 1], [-1, 1], [7, 1]):  # the first row has four tokens, the batch seven columns
        with pytest.raises(ValueError, match="columns of real tokens"):
            model(*pad(tokens(9, 4, 7)), gate_positions=torch.tensor(bad))


def test_default_levels_are_the_nineteen_of_the_published_models():
    config = QRMConfig()
    assert config.quantile_levels == pytest.approx([0.05 * step for step in range(1, 20)])
    assert QRMForSequenceClassification.from_backbone(AutoModel.from_config(BACKBONES["llama"])).levels.shape == (19,)
    assert RewardDistribution(config.quantile_levels, torch.zeros(19)).batch_shape == ()


def test_half_precision_leaves_the_rotary_frequencies_alone():
    model = make()
    before = {name: buffer.clone() for name, buffer in model.backbone.named_buffers() if "inv_freq" in name}
    model.to(torch.bfloat16)
    after = dict(model.backbone.named_buffers())
    assert before
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
