"""The Triton forms on a GPU, and the ways between its memory and the host's."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from tests.unit.kernels import triton_cases

from kvatlas.core.layout import GRANULE, BlockLayout
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.decode_attention import flashinfer_path
from kvatlas.kernels.pool import BlockPool
from kvatlas.storage.crossing import copy_rows, locked_memory, order_for
from kvatlas.storage.link import Link, Move

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none"),
]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'kvatlas[gpu]'"
)


@needs_triton
@pytest.mark.parametrize("case", triton_cases.DECODE_CASES.values(), ids=list(triton_cases.DECODE_CASES))
def test_decode_attention(case: triton_cases.Case) -> None:
    triton_cases.check_decode(case, "cuda")


@needs_triton
@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_decode_attention_of_long_lanes(format: Format, dtype: torch.dtype, head_dim: int) -> None:
    lengths = [[5000, 4097], [31, 0]]
    case = triton_cases.Case(
        (format,), (lengths,), dtype=dtype, key_dim=head_dim, value_dim=head_dim, group=4, hide_empty=True
    )
    triton_cases.check_decode(case, "cuda")


@pytest.mark.skipif(not find_spec("flashinfer"), reason="flashinfer is missing: pip install flashinfer-python")
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize(("format", "dtype"), [(Format.BF16, torch.bfloat16), (Format.FP16, torch.float16)])
def test_flashinfer(format: Format, dtype: torch.dtype, group: int) -> None:
    torch.manual_seed(0)
    lengths = [[500, 97], [31, 0]]
    case = triton_cases.Case((format,), (lengths,), dtype=dtype, key_dim=128, value_dim=128, group=group)
    part = triton_cases.make_part(case, 0, "cuda")
    q = torch.randn(2, 2 * group, 128, dtype=dtype, device="cuda")
    assert flashinfer_path.why_not(q, [part]) is None
    want, _ = triton_cases.attend(q, [part], case, scale=0.1)
    got = flashinfer_path.planned(q, [part], scale=0.1)()
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-2, rtol=2e-2)


@needs_triton
@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 32), (42, 70), (128, 128), (256, 256)])
def test_blocks(format: Format, key_dim: int, value_dim: int) -> None:
    triton_cases.check_blocks(format, "cuda", key_dim, value_dim)


@needs_triton
@pytest.mark.parametrize("width", [20, 128])
def test_bounds(width: int) -> None:
    triton_cases.check_bounds("cuda", width)


@needs_triton
@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums(format: Format, dtype: torch.dtype) -> None:
    triton_cases.check_column_sums(format, "cuda", dtype, window=50)
    triton_cases.check_column_sums(format, "cuda", dtype, softcap=3.0, reach=(9, 20))


def rows(device: str, seed: int, locked: bool = False) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return an arena of random bytes, its blocks' rows, and granules of a block."""
    layout = BlockLayout(key_dim=42, value_dim=70, format=Format.FP16)
    memory = torch.randint(0, 255, (40 * layout.block_bytes,), dtype=torch.uint8, generator=torch.manual_seed(seed))
    memory = memory.to(device)
    if locked:
        memory = locked_memory(len(memory)).copy_(memory)
    words = layout.block_bytes // 4
    view = memory.view(torch.int32).as_strided((BlockPool(memory, layout).rows, words), (GRANULE // 4, 1))
    return memory, view, layout.block_bytes // GRANULE


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("to_device", [False, True])
def test_blocks_cross_between_the_memories(locked: bool, to_device: bool) -> None:
    _, host_rows, step = rows("cpu", 0, locked)
    _, there, _ = rows("cuda", 1)
    assert host_rows.is_pinned() == locked
    first, second = torch.randperm(40)[:17] * step, torch.randperm(40)[:17] * step
    source, target = (host_rows, there) if to_device else (there, host_rows)
    want = source.cpu()[first].clone()
    copy_rows(source, first, target, second)
    assert torch.equal(target.cpu()[second], want)


def test_moves_and_compute_keep_their_order() -> None:
    """A fetch sees what was written before it was submitted, and the compute after waiting sees the fetch."""
    _, host_rows, step = rows("cpu", 0, locked=True)
    _, there, _ = rows("cuda", 1)
    ids = torch.arange(40) * step
    link = Link(None, "cuda")
    assert order_for("cuda") is not None
    large = torch.randn(4096, 4096, device="cuda")
    for turn in range(5):
        there.index_copy_(0, ids.cuda(), torch.full((40, there.shape[1]), turn, dtype=torch.int32, device="cuda"))
        for _ in range(4):
            large = large @ large * 1e-3  # so that the compute lags behind
        there[ids.cuda()] += 1
        store = link.stores.submit(Move(copy=lambda: copy_rows(there, ids, host_rows, ids), num_bytes=1))
        store.wait()
        assert (host_rows[ids] == turn + 1).all()
        host_rows.index_copy_(0, ids, torch.full((40, there.shape[1]), -turn, dtype=torch.int32))
        fetch = link.fetches.submit(Move(copy=lambda: copy_rows(host_rows, ids, there, ids), num_bytes=1))
        fetch.wait()
        assert (there[ids.cuda()] == -turn).all()
