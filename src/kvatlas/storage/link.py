"""The way between two tiers: moves run beside the compute thread, most urgent first, are counted, and can be awaited.

Without an accelerator both tiers are RAM and a move is a copy. With one, a fetch counts as done when it is queued on
the device, and the compute is queued behind it (`storage.crossing`). An *emulated* link stretches each copy to the time
that a slower link would have taken, so that such a link can be studied where there is none; whoever shows a time that
was measured over one must say so.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvatlas.core.errors import ConfigError
from kvatlas.core.units import parse_bytes
from kvatlas.storage.arena import LentBlocks, copy_blocks
from kvatlas.storage.crossing import Order, order_for

_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_LATENCY = re.compile(r"^(\d+(?:\.\d+)?)(us|ms|s)$")
_IDLE_S = 0.5  # after this, a mover's thread ends; the next move starts another

URGENT, AHEAD, BACKGROUND = 0, 1, 2
"""Priorities of moves: somebody waits; somebody will wait soon; nobody waits."""


@dataclass(frozen=True, kw_only=True)
class LinkRate:
    """How fast an emulated link is, in each direction.

    Args:
        bytes_per_s: sustained rate, bytes per second.
        latency_s: time before the first byte of each move, seconds.

    Raises:
        ConfigError: the rate is not above 0, or the latency below 0.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or self.latency_s < 0:
            raise ConfigError(f"a link of {self} moves nothing; write it like 16GB/s,10us")

    @classmethod
    def parse(cls, text: str | LinkRate) -> LinkRate:
        """Return the rate that ``"16GB/s,10us"`` or ``"16GB/s"`` describes.

        Raises:
            ConfigError: the text is not understood.
        """
        if isinstance(text, LinkRate):
            return text
        rate, comma, latency = text.replace(" ", "").partition(",")
        match = _LATENCY.match(latency) if latency else None
        if not rate.endswith("/s") or (comma and match is None):
            raise ConfigError(f"link {text!r} is not understood; write it like 16GB/s,10us")
        seconds = float(match[1]) * _TIMES[match[2]] if match else 0.0
        try:
            bytes_per_s = parse_bytes(rate.removesuffix("/s"))
        except ConfigError:
            raise ConfigError(f"link {text!r} is not understood; write it like 16GB/s,10us") from None
        return cls(bytes_per_s=bytes_per_s, latency_s=seconds)

    def seconds(self, num_bytes: int) -> float:
        """Return how long a move of ``num_bytes`` takes."""
        return self.latency_s + num_bytes / self.bytes_per_s

    def __str__(self) -> str:
        """Return ``"16 GB/s, 10 us"``, which parses back; other units only where these would need an exponent."""
        rate = f"{self.bytes_per_s / 1e9:g} GB/s" if self.bytes_per_s >= 1e6 else f"{self.bytes_per_s:g} B/s"
        late = f"{self.latency_s * 1e6:g} us" if self.latency_s < 0.1 else f"{self.latency_s:g} s"
        return f"{rate}, {late}" if self.latency_s else rate


@dataclass(kw_only=True)
class Traffic:
    """What has been moved in one direction, and how long the link was busy with it."""

    moves: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(eq=False, kw_only=True)
class Move:
    """A move that has been ordered.

    It holds on to what it moves until it is let go of; on an accelerator that must not be before :meth:`wait`.

    Args:
        copy: does it, all at once.
        num_bytes: how many bytes that is.
        note: called with start and end, in seconds, when it is done; or None.
    """

    copy: Callable[[], None]
    num_bytes: int
    note: Callable[[float, float], None] | None = None
    error: BaseException | None = None
    _done: threading.Event = field(default_factory=threading.Event)
    _order: Order | None = None
    _after: Any = None
    _end: Any = None

    @property
    def done(self) -> bool:
        """Whether it has ended, or at least, on an accelerator, is queued."""
        return self._done.is_set()

    def follow(self, order: Order) -> None:
        """Come behind all that this thread has queued so far."""
        self._order, self._after = order, order.mark()

    def end(self) -> None:
        """Let whoever waits go on."""
        self._done.set()

    def settle(self) -> None:
        """Return when it has ended, well or not."""
        self._done.wait()

    def wait(self) -> None:
        """Return when it has ended, for all that this thread then does; an error of the copy is raised here."""
        self.settle()
        if self.error is not None:
            raise self.error
        if self._order is not None and self._end is not None:
            self._order.follow(self._end)

    def run(self, rate: LinkRate | None, traffic: Traffic, *, let_go: bool = False) -> None:
        """Copy, stretch the time to that of an emulated link, and count.

        Args:
            rate: the emulated link, or None.
            traffic: where to count.
            let_go: whoever waits may go on, and queue behind it, as soon as it is queued.
        """
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                if self._order is None:
                    self.copy()
                else:
                    self._end = self._order.carry(self._after, self.copy)
                    if let_go and rate is None:
                        self._done.set()
                    self._order.settle(self._end)
            if rate is not None:
                _sleep_until(start + rate.seconds(self.num_bytes))
            end = time.perf_counter()
            traffic.moves += 1
            traffic.num_bytes += self.num_bytes
            traffic.seconds += end - start
            if self.note is not None:
                self.note(start, end)
        except BaseException as error:  # whoever waits must learn of it; this thread goes on
            self.error = error
        finally:
            self._done.set()


class Mover:
    """Carries out the moves of one direction one after another, in a thread that lives while there is work.

    Args:
        rate: speed to emulate; None leaves copies as fast as they are.
        traffic: where moves are counted.
        order: keeps moves and compute in order on an accelerator; None where copies happen at once.
        let_go: nobody on the host reads what is moved, so waiting for it need not wait for its bytes.
    """

    def __init__(
        self, rate: LinkRate | None, traffic: Traffic, order: Order | None = None, *, let_go: bool = False
    ) -> None:
        self.rate = rate
        self._traffic = traffic
        self._queues = order
        self._let_go = let_go
        self._queue: list[tuple[int, int, Move]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False
        _MOVERS.add(self)

    def submit(self, move: Move, priority: int = URGENT) -> Move:
        """Order a move and return it; among equal priorities the first comes first."""
        if self._queues is not None:
            move.follow(self._queues)
        with self._changed:
            assert not self._stopped, "nobody would carry it out"
            heapq.heappush(self._queue, (priority, next(self._order), move))
            if self._thread is None:
                self._thread = self._start()
            self._changed.notify()
        return move

    def drop(self, move: Move) -> None:
        """Take a move out of the queue, if it has not begun; it then counts as ended."""
        with self._changed:
            left = [entry for entry in self._queue if entry[2] is not move]
            if len(left) < len(self._queue):
                self._queue = left
                heapq.heapify(self._queue)
                move.end()

    def stop(self) -> None:
        """Finish the move that is under way, if one is, and carry out no further one."""
        with self._changed:
            self._stopped, thread = True, self._thread
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _start(self) -> threading.Thread:
        """Start the thread, with one torch thread of its own: a team that spins beside the compute slows both."""
        ready = threading.Event()
        thread = threading.Thread(target=self._work, args=(ready,), name="kvatlas-mover", daemon=True)
        thread.start()
        ready.wait()
        torch.set_num_threads(torch.get_num_threads())  # what the mover chose must not hold for threads to come
        return thread

    def _work(self, ready: threading.Event) -> None:
        torch.set_num_threads(1)
        ready.set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped, _IDLE_S)
                if self._stopped or not self._queue:
                    self._thread = None
                    return
                _, _, move = heapq.heappop(self._queue)
            move.run(self.rate, self._traffic, let_go=self._let_go)
            del move  # what it moved may be large, and the next one may be long in coming


class Link:
    """Both directions between the device and the host, each with its own moves, as on a full-duplex bus.

    Args:
        rate: speed to emulate; None leaves copies as fast as they are.
        device: the side that computes; each direction has a stream there if it is a CUDA device.
    """

    def __init__(self, rate: LinkRate | None = None, device: torch.device | str = "cpu") -> None:
        self.rate = rate
        self.to_host, self.to_device = Traffic(), Traffic()
        self.stores = Mover(rate, self.to_host, order_for(device))
        self.fetches = Mover(rate, self.to_device, order_for(device), let_go=True)


BlockPairs = list[tuple[LentBlocks, Tensor, LentBlocks, Tensor]]
"""Blocks and where they go: classes and ids [n]."""


def carry_blocks(mover: Mover, pairs: BlockPairs) -> None:
    """Copy whole blocks in one move and wait for it: the blocks left behind are given to others next."""

    def copy() -> None:
        for source, source_ids, target, target_ids in pairs:
            copy_blocks(source, source_ids.long(), target, target_ids.long())

    num_bytes = sum(len(ids) * source.block_bytes for source, ids, _, _ in pairs)
    if not num_bytes:
        return
    move = mover.submit(Move(copy=copy, num_bytes=num_bytes), URGENT)
    try:
        move.wait()
    except BaseException:
        mover.drop(move)
        move.settle()  # nothing may be written to blocks that are given back
        raise


_MOVERS: weakref.WeakSet[Mover] = weakref.WeakSet()


@atexit.register
def _stop_movers() -> None:
    """End all threads before the interpreter does: one that it kills within a copy takes the process along."""
    for mover in list(_MOVERS):
        mover.stop()


def _sleep_until(deadline: float) -> None:
    """Return at ``deadline``, on time to some microseconds: the last part is spent yielding instead of sleeping."""
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(left - 2e-4 if left > 4e-4 else 0)
