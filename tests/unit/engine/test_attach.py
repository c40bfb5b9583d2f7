"""What may be attached, and how a model gets free again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.driving import loaded
from tests.families import tiny_config, tiny_model, token_ids
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import kvatlas
from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.models.owner import adapter_of

PROMPTS = torch.stack(token_ids(9, 9, seed=3))


def answer(model: Any) -> Tensor:
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    result = model.generate(
        PROMPTS, attention_mask=torch.ones_like(PROMPTS), return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(result.logits)


def assert_runs(model: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)


# Wrappers


class Lora(nn.Module):
    """A linear with something of low rank beside it, as PEFT puts it in the linear's place."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.enabled = True

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + self.lora_B(self.lora_A(x)) if self.enabled else y


class Tuner(nn.Module):
    """PEFT's tuner: a model whose linears it has replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        for layer in model.model.layers:
            for holder, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"), (layer.mlp, "up_proj")):
                setattr(holder, name, Lora(getattr(holder, name)))


class Peft(nn.Module):
    """PEFT's model around a tuner."""

    def __init__(self, model: PreTrainedModel, **config: Any) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        settings = {"peft_type": "LORA", "is_prompt_learning": False, **config}
        self.peft_config = {"default": SimpleNamespace(**settings)}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.generate(*args, **kwargs)


class PeftOfToday(Peft):
    def get_base_model(self) -> PreTrainedModel:
        return self.base_model.model


class ValueHead(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.pretrained_model = model


class FullyShardedDataParallel(nn.Module):
    """Named as torch's, whose import alone would start nothing, but whose making needs processes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.module = model


def tuned(kind: type[Peft] = PeftOfToday, **config: Any) -> Peft:
    torch.manual_seed(5)
    return kind(tiny_model("llama"), **config)


@pytest.mark.parametrize("kind", [Peft, PeftOfToday])
@pytest.mark.parametrize("around", ["alone", "compiled", "parallel"])
def test_a_lora_inside_is_what_runs(kind: type[Peft], around: str) -> None:
    model = tuned(kind)
    wanted = answer(model)
    assert not torch.allclose(wanted, answer(tiny_model("llama")), atol=1e-2)
    wrapped = {"alone": model, "compiled": torch.compile(model), "parallel": nn.DataParallel(model)}[around]
    with kvatlas.attach(wrapped, block_size=4):
        assert_runs(model, wanted)
        for part in model.modules():  # somebody switches the adapter off while the model is attached
            if isinstance(part, Lora):
                part.enabled = False
        assert_runs(model, answer(tiny_model("llama")))
    for part in model.modules():
        if isinstance(part, Lora):
            part.enabled = True
    assert torch.equal(answer(model), wanted)


def test_weights_of_an_adapter_may_change_while_attached() -> None:
    model = tuned()
    with kvatlas.attach(model, block_size=4):
        before = answer(model)
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, Lora):
                    part.lora_B.weight.mul_(3.0)
        after = answer(model)
    assert not torch.allclose(before, after, atol=1e-2)
    assert_runs(model, after)


WRAPPERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "a value head": ValueHead,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_opened(name: str) -> None:
    model = tiny_model("llama")
    wanted = answer(model)
    wrapper = WRAPPERS[name](model)
    with kvatlas.attach(wrapper, block_size=4):
        assert_runs(model, wanted)
    kvatlas.attach(wrapper)
    kvatlas.detach(wrapper)
    assert adapter_of(model) is None and torch.equal(answer(model), wanted)


def compile_forward(model: PreTrainedModel) -> None:
    model.forward = torch.compile(model.forward)


def compile_layers(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.compile()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("compiled", [nn.Module.compile, compile_forward, compile_layers])
def test_what_was_compiled_in_place_runs_as_written(compiled: Callable[[PreTrainedModel], Any]) -> None:
    model = tiny_model("llama")
    wanted = answer(model)
    compiled(model)
    with kvatlas.attach(model, block_size=4):
        assert_runs(model, wanted)


@pytest.mark.parametrize(
    ("wrapper", "kind", "parts"),
    [
        (lambda: FullyShardedDataParallel(tiny_model("llama")), UnsupportedError, ["FullySharded", "weights"]),
        (lambda: tuned(is_prompt_learning=True, peft_type="P_TUNING"), UnsupportedError, ["P_TUNING", "vectors"]),
        (lambda: tuned(peft_type="PeftType.XLORA"), UnsupportedError, ["'default' (XLORA)", "whole model"]),
        (lambda: tuned(alora_invocation_tokens=[7]), UnsupportedError, ["'default' (LORA)", "part of each row"]),
        (lambda: AutoModel.from_config(tiny_config("llama")), ConfigError, ["LlamaModel", "AutoModelForCausalLM"]),
        (lambda: nn.Linear(3, 3), ConfigError, ["got Linear"]),
        (lambda: "gpt2", ConfigError, ["got str", "from_pretrained"]),
        (lambda: None, ConfigError, ["got NoneType"]),
        (lambda: SimpleNamespace(model=1), ConfigError, ["got SimpleNamespace"]),
    ],
)  # fmt: skip
def test_what_cannot_be_attached(wrapper: Callable[[], Any], kind: type[Exception], parts: list[str]) -> None:
    given = wrapper()
    for call in (kvatlas.attach, kvatlas.detach) if kind is ConfigError else (kvatlas.attach,):
        with pytest.raises(kind) as refusal:
            call(given)
        assert "\n" not in str(refusal.value) and all(part in str(refusal.value) for part in parts), refusal.value
        assert "takes" not in str(refusal.value) or f"{call.__name__}() takes" in str(refusal.value)


# Getting free again


def test_a_dropped_handle_does_not_keep_the_model() -> None:
    model = tiny_model("llama")
    wanted = answer(model)
    kvatlas.attach(model, "streaming_llm(sinks=1, recent=3)")
    gc.collect()
    assert not torch.allclose(answer(model), wanted, atol=1e-2), "it is attached, whoever holds the handle"
    with pytest.raises(UnsupportedError, match=r"attached to kvatlas already; call kvatlas\.detach\(model\) first"):
        kvatlas.attach(model)
    kvatlas.detach(model)
    assert "forward" not in vars(model) and "generate" not in vars(model)
    assert torch.equal(answer(model), wanted)
    with kvatlas.attach(model):
        assert_runs(model, wanted)


def test_detaching_twice_or_what_is_not_attached_changes_nothing() -> None:
    model = tiny_model("llama")
    wanted = answer(model)
    kvatlas.detach(model)
    attachment = kvatlas.attach(model)
    kvatlas.detach(model)
    attachment.detach()
    again = kvatlas.attach(model, "streaming_llm(sinks=1, recent=3)")
    attachment.detach()  # an old handle has nothing to say any more
    assert adapter_of(model) is again.engine.model.adapter
    again.detach()
    assert torch.equal(answer(model), wanted)


def test_a_model_that_an_engine_took_is_given_back() -> None:
    model = tiny_model("llama")
    wanted = answer(model)
    llm = kvatlas.LLM(loaded(model))
    with pytest.raises(UnsupportedError, match=r"kvatlas\.detach\(model\)"):
        model(PROMPTS)
    kvatlas.detach(model)
    assert torch.equal(answer(model), wanted)
    with pytest.raises(Exception, match="was restored"):
        llm.generate([5, 6, 7])


def test_a_failed_attach_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    wanted = answer(model)
    for options in ({"kv_memory": 1}, {"strategy": "nosuch"}, {"block_size": 0}):
        with pytest.raises(Exception, match=r"."):
            kvatlas.attach(model, **options)
        assert adapter_of(model) is None and torch.equal(answer(model), wanted)


def test_an_attached_model_is_collected_with_all_that_is_attached() -> None:
    model = tiny_model("llama")
    gone = [weakref.ref(model), weakref.ref(kvatlas.attach(model).engine)]
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_copy_of_an_attached_model_says_so() -> None:
    model = tiny_model("llama")
    with kvatlas.attach(model), pytest.raises(UnsupportedError, match="was copied while attached"):
        kvatlas.detach(copy.deepcopy(model))
    with pytest.raises(UnsupportedError, match=r"kvatlas\.detach\(model\)"), kvatlas.attach(model):
        model(PROMPTS)
