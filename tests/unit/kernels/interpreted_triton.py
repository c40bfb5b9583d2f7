"""The Triton forms in Triton's interpreter, on the CPU: run by ``test_triton.py`` in a process of its own.

Whether kernels are compiled or interpreted is settled when they are defined, so this is no module of the usual run.
"""

from __future__ import annotations

import pytest
import torch
from tests.driving import loaded, relative_error
from tests.families import tiny_model
from tests.parity.test_gpu import logits
from tests.unit.kernels import triton_cases

from kvatlas.core.vocabulary import Format
from kvatlas.kernels.triton_support import interpreted

assert interpreted(), "run me through test_triton.py"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of infinities


@pytest.mark.parametrize("case", triton_cases.DECODE_CASES.values(), ids=list(triton_cases.DECODE_CASES))
def test_decode_attention(case: triton_cases.Case) -> None:
    triton_cases.check_decode(case, "cpu")


@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 32), (42, 70)])
def test_blocks(format: Format, key_dim: int, value_dim: int) -> None:
    triton_cases.check_blocks(format, "cpu", key_dim, value_dim)


@pytest.mark.parametrize("width", [20, 128])
def test_bounds(width: int) -> None:
    triton_cases.check_bounds("cpu", width)


@pytest.mark.parametrize("format", [Format.FP16, Format.INT8, Format.INT4, Format.INT2])
def test_column_sums(format: Format) -> None:
    triton_cases.check_column_sums(format, "cpu", torch.float32, window=50)


def test_column_sums_with_other_rules() -> None:
    triton_cases.check_column_sums(Format.BF16, "cpu", torch.float32, softcap=3.0, reach=(9, 20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["h2o(heavy=20, recent=12)", "int8", "kivi(bits=4, residual=32)", "quest(budget=64)"]
)
def test_the_engine_runs_on_these_forms(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tiny_model("llama", num_hidden_layers=2, max_position_embeddings=512))
    monkeypatch.setenv("KVATLAS_KERNELS", "triton")
    got = logits(model, strategy)
    monkeypatch.setenv("KVATLAS_KERNELS", "torch")
    for each, want in zip(got, logits(model, strategy), strict=True):
        assert relative_error(each, want) < 1e-3
