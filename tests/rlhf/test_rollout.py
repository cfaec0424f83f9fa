"""Prompts, sampling and the order in which prompts are visited."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from tiny import logged, tiny_tokenizer, tiny_trainer

from rlhf.rollout import CompletionFiles, Rollout, RolloutSampler, completions_of, left_pad, tokenize_prompts

PAD, EOS = 0, 1


def sampler(num_prompts=7, *, epoch=0, seed=5, block=3, num_generations=2, repeats=2, weights=None):
    return RolloutSampler(
        num_prompts,
        block=block,
        num_generations=num_generations,
        repeats=repeats,
        seed=seed,
        epoch=lambda: epoch,
        weights=weights,
    )


def test_sampler_repeats_each_block_for_every_micro_batch():
    # 7 prompts in blocks of 3: two blocks, the seventh prompt waits for the next epoch.
    assert list(sampler(seed=None)) == [0, 0, 1, 1, 2, 2] * 2 + [3, 3, 4, 4, 5, 5] * 2
    assert len(sampler()) == len(list(sampler())) == 24


def test_sampler_visits_every_prompt_once_a_shuffled_epoch():
    order = list(sampler(6, num_generations=1, repeats=1))
    assert sorted(order) == list(range(6))
    assert order != list(range(6))


def test_sampler_order_depends_on_seed_and_epoch_alone():
    assert list(sampler()) == list(sampler())
    assert list(sampler(epoch=1)) != list(sampler(epoch=0))
    assert list(sampler(seed=6)) != list(sampler(seed=5))
    # What a resumed run asks for: the second epoch without having walked through the first.
    current = {"epoch": 0}
    walking = RolloutSampler(7, block=3, num_generations=2, repeats=2, seed=5, epoch=lambda: current["epoch"])
    list(walking)
    current["epoch"] = 1
    assert list(walking) == list(sampler(epoch=1))


def test_weighted_sampler_draws_prompts_in_proportion():
    # Weights of mean 2 and blocks of 3 of 6: a prompt of weight w is expected w / 4 times in a block.
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 1.0])
    counts, blocks = torch.zeros(6), 0
    for epoch in range(1000):
        order = list(sampler(6, epoch=epoch, weights=weights, num_generations=1, repeats=1))
        for block in (order[:3], order[3:]):
            blocks += 1
            counts += torch.bincount(torch.tensor(block), minlength=6)
            # At most ceil(5/4) = 2 times the heaviest, every other prompt at most once.
            assert max(block.count(i) for i in range(6) if i != 4) <= 1
            assert 1 <= block.count(4) <= 2
    # A systematic sample varies less than a binomial one, whose standard deviation is at most sqrt(3 / 4 / 2000).
    assert (counts / blocks).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1.25, 0.25], abs=0.05)
    assert counts[0] == 0


def test_weighted_sampler_repeats_blocks_and_depends_on_seed_and_epoch_alone():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    order = list(sampler(weights=weights))
    assert order == list(sampler(weights=weights))
    assert order != list(sampler(weights=weights, epoch=1))
    assert order != list(sampler(weights=weights, seed=6))
    assert len(order) == len(sampler(weights=weights)) == 24
    for start in (0, 12):
        assert order[start : start + 6] == order[start + 6 : start + 12]
        assert order[start : start + 6 : 2] == order[start + 1 : start + 6 : 2]


def test_equal_weights_never_draw_a_prompt_twice_into_a_block():
    for epoch in range(50):
        order = list(sampler(9, epoch=epoch, weights=torch.ones(9), num_generations=1, repeats=1))
        assert all(len(set(order[i : i + 3])) == 3 for i in (0, 3, 6))


def test_left_pad_builds_the_mask_from_lengths():
    ids, mask = left_pad([[4, PAD, 6], [7], [8, 9]], pad_id=PAD)
    assert ids.tolist() == [[4, 0, 6], [0, 0, 7], [0, 8, 9]]
    # The pad id inside the first prompt is a real token.
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]


def test_completions_keep_their_ids_and_drop_special_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer(["the red film"], return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[EOS, PAD]])], dim=1)
    mask = torch.tensor([[True, True, True, True, False]])
    texts, kept = completions_of(ids, mask, tokenizer, conversational=False)
    assert texts == ["the red film"]
    assert kept == [ids[0, :4].tolist()]
    messages, _ = completions_of(ids, mask, tokenizer, conversational=True)
    assert messages == [[{"role": "assistant", "content": "the red film"}]]


def test_plain_prompts_are_tokenized_as_they_are():
    tokenizer = tiny_tokenizer()
    assert tokenize_prompts(["the film", "a"], tokenizer) == [
        tokenizer.convert_tokens_to_ids(["the", "film"]),
        tokenizer.convert_tokens_to_ids(["a"]),
    ]
    assert tokenize_prompts([], tokenizer) == []


def test_rollout_rows_and_state():
    columns = {
        name: torch.arange(6.0).reshape(3, 2)
        for name in ("input_ids", "attention_mask", "completion_mask", "old_logprobs", "ref_logprobs", "values")
    }
    rollout = Rollout(
        finished=torch.tensor([True, False, True]),
        advantages=columns["values"],
        returns=columns["values"],
        scores=torch.tensor([0.5, 1.5, math.nan]),
        **columns,
    )
    part = rollout.rows(torch.tensor([2, 0]))
    assert part.values.tolist() == [[4, 5], [0, 1]]
    assert part.finished.tolist() == [True, True]
    again = Rollout(**rollout.state_dict())
    assert torch.equal(again.returns, rollout.returns)


@pytest.mark.parametrize("block", [8, 9])
def test_fewer_prompts_than_a_block_give_no_rollout(block):
    assert list(sampler(7, block=block)) == []
    assert len(sampler(7, block=block)) == 0


def test_completions_that_find_no_room_cost_no_step(tmp_path, monkeypatch):
    """The disk is full from the second rollout on, after half of the file, and has room again for the last."""
    write_text, rollouts = Path.write_text, []

    def full(path, text, **options):
        if path.parent.name != "completions":
            return write_text(path, text, **options)
        rollouts.append(path)
        if len(rollouts) in (2, 3):
            write_text(path, text[: len(text) // 2])
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    trainer = tiny_trainer(
        tmp_path, log_completions=True, num_ppo_epochs=1, max_steps=4, save_strategy="steps", save_steps=2
    )
    with pytest.warns(UserWarning, match="completions of step 1 could not be written .*No space left") as caught:
        trainer.train()
    assert len([warning for warning in caught if "could not be written" in str(warning.message)]) == 1
    assert len(logged(trainer, "loss")) == 4
    assert (tmp_path / "checkpoint-4").is_dir()
    files = {path.name: path for path in (tmp_path / "completions").iterdir()}
    assert set(files) == {"step_000000_rank_0.jsonl", "step_000003_rank_0.jsonl"}
    rows = [json.loads(line) for line in files["step_000003_rank_0.jsonl"].read_text().splitlines()]
    assert len(rows) == 8
    assert set(rows[0]) == {"prompt", "completion", "score"}


def test_a_file_where_the_folder_of_completions_belongs_is_named(tmp_path):
    (tmp_path / "completions").write_text("mine")
    files = CompletionFiles(tmp_path / "completions", 0)
    with pytest.warns(UserWarning, match="File exists: '.*completions'"):
        files.write(3, ["a"], ["\ud800"], torch.tensor([1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.write(4, ["a"], ["b"], torch.tensor([1.0]))
    assert (tmp_path / "completions").read_text() == "mine"
