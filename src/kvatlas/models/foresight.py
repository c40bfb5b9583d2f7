"""What a later layer would ask if its input were this layer's: its own module runs up to the attention call.

So projections, biases, norms of queries and RoPE are the family's own code, whatever the family.
Shapes: T packed tokens, n rows of them; Hq, Dk as in `kvatlas.models.attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvatlas.core.errors import UnsupportedError
from kvatlas.models.attention import AttentionCall, Forward, current, running


class _AskedError(Exception):
    """Ends a module's forward once its queries are known."""


class _Catcher:
    """An attention context that keeps the queries and lets nothing follow."""

    asked: tuple[AttentionCall, Tensor] | None = None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.asked = call, query
        raise _AskedError


class Foresight:
    """Hooks on the attention modules of a model that show each layer's input to a watching context.

    Args:
        modules: attention modules in order of execution.
        order: ``layer_idx`` of a module -> its place in that order.
    """

    def __init__(self, modules: Sequence[nn.Module], order: Mapping[int, int]) -> None:
        self._modules = modules
        self._order = order
        self._handles: list[RemovableHandle] = []

    @property
    def installed(self) -> bool:
        """Whether inputs are shown."""
        return bool(self._handles)

    def install(self) -> None:
        """Hook the modules, once."""
        if not self._handles:
            self._handles = [
                module.register_forward_pre_hook(_Hook(self, layer), with_kwargs=True)
                for layer, module in enumerate(self._modules)
            ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def show(self, layer: int, kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> None:
        """Show the input of a layer's attention module to the context of the current forward, if it watches."""
        forward = current()
        watch = getattr(forward.context, "before_layer", None) if forward is not None else None
        if watch is not None:
            watch(layer, lambda target, rows: self._foresee(target, rows, args, kwargs))

    def _foresee(
        self, target: int, rows: slice, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[AttentionCall, Tensor]:
        catcher = _Catcher()
        module = self._modules[target]
        tokens = _num_tokens(args, kwargs)
        try:
            with running(Forward(context=catcher, order=self._order)):
                module(*_cut(args, tokens, rows), **_cut(kwargs, tokens, rows))
        except _AskedError:
            pass
        if catcher.asked is None:
            raise UnsupportedError(f"{type(module).__name__} did not attend; its queries cannot be foreseen")
        call, query = catcher.asked
        return call, query[0].transpose(0, 1)


class _Hook:
    """Shows the input of a module that runs; one that a native layer stands for, the layer shows itself."""

    bypassed = True

    def __init__(self, foresight: Foresight, layer: int) -> None:
        self._foresight, self._layer = foresight, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._foresight.show(self._layer, kwargs, args)


def _num_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise UnsupportedError("an attention module takes no hidden states [1, T, C]; its queries cannot be foreseen")
    return hidden.shape[1]


def _cut(value: Any, tokens: int, rows: slice) -> Any:
    """Return ``value`` with every packed row [1, T, ...] in it cut to ``rows``."""
    if isinstance(value, Tensor):
        packed = value.ndim >= 2 and value.shape[0] == 1 and value.shape[1] == tokens
        return value[:, rows] if packed else value
    if isinstance(value, tuple | list):
        return type(value)(_cut(each, tokens, rows) for each in value)
    if isinstance(value, dict):
        return {key: _cut(each, tokens, rows) for key, each in value.items()}
    return value
