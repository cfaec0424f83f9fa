"""Memory given back between phases: only pages that the disk holds too, and only while nobody needs them."""

import sys

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from rlhf.host_memory import MAPS, clean_mappings, release_idle_memory

SMAPS = """\
7f0000000000-7f0000003000 rw-p 00000000 fe:00 11   /models/frozen/model.safetensors
Rss:                  12 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd wr mr
7f0000004000-7f0000006000 rw-p 00001000 fe:00 12   /models/a policy/model.safetensors
Rss:                   8 kB
Anonymous:             4 kB
Swap:                  0 kB
7f0000008000-7f0000009000 rw-s 00000000 fe:00 13   /models/shared/model.safetensors
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
7f000000a000-7f000000b000 rw-p 00000000 fe:00 14   /models/swapped/model.safetensors
Rss:                   0 kB
Anonymous:             0 kB
Swap:                  4 kB
7f000000c000-7f000000d000 r-xp 00000000 fe:00 15   /usr/lib/libc.so.6
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
7f000000e000-7f000000f000 rw-p 00000000 00:00 0
Rss:                   4 kB
Anonymous:             4 kB
Swap:                  0 kB
7f0000010000-7f0000011000 r--p 00000000 fe:00 16   /models/old kernel/model.safetensors
Rss:                   4 kB
7f0000012000-7f0000014000 r--p 00000000 fe:00 17   /models/b policy/model.safetensors
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's list of mappings")


def test_only_private_mappings_that_nobody_wrote_to_may_be_dropped():
    found = list(clean_mappings(SMAPS.splitlines()))
    assert [(m.start, m.size, m.path, m.resident) for m in found] == [
        (0x7F0000000000, 0x3000, "/models/frozen/model.safetensors", 12 * 1024),
        (0x7F0000012000, 0x2000, "/models/b policy/model.safetensors", 4 * 1024),
    ]


@pytest.fixture
def folder(tmp_path):
    tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=4).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def resident(model) -> int:
    """Resident bytes of the mapping that shows this model's file; 0 where a page of it was written to."""
    address = next(p for n, p in model.named_parameters() if "up_proj" in n).data_ptr()
    mappings = clean_mappings(MAPS.read_text().splitlines())
    return sum(m.resident for m in mappings if m.start <= address < m.start + m.size)


@linux
def test_a_dropped_model_answers_as_before(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        before = model(ids).logits
    held = resident(model)
    assert held > 10_000_000
    assert release_idle_memory() >= held
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
    release_idle_memory()
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
