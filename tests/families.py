"""Tiny random models of twelve families, with a realistic mix of layers, for every test that needs a model.

Windows and RoPE limits are shorter than the sequences tests use, so that a mistake in them shows. Weights are
larger than transformers' default: with that, attention is nearly uniform and a wrong mask hardly matters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 101
WINDOW_TOKENS = 6
LONGROPE_LIMIT_TOKENS = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_MIXED = {"layer_types": _MIXED_LAYERS, "sliding_window": WINDOW_TOKENS}

_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": WINDOW_TOKENS},
    "mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**_MIXED, "head_dim": 24, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_MIXED, "head_dim": 24, "query_pre_attn_scalar": 24},
    "phi3": {
        "max_position_embeddings": 8 * LONGROPE_LIMIT_TOKENS,
        "original_max_position_embeddings": LONGROPE_LIMIT_TOKENS,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": LONGROPE_LIMIT_TOKENS,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)],
        },
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {**_MIXED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": dict(_MIXED),
    # Beyond the twelve: context kwarg dropped, KV shared between layers, dynamic NTK.
    "stablelm": {},
    "nemotron": {"head_dim": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": WINDOW_TOKENS,
        "num_kv_shared_layers": 2,
        "head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 8,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": WINDOW_TOKENS,
        "num_kv_shared_layers": 2,
        "head_dim": 16,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a configuration of about 100,000 weights; ``changes`` override its settings."""
    settings = {**_COMMON, **_SETTINGS.get(model_type, {}), **changes}
    return CONFIG_MAPPING[model_type](**settings)


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model in float32, equal for equal arguments; the test's random state does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Biases, norms and attention sinks start at a constant that would hide a wrong one.
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight), alpha=1.0 if "sinks" in name else 0.1)
    return model.eval()


FAMILIES = tuple(_SETTINGS)[:12]
TINY_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: partial(tiny_model, name) for name in FAMILIES}
tiny_models = TINY_FAMILIES


def token_ids(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Return one int64 tensor of random token ids per length, special ids excluded."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCAB_SIZE, (length,), generator=generator) for length in lengths]
