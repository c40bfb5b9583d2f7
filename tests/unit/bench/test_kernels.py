import pytest
import torch
from rich.console import Console

from kvatlas.bench.columns import Chunk
from kvatlas.bench.decode import GATHER, SDPA_GQA, SDPA_PACKED, SDPA_PACKED_FP32, TORCH_FORM, TORCH_FORMS, measure_cell
from kvatlas.bench.kernels import measure_kernels
from kvatlas.bench.paged import Content, Lanes
from kvatlas.core.vocabulary import Format
from kvatlas.kernels.blocks import read_keys, read_values

SMALL = Lanes(batch=2, context=64, query_heads=4, kv_heads=2, head_dim=32, cold_bytes=1 << 16)
READ_BYTES = 1 << 16


def test_a_form_walks_over_more_than_the_caches_hold():
    lanes = Lanes(batch=1, context=2048)
    for format in Format:
        assert lanes.layers(format) * lanes.layer_bytes(format) >= lanes.cold_bytes
        assert lanes.held_bytes(format) >= lanes.layers(format) * lanes.layer_bytes(format)


def test_bytes_and_flop_are_those_of_the_arithmetic():
    lanes = Lanes(batch=8, context=32_768)
    assert lanes.layer_bytes(Format.FP16) == 8 * 8 * 32_768 * 2 * 128 * 2
    assert lanes.layer_bytes(Format.INT8) == 8 * 8 * 32_768 * 2 * (128 + 2)
    assert lanes.flop == 2 * 8 * 32 * 32_768 * 2 * 128


@pytest.mark.parametrize("format", list(Format))
def test_pages_hold_what_contiguous_tensors_hold(format):
    content = Content.random(SMALL)
    parts = content.paged(SMALL, format)
    assert len(parts) == SMALL.layers(format)
    keys, values = content.contiguous(SMALL, torch.float32, len(parts))
    error = {Format.INT8: 0.02, Format.INT4: 0.3, Format.INT2: 1.5}.get(format, 0.02)
    for layer, part in enumerate(parts):
        torch.testing.assert_close(read_keys(part.pool, part.table, torch.float32), keys[layer], atol=error, rtol=0)
        torch.testing.assert_close(read_values(part.pool, part.table, torch.float32), values[layer], atol=error, rtol=0)


def test_blocks_of_all_layers_are_distinct_and_in_random_order():
    tables = torch.stack([part.table for part in Content.random(SMALL).paged(SMALL, Format.FP16)]).flatten()
    assert len(tables.unique()) == len(tables)
    assert not torch.equal(tables, tables.sort().values)


def test_every_form_is_right_and_none_is_left_out():
    cell = measure_cell(SMALL, torch.get_num_threads(), list(Format), 1, read_bytes=READ_BYTES)
    assert not cell.skipped
    assert {row.form for row in cell.rows} == {*TORCH_FORMS, *Format}
    allowed = {Format.FP32: 1e-5, SDPA_PACKED_FP32: 1e-5, Format.FP16: 0.01, Format.INT8: 0.05, Format.INT4: 0.3}
    allowed |= dict.fromkeys((Format.BF16, SDPA_GQA, SDPA_PACKED, GATHER, TORCH_FORM), 0.05)
    for row in cell.told():
        assert row["error"] <= allowed.get(row["form"], 1.5), row
        assert row["wall_ms"] > 0
        assert row["over_best_torch"] == pytest.approx(cell.best_torch.timing.wall_s * 1e3 / row["wall_ms"])


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr("kvatlas.bench.decode.memory_to_use", lambda: 0)
    cell = measure_cell(SMALL, 1, [Format.FP16], 1, read_bytes=READ_BYTES)
    assert cell.rows == []
    assert set(cell.skipped) == {*TORCH_FORMS, "fp16"}
    assert "left of half the free memory" in cell.skipped["fp16"]


def test_all_operations_make_tables_and_leave_torch_threads_alone(monkeypatch):
    monkeypatch.setattr("kvatlas.bench.kernels._LINEARS", ((64, 128),))
    chunks = tuple(Chunk(tokens=40, past=past, query_heads=4, kv_heads=2, head_dim=32) for past in (0, 64))
    monkeypatch.setattr("kvatlas.bench.kernels.QUICK", chunks)
    monkeypatch.setattr("kvatlas.bench.kernels._LAYERS", "random:llama-mini")
    before, console = torch.get_num_threads(), Console(width=200)
    with console.capture() as shown:
        told = measure_kernels(
            ["decode", "blocks", "columns", "linear", "layers"], [Format.FP16, Format.INT2], [64], [1],
            threads=1, repeats=1, quick=True, show=console.print, read_bytes=READ_BYTES, cold_bytes=1 << 16,
        )  # fmt: skip
    assert torch.get_num_threads() == before
    assert {row["form"] for row in told["decode"]} == {*TORCH_FORMS, "fp16", "int2"}
    assert {(row["operation"], row["format"]) for row in told["blocks"]} >= {("encode", "int2"), ("read", "fp16")}
    assert {row["past"] for row in told["columns"]} == {0, 64}
    assert all(row["difference"] < 1e-5 for row in told["columns"])
    assert {row["rows"] for row in told["linear"]} == {1, 2, 4}
    assert all(row["error"] < 0.1 for row in told["linear"])
    assert [row["rows"] for row in told["layers"]] == [1, 1, 1, 4, 4, 4]
    assert all(row["difference"] < 1e-3 for row in told["layers"])
    text = shown.get()
    titles = "decode attention, batch 1, 64 tokens", "64 blocks of", "column sums of a chunk", "linear of 64 to 128"
    assert all(title in text for title in titles)
