"""Native decoder layers compute what transformers' do, stand aside where these could differ, and can be given back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.families import FAMILIES, tiny_model, token_ids
from torch import Tensor, nn

from kvatlas.core.vocabulary import Format
from kvatlas.kernels import product
from kvatlas.kernels.native import Library, library
from kvatlas.models import linear as models_linear
from kvatlas.models.adapter import Adapter
from kvatlas.models.dense_context import DenseContext, Segment

pytestmark = pytest.mark.skipif(not isinstance(library(), Library), reason="no native kernels here")
COVERED = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _native(monkeypatch) -> None:
    monkeypatch.delenv("KVATLAS_KERNELS", raising=False)


def run(adapter: Adapter, tokens: int = 9) -> Tensor:
    context = DenseContext()
    context.begin([Segment(sequence=0, start=0, num_tokens=tokens)])
    places = torch.arange(tokens)
    return adapter.forward(token_ids(tokens)[0], places, context, places, rope_tokens=tokens).clone()


def plainly(model: nn.Module, tokens: int = 9) -> Tensor:
    with Adapter(model, linear_weights="off") as adapter:
        return run(adapter, tokens)


def counted(adapter: Adapter) -> list[int]:
    """Count, from now on, the forwards that transformers' own layers run."""
    calls = [0]
    for layer in adapter.layers._replaced:
        fused = layer.forward
        original = fused._original

        def counting(*args, original=original, **kwargs):
            calls[0] += 1
            return original(*args, **kwargs)

        fused._original = counting
    return calls


@pytest.mark.parametrize("tokens", [1, 9, 32, 33, 70])
@pytest.mark.parametrize("family", COVERED)
def test_logits_are_those_of_transformers_layers(family, tokens):
    model = tiny_model(family)
    expected = plainly(model, tokens)
    with Adapter(model) as adapter:
        assert adapter.layers.count == 3
        calls = counted(adapter)
        torch.testing.assert_close(run(adapter, tokens), expected, rtol=1e-3, atol=1e-4)
        assert calls == [0]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(COVERED)))
def test_other_families_keep_their_layers(family):
    with Adapter(tiny_model(family)) as adapter:
        assert adapter.layers.count == 0
        assert str(adapter.layers) == "transformers' layers"


def test_qwen2_has_biases_and_qwen3_norms_of_heads():
    """Else the tests above would not cover them."""
    assert tiny_model("qwen2").model.layers[0].self_attn.q_proj.bias is not None
    assert tiny_model("qwen3").model.layers[0].self_attn.q_norm.weight.numel() == 24


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2),
        lambda layer: layer.self_attn.register_forward_pre_hook(lambda module, args: None),
        lambda layer: layer.input_layernorm.weight.mul_(2),
        lambda layer: setattr(layer.mlp, "down_proj", nn.Linear(96, 64, bias=False)),
        lambda layer: setattr(layer.self_attn.k_proj, "weight", nn.Parameter(torch.randn(32, 64))),
        lambda layer: setattr(layer.self_attn.o_proj.weight, "data", torch.randn(64, 64)),
        lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    ],
)
@torch.no_grad()
def test_a_layer_that_was_changed_runs_as_it_is(change):
    model, other = tiny_model("llama"), tiny_model("llama")
    with Adapter(model) as adapter:
        calls = counted(adapter)
        torch.manual_seed(5)
        change(model.model.layers[1])
        torch.manual_seed(5)
        change(other.model.layers[1])
        torch.testing.assert_close(run(adapter), plainly(other), rtol=1e-3, atol=1e-4)
        assert calls == [1]


def test_global_hooks_see_every_module():
    seen = []
    with Adapter(tiny_model("llama")) as adapter:
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
        try:
            run(adapter)
        finally:
            handle.remove()
    assert sum(kind.__name__ == "LlamaMLP" for kind in seen) == 3


def test_a_class_that_computes_something_else_keeps_its_layers(monkeypatch, caplog):
    kind = type(tiny_model("llama").model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: self.down_proj(self.gate_proj(x) * self.up_proj(x)))
    model = tiny_model("llama")
    with Adapter(model) as adapter:
        assert adapter.layers.count == 0
        assert "computes something else" in caplog.text


def test_a_subclass_keeps_its_layers():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.__class__ = type("Mine", (type(layer),), {})
    with Adapter(model) as adapter:
        assert adapter.layers.count == 0


@pytest.mark.parametrize("choice", ["off", "auto"])
def test_no_layer_is_replaced_where_linears_are_not(choice, monkeypatch):
    if choice == "auto":
        monkeypatch.setenv("KVATLAS_KERNELS", "torch")
    with Adapter(tiny_model("llama"), linear_weights=choice) as adapter:
        assert adapter.layers.count == 0


def test_prompts_run_as_transformers_wrote_them_where_products_are_missing(monkeypatch):
    monkeypatch.setattr(product, "available", lambda: False)
    model = tiny_model("llama")
    with Adapter(model) as adapter:
        assert adapter.layers.count == 3
        calls = counted(adapter)
        run(adapter, 32)
        assert calls == [0]
        run(adapter, 33)
        assert calls == [3]


def test_restore_gives_the_layers_back_and_copies_run_their_own():
    model = tiny_model("llama")
    with Adapter(model) as adapter:
        assert adapter.layers.count == 3
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for made in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            layer = made.model.layers[0]
            assert layer.forward.func is type(layer).forward
            assert layer.forward.args == (layer,)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_weights_changed_behind_torchs_back_are_noticed_at_the_next_generation(monkeypatch):
    monkeypatch.setattr(models_linear, "MIN_ELEMENTS", 1)
    model, other = (tiny_model("llama").bfloat16().float() for _ in range(2))
    with Adapter(model) as adapter:
        assert adapter.linears.formats[Format.BF16]
        calls = counted(adapter)
        for each in (model, other):
            each.model.layers[0].mlp.up_proj.weight.data.mul_(3)
        adapter.linears.refresh()
        torch.testing.assert_close(run(adapter), plainly(other), rtol=1e-3, atol=1e-4)
        assert calls == [1]
