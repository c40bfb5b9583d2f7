"""What one request needs, said before it runs: bytes held per tier and bytes read per decode step."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bounds for one request, bytes; allocations never exceed them. On the device tier unless said otherwise.

    Args:
        prefill_peak_bytes: most that is held while the prompt is processed, sidecars included.
        steady_bytes: what is held right after the prompt.
        final_bytes: most that is held while the output is generated.
        read_bytes_per_step: keys and values that the last decode step reads, sidecars left out.
        sidecar_fraction: share of the held bytes that are sidecars.
        host_bytes: most that is ever held on the host tier.
        moved_bytes_per_step: most that the last decode step moves from the host tier to the device.
    """

    prefill_peak_bytes: int
    steady_bytes: int
    final_bytes: int
    read_bytes_per_step: int
    sidecar_fraction: float
    host_bytes: int = 0
    moved_bytes_per_step: int = 0

    @property
    def peak_bytes(self) -> int:
        """Most that the request ever holds."""
        return max(self.prefill_peak_bytes, self.final_bytes)

    def joined(self, other: Footprint) -> Footprint:
        """Return bounds for a request that is first bounded by this one and then by another."""
        names = [field.name for field in fields(self)]
        return Footprint(**{name: max(getattr(self, name), getattr(other, name)) for name in names})
