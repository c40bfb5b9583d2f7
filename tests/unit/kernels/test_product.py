"""Products of many rows, and what follows them, are torch's up to the order of sums."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, silu

from kvatlas.kernels import product

pytestmark = pytest.mark.skipif(not product.available(), reason="this torch has no oneDNN products")


@torch.inference_mode()
@pytest.mark.parametrize(
    "shape", [(1, 33, 5), (2, 40, 64), (130, 257), (1, 509, 6), (450, 3), (1, 0, 8), (7,), (0,), (90, 0), (2, 0)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_torch(shape, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(19, shape[-1])
    added = torch.randn(19) if bias else None
    other = torch.randn(*shape[:-1], 19)
    before, plain = other.clone(), linear(x, weight, added)
    for got, expected in (
        (product.product(x, weight, added), plain),
        (product.product_silu(x, weight, added), silu(plain)),
        (product.product_add(x, weight, added, other), plain + other),
        (product.product_mul(x, weight, added, other), plain * other),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(other, before)


@torch.inference_mode()
def test_few_numbers_of_rows_reach_onednn(monkeypatch):
    """It keeps a kernel for each number of rows that it ever saw."""
    seen = set()
    for name in ("_unary", "_binary"):
        original = getattr(product, name)
        monkeypatch.setattr(product, name, lambda x, *rest, of=original: (seen.add(len(x)), of(x, *rest))[1])
    weight = torch.randn(3, 5)
    for rows in range(1, 1100):
        x, other = torch.randn(1, rows, 5), torch.randn(1, rows, 3)
        torch.testing.assert_close(product.product(x, weight, None), linear(x, weight))
        torch.testing.assert_close(product.product_add(x, weight, None, other), linear(x, weight) + other)
    assert seen == {64, 128, 256, 512, 1024}


def test_pieces_leave_little_and_pad_little():
    for rows in range(5000):
        sizes = product.pieces(rows)
        assert all(size & (size - 1) == 0 for size in sizes) and sizes == sorted(sizes, reverse=True)
        assert sum(sizes) - rows <= (sizes[-1] // 8 if sizes else 0)
        assert rows - sum(sizes) < 64


@pytest.mark.parametrize("name", ["_unary", "_binary"])
@pytest.mark.parametrize("how", ["missing", "wrong"])
def test_a_torch_without_them_is_noticed(name, how, monkeypatch):
    def broken(*arguments: object) -> torch.Tensor:
        if how == "missing":
            raise AttributeError("no such operation")
        return torch.zeros(64, 4)

    product.available.cache_clear()
    monkeypatch.setattr(product, name, broken)
    assert not product.available()
    product.available.cache_clear()
