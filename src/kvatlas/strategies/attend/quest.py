"""Quest: read only the pages whose keys could matter to this query (arXiv:2406.10774).

Each block of a lane, a page, keeps the minimum and the maximum of every key channel. The largest score that any key
within these bounds could have is cheap to compute and never too small; the pages with the largest are read exactly.
Everything stays cached: what falls is the bytes read.

Differs from the paper: a page is a block of the cache, 32 tokens instead of 16; query heads that share a KV head share
its pages, chosen by the best of them, since their keys are read together; layers with a sliding window read all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvatlas.core.errors import ConfigError
from kvatlas.core.needs import Derived
from kvatlas.core.plan import Traits
from kvatlas.core.views import Selection
from kvatlas.core.vocabulary import Per, Saves
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Attend, StageInfo

if TYPE_CHECKING:
    from torch import Tensor

    from kvatlas.core.views import QueryView, TokenView

_LEAST_PAGES = 3


@register(
    "quest",
    StageInfo(
        summary="read the pages whose key bounds promise the highest scores",
        paper="arXiv:2406.10774",
        saves=(Saves.BANDWIDTH,),
        traits=Traits(keeps_all=True, prompt_shareable=True, query_agnostic=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Quest(Attend):
    """Choose the pages that a decode step reads, layer by layer.

    Args:
        budget: tokens that a lane's query heads read, in whole pages and at least three of them; the newest page is
            always among them.
        dense: first layers that read everything: their attention is spread widely.

    Raises:
        ConfigError: a number is out of range.
    """

    per: ClassVar[Per] = Per.BLOCK

    budget: int = 1024
    dense: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < 1:
            raise ConfigError(f"quest: budget={self.budget} is out of range; write a number of tokens, such as 1024")
        if self.dense < 0:
            raise ConfigError(f"quest: dense={self.dense} is out of range; write a number of layers, such as 2")

    @property
    def needs(self) -> tuple[Derived]:
        """Return the minima and the maxima of the key channels of each page."""
        return (Derived("bounds", 2, unit="key_dim", every=None, label="bounds of keys"),)

    def derive(self, name: str, tokens: TokenView) -> Tensor:
        """Return the bounds of a page of one token: its key, twice."""
        import torch  # strategies load without torch

        return torch.cat([tokens.keys()] * 2, dim=-1)

    def merge(self, name: str, one: Tensor, other: Tensor) -> Tensor:
        """Return the lesser minima and the greater maxima."""
        import torch

        (low, high), (lower, higher) = one.chunk(2, dim=-1), other.chunk(2, dim=-1)
        return torch.cat([torch.minimum(low, lower), torch.maximum(high, higher)], dim=-1)

    @property
    def dense_layers(self) -> int:
        """As asked for."""
        return self.dense

    def most_read(self, cached_tokens: int, group: int, block_size: int) -> int:
        """Return the budget in whole pages."""
        return min(cached_tokens, self._pages(block_size) * block_size)

    def _pages(self, block_size: int) -> int:
        return max(_LEAST_PAGES, self.budget // block_size)

    def select(self, view: QueryView) -> Selection | None:
        """Return the pages of the highest bounds, that of the newest token always among them."""
        import torch

        from kvatlas.kernels.blocks import score_bounds
        from kvatlas.kernels.choosing import choose_best

        parts, most = view.entries("bounds"), self._pages(view.block_size)
        columns = sum(part.table.shape[-1] for part in parts)
        if columns <= most:
            return None
        query = view.query_RHGD.flatten(1, 2)
        scores = [score_bounds(query, part) for part in parts]
        assert view.newest_RH is not None
        index, count = choose_best(
            scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1), most, view.newest_RH // view.block_size
        )
        return Selection(per=Per.BLOCK, index_RHn=index, count_RH=count)
