"""RoPE that depends on the length of a sequence, kept correct when sequences are packed.

``dynamic`` NTK and ``longrope`` choose their frequencies from the largest position of the *whole batch*, and
dynamic modules remember the last choice. So a packed batch may hold sequences of one regime only, and the
regime must come from the caller: the whole prompt's length even while its first chunk runs, so that chunked
equals whole.

Keys keep the rotation that they were cached with, as in transformers' ``generate``, which therefore differs from a
forward without a cache once an output passes the limit (Llama with longrope or dynamic NTK). Some families do not
leave it at that: their ``prepare_inputs_for_generation`` drops the cache there and computes all tokens anew (Phi-3,
PhiMoE, Phi-4 multimodal). They are asked, and their caches renewed (`LengthRope.renewed_at`). Phi-4 multimodal, and in
older releases of transformers all of them, then run the last token alone, which is a mistake of theirs: right is the
forward without a cache.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from kvatlas.core.errors import ConfigError, UnsupportedError


class LengthRope:
    """The rotary modules of a model whose frequencies depend on length; empty for most models.

    The modules are left as they are. A hook appends one dummy position, ``tokens - 1``, which makes the
    family's own code choose the frequencies of that length; a second hook drops the dummy's row again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if _length_types(module)]
        limits = {_limit(module, *pair) for module in self._modules for pair in _length_types(module)}
        self._renewing = sorted(limit for limit in limits if _drops_cache(model, limit))
        self._handles: list[RemovableHandle] = []
        self._tokens: int | None = None

    def regime(self, total_tokens: int) -> Hashable:
        """Return what the frequencies of a sequence of this length depend on; None if nothing does."""
        if not self._modules:
            return None
        return tuple(
            _regime(module, layer_type, rope_type, total_tokens)
            for module in self._modules
            for layer_type, rope_type in _length_types(module)
        )

    def renewed_at(self, began: int, tokens: int) -> int | None:
        """Return the length, tokens, at which a cache is computed anew on the way to ``tokens``; None: nowhere.

        Args:
            began: length of the prompt that the cache began with.
            tokens: length of the sequence, the next token to be processed included.
        """
        return max((limit + 1 for limit in self._renewing if began <= limit < tokens), default=None)

    @property
    def stretch(self) -> float:
        """How many times the positions that the configuration names a sequence may have: dynamic NTK goes on there."""
        pairs = [(module, *pair) for module in self._modules for pair in _length_types(module)]
        factors = (_parameters(module, key).get("factor") for module, key, name in pairs if "dynamic" in name)
        return min((factor or 1.0 for factor in factors), default=1.0)

    def install(self) -> None:
        """Hook the rotary modules; `remove` undoes it."""
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._append_dummy, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._drop_dummy))

    def remove(self) -> None:
        """Take the hooks away and give the modules back their first frequencies."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._modules:
            _reset(module)

    @contextmanager
    def length(self, tokens: int | None, position_ids: Tensor) -> Iterator[None]:
        """Let the modules choose their frequencies for ``tokens`` while the block runs.

        Args:
            tokens: length in tokens that decides the regime; ignored by models that have none.
            position_ids: [T], the positions about to run.

        Raises:
            ConfigError: the model needs a length and got none, or one of another regime than its positions.
        """
        if not self._modules:
            yield
            return
        self._tokens = self._checked(tokens, int(position_ids.max()) + 1)
        for module in self._modules:
            _reset(module)
        try:
            yield
        finally:
            self._tokens = None

    def _checked(self, tokens: int | None, reached: int) -> int:
        if tokens is None:
            raise ConfigError("the RoPE of this model depends on the sequence length; pass rope_tokens")
        if reached > tokens and self.regime(reached) != self.regime(tokens):
            raise ConfigError(
                f"position {reached - 1} is not of the RoPE regime of rope_tokens={tokens}; batch it apart"
            )
        return tokens

    def _append_dummy(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._tokens is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._longer(kwargs["position_ids"])}
        return (args[0], self._longer(args[1]), *args[2:]), kwargs

    def _longer(self, position_ids: Tensor) -> Tensor:
        assert self._tokens is not None
        return nn.functional.pad(position_ids, (0, 1), value=self._tokens - 1)

    def _drop_dummy(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._tokens is None:
            return None
        if isinstance(output, Tensor):
            return output[..., :-1, :]
        return tuple(part[..., :-1, :] for part in output)


def _length_types(module: nn.Module) -> list[tuple[str | None, str]]:
    """Return the (layer type or None, RoPE type) pairs of a rotary module that depend on length."""
    rope_type = getattr(module, "rope_type", None)
    pairs = rope_type.items() if isinstance(rope_type, dict) else [(None, rope_type)]
    return [(key, name) for key, name in pairs if isinstance(name, str) and ("dynamic" in name or name == "longrope")]


def _regime(module: nn.Module, layer_type: str | None, rope_type: str, total_tokens: int) -> Hashable:
    """Return "short" up to the original maximum; beyond it "long", or the exact length for dynamic NTK."""
    if total_tokens <= _limit(module, layer_type, rope_type):
        return "short"
    return "long" if rope_type == "longrope" else total_tokens


def _limit(module: nn.Module, layer_type: str | None, rope_type: str) -> int:
    """Return the longest sequence, in tokens, that is rotated with the original frequencies."""
    if rope_type != "longrope":
        original = module.original_max_seq_len
        assert isinstance(original, int)
        return original
    limit = _parameters(module, layer_type).get("original_max_position_embeddings")
    if not isinstance(limit, int):
        raise UnsupportedError(f"{type(module).__name__}: longrope without original_max_position_embeddings")
    return limit


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = getattr(module.config, "rope_parameters", None) or {}
    return parameters[layer_type] if layer_type else parameters


class _Reached(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Stands for a cache of some tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__(layers=[])
        self._tokens = tokens

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens."""
        return self._tokens


def _drops_cache(model: Any, limit: int) -> bool:
    """Whether the family's ``generate`` gives its cache up for the first token beyond ``limit``, by asking it."""
    if not model.can_generate():
        return False
    ids = torch.zeros(1, limit + 1, dtype=torch.int64, device=model.device)
    inputs = model.prepare_inputs_for_generation(
        ids, past_key_values=_Reached(limit), next_sequence_length=1, use_cache=True
    )
    return inputs.get("past_key_values") is None


def _reset(module: nn.Module) -> None:
    """Forget the length that a dynamic module saw last: its own reset misses lengths near the limit."""
    for layer_type, rope_type in _length_types(module):
        if "dynamic" not in rope_type:
            continue
        prefix = f"{layer_type}_" if layer_type else ""
        original = getattr(module, f"{prefix}original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        if not torch.equal(original.to(current.device), current):
            setattr(module, f"{prefix}inv_freq", original.to(current.device).clone())
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
