"""RocketKV's second stage: read the tokens whose pages score best in few dimensions (arXiv:2502.14051).

Each page of a few tokens keeps the maximum and the minimum of every key channel. Of a query only the channels that
weigh most are multiplied, each with the bound that its sign asks for; the softmax over pages, averaged over the query
heads of a KV head, says which tokens are read exactly. Half of the budget pays for that estimate, half for the reading.
Everything stays cached; the first stage of the paper drops tokens before (recipe ``rocketkv``).

Differs from the paper: the tokens of a page are a parameter, since what lies beside the cache has one size, where the
paper takes the square root of how many times more is cached than read, rounded up; the page of the newest token is
always read; tokens are read in whole pages. As in the authors' code, one sign and one set of channels hold for a group
of query heads, chosen by the sum and by the mean size of their queries.
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


@register(
    "rocket",
    StageInfo(
        summary="read the tokens whose pages score best in the query's largest channels",
        paper="arXiv:2502.14051",
        saves=(Saves.BANDWIDTH,),
        traits=Traits(keeps_all=True, prompt_shareable=True, query_agnostic=True),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Rocket(Attend):
    """Choose the tokens that a decode step reads, layer by layer.

    Args:
        budget: tokens whose traffic a step may cost a lane: half of it is read exactly, in whole pages.
        page: tokens of a page; it divides the block size. More of them make what is kept beside the keys smaller, and
            let the estimate look at more channels.
        dense: first layers that read everything.

    Raises:
        ConfigError: a number is out of range.
    """

    per: ClassVar[Per] = Per.SLOT

    budget: int = 512
    page: int = 4
    dense: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise ConfigError(f"rocket: page={self.page} is out of range; write a number of tokens, such as 4")
        if self.budget < 2 * self.page:
            raise ConfigError(f"rocket: budget={self.budget} is less than two pages of {self.page} tokens; raise it")
        if self.dense < 0:
            raise ConfigError(f"rocket: dense={self.dense} is out of range; write a number of layers, such as 0")

    @property
    def needs(self) -> tuple[Derived]:
        """Return the maxima of the key channels of each page, and of those channels negated."""
        return (Derived("pages", 2, unit="key_dim", dtype=None, every=self.page, label="bounds of key pages"),)

    def derive(self, name: str, tokens: TokenView) -> Tensor:
        """Return what a page of one token says: its key, and its key negated."""
        import torch  # strategies load without torch

        return torch.cat([tokens.keys(), -tokens.keys()], dim=-1)

    def merge(self, name: str, one: Tensor, other: Tensor) -> Tensor:
        """Return the greater of both."""
        import torch

        return torch.maximum(one, other)

    @property
    def dense_layers(self) -> int:
        """As asked for."""
        return self.dense

    @property
    def _pages(self) -> int:
        return self.budget // 2 // self.page

    def most_read(self, cached_tokens: int, group: int, block_size: int) -> int:
        """Return half of the budget in whole pages."""
        return min(cached_tokens, self._pages * self.page)

    def select(self, view: QueryView) -> Selection | None:
        """Return the tokens of the best pages, that of the newest token always among them."""
        import torch

        if int(view.length_RH.max()) <= self._pages * self.page:
            return None
        from kvatlas.kernels.choosing import choose_best

        assert view.newest_RH is not None
        pages, count = choose_best(self._scores(view), self._pages, view.newest_RH // self.page)
        slots = pages[..., None] * self.page + torch.arange(self.page, device=pages.device)
        index, length = slots.flatten(-2), view.length_RH.to(pages.device)[..., None]
        meant = torch.arange(index.shape[-1], device=pages.device) < count[..., None] * self.page
        # The last page may not be full: what is behind it is behind all others, too.
        return Selection(per=Per.SLOT, index_RHn=index, count_RH=(meant & (index < length)).sum(dim=-1))

    def _scores(self, view: QueryView) -> Tensor:
        """Return how much attention each page of a lane may get [R, H, P]; -inf where there is no page."""
        import torch

        from kvatlas.kernels.entries import dot_entries

        query, tiny = view.query_RHGD.float(), torch.finfo(torch.float32).tiny
        width, length = query.shape[-1], view.length_RH.to(query.device)
        positive = query.sum(dim=2) >= 0  # of the group, for every head of it
        order = query.abs().mean(dim=2).sort(dim=-1, descending=True, stable=True).indices
        count = (width * self.page * self.budget // length.clamp(min=1)).clamp(min=1, max=width)
        chosen = order.argsort(dim=-1) < count[..., None]
        # Of each channel the bound that its sign asks for: the maxima, or those of the channel negated.
        maxima, negated = (query * (chosen & positive)[:, :, None], -query * (chosen & ~positive)[:, :, None])
        signed = torch.cat([maxima, negated], dim=-1)
        seen = signed.abs().sum(dim=-1) / query.abs().sum(dim=-1).clamp(min=tiny)
        signed = signed * (view.scale * seen.clamp(min=tiny).rsqrt())[..., None]
        parts = [dot_entries(signed, part) for part in view.entries("pages")]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        weights = logits.softmax(dim=-1).mean(dim=2)
        return weights.nan_to_num(nan=0.0).masked_fill(logits[:, :, 0] == -torch.inf, -torch.inf)
