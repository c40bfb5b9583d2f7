"""Who has taken a model over: kept on the model, so that it can be given back though nobody holds the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from kvatlas.core.errors import UnsupportedError
from kvatlas.models.attention import IMPLEMENTATION

if TYPE_CHECKING:
    from kvatlas.models.adapter import Adapter

_ATTRIBUTE = "_kvatlas_owner"


class _Owner:
    """What a model keeps of its adapter; a copy of the model, deep or pickled, has none."""

    def __init__(self, adapter: Adapter | None = None) -> None:
        self.adapter = adapter

    def __reduce__(self) -> tuple[object, ...]:
        return _Owner, ()


def take(model: PreTrainedModel, adapter: Adapter) -> None:
    """Note on a model that an adapter has it."""
    vars(model)[_ATTRIBUTE] = _Owner(adapter)


def give_up(model: PreTrainedModel) -> None:
    """Note that no adapter has it any more."""
    vars(model).pop(_ATTRIBUTE, None)


def adapter_of(model: PreTrainedModel) -> Adapter | None:
    """Return the adapter that a model has now; None if it is its own.

    Raises:
        UnsupportedError: the model was copied while it had one.
    """
    owner = vars(model).get(_ATTRIBUTE)
    if isinstance(owner, _Owner) and owner.adapter is not None:
        return owner.adapter
    if model.config._attn_implementation == IMPLEMENTATION:
        raise UnsupportedError(
            "this model was copied while attached to kvatlas, and cannot be detached; copy the original after "
            "kvatlas.detach(original)"
        )
    return None
