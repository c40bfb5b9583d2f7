"""Which parts of a real model a probe of its clone has spoken for.

A clone is built from settings, and a family may place a special layer in a way that those do not show. So
what the real model is made of is compared with what the clone was made of.
"""

from __future__ import annotations

import re

from torch import nn

from kvatlas.core.shapes import ModelShape

# Parts that treat every token alone: leaving one out of a clone cannot hide a mistake in attention.
_TOKENWISE = re.compile(r"mlp|moe|expert|router|gate|norm|feedforward|ffn|top_?k", re.IGNORECASE)
_MIXES_TOKENS = re.compile(r"attention|delta|conv|mamba|mixer|recurrent|state|index", re.IGNORECASE)


def module_kinds(model: nn.Module) -> frozenset[str]:
    """Return the names of the family's own classes that a model is made of, except tokenwise ones."""
    names = {type(part).__name__ for part in model.modules() if "modeling_" in type(part).__module__}
    return frozenset(f"a {name}" for name in names if _MIXES_TOKENS.search(name) or not _TOKENWISE.search(name))


def layer_kinds(shape: ModelShape) -> frozenset[str]:
    """Return the ways in which the layers of a model attend."""
    kinds = {"a window" for layer in shape.layers if layer.window is not None}
    kinds |= {"shared keys and values" for layer in shape.layers if layer.shares_kv_with is not None}
    kinds |= {"grouped queries" for layer in shape.layers if layer.num_query_heads != layer.num_kv_heads}
    kinds |= {"values of another width" for layer in shape.layers if layer.key_dim != layer.value_dim}
    return frozenset(kinds)
