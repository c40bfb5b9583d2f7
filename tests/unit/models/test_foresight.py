"""Queries that are foreseen from a layer's real input are the queries that then come."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES, tiny_model, token_ids
from torch import Tensor
from transformers import CONFIG_MAPPING

from kvatlas.core.errors import UnsupportedError
from kvatlas.models import clone
from kvatlas.models.adapter import Adapter, AttentionCall
from kvatlas.models.dense_context import DenseContext, Segment
from kvatlas.models.foresight import Foresight
from kvatlas.models.probe import _causal_class
from kvatlas.models.quiet import quiet

SEVERAL = (slice(0, 9), slice(4, 5), slice(3, 8), slice(8, 9))


class Watching(DenseContext):
    """Foresees each layer's queries from its own input and, where asked, the next layer's."""

    def __init__(self, rows: slice, ahead: int = 0) -> None:
        super().__init__()
        self.rows, self.ahead = rows, ahead
        self.foreseen: dict[int, Tensor] = {}
        self.asked: dict[int, Tensor] = {}
        self.last = 0

    def before_layer(self, layer: int, foresee) -> None:
        if layer + self.ahead < self.last:
            call, self.foreseen[layer + self.ahead] = foresee(layer + self.ahead, self.rows)
            assert call.layer == layer + self.ahead and call.scale > 0

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.asked[call.layer] = query[0].transpose(0, 1)[self.rows]
        return super().attend(call, query, key, value)


def run(adapter: Adapter, context: DenseContext, length: int = 9) -> Tensor:
    ids = token_ids(length)[0]
    if isinstance(context, Watching):
        context.last = len(adapter.shape.layers)
    context.begin([Segment(sequence=0, start=0, num_tokens=length)])
    places = torch.arange(length)
    return adapter.forward(ids, places, context, places, rope_tokens=length)


def multi_head_latent() -> torch.nn.Module:
    """DeepSeek's attention, whose keys are wider than its values."""
    config = CONFIG_MAPPING["deepseek_v2"](num_experts_per_tok=2)
    with quiet():
        return clone.build(_causal_class(config), clone.tiny_config(config))


def model(family: str) -> torch.nn.Module:
    return multi_head_latent() if family == "deepseek_v2" else tiny_model(family)


@pytest.mark.parametrize("family", [*FAMILIES, "stablelm", "nemotron", "deepseek_v2"])
def test_foreseen_from_its_own_input_is_what_comes(family: str) -> None:
    with Adapter(model(family), linear_weights="off") as adapter:  # watched or not, transformers' layers
        plain = run(adapter, DenseContext())
        adapter.watch_inputs()
        for rows in SEVERAL:
            context = Watching(rows)
            assert torch.equal(run(adapter, context), plain), "looking must not change what is seen"
            assert sorted(context.foreseen) == list(range(len(adapter.shape.layers)))
            for layer, query in context.foreseen.items():
                assert query.shape == context.asked[layer].shape
                torch.testing.assert_close(query, context.asked[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "qwen3", "deepseek_v2"])
def test_foreseen_from_the_layer_before_is_a_guess_of_the_same_shape(family: str) -> None:
    with Adapter(model(family), linear_weights="off") as adapter:  # watched or not, transformers' layers
        plain = run(adapter, DenseContext())
        adapter.watch_inputs()
        context = Watching(slice(2, 7), ahead=1)
        assert torch.equal(run(adapter, context), plain)
        assert sorted(context.foreseen) == list(range(1, len(adapter.shape.layers)))
        for layer, query in context.foreseen.items():
            assert query.shape == context.asked[layer].shape
            assert not torch.allclose(query, context.asked[layer], rtol=1e-3), "another input, yet the same queries"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_native_layers_show_their_input_and_stay(family: str) -> None:
    """One request that looks ahead costs the others nothing but the look."""
    with Adapter(model(family)) as adapter:
        layers = [layer.forward for layer in adapter.fast.layers._replaced]
        if not layers:
            pytest.skip("no native kernels here")
        plain, wanted = run(adapter, DenseContext()), Watching(slice(2, 7), ahead=1)
        adapter.watch_inputs()
        assert all(layer._is_unchanged() for layer in layers)
        assert torch.equal(run(adapter, DenseContext()), plain) and torch.equal(run(adapter, wanted), plain)
        assert sorted(wanted.foreseen) == list(range(1, len(adapter.shape.layers)))
        adapter.model.register_forward_pre_hook(lambda *_: None)  # the whole model's is not in the way
        layers[0]._attention.register_forward_pre_hook(lambda *_: None)  # somebody else wants to see this one run
        assert not layers[0]._is_unchanged()
        again = Watching(slice(2, 7), ahead=1)
        torch.testing.assert_close(run(adapter, again), plain, rtol=1e-4, atol=1e-4)
        for layer, query in wanted.foreseen.items():
            torch.testing.assert_close(query, again.foreseen[layer], rtol=1e-4, atol=1e-5)


def test_one_packed_token() -> None:
    """Every tensor looks like a row of one then."""
    with Adapter(tiny_model("llama")) as adapter:
        adapter.watch_inputs()
        context = Watching(slice(0, 1))
        run(adapter, context, length=1)
        for layer, query in context.foreseen.items():
            torch.testing.assert_close(query, context.asked[layer])


def test_restored_models_are_not_watched() -> None:
    own = tiny_model("llama")
    ids = token_ids(7)[0][None]
    with torch.no_grad():
        before = own(ids).logits
    with Adapter(own) as adapter:
        adapter.watch_inputs()
        adapter.watch_inputs()
        hooks = [len(module._forward_pre_hooks) for module in own.modules()]
        assert sum(hooks) == len(adapter.shape.layers), "hooked once"
    assert not any(module._forward_pre_hooks for module in own.modules())
    with torch.no_grad():
        assert torch.equal(own(ids).logits, before)


def test_modules_that_do_not_attend_cannot_be_foreseen() -> None:
    class Silent(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    foresight = Foresight([Silent()], {0: 0})
    with pytest.raises(UnsupportedError, match="Silent did not attend"):
        foresight._foresee(0, slice(0, 1), (torch.zeros(1, 3, 4),), {})
    with pytest.raises(UnsupportedError, match=r"takes no hidden states \[1, T, C\]"):
        foresight._foresee(0, slice(0, 1), (), {"hidden_states": torch.zeros(3, 4)})
