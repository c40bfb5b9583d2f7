"""Decode attention in every format beside torch's attention, at one shape and number of threads.

Forms: ours over paged blocks, as the engine calls it; torch's ``scaled_dot_product_attention`` over contiguous bfloat16
as a user calls it (``enable_gqa``) and in its best form (the query heads of a KV head packed as rows, no mask); the
same after gathering the pages, as a paged cache without a kernel must; and our own torch form. The best torch form is
whichever of torch's is fastest in the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvatlas.bench.machine import READ_BYTES, Limits, limit_forms, limits_of, memory_to_use
from kvatlas.bench.paged import Content, Lanes
from kvatlas.bench.timing import Timing, take_turns
from kvatlas.core.units import format_bytes
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.decode_attention import decode_attention, torch_path
from kvatlas.kernels.gather import gather_slots
from kvatlas.kernels.pool import Part

SDPA_GQA, SDPA_PACKED = "SDPA bf16 enable_gqa", "SDPA bf16 packed"
SDPA_PACKED_FP32 = "SDPA fp32 packed"
GATHER, TORCH_FORM = "page gather + SDPA bf16 packed", "our torch form, bf16"
TORCH_FORMS = (SDPA_GQA, SDPA_PACKED, SDPA_PACKED_FP32, GATHER, TORCH_FORM)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form in one cell.

    Args:
        form: its name; a format's name is ours.
        timing: of single calls, one layer each.
        read_bytes: that one call must read.
        flop: of one call.
        error: largest difference of the output to float32 attention, over that output's largest number.
    """

    form: str
    timing: Timing
    read_bytes: int
    flop: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All forms at one shape and number of threads.

    Args:
        lanes: the shape.
        threads: of all forms and limits.
        rows: in the order asked for.
        limits: of the machine, in the same rounds.
        skipped: form -> why it did not run.
    """

    lanes: Lanes
    threads: int
    rows: list[Row]
    limits: Limits
    skipped: dict[str, str]

    @property
    def best_torch(self) -> Row | None:
        """The fastest of torch's own forms, by wall time; None where none ran."""
        return min(
            (row for row in self.rows if row.form in TORCH_FORMS), key=lambda row: row.timing.wall_s, default=None
        )

    def told(self) -> list[dict[str, Any]]:
        """Return the rows as plain JSON values."""
        best = self.best_torch
        common = {"batch": self.lanes.batch, "context": self.lanes.context, "threads": self.threads}
        return [
            common
            | {
                "form": row.form,
                "wall_ms": row.timing.wall_s * 1e3,
                "wall_quartiles_ms": [end * 1e3 for end in row.timing.spread_s],
                "cpu_ms": row.timing.cpu_s * 1e3,
                "calls": len(row.timing.walls_s),
                "over_best_torch": None if best is None else best.timing.wall_s / row.timing.wall_s,
                "over_best_torch_cpu": None if best is None else best.timing.cpu_s / row.timing.cpu_s,
                "best_torch": None if best is None else best.form,
                "read_bytes_per_s": row.read_bytes / row.timing.wall_s,
                "share_of_read": row.read_bytes / row.timing.wall_s / self.limits.read_bytes_per_s,
                "share_of_flop": row.flop / row.timing.wall_s / self.limits.flop_per_s,
                "error": row.error,
            }
            for row in self.rows
        ]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Forms that read the same memory.

    Args:
        format: of the numbers in it.
        held_bytes: what it takes, working memory included.
        make: returns for each form its call on each layer.
    """

    format: Format
    held_bytes: int
    names: tuple[str, ...]
    make: Callable[[], list[list[Callable[[], Tensor]]]]


def measure_cell(
    lanes: Lanes, threads: int, formats: Sequence[Format], repeats: int, *, read_bytes: int = READ_BYTES
) -> Cell:
    """Return the timings of all forms that fit into half of the free memory; torch must use ``threads`` already.

    Args:
        lanes: the shape.
        threads: what torch uses.
        formats: of ours; torch's forms always run.
        repeats: rounds.
        read_bytes: of the reads that find the machine's limit.
    """
    content = Content.random(lanes)
    forms: dict[str, Callable[[], object]] = {}
    read: dict[str, int] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    left, truth = memory_to_use(), _truth(lanes, content)
    for source in _sources(lanes, content, formats):
        if source.held_bytes > left:
            reason = f"takes {format_bytes(source.held_bytes)}, left of half the free memory are {format_bytes(left)}"
            skipped |= dict.fromkeys(source.names, reason)
            continue
        left -= source.held_bytes
        for name, calls in zip(source.names, source.make(), strict=True):
            errors[name] = float((calls[0]().float().view_as(truth) - truth).abs().max() / truth.abs().max())
            forms[name], read[name] = _walk(calls), lanes.layer_bytes(source.format)
    timings = take_turns(forms | limit_forms(read_bytes), repeats)
    rows = [
        Row(form=name, timing=timings[name], read_bytes=read[name], flop=lanes.flop, error=errors[name])
        for name in forms
    ]
    return Cell(lanes=lanes, threads=threads, rows=rows, limits=limits_of(timings, read_bytes), skipped=skipped)


def _walk(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], object]:
    """Return a function that makes the next call with each call of its own, for ever."""
    turns = cycle(calls)
    return lambda: next(turns)()


def _truth(lanes: Lanes, content: Content) -> Tensor:
    """Return attention over the first layer in float32 [B, Hq, D], one sequence at a time."""
    query, rows = lanes.query(), []
    for sequence in range(lanes.batch):
        keys, values = content.of_sequence(lanes, sequence)
        q = query[sequence].view(lanes.kv_heads, -1, lanes.head_dim)
        rows.append(scaled_dot_product_attention(q, keys, values).view(lanes.query_heads, -1))
    return torch.stack(rows)


def _sources(lanes: Lanes, content: Content, formats: Sequence[Format]) -> Iterator[_Source]:
    """Yield the memory of each format, the one that torch's forms share first."""
    contiguous = lanes.layers(Format.BF16) * lanes.layer_bytes(Format.BF16)
    yield _Source(
        format=Format.BF16, held_bytes=contiguous, names=(SDPA_GQA, SDPA_PACKED),
        make=lambda: _contiguous(lanes, content, torch.bfloat16, packed=(False, True)),
    )  # fmt: skip
    for format in formats:
        yield _Source(
            format=format, held_bytes=lanes.held_bytes(format), names=(format.value,),
            make=lambda format=format: [_ours(lanes, content, format)],  # type: ignore[misc]  # a default, no argument
        )  # fmt: skip
    paged = lanes.held_bytes(Format.BF16) + lanes.layer_bytes(Format.BF16)  # a gathered copy
    yield _Source(
        format=Format.BF16, held_bytes=paged, names=(GATHER, TORCH_FORM), make=lambda: _over_pages(lanes, content)
    )
    contiguous = lanes.layers(Format.FP32) * lanes.layer_bytes(Format.FP32)
    yield _Source(
        format=Format.FP32, held_bytes=contiguous, names=(SDPA_PACKED_FP32,),
        make=lambda: _contiguous(lanes, content, torch.float32, packed=(True,)),
    )  # fmt: skip


def _ours(lanes: Lanes, content: Content, format: Format) -> list[Callable[[], Tensor]]:
    query, scale = lanes.query(), lanes.head_dim**-0.5

    def attend(part: Part) -> Tensor:
        return decode_attention(query, [part], scale=scale)[0]

    return [partial(attend, part) for part in content.paged(lanes, format)]


def _contiguous(
    lanes: Lanes, content: Content, dtype: torch.dtype, packed: Sequence[bool]
) -> list[list[Callable[[], Tensor]]]:
    """Return torch's attention over contiguous keys and values [L, B, H, S, D], plain or packed."""
    format = Format.FP32 if dtype == torch.float32 else Format.BF16
    keys, values = content.contiguous(lanes, dtype, lanes.layers(format))
    single = lanes.query().to(dtype).unsqueeze(2)
    grouped = single.view(lanes.batch, lanes.kv_heads, -1, lanes.head_dim)

    def attend(k: Tensor, v: Tensor, *, pack: bool) -> Tensor:
        if pack:
            return scaled_dot_product_attention(grouped, k, v)
        return scaled_dot_product_attention(single, k, v, enable_gqa=True)

    return [[partial(attend, k, v, pack=pack) for k, v in zip(keys, values, strict=True)] for pack in packed]


def _over_pages(lanes: Lanes, content: Content) -> list[list[Callable[[], Tensor]]]:
    """Return torch's attention after gathering pages of bfloat16, and our own torch form over the same pages."""
    query, scale, parts = lanes.query(), lanes.head_dim**-0.5, content.paged(lanes, Format.BF16)
    grouped = query.bfloat16().view(lanes.batch, lanes.kv_heads, -1, lanes.head_dim)

    def gather(part: Part) -> Tensor:
        keys, values = gather_slots(part.pool.keys, part.table), gather_slots(part.pool.values, part.table)
        return scaled_dot_product_attention(grouped, keys, values)

    def torch_form(part: Part) -> Tensor:
        return torch_path.decode_attention(
            query, [part], scale=scale, softcap=None, sinks=None, window=None, query_position=None, slots=None,
            need_mass=False, shared=None,
        )[0]  # fmt: skip

    return [[partial(form, part) for part in parts] for form in (gather, torch_form)]
