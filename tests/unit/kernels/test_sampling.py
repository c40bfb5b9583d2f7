from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare
from tests.unit.kernels.fast_forms import running_forms

from kvatlas.kernels.sampling import draw, native, reference, torch_path

FORMS = [torch_path.draw, *[each for each in running_forms(torch_path, native, "draw") if each is not torch_path.draw]]


def arguments(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, uniform: Sequence[float] = ()
) -> tuple[torch.Tensor, ...]:
    rows = len(logits)
    return (
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.tensor(uniform or [0.5] * rows, dtype=torch.float64),
    )


logit_rows = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, -1.0, -math.inf, 30.0]), st.floats(-20, 20, width=32)), min_size=1, max_size=40
)


@settings(max_examples=200)
@given(
    logits=logit_rows,
    temperature=st.sampled_from([0.05, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 100]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_forms_agree_with_the_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    given = arguments(torch.tensor([logits]), temperature, top_k, top_p, [uniform])
    want = int(reference.draw(*given))
    for form in FORMS:
        got = int(form(*given))
        if got != want:  # only where the draw, or the limit, falls between two tokens up to rounding
            near = {int(reference.draw(*arguments(given[0], temperature, top_k, p, [u])))
                    for p in (top_p * (1 - 1e-5), top_p, min(1.0, top_p * (1 + 1e-5)))
                    for u in (max(0.0, uniform - 1e-5), uniform, min(1 - 1e-9, uniform + 1e-5))}  # fmt: skip
            assert got in near, (got, want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (50, 1.0), (50, 0.7)])
def test_draws_follow_what_is_kept(form: object, top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    draws, logits = 10_000, torch.randn(200)
    probabilities = (logits / 0.8).softmax(-1).double()
    order = probabilities.argsort(descending=True)[: top_k or None]
    kept = order[(probabilities[order].cumsum(0) - probabilities[order]) < top_p * probabilities[order].sum()]
    uniform = torch.rand(draws, dtype=torch.float64)
    args = arguments(logits.expand(draws, -1), 0.8, top_k, top_p, uniform.tolist())
    found = torch.bincount(form(*args), minlength=200)  # type: ignore[operator]
    assert set(found.nonzero().flatten().tolist()) <= set(kept.tolist())
    expected = probabilities[kept] / probabilities[kept].sum() * draws
    often = expected > 5
    rest = [found[kept][~often].sum().item()], [expected[~often].sum().item()]
    seen, wanted = found[kept][often].tolist(), expected[often].tolist()
    if rest[1][0] > 5:
        seen, wanted = seen + rest[0], wanted + rest[1]
    total = sum(wanted) / sum(seen)
    assert chisquare([each * total for each in seen], wanted).pvalue > 1e-4


@pytest.mark.parametrize("form", FORMS[1:])
def test_large_vocabularies_keep_what_a_sort_keeps(form: object) -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 128_256) * torch.tensor([0.01, 1.0, 10.0])[:, None]
    for top_k, top_p in ((0, 0.9), (5000, 0.5)):
        for uniform in (0.3, 0.99999999):
            args = arguments(logits, 0.8, top_k, top_p, [uniform] * 3)
            got, want = form(*args), torch_path.draw(*args)  # type: ignore[operator]
            weights = (logits.double() / 0.8).softmax(-1)
            for row in range(3):  # float32 weights move a draw by a few tokens of next to no probability
                low, high = sorted((int(got[row]), int(want[row])))
                assert weights[row, low : high + 1].sum() - weights[row, [low, high]].sum() < 1e-5 or low == high


def test_rows_without_a_token() -> None:
    logits = torch.zeros(5, 9)
    logits[1, 3], logits[2], logits[3, 4] = torch.nan, -torch.inf, torch.inf
    for form in (draw, reference.draw, *FORMS):
        assert form(*arguments(logits)).lt(0).tolist() == [False, True, True, True, False]
