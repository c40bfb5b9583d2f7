"""The native decoder layer; see ``src/native/kernels/layer.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvatlas.kernels.layer import LayerWeights, Linear, Norm
from kvatlas.kernels.native import Library, check, library
from kvatlas.kernels.small_linear.native import KvaLinear, describe


class KvaNorm(ctypes.Structure):
    """``kva_norm``."""

    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class KvaLayer(ctypes.Structure):
    """``kva_layer``."""

    _fields_ = (
        *((name, KvaLinear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, KvaNorm) for name in ("input_norm", "output_norm", "query_norm", "key_norm")),
        ("num_query_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
    )


class NativeLayer:
    """A layer bound to its weights, with as little as possible left to do in a call.

    Takes contiguous float32 in the memory of this process, and checks none of that; `queries` and `output` take at
    most 32 rows, in one batch: [1, M, ...].

    Args:
        layer: its weights, in the memory of this process; kept alive.
    """

    def __init__(self, layer: LayerWeights) -> None:
        self._layer = layer
        self._struct = KvaLayer(
            *(_linear(each) for each in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)),
            *(_norm(each) for each in (layer.input_norm, layer.output_norm, layer.query_norm, layer.key_norm)),
            layer.num_query_heads,
            layer.num_kv_heads,
            layer.head_dim,
        )
        self._address = ctypes.addressof(self._struct)
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        few = ctypes.c_int32, ctypes.c_int32
        self._queries = _function("kva_layer_queries", (pointer,) * 7 + few)
        self._output = _function("kva_layer_output", (pointer,) * 4 + few)
        self._norm_rows = _function("kva_norm_rows", (pointer,) * 3 + (count, count, ctypes.c_int32))
        self._turn_heads = _function("kva_turn_heads", (pointer,) * 5 + (count, ctypes.c_int32))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [1, M, Hq, D], k and v [1, M, H, D] of ``x`` [1, M, C], with ``cos`` and ``sin`` [1, M, D]."""
        layer, rows = self._layer, x.shape[1]
        q = x.new_empty((1, rows, layer.num_query_heads, layer.head_dim))
        k = x.new_empty((1, rows, layer.num_kv_heads, layer.head_dim))
        v = torch.empty_like(k)
        code = self._queries(
            self._address, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
            rows, torch.get_num_threads(),
        )  # fmt: skip
        check(code, "kva_layer_queries")
        return q, k, v

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output [1, M, C] of its input ``x`` and what its queries read, [1, M, Hq, D]."""
        out = torch.empty_like(x)
        code = self._output(
            self._address, x.data_ptr(), attended.data_ptr(), out.data_ptr(), x.shape[1], torch.get_num_threads()
        )
        check(code, "kva_layer_output")
        return out

    def input_norm(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., C], any number of rows, as the layer normalises it before its attention."""
        return self._norm(self._struct.input_norm, x)

    def output_norm(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., C], any number of rows, as the layer normalises it before its MLP."""
        return self._norm(self._struct.output_norm, x)

    def turn_heads(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Normalise, where the layer does so, and rotate projected q [1, M, Hq * D] and k [1, M, H * D] in place."""
        code = self._turn_heads(
            self._address, q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), q.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip
        check(code, "kva_turn_heads")

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        width = x.shape[-1]
        code = self._norm_rows(
            ctypes.addressof(norm), x.data_ptr(), out.data_ptr(), x.numel() // width, width, torch.get_num_threads()
        )
        check(code, "kva_norm_rows")
        return out


def _function(name: str, arguments: tuple[Any, ...]) -> Callable[..., int]:
    found = library()
    assert isinstance(found, Library)
    function = found.function(name)
    function.argtypes = arguments  # type: ignore[attr-defined]  # a ctypes function
    return function


def _linear(linear: Linear) -> KvaLinear:
    return describe(linear.weights, linear.bias)


def _norm(norm: Norm | None) -> KvaNorm:
    return KvaNorm(None, 0.0) if norm is None else KvaNorm(norm.weight.data_ptr(), norm.eps)
