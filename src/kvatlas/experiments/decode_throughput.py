"""How many tokens per second do requests at once get, and how many per GB of memory?

The study (arXiv:2604.05012, known here second-hand): throughput grows with requests under vLLM and H2O to a similar
peak, InfiniGen stays about ten times lower; per GB of device memory H2O has about three times vLLM. Expected here: a
step reads what requests hold, so strategies that cut the prompt decode faster once attention outweighs weights; per
GB they gain twice. The limit is memory bandwidth; for offloading it is the link.

Memory is counted in two ways. Live bytes are the most that requests held when memory was ample. The smallest pool is
what one would have to provide: found by running the same requests in smaller and smaller pools.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvatlas.core.errors import CapacityError
from kvatlas.experiments.experiment import Lab, Settings
from kvatlas.experiments.load import Observation, add, step
from kvatlas.experiments.shared_load import SharedLoad
from kvatlas.metrics.latency import output_throughput
from kvatlas.metrics.memory import throughput_per_gb
from kvatlas.records.schema import Point, Sample

_FIRST_STEP_UP = 0.25


@dataclass(frozen=True, kw_only=True)
class SmallestPool:
    """What a search found.

    Args:
        num_bytes: the smallest pool that sufficed.
        resolution: how much smaller the largest pool was that did not, bytes; all of it if none was too small.
    """

    num_bytes: int
    resolution: int


class DecodeThroughput(SharedLoad):
    """Tokens per second, of the whole run and of pure decoding, and per GB of live bytes and of the smallest pool."""

    name = "decode_throughput"
    question = "How many tokens per second do requests at once get, and how many per GB of memory?"
    own = SharedLoad.own | {"pool_tries"}

    def points(self, settings: Settings, model: str) -> Iterator[Point]:
        """Yield the points of a load, with the number of tries: the smallest pool found depends on it."""
        for point in super().points(settings, model):
            yield point.model_copy(update={"params": point.params | {"pool_tries": settings.pool_tries}})

    def samples(self, runs: list[Observation], point: Point, lab: Lab) -> list[Sample]:
        """Return the rates of each repeat, and the smallest pool once."""
        pool = find_smallest_pool(point, lab, runs[0])
        samples = []
        for repeat, seen in enumerate(runs):
            found = {
                ("output_throughput", "tokens/s"): output_throughput(seen.times, seen.wall_s),
                ("output_throughput_cpu", "tokens/CPU-s"): output_throughput(seen.times, seen.cpu_s),
            }
            rate = seen.decode_throughput
            if rate is not None:
                found["decode_throughput", "tokens/s"] = rate
                found["throughput_per_live_gb", "tokens/s/GB"] = throughput_per_gb(rate, seen.peak_used_bytes)
            if rate is not None and pool is not None:
                found["throughput_per_pool_gb", "tokens/s/GB"] = throughput_per_gb(rate, pool.num_bytes)
            samples += [
                Sample(metric=metric, unit=unit, value=value, index=repeat) for (metric, unit), value in found.items()
            ]
        if pool is not None:
            samples.append(Sample(metric="smallest_pool", unit="bytes", value=pool.num_bytes))
            samples.append(Sample(metric="smallest_pool_resolution", unit="bytes", value=pool.resolution))
        return samples


def find_smallest_pool(point: Point, lab: Lab, ample: Observation) -> SmallestPool | None:
    """Return the smallest pool that runs all requests of a load at once without preemption.

    The first try is the peak that the ample run showed. If it suffices, the interval below is halved at every further
    try. If not, pools grow by steps that double, until one suffices; then the interval between is halved.

    Args:
        point: the load, and how many tries there are.
        lab: runs it.
        ample: a run in the pool that the point names; None comes back if even that was too small, or no smaller pool
            was found to suffice.
    """
    if not _all_at_once(ample, int(point.params["concurrency"])):
        return None
    largest = int(point.params["kv_memory_bytes"])
    good, bad, up = largest, 0, _FIRST_STEP_UP
    pool = ample.peak_used_bytes
    for _ in range(int(point.params["pool_tries"])):
        if not bad < pool < good:
            break
        if _suffices(point, lab, pool):
            good = pool
        else:
            bad = pool
        if good < largest:
            pool = (good + bad) // 2
        else:
            pool, up = int(pool * (1 + up)), 2 * up
    return SmallestPool(num_bytes=good, resolution=good - bad) if good < largest else None


def _suffices(point: Point, lab: Lab, pool: int) -> bool:
    """Run the load in a pool; the run ends as soon as the pool is known to be too small."""
    seen = Observation()
    try:
        engine = lab.engine(point, kv_memory=pool)
    except CapacityError:
        return False
    arrivals = lab.load_arrivals(point, 0, engine)
    start = engine.clock()
    for arrival in arrivals:
        add(engine, arrival, start, point.strategy, seen)
    while engine.has_work and not seen.refused and not seen.preemptions:
        step(engine, seen)
        seen.peak_running = engine.peak_running
        finished = any(request.finish_reason is not None for request in seen.requests)
        if finished and seen.peak_running < len(arrivals):
            break
    enough = _all_at_once(seen, len(arrivals))
    for request in seen.requests:
        engine.cancel(request)
    return enough


def _all_at_once(seen: Observation, concurrency: int) -> bool:
    return not seen.refused and not seen.preemptions and seen.peak_running == concurrency
