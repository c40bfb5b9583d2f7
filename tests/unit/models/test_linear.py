"""Linears that are replaced compute what torch's do, where they may be replaced, and can be given back."""

from __future__ import annotations

import copy
import io

import psutil
import pytest
import torch
from tests.families import tiny_model, token_ids
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from kvatlas.core.errors import CapacityError, ConfigError, UnsupportedError
from kvatlas.core.vocabulary import Format
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.kernels import product
from kvatlas.kernels.native import Library, library
from kvatlas.models.adapter import Adapter
from kvatlas.models.fast import linears as models_linear
from kvatlas.models.fast.linears import SmallLinears
from kvatlas.models.loading import load_model
from kvatlas.models.random import random_model

pytestmark = pytest.mark.skipif(not isinstance(library(), Library), reason="no native kernels here")


@pytest.fixture(autouse=True)
def _native(monkeypatch) -> None:
    monkeypatch.delenv("KVATLAS_KERNELS", raising=False)


def linear(num_inputs: int = 24, num_outputs: int = 40, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A linear whose weights are exact in bfloat16."""
    torch.manual_seed(seed)
    made = nn.Linear(num_inputs, num_outputs, bias=bias)
    with torch.no_grad():
        made.weight.copy_(made.weight.bfloat16())
    return made


def small(model: nn.Module, choice: str = "auto") -> SmallLinears:
    return SmallLinears(model, choice, min_elements=1)


def refuse_original(module: nn.Linear) -> None:
    """Let the replaced forward fail where it would call the original."""
    module.forward._original = None


def calls_the_original(module: nn.Linear, x: Tensor) -> bool:
    seen = []
    original = module.forward._original
    module.forward._original = lambda x: seen.append(x) or original(x)
    module(x)
    module.forward._original = original
    return bool(seen)


@torch.no_grad()
@pytest.mark.parametrize("choice", ["auto", "fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_computed_by_the_kernel(choice, bias):
    module = linear(bias=bias)
    exact = nn.functional.linear
    replaced = small(module, choice)
    refuse_original(module)
    for shape in ((24,), (1, 24), (1, 32, 24), (4, 8, 24), (0, 24)):
        x = torch.randn(shape)
        tolerance = {"int8": 2e-2, "fp16": 1e-3}.get(choice, 1e-5)
        torch.testing.assert_close(module(x), exact(x, module.weight, module.bias), atol=tolerance, rtol=0)
    assert replaced.formats == {Format.BF16 if choice == "auto" else Format(choice): 1}


@torch.no_grad()
def test_everything_else_is_computed_by_the_original():
    module = linear()
    small(module)
    x = torch.randn(32, 24)
    assert not calls_the_original(module, x)
    assert calls_the_original(module, torch.randn(24, 32).T)
    assert calls_the_original(module, x.as_subclass(type("Other", (Tensor,), {})))
    with torch.enable_grad():
        assert calls_the_original(module, x)
    with torch.inference_mode():
        assert not calls_the_original(module, x)
    with pytest.raises(RuntimeError, match="shape"):
        module(torch.randn(2, 12))
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.double())


@torch.no_grad()
@pytest.mark.parametrize("has_product", [True, False])
@pytest.mark.parametrize("choice", ["auto", "int8"])
def test_many_rows_are_computed_from_the_weights_themselves(choice, has_product, monkeypatch):
    monkeypatch.setattr(product, "available", lambda: has_product)
    module, x = linear(), torch.randn(2, 33, 24)
    small(module, choice)
    assert calls_the_original(module, x) is not has_product
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_gradients_are_those_of_the_original():
    module = linear()
    small(module)
    module(torch.randn(2, 24)).sum().backward()
    assert module.weight.grad is not None


@torch.no_grad()
def test_weights_that_were_changed_are_used_as_they_are():
    x = torch.randn(3, 24)
    for change in (
        lambda module: module.weight.mul_(2),
        lambda module: module.load_state_dict(linear(seed=5).state_dict()),
        lambda module: setattr(module, "weight", nn.Parameter(torch.randn(40, 24))),
        lambda module: setattr(module, "bias", None),
        lambda module: setattr(module.weight, "data", torch.randn(40, 24)),
    ):
        module = linear()
        small(module)
        change(module)
        assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


@torch.no_grad()
def test_copies_of_a_module_compute_with_their_own_weights():
    module, x = linear(), torch.randn(3, 24)
    small(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), module(x))
        other.weight.zero_()
        other.bias.zero_()
        assert not other(x).any()


def test_the_right_copy_is_chosen_for_each_linear():
    model = nn.Sequential(linear(), linear(), linear(bias=False), nn.Linear(7, 9))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(40, 24).half())
        model[2].weight.copy_(torch.randn(40, 24))
    replaced = small(model)
    assert replaced.formats == {Format.BF16: 1, Format.FP16: 1, Format.FP32: 2}
    assert replaced.copy_bytes == 2 * 2 * 40 * 24
    assert str(replaced) == "linears for up to 32 rows: 1 bf16, 1 fp16, 2 fp32; copies of 3.75 KiB"


def test_shared_weights_have_one_copy():
    model = nn.Sequential(linear(bias=False), linear(bias=False), nn.Embedding(40, 24))
    model[0].weight = model[1].weight = model[2].weight
    replaced = small(model, "int8")
    assert replaced.formats == {Format.INT8: 2}
    assert replaced.copy_bytes == 40 * 24 + 4 * 40


class _Subclass(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _hooked() -> nn.Linear:
    module = linear()
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


def _wrapped() -> nn.Linear:
    module = linear()
    module.forward = lambda x: x
    return module


def _strided() -> nn.Linear:
    module = linear()
    module.weight = nn.Parameter(torch.randn(24, 40).T)
    return module


def _made_in_inference_mode() -> nn.Linear:
    with torch.inference_mode():
        return linear()


@pytest.mark.parametrize(
    "make",
    [
        lambda: _Subclass(24, 40),
        _hooked,
        _wrapped,
        _strided,
        _made_in_inference_mode,
        lambda: parametrizations.weight_norm(linear()),
        lambda: nn.Conv1d(24, 40, 1),
    ],
)
def test_what_is_not_a_plain_linear_is_left_alone(make):
    model = nn.Sequential(linear(), make())
    before = vars(model[1]).get("forward")
    assert small(model).formats == {Format.BF16: 1}
    assert vars(model[1]).get("forward") is before


def test_small_weights_are_left_alone():
    model = nn.Sequential(linear(255, 256), linear(256, 256))
    replaced = SmallLinears(model)
    assert replaced.formats == {Format.BF16: 1}
    assert "forward" not in vars(model[0])


@torch.no_grad()
def test_restore_leaves_no_trace():
    model, x = nn.Sequential(linear(), linear(40, 8)), torch.randn(2, 24)
    before = model(x), {name: list(vars(module)) for name, module in model.named_modules()}
    replaced = small(model, "int8")
    assert not torch.equal(model(x), before[0])
    replaced.restore()
    replaced.restore()
    assert torch.equal(model(x), before[0])
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before[1]
    assert (replaced.copy_bytes, str(replaced)) == (0, "torch's linears")


def test_opting_out():
    model = linear()
    assert not small(model, "off").formats
    with pytest.raises(ConfigError, match="unknown linear_weights 'int4'; choose one of auto, off, fp32"):
        small(model, "int4")


def test_other_dtypes_are_not_covered():
    model = linear().bfloat16()
    assert not small(model).formats
    with pytest.raises(UnsupportedError, match=r"linear_weights=int8 is for float32 on the CPU, but .* bfloat16"):
        small(model, "int8")


@torch.no_grad()
@pytest.mark.parametrize("form", ["reference", "torch"])
def test_other_forms_round_where_that_was_asked_for(form, monkeypatch):
    module, x = linear(), torch.randn(5, 24)
    native = small(module, "int8")
    wanted = module(x)
    native.restore()
    monkeypatch.setenv("KVATLAS_KERNELS", form)
    assert not small(module).formats
    assert not small(module, "fp32").formats
    small(module, "int8")
    torch.testing.assert_close(module(x), wanted)


def test_copies_that_do_not_fit_into_memory(monkeypatch, caplog):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    replaced = small(linear())
    assert (replaced.formats, replaced.copy_bytes) == ({Format.FP32: 1}, 0)
    assert "copies of weights take 1.88 KiB, but 1000 B are available; decode steps read" in caplog.text
    with pytest.raises(CapacityError, match="use --linear-weights fp32"):
        small(linear(), "bf16")


def test_a_weight_that_does_not_fit_undoes_everything():
    model = nn.Sequential(linear(), linear())
    with torch.no_grad():
        model[1].weight[0, 0] = 1e6
    with pytest.raises(UnsupportedError, match=r"a weight of 1e\+06 does not fit into fp16"):
        small(model, "fp16")
    assert not any("forward" in vars(module) for module in model)


@torch.no_grad()
def test_an_adapter_replaces_and_restores(monkeypatch):
    monkeypatch.setattr(models_linear, "MIN_ELEMENTS", 1)
    model, ids = tiny_model("llama"), token_ids(9)[0][None]
    before = model(ids).logits
    with Adapter(model, linear_weights="bf16") as adapter:
        assert sum(adapter.fast.linears.formats.values()) == 3 * 7 + 1
        assert "forward" in vars(model.lm_head)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("choice", ["auto", "fp32"])
def test_greedy_tokens_are_those_of_torch(choice):
    def tokens(linear_weights: str) -> list[list[int]]:
        model = random_model("llama-mini", linear_weights=linear_weights)
        assert bool(model.adapter.fast.linears.formats) == (linear_weights != "off")
        llm = LLM(model, kv_memory="64MiB")
        prompts = [ids.tolist() for ids in token_ids(5, 40, 70)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
        return [output.outputs[0].token_ids for output in outputs]

    assert tokens(choice) == tokens("off")


def test_random_models_have_exact_copies():
    linears = random_model("llama-mini").adapter.fast.linears
    assert set(linears.formats) == {Format.BF16}


def test_the_bundled_model_and_its_option():
    assert not load_model(None, linear_weights="off").adapter.fast.linears.formats
    with pytest.raises(ConfigError, match="unknown linear_weights 'fp8'"):
        load_model(None, linear_weights="fp8")


def test_weights_written_behind_torchs_back_are_found() -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 24, bias=False))
    linears = SmallLinears(model, "bf16", min_elements=1)
    model[0].weight.data.mul_(2)
    linears.refresh()
    x = torch.randn(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(model[0](x), x @ model[0].weight.T + model[0].bias)
        assert "forward" in vars(model[1]), "the other one has not changed"


def test_weights_that_share_memory_but_not_a_shape_have_copies_of_their_own() -> None:
    first, second = nn.Linear(30, 40, bias=False), nn.Linear(30, 20, bias=False)
    second.weight = nn.Parameter(first.weight[:20])
    SmallLinears(nn.Sequential(first, second), "bf16", min_elements=1)
    with torch.no_grad():
        assert first(torch.randn(2, 30)).shape == (2, 40) and second(torch.randn(2, 30)).shape == (2, 20)


def test_pruned_linears_run_as_torchs() -> None:
    module = nn.Linear(30, 40)
    SmallLinears(nn.Sequential(module), "bf16", min_elements=1)
    prune.l1_unstructured(module, "weight", amount=0.5)
    x = torch.randn(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(module(x), x @ module.weight.T + module.bias)
