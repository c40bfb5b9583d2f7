"""Keep the tokens whose keys are short: queries attend to them most (arXiv:2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import kvatlas

if TYPE_CHECKING:
    from torch import Tensor


@kvatlas.register("own_knorm", summary="tokens whose keys have the smallest norm", paper="arXiv:2406.11430")
@dataclass(frozen=True, kw_only=True)
class Knorm(kvatlas.Keep):
    """Keep ``budget`` tokens per KV head: an integer counts tokens, a fraction in (0, 1] is of the prompt."""

    budget: int | float = 0.5

    def limits(self, prompt_tokens: int) -> kvatlas.Limits:
        return kvatlas.Limits.steady(kvatlas.tokens_of(self.budget, prompt_tokens))

    def scores(self, view: kvatlas.LaneView) -> Tensor:
        return -view.keys().norm(dim=-1)
