"""The way between the tiers: rates as users write them, and moves that are ordered, counted and awaited."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, strategies as st

from kvatlas.core.errors import CapacityError, ConfigError
from kvatlas.storage import crossing, link as link_module
from kvatlas.storage.crossing import order_for
from kvatlas.storage.link import AHEAD, BACKGROUND, URGENT, Link, LinkRate, Move, Mover, Traffic

PATIENCE_S = 20.0
"""Nothing here takes this long; a test that waits longer has found a thread that hangs."""


@pytest.mark.parametrize(
    ("text", "bytes_per_s", "latency_s"),
    [
        ("16GB/s,10us", 16e9, 10e-6), ("16GB/s", 16e9, 0.0), (" 1GiB/s , 2ms ", 2**30, 2e-3),
        ("500MB/s,1.5s", 5e8, 1.5), ("7/s", 7, 0.0),
    ],
)  # fmt: skip
def test_rates(text: str, bytes_per_s: float, latency_s: float) -> None:
    rate = LinkRate.parse(text)
    assert (rate.bytes_per_s, rate.latency_s) == (bytes_per_s, pytest.approx(latency_s))
    assert LinkRate.parse(rate) is rate
    assert rate.seconds(1000) == pytest.approx(latency_s + 1000 / bytes_per_s)


@pytest.mark.parametrize(
    "text",
    ["", "16GB", "fast", "16XB/s", "/s", "0GB/s", "-1GB/s", "16GB/s,", "16GB/s,10", "16GB/s,us", "16GB/s,-1us",
     "16GB/s,10us,10us", "16GB/s 10us", "nan/s"],
)  # fmt: skip
def test_rates_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        LinkRate.parse(text)
    message = str(refusal.value)
    assert "link" in message and "write it like 16GB/s,10us" in message and "\n" not in message


@pytest.mark.parametrize(("bytes_per_s", "latency_s"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, -1.0)])
def test_numbers_that_are_no_rate(bytes_per_s: float, latency_s: float) -> None:
    with pytest.raises(ConfigError, match="write it like"):
        LinkRate(bytes_per_s=bytes_per_s, latency_s=latency_s)


@given(st.integers(1, 10**14), st.integers(0, 10**7))
@example(10**6, 10**6)
@example(16 * 10**9, 10)
def test_a_printed_rate_parses_back(bytes_per_s: int, microseconds: int) -> None:
    rate = LinkRate(bytes_per_s=bytes_per_s, latency_s=microseconds / 1e6)
    again = LinkRate.parse(str(rate))
    assert again.bytes_per_s == pytest.approx(rate.bytes_per_s, rel=1e-5)
    assert again.latency_s == pytest.approx(rate.latency_s, rel=1e-5)


def move(done: list[str] | None = None, name: str = "", num_bytes: int = 1) -> Move:
    return Move(copy=lambda: None if done is None else done.append(name), num_bytes=num_bytes)


def test_moves_are_carried_out_and_counted() -> None:
    traffic, spans, done = Traffic(), [], []
    mover = Mover(None, traffic)
    moves = [
        Move(copy=lambda: done.append(1), num_bytes=size, note=lambda *span: spans.append(span)) for size in (5, 7, 9)
    ]
    for each in moves:
        mover.submit(each)
    for each in moves:
        each.wait()
        assert each.done
    assert (traffic.moves, traffic.num_bytes, len(done)) == (3, 21, 3)
    assert all(start <= end for start, end in spans)
    assert traffic.seconds == pytest.approx(sum(end - start for start, end in spans))


def test_both_directions_count_apart() -> None:
    link = Link()
    link.stores.submit(move(num_bytes=3)).wait()
    link.fetches.submit(move(num_bytes=4)).wait()
    link.fetches.submit(move(num_bytes=5)).wait()
    assert (link.to_host.moves, link.to_host.num_bytes) == (1, 3)
    assert (link.to_device.moves, link.to_device.num_bytes) == (2, 9)


def test_an_emulated_link_takes_its_time() -> None:
    """At least: a busy machine may take longer, never less."""
    rate, traffic = LinkRate(bytes_per_s=1e6, latency_s=2e-3), Traffic()
    mover = Mover(rate, traffic)
    start = time.perf_counter()
    moves = [mover.submit(move(num_bytes=5000)) for _ in range(3)]
    for each in moves:
        each.wait()
    assert time.perf_counter() - start >= 3 * rate.seconds(5000) > 3 * 6.9e-3
    assert traffic.seconds >= 3 * rate.seconds(5000)


def test_a_failed_move_tells_its_waiter_and_the_next_goes_on() -> None:
    traffic = Traffic()
    mover = Mover(None, traffic)

    def broken() -> None:
        raise ValueError("no such block")

    bad = mover.submit(Move(copy=broken, num_bytes=9))
    good = mover.submit(move(num_bytes=2))
    bad.settle()
    with pytest.raises(ValueError, match="no such block"):
        bad.wait()
    good.wait()
    assert bad.done and good.done
    assert (traffic.moves, traffic.num_bytes) == (1, 2), "what failed was not moved"


def test_the_most_urgent_goes_first() -> None:
    mover, order = Mover(None, Traffic()), []
    entered, gate = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    moves = [mover.submit(Move(copy=block, num_bytes=0), BACKGROUND)]
    assert entered.wait(PATIENCE_S)
    for name, priority in (("b1", BACKGROUND), ("a1", AHEAD), ("u1", URGENT), ("a2", AHEAD), ("u2", URGENT)):
        moves.append(mover.submit(move(order, name), priority))
    gate.set()
    for each in moves:
        each.wait()
    assert order == ["u1", "u2", "a1", "a2", "b1"]


def test_threads_end_when_idle_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_IDLE_S", 0.01)
    threads: list[threading.Thread] = []
    traffic = Traffic()
    mover = Mover(None, traffic)

    def remember() -> None:
        threads.append(threading.current_thread())

    for count in (1, 2, 3):
        mover.submit(Move(copy=remember, num_bytes=0)).wait()
        threads[-1].join(PATIENCE_S)
        assert not threads[-1].is_alive(), "an idle thread stays"
        assert traffic.moves == count
    assert len(set(map(id, threads))) == 3


def test_moves_ordered_while_the_thread_ends_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitted at all distances from the moment at which the idle thread gives up."""
    monkeypatch.setattr(link_module, "_IDLE_S", 0.0005)
    mover = Mover(None, Traffic())
    for number in range(300):
        each = mover.submit(move())
        assert each._done.wait(PATIENCE_S), f"move {number} was lost"
        time.sleep(number % 10 * 1e-4)


def test_a_stopped_mover_finishes_what_it_does_and_no_more() -> None:
    mover, order = Mover(None, Traffic()), []
    mover.stop()  # that never began
    mover = Mover(None, Traffic())
    entered, gate = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)
        order.append("first")

    first = mover.submit(Move(copy=block, num_bytes=0))
    second = mover.submit(move(order, "second"))
    assert entered.wait(PATIENCE_S)
    stopper = threading.Thread(target=mover.stop)
    stopper.start()
    while not mover._stopped:
        time.sleep(1e-3)
    gate.set()
    stopper.join(PATIENCE_S)
    assert not stopper.is_alive() and first.done and not second.done and order == ["first"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_process_ends_well_in_the_middle_of_a_move(waits: bool) -> None:
    """A thread that the interpreter kills within torch's code would abort the process."""
    code = """
import torch
from kvatlas.storage.link import Link, Move
link, data, order = Link(), torch.randn(500, 500), torch.arange(499, -1, -1)
moves = [Move(copy=lambda: [data.index_select(0, order).clone() for _ in range(200)], num_bytes=1) for _ in range(3)]
for move in moves:
    link.fetches.submit(move)
if WAITS:
    moves[-1].wait()
print("end")
"""
    command = [sys.executable, "-c", code.replace("WAITS", str(waits))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5 * PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


class Queues:
    """Stands in for a device that works later: what is carried is done, but settled only when the gate opens."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.gate = threading.Event()

    def mark(self) -> str:
        self.said.append(f"mark in {threading.current_thread().name}")
        return "before"

    def carry(self, mark: str, copy: Callable[[], None]) -> str:
        copy()
        self.said.append(f"carry after {mark} in {threading.current_thread().name}")
        return "end"

    def follow(self, mark: str) -> None:
        self.said.append(f"follow {mark} in {threading.current_thread().name}")

    def settle(self, mark: str) -> None:
        assert self.gate.wait(PATIENCE_S)
        self.said.append(f"settled {mark}")


def test_compute_goes_on_behind_a_queued_fetch_without_waiting_for_its_bytes() -> None:
    queues, traffic = Queues(), Traffic()
    mover, here = Mover(None, traffic, queues, let_go=True), threading.current_thread().name
    fetch = mover.submit(move())
    fetch.wait()
    assert queues.said == [f"mark in {here}", "carry after before in kvatlas-mover", f"follow end in {here}"]
    assert not traffic.moves  # counted when the bytes are there, however early somebody could go on
    queues.gate.set()
    mover.stop()
    assert traffic.moves == 1 and queues.said[-1] == "settled end"


@pytest.mark.parametrize(("rate", "let_go"), [(None, False), (LinkRate(bytes_per_s=1e9), True)])
def test_a_store_and_an_emulated_link_are_awaited_to_the_last_byte(rate: LinkRate | None, let_go: bool) -> None:
    queues = Queues()
    mover = Mover(rate, Traffic(), queues, let_go=let_go)
    store = mover.submit(move())
    assert not store._done.wait(0.05)
    queues.gate.set()
    store.wait()
    assert queues.said[-2:] == ["settled end", f"follow end in {threading.current_thread().name}"]


def test_an_error_while_queueing_reaches_whoever_waits() -> None:
    def fail() -> None:
        raise RuntimeError("no such block")

    queues = Queues()
    queues.gate.set()
    with pytest.raises(RuntimeError, match="no such block"):
        Mover(None, Traffic(), queues, let_go=True).submit(Move(copy=fail, num_bytes=1)).wait()


class Driver:
    """Stands in for CUDA's: notes what is registered, and what the memory held when it was released."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.held: dict[int, int] = {}
        self.released: list[int] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        self.held[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        self.released.append(ctypes.c_uint8.from_address(address).value)  # still readable
        del self.held[address]


def test_locked_memory_is_released_before_the_system_gets_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(code=0)
    monkeypatch.setattr(crossing, "_cudart", lambda: driver)
    memory = crossing.locked_memory(10_000).fill_(7)
    view = memory.view(torch.int32)[5:]
    assert list(driver.held.values()) == [10_000] and memory.data_ptr() % 4096 == 0
    del memory
    assert driver.held and view[0] == 0x07070707
    del view
    assert not driver.held and driver.released == [7]


def test_memory_that_cannot_be_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "_cudart", lambda: Driver(code=2))
    with pytest.raises(CapacityError, match=r"9.77 KiB of host memory.*--host-memory"):
        crossing.locked_memory(10_000)


def test_links_of_the_cpu_have_no_queues() -> None:
    assert order_for("cpu") is None and Link(None, "cpu").fetches._queues is None
