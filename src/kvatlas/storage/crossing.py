"""How bytes cross between a CUDA device and the host: page-locked memory, side streams, and one kernel for many blocks.

A mover's thread must not disturb the compute: what it orders on the device goes to a stream of its own, behind what the
compute had ordered when the move was submitted; what the compute orders after waiting goes behind the move. Only the
device waits, not the thread that computes. On the CPU none of this exists.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kvatlas.core.errors import CapacityError
from kvatlas.core.units import format_bytes
from kvatlas.kernels import triton_support


class Order(Protocol):
    """Keeps moves and compute in order where both are only queued. Marks are points in a queue."""

    def mark(self) -> Any:
        """Return a mark behind all that the calling thread has queued."""

    def carry(self, mark: Any, copy: Callable[[], None]) -> Any:
        """Queue ``copy`` beside the compute but behind ``mark``; return a mark of its end."""

    def follow(self, mark: Any) -> None:
        """Let what the calling thread queues from now on come behind ``mark``."""

    def settle(self, mark: Any) -> None:
        """Return when everything before ``mark`` has happened."""


_thread = threading.local()
"""``has_order``: what this thread queues is in an order, so nobody reads or writes its ends too early."""


class StreamOrder:
    """An order of one CUDA stream for the moves of one direction; marks are events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        """Record an event on the calling thread's stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def carry(self, mark: torch.cuda.Event, copy: Callable[[], None]) -> torch.cuda.Event:
        """Run ``copy`` with the side stream current."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            _thread.has_order = True
            try:
                copy()
            finally:
                _thread.has_order = False
            return self.mark()

    def follow(self, mark: torch.cuda.Event) -> None:
        """Let the calling thread's stream wait."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def settle(self, mark: torch.cuda.Event) -> None:
        """Wait on the host."""
        mark.synchronize()


def order_for(device: torch.device | str) -> Order | None:
    """Return a new order for moves to or from ``device``; None where copies happen at once."""
    device = torch.device(device)
    return StreamOrder(device) if device.type == "cuda" else None


class _LockedPages(mmap.mmap):
    """Anonymous memory that a CUDA device may reach by itself; given back to the system only after it was released."""

    registered_at = 0

    def __del__(self) -> None:
        if self.registered_at:
            _cudart().cudaHostUnregister(self.registered_at)


def locked_memory(num_bytes: int) -> Tensor:
    """Return page-locked memory of the host, uint8 [num_bytes], which a CUDA device can reach by itself.

    It is registered rather than allocated by torch, which rounds up to a power of two.

    Raises:
        CapacityError: the system does not lock so much.
    """
    pages = _LockedPages(-1, num_bytes)
    memory = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the pages
    code = int(_cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    if code:
        raise CapacityError(
            f"the system does not page-lock {format_bytes(num_bytes)} of host memory (CUDA error {code}); "
            "give less (--host-memory) or raise the limit of locked memory (ulimit -l)"
        )
    pages.registered_at = memory.data_ptr()
    return memory


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def copy_rows(source: Tensor, source_ids: Tensor, target: Tensor, target_ids: Tensor) -> None:
    """Copy rows of one view to rows of another, on the same device or another; done on return, except within a move.

    Args:
        source: [N, w] int32, rows may overlap.
        source_ids: int64 [n].
        target: [M, w] int32.
        target_ids: int64 [n], distinct rows.
    """
    device = source.device if source.device.type == "cuda" else target.device
    if source.device.type != target.device.type and device.type == "cuda":
        if triton_support.why_not(device) is None and _host(source, target).is_pinned():
            from kvatlas.kernels.blocks.triton_path import move_rows  # only where Triton is there

            move_rows(source, source_ids.to(device), target, target_ids.to(device), device)
        else:
            target.index_copy_(0, target_ids.to(target.device), _across(source, source_ids, target.device))
        if not getattr(_thread, "has_order", False):
            torch.cuda.current_stream(device).synchronize()
        return
    data = source.index_select(0, source_ids.to(source.device)).to(target.device)
    target.index_copy_(0, target_ids.to(target.device), data)


def _host(source: Tensor, target: Tensor) -> Tensor:
    return source if source.device.type == "cpu" else target


def _across(source: Tensor, ids: Tensor, device: torch.device) -> Tensor:
    """Return rows on the other side, by way of page-locked memory, which torch keeps until the stream has used it."""
    rows = source.index_select(0, ids.to(source.device)) if source.device.type == "cuda" else source
    bounce = torch.empty(len(ids), source.shape[1], dtype=source.dtype, pin_memory=True)
    if source.device.type == "cpu":
        torch.index_select(rows, 0, ids, out=bounce)
        return bounce.to(device, non_blocking=True)
    bounce.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(source.device).synchronize()
    return bounce
