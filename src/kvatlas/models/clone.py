"""A tiny clone of a model, from its own configuration: same classes, one layer of each kind, random weights.

The clone keeps what decides how a family attends - head widths, GQA or not, layer kinds, RoPE type, KV
sharing - and shrinks everything else. Windows, chunks and RoPE limits shrink below the probe's longest
sequence, so that a family whose window we would miss fails the probe instead of failing its user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

WINDOW_TOKENS = 5
ROPE_LIMIT_TOKENS = 12
VOCAB_SIZE = 128
MAX_PARAMETERS = 50_000_000

_MAX_LAYERS = 8
_WIDTH = 64
_QUERY_HEADS = 4
_SOFTCAP = 2.0

# Rules for integers by the name of the setting; the first that matches gives the largest value allowed.
_CAPS = tuple(
    (re.compile(pattern), limit)
    for pattern, limit in (
        (r"(^|_)vocab_size|^vocab_size_per_layer_input$", VOCAB_SIZE),
        (r"window_layers|window_pattern|window_freq|window_interval|chunk_size_feed_forward", 2**31),
        (r"local_attention", 2 * WINDOW_TOKENS),
        (r"window|chunk", WINDOW_TOKENS),
        (r"index.*top_?k|top_?k.*(block|token|index)|sparse.*top_?k", 2),
        (r"experts?_per_tok|experts?_top_?k|(^|_)moe_?(top_?k|k)$|top_k_experts|^top_?k$", 2),
        (r"(^|_)n_group$|(^|_)topk_group$|expert_groups?$", 1),
        (r"experts?$|experts?_num$", 4),
        (r"intermediate_size|ffn|n_inner|(^|_)mlp_dim|expert.*(size|dim)$|intermediate_dim", _WIDTH),
        (r"lora_rank", 32),
        (r"first_k_dense_replace|num_dense_layers", 1),
        (r"nextn_predict_layers|mtp_.*layers", 0),
        (r"hidden_size_per_layer_input", 16),
    )
)
_QUERY_HEADS_NAME = re.compile(r"(attention_heads|n_heads?|num_heads|num_query_heads)$")
_KV_HEADS_NAME = re.compile(r"(key_value_heads|kv_heads|multi_query_group_num)$")
_TOKEN_NAME = re.compile(r"_token_(id|index)$|_token_ids$")
_NOT_THE_MODEL = ("quantization_config", "_name_or_path", "architectures", "transformers_version", "dtype")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration of the same class that builds in milliseconds and attends the same way.

    Args:
        config: of the real model; not changed.
    """
    settings = _shrink(config)
    for name in _NOT_THE_MODEL:
        settings.pop(name, None)
    return type(config).from_dict(settings)


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a random model in float32 on the CPU; the same for each call, and the user's RNG does not move.

    Raises:
        ValueError: the model would have more than ``MAX_PARAMETERS`` weights.
    """
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"a clone of {size:,} weights is not tiny")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that would reseed the accelerator's generators as well.
        torch.default_generator.manual_seed(0)
        model: PreTrainedModel = model_class(config).float().eval()
        _enliven(model)
    return model


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> None:
    """Give weights a size at which attention is far from uniform; with the usual 0.02 masks hardly matter."""
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
        elif weight.ndim == 1:
            weight.add_(torch.randn_like(weight), alpha=0.1)


def _shrink(config: PreTrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = config.to_dict()
    names = _Names(config, settings)
    keep = _kept_layers(names, settings)
    overrides = settings.pop("per_layer_config", None)
    for name, value in settings.items():
        if name in config.sub_configs and getattr(config, name, None) is not None:
            settings[name] = _shrink(getattr(config, name))
        elif isinstance(value, list) and len(value) == names.layers:
            settings[name] = [_smaller(name, value[layer], names) for layer in keep]
        else:
            settings[name] = _smaller(name, value, names)
    _shrink_widths(names, settings)
    _shrink_rope(names, settings)
    if names.layers:
        settings[names.key("num_hidden_layers")] = len(keep)
    if names.shared_layers:
        settings["num_kv_shared_layers"] = sum(layer >= names.first_shared for layer in keep)
    if overrides:
        settings["per_layer_config"] = _shrink_overrides(overrides, keep, names)
    return settings


def _shrink_overrides(
    overrides: dict[Any, dict[str, Any]], keep: list[int], names: _Names
) -> dict[int, dict[str, Any]]:
    """Return the settings of single layers, for the layers that stay."""
    by_layer = {int(layer): values for layer, values in overrides.items()}
    return {
        place: {name: _smaller(name, value, names) for name, value in by_layer[layer].items()}
        for place, layer in enumerate(keep)
        if layer in by_layer
    }


class _Names:
    """The settings of a configuration that others depend on, whatever the family calls them."""

    def __init__(self, config: PreTrainedConfig, settings: dict[str, Any]) -> None:
        self._aliases: dict[str, str] = dict(config.attribute_map)
        self._settings = settings
        self.layers = self._number("num_hidden_layers")
        self.heads = self._number("num_attention_heads")
        self.hidden = self._number("hidden_size")
        self.head_dim = self._number("head_dim") or (self.hidden // max(self.heads, 1))
        self.shared_layers = self._number("num_kv_shared_layers")
        self.first_shared = self.layers - self.shared_layers

    def key(self, name: str) -> str:
        """Return the name under which the configuration stores a setting."""
        return self._aliases.get(name, name)

    def _number(self, name: str) -> int:
        value = self._settings.get(self.key(name))
        return value if isinstance(value, int) else 0


def _kept_layers(names: _Names, settings: dict[str, Any]) -> list[int]:
    """Return indices of layers: the first of each distinct kind, and at least two."""
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == names.layers]
    overrides = {int(key): value for key, value in (settings.get("per_layer_config") or {}).items()}
    seen: dict[str, int] = {}
    for layer in range(names.layers):
        kind = [value[layer] for value in lists] + [overrides.get(layer), layer >= names.first_shared]
        seen.setdefault(repr(kind), layer)
    kept = sorted(seen.values())[:_MAX_LAYERS]
    extra = [layer for layer in range(names.layers) if layer not in kept]
    return sorted(kept + extra[: max(0, 2 - len(kept))])


def _smaller(name: str, value: Any, names: _Names) -> Any:
    if isinstance(value, list):
        return [_smaller(name, item, names) for item in value]
    if "softcap" in name and isinstance(value, float):
        # At the usual 50 a cap changes the small scores of a clone too little to be seen.
        return min(value, _SOFTCAP)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _TOKEN_NAME.search(name):
        return min(value, VOCAB_SIZE - 1)
    if _KV_HEADS_NAME.search(name):
        return min(value, _QUERY_HEADS if value == names.heads else 2)
    if _QUERY_HEADS_NAME.search(name):
        return min(value, _QUERY_HEADS)
    for pattern, limit in _CAPS:
        if pattern.search(name):
            return min(value, limit)
    return value


def _shrink_widths(names: _Names, settings: dict[str, Any]) -> None:
    """Keep the width of a head, and ``hidden = heads * width`` where the family has it so."""
    if not names.hidden:
        return
    heads = min(names.heads, _QUERY_HEADS) or 1
    tied = names.heads * names.head_dim == names.hidden
    hidden = heads * names.head_dim if tied else min(names.hidden, 2 * _WIDTH)
    for name, value in settings.items():
        # Families repeat the width under other names (embeddings, projections); all must stay equal.
        if value == names.hidden and re.search(r"hidden|embd|embed|d_model|model_dim|word_", name):
            settings[name] = hidden
    settings[names.key("hidden_size")] = hidden
    if "mamba_n_heads" in settings:
        # Attention-only checkpoints of granitemoehybrid still validate the widths of layers they do not have.
        settings["mamba_n_heads"] = 1
        settings["mamba_d_head"] = settings.get("mamba_expand", 1) * hidden


def _shrink_rope(names: _Names, settings: dict[str, Any]) -> None:
    """Put the limit of length-dependent RoPE below the longest probe, and cap tables of learned positions."""
    rope = settings.get("rope_parameters")
    scopes = [rope, *rope.values()] if isinstance(rope, dict) else []
    types = {scope.get("rope_type") for scope in scopes if isinstance(scope, dict)} - {None}
    key = names.key("max_position_embeddings")
    if "longrope" in types:
        settings["original_max_position_embeddings"] = ROPE_LIMIT_TOKENS
        settings[key] = 8 * ROPE_LIMIT_TOKENS
        _set_longrope_limits(scopes)
    elif types & {"dynamic"}:
        settings[key] = ROPE_LIMIT_TOKENS
    elif types <= {"default"} and isinstance(settings.get(key), int):
        settings[key] = min(settings[key], 2048)


def _set_longrope_limits(scopes: Iterable[Any]) -> None:
    for scope in scopes:
        if isinstance(scope, dict) and scope.get("rope_type") == "longrope":
            scope["original_max_position_embeddings"] = ROPE_LIMIT_TOKENS
