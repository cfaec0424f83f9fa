"""Fused LoRA layers: PEFT's numbers and gradients, and PEFT's own way wherever more than one plain update is asked."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn

from rlhf.adapters import FusedLoraLinear, fuse_adapters

INPUTS = (2, 3, 5)  # batch, tokens, features


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7, bias=bias), nn.Linear(7, 4, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def with_adapter(dtype=torch.float64, bias=True, **settings):
    """A net whose adapter is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"]} | settings)
    model = get_peft_model(Net(bias).to(dtype), config, autocast_adapter_dtype=dtype != torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def both(model, inputs):
    """Output and gradients (of the input first) before and after fusing."""
    results = []
    for net in (copy.deepcopy(model), copy.deepcopy(model)):
        if results:
            assert fuse_adapters(net) == 2
        x = inputs.clone().requires_grad_()
        output = net(x)
        output.float().square().sum().backward()
        trained = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
        results.append([output.detach(), x.grad, *trained])
    return results


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_peft(bias):
    torch.manual_seed(1)
    plain, fused = both(with_adapter(bias=bias), torch.randn(INPUTS, dtype=torch.float64))
    assert len(plain) == len(fused) == 2 + 4
    for expected, found in zip(plain, fused, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_output_is_base_plus_scaled_product_by_hand():
    model = with_adapter(target_modules=["second"])
    layer = model.base_model.model.second
    x = torch.randn(2, 7, dtype=torch.float64)
    update = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r = 3 / 2
    expected = x @ (layer.base_layer.weight + update).t() + layer.base_layer.bias
    assert fuse_adapters(model) == 1
    assert type(layer) is FusedLoraLinear
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_rounds_as_peft_under_autocast_does():
    """Root mean square errors of output and of every gradient against the same weights in float64."""
    model = with_adapter(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    torch.manual_seed(2)
    inputs = torch.randn(64, 9, 5).bfloat16()
    exact, _ = both(copy.deepcopy(model).double(), inputs.double())
    _, fused = both(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, _ = both(model, inputs)
    for truth, peft, ours in zip(exact, plain, fused, strict=True):
        assert peft.dtype == ours.dtype
        errors = [(found.double() - truth).square().mean().sqrt().item() for found in (peft, ours)]
        size = truth.square().mean().sqrt()
        assert 0 < errors[0] < 0.01 * size
        # One rounding more than PEFT where the gradient is scaled.
        assert errors[1] < min(0.01 * size, 2.5 * errors[0])


def test_autocast_gives_the_dtype_and_nearly_the_numbers_of_peft():
    model, inputs = with_adapter(torch.float32), torch.randn(INPUTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(inputs)
        fuse_adapters(model)
        found = model(inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # three digits in each of two layers


def test_adapter_that_is_off_or_merged_leaves_the_base_or_its_sum():
    model, inputs = with_adapter(), torch.randn(INPUTS, dtype=torch.float64)
    with model.disable_adapter():
        base = model(inputs)
    full = model(inputs)
    assert (full - base).abs().max() > 0.01
    fuse_adapters(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(inputs), base, rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs), full, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    torch.testing.assert_close(model(inputs), full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_what_is_not_a_plain_update_goes_peft_s_way(settings):
    model, inputs = with_adapter(**settings), torch.randn(INPUTS, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            nn.init.ones_(parameter)
    torch.manual_seed(5)
    expected = model.train()(inputs)
    fuse_adapters(model)
    torch.manual_seed(5)
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=0)


def test_several_adapters_add_up():
    model, inputs = with_adapter(), torch.randn(INPUTS, dtype=torch.float64)
    second = LoraConfig(r=1, target_modules=["first"], init_lora_weights=False)
    model.add_adapter("other", second, autocast_adapter_dtype=False)
    model.double()
    model.base_model.set_adapter(["default", "other"])
    expected = model(inputs)
    fuse_adapters(model)
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=0)
    model.base_model.set_adapter(["default"])
    assert (model(inputs) - expected).abs().max() > 1e-3


def test_hooks_on_the_parts_are_called():
    model, inputs = with_adapter(), torch.randn(INPUTS, dtype=torch.float64)
    fuse_adapters(model)
    expected, seen = model(inputs), []
    model.base_model.model.first.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(inputs), expected, rtol=1e-12, atol=1e-12)
    assert seen == [1]


def test_a_fused_copy_has_weights_of_its_own():
    model, inputs = with_adapter(), torch.randn(INPUTS, dtype=torch.float64)
    fuse_adapters(model)
    expected, other = model(inputs), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(inputs), expected, rtol=0, atol=0)


def test_saved_adapter_does_not_know_that_it_was_fused(tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    names = set(model.state_dict())
    assert fuse_adapters(model) == 2 * 7  # q, k, v, o, gate, up, down of two layers
    assert fuse_adapters(model) == 0
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
