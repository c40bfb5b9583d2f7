"""Rotations that gather the weight of queries and keys in few columns, found once per model (InfiniGen's skewing).

Per KV head, the right singular vectors A of sample queries: q A and k A have the same products as q and k, and most of
their weight in the first columns. The paper folds A into the projections; where RoPE stands between projection and
product, A is applied to rotated queries and keys instead. Kept in a file that is keyed by a digest of the model.
Shapes: H KV heads, G query heads per KV head, Dk elements of a key.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvatlas.core.errors import UnsupportedError
from kvatlas.core.folders import cache_folder
from kvatlas.models.adapter import Adapter
from kvatlas.models.attention import AttentionCall
from kvatlas.models.dense_context import DenseContext, Segment
from kvatlas.models.loading import LoadedModel
from kvatlas.workloads.recall import read_filler

_LOG = logging.getLogger(__name__)
_SAMPLE_TOKENS = 1024
_VERSION = 1  # of how a rotation is found


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """How one layer's queries and keys are rotated and scored.

    Args:
        matrix: orthogonal, float32 [H, Dk, Dk]; columns by falling weight.
        scale: factor on q·k before the softmax.
        softcap: cap of the scores, or None.
    """

    matrix: Tensor
    scale: float
    softcap: float | None

    def rotate(self, heads: Tensor) -> Tensor:
        """Return [..., H, n, Dk], float32, rotated: the products of queries and keys stay what they were."""
        return heads.float() @ self.matrix

    def below_best(self, query_RHGD: Tensor, key_RHSD: Tensor, length_RH: Tensor) -> Tensor:
        """Return how far each slot scores below its query head's best, float32 [R, H, G, S]; -inf beyond the length.

        Args:
            query_RHGD: queries, or some columns of them.
            key_RHSD: keys, or the same columns of them.
            length_RH: slots in use.
        """
        scores = torch.einsum("rhgd,rhsd->rhgs", query_RHGD, key_RHSD) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        unused = torch.arange(scores.shape[-1], device=scores.device) >= length_RH.to(scores.device)[..., None]
        scores = scores.masked_fill(unused[:, :, None], -torch.inf)
        return scores - scores.amax(dim=-1, keepdim=True)


class _QueryMoments(DenseContext):
    """Attends densely and sums the outer products of queries, per layer and KV head."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[Tensor] = []
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = query[0].double().reshape(key.shape[1], -1, query.shape[-1])  # [H, G * T, Dk]
        self.moments.append(heads.transpose(1, 2) @ heads)
        self.calls.append(call)
        return super().attend(call, query, key, value)


def calibrate(adapter: Adapter, tokens: Sequence[int]) -> list[Rotation]:
    """Return the rotation of every layer, from one forward over sample tokens.

    Raises:
        UnsupportedError: the model has layers of several kinds, whose inputs do not foresee each other's queries.
    """
    shape = adapter.shape
    if any(layer.window is not None or layer.shares_kv_with is not None for layer in shape.layers):
        raise UnsupportedError(
            f"{shape.name} has sliding windows or shared keys and values, for which speculation is not served; "
            "use offload(host) alone"
        )
    context = _QueryMoments()
    context.begin([Segment(sequence=0, start=0, num_tokens=len(tokens))])
    ids = torch.tensor(tokens, device=adapter.device)
    positions = torch.arange(len(tokens), device=adapter.device)
    adapter.forward(ids, positions, context, positions[-1:], rope_tokens=len(tokens))
    return [
        Rotation(matrix=torch.linalg.eigh(moment).eigenvectors.flip(-1).float(), scale=call.scale, softcap=call.softcap)
        for moment, call in zip(context.moments, context.calls, strict=True)
    ]


def rotations_of(model: LoadedModel) -> list[Rotation]:
    """Return the rotations of a model, calibrated on text where it has a tokenizer, else on any tokens."""
    return rotations_for(model.adapter, _sample_tokens(model))


def _sample_tokens(model: LoadedModel) -> list[int]:
    shape = model.adapter.shape
    count = min(_SAMPLE_TOKENS, shape.max_positions)
    if model.tokenizer is not None:
        text = read_filler()[: 8 * count]
        ids: list[int] = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    generator = torch.Generator().manual_seed(0)
    found: list[int] = torch.randint(shape.vocab_size, (count,), generator=generator).tolist()
    return found


def rotations_for(adapter: Adapter, tokens: Sequence[int], folder: Path | None = None) -> list[Rotation]:
    """Return the rotations of a model, from its file if there is one, else calibrated and kept there.

    Args:
        adapter: the model.
        tokens: what to calibrate on.
        folder: of the files; None: `kvatlas.core.folders.cache_folder`. A folder that cannot be written to
            costs the calibration at every start, no more.
    """
    sample = hashlib.blake2b(repr((_VERSION, list(tokens))).encode(), digest_size=4).hexdigest()
    path = (folder or cache_folder()) / f"rotation-{model_digest(adapter.model)}-{sample}.safetensors"
    try:
        return _read(path, adapter)
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        _LOG.warning("%s cannot be read (%s); calibrating again", path, error)
    found = calibrate(adapter, tokens)
    try:
        _write(path, found)
    except OSError as error:
        _LOG.warning("%s cannot be written (%s); the next start calibrates again", path, error)
    return found


def model_digest(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits of a model's config and all its weights; takes about a second per GB."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    digest.update(repr(sorted(model.config.to_diff_dict().items(), key=str)).encode())
    return digest.hexdigest()


def _read(path: Path, adapter: Adapter) -> list[Rotation]:
    tensors = load_file(path, device=str(adapter.device))
    found = []
    for index, layer in enumerate(adapter.shape.layers):
        matrix, (scale, softcap) = tensors[f"matrix.{index}"], tensors[f"scale.{index}"].flatten().tolist()
        if matrix.shape != (layer.num_kv_heads, layer.key_dim, layer.key_dim):
            raise ValueError(f"layer {index} is of another shape")
        found.append(Rotation(matrix=matrix, scale=scale, softcap=softcap or None))
    return found


def _write(path: Path, rotations: Sequence[Rotation]) -> None:
    """Write all or nothing: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"matrix.{index}": one.matrix.cpu().contiguous() for index, one in enumerate(rotations)}
    tensors |= {
        f"scale.{index}": torch.tensor([one.scale, one.softcap or 0.0], dtype=torch.float64)
        for index, one in enumerate(rotations)
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
