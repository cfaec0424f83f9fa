"""An adapter at another strength: its weights, its KL by hand, the search on known curves, and the recipe."""

import json
import math
import re

import pytest
import torch
from distributed.launching import load_recipe
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import TrlParser

from eval.records import read_jsonl
from eval.rescaling import RECORD, Strength, completion_kl, factor_for, rescale_adapter
from reward.loading import ADAPTER_WEIGHTS

recipe = load_recipe("rescale_adapter")


def save_adapter(path, base, **settings):
    """A LoRA adapter that changes much; the base lies in `base`."""
    model = AutoModelForCausalLM.from_pretrained(str(base))
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**options | settings))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(path))
    tiny_tokenizer().save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rescale")
    tiny_llama(tie_word_embeddings=False, initializer_range=0.3).save_pretrained(path / "base")
    tiny_tokenizer().save_pretrained(path / "base")
    save_adapter(path / "adapter", path / "base")
    tiny_prompts().save_to_disk(path / "prompts")
    tiny_prompts().select(range(1)).save_to_disk(path / "one")
    return path


def logits(folder, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(str(folder / "base"))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.tensor([[3, 7, 4, 9, 5]])).logits


@pytest.mark.parametrize("factor", [0.0, 0.35, 1.0, 1.7, -1.0])
def test_the_change_of_the_weights_is_multiplied(folder, tmp_path, factor):
    rescale_adapter(folder / "adapter", factor, tmp_path)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(folder / "base")), str(folder / "adapter")
    )
    # Another route: the weights themselves, W0 + c (alpha/r) B A.
    plain, changed = AutoModelForCausalLM.from_pretrained(str(folder / "base")), 0
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_B"):
            delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            plain.get_submodule(name).weight.data += factor * delta.detach()
            changed += 1
    assert changed == 4
    with torch.no_grad():
        expected = plain(torch.tensor([[3, 7, 4, 9, 5]])).logits
    torch.testing.assert_close(logits(folder, tmp_path), expected, atol=2e-5, rtol=1e-5)
    same = torch.allclose(expected, logits(folder), atol=1e-3)
    assert same == (factor == 0)


def test_a_rescaled_adapter_is_left_alone_until_its_source_changes(folder, tmp_path):
    source = save_adapter(tmp_path / "source", folder / "base")
    made = tmp_path / "made" / ADAPTER_WEIGHTS
    rescale_adapter(source, 0.5, made.parent)
    first = made.stat().st_mtime_ns
    rescale_adapter(source, 0.5, made.parent)
    assert made.stat().st_mtime_ns == first
    rescale_adapter(source, 0.6, made.parent)
    second = made.stat().st_mtime_ns
    assert second > first
    save_adapter(source, folder / "base", lora_alpha=16)
    rescale_adapter(source, 0.6, made.parent)
    assert made.stat().st_mtime_ns > second
    assert json.loads((made.parent / "adapter_config.json").read_text())["lora_alpha"] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_is_no_multiple_of_b_is_refused(folder, tmp_path, settings, message):
    source = save_adapter(tmp_path / "source", folder / "base", **settings)
    with pytest.raises(ValueError, match=message):
        rescale_adapter(source, 0.5, tmp_path / "made")


def test_what_is_no_adapter_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no LoRA adapter"):
        rescale_adapter(folder / "base", 0.5, tmp_path / "made")
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        rescale_adapter(folder / "adapter", math.nan, tmp_path / "made")


def row(prompt, sample, tokens, k3):
    return {"prompt_id": prompt, "sample": sample, "completion_tokens": tokens, "kl_k3_mean": k3}


def test_the_kl_of_completions_by_hand():
    # Prompt a: (4 * 0.5 + 2 * 0.25) / 2 = 1.25. Prompt b: (10 * 0.1 + nothing) / 2 = 0.5.
    rows = [row("a", 0, 4, 0.5), row("b", 0, 10, 0.1), row("a", 1, 2, 0.25), row("b", 1, 0, None)]
    kl, error = completion_kl(rows)
    assert kl == pytest.approx(0.875)
    assert error == pytest.approx(0.375)  # sd 0.75 / sqrt 2, by sqrt 2
    with pytest.raises(ValueError, match="completion 1 of prompt 'a' has no KL"):
        completion_kl([row("a", 0, 4, 0.5), row("a", 1, 4, None)])


@pytest.mark.parametrize("target", [0.05, 1.0, 3.7, 4.0, 6.0])
@pytest.mark.parametrize("curve", [lambda c: 4 * c**2, lambda c: 3 * c**2 + c**4, lambda c: 4 * c**1.5])
def test_the_search_finds_the_factor_in_few_readings(target, curve):
    readings = []

    def measure(factor):
        readings.append(factor)
        return Strength(factor, curve(factor), 0.0)

    found = factor_for(target, measure, tolerance=0.01)
    assert curve(found.factor) == pytest.approx(target, rel=0.01)
    assert found.kl == curve(found.factor)
    assert len(readings) <= 6


def test_a_kl_out_of_reach_is_said():
    with pytest.raises(ValueError, match="at 2 times its strength the adapter is 4 nats from its base, short of 9"):
        factor_for(9.0, lambda c: Strength(c, c**2, 0.0))
    with pytest.raises(ValueError, match="does not move the policy"):
        factor_for(1.0, lambda c: Strength(c, 0.0, 0.0))
    for target in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="must be above 0 nats"):
            factor_for(target, lambda c: Strength(c, c**2, 0.0))


def test_a_noisy_curve_ends_with_the_nearest_reading():
    step = iter([3.0, 0.4, 1.6, 0.7, 1.5, 0.8, 1.4, 0.85])
    found = factor_for(1.0, lambda c: Strength(c, next(step), 0.0), tolerance=0.01)
    assert found.kl == 0.85
    assert next(step, None) is None


def run(folder, output, *flags):
    settings = ["--policy", folder / "adapter", "--dataset_name", folder / "prompts", "--output_dir", output]
    parser = TrlParser((recipe.RescaleArguments,))
    settings += ["--max_new_tokens", "6", "--use_cpu", "true"]
    recipe.main(*parser.parse_args_and_config([str(x) for x in [*settings, *flags]]))


def test_the_recipe_brings_an_adapter_to_each_kl(folder, tmp_path, capsys):
    run(folder, tmp_path, "--kl", "0.5", "0.2", "--max_prompts", "30", "--tolerance", "0.05")
    said = capsys.readouterr().out
    factors = []
    for kl in (0.2, 0.5):
        made = tmp_path / f"kl-{kl}"
        record = json.loads((made / RECORD).read_text())
        assert record["kl"] == pytest.approx(kl, rel=0.05)  # the tolerance asked for
        assert record["prompts"] == 30
        assert re.search(rf"{re.escape(str(made))}: strength {record['factor']:.3f}, KL {record['kl']:.3f}", said)
        # The KL is that of the adapter which was written, on completions of its own.
        rows = read_jsonl(tmp_path / "readings" / f"{record['factor']:.6f}.jsonl")
        assert len(rows) == 30
        assert completion_kl(rows)[0] == pytest.approx(record["kl"])
        reading = tmp_path / "readings" / f"{record['factor']:.6f}"
        assert torch.equal(logits(folder, made), logits(folder, reading))
        factors.append(record["factor"])
    assert 0 < factors[0] < factors[1]
    # Nothing is generated a second time.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "readings").glob("*.jsonl")}
    run(folder, tmp_path, "--kl", "0.5", "0.2", "--max_prompts", "30", "--tolerance", "0.05")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "readings").glob("*.jsonl")} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--kl is required"),
        (("--kl", "0"), "--kl must be above 0 nats, got 0"),
        (("--kl", "1", "--tolerance", "1"), "--tolerance lies in"),
        (("--kl", "1", "--dataset_name", "ONE"), "has one prompt"),
        (("--kl", "1", "--policy", "BASE"), "no folder with an adapter"),
        (("--kl", "1", "--dataset_name", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_bad_input_is_refused_before_anything_is_generated(folder, tmp_path, flags, message):
    flags = [{"BASE": folder / "base", "ONE": folder / "one"}.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit, match=message):
        run(folder, tmp_path, *flags)
    assert list(tmp_path.iterdir()) == []
