"""Memory given back between phases: only pages that the disk holds too, and only while nobody needs them."""

import mmap
import sys

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from rlhf.host_memory import (
    MAPS,
    Mapping,
    page_entries,
    present,
    release_idle_memory,
    safetensors_mappings,
    trim_during_backward,
    written,
)

LINES = """\
7f0000000000-7f0000003000 rw-p 00000000 fe:00 11                         /models/frozen/model.safetensors
7f0000004000-7f0000006000 r--p 00001000 fe:00 12                         /models/a model/model.safetensors
7f0000008000-7f0000009000 rw-s 00000000 fe:00 13                         /models/shared/model.safetensors
7f000000c000-7f000000d000 r-xp 00000000 fe:00 15                         /usr/lib/libc.so.6
7f000000e000-7f000000f000 rw-p 00000000 00:00 0
7f0000010000-7f0000011000 rw-p 00000000 00:00 0                          [heap]
"""
# Bits 63, 62 and 61: resident, swapped out, a page of the file.
ABSENT, OF_FILE, COPIED, COPY_SWAPPED = 0, -(2**63) + 2**61 + 77, -(2**63) + 99, 2**62 + 5

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's list of mappings")


def test_private_mappings_of_safetensors_are_found():
    found = [Mapping(0x7F0000000000, 0x3000), Mapping(0x7F0000004000, 0x2000)]
    assert list(safetensors_mappings(LINES.splitlines())) == found


@pytest.mark.parametrize(
    ("entries", "resident", "dirty"),
    [
        ([OF_FILE, ABSENT, OF_FILE], 2, False),
        ([OF_FILE, ABSENT, COPIED], 2, True),
        ([ABSENT, COPY_SWAPPED], 0, True),
        ([ABSENT, ABSENT], 0, False),
    ],
)
def test_a_copied_page_marks_its_mapping_as_written(entries, resident, dirty):
    entries = torch.tensor(entries, dtype=torch.int64)
    assert int(present(entries).sum()) == resident
    assert written(entries) is dirty


@linux
def test_a_kernel_that_hides_its_pages_costs_memory_only(folder, monkeypatch, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model(torch.tensor([[3, 1]]))
    monkeypatch.setattr("rlhf.host_memory.PAGES", tmp_path / "missing")
    assert release_idle_memory(in_use=torch.nn.Identity()) == 0


@pytest.fixture
def folder(tmp_path):
    tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=4).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def resident(model) -> int:
    """Resident bytes of the mapping that shows this model's file."""
    address = next(p for n, p in model.named_parameters() if "up_proj" in n).data_ptr()
    mappings = safetensors_mappings(MAPS.read_text().splitlines())
    (own,) = (m for m in mappings if m.start <= address < m.start + m.size)
    return int(present(page_entries(own)).sum()) * mmap.PAGESIZE


@linux
def test_a_dropped_model_answers_as_before(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        before = model(ids).logits
    held = resident(model)
    assert held > 10_000_000
    assert release_idle_memory(in_use=model) == 0
    assert release_idle_memory(in_use=torch.nn.Identity()) >= held
    assert resident(model) == 0
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert resident(model) == held


@linux
def test_a_trained_weight_is_kept(folder):
    """Dropping a written page would bring the weight of the file back; one changed number keeps the whole mapping."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        weight[5, 7] = 42.0
    release_idle_memory(in_use=torch.nn.Identity())
    assert weight[5, 7].item() == 42.0


@linux
@pytest.mark.parametrize("rows", [8, 4], ids=["kept pass", "micro-batches"])
def test_the_update_runs_without_the_reference_in_memory(folder, rows):
    shares = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "num_mini_batches": 1}
    trainer = tiny_trainer(folder / "run", model=str(folder), max_steps=2, num_ppo_epochs=1, **shares)
    assert trainer.passes.keeps_graph is (rows == 8)
    reference, seen = trainer.passes.reference, []
    policy_scores, reference_scores = trainer.passes._policy_scores, trainer.passes._reference_scores

    def noted(*args, **kwargs):
        if torch.is_grad_enabled():
            seen.append(resident(reference))
        return policy_scores(*args, **kwargs)

    def used(*args, **kwargs):
        scores = reference_scores(*args, **kwargs)
        seen.append(resident(reference) > 10_000_000)
        return scores

    trainer.passes._policy_scores, trainer.passes._reference_scores = noted, used
    trainer.train()
    assert seen == ([True, 0] if rows == 8 else [True, True, 0, 0]) * 2


@linux
def test_the_heap_is_trimmed_as_gradients_are_made(folder, monkeypatch):
    """Peak memory of a backward pass is measured by the benchmark; here, that it is asked for in the right places."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    size, largest = sum(p.nbytes for p in trained), max(p.nbytes for p in trained)
    trim_during_backward(model, every=size // 5)
    made = []
    monkeypatch.setattr(
        "rlhf.host_memory.trim_heap", lambda: made.append(sum(p.nbytes for p in trained if p.grad is not None))
    )
    model(torch.tensor([[3, 1, 4]])).logits.sum().backward()
    assert 3 <= len(made) <= 5
    assert max(b - a for a, b in zip([0, *made], [*made, size], strict=True)) <= size // 5 + 2 * largest


@linux
def test_the_trainer_trims_in_the_first_micro_batch_of_an_update_only(tmp_path, monkeypatch):
    """Later ones add to gradients that are there: a trim would only take from the next what it is about to ask for."""
    asked = []

    def asks(module, wanted):
        trim_during_backward(module, every=2**10, wanted=lambda: asked.append((trainer.ppo_state.position, wanted())))

    monkeypatch.setattr("rlhf.trainer.trim_during_backward", asks)
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    # `position` counts the micro-batches of the rollout, this one included; 0 after the last.
    assert {position % 3 for position, _ in asked} == {0, 1, 2}
    assert all(wanted == (position % 3 == 1) for position, wanted in asked)


@linux
def test_small_gradients_are_not_worth_a_trim(folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trim_during_backward(model)
    monkeypatch.setattr("rlhf.host_memory.trim_heap", lambda: pytest.fail("trimmed for a few kilobytes"))
    model(torch.tensor([[3, 1, 4]])).logits.sum().backward()
    assert sum(p.nbytes for p in model.parameters()) < 2**26
