"""`shared/doctor/software.py`: Python, environment, packages and torch, each check with an input of every kind."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from shared.doctor import software
from shared.doctor.findings import ROOT, Finding, numbers_of

REQUIREMENTS = "-e .   # the course\npandas>=2.2   # tables\nscipy[extra]>=1.14,<3\n"
PROJECT = '[project]\nname = "x"\ndependencies = ["torch>=2.8", "numpy>=2.0"]\n'
CONSTRAINTS = "pandas==3.1.1\nscipy==1.17.1\ntorch==2.13.0\nnumpy==2.4.6\n"
TESTED = {"pandas": "3.1.1", "scipy": "1.17.1", "torch": "2.13.0+cpu", "numpy": "2.4.6"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("version", "bits", "status"),
    [
        ((3, 8, 10), 64, "problem"),
        ((3, 10, 14), 64, "problem"),
        ((3, 11, 0), 64, "ok"),
        ((3, 13, 9), 64, "ok"),
        ((3, 14, 0), 64, "note"),
        ((3, 12, 1), 32, "problem"),
    ],
)
def test_pythons(version, bits, status):
    finding = software.check_python(version, bits, "Linux")
    assert finding.status == status
    assert finding.found.startswith(".".join(map(str, version)))
    assert bool(finding.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("system", "word"), [("Windows", "winget"), ("Darwin", "brew"), ("Linux", "apt"), ("FreeBSD", "apt")]
)
def test_the_remedy_is_one_of_the_readers_system(system, word):
    assert word in software.check_python((3, 8, 0), 64, system).remedy


def test_environments():
    assert software.check_environment("/x/.venv", "/usr", "").status == "ok"
    assert "conda" in software.check_environment("/opt/conda", "/opt/conda", "/opt/conda").found
    assert software.check_environment("/usr", "/usr", "").status == "note"
    assert software.check_environment("/usr", "/usr", "/opt/conda").status == "note"


def test_what_is_required_is_read_with_its_lowest_version(root):
    assert software.read_requirements(root) == {
        "pandas": "2.2",
        "scipy": "1.14",
        "torch": "2.8",
        "numpy": "2.0",
    }
    assert software.read_pins(root)["torch"] == "2.13.0"


def test_the_courses_own_lists_are_read_whole():
    required, pins = software.read_requirements(), software.read_pins()
    assert {"torch", "jupyterlab", "psutil", "tiktoken"} <= required.keys() <= pins.keys()
    assert all(numbers_of(pins[name]) >= numbers_of(lowest) for name, lowest in required.items())


@pytest.mark.parametrize(
    ("changed", "status", "found"),
    [
        ({}, "ok", "4 of 4, as tested"),
        ({"scipy": None, "numpy": None}, "problem", "missing: numpy, scipy"),
        ({"torch": "1.13.1"}, "problem", "torch 1.13.1 is below 2.8"),
        ({"torch": "1.13.1", "pandas": None}, "problem", "missing: pandas; torch 1.13.1 is below 2.8"),
        ({"torch": "2.9.0"}, "note", "torch 2.9.0 is older than 2.13.0"),
        ({"torch": "2.14.1+cu130", "scipy": "1.15.0"}, "note", "scipy 1.15.0 is older than 1.17.1; torch"),
        ({"torch": "unknown"}, "problem", "torch unknown is below 2.8"),
    ],
)
def test_versions(root, changed, status, found):
    finding = software.check_packages(root, (TESTED | changed).get, "Linux")
    assert finding.status == status
    assert finding.found.startswith(found)
    assert status == "ok" or finding.remedy.endswith(
        ".venv/bin/python -m pip install -r requirements.txt -c constraints.txt"
    )


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_list_that_cannot_be_read(root, content):
    path = root / "constraints.txt"
    path.unlink()
    if content:
        path.write_bytes(content)
    finding = software.check_packages(root, TESTED.get)
    assert finding.status == "problem" and finding.remedy.startswith("git checkout")


def test_a_damaged_pyproject(root):
    (root / "pyproject.toml").write_text("[project\n", encoding="utf-8")
    assert software.check_packages(root, TESTED.get).status == "problem"


def test_versions_come_from_the_packages_descriptions(monkeypatch):
    assert software.installed_version("torch") == importlib.metadata.version("torch")
    assert software.installed_version("no-such-package") is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: 1 / 0)
    assert software.installed_version("torch") is None


def test_which_copy_of_the_course_is_found(tmp_path):
    assert software.check_course(ROOT, str(ROOT / "shared")).status == "ok"
    assert software.check_course(ROOT, str(tmp_path / "shared")).status == "note"
    missing = software.check_course(ROOT, "", "Windows")
    assert missing.status == "problem" and missing.remedy.startswith(
        r".venv\Scripts\python -m pip install -e"
    )


FACTS = {"version": "2.13.0", "right": True}


def test_torch():
    assert software.check_torch(FACTS).status == "ok"
    assert software.check_torch({**FACTS, "right": False}).status == "problem"
    missing = software.check_torch({"error": "ModuleNotFoundError: No module named 'torch'"}, "Linux")
    assert missing.status == "problem" and "pip install" in missing.remedy
    assert "VCRedist" in software.check_torch({"error": "OSError: [WinError 126] c10.dll"}, "Windows").remedy
    assert "another machine" in software.check_torch({"error": "ended by SIGILL"}).remedy


def test_torch_is_asked_in_another_process():
    facts = software.torch_facts()
    assert facts["right"] is True
    assert facts["version"] == importlib.metadata.version("torch") and facts["threads"] >= 1


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise ImportError('libomp is missing')", "ImportError: libomp is missing"),
        ("import sys; sys.exit(7)", "exit status 7"),
        ("import sys; print('no json'); sys.exit(0)", "JSONDecodeError"),
    ],
)
def test_a_broken_torch_is_reported(tmp_path, monkeypatch, source, error):
    (tmp_path / "torch.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = software.torch_facts()
    assert facts["error"] == error or error == "JSONDecodeError"
    assert isinstance(software.check_torch(facts), Finding)
    assert software.check_torch(facts).status == "problem"


@pytest.mark.posix
def test_a_torch_that_needs_a_newer_processor(tmp_path, monkeypatch):
    source = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    (tmp_path / "torch.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = software.check_torch(software.torch_facts())
    assert "SIGILL" in finding.found and "too old" in finding.remedy


def test_a_torch_that_never_comes_back(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert software.torch_facts(seconds=0.5) == {"error": "TimeoutExpired"}
    assert software.torch_facts(python=str(tmp_path / "nothing")) == {"error": "FileNotFoundError"}


def test_this_python_is_fine():
    assert software.check_python().status in ("ok", "note") and sys.version_info >= (3, 11)
