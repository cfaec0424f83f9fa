"""Two ranks do what one does: same loss, same gradient, same weights, in every way of sharing the work.

Each way is launched once, from the shipped accelerate config, and trains one run after another.
"""

import json
from pathlib import Path

import pytest
import torch
from distributed.launching import cpu_config, launch, launch_machines
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

SCRIPT = Path(__file__).with_name("tiny_run.py")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

WAYS = {
    "full_shared": {},
    "full_separate": {"critic": "separate"},
    "lora_shared": {"lora": True},
    "lora_separate": {"lora": True, "critic": "separate"},
}
RISK = {
    # Multipliers of the constraint need no reduction of their own.
    "population": {"population": True},
    # Every statistic that could be taken over one rank alone: rewards scaled, coefficient adapted, tail in the log.
    "statistics": {
        "max_completion_length": 12,
        "whiten_rewards": True,
        "kl_target": 1.0,
        "kl_horizon": 16,
        "kl_gain": 1.0,
        "normalize_scores": True,
        "missing_eos_penalty": 1.0,
        "log_completions": True,
        # Several micro-batches, so that old and new log-probabilities come from two passes; one pass serves the rest.
        "per_device_train_batch_size": 2,
    },
    # Siblings that are not all of one rank.
    "siblings": {"score_baseline": "siblings", "num_generations": 2, "siblings_by_length": True},
}
# A second pass over each rollout, in which most tokens are clipped; held-out prompts that two ranks cannot halve.
CLIPPED = {
    "num_ppo_epochs": 2,
    "clip_range": 0.003,
    "max_steps": 4,
    "max_completion_length": 12,
    "held_out": 11,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 2,
}
CLIP = {"clipped": CLIPPED}
# Each rank decodes with weights that are gathered layer by layer, for every token of any rank.
BY_LAYER = {"clipped_by_layer": CLIPPED | {"ds3_gather_for_generation": False}}
OFFLOAD = "DeepSpeed ZeRO-{} (offload: optimizer {}, parameters {})"
# Accelerate config: what it must become, shares of the weights and of the optimiser's state on a rank, runs.
MODES = {
    "ddp_cpu": ("data parallelism", 1, 1, WAYS | RISK | CLIP),
    "zero1": (OFFLOAD.format(1, "none", "none"), 1, 1 / 2, WAYS | CLIP),
    "zero2": (OFFLOAD.format(2, "none", "none"), 1, 1 / 2, WAYS | RISK | CLIP),
    "zero3": (OFFLOAD.format(3, "none", "none"), 1 / 2, 1 / 2, WAYS | RISK | CLIP | BY_LAYER),
    "zero3_offload": (OFFLOAD.format(3, "cpu", "cpu"), 1 / 2, 1 / 2, WAYS | BY_LAYER),
    "fsdp2": ("FSDP version 2", 1 / 2, 1 / 2, WAYS | RISK | CLIP),
}
# Noise alone: advantages are centred, so this loss is zero; near ties of equal answers change order by rounding.
UNCOMPARED = {"policy/loss", "risk/rank_correlation_with_mean"}


def train(folder: Path, config: Path, ranks: int, runs: dict[str, dict], *options: str, by=launch) -> Path:
    """Where the runs of one launch left their records. A rollout holds 8 completions however many ranks share it."""
    output = folder / config.stem
    steps = {name: 8 // ranks // settings.get("per_device_train_batch_size", 4) for name, settings in runs.items()}
    runs = {name: {"gradient_accumulation_steps": steps[name], **settings} for name, settings in runs.items()}
    plan = folder / f"{config.stem}.json"
    plan.write_text(json.dumps(runs))
    by(config, SCRIPT, output, "--several", plan, *options)
    return output


def read(output: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """What one run logged, and its final weights."""
    return json.loads((output / name / "record.json").read_text()), load_file(output / name / "weights.safetensors")


def check_equal(output: Path, alone: Path, name: str) -> None:
    """Every logged number and every weight of the run."""
    (record, weights), (reference, expected) = read(output, name), read(alone, name.removesuffix("_by_layer"))
    assert record.keys() == reference.keys()
    compared = [key for key in record if "/" in key and key not in UNCOMPARED and not key.startswith("time/")]
    assert len(record["loss"]) == (4 if name.startswith("clipped") else 3)
    for key in ["loss", "grad_norm", *compared]:
        assert len(record[key]) == len(reference[key]), key
        assert record[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-5), key
    assert {"reward/score_min", "reward/score_cvar_0.1", "kl/reference", "completion/length_mean"} <= set(compared)
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, atol=1e-5, rtol=0, msg=lambda m, n=key: f"{n}: {m}")


def check_saved(output: Path, name: str) -> None:
    """The folder that `save_model` wrote holds the weights of the run, bit by bit and none twice or left out."""
    weights, folder = read(output, name)[1], output / name / "policy"
    saved = load_file(folder / "critic" / "model.safetensors")
    if name.startswith("lora"):
        # The base stays where it was read from.
        trained = {n for n in weights if not n.startswith("policy.") or "lora_" in n}
        adapter = load_file(folder / "adapter_model.safetensors")
        saved |= {f"policy.{n.removesuffix('.weight')}.default.weight": tensor for n, tensor in adapter.items()}
    else:
        trained = set(weights)
        saved |= {f"policy.{n}": tensor for n, tensor in load_file(folder / "model.safetensors").items()}
    assert saved.keys() == trained
    assert [n for n in saved if not saved[n].equal(weights[n])] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    tiny_llama(initializer_range=0.3).save_pretrained(path / "policy")
    tiny_tokenizer().save_pretrained(path / "policy")
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, cpu_config("cpu", folder, 1), 1, WAYS | RISK | CLIP)


@pytest.fixture(scope="module", params=MODES)
def mode(request, folder):
    name, options = request.param, []
    if name == "fsdp2":
        options = ["--fsdp_on_cpu"]
    return name, train(folder, cpu_config(name, folder, 2), 2, MODES[name][-1], *options)


def test_the_reference_is_one_process_that_learns(alone):
    for name in WAYS:
        record, weights = read(alone, name)
        assert record["launch"] == ["one process", 1]
        start = tiny_llama(initializer_range=0.3).state_dict()
        key = "policy.{}" if name.startswith("full") else "policy.base_model.model.{}"
        moved = [n for n in start if key.format(n) in weights]
        moved = [n for n in moved if not torch.allclose(start[n], weights[key.format(n)], atol=1e-3)]
        # A LoRA run leaves the base as it is, and trains its adapter.
        assert bool(moved) == name.startswith("full")
        assert name.startswith("full") or any("lora_B" in n and w.abs().max() > 1e-3 for n, w in weights.items())


def test_the_clip_of_the_reference_is_active_and_its_evaluation_uneven(alone):
    """With ratios of 1 a clip that ranks applied differently would pass, as would a prompt counted twice."""
    record, _ = read(alone, "clipped")
    first, second = record["policy/clip_fraction"][::2], record["policy/clip_fraction"][1::2]
    assert first == [0.0, 0.0]
    assert min(second) > 0.5
    assert record["eval_num_completions"] == [CLIPPED["held_out"]] * 2
    assert len(set(record["eval_reward/score_mean"])) == 2


def test_two_ranks_equal_one_in_every_mode(mode, alone):
    name, output = mode
    kind, weights_share, optimizer_share, runs = MODES[name]
    for run in runs:
        record = read(output, run)[0]
        # A launch that silently fell back to one process would pass every comparison below.
        assert record["launch"] == [kind, 2], run
        # Padding and small vectors that stay whole are the tolerance: not half of so small a model exactly.
        assert record["weights_share"] == pytest.approx(weights_share, abs=0.1), run  # loose: see above
        assert record["optimizer_share"] == pytest.approx(optimizer_share, abs=0.1), run  # loose: see above
        check_equal(output, alone, run)
        check_saved(output, run)


def test_a_launch_that_became_another_mode_is_refused(mode):
    """`check_mode` accepts what this mode is, and refuses every other wish, sharded or not."""
    accepted = {
        "ddp_cpu": "no sharding",
        "zero1": "ZeRO-1",
        "zero2": "ZeRO-2",
        "zero3": "ZeRO-3",
        "zero3_offload": "ZeRO-3 with offload",
        "fsdp2": "FSDP",
    }
    name, output = mode
    refused = set(read(output, "full_shared")[0]["refused"])
    wishes = {"FSDP version 1", "three ranks", *accepted.values()}
    # Only the stage is changed here; the config file still asks for both offloads.
    expected = wishes - {accepted[name]} - ({"ZeRO-3"} if name == "zero3_offload" else set())
    assert refused == expected


def test_ranks_of_uneven_length_share_every_statistic(folder, mode, alone):
    """Whitening, tail and counts would differ from the one process's if a rank took them over its own tokens."""
    name, output = mode
    if name != "ddp_cpu":
        pytest.skip("the log of completions is the same in every mode")
    lengths, scores = {}, {}
    for rank in (0, 1):
        rows = (output / "statistics" / "run" / "completions" / f"step_000000_rank_{rank}.jsonl").read_text()
        rows = [json.loads(row) for row in rows.splitlines()]
        lengths[rank] = [len(row["completion"].split()) for row in rows]
        scores[rank] = [row["score"] for row in rows]
    assert abs(sum(lengths[0]) - sum(lengths[1])) >= 4
    record, _ = read(output, "statistics")
    everything = torch.tensor(scores[0] + scores[1])
    assert record["reward/score_mean"][0] == pytest.approx(everything.mean().item(), abs=1e-6)
    assert record["reward/score_min"][0] == pytest.approx(everything.min().item(), abs=1e-6)
    # Negative control: one rank alone would have logged another mean.
    assert record["reward/score_mean"][0] != pytest.approx(torch.tensor(scores[0]).mean().item(), abs=1e-3)


def test_two_machines_equal_one_process(folder, alone):
    """Two launchers, told by `--machine_rank` which machine each is, meet at the first one's address."""
    config = cpu_config("multi_node", folder, 2, main_process_ip="127.0.0.1")
    output = train(folder, config, 2, {"full_shared": {}, "lora_separate": WAYS["lora_separate"]}, by=launch_machines)
    for run in ("full_shared", "lora_separate"):
        assert read(output, run)[0]["launch"] == [OFFLOAD.format(3, "none", "none"), 2]
        check_equal(output, alone, run)
        check_saved(output, run)


def test_fsdp_on_cpu_ranks_is_refused_not_replaced(folder):
    """accelerate itself would train with plain data parallelism."""
    with pytest.raises(AssertionError, match=r"asks for FSDP version 2.*zero3\.yaml"):
        train(folder, cpu_config("fsdp2", folder, 2, fsdp_config={"fsdp_version": 2}), 2, {"full_shared": {}})
