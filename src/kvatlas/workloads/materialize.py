"""Turn the lengths and hashes of a trace into token ids, since public traces hold no text.

The ids are random, so they serve speed and memory, never quality.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvatlas.core.errors import ConfigError
from kvatlas.workloads.request import TraceRequest

_BLOCK, _REST = 0, 1
_MASK = 2**64 - 1


def prompt_ids(request: TraceRequest, vocab_size: int, seed: int, special_ids: Iterable[int] = ()) -> list[int]:
    """Return the request's prompt: ``prompt_tokens`` ids, the same on every call (with one version of numpy).

    Every hash id seeds the tokens of its block, so prompts with equal leading hashes have equal leading
    tokens. What no hash covers is seeded by the request's number, so prompts without hashes are unrelated.

    Args:
        request: one request of a trace.
        vocab_size: ids are below it.
        seed: another seed gives other prompts, >= 0.
        special_ids: ids never used, such as beginning and end of text.

    Raises:
        ConfigError: no id is left to use, or the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; want at least 0")
    usable = np.setdiff1d(np.arange(vocab_size), np.fromiter(special_ids, dtype=np.int64))
    if not usable.size:
        raise ConfigError(f"a vocabulary of {vocab_size} without its special ids holds no id to use")
    block = request.hash_block_tokens or 0
    parts = [_draw(usable, block, (seed, _BLOCK, hash_id & _MASK)) for hash_id in request.prefix_hashes]
    missing = request.prompt_tokens - block * len(parts)
    if missing > 0:
        parts.append(_draw(usable, missing, (seed, _REST, request.number)))
    ids: list[int] = np.concatenate(parts)[: request.prompt_tokens].tolist()
    return ids


def _draw(usable: NDArray[np.int64], count: int, entropy: tuple[int, ...]) -> NDArray[np.int64]:
    rng = np.random.default_rng(entropy)
    return usable[rng.integers(0, usable.size, size=count)]
