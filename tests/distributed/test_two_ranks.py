"""Two ranks do what one does: same loss, same gradient, same weights, in every way of sharing the work."""

import json
from pathlib import Path

import pytest
import torch
from distributed.launching import cpu_config, launch
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

SCRIPT = Path(__file__).with_name("tiny_run.py")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def run(folder: Path, config: str, ranks: int, *settings: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """What one launch logged, and its final weights. The rollout holds 8 completions however many ranks share it."""
    output = folder / "_".join([config, str(ranks), *(s.partition("=")[0] for s in settings)])
    launch(cpu_config(config, folder, ranks), SCRIPT, output, f"gradient_accumulation_steps={2 // ranks}", *settings)
    return json.loads((output / "record.json").read_text()), load_file(output / "weights.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    tiny_llama(initializer_range=0.3).save_pretrained(path / "policy")
    tiny_tokenizer().save_pretrained(path / "policy")
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder, "cpu", 1)


@pytest.mark.parametrize(
    ("config", "kind", "stage"),
    [
        ("ddp_cpu", "MULTI_CPU", None),
        ("zero2", "DEEPSPEED", 2),
        ("zero3", "DEEPSPEED", 3),
    ],
)
def test_two_ranks_equal_one(folder, alone, config, kind, stage):
    record, weights = run(folder, config, 2)
    # A launch that silently fell back to one process would pass every comparison below.
    assert (record["world_size"], record["distributed_type"], record["zero_stage"]) == (2, kind, stage)
    reference, expected = alone
    assert reference["world_size"] == 1
    for name in ("loss", "grad_norm", "reward/score_mean", "reward/score_q05", "kl/reference", "critic/return_mean"):
        assert record[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-5), name
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    start = tiny_llama(initializer_range=0.3).state_dict()
    assert any(not torch.allclose(start[n], expected[f"policy.{n}"], atol=1e-3) for n in start)


def test_quantile_critic_on_sharded_weights_equals_one_process(folder):
    """Heads that start at zero need no gather, and quantiles no reduction of their own."""
    head = 'critic_head="quantile"'
    reference, expected = run(folder, "cpu", 1, head)
    record, weights = run(folder, "zero3", 2, head)
    assert (record["world_size"], record["zero_stage"]) == (2, 3)
    names = ("loss", "grad_norm", "critic/return_mean", "critic/coverage_0.9", "critic/explained_variance_sampled")
    for name in names:
        assert len(record[name]) == 3
        assert record[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-5), name
    assert weights["value_head.linear.weight"].shape[0] == 32
    assert weights["value_head.linear.weight"].abs().sum() > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_share_one_population_and_its_multipliers(folder):
    reference, expected = run(folder, "cpu", 1, "population=true")
    record, weights = run(folder, "zero2", 2, "population=true")
    assert (record["world_size"], record["zero_stage"]) == (2, 2)
    names = ["loss", "grad_norm", "reward/score_mean", "risk/cvar:0.3/nu"]
    names += [f"constraint/below:0/{part}" for part in ("value", "low", "multiplier")]
    for name in names:
        assert len(record[name]) == 3
        assert record[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-5), name
    assert len(set(record["constraint/below:0/multiplier"])) > 1
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
