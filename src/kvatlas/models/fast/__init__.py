"""Native parts of a model, and the one door to them: what replaces its linears and layers, and gives them back."""

from __future__ import annotations

from torch import nn

from kvatlas.models.fast.layers import FusedLayers
from kvatlas.models.fast.linears import LinearChoice as LinearChoice, SmallLinears, check_choice as check_choice


class FastParts:
    """The native parts of a model.

    Args:
        model: whose linears and layers are replaced where they can be; its attention must already be kvatlas'.
        choice: how linears keep their weights; see `kvatlas.models.fast.linears.SmallLinears`. ``"off"``: nothing is
            replaced.

    Attributes:
        linears: the linears that were.
        layers: the decoder layers that were.

    Raises:
        ConfigError: ``choice`` is unknown.
        UnsupportedError: a format was named that the model's linears cannot have.
        CapacityError: there is too little memory for the copies that were asked for.
    """

    def __init__(self, model: nn.Module, choice: LinearChoice = "auto") -> None:
        self.linears = SmallLinears(model, choice)
        try:
            self.layers = FusedLayers(model, self.linears)
        except BaseException:
            self.linears.restore()
            raise

    def describe(self) -> dict[str, str]:
        """Return what computes linears and whole layers, for people and records."""
        return {"linears": str(self.linears), "forwards": str(self.layers)}

    def refresh(self) -> None:
        """Let go of copies whose weights were written to behind torch's back; see `SmallLinears.refresh`."""
        self.linears.refresh()

    def restore(self) -> None:
        """Give all parts their own forward back."""
        self.layers.restore()
        self.linears.restore()
