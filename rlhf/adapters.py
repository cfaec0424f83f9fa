"""LoRA layers with fewer operations than PEFT's, for sampling and for training."""

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear


class FusedLoraLinear(LoraLinear):
    """A linear layer and its low-rank update, added by the matrix product itself.

        y = x Wᵀ + b + s (x Aᵀ) Bᵀ,  s the scaling

    PEFT computes the update as a table of the size of y, scales it, adds it to y and casts the sum; here `addmm` adds
    it in place. Products are made in the dtype of x. In float32 only the order of sums differs. On bfloat16 weights,
    PEFT without autocast keeps the update in float32; here it is rounded as PEFT under autocast rounds it, to three
    digits of A, B, x Aᵀ and of their gradients (`tests/rlhf/test_adapters.py` measures both against float64).

    Whatever is not one plain, trained or frozen, low-rank update takes PEFT's own way: an adapter that is off or
    merged, several adapters, active dropout, DoRA and its kin, biases of the update, hooks on the parts.
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., in) -> (..., out)."""
        if args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base = self.base_layer
        rows = x.reshape(-1, x.shape[-1])
        outputs = linear(rows, base.weight, base.bias)
        # Under autocast the product above has a narrower dtype than x.
        narrow, down, up = (
            part.to(outputs.dtype) for part in (rows, self.lora_A[name].weight, self.lora_B[name].weight)
        )
        outputs = outputs.addmm_(linear(narrow, down), up.t(), alpha=self.scaling[name])
        return outputs.view(*x.shape[:-1], -1)

    def _is_plain(self) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        dropout = self.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            return False
        parts = (self.base_layer, self.lora_A[name], self.lora_B[name])
        return not any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)


def fuse_adapters(model: nn.Module) -> int:
    """Let the LoRA layers of a model on plain linear layers compute as `FusedLoraLinear`; the rest stay as they are.

    Weights, names and what is saved do not change. Not for weights that a launch shards (ZeRO-3, FSDP): they are
    gathered around the calls of the parts, which a fused layer does not make.

    Args:
        model: changed in place.

    Returns:
        How many layers were fused.
    """
    fused = 0
    for layer in model.modules():
        if type(layer) is LoraLinear and type(layer.base_layer) is nn.Linear:
            # A class and not a new `forward` of the instance, which a deep copy would share with the original.
            layer.__class__ = FusedLoraLinear
            fused += 1
    return fused
