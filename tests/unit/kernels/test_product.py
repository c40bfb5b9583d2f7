"""Products of many rows, and what follows them, are torch's up to the order of sums."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, silu

from kvatlas.kernels import product

pytestmark = pytest.mark.skipif(not product.available(), reason="this torch has no oneDNN products")


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 33, 5), (2, 40, 64), (130, 257), (1, 0, 8)])
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


@pytest.mark.parametrize("name", ["_unary", "_binary"])
@pytest.mark.parametrize("how", ["missing", "wrong"])
def test_a_torch_without_them_is_noticed(name, how, monkeypatch):
    def broken(*arguments: object) -> torch.Tensor:
        if how == "missing":
            raise AttributeError("no such operation")
        return torch.zeros(3, 4)

    product.available.cache_clear()
    monkeypatch.setattr(product, name, broken)
    assert not product.available()
    product.available.cache_clear()
