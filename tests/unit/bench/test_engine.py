import json
import sys
from pathlib import Path

import pytest
import torch

from kvatlas.bench import engine as engine_module, weights
from kvatlas.bench.cases import Case, cases_of, summarize
from kvatlas.bench.engine import EngineBench
from kvatlas.bench.peers import PEERS, Peer, chosen, variants, workers_folder
from kvatlas.bench.tables import engine_table, told_answers
from kvatlas.bench.worker import Worker, WorkerError
from kvatlas.core.errors import ConfigError, UnknownNameError, UnsupportedError
from kvatlas.models.loading import load_model

MODEL = "random:llama-mini"

# Answers with the last token of the prompt, plus one each step; does what its options say.
FAKE = """
import json, os, sys, time
sys.path.insert(0, {workers!r})
from protocol import serve

def load(settings):
    options = settings["options"]
    if options.get("broken"):
        raise RuntimeError("cannot be loaded")
    print("noise of a library", flush=True)

    def run(prompts, meter):
        with open(options["asked"], "a") as file:
            file.write(f"{{len(prompts)}}x{{len(prompts[0])}}+{{meter.steps}}\\n")
        if len(prompts[0]) == options.get("dies_at"):
            os._exit(3)
        if len(prompts[0]) == options.get("refuses"):
            raise ValueError("too long for me")
        if len(prompts[0]) == options.get("sleeps_at"):
            time.sleep(60)
        token = 0
        while True:
            for sequence, prompt in enumerate(prompts):
                meter.add(sequence, [prompt[-1] + token + options.get("off", 0)])
            token += 1
            if meter.step():
                return

    return "fake 1.0", run

serve(load)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Return a function that makes fake engines; they write down what they are asked."""
    folder = tmp_path / "workers"
    folder.mkdir()
    (folder / "fake.py").write_text(FAKE.format(workers=str(workers_folder())))
    monkeypatch.setattr(engine_module, "workers_folder", lambda: folder)

    def make(name: str, **options: object) -> Peer:
        return Peer(name=name, script="fake.py", options={"asked": str(tmp_path / f"{name}.asked"), **options})

    return make


@pytest.fixture
def bench(tmp_path):
    def make(*engines: Peer, **settings: object) -> EngineBench:
        values = {"threads": 1, "repeats": 2, "timeout_s": 30.0, "tell": lambda line: None} | settings
        return EngineBench(engines=engines, folder=tmp_path / "peers", results=tmp_path / "r.jsonl", **values)

    return make


def asked(tmp_path: Path, name: str) -> list[str]:
    """Return the cases that a fake was asked for, warm-ups left out."""
    return [line for line in (tmp_path / f"{name}.asked").read_text().split() if line != "2x300+4"]


def test_a_case_is_written_as_it_is_read():
    assert str(Case.parse(" 4x256+64")) == "4x256+64"
    assert [str(case) for case in cases_of("1x8+2,2x8+0", MODEL, False)] == ["1x8+2", "2x8+0"]
    for wrong in ("4x256", "0x8+1", "x", "4x0+1"):
        with pytest.raises(ConfigError, match=r"write BATCHxPROMPT\+STEPS"):
            Case.parse(wrong)


def test_prompts_are_equal_for_engines_and_new_for_repeats():
    case = Case.parse("2x16+1")
    assert case.prompts(100, 0) == case.prompts(100, 0) != case.prompts(100, 1)
    assert all(3 <= token < 100 for prompt in case.prompts(100, 0) for token in prompt)


def test_engines_are_measured_and_compared(fakes, bench, tmp_path):
    found = bench(fakes("kvatlas"), fakes("generate"), fakes("wrong", off=1)).run(MODEL, [Case.parse("2x8+3")])
    answers = found[0][1]
    assert [answer.engine for answer in answers] == ["kvatlas", "generate", "wrong"]
    assert [answer.agree for answer in answers] == [(4, 4), (4, 4), (0, 4)]
    assert answers[0].version == "fake 1.0"
    assert answers[0].repeats == 2
    assert answers[0].decode_per_s > 0
    told = told_answers(found)
    assert told[0]["ours_over_decode_per_s"] == 1.0
    assert told[1]["ours_over_prefill_per_s"] == answers[0].prefill_per_s / answers[1].prefill_per_s
    json.dumps(told, allow_nan=False)
    assert len(engine_table("tiny", 1, found).rows) == 3
    assert asked(tmp_path, "kvatlas") == ["2x8+3", "2x8+3"]


def test_what_was_measured_is_not_measured_again(fakes, bench, tmp_path):
    cases = [Case.parse("1x8+1"), Case.parse("1x9+1")]
    bench(fakes("kvatlas"), repeats=1).run(MODEL, cases[:1])
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('{"key": "cut off by Ctrl')
    told = []
    bench(fakes("kvatlas"), tell=told.append).run(MODEL, cases)
    assert asked(tmp_path, "kvatlas") == ["1x8+1", "1x9+1", "1x8+1", "1x9+1"]
    assert "1 measurements are in" in told[0]
    before = asked(tmp_path, "kvatlas")
    [(_, answers), _] = bench(fakes("kvatlas")).run(MODEL, cases)
    assert answers[0].repeats == 2
    assert asked(tmp_path, "kvatlas") == before


def test_models_that_do_not_fit_together_are_loaded_in_turn(fakes, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "memory_to_use", lambda: 0)
    most = []
    close = EngineBench._close
    monkeypatch.setattr(EngineBench, "_close", lambda self: (most.append(len(self._workers)), close(self))[1])
    found = bench(fakes("kvatlas"), fakes("generate")).run(MODEL, [Case.parse("1x8+1")])
    assert max(most) == 1
    assert [answer.repeats for answer in found[0][1]] == [2, 2]


def test_an_engine_that_cannot_is_skipped_with_the_reason(fakes, bench, tmp_path):
    engines = (
        fakes("kvatlas"), fakes("broken", broken=True), fakes("dies", dies_at=9), fakes("refuses", refuses=9),
        fakes("slow", sleeps_at=9), Peer(name="absent", script="fake.py", folder="absent", installer="absent.sh"),
    )  # fmt: skip
    run = bench(*engines, timeout_s=3.0)
    first, second = run.run(MODEL, [Case.parse("1x9+1"), Case.parse("1x8+1")])
    assert [answer.engine for answer in first[1]] == ["kvatlas"]
    assert [answer.engine for answer in second[1]] == ["kvatlas", "dies", "refuses", "slow"]
    reasons = {what.split(",")[0]: why for what, why in run.skipped.items()}
    assert "cannot be loaded" in reasons["broken"]
    assert "ended with status 3" in reasons["dies"]
    assert "too long for me" in reasons["refuses"]
    assert "no answer in 3 s" in reasons["slow"]
    assert "run benchmarks/peers/absent.sh" in reasons["absent"]


def test_no_worker_stays_behind(fakes, bench):
    run = bench(fakes("kvatlas"))
    workers = []
    start = EngineBench._worker
    run._worker = lambda *args: workers.append(start(run, *args)) or workers[-1]  # type: ignore[method-assign]
    run.run(MODEL, [Case.parse("1x8+1")])
    assert not workers[0].alive


def test_a_worker_that_cannot_start_says_so(tmp_path):
    with pytest.raises(WorkerError, match="ended with status 0"):
        Worker([sys.executable, "-c", "pass"], {}, tmp_path / "log")


def test_decode_counts_what_comes_after_every_first_token():
    meter = protocol().Meter(batch=2, steps=2)
    meter.add(0, [1])
    assert not meter.step()
    meter.add(0, [2])
    meter.add(1, [1])
    assert not meter.step()  # decode begins here
    for sequence in (0, 1, 0, 1):
        meter.add(sequence, [7])
        if sequence:
            done = meter.step()
    assert done
    answer = meter.answer()
    assert answer["decode_tokens"] == 4
    assert len(answer["step_s"]) == 2
    assert answer["tokens"] == [[1, 2, 7, 7], [1, 7, 7]]


def test_without_steps_the_first_tokens_end_it():
    meter = protocol().Meter(batch=1, steps=0)
    meter.add(0, [5])
    assert meter.step()
    run = meter.answer() | {"version": "x", "repeat": 0}
    answer = summarize(Case.parse("1x8+0"), "kvatlas", [run], [])
    assert (answer.decode_per_s, answer.agree) == (None, (0, 0))


def protocol():
    sys.path.insert(0, str(workers_folder()))
    try:
        import protocol
    finally:
        sys.path.pop(0)
    return protocol


def test_names_and_variants():
    assert [peer.name for peer in chosen(["openvino", "vllm-cpu"])] == ["openvino", "vllm-cpu"]
    with pytest.raises(UnknownNameError, match="choose among generate"):
        chosen(["llama.cpp"])
    assert [peer.name for peer in variants(["full"], [])] == ["kvatlas"]
    both = variants(["full", "h2o"], ["auto", "off"], 256)
    assert [peer.name for peer in both] == [
        "kvatlas full auto",
        "kvatlas full off",
        "kvatlas h2o auto",
        "kvatlas h2o off",
    ]
    assert both[3].options["max_batched_tokens"] == 256


def test_every_peer_has_a_worker_and_an_installer():
    for peer in PEERS.values():
        assert (workers_folder() / peer.script).exists()
        assert not peer.installer or (workers_folder().parent / peer.installer).exists()


def test_outside_a_checkout_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("kvatlas.__file__", str(tmp_path / "site-packages" / "kvatlas" / "__init__.py"))
    with pytest.raises(UnsupportedError, match="needs a checkout"):
        workers_folder()


def test_the_checkpoint_is_written_once_and_is_the_random_model(tmp_path):
    path = weights.checkpoint(MODEL, tmp_path)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert weights.checkpoint(MODEL, tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    ours, again = load_model(MODEL).adapter.model.state_dict(), load_model(path).adapter.model.state_dict()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert weights.vocabulary(path) == 1000


@pytest.mark.slow
def test_our_engine_and_transformers_agree_on_the_same_weights(bench):
    engines = [*variants(["full"], []), *chosen(["generate", "generate_batch"])]
    run = bench(*engines, repeats=1, timeout_s=120.0)
    [(_, answers)] = run.run(MODEL, [Case.parse("2x40+6")])
    assert run.skipped == {}
    assert [answer.agree for answer in answers] == [(2, 2)] * 3
