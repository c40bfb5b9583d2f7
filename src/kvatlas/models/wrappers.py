"""The causal LM of transformers inside of what others wrap around one.

A wrapper is opened where the model inside computes all that the wrapper does: torch.compile, data parallelism, and
adapters that replace linears in place (LoRA and its kin). It is refused where something would be left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvatlas.core.errors import ConfigError, UnsupportedError

# Kinds of PEFT adapters (``peft_type``) that are more than modules which treat every token alone.
_NOT_IN_PLACE = {
    "ADAPTION_PROMPT": "it attends to a prompt of its own inside of each layer",
    "POLY": "it needs the task of each row",
    "XLORA": "it runs the whole model first to weigh its parts",
}
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine", "InferenceEngine")


def unwrapped(model: Any, caller: str) -> PreTrainedModel:
    """Return the model that a wrapper, or a wrapper around a wrapper, runs; a model as it is.

    Args:
        model: of any kind.
        caller: the function that was given it, as errors name it.

    Raises:
        ConfigError: it is no causal LM of transformers, nor anything known around one.
        UnsupportedError: a wrapper does something that the model inside would not.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        inner = _inside(inner, caller)
    _check_adapters(inner)  # also those that transformers' add_adapter() puts in
    if not inner.can_generate():
        raise ConfigError(
            f"{type(inner).__name__} has no head that predicts tokens; load the checkpoint with AutoModelForCausalLM"
        )
    return inner


def _inside(wrapper: Any, caller: str) -> Any:
    """Return what is inside of the outermost wrapper."""
    kind = type(wrapper)
    if any(each.__name__ in _SHARDED for each in kind.__mro__):
        raise UnsupportedError(f"{kind.__name__} shards the weights of its model; attach a model that is whole")
    if isinstance(wrapper, nn.Module):
        if hasattr(wrapper, "_orig_mod"):  # torch.compile
            return wrapper._orig_mod
        if isinstance(wrapper, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return wrapper.module
        _check_adapters(wrapper)
        base: Any = getattr(wrapper, "get_base_model", None)
        if callable(base):
            return base()
        for names in (("base_model", "model"), ("base_model",), ("pretrained_model",)):
            inner: Any = wrapper
            for name in names:
                inner = getattr(inner, name, None)
            if isinstance(inner, nn.Module):
                return inner
    raise ConfigError(
        f"{caller} takes a causal LM of transformers or a known wrapper around one, got {kind.__name__}; "
        "give the model that AutoModelForCausalLM.from_pretrained returns"
    )


def _check_adapters(wrapper: nn.Module) -> None:
    """Refuse PEFT adapters that do not live in the modules of the model."""
    configs = getattr(wrapper, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2].upper()
        reason = _NOT_IN_PLACE.get(kind)
        if getattr(config, "is_prompt_learning", False):
            reason = "it puts vectors that are no tokens before the prompt"
        elif getattr(config, "alora_invocation_tokens", None):
            reason = "it acts on a part of each row only"
        if reason is not None:
            raise UnsupportedError(
                f"PEFT adapter {name!r} ({kind}) cannot be used while attached: {reason}; attach the base model, "
                "or one whose adapter replaces linears, such as LoRA"
            )


def running_eagerly() -> Any:
    """Return a context in which compiled models and modules run as they were written.

    torch.compile would trace our kernels, minutes long, and then give up on them.
    """
    return torch.compiler.set_stance("force_eager")
