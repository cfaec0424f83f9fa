"""What a language-model head is handed: its states in one piece, and never a number of rows for which it is slow."""

import torch
from torch import Tensor, nn

# Float32 products of fewer rows with a matrix as wide as a vocabulary take another kernel of the CPU's library: with
# 49,152 tokens and 576 states 15 rows took 16 ms, 16 rows 6, 5 rows 6.
FEW_ROWS, ENOUGH_ROWS = 6, 16


def close_gaps(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a head, its states in one piece.

    It is asked for some positions only, a slice of all states with gaps between rows. For such an input torch copies
    the weight of a frozen head once for every row: 1.8 GB for 16 rows of a vocabulary of 49,152 and 576 states.
    """
    return (inputs[0].contiguous(), *inputs[1:])


def widen_few_rows(head: nn.Module) -> None:
    """Fill 6 to 15 rows up to 16 with zeros, and drop their logits; in place.

    On CPUs, in float32 and without gradients: decoding whose rows have mostly ended. The other rows keep their logits
    but for rounding, as in any batch of another size.
    """
    shape: list[torch.Size | None] = [None]

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        states = inputs[0]
        rows = states.shape[:-1].numel()
        narrow = FEW_ROWS <= rows < ENOUGH_ROWS and states.dtype == torch.float32 and states.device.type == "cpu"
        if not narrow or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            shape[0] = None
            return None
        shape[0] = states.shape[:-1]
        wide = states.new_zeros(ENOUGH_ROWS, states.shape[-1])
        wide[:rows] = states.reshape(rows, -1)
        return (wide, *inputs[1:])

    def after(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> Tensor | None:
        asked, shape[0] = shape[0], None
        return None if asked is None else logits[: asked.numel()].view(*asked, -1)

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)
