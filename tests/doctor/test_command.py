"""`python -m shared.doctor`: what it prints, its exit status, and that it runs where nearly nothing works."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from shared.doctor import examination, software
from shared.doctor.__main__ import main
from shared.doctor.examination import GROUPS, examine
from shared.doctor.findings import ROOT, STATUSES, Finding, numbers_of, report

MODULES = sorted((ROOT / "shared" / "doctor").glob("*.py"))


def run(*arguments: str, command=("-m", "shared.doctor"), **environment: str) -> subprocess.CompletedProcess:
    """Run the command in the repository's folder."""
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_a_finding_says_what_it_must():
    with pytest.raises(ValueError, match="status must be one of ok, note, problem, got 'bad'"):
        Finding("x", "bad", "")
    for finding in (("x", "problem", "broken"), ("x", "note", "two\nlines"), ("x", "ok", "", "two\nlines")):
        with pytest.raises(ValueError, match="one line"):
            Finding(*finding)


def test_versions_as_numbers():
    assert [numbers_of(v) for v in ("2.13.0+cpu", "3", "unknown", "2.1rc1")] == [(2, 13, 0), (3,), (), (2, 1)]


def test_the_report_puts_problems_first():
    findings = [
        Finding("a", "note", "so", "do"),
        Finding("longer", "problem", "bad", "mend"),
        Finding("c", "ok", "fine"),
    ]
    assert report(findings).splitlines() == [
        "note     a       so",
        "problem  longer  bad",
        "ok       c       fine",
        "",
        "To be mended:",
        "  longer: mend",
        "",
        "Good to know:",
        "  a: do",
    ]
    assert report([Finding("c", "ok", "fine")]) == "ok       c  fine"


def test_json_and_exit_status_agree():
    done = run("--json", "--offline")
    told = json.loads(done.stdout)
    statuses = [finding["status"] for finding in told["findings"]]
    assert set(statuses) <= set(STATUSES) and len(statuses) == 14
    assert told["problems"] == statuses.count("problem")
    assert done.returncode == int(told["problems"] > 0)
    assert done.stderr == ""


def test_by_its_path_without_installation(tmp_path):
    done = run("--offline", command=("-I", str(ROOT / "shared" / "doctor")))
    assert done.stderr == "" and done.returncode in (0, 1)
    assert re.search(r"^ok +data ", done.stdout, re.M)


def test_a_broken_torch_is_a_problem_and_the_rest_is_still_said(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1 is missing')", encoding="utf-8")
    done = run("--offline", "--speed", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 1 and done.stderr == ""
    assert "problem  torch        ImportError: libgomp.so.1 is missing" in done.stdout
    assert "To be mended:\n  torch: " in done.stdout
    assert re.search(r"^ok +data ", done.stdout, re.M)
    assert "GFLOP/s" not in done.stdout


def test_an_old_python_is_told_so_and_nothing_else_is_tried(monkeypatch, capsys):
    old = Finding("Python", "problem", "3.8.10; Python 3.11 or newer, 64 bits, is needed", "install it")
    monkeypatch.setattr(software, "check_python", lambda: old)
    monkeypatch.setattr(examination, "examine", lambda *_, **__: pytest.fail("it went on"))
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("problem  Python  3.8.10; Python 3.11 or newer")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_an_old_python_can_read_the_doctor(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    # At the top nothing is imported but the standard library, as of 3.8, and the doctor itself.
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name for node in imports if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    foreign = {
        n
        for n in names
        if not n.startswith("shared.doctor") and n.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign | (names & {"tomllib", "zoneinfo", "graphlib"}) == set()
    # Annotations such as `str | None` are not evaluated there.
    assert path.stem == "__init__" or "__future__" in names


def test_offline_asks_nobody(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        examination, "examine", lambda *groups, **_: asked.extend(groups) or [Finding("x", "ok", "")]
    )
    assert main(["--offline"]) == 0
    assert asked == [group for group in GROUPS if group != "network"]
    assert "No problem" in capsys.readouterr().out


def test_a_check_that_fails_itself_stops_no_other(monkeypatch):
    checks = [lambda facts, full: 1 / 0, lambda facts, full: Finding("next", "ok", "fine")]
    monkeypatch.setitem(GROUPS, "files", checks)
    first, second = examine("files")
    assert first.status == "note" and "ZeroDivisionError" in first.found
    assert second.name == "next"
    with pytest.raises(ValueError, match="groups must be of software, machine, files, network, got hardware"):
        examine("hardware")


def test_the_notebook_installs_as_the_readme_says():
    notebook = json.loads((ROOT / "ch01_intro" / "02_setup_check.ipynb").read_text(encoding="utf-8"))
    prose = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    blocks = re.findall(r"^```\n(.*?)^```", "\n".join(prose), re.M | re.S)
    commands = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    ours = [line for line in commands if ".venv" in line and "shared.doctor" not in line]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(ours) == 6 and [line for line in ours if line not in readme] == []
