"""Planning needs no torch: what loads in a fresh interpreter, and what must not."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvatlas

LOADS_WITHOUT_TORCH = [
    "import kvatlas",
    "from kvatlas import Strategy; Strategy.parse('h2o | fp16')",
    "from kvatlas.strategies.registry import stages; assert len(stages()) > 4",
    "from kvatlas import Keep, LaneView, register",
    "from kvatlas.strategies.recipes import RECIPES",
    """
from kvatlas.core.shapes import LayerShape, ModelShape
from kvatlas.core.vocabulary import Format
from kvatlas.strategies.strategy import Strategy
layer = LayerShape(num_query_heads=8, num_kv_heads=2, key_dim=64, value_dim=64)
shape = ModelShape(name="m", layers=(layer,) * 4, hidden_size=1, vocab_size=1, max_positions=1, num_parameters=1)
bound = Strategy.parse("full").plan(shape, Format.FP16).footprint(prompt_tokens=320, output_tokens=32, chunk_tokens=64)
block = 32 * (64 + 64) * 2 + 32 * 4
assert (bound.steady_bytes, bound.final_bytes) == (8 * 10 * block, 8 * 11 * block), bound
""",
]


@pytest.mark.parametrize("code", LOADS_WITHOUT_TORCH, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_loads_without_torch(code: str) -> None:
    check = "import sys; heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_all_is_complete() -> None:
    assert set(kvatlas._LAZY) | {"__version__"} == set(kvatlas.__all__)
    assert len(set(kvatlas.__all__)) == len(kvatlas.__all__)
    for name in kvatlas._LAZY:
        assert getattr(kvatlas, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        kvatlas.nonsense  # noqa: B018
