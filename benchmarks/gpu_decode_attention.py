"""How near to the memory's limit is decode attention on a GPU, in each format, and beside the best others?

A decode step reads every key and value once, so it cannot be shorter than their bytes over the memory's bandwidth,
which is measured in the same run by a large copy. Expected: bf16 at 80% of that bandwidth from 32K tokens on; int4,
whose bytes are 0.31 of bf16's, at least 2.5 times as fast, as unpacking competes with reading. Peers: SDPA over
contiguous bf16 (what an engine without pages could do), a page gather before it, and FlashInfer where installed.

Each form is checked against float32 attention over the decoded blocks first; a form that disagrees is not timed. Times
are medians of device time with a cold cache, the forms taking turns. Without a CUDA device nothing is measured.

    python benchmarks/gpu_decode_attention.py --out benchmarks/results
    python benchmarks/gpu_decode_attention.py --sweep int4 --contexts 32768 --batches 1 8
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kvatlas.core.layout import GRANULE, BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import encode_blocks, read_keys, read_values
from kvatlas.kernels.pool import BlockPool, Part

QUERY_HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 32
SCALE = HEAD_DIM**-0.5
FORMATS = (Format.BF16, Format.FP16, Format.INT8, Format.INT4, Format.INT2)
MOST_BLOCKS_AT_ONCE = 4096
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Form:
    """A way to compute ``want``: ``call`` returns [R, Hq, D]; ``num_bytes`` are what it has to read."""

    call: Call
    num_bytes: int
    want: Tensor


def make_part(format: Format, batch: int, context: int) -> Part:
    """Blocks in random order, a position short of full, as a running request has them."""
    layout = BlockLayout(key_dim=HEAD_DIM, value_dim=HEAD_DIM, format=format)
    columns = -(-context // BLOCK)
    count = batch * KV_HEADS * columns
    pool = BlockPool(torch.zeros(count * layout.block_bytes, dtype=torch.uint8, device="cuda"), layout)
    ids = torch.randperm(count, device="cuda") * (layout.block_bytes // GRANULE)
    for some in ids.split(MOST_BLOCKS_AT_ONCE):
        k, v = torch.randn(2, len(some), BLOCK, HEAD_DIM, device="cuda").unbind()
        encode_blocks(pool, some, k, v)
    length = torch.full((batch, KV_HEADS), context, dtype=torch.int64, device="cuda")
    return Part(pool=pool, table=ids.view(batch, KV_HEADS, columns).int(), length=length)


def attend(q: Tensor, part: Part) -> Tensor:
    """Attention in float32 over the decoded blocks, one lane at a time, [R, Hq, D]."""
    R, H, _ = part.table.shape
    rows = []
    for r, h in itertools.product(range(R), range(H)):
        n, lane = int(part.length[r, h]), part.table[r, h]
        k, v = (read(part.pool, lane, torch.float32)[:n] for read in (read_keys, read_values))
        heads = q[r, h * QUERY_HEADS // H : (h + 1) * QUERY_HEADS // H].float()
        rows.append(torch.softmax(heads @ k.T * SCALE, dim=-1) @ v)
    return torch.cat(rows).view(R, QUERY_HEADS, -1)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, scale=SCALE, enable_gqa=True)
    return out[:, :, 0]


def gathered(q: Tensor, part: Part, context: int) -> Tensor:
    k, v = (read(part.pool, part.table, torch.bfloat16)[:, :, :context] for read in (read_keys, read_values))
    return sdpa(q, k, v)


def forms_of(batch: int, context: int, formats: list[Format]) -> dict[str, Form]:
    """Return all forms by name."""
    from kvatlas.kernels.decode_attention import flashinfer_path, triton_path

    q = torch.randn(batch, QUERY_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    forms: dict[str, Form] = {}
    for format in formats:
        part = make_part(format, batch, context)
        own = part.table.numel() * part.pool.layout.kv_bytes
        question, want = q.half() if format is Format.FP16 else q, attend(q, part)
        call: Call = partial(_first, triton_path.decode_attention, question, [part], scale=SCALE)
        forms[f"triton {format.value}"] = Form(call, own, want)
        if format is Format.BF16:
            k, v = (read(part.pool, part.table, torch.bfloat16)[:, :, :context] for read in (read_keys, read_values))
            forms["sdpa bf16"] = Form(partial(sdpa, q, k.contiguous(), v.contiguous()), own, want)
            forms["gather + sdpa bf16"] = Form(partial(gathered, q, part, context), own, want)
            if flashinfer_path.why_not(q, [part]) is None:
                run = flashinfer_path.planned(q, [part], scale=SCALE)
                forms["flashinfer bf16"] = Form(run, own, want)
    return forms


def _first(attend: Callable[..., tuple[Tensor, object]], *arguments: object, **options: object) -> Tensor:
    return attend(*arguments, **options)[0]


def disagreement(form: Form) -> float:
    """Return the relative distance of a form from float32 attention; NaN counts as infinite."""
    error = (form.call().float() - form.want).norm() / form.want.norm()
    return float(error.nan_to_num(torch.inf))


def milliseconds(forms: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median device time of each call, cache cold, the calls taking turns."""
    spoil = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in forms}
    for call in forms.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in forms.items():
            spoil.zero_()  # long enough to hide the launches of the call behind it
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def bandwidth() -> float:
    """Return what a large copy reads and writes, bytes per second: what the memory can do, near its peak."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds({"copy": lambda: target.copy_(source)}, 20)["copy"] * 1e3


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    limit, rows = bandwidth(), []
    for batch, context in itertools.product(options.batches, options.contexts):
        forms = forms_of(batch, context, list(FORMATS))
        errors = {name: disagreement(form) for name, form in forms.items()}
        right = {name: form.call for name, form in forms.items() if errors[name] < 2e-2}
        times = milliseconds(right, options.rounds)
        for name, form in forms.items():
            row: dict[str, object] = {"batch": batch, "context": context, "form": name, "error": errors[name]}
            if name in times:
                rate = form.num_bytes / times[name] * 1e3
                row |= {
                    "ms": times[name],
                    "bytes": form.num_bytes,
                    "GB_per_s": rate / 1e9,
                    "of_bandwidth": rate / limit,
                }
                for other in ("sdpa bf16", "triton bf16"):
                    if other in times:
                        row[f"over {other}"] = times[other] / times[name]
            rows.append(row)
        del forms
        torch.cuda.empty_cache()
    return [{"bandwidth_GB_per_s": limit / 1e9}, *rows]


def sweep(options: argparse.Namespace) -> list[dict[str, object]]:
    """Time other schedules of one format, best first, per shape."""
    from kvatlas.kernels.decode_attention import triton_path

    format, rows = Format(options.sweep), []
    before = triton_path.SCHEDULES[format]
    slots = (64, 128, 256) if format.is_packed else (32, 64, 128)
    for batch, context in itertools.product(options.batches, options.contexts):
        form = forms_of(batch, context, [format])[f"triton {format.value}"]
        for each in itertools.product(slots, (2, 3), (1, 2, 4, 8), (2, 4, 8)):
            triton_path.SCHEDULES[format] = triton_path.Schedule(*each)
            row: dict[str, object] = {
                "batch": batch,
                "context": context,
                "schedule": str(triton_path.SCHEDULES[format]),
            }
            try:
                if disagreement(form) < 2e-2:
                    rows.append(row | {"ms": milliseconds({"it": form.call}, 5)["it"]})
            except Exception as error:  # out of shared memory, mostly: such a schedule is no candidate
                print(f"{each}: {str(error).splitlines()[0]}")
    triton_path.SCHEDULES[format] = before
    return sorted(rows, key=lambda row: (row["batch"], row["context"], row["ms"]))[: options.keep]


def table(rows: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in map(row.get, columns))
        lines.append("| " + " | ".join("" if cell == "None" else cell for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sweep", choices=[format.value for format in Format], help="time other schedules of a format")
    parser.add_argument("--keep", type=int, default=40, help="rows of a sweep to show")
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        print(json.dumps({"benchmark": "gpu_decode_attention", "measured": False}))
        return
    torch.manual_seed(0)
    import triton

    device = torch.cuda.get_device_name()
    with torch.inference_mode():
        rows = sweep(options) if options.sweep else measure(options)
    text = (
        f"# Decode attention on {device}\n\n{QUERY_HEADS} query and {KV_HEADS} KV heads, head_dim {HEAD_DIM}, blocks "
        f"of {BLOCK}; torch {torch.__version__}, triton {triton.__version__}. `of_bandwidth` is relative to a copy of "
        f"2 GiB in the same run.\n\n{table(rows)}\n"
    )
    print(text)
    if options.out is not None:
        name = "_".join(device.lower().replace("nvidia", "").split())
        day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        (options.out / f"decode_attention_{name}_{day}.md").write_text(text, encoding="utf-8")
    print(json.dumps({"benchmark": "gpu_decode_attention", "measured": True, "device": device, "rows": rows}))


if __name__ == "__main__":
    main()
