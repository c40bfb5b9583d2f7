"""Draw tokens from logits: each row's among its top-k and top-p tokens, all rows in one call."""

from __future__ import annotations

from torch import Tensor

from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.observed import observed
from kvatlas.kernels.sampling import native, reference, torch_path

__all__ = ["draw"]


@observed
def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Return the token of each row, int64 [B] on the CPU; -1 where there is none: a logit is NaN, or none is finite.

    Logits are divided by the temperature. Of the ``top_k`` most likely tokens, the fewest most likely ones are kept
    whose probabilities among them reach ``top_p``; of equally likely ones the first. The token is the one at which the
    distribution function of those that are kept, in order of their ids, passes ``uniform``.

    Args:
        logits: [B, V] float32.
        temperature: [B] float32, above 0.
        top_k: [B] int64; 0: all.
        top_p: [B] float64, in (0, 1].
        uniform: [B] float64, in [0, 1).
    """
    path = choose(logits.device, native=True)
    if path == "native":
        return native.draw(logits, temperature, top_k, top_p, uniform)
    form = reference.draw if path == "reference" else torch_path.draw
    return form(logits, temperature, top_k, top_p, uniform)
