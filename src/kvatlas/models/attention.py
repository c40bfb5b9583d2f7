"""The attention function that transformers calls in our name: it hands queries, keys and values to a context.

A family's own attention module projects, normalises and rotates; what is left, reading the cache, is ours.
The current context travels in a context variable: some families (stablelm, nemotron) drop unknown kwargs.
Shapes: T packed tokens of all sequences, Hq query heads, H KV heads, Dk / Dv elements of a key / a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from kvatlas.core.errors import UnsupportedError

IMPLEMENTATION = "kvatlas"

HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""What families pass on beside an attention function's arguments, and what needs no answer from it."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One layer's attention, as its family asks for it.

    Args:
        layer: index into ``ModelShape.layers``, that is, in order of execution.
        scale: factor on q·k before the softmax.
        window: a query at position p sees positions > p - window; None for all earlier ones.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before masking; None for no cap.
        sinks: [Hq], logits of one extra column per head that takes probability and gives no value; or None.
    """

    layer: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


Foresee = Callable[[int, slice], tuple[AttentionCall, Tensor]]
"""Returns what a later layer would ask, and its queries [n, Hq, Dk], rotated, for some rows of the batch."""


class AttentionContext(Protocol):
    """Who answers the attention of one forward: it knows which sequence each packed token belongs to."""

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new keys and values of a layer and return what the queries read.

        Args:
            call: layer, scale, window, softcap, sinks.
            query: [1, Hq, T, Dk], rotated.
            key: [1, H, T, Dk], rotated, not repeated for GQA.
            value: [1, H, T, Dv].

        Returns:
            [1, T, Hq, Dv], in the dtype of ``query``.
        """
        ...


class WatchingContext(AttentionContext, Protocol):
    """A context that also wants to look at each layer's input, to foresee what a later layer will ask."""

    def before_layer(self, layer: int, foresee: Foresee) -> None:
        """Called before a layer's attention module runs.

        Args:
            layer: index into ``ModelShape.layers``.
            foresee: returns what another layer would ask if its input for some rows of the batch were this layer's.
        """
        ...


@dataclass
class Forward:
    """What one forward has done so far.

    Args:
        context: answers the calls.
        order: ``layer_idx`` of a module -> its place in the order of execution; None while that is observed.
        shows: shows a layer's input to the context where the layer's own attention module does not run; None: nobody
            wants to see it.
        called: ``layer_idx`` of each call, in order of execution.
        modules: the module of each call.
    """

    context: AttentionContext
    order: Mapping[int, int] | None = None
    shows: Callable[[int, Mapping[str, object]], None] | None = None
    called: list[int] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    def enter(self, module: nn.Module) -> int:
        """Note the call of a layer and return its index in order of execution."""
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            raise UnsupportedError(f"{type(module).__name__} attends without a layer_idx to cache under")
        if index in self.called:
            raise UnsupportedError(f"{type(module).__name__} of layer {index} attends twice in one forward")
        if self.order is not None and index not in self.order:
            raise UnsupportedError(f"{type(module).__name__} of layer {index} attends only in some forwards")
        self.called.append(index)
        self.modules.append(module)
        return len(self.called) - 1 if self.order is None else self.order[index]


def current() -> Forward | None:
    """Return the forward that runs on this thread, if one does."""
    return _CURRENT.get()


_CURRENT: ContextVar[Forward | None] = ContextVar("kvatlas_forward", default=None)


def register() -> None:
    """Make ``"kvatlas"`` a known attention implementation of transformers.

    No mask function is registered beside it: transformers then builds no mask at all, and a context owns
    causality, windows and packing. Registering twice changes nothing.
    """
    AttentionInterface.register(IMPLEMENTATION, _attention_forward)


@contextmanager
def running(forward: Forward) -> Iterator[Forward]:
    """Make ``forward`` the one that attention calls of this thread belong to."""
    token = _CURRENT.set(forward)
    try:
        yield forward
    finally:
        _CURRENT.reset(token)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return ([1, T, Hq, Dv], None) for a query [1, Hq, T, Dk]; the signature is transformers'."""
    forward = _CURRENT.get()
    if forward is None:
        raise UnsupportedError("this model is adapted: run it through kvatlas, or call kvatlas.detach(model) first")
    name = type(module).__name__
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise UnsupportedError(f"{name} is not causal; kvatlas runs causal language models only")
    if attention_mask is not None:
        raise UnsupportedError(f"{name} brings its own attention mask, which a cache of blocks cannot apply")
    if dropout:
        raise UnsupportedError(f"{name} asks for dropout {dropout}; call model.eval() first")
    _refuse_unknown(name, kwargs)
    _check_packed(name, query, key, value)
    call = AttentionCall(
        layer=forward.enter(module),
        scale=float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling),
        window=None if sliding_window is None else int(sliding_window),
        softcap=None if softcap is None else float(softcap),
        sinks=s_aux,
    )
    return forward.context.attend(call, query, key, value), None


def _refuse_unknown(name: str, kwargs: Mapping[str, object]) -> None:
    """Refuse arguments that could change the result: to ignore one would be to answer another question."""
    unknown = [key for key, given in kwargs.items() if given is not None and key not in HARMLESS]
    if unknown:
        unknown.sort()
        raise UnsupportedError(f"{name} passes {', '.join(unknown)} to attention, unknown to kvatlas")


def _check_packed(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse anything but one packed row whose keys are those of its own queries."""
    one_row = query.ndim == 4 and query.shape[0] == 1 and query.shape[2] == key.shape[2] == value.shape[2]
    if one_row and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0:
        return
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
    raise UnsupportedError(f"{name} does not attend over one packed row of new tokens: q, k, v are {shapes}")
