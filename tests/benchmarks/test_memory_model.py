"""What `benchmarks/memory_model.py` says on paper, derived by hand, and that it measures what it says it does."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
SCALING = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def formulas():
    """The scripts of `benchmarks` import each other from their own folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("scale_formulas")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def model(formulas):
    return importlib.import_module("memory_model")


@pytest.fixture(scope="module")
def measured(formulas):
    return importlib.import_module("memory_cases")


@pytest.fixture
def toy(formulas):
    # a = 4, k = 2: a layer holds 4 (2*4 + 2*2 + 3*6 + 2) = 128, the trunk 10*4 + 2*128 + 4 = 300.
    return formulas.Shape(layers=2, hidden=4, mlp=6, heads=2, kv_heads=1, head_dim=2, vocab=10, tied=True)


@pytest.fixture
def alone(formulas):
    return formulas.Plan(
        precision="fp32", rows=7, micro_batch=3, prompt=2, completion=3, epochs=4, checkpointing=False
    )


def test_parameters_are_those_of_the_published_models(formulas, toy):
    sizes = {name: shape.parameters for name, shape in formulas.SHAPES.items()}
    assert sizes["SmolLM2-135M"] == 134_515_008
    assert sizes["SmolLM2-360M"] == 361_821_120
    assert sizes["Llama-3.1-8B"] == 8_030_261_248
    assert sizes["Llama-3.1-70B"] == 70_553_706_496
    assert formulas.SHAPES["Llama-3.1-8B"].adapter(16) == 41_943_040
    assert (toy.parameters, replace(toy, tied=False).parameters) == (300, 340)
    # 2 layers (2 (4 + 4) + 2 (4 + 2) + 3 (4 + 6)); matrices of the layers and of the head.
    assert (toy.adapter(1), toy.products) == (116, 2 * 120 + 40)


def test_parameters_are_those_of_a_real_model(formulas):
    for tied in (True, False):
        policy = tiny_llama(tie_word_embeddings=tied)
        shape = formulas.Shape(2, 32, 48, 4, 2, 8, policy.config.vocab_size, tied)
        assert shape.parameters == sum(p.numel() for p in policy.parameters())


def test_memory_of_one_process(formulas, toy, alone):
    parts = formulas.memory(toy, alone)
    # U = 300 + 4 + 1; 4 bytes of weight and gradient, 8 of Adam. 15 tokens, 2 layers of 8*4 + 5*4 + 4*6 = 76 numbers.
    assert parts["weights"] == 4 * 305
    # Embedding and head are one matrix of 40, whose gradient comes from both ends.
    assert parts["gradients"] == 4 * (305 + 2 * 40)
    assert formulas.memory(replace(toy, tied=False), alone)["gradients"] == 4 * (345 + 40)
    assert (parts["reference"], parts["optimiser"]) == (1200, 2440)
    assert parts["activations"] == 15 * 2 * 76 * 4
    # Two tables of 3 rows, 3 tokens, 10 words, and two of one row.
    assert parts["logits"] == 2 * 90 * 4 + 2 * 30 * 4
    assert parts["KV cache"] == 2 * 2 * 2 * 7 * 5 * 4
    assert parts["peak"] == 1220 + 1200 + 2440 + 1540 + 9120 + 960
    # A reference on disk is there instead of an update, not beside it: 1540 + 9120 + 960 are more than 1200.
    assert formulas.memory(toy, replace(alone, frozen_on_disk=True))["peak"] == 1220 + 2440 + 1540 + 9120 + 960
    large = replace(alone, frozen_on_disk=True, reward=50_000)
    assert formulas.memory(toy, large)["peak"] == 1220 + 2440 + 2 * 50_000
    for mode in ("ddp", "zero3"):
        several = replace(large, mode=mode, ranks=2)
        stays = replace(several, frozen_on_disk=False)
        assert formulas.memory(toy, several)["peak"] == formulas.memory(toy, stays)["peak"]
    checkpointed = formulas.memory(toy, replace(alone, checkpointing=True))
    assert checkpointed["activations"] == 15 * (2 * 4 + 76) * 4


def test_memory_of_an_adapter_and_of_a_separate_critic(formulas, toy, alone):
    lora = formulas.memory(toy, replace(alone, lora=1, critic="separate", weight_bytes=2))
    # U = 116 twice, and the head. The base is the reference.
    assert lora["gradients"] == 4 * (116 + 116 + 5)
    assert (lora["optimiser"], lora["reference"]) == (8 * 237, 0)
    assert lora["weights"] == 2 * (300 + 116 + 300 + 116 + 5)


def test_memory_that_ranks_share(formulas, toy, alone):
    both = {"ranks": 2, "precision": "bf16"}
    ddp = formulas.memory(toy, replace(alone, mode="ddp", **both))
    # Float32 everywhere, gradients twice, bfloat16 copies of 280 numbers under autocast.
    assert (ddp["weights"], ddp["gradients"], ddp["working copies of weights"]) == (1220, 2440 + 320, 560)
    zero2 = formulas.memory(toy, replace(alone, mode="zero2", **both))
    assert (zero2["weights"], zero2["reference"], zero2["optimiser"]) == (610, 600, 12 * 305 / 2)
    assert zero2["gradients"] == 2 * 305 / 2 + 2 * 305 + 2 * 80
    zero3 = formulas.memory(toy, replace(alone, mode="zero3", **both))
    assert (zero3["weights"], zero3["reference"], zero3["optimiser"]) == (305, 300, 12 * 305 / 2)
    assert zero3["working copies of weights"] == 2 * (2 * 128 + 40)
    assert zero3["weights gathered to generate"] == 2 * 305
    assert zero3["host"] == 0
    offload = formulas.memory(toy, replace(alone, mode="zero3_offload", **both))
    assert offload["host"] == 305 + 300 + 12 * 305 / 2 + 915 + 160
    assert offload["peak"] == zero3["peak"] - offload["host"]


def test_traffic(formulas, toy, alone):
    assert set(formulas.traffic(toy, alone).values()) == {0.0}
    plan = replace(alone, mode="ddp", ranks=2, precision="bf16", rows=8, micro_batch=4)
    # Half of everything travels, twice in an all-reduce: 4 bytes, 305 gradients, 4 steps.
    assert sum(formulas.traffic(toy, plan).values()) == 2 * 0.5 * 4 * 305 * 4
    # ZeRO-2 reduces after each of the two micro-batches.
    assert list(formulas.traffic(toy, replace(plan, mode="zero1")).values())[:2] == [1220, 1220]
    assert list(formulas.traffic(toy, replace(plan, mode="zero2")).values())[:2] == [2440, 1220]
    zero3 = formulas.traffic(toy, replace(plan, mode="zero3"))
    assert list(zero3.values()) == [2440, 4880, 0.5 * 2 * (305 + 300) * 2, 305]
    assert formulas.traffic(toy, replace(plan, mode="fsdp2"))["weights to generate"] == 3 * 305


def test_seconds(formulas, toy, alone):
    machine = formulas.Machine(
        flops=10,
        update_share=0.5,
        scoring_share=1.0,
        memory_bandwidth=100,
        memory_share=0.5,
        layer_seconds=7,
        inside=2,
    )
    time = formulas.throughput(toy, alone, machine)
    # A token costs 2*280 + 2*2*4*5 = 640 operations forward; 35 tokens, three passes, four epochs at 5 a second.
    assert time["update"] == pytest.approx(35 * 640 * 3 * 4 / 5)
    assert time["scoring"] == pytest.approx(35 * 640 * 2 / 10)
    # Decoding multiplies 2*280*7 numbers at 10 a second, slower than it reads them (1120 + 784 bytes at 50).
    assert time["generation"] == pytest.approx(3 * 392)
    assert time["tokens per second"] == pytest.approx(21 / time["total"])
    two = formulas.throughput(toy, replace(alone, mode="ddp", ranks=2), machine)
    assert two["network"] == pytest.approx(4 * 305 * 4 / 2)
    assert two["total"] == pytest.approx(time["total"] + two["network"])


def test_impossible_set_ups_are_refused(formulas):
    with pytest.raises(ValueError, match=r"mode must be one of .*fsdp2, got 'zero4'"):
        formulas.Plan(mode="zero4", ranks=2)
    with pytest.raises(ValueError, match="'ddp' does not go with 1 rank"):
        formulas.Plan(mode="ddp", ranks=1)
    with pytest.raises(ValueError, match=r"about 2.5e\+10 parameters; known: .*Llama-3\.1-8B"):
        formulas.nearest_shape(25e9)
    assert formulas.nearest_shape(7e9)[0] == "Llama-3.1-8B"


def test_the_document_holds_the_tables_that_the_code_prints(model):
    for table in (model.recommendation(0), model.recommendation(16), model.throughputs(), model.measured_table()):
        assert table in SCALING


def test_stored_formulas_are_those_of_the_code(formulas, model, measured):
    """A formula that changed after the measurement would leave a ratio that nobody can reproduce."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "memory_model.json").read_text())["cases"]
    assert "full, shared critic" in stored
    assert set(stored) <= set(measured.CASES)
    for key in stored:
        case = measured.CASES[key]
        assert stored[key]["trained"] == formulas.trained(case.shape, case.plan)
        assert model.in_one_memory(formulas.memory(case.shape, case.plan)) == stored[key]["formula_bytes"]
        assert stored[key]["ratio"] == stored[key]["formula_bytes"] / stored[key]["measured_bytes"]


def test_offload_on_a_cpu_moves_nothing_out_of_a_rank(formulas, model, toy, alone):
    """Device and host are one memory there; what DeepSpeed holds twice under offload is twice in it."""
    sharded = formulas.memory(toy, replace(alone, mode="zero3", ranks=2))
    offloaded = formulas.memory(toy, replace(alone, mode="zero3_offload", ranks=2))
    assert offloaded["host"] > sharded["weights"] + sharded["optimiser"]
    # Adam on the host works on a copy of this rank's half of 305 weights, float32 though they are.
    assert model.in_one_memory(offloaded) == model.in_one_memory(sharded) + 4 * 305 / 2


def test_every_size_is_measured_in_set_ups_of_its_own_name(formulas, measured):
    by_model = {name: [case for case in measured.CASES.values() if case.model == name] for name in measured.MODELS}
    assert sum(map(len, by_model.values())) == len(measured.CASES)
    for name, found in by_model.items():
        assert {"full, shared critic", "LoRA, shared critic"} <= {case.name for case in found}, name
    # Every way of sharing the work that the formulas know is run at one size.
    assert {case.plan.mode for case in by_model[measured.PRETRAINED]} == set(formulas.MODES)
    # One key would otherwise hold two measurements, of which the second is never made.
    assert measured.CASES["full, ZeRO-2"].shape is formulas.SHAPES["SmolLM2-135M"]
    assert measured.CASES["44M: full, ZeRO-2"].shape.parameters == 44_052_864


@pytest.fixture
def policy(tmp_path):
    """A small model with its tokenizer, in a folder."""
    folder = tmp_path / "policy"
    tiny_llama(vocab_size=19, max_position_embeddings=128, rope_theta=77.0).save_pretrained(folder)
    tiny_tokenizer(pad_token="<|endoftext|>").save_pretrained(folder)
    return folder


def test_a_model_of_another_size_is_written(formulas, measured, policy, tmp_path):
    shape = formulas.Shape(layers=3, hidden=12, mlp=10, heads=4, kv_heads=2, head_dim=6, vocab=19, tied=True)
    folder = measured.write_model(shape, policy, tmp_path / "other")
    assert not (folder / "partial").exists()
    written = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in written.parameters())
    assert {p.dtype for p in written.parameters()} == {torch.float32}
    # All else is the other model's.
    assert written.config.rope_parameters["rope_theta"] == 77.0
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|endoftext|>"
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    measured.write_model(shape, policy, folder)
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="goes with 19 words, not with 20"):
        measured.write_model(replace(shape, vocab=20), policy, tmp_path / "third")


@pytest.mark.slow
def test_a_case_is_measured(formulas, model, measured, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "RUNS", tmp_path)
    plan = replace(measured.SMALL, lora=4, completion=6, critic="separate")
    (rank,) = model.run("tiny", plan, policy)
    shape = formulas.Shape(2, 32, 48, 4, 2, 8, 19, False)
    assert rank["trained"] == formulas.trained(shape, plan)
    assert rank["length"] == plan.completion
    assert 0 < rank["start_bytes"] < rank["loading_bytes"] <= rank["preparing_bytes"] <= rank["peak_bytes"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp_is_measured_on_cpu_ranks(formulas, model, measured, policy, tmp_path, monkeypatch):
    """Accelerate would fall back to plain data parallelism, which the trainer refuses."""
    monkeypatch.setattr(model, "RUNS", tmp_path)
    plan = replace(measured.SMALL, mode="fsdp2", ranks=2, completion=6)
    ranks = model.run("tiny", plan, policy)
    assert len(ranks) == 2
    # Each rank counts whole tensors, of which it holds half.
    assert {rank["trained"] for rank in ranks} == {
        formulas.trained(formulas.Shape(2, 32, 48, 4, 2, 8, 19, False), plan)
    }
