from __future__ import annotations

import pytest
import torch
from tests.unit.kernels.fast_forms import Form, running_forms

from kvatlas.core.streams import SideLayout, Stream
from kvatlas.kernels.entries import dot_entries, native, torch_path
from kvatlas.kernels.pool import Entries, SidePool

FORMS = [*running_forms(torch_path, native, "dot_entries"), dot_entries]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("every", "width", "group"), [(1, 7, 1), (4, 64, 3), (2, 33, 8), (None, 128, 5), (1, 16, 4)])
def test_it_is_the_product_with_each_entry(form: Form, dtype: str, every: int | None, width: int, group: int) -> None:
    torch.manual_seed(0)
    R, H, C, size = 2, 3, 4, 8
    layout = SideLayout((Stream(name="a"), Stream(name="b", width=width, dtype=dtype, every=every)), size)
    step, number = layout.block_bytes // 64, layout.entries("b")
    pool = SidePool(memory=torch.zeros((R * H * C) * layout.block_bytes, dtype=torch.uint8), layout=layout)
    view = pool.view("b")
    view[::step] = torch.randn(len(view[::step]), number, width).to(view.dtype)
    table = (torch.randperm(R * H * C) * step).view(R, H, C).int()
    length = torch.tensor([[32, 31, 0], [1, 17, 8]])
    q = torch.randn(R, H, group, width)
    got = form(q, Entries(pool=pool, name="b", table=table, length=length))
    assert got.shape == (R, H, group, C * number)
    for r in range(R):
        for h in range(H):
            entries = torch.cat([view[table[r, h, c]] for c in range(C)]).float()
            used = -(-int(length[r, h]) // layout.every("b"))
            wanted = (q[r, h].double() @ entries.double().T).float()
            torch.testing.assert_close(got[r, h, :, :used], wanted[:, :used], rtol=1e-4, atol=1e-4)
            assert (got[r, h, :, used:] == -torch.inf).all()
