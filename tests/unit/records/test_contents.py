"""Digests tell contents apart, not names."""

import os

import pytest

from kvatlas.core.errors import CheckpointError
from kvatlas.records.contents import file_digest, folder_digest, model_params

LARGE = 17 * 2**20


def test_a_file_is_what_it_holds(tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_text("x")
    other.write_text("x")
    assert file_digest(one) == file_digest(other)
    other.write_text("y")
    assert file_digest(one) != file_digest(other)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "a" / "m"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(LARGE))
    return made


def test_a_checkpoint_is_what_its_files_hold(folder):
    first = folder_digest(folder)
    assert folder_digest(folder.rename(folder.with_name("n"))) == first
    folder = folder.with_name("n")
    (folder / "README.md").write_text("about it")
    assert folder_digest(folder) == first
    (folder / "config.json").write_text("{ }")
    assert folder_digest(folder) != first


@pytest.mark.parametrize("place", [0, LARGE - 1])
def test_both_ends_of_large_weights_are_read(folder, place):
    first = folder_digest(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(b"1")
    assert folder_digest(folder) != first


def test_large_weights_that_differ_evenly(folder):
    first = folder_digest(folder)
    (folder / "model.safetensors").write_bytes(bytes([0] * 5000 + [1] * 1000) * (LARGE // 6000) + bytes(LARGE % 6000))
    assert folder_digest(folder) != first


def test_only_folders_have_a_digest(folder):
    assert model_params(None) == model_params("random:llama-mini") == model_params("owner/model") == {}
    assert model_params(str(folder)) == {"model_digest": folder_digest(folder)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read(folder):
    (folder / "config.json").chmod(0)
    with pytest.raises(CheckpointError, match="check its files' rights"):
        model_params(str(folder))
