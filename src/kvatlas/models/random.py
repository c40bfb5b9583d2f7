"""Random-weight Llamas with real head shapes, for experiments on speed and memory that need no download.

Speed and memory do not depend on what the weights say. Quality does: never measure it on these. Weights are rounded to
bfloat16, in which nearly all checkpoints are published, so that a copy in bfloat16 is exact here as it is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvatlas.core.errors import UnknownNameError
from kvatlas.models.fast import LinearChoice
from kvatlas.models.loading import RANDOM_PREFIX, LoadedModel, adapt
from kvatlas.models.precision import DType, resolve_device, resolve_dtype
from kvatlas.models.quiet import quiet


@dataclass(frozen=True, kw_only=True)
class RandomSize:
    """The settings of a random Llama.

    Args:
        layers: decoder layers.
        hidden: width of the residual stream, elements.
        intermediate: width of the MLP, elements.
        query_heads: per layer.
        kv_heads: per layer.
        head_dim: elements of a key or value.
        vocab: token ids; input and output embeddings are tied.
    """

    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 32_000


# llama-mini tries things out; llama-wide has the attention heads of an 8B model and little else. llama-long has so few
# heads that a CPU gets through 128K tokens, and twice the layers that offloading holds on the device.
SIZES = {
    "llama-mini": RandomSize(
        layers=2, hidden=256, intermediate=512, query_heads=8, kv_heads=2, head_dim=128, vocab=1000
    ),
    "llama-long": RandomSize(
        layers=4, hidden=128, intermediate=256, query_heads=2, kv_heads=1, head_dim=64, vocab=1000
    ),
    "llama-wide": RandomSize(
        layers=2, hidden=256, intermediate=512, query_heads=32, kv_heads=8, head_dim=128, vocab=1000
    ),
    "llama-55m": RandomSize(layers=8, hidden=512, intermediate=2560, query_heads=8, kv_heads=2, head_dim=64),
    "llama-100m": RandomSize(layers=12, hidden=768, intermediate=2048, query_heads=12, kv_heads=3, head_dim=64),
    "llama-125m": RandomSize(layers=12, hidden=768, intermediate=3072, query_heads=8, kv_heads=2, head_dim=128),
    "llama-1b": RandomSize(layers=16, hidden=2048, intermediate=8192, query_heads=16, kv_heads=4, head_dim=128),
}


def random_model(
    spec: str, *, dtype: DType = "auto", device: str = "auto", seed: int = 0, linear_weights: LinearChoice = "auto"
) -> LoadedModel:
    """Return a random-weight Llama without tokenizer; equal for equal arguments.

    Args:
        spec: ``"llama-100m"`` or ``"random:llama-100m"``; see ``SIZES``.
        dtype: of weights and activations; ``"auto"`` is what is fastest on the CPU, and bfloat16 elsewhere.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:<index>"``, or ``"auto"``: a CUDA device if there is one.
        seed: of the weights; the user's random state does not move.
        linear_weights: as in `kvatlas.models.loading.load_model`.

    Raises:
        UnknownNameError: no such size.
    """
    name = random_name(spec)
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device) or torch.bfloat16  # what its weights are rounded to
    model = build_random(SIZES[name.removeprefix(RANDOM_PREFIX)], seed).to(device=device, dtype=torch_dtype)
    adapter = adapt(model, name=name, linear_weights=linear_weights)
    return LoadedModel(adapter=adapter, tokenizer=None, name=name)


def random_name(spec: str) -> str:
    """Return the full name of a random model: ``"llama-100m"`` and ``"random:llama-100m"`` are one.

    Raises:
        UnknownNameError: no such size.
    """
    key = spec.removeprefix(RANDOM_PREFIX)
    if key not in SIZES:
        raise UnknownNameError(f"unknown random model {spec!r}; choose one of {', '.join(SIZES)}")
    return RANDOM_PREFIX + key


def _config(size: RandomSize) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.query_heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        vocab_size=size.vocab,
        max_position_embeddings=262_144,
        tie_word_embeddings=True,
    )


def build_random(size: RandomSize, seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama of transformers whose weights are drawn, in float32 and rounded to bfloat16."""
    with quiet(), torch.random.fork_rng(devices=[]):  # quiet: one thread at a time seeds and initialises
        # Not torch.manual_seed: that would reseed the accelerator's generators as well.
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(_config(size))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model
