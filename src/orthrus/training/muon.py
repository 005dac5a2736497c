"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al. 2024), for the weight matrices of small models.

torch.optim.Muon walks the matrices one by one, about a hundred small kernels each: for a model of 25 M parameters that
is a fifth of a step (counted, 56 matrices). Here matrices of one shape are stacked and go through one batched
iteration. The update is scaled to AdamW's size (0.2 * sqrt(max side), Liu et al. 2025), so learning rates carry over.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic of the original Newton-Schulz iteration: singular values go to about 1 in five steps."""


def orthogonalise(updates_BMN: Tensor, num_steps: int = 5) -> Tensor:
    """Each matrix's nearest semi-orthogonal matrix, roughly (singular values within about 0.7 .. 1.2). [B, M, N]."""
    tall = updates_BMN.shape[1] > updates_BMN.shape[2]
    x = updates_BMN.bfloat16().mT if tall else updates_BMN.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(updates_BMN.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix, with decoupled weight decay.

    Takes two-dimensional parameters only; `lr` is on AdamW's scale.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._step_shape(shape, params, group)

    def _step_shape(self, shape: torch.Size, params: list[Tensor], group: dict) -> None:
        grads_BMN = torch.stack([p.grad for p in params if p.grad is not None])
        state = self.state[params[0]]
        if "momentum_BMN" not in state:
            state["momentum_BMN"] = torch.zeros_like(grads_BMN)
        momentum_BMN = state["momentum_BMN"].lerp_(grads_BMN, 1 - group["momentum"])
        updates_BMN = orthogonalise(grads_BMN.lerp(momentum_BMN, group["momentum"]))
        scale = 0.2 * max(shape) ** 0.5 * group["lr"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates_BMN.unbind(0)), alpha=-scale)
