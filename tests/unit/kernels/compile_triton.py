"""Compiles every Triton kernel for a GPU that need not be here, as the forms would launch it.

The forms run on CPU tensors with each kernel replaced by a recorder, which turns the arguments of a launch into what
Triton's compiler wants to know of them. Run as ``python -m tests.unit.kernels.compile_triton 90``; ``--verbose``
prints the registers, spilled bytes and shared memory of each kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from tests.unit.kernels.triton_cases import RAGGED, Case, make_bounds, make_part
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvatlas.core.layout import BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import triton_path as blocks
from kvatlas.kernels.column_sums import triton_path as column_sums
from kvatlas.kernels.decode_attention import triton_path as decode_attention
from kvatlas.kernels.pool import BlockPool

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")
_SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


class Recorder:
    """Stands in for a kernel: compiles what is launched, each variant once."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability
        self.compiled: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 1 <= len(grid) <= 3 and all(size > 0 for size in grid)
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | constants
        assert list(given) == list(names) or set(given) == set(names), set(given) ^ set(names)
        signature, attributes = {}, {}
        for index, name in enumerate(names):
            value = given[name]
            if name in constants:
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                attributes[index,] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0 and not self.kernel.params[index].do_not_specialize:
                    attributes[index,] = [["tt.divisibility", 16]]
        key = repr((signature, constants, options, attributes))
        if key not in self.compiled:
            source = ASTSource(self.kernel, signature, constants, attributes)
            target = GPUTarget("cuda", self.capability, 32)
            self.compiled[key] = triton.compile(source, target=target, options=options)
            shared = self.compiled[key].metadata.shared
            assert shared <= _SHARED_LIMIT[self.capability], f"{self.kernel.__name__} wants {shared} bytes"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what to compile: a name, and a call that launches it."""
    all_options: dict[str, Any] = {"softcap": 2.0, "window": 40, "query_position": torch.tensor([69, 32])}
    for format, dtype in product(Format, (torch.bfloat16, torch.float32)):
        for key_dim, with_all in ((128, False), (256, False), (80, True)):
            if key_dim == 256 and dtype == torch.float32:
                continue
            case = Case((format,), (RAGGED,), dtype=dtype, key_dim=key_dim, value_dim=key_dim, hide_empty=with_all)
            options = all_options | {"sinks": torch.zeros(8), "need_mass": True} if with_all else {}
            yield f"decode {format} {dtype} {key_dim}", lambda c=case, o=options: _decode(c, o)
    slots = {"slots": torch.zeros(2, 2, 64, dtype=torch.int32)}
    yield "decode slots", lambda: _decode(Case((Format.BF16,), (RAGGED,), dtype=torch.bfloat16), slots)
    dense = Case((Format.INT4,), ([[70, 70], [70, 70]],), dtype=torch.bfloat16, dense_start=0)
    yield "decode dense", lambda: _decode(dense, {"window": 40, "query_position": torch.tensor([69, 32])})
    for format in Format:
        for width in (128, 42):
            yield f"blocks {format} {width}", lambda f=format, w=width: _blocks(f, w)
        for dtype in (torch.bfloat16, torch.float32):
            yield f"column sums {format} {dtype}", lambda f=format, t=dtype: _column_sums(f, t)


def _decode(case: Case, options: dict[str, Any]) -> None:
    part = make_part(case, 0, "cpu")
    q = torch.zeros(2, 8, case.key_dim, dtype=case.dtype)
    decode_attention.decode_attention(q, [part], scale=0.1, **options)


def _blocks(format: Format, width: int) -> None:
    layout = BlockLayout(key_dim=width, value_dim=width, format=format)
    pool = BlockPool(torch.zeros(2 * layout.block_bytes, dtype=torch.uint8), layout)
    ids, x = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 32, width, dtype=torch.bfloat16)
    blocks.encode_blocks(pool, ids, x, x)
    for dtype in (torch.bfloat16, torch.float32):
        blocks.read_keys(pool, ids.int(), dtype)
        blocks.read_values(pool, ids.int(), dtype)
    blocks.score_bounds(torch.zeros(2, 8, width, dtype=torch.bfloat16), make_bounds(width, "cpu"))


def _column_sums(format: Format, dtype: torch.dtype) -> None:
    for dense, options in ((None, {"window": 9, "reach": (4, 9), "softcap": 2.0}), (0, {})):
        part = make_part(Case((format,), (RAGGED,), key_dim=128, dense_start=dense), 0, "cpu")
        past = [replace(part, table=part.table[0], length=part.length[0])]
        q, k = torch.zeros(64, 8, 128, dtype=dtype), torch.zeros(64, 2, 128, dtype=dtype)
        column_sums.column_sums(q, k, torch.arange(64), torch.zeros(8, 64), past, scale=0.1, **options)


def _usage(kernel: Any) -> str:
    """Return registers and spilled bytes, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{word}:(\d+)", told) for word in ("REG", "STACK"))
    assert registers and stack
    return f"{registers[1]} registers, {stack[1]} bytes of stack, {kernel.metadata.shared} bytes shared"


def main() -> None:
    capability, verbose = int(sys.argv[1]), "--verbose" in sys.argv
    recorders = [
        (module, name, Recorder(getattr(module, name), capability))
        for module, names in (
            (decode_attention, ("attend_float", "attend_packed", "merge_runs", "sum_mass")),
            (blocks, ("encode_groups", "encode_tokens", "decode_blocks", "bound_scores")),
            (column_sums, ("sum_columns",)),
        )
        for name in names
    ]
    for module, name, recorder in recorders:
        setattr(module, name, recorder)
    for title, launch in launches():
        before = {key for _, _, recorder in recorders for key in recorder.compiled}
        launch()
        for _, name, recorder in recorders if verbose else ():
            for key in recorder.compiled.keys() - before:
                print(f"{title}: {name}: {_usage(recorder.compiled[key])}", flush=True)
    for _, name, recorder in recorders:
        assert recorder.compiled, f"{name} was never launched"
        print(f"sm_{capability}: {name}: {len(recorder.compiled)} variants")


if __name__ == "__main__":
    main()
