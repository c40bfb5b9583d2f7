"""What ``--dtype auto`` means on this processor, and on others."""

from __future__ import annotations

import pytest
import torch
from tests.families import tiny_model

from kvatlas.models import precision
from kvatlas.models.precision import by_trial, fastest_on_cpu, resolve_dtype, trial_s


@pytest.fixture(autouse=True)
def forget():
    fastest_on_cpu.cache_clear()
    yield
    fastest_on_cpu.cache_clear()


def test_without_products_of_its_own_bfloat16_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(precision, "trial_s", lambda dtype: pytest.fail("tried"))
    assert fastest_on_cpu().dtype is torch.float32 and "no bfloat16 products" in str(fastest_on_cpu())
    assert resolve_dtype("auto", "cpu") is torch.float32


@pytest.mark.parametrize(
    ("wide", "narrow", "wanted"),
    [
        ([4.0, 2.0, 1.0], [1.0, 2.0, 1.0], torch.bfloat16),
        ([4.0, 2.0, 1.0], [3.9, 1.9, 1.0], torch.float32),
        ([1.0, 1.0, 1.0], [0.5, 2.0, 2.0], torch.float32),
    ],
)
def test_a_trial_decides_elsewhere(wide, narrow, wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: True)
    monkeypatch.setattr(
        precision, "trial_s", lambda dtype: (asked.append(dtype), wide if dtype is torch.float32 else narrow)[1]
    )
    assert fastest_on_cpu().dtype is wanted and fastest_on_cpu().dtype is wanted
    assert asked == [torch.float32, torch.bfloat16], "once per process"
    assert resolve_dtype("auto", "cpu") is (torch.float32 if wanted is torch.float32 else None)
    assert "256 tokens" in str(fastest_on_cpu())


def test_the_trial_runs_both_forms() -> None:
    times = {dtype: trial_s(dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert all(len(found) == 3 and min(found) > 0 for found in times.values())
    assert by_trial(times.__getitem__).dtype in times


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_is_never_rounded(own: torch.dtype, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is fastest, only those that are bfloat16 compute in it."""
    from kvatlas.models.loading import load_model

    tiny_model("llama").to(own).save_pretrained(tmp_path)
    for fastest in (torch.float32, torch.bfloat16):
        choice = precision.CpuChoice(dtype=fastest, why="")
        monkeypatch.setattr(precision, "fastest_on_cpu", lambda choice=choice: choice)
        wanted = torch.bfloat16 if fastest is own is torch.bfloat16 else torch.float32
        assert load_model(tmp_path).adapter.dtype is wanted
