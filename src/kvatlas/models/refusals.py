"""Reasons to refuse a model that can be read off its configuration or its modules, in plain words.

The numeric probe would refuse these as well; here the reason gets its name.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

# Kinds of layers (transformers' `config.layer_types`) that an attention function cannot answer for.
_LAYER_KINDS = {
    "chunked_attention": "chunked attention sees only its own chunk, which a sliding window cannot express",
    "compressed_sparse_attention": "its attention compresses keys inside the model",
    "heavily_compressed_attention": "its attention compresses keys inside the model",
    "indexed_attention": "a sparse indexer inside the model selects tokens and keeps its own cache",
    "minimax_m3_sparse": "a sparse indexer inside the model selects blocks and keeps its own cache",
    "reference_sliding_attention": "its window depends on which tokens were generated",
    "conv": "stateful layers (convolution) mix packed sequences",
    "hybrid": "stateful layers (attention and state-space in one) mix packed sequences",
    "hybrid_sliding": "stateful layers (attention and state-space in one) mix packed sequences",
    "linear_attention": "stateful layers (linear attention or state-space) mix packed sequences",
    "mamba": "stateful layers (state-space) mix packed sequences",
    "recurrent": "stateful layers (recurrent) mix packed sequences",
}

# Parts of the class names of modules that keep a state over time.
_STATEFUL = (
    "Conv1d",
    "DeltaNet",
    "LightningAttention",
    "Mamba",
    "Recurrent",
    "Rwkv",
    "ShortConv",
    "xLSTM",
)


def refusal_of_config(config: PreTrainedConfig) -> str | None:
    """Return why no model of this configuration can run, or None."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder model: its decoder takes positions from transformers' cache"
    for kind in getattr(text, "layer_types", None) or ():
        if kind in _LAYER_KINDS:
            return f"{_LAYER_KINDS[kind]} (layer type {kind})"
    if getattr(text, "index_topk", None):
        return _LAYER_KINDS["indexed_attention"]
    return None


def refusal_of_model(model: PreTrainedModel) -> str | None:
    """Return why this model cannot run, from the modules it is made of, or None."""
    for path, module in model.named_modules():
        name = type(module).__name__
        if "vision" in path or "audio" in path or name == "Conv1D":
            continue
        if any(part in name for part in _STATEFUL):
            return f"stateful layers ({name}) mix packed sequences"
    return None
