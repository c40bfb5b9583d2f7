"""Native decoder layers compute what transformers' do, stand aside where these could differ, and can be given back."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from tests.families import FAMILIES, tiny_model, token_ids
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from kvatlas.core.errors import UnsupportedError
from kvatlas.core.vocabulary import Format
from kvatlas.kernels import product
from kvatlas.kernels.native import Library, library
from kvatlas.models.adapter import Adapter
from kvatlas.models.attention import IMPLEMENTATION, Forward, register, running
from kvatlas.models.dense_context import DenseContext, Segment
from kvatlas.models.fast import layers as models_layers, linears as models_linear
from kvatlas.models.fast.layers import FusedLayers
from kvatlas.models.fast.linears import SmallLinears

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
    for layer in adapter.fast.layers._replaced:
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
        assert adapter.fast.layers.num_layers == 3
        calls = counted(adapter)
        torch.testing.assert_close(run(adapter, tokens), expected, rtol=1e-3, atol=1e-4)
        assert calls == [0]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(COVERED)))
def test_other_families_keep_their_layers(family):
    with Adapter(tiny_model(family)) as adapter:
        assert adapter.fast.layers.num_layers == 0
        assert str(adapter.fast.layers) == "transformers' layers"


def test_qwen2_has_biases_and_qwen3_norms_of_heads():
    """Else the tests above would not cover them."""
    assert tiny_model("qwen2").model.layers[0].self_attn.q_proj.bias is not None
    assert tiny_model("qwen3").model.layers[0].self_attn.q_norm.weight.numel() == 24


class Doubled(LlamaMLP):
    """Another class that a part may be given."""

    def forward(self, x: Tensor) -> Tensor:
        """Return twice what the MLP computes."""
        return 2 * super().forward(x)


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
        lambda layer: setattr(layer, "mlp", nn.Identity()),
        lambda layer: setattr(layer, "input_layernorm", nn.Identity()),
        lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
        lambda layer: setattr(layer.self_attn, "scaling", 0.9),
        lambda layer: setattr(layer.mlp, "__class__", Doubled),
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


@torch.no_grad()
def test_a_patched_class_computes_as_patched(monkeypatch):
    with Adapter(tiny_model("llama")) as adapter:
        calls = counted(adapter)
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
        patched = run(adapter)
        assert calls == [3]
    torch.testing.assert_close(patched, plainly(tiny_model("llama")), rtol=1e-3, atol=1e-4)


def test_a_model_in_training_is_refused_as_before():
    model = tiny_model("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with Adapter(model) as adapter:
        assert adapter.fast.layers.num_layers == 3
        model.train()
        with pytest.raises(UnsupportedError, match="dropout"):
            run(adapter)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x, rotation: layer(x, None, position_embeddings=rotation),
        lambda layer, x, rotation: layer(x, position_embeddings=rotation, packed_rows=3),
        lambda layer, x, rotation: layer(x.transpose(1, 2).contiguous().transpose(1, 2), position_embeddings=rotation),
        lambda layer, x, rotation: layer(x, position_embeddings=[*rotation]),
        lambda layer, x, rotation: layer(x, position_embeddings=tuple(each[:, :1] for each in rotation)),
        lambda layer, x, rotation: torch.enable_grad()(layer)(x, position_embeddings=rotation),
        lambda layer, x, rotation: torch.autocast("cpu")(layer)(x, position_embeddings=rotation),
    ],
    ids=["positional", "unknown argument", "strided input", "another rotation", "one for all", "gradients", "autocast"],
)
@torch.no_grad()
def test_unusual_calls_run_as_transformers_wrote_them(call):
    model = tiny_model("llama")
    with Adapter(model) as adapter:
        calls, layer = counted(adapter), model.model.layers[1]
        x, rotation = torch.randn(1, 4, 64), (torch.randn(1, 4, 16), torch.randn(1, 4, 16))
        for each, expected in ((lambda *given: layer(given[1], position_embeddings=given[2]), [0]), (call, [1])):
            context = DenseContext()
            context.begin([Segment(sequence=0, start=0, num_tokens=4)])
            with running(Forward(context=context)), contextlib.suppress(UnsupportedError):
                each(layer, x, rotation)
            assert calls == expected


def without_silu(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.gate_proj(x) * self.up_proj(x)))


def with_queries_of_their_own(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention whose output alone would not tell: the witness gives queries plus values."""
    normal = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *given: (normal(q, k, *given)[0], 2 * k))


def that_raises(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_layers, "_agree", lambda *given: 1 / 0)


def with_a_hook(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, out: None)


def with_a_forward_of_its_own(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[2].input_layernorm.forward = lambda x: x


def with_gelu(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[2].mlp.act_fn = nn.GELU()


def with_another_attention(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = model.model.layers[2].self_attn
    attention.__class__ = type("Mine", (type(attention),), {})


def with_a_norm_for_all(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[2].input_layernorm.weight = nn.Parameter(torch.ones(1))


def with_a_strided_norm(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[2].input_layernorm.weight = nn.Parameter(torch.ones(128)[::2])


@pytest.mark.parametrize(
    "odd",
    [
        without_silu, with_queries_of_their_own, that_raises, with_a_hook, with_a_forward_of_its_own, with_gelu,
        with_another_attention, with_a_norm_for_all, with_a_strided_norm,
    ],
)  # fmt: skip
def test_a_model_that_is_not_what_its_class_promises_loads_and_keeps_its_layers(odd, monkeypatch):
    model = tiny_model("llama")
    odd(model, monkeypatch)
    with Adapter(model) as adapter:
        assert adapter.fast.layers.num_layers == 0
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("mode", ["hook", "autocast", "bfloat16", "float64"])
def test_what_is_odd_while_loading_does_not_spare_a_layer_its_trial(mode, monkeypatch):
    model = tiny_model("llama")
    without_silu(model, monkeypatch)
    with contextlib.ExitStack() as undo:
        if mode == "hook":
            handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
            undo.callback(handle.remove)
        elif mode == "autocast":
            undo.enter_context(torch.autocast("cpu"))
        else:
            undo.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(getattr(torch, mode))
        product.available.cache_clear()
        linears = SmallLinears(model)
        register()
        model.set_attn_implementation(IMPLEMENTATION)
        assert FusedLayers(model, linears).num_layers == 0
        assert product.available()


def test_an_interrupted_load_leaves_no_layer_behind(monkeypatch):
    trial, taken = models_layers._trial, []

    def interrupted(layer, weights):
        taken.append(layer)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return trial(layer, weights)

    monkeypatch.setattr(models_layers, "_trial", interrupted)
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        Adapter(model)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_restore_leaves_alone_what_somebody_put_in_our_place():
    model = tiny_model("llama")
    with Adapter(model):
        model.model.layers[1].forward = wrapper = lambda *args, **kwargs: None
    assert model.model.layers[1].forward is wrapper


def test_loading_does_not_move_the_users_random_state():
    model = tiny_model("llama")
    product.available.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with Adapter(model):
        assert torch.equal(torch.rand(1), expected)


def test_global_hooks_see_every_module():
    seen = []
    with Adapter(tiny_model("llama")) as adapter:
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
        try:
            run(adapter)
        finally:
            handle.remove()
    assert sum(kind.__name__ == "LlamaMLP" for kind in seen) == 3


def test_a_subclass_keeps_its_layers():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.__class__ = type("Mine", (type(layer),), {})
    with Adapter(model) as adapter:
        assert adapter.fast.layers.num_layers == 0


@pytest.mark.parametrize("choice", ["off", "auto"])
def test_no_layer_is_replaced_where_linears_are_not(choice, monkeypatch):
    if choice == "auto":
        monkeypatch.setenv("KVATLAS_KERNELS", "torch")
    with Adapter(tiny_model("llama"), linear_weights=choice) as adapter:
        assert adapter.fast.layers.num_layers == 0


def test_prompts_run_as_transformers_wrote_them_where_products_are_missing(monkeypatch):
    monkeypatch.setattr(product, "available", lambda: False)
    model = tiny_model("llama")
    with Adapter(model) as adapter:
        assert adapter.fast.layers.num_layers == 3
        calls = counted(adapter)
        run(adapter, 32)
        assert calls == [0]
        run(adapter, 33)
        assert calls == [3]


def test_restore_gives_the_layers_back_and_copies_run_their_own():
    model = tiny_model("llama")
    with Adapter(model) as adapter:
        assert adapter.fast.layers.num_layers == 3
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
        assert adapter.fast.linears.formats[Format.BF16]
        calls = counted(adapter)
        for each in (model, other):
            each.model.layers[0].mlp.up_proj.weight.data.mul_(3)
        adapter.fast.linears.refresh()
        torch.testing.assert_close(run(adapter), plainly(other), rtol=1e-3, atol=1e-4)
        assert calls == [1]
