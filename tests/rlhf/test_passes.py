"""Micro-batches by length and a forward pass used twice: fewer operations, the same numbers."""

import pytest
import torch
from tiny import logged, tiny_trainer
from transformers import TrainerCallback

from rlhf.critic import ActorCritic, CompletionScores
from rlhf.passes import ForwardPasses, bounds, micro_batches, score_rows

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def test_rows_of_similar_length_share_a_micro_batch_and_the_longest_come_first():
    lengths = torch.tensor([5, 9, 2, 7, 7])
    assert [part.tolist() for part in micro_batches(lengths, 2)] == [[1, 3], [4, 0], [2]]
    assert [part.tolist() for part in micro_batches(lengths, 2, by_length=False)] == [[0, 1], [2, 3], [4]]
    # A single one keeps the order of the rollout, which the kept forward pass relies on.
    assert [part.tolist() for part in micro_batches(lengths, 5)] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (["0011 1000", "0001 1100"], (2, 2)),
        (["1111 1111", "0001 1000"], (0, 4)),
        (["0001 0000", "0111 0000"], (1, 1)),  # no completion has a token: one column stays
    ],
)
def test_columns_that_hold_a_token(mask, expected):
    rows = [[digit == "1" for digit in row.replace(" ", "")] for row in mask]
    assert bounds(torch.tensor(rows), num_tokens=4) == expected


def test_scores_of_cut_batches_come_back_in_place():
    """Three rows, two micro-batches: every number is the id of its token, so that a misplaced one is seen."""
    ids = torch.tensor([[0, 11, 12, 13, 0, 0], [21, 22, 23, 24, 25, 26], [0, 0, 32, 33, 34, 0]])
    mask = ids > 0
    seen = []

    def forward(part, part_mask, num_tokens):
        assert torch.equal(part > 0, part_mask)
        seen.append((tuple(part.shape), num_tokens))
        tokens = part[:, -num_tokens:].float()
        return CompletionScores(tokens, None, -tokens)

    scores = score_rows(forward, ids, mask, num_tokens=3, batches=[torch.tensor([1]), torch.tensor([2, 0])])
    assert seen == [((1, 6), 3), ((2, 4), 2)]
    assert scores.logprobs.tolist() == [[13, 0, 0], [24, 25, 26], [33, 34, 0]]
    assert scores.entropy.tolist() == [[-13, 0, 0], [-24, -25, -26], [-33, -34, 0]]
    assert scores.values is None
    seen.clear()
    padded = score_rows(forward, ids, mask, num_tokens=3, batches=[torch.tensor([1]), torch.tensor([2, 0])], cut=False)
    assert seen == [((1, 6), 3), ((2, 6), 3)]
    assert torch.equal(padded.logprobs, scores.logprobs)


class Gradients(TrainerCallback):
    """The gradient of the first optimiser step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(folder, monkeypatch, *, keep: bool | None = None, **settings):
    """A short run: first gradient, weights, shapes of all forward passes, log."""
    shapes, forward = [], ActorCritic.forward

    def counted(module, input_ids, *args, **kwargs):
        shapes.append((tuple(input_ids.shape), torch.is_grad_enabled()))
        return forward(module, input_ids, *args, **kwargs)

    gradients = Gradients()
    with monkeypatch.context() as patch:
        patch.setattr(ActorCritic, "forward", counted)
        trainer = tiny_trainer(folder, callbacks=[gradients], max_steps=2, max_completion_length=12, **settings)
        if keep is not None:
            trainer.passes.keeps_graph = keep
        trainer.train()
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return gradients.first, weights, shapes, trainer


def test_one_forward_pass_serves_collection_and_update_bit_for_bit(tmp_path, monkeypatch):
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_ppo_epochs": 1,
        "entropy_coef": 0.01,
        "critic_warmup_rollouts": 1,
    }
    once = train(tmp_path / "once", monkeypatch, **settings)
    twice = train(tmp_path / "twice", monkeypatch, keep=False, **settings)
    # Two rollouts: policy and reference each, and without the kept graph the update besides.
    assert [grad for _, grad in once[2]] == [False, True] * 2
    assert [grad for _, grad in twice[2]] == [False, False, True] * 2
    for part in (0, 1):
        assert once[part].keys() == twice[part].keys()
        for name, tensor in once[part].items():
            assert torch.equal(tensor, twice[part][name]), name
    for name in ("loss", "policy/entropy", "kl/reference", "critic/loss"):
        assert logged(once[3], name) == logged(twice[3], name), name


@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation_steps": 2}, {"num_mini_batches": 2}, {"disable_dropout": False}],
    ids=["micro-batches", "mini-batches", "dropout"],
)
def test_no_graph_is_kept_where_the_update_differs(tmp_path, settings):
    one = {"gradient_accumulation_steps": 1, "num_mini_batches": 1}
    assert tiny_trainer(tmp_path / "a", **one).passes.keeps_graph
    assert not tiny_trainer(tmp_path / "b", **(one | settings)).passes.keeps_graph


def test_micro_batches_by_length_have_the_gradient_of_padded_ones(tmp_path, monkeypatch):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_ppo_epochs": 2,
        "generation_kwargs": GREEDY,
        "whiten_rewards": True,
    }
    runs = {
        aware: train(tmp_path / str(aware), monkeypatch, length_aware=aware, **settings) for aware in (True, False)
    }
    columns = {aware: sum(rows * width for (rows, width), _ in runs[aware][2]) for aware in runs}
    assert columns[True] < 0.9 * columns[False], "the case is only tested when padding is cut"
    # Off means padded: every pass of a rollout is as wide as its longest row.
    of_rollout = len(runs[False][2]) // 2
    for start in (0, of_rollout):
        assert len({width for (_, width), _ in runs[False][2][start : start + of_rollout]}) == 1
    for name, gradient in runs[False][0].items():
        torch.testing.assert_close(runs[True][0][name], gradient, atol=1e-6, rtol=1e-5)
    for name, tensor in runs[False][1].items():
        # Adam divides by the root of tiny squares, which magnifies the last digit of a gradient near zero.
        torch.testing.assert_close(runs[True][1][name], tensor, atol=2e-5, rtol=0)
    changed = [not torch.equal(runs[True][0][name], gradient) for name, gradient in runs[False][0].items()]
    assert any(changed), "the two ways must be two ways"


def test_an_update_never_uses_the_pass_of_another_rollout(tmp_path):
    """Evaluation between rollouts runs the policy too, and must neither keep nor consume a graph."""
    trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=1)
    trainer.model_wrapped = trainer.model
    passes: ForwardPasses = trainer.passes
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        kept, _ = passes.collect(ids, mask, 2, 1)
        passes.without_graph(ids + 1, mask, 2)
    first = passes.for_update(ids, mask, 2, 1)
    assert first.logprobs.requires_grad
    assert torch.equal(first.logprobs, kept.logprobs)
    second = passes.for_update(ids + 1, mask, 2, 1)
    assert not torch.equal(second.logprobs, first.logprobs)
