"""An attached model generates what transformers generates, family by family, in a batch with padding."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES, tiny_model
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvatlas
from kvatlas.core.errors import UnsupportedError
from kvatlas.models import clone
from kvatlas.models.probe import _causal_class
from kvatlas.models.quiet import quiet
from kvatlas.models.refusals import refusal_of_config

TOLERANCE = 1e-4

# transformers' cache of MoshiForCausalLM slides, while its mask, and so its forward without a cache, has no window.
_OF_TWO_MINDS = {"moshi"}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits [n, B, V] of two rows, one of them padded, past windows and RoPE limits."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(8, min(vocabulary - 8, 100), (2, 9), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = 0
    result = model.generate(
        ids, attention_mask=(ids > 0).long(), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(result.logits)


def assert_same(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")  # sdpa knows neither softcap nor sinks
    wanted = logits(model)
    with kvatlas.attach(model, kv_memory="8MiB", block_size=4, max_batched_tokens=7):
        got = logits(model)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "phi3"])  # see test_rope.py for rows of phi3
def test_generate_is_generate(family: str) -> None:
    assert_same(tiny_model(family))


@pytest.mark.slow
def test_every_family_generates_as_it_does_alone() -> None:
    """All types of transformers that may be attached; their inputs, caches and loops are their own."""
    compared = []
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - _OF_TWO_MINDS):
        with quiet():
            try:
                config = CONFIG_MAPPING[model_type]()
                refused = refusal_of_config(config)
                model = None if refused else clone.build(_causal_class(config), clone.tiny_config(config))
            except Exception:
                continue
            if model is None or not model.can_generate():
                continue
            try:
                kvatlas.attach(model, kv_memory="8MiB", block_size=4).detach()
            except UnsupportedError:
                continue
            assert_same(model)
        compared.append(model_type)
    assert len(compared) >= 80
