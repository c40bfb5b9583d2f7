"""Rotations: they change no product, gather weight, and live in a file that may be missing, broken or in the way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.driving import loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import UnsupportedError
from kvatlas.core.folders import cache_folder
from kvatlas.engine.engine import Engine
from kvatlas.models import rotation as rotation_module
from kvatlas.models.adapter import Adapter
from kvatlas.models.rotation import Rotation, calibrate, model_digest, rotations_for

TOKENS = token_ids(40)[0].tolist()


@pytest.fixture(scope="module")
def adapter():
    with Adapter(tiny_model("llama")) as made:
        yield made


@pytest.fixture(scope="module")
def rotations(adapter) -> list[Rotation]:
    return calibrate(adapter, TOKENS)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def assert_equal(one: list[Rotation], two: list[Rotation]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left.matrix, right.matrix) and (left.scale, left.softcap) == (right.scale, right.softcap)


def test_products_stay_what_they_were(adapter, rotations: list[Rotation]) -> None:
    assert len(rotations) == len(adapter.shape.layers)
    for layer, rotation in zip(adapter.shape.layers, rotations, strict=True):
        heads, width = layer.num_kv_heads, layer.key_dim
        assert rotation.matrix.shape == (heads, width, width) and rotation.matrix.dtype == torch.float32
        identity = rotation.matrix.double().transpose(1, 2) @ rotation.matrix.double()
        torch.testing.assert_close(identity, torch.eye(width).double().expand_as(identity), atol=1e-5, rtol=0)
        query, key = torch.randn(heads, 5, width), torch.randn(heads, 7, width)
        torch.testing.assert_close(
            rotation.rotate(query) @ rotation.rotate(key).transpose(1, 2), query @ key.transpose(1, 2),
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip
        assert rotation.scale == pytest.approx(width**-0.5) and rotation.softcap is None


def test_weight_is_gathered_in_the_first_columns(adapter, rotations: list[Rotation]) -> None:
    """Of the queries it was made of: column energies fall, and the first few hold more than any few raw columns."""
    seen: list[torch.Tensor] = []

    class Noting(rotation_module._QueryMoments):
        def attend(self, call, query, key, value):
            seen.append(query[0].reshape(key.shape[1], -1, query.shape[-1]))
            return super().attend(call, query, key, value)

    context = Noting()
    context.begin([rotation_module.Segment(sequence=0, start=0, num_tokens=len(TOKENS))])
    places = torch.arange(len(TOKENS))
    adapter.forward(torch.tensor(TOKENS), places, context, places[-1:], rope_tokens=len(TOKENS))
    for queries, rotation in zip(seen, rotations, strict=True):
        rotated = rotation.rotate(queries).square().sum(dim=1)
        raw = queries.square().sum(dim=1).sort(dim=-1, descending=True).values
        assert (rotated.diff(dim=-1) <= 1e-3 * rotated[:, :1]).all()
        few = rotated.shape[-1] // 4
        assert (rotated[:, :few].sum(dim=-1) > raw[:, :few].sum(dim=-1)).all()


def test_written_and_read_again(adapter, rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal(rotations_for(adapter, TOKENS, tmp_path / "new"), rotations)
    assert only_file(tmp_path / "new").name.startswith(f"rotation-{model_digest(adapter.model)}-")
    rotations_for(adapter, TOKENS[:-1], tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 2, "another sample, another file"
    monkeypatch.setattr(rotation_module, "calibrate", lambda *_: pytest.fail("it was kept"))
    assert_equal(rotations_for(adapter, TOKENS, tmp_path / "new"), rotations)


def test_softcap_and_scale_are_kept(tmp_path: Path) -> None:
    own = tiny_model("gemma2", layer_types=["full_attention"] * 3)
    with Adapter(own) as adapter:
        made = rotations_for(adapter, TOKENS, tmp_path)
        assert {(each.scale, each.softcap) for each in made} == {(24**-0.5, 3.0)}
        assert_equal(rotations_for(adapter, TOKENS, tmp_path), made)


def broken_files() -> dict[str, object]:
    def shapes(path: Path) -> None:
        save_file({key: value[..., :3].contiguous() for key, value in load_file(path).items()}, path)

    def missing(path: Path) -> None:
        tensors = load_file(path)
        del tensors["matrix.1"]
        save_file(tensors, path)

    def scales(path: Path) -> None:
        save_file({key: value[:1].contiguous() if "scale" in key else value for key, value in load_file(path).items()},
                  path)  # fmt: skip

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    return {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("not tensors at all, but long enough to look like a header"),
        "shapes": shapes, "missing": missing, "scales": scales, "folder": folder,
    }  # fmt: skip


@pytest.mark.parametrize("how", broken_files())
def test_a_broken_file_is_made_again(adapter, rotations, tmp_path: Path, caplog, how: str) -> None:
    rotations_for(adapter, TOKENS, tmp_path)
    path = only_file(tmp_path)
    broken_files()[how](path)
    with caplog.at_level(logging.WARNING):
        assert_equal(rotations_for(adapter, TOKENS, tmp_path), rotations)
    assert f"{path} cannot be read" in caplog.text and "calibrating again" in caplog.text
    caplog.clear()
    if how != "folder":
        assert_equal(rotations_for(adapter, TOKENS, tmp_path), rotations)
        assert not caplog.text, "it was mended"
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "no partial file is left"


def test_a_folder_that_cannot_be_written_to(adapter, rotations, tmp_path: Path, caplog) -> None:
    """A file stands where the folder should be: nobody can write there, not even root."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert_equal(rotations_for(adapter, TOKENS, tmp_path / "file" / "folder"), rotations)
    assert "cannot be written" in caplog.text and "the next start calibrates again" in caplog.text


def test_where_files_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVATLAS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("KVATLAS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kvatlas"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / ".cache" / "kvatlas"


def test_digests_tell_models_apart() -> None:
    digest = model_digest(tiny_model("llama"))
    assert digest == model_digest(tiny_model("llama")) and len(digest) == 16
    assert digest != model_digest(tiny_model("llama", seed=1))
    assert digest != model_digest(tiny_model("llama", rms_norm_eps=1e-3)), "the config counts, too"
    names = [name for name, _ in tiny_model("llama").named_parameters()]
    changed = set()
    for name in names:
        model = tiny_model("llama")
        with torch.no_grad():
            weight = model.get_parameter(name).flatten()
            weight[len(weight) // 2 + 1] += 1e-3
        changed.add(model_digest(model))
    assert len(changed | {digest}) == len(names) + 1, "a single number of any weight counts"


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "gemma4_text"])
def test_models_of_several_kinds_of_layers_are_refused(family: str) -> None:
    with Adapter(tiny_model(family), name="mine") as adapter, pytest.raises(UnsupportedError) as refusal:
        calibrate(adapter, TOKENS)
    assert "mine has sliding windows or shared keys and values" in str(refusal.value)
    assert "use offload(host) alone" in str(refusal.value)


def test_the_engine_passes_the_refusal_on_and_serves_the_rest() -> None:
    engine = Engine(loaded(tiny_model("mistral")), kv_memory="1MiB")
    with pytest.raises(UnsupportedError, match="speculation is not served"):
        engine.add_request([5, 6], strategy="infinigen")
    assert not engine.has_work
    engine.add_request([5, 6], strategy="offload(host)")
    while engine.has_work:
        engine.step()
