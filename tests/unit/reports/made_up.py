"""Made-up records of every experiment of the study, in the names that experiments write; fixtures, not findings."""

import random

from tests.unit.reports.book import (
    FULL,
    H2O,
    INFINIGEN,
    LAYERS,
    LINK,
    MACHINE,
    MODELS,
    NO_PREFETCH,
    OFFLOAD,
    PEER,
    Book,
)
from tests.unit.reports.building import MIB, SLO, manifest, point, repeats

from kvatlas.records.schema import Sample
from kvatlas.records.store import RecordStore


def fill_study(store):
    """Write a study in which the full cache is fast, H2O small and InfiniGen slow; with and without emulated link."""
    store.begin_run(manifest(run_id="study", models=MODELS))
    book = Book(store)
    _prompt_length(book)
    for link, slow in (("none", 1.0), (LINK, 4.0)):
        _breakdown(book, link, slow)
        _output_length(book, link, slow)
    _load(book)
    _accuracy(book)
    _early_facts(book)
    _rates(book)
    _traces(book)
    _models(book)
    _benchmarks(book)
    _leftovers(book)


def _time_of(strategy, link):
    """Return the provenance of a time: a move over an emulated link makes it emulated."""
    return "emulated" if link != "none" and "offload" in strategy else "measured"


def _prompt_length(book):
    for strategy, reach, slope in ((FULL, 131072, 1.0), (H2O, 32768, 1.4), (INFINIGEN, 131072, 1.1)):
        for prompt in (2048, 8192, 32768, 131072):
            if prompt > reach:
                where = point("prompt_length", strategy, prompt_tokens=prompt, **MACHINE, link="none")
                reason = f"prompt of {prompt} tokens needs 9 GiB under {strategy}, the pool has 4 GiB"
                book.store.write_point(where, status="refused", reason=reason)
                continue
            host = prompt * 16384.0 if strategy == INFINIGEN else 0.0
            book.write(
                "prompt_length",
                strategy,
                book.spread("ttft", "s", slope * prompt / 2000),
                book.spread("prefill_cpu", "s", slope * prompt / 1100),
                book.exact("kv_peak", "bytes", prompt * 18432),
                book.exact("kv_after_prefill", "bytes", prompt * 18432 * (0.3 if strategy == H2O else 1)),
                book.exact("sidecars_after_prefill", "bytes", prompt * (96 if strategy == H2O else 0)),
                book.exact("host_peak", "bytes", host),
                prompt_tokens=prompt,
            )


# throughput, device and host memory, and latency, relative to the full cache
_SHAPES = {
    FULL: (1.0, 1.0, 0.0, 1.0),
    H2O: (1.05, 0.45, 0.0, 1.0),
    INFINIGEN: (0.3, 0.5, 1.0, 4.0),
    "streaming_llm(sinks=4, recent=0.3)": (1.2, 0.3, 0.0, 0.9),
}


def _load(book):
    for strategy, (rate, device, host, wait) in _SHAPES.items():
        for asked in (1, 4, 16):
            settings = {"concurrency": asked, "prompt_tokens": 512, "output_tokens": 64}
            live = asked * 4 * MIB * device
            running = min(asked, 12 if strategy == FULL else 16)
            book.write(
                "concurrency_memory",
                strategy,
                book.exact("device_peak", "bytes", live),
                book.exact("host_peak", "bytes", asked * 4 * MIB * host),
                book.exact("peak_running", "requests", running),
                book.exact("preemptions", "preemptions", asked - running),
                book.exact("swaps", "swaps", 0),
                **settings,
            )
            speed = 50 * asked**0.6 * rate
            book.write(
                "decode_throughput",
                strategy,
                book.spread("output_throughput", "tokens/s", speed * 0.8),
                book.spread("output_throughput_cpu", "tokens/CPU-s", speed * 0.7),
                book.spread("decode_throughput", "tokens/s", speed),
                book.spread("throughput_per_live_gb", "tokens/s/GB", speed / live * 1e9),
                book.spread("throughput_per_pool_gb", "tokens/s/GB", speed / live * 9e8),
                book.exact("smallest_pool", "bytes", live * 1.1),
                **settings,
            )
            n = 6 * asked
            seconds = 2 * wait * (1 + asked / 16)
            book.write(
                "request_latency",
                strategy,
                book.spread("e2e", "s", seconds, n=n, by=0.3),
                book.spread("ttft", "s", seconds / 8, n=n, by=0.3),
                book.spread("tpot", "s", seconds / 80, n=n, by=0.3),
                **settings,
            )


def _breakdown(book, link, slow):
    for strategy in (FULL, OFFLOAD, NO_PREFETCH, INFINIGEN):
        moved = "offload" in strategy
        kind = _time_of(strategy, link)
        speculates = "rehearse" in strategy
        transfer = (0.004 if speculates else 0.012) * slow if moved else 0.0
        waits = transfer * (1.0 if strategy == NO_PREFETCH else 0.4)
        times = {"attend_time": 0.004, "speculate_time": 0.002 if speculates else 0.0, "wait_time": waits}
        times |= {"other_time": 0.008}
        step = sum(times.values())
        groups = [book.spread(metric, "s", value, kind) for metric, value in times.items()]
        groups += [book.spread("step_time", "s", step, kind), book.spread("transfer_time", "s", transfer, kind)]
        memory = {"device_kv": 2 if moved else 8, "device_sketch": 1.5 if speculates else 0}
        memory |= {"device_staging": 1 if moved else 0, "device_sidecars": 0.1, "host_kv": 8 if moved else 0}
        memory |= {"device_peak": 5 if moved else 8.1, "host_peak": 8 if moved else 0}
        groups += [book.exact(metric, "bytes", value * MIB) for metric, value in memory.items()]
        if moved:
            groups.append(book.spread("hidden_share", "", 1 - waits / transfer, kind, by=0.0))
            groups.append(book.spread("transfer_to_compute", "", transfer / (step - waits), kind))
            groups.append(book.spread("bound_reached", "", max(step - waits, transfer) / step, kind))
            groups += _timeline(transfer, waits, speculates)
        if speculates:
            groups += [book.spread("speculation_recall", "", 0.9), book.spread("speculation_mass", "", 0.97)]
            groups.append(book.spread("selected_fraction", "", 0.2))
        settings = {"prompt_tokens": 2048, "output_tokens": 16, "link": link}
        book.write("offload_breakdown", strategy, *groups, **settings)


def _timeline(transfer, waits, speculates):
    """Return one step: a fetch, a wait, attention and a store per layer."""
    events, now = [], 0.0
    for layer in range(LAYERS):
        part = transfer / LAYERS
        events.append((0, layer, now, now + part))
        events.append((2, layer, now, now + waits / LAYERS))
        now += waits / LAYERS
        events.append((3, layer, now, now + 0.0007))
        now += 0.0007
        if speculates:
            events.append((4, layer, now, now + 0.0003))
            now += 0.0003
        events.append((1, layer, now, now + 0.0002))
        now += 0.001
    columns = zip(*events, strict=True)
    names = (("timeline_kind", ""), ("timeline_layer", ""), ("timeline_start", "s"), ("timeline_end", "s"))
    return [repeats(name, unit, map(float, column)) for (name, unit), column in zip(names, columns, strict=True)]


def _output_length(book, link, slow):
    for strategy, factor in ((FULL, 1.0), (H2O, 1.1), (INFINIGEN, 2.5 * slow)):
        kind = _time_of(strategy, link)
        for tokens in (64, 256, 1024):
            seconds = 0.01 * factor
            book.write(
                "output_length",
                strategy,
                book.spread("decode_time", "s", seconds * tokens, kind),
                book.spread("tpot", "s", seconds, kind),
                prompt_tokens=2048,
                output_tokens=tokens,
                link=link,
            )


def _answers(book, share, n, hard=0.1):
    """Return right and wrong; the same prompts are hard for everybody."""
    rng = random.Random(1)
    return repeats("correct", "", [float(rng.random() < share - hard * (place % 3 == 0)) for place in range(n)])


def _accuracy(book, n=120):
    keeps = {"h2o": 0.35, "infinigen": 0.08, "snapkv": 0.2}
    for task, ease in (("single needle", 1.0), ("16 keys", 0.9)):
        settings = {"task": task, "context_tokens": 1024, "n": n}
        held = repeats("kv_after_prefill", "bytes", [1024 * 512.0])
        book.write("accuracy_budget", FULL, _answers(book, ease, n), held, role="quality", budget=1.0, **settings)
        for name, loss in keeps.items():
            for budget in (0.5, 0.3, 0.1, 0.04, 0.02):
                share = ease - loss * (0.1 / budget) ** 0.5 if budget < 0.5 else ease
                sentence = {
                    "h2o": f"h2o(heavy={budget / 2}, recent={budget / 2})",
                    "infinigen": INFINIGEN.replace("cap=0.3", f"cap={budget}"),
                    "snapkv": f"snapkv(budget={budget}, window=16)",
                }[name]
                held = repeats("kv_after_prefill", "bytes", [1024 * 512.0 * budget])
                book.write(
                    "accuracy_budget",
                    sentence,
                    _answers(book, max(share, 0.02), n),
                    held,
                    role="quality",
                    budget=budget,
                    **settings,
                )


def _early_facts(book, n=120):
    for turns in (1, 2, 4):
        for context in (1024, 2048):
            settings = {"context_tokens": context, "num_keys": 1, "n": n, "turns": turns}
            book.write("early_fact", FULL, _answers(book, 0.98, n, 0.05), role="quality", budget=1.0, **settings)
            for budget in (0.3, 0.1):
                share = 0.8 - 0.0001 * context - 0.02 * turns - (0.2 if budget == 0.1 else 0)
                half = budget / 2
                sentences = {
                    f"h2o(heavy={half}, recent={half})": share,
                    INFINIGEN.replace("cap=0.3", f"cap={budget}"): 0.96,
                }
                for sentence, right in sentences.items():
                    book.write(
                        "early_fact",
                        sentence,
                        _answers(book, right, n, 0.05),
                        repeats("kv_after_prefill", "bytes", [context * 512.0 * budget]),
                        role="quality",
                        budget=budget,
                        **settings,
                    )


def _rates(book):
    for strategy, wait in ((FULL, 1.0), (H2O, 1.2), (PEER, 0.7)):
        for rate in (0.5, 1, 2):
            late = wait * (1 + rate)
            book.write(
                "request_rate",
                strategy,
                book.spread("ttft", "s", 0.4 * late, n=48, by=0.6),
                book.spread("tpot", "s", 0.03 * late, n=48, by=0.3),
                book.spread("e2e", "s", 3 * late, n=48, by=0.3),
                [Sample(metric="goodput", unit="requests/s", value=rate / late)],
                arrivals="poisson",
                rate=rate,
                requests=48,
                slo=SLO,
            )


def _traces(book):
    for strategy, wait in ((FULL, 1.0), (H2O, 1.3), (PEER, 0.8)):
        values = {"trace": "azure_code", "requests": 60, "time_scale": 0.5, "slo": SLO}
        groups = [book.spread("ttft", "s", wait, n=60, by=0.7), book.spread("tpot", "s", 0.05 * wait, n=60, by=0.4)]
        groups.append([Sample(metric="goodput", unit="requests/s", value=1.2 / wait)])
        if strategy == PEER:  # another system has none of our conditions
            where = point("trace_replay", strategy, **values)
            book.store.write_point(where, [sample for group in groups for sample in group])
            continue
        groups.append([Sample(metric="kv_peak", unit="bytes", value=40 * MIB)])
        book.write("trace_replay", strategy, *groups, **values)


def _models(book):
    for model, size in (("llama-55m", 1.0), ("llama-160m-shape", 2.5), ("llama-1b", 16.0)):
        for strategy, factor in ((FULL, 1.0), (H2O, 1.1)):
            book.write(
                "model_size",
                strategy,
                book.spread("ttft", "s", 0.2 * size * factor),
                book.spread("tpot", "s", 0.01 * size * factor),
                book.spread("output_throughput", "tokens/s", 400 / size / factor),
                book.exact("device_peak", "bytes", 8 * MIB * size),
                book.exact("weights_bytes", "bytes", 200 * MIB * size),
                prompt_tokens=512,
                output_tokens=32,
                batch=4,
                model=model,
            )


def _benchmarks(book, n=100):
    for task, share in (("piqa", 0.6), ("hellaswag", 0.35)):
        for strategy, loss in ((FULL, 0.0), (H2O, 0.1)):
            right = repeats("acc", "", [float(book.rng.random() < share - loss) for _ in range(n)])
            book.write("evaluate", strategy, right, role="quality", task=task, n=n)


def _leftovers(book):
    """Write what a page must survive: an experiment that is gone, a failure and a refusal."""
    for asked in (1, 4):
        book.write("concurrency", FULL, book.spread("output_throughput", "tokens/s", 40.0 * asked), concurrency=asked)
    refused = point("concurrency_memory", "kivi(bits=2)", concurrency=8, prompt_tokens=512, output_tokens=64)
    book.store.write_point(refused, status="refused", reason="group 32 > block size 16; raise block_size")
    failed = point("prompt_length", "snapkv(budget=256)", prompt_tokens=8192)
    book.store.write_point(failed, status="failed", reason="RuntimeError: 8,192 tokens <need> 3 GiB")


def study_file(path):
    """Write the made-up study; returns its path."""
    with RecordStore(path) as store:
        fill_study(store)
    return path
