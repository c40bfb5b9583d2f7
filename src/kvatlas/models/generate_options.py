"""Which options of transformers' ``generate`` an attached model cannot honour, and why.

What counts is what the call comes to: its own options over those of its ``generation_config``, over the checkpoint's,
as transformers merges them. Options that shape logits, stop, stream or report need nothing of the cache and are left to
transformers; any kind of search but greedy search and sampling is refused, even if its option is not listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from kvatlas.core.errors import ConfigError, UnsupportedError
from kvatlas.core.messages import shown

_OWN_CACHE = "the cache is kvatlas's own"
_FORWARD = "logits are all that is returned of a forward"
_REWINDS = "it rewinds the cache, and evicted tokens do not come back"

# The value, beside None, that leaves an option of GenerationConfig off, and what it would need.
_CONFIG: dict[str, tuple[object, str]] = {
    "num_beams": (1, "beams reorder the cache"),
    "constraints": (None, "beams reorder the cache"),
    "force_words_ids": (None, "beams reorder the cache"),
    "prompt_lookup_num_tokens": (None, _REWINDS),
    "assistant_early_exit": (None, _REWINDS),
    "use_mtp": (False, _REWINDS),
    "dola_layers": (None, _FORWARD),
    "guidance_scale": (1, "guidance runs the model a second time, on a cache of its own"),
    "token_healing": (False, "it generates inside of generate; heal the prompt before"),
    "use_cache": (True, "the strategy is about the cache"),
    "cache_implementation": ("dynamic", _OWN_CACHE),
    "prefill_chunk_size": (None, "kvatlas cuts prompts itself, as attach(max_batched_tokens=...) says"),
    "output_attentions": (False, _FORWARD),
    "output_hidden_states": (False, _FORWARD),
}

# Likewise for arguments of generate() that are no part of GenerationConfig.
_CALL: dict[str, tuple[object, str]] = {
    "assistant_model": (None, _REWINDS),
    "custom_generate": (None, "a decoding loop of its own may rewind the cache"),
    "past_key_values": (None, _OWN_CACHE),
    "inputs_embeds": (None, "sequences are made of token ids"),
    "synced_gpus": (False, "a model runs on one device"),
}

# What generate() passes to forward, and the driver of the rows knows or need not know.
_PASSED = frozenset(
    {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
)


def check_call(model: PreTrainedModel, options: Mapping[str, Any]) -> GenerationConfig:
    """Return what a call of ``model.generate`` comes to.

    Args:
        model: whose generation config completes the call.
        options: the arguments of the call, by name.

    Raises:
        UnsupportedError: an option that is switched on cannot be honoured.
        ConfigError: the prompts are empty, or mask or positions do not fit them.
    """
    for name, (off, reason) in _CALL.items():
        _check(name, options.get(name), off, reason)
    named = {name: value for name, value in options.items() if name != "generation_config"}
    _check_prompts(options)
    config: GenerationConfig = model._prepare_generation_config(options.get("generation_config"), **named)[0]
    for name, (off, reason) in _CONFIG.items():
        _check(name, getattr(config, name, None), off, reason)
    mode = config.get_generation_mode(None)
    if mode not in ("greedy_search", "sample"):
        alpha = f" (penalty_alpha={config.penalty_alpha!r})" if mode == "contrastive_search" else ""
        raise UnsupportedError(
            f"{str(mode.value).replace('_', ' ')}{alpha} cannot run while attached; use greedy search or sampling"
        )
    return config


def check_forward(inputs: Mapping[str, Any]) -> None:
    """Refuse what ``generate`` passes to a forward, beside tokens, that would be lost on the way.

    Raises:
        UnsupportedError: an input of the model is given that the driver of the rows does not know.
    """
    for name, value in inputs.items():
        if name not in _PASSED and value is not False and value != {}:
            _check(name, value, None, "kvatlas runs the model on token ids alone")


def unpadded(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """Return the tokens of each row without its padding on the left.

    Args:
        ids: [B, T].
        mask: [B, T], 0 for padding; None: there is none.
        positions: [.., 1 or B, T], or None for the usual ones, which is also what they must be.

    Raises:
        ConfigError: the mask hides something else, or a row has no token.
        UnsupportedError: positions do not count the tokens of each row from 0.
    """
    seen = ids.new_ones(ids.shape) if mask is None else mask.to(ids)
    rows: list[list[int]] = []
    for row, keep in zip(ids.tolist(), seen.tolist(), strict=True):
        first = keep.index(1) if 1 in keep else len(row)
        if any(keep[:first]) or any(each != 1 for each in keep[first:]) or first == len(row):
            raise ConfigError("attention_mask must hide padding on the left only and leave a token in every row")
        rows.append(row[first:])
    if positions is not None:
        _check_positions(positions, seen)
    return rows


def _check_prompts(options: Mapping[str, Any]) -> None:
    """Refuse prompts without a token, and a mask of another shape: transformers would count positions by it."""
    mask, ids = options.get("attention_mask"), options.get("inputs", options.get("input_ids"))
    if isinstance(ids, Tensor) and not ids.numel():
        raise ConfigError(f"the prompt is empty: input_ids has shape {list(ids.shape)}; give at least one token")
    if isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.shape != ids.shape:
        raise ConfigError(
            f"attention_mask has shape {list(mask.shape)} for input_ids of shape {list(ids.shape)}; give it that shape"
        )


def _check_positions(positions: Tensor, seen: Tensor) -> None:
    usual = seen.cumsum(-1) - 1
    fits = positions.ndim > 1 and positions.shape[-1] == seen.shape[1] and positions.shape[-2] in (1, len(seen))
    if not fits or not bool(((positions == usual) | (seen == 0)).all()):
        raise UnsupportedError(
            "position_ids that do not count the tokens of each row from 0 cannot be used while attached: "
            "kvatlas numbers the tokens of a sequence itself; leave position_ids out"
        )


def _check(name: str, value: Any, off: object, reason: str) -> None:
    if value is None or (isinstance(value, bool | int | float | str) and value == off):
        return
    plain = isinstance(value, bool | int | float | str | list | dict)
    text = shown(value) if plain else f"<{type(value).__name__}>"
    raise UnsupportedError(f"{name}={text} cannot be used while attached: {reason}; pass {name}={off!r}")
