"""Few rows are read as 16, and nobody sees it but in the time."""

import pytest
import torch
from torch import nn

from rlhf.head_input import close_gaps, widen_few_rows

WIDTH, VOCABULARY = 7, 30


@pytest.fixture
def head():
    """A plain head, and one that fills up; the second notes how many rows reach it."""
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, VOCABULARY, bias=False)
    wide = nn.Linear(WIDTH, VOCABULARY, bias=False)
    wide.load_state_dict(plain.state_dict())
    widen_few_rows(wide)
    wide.seen = []
    wide.register_forward_pre_hook(lambda module, inputs: module.seen.append(inputs[0].shape[:-1].numel()))
    return plain, wide


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((5, 1), 5), ((6, 1), 16), ((15, 1), 16), ((3, 4), 16), ((9,), 16), ((16, 1), 16), ((40, 1), 40)],
)
def test_logits_are_those_of_the_rows_that_were_asked_for(head, shape, rows):
    plain, wide = head
    states = torch.randn(*shape, WIDTH)
    with torch.no_grad():
        logits = wide(states)
        torch.testing.assert_close(logits, plain(states))
    assert logits.shape == (*shape, VOCABULARY)
    assert wide.seen == [rows]


def test_training_other_dtypes_and_autocast_are_left_alone(head):
    plain, wide = head
    states = torch.randn(8, 1, WIDTH, requires_grad=True)
    wide(states).square().sum().backward()
    expected = states.grad.clone()
    states.grad = None
    plain(states).square().sum().backward()
    torch.testing.assert_close(states.grad, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert wide(states).shape == (8, 1, VOCABULARY)
    with torch.no_grad():
        wide.bfloat16()(states.bfloat16())
    assert wide.seen == [8, 8, 8]


def test_a_call_that_fails_does_not_shape_the_next(head):
    _, wide = head
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            wide(torch.randn(8, 1, WIDTH + 1))
        assert wide(torch.randn(20, 1, WIDTH)).shape == (20, 1, VOCABULARY)


def test_gaps_are_closed_and_the_rest_is_handed_on():
    states = torch.randn(4, 6, WIDTH)[:, -1:]
    assert not states.is_contiguous()
    closed, rest = close_gaps((states, "rest"))
    assert closed.is_contiguous()
    assert torch.equal(closed, states)
    assert rest == "rest"
