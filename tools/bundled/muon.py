"""Muon: momentum, orthogonalised by Newton-Schulz, for weight matrices (Keller Jordan, 2024).

Differs from ``torch.optim.Muon``: float32 throughout (bfloat16 is slow on CPU), equal shapes in one batch.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Steps each matrix along its orthogonalised Nesterov momentum.

    Args:
        matrices: parameters [m, n].
        lr: step size; the update of an [m, n] matrix has spectral norm about ``lr * max(1, m / n) ** 0.5``.
        momentum: decay of the running gradient, in [0, 1).
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient; closures are not supported."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                updates = orthogonalise(torch.stack([self._momentum(m, group["momentum"]) for m in matrices]))
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.sub_(update, alpha=size)

    def _momentum(self, matrix: Tensor, decay: float) -> Tensor:
        """Advance the running gradient of ``matrix`` and return its Nesterov look-ahead."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if "running" not in state:
            state["running"] = torch.zeros_like(matrix)
        state["running"].lerp_(matrix.grad, 1 - decay)
        return matrix.grad.lerp(state["running"], decay)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return [N, m, n] matrices with the singular vectors of ``matrices`` and singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x: Tensor = matrices if wide else matrices.mT
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
