"""The trained weights in fp32, the computation in the base's dtype.

A step of Adam at a learning rate of 2e-4 moves a weight of size 1 by less than bf16 can tell apart (2^-8), so a view
trained in bf16 weights alone stops learning early. The trained twins are therefore fp32 parameters: gradients of all
micro-batches add up in fp32, and the optimiser sees nothing else. Each pass casts them to the dtype of the frozen base,
so what is computed is bit for bit what decoding computes with the view that is saved.

Autocast would do the same for projections, but would also run the frozen base in other dtypes than inference does.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthrus.model.attention import TWINS
from orthrus.model.modeling import OrthrusLM


class MasterLinear(nn.Linear):
    """A projection whose weights may be of a wider dtype than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """The projection in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> "MasterLinear":
        """The same projection with fp32 parameters."""
        wide = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        wide.weight = nn.Parameter(linear.weight.detach().float())
        if linear.bias is not None:
            wide.bias = nn.Parameter(linear.bias.detach().float())
        return wide


def keep_masters(model: OrthrusLM) -> None:
    """Make the view's parameters fp32, in place, and the only ones that are trained. The base keeps its dtype."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in TWINS:
            twin = getattr(attention, f"{name}_diff", None)
            if isinstance(twin, nn.Linear) and twin.weight.dtype != torch.float32:
                setattr(attention, f"{name}_diff", MasterLinear.of(twin))
            elif twin is not None:
                twin.float()
    for parameter in model.view_parameters().values():
        parameter.requires_grad_(True)
