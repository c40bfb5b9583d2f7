"""Decide at load time whether a model can be run packed: by running a tiny clone of it both ways.

A list of supported families would be out of date with the next release of transformers. Instead a clone of
the model's own configuration runs a small schedule - three sequences that join at different times, chunked
prefill mixed with decoding - through the adapter, and each sequence alone through the family's own eager
attention. Equal logits mean "supported"; anything else is a refusal with its reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from kvatlas.core.errors import KvatlasError
from kvatlas.models import clone
from kvatlas.models.adapter import Adapter
from kvatlas.models.coverage import layer_kinds, module_kinds
from kvatlas.models.dense_context import DenseContext, Segment
from kvatlas.models.quiet import quiet
from kvatlas.models.refusals import refusal_of_config, refusal_of_model

TOLERANCE = 1e-4

# The real model may stand in for a clone that cannot be built only if a float32 copy of it is cheap.
_SMALL_PARAMETERS = 50_000_000
_LONGEST_WINDOW_TOKENS = 512

_NO_CLONE = "no tiny clone can be built"

# Tokens that each sequence adds in each step; 0 where it is not there yet. The first one exceeds the clone's
# windows and RoPE limit, the others stay below the limit.
_SCHEDULE = ((9, 0, 0), (7, 6, 0), (1, 3, 5), (1, 1, 1), (1, 1, 2))


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What the probe found.

    Args:
        supported: whether packed runs gave the family's own logits.
        reason: one line: why not, or what was compared.
        relative_error: largest difference of a logit over the largest logit, or None if nothing could be run.
        kinds: what the probed model was made of (see `kvatlas.models.coverage`); it speaks for nothing else.
    """

    supported: bool
    reason: str
    relative_error: float | None = None
    kinds: frozenset[str] = frozenset()


def probe_config(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> ProbeResult:
    """Return whether models of this configuration can be run; takes about half a CPU second.

    Leaves no trace: the random state, the log level and the configuration stay as they are.

    Args:
        config: of the real model.
        model_class: its class; the causal LM that transformers maps the configuration to if None.
    """
    reason = refusal_of_config(config)
    if reason is not None:
        return ProbeResult(supported=False, reason=reason)
    with quiet(), torch.device("cpu"):
        try:
            tiny = clone.build(model_class or _causal_class(config), clone.tiny_config(config))
        except Exception as error:  # Family code may raise anything; the reason is kept and shown.
            return ProbeResult(supported=False, reason=f"{_NO_CLONE}: {_one_line(error)}")
        return _probe(tiny, scale=1)


def probe_model(model: PreTrainedModel) -> ProbeResult:
    """Return whether this model can be run; a clone of its configuration decides.

    Where no clone can be built, a copy of the model itself is probed, if it is small.

    Args:
        model: any causal LM; it is neither run nor changed.
    """
    result = probe_config(model.config, type(model))
    if not result.reason.startswith(_NO_CLONE):
        return result
    size = sum(weight.numel() for weight in model.parameters())
    window = _longest_window(model.config.get_text_config(decoder=True))
    if size > _SMALL_PARAMETERS or window > _LONGEST_WINDOW_TOKENS:
        return result
    with quiet(), torch.device("cpu"):
        # Steps are stretched until the first sequence exceeds the window.
        return _probe(copy.deepcopy(model).float().cpu().eval(), scale=1 + window // _total_tokens(0, 1))


def _longest_window(config: PreTrainedConfig) -> int:
    settings = config.to_dict().items()
    return max((value for name, value in settings if "window" in name and isinstance(value, int)), default=0)


def _probe(model: PreTrainedModel, scale: int) -> ProbeResult:
    """Run the schedule, each step ``scale`` times as long, on a model that may be changed."""
    reason = refusal_of_model(model)
    if reason is not None:
        return ProbeResult(supported=False, reason=reason)
    sequences = _token_ids(model.config.get_text_config(decoder=True).vocab_size, scale)
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
        with Adapter(model, linear_weights="off") as adapter:
            packed = _run_packed(adapter, sequences, scale)
            error = max(_relative_error(a, b) for a, b in zip(packed, expected, strict=True))
            kinds = layer_kinds(adapter.shape) | module_kinds(model)
    except KvatlasError as refusal:
        return ProbeResult(supported=False, reason=str(refusal))
    except Exception as failure:  # Family code may raise anything; the reason is kept and shown.
        return ProbeResult(supported=False, reason=f"a tiny clone fails: {_one_line(failure)}")
    if not error < TOLERANCE:
        reason = f"packed logits differ from its own by {error:.2g} of the largest, {TOLERANCE:g} is allowed"
        return ProbeResult(supported=False, reason=reason, relative_error=error, kinds=kinds)
    reason = f"packed logits equal its own within {error:.1g} of the largest"
    return ProbeResult(supported=True, reason=reason, relative_error=error, kinds=kinds)


def _run_packed(adapter: Adapter, sequences: Sequence[Tensor], scale: int) -> list[Tensor]:
    """Return the logits [n, V] of all tokens of each sequence, computed step by step in mixed batches."""
    context = DenseContext()
    logits: list[list[Tensor]] = [[] for _ in sequences]
    reached = [0] * len(sequences)
    for step in _SCHEDULE:
        segments = [Segment(sequence=s, start=reached[s], num_tokens=num * scale) for s, num in enumerate(step) if num]
        for batch in _by_regime(adapter, segments, sequences):
            for segment, rows in zip(batch, _forward(adapter, context, batch, sequences), strict=True):
                logits[segment.sequence].append(rows)
                reached[segment.sequence] += segment.num_tokens
    return [torch.cat(rows) for rows in logits]


def _by_regime(adapter: Adapter, segments: Sequence[Segment], sequences: Sequence[Tensor]) -> list[list[Segment]]:
    batches: dict[object, list[Segment]] = {}
    for segment in segments:
        batches.setdefault(adapter.rope_regime(len(sequences[segment.sequence])), []).append(segment)
    return list(batches.values())


def _forward(
    adapter: Adapter, context: DenseContext, batch: Sequence[Segment], sequences: Sequence[Tensor]
) -> list[Tensor]:
    """Run one packed batch and return the logits of each segment."""
    context.begin(batch)
    positions = [torch.arange(s.start, s.start + s.num_tokens) for s in batch]
    ids = [sequences[s.sequence][at] for s, at in zip(batch, positions, strict=True)]
    total = sum(s.num_tokens for s in batch)
    # Reversed, so that a family which takes the last rows instead of the asked ones is found out.
    wanted = torch.arange(total - 1, -1, -1)
    longest = max(len(sequences[s.sequence]) for s in batch)
    logits = adapter.forward(torch.cat(ids), torch.cat(positions), context, wanted, rope_tokens=longest)
    return list(torch.split(logits.flip(0), [s.num_tokens for s in batch]))


def _token_ids(vocab_size: int, scale: int) -> list[Tensor]:
    """Return ids of the sequences, away from both ends of the vocabulary, where special tokens live."""
    generator = torch.Generator().manual_seed(1)
    low, high = min(8, vocab_size // 4), max(vocab_size - 8, vocab_size // 2)
    lengths = [_total_tokens(sequence, scale) for sequence in range(len(_SCHEDULE[0]))]
    return [torch.randint(low, high, (length,), generator=generator) for length in lengths]


def _total_tokens(sequence: int, scale: int) -> int:
    return scale * sum(step[sequence] for step in _SCHEDULE)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|; NaN if either holds one."""
    return float((actual - expected).abs().max() / expected.abs().max())


def _causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return model_class


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
