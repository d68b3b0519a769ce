"""The command that runs notebooks as other processors would: its settings, what it reports, what it refuses."""

import subprocess

import pytest

from tests.tools import processors

FAILED = """
FAILED ch04_gpt/02_gpt.ipynb::Cell 28 - Notebook cell execution failed
FAILED tests/training/test_loop.py::test_it_learns - assert 3 < 2
2 failed, 7 passed in 3.21s
"""


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Record the environment of each run of pytest and answer for it: under seed 2 something fails."""
    seen = []

    def answer(command, env, **_):
        seen.append((env["OTHER_PROCESSOR"], env.get("ATEN_CPU_CAPABILITY"), env["OMP_NUM_THREADS"]))
        bad = env["OTHER_PROCESSOR"] == "2"
        return subprocess.CompletedProcess(command, int(bad), FAILED if bad else "9 passed in 3.21s\n")

    monkeypatch.setattr(processors.subprocess, "run", answer)
    monkeypatch.setattr(processors, "ROOT", tmp_path)
    return seen


def test_every_combination_runs_and_failures_are_named(runs, capsys):
    arguments = ["ch04_gpt/02_gpt.ipynb", "--capabilities", "native", "avx2", "--seeds", "1", "2"]
    assert processors.main(arguments) == 1
    assert runs == [("1", None, "1"), ("1", "avx2", "1"), ("2", None, "1"), ("2", "avx2", "1")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed 1, native, 1 thread: 9 passed in 3.21s"
    assert lines[3:5] == [
        "    ch04_gpt/02_gpt.ipynb::Cell 28",
        "    tests/training/test_loop.py::test_it_learns",
    ]
    assert processors.main(["ch04_gpt/02_gpt.ipynb", "--seeds", "1", "--threads", "2"]) == 0
    assert "2 threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "-1"], "seeds must be at least 0"),
        (["--threads", "0"], "threads at least 1"),
        (["--capabilities", "sse"], "must be among native, default, avx2, avx512, got 'sse'"),
    ],
)
def test_unknown_settings_are_refused(runs, capsys, arguments, message):
    with pytest.raises(SystemExit):
        processors.main(arguments)
    assert message in capsys.readouterr().err and not runs
