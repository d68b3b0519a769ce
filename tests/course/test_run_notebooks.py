"""The runner behind `make run` and `make refresh`."""

import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.tools import checked_run, run_notebooks
from tests.tools.architecture import ROOT
from tests.tools.run_notebooks import Failed, chosen, execute, main, recorded


def write_notebook(path, *sources):
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def test_results_are_read_back_and_the_file_is_rewritten_only_when_asked(tmp_path, capsys):
    path = write_notebook(
        tmp_path / "01_a.ipynb",
        "from shared.notebook.results import record\nrecord('loss', 1.5, 'nats', 'floor 1.2')",
    )
    before = path.read_bytes()
    notebook = execute(path, checked_run.environment())
    assert recorded(notebook) == [{"name": "loss", "value": 1.5, "unit": "nats", "baseline": "floor 1.2"}]
    assert notebook.cells[0].outputs[0].data["text/plain"] == "loss: 1.5 nats (floor 1.2)"
    assert path.read_bytes() == before
    assert main(["--write", str(path)]) == 0
    assert nbformat.read(path, as_version=4).cells[0].execution_count == 1
    assert "1.5 nats" in capsys.readouterr().out


def test_failing_cell_is_shown_with_source_and_error_and_nothing_is_written(tmp_path, capsys):
    path = write_notebook(
        tmp_path / "01_a.ipynb", "x = 1", "raise RuntimeError('broken on purpose')", "x = 2"
    )
    before = path.read_bytes()
    with pytest.raises(Failed) as failure:
        execute(path, checked_run.environment())
    assert "raise RuntimeError" in str(failure.value) and "broken on purpose" in str(failure.value)
    assert main(["--write", str(path)]) == 1
    assert "failed in code cell 2 of 3" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_run_goes_on_after_a_failure_and_ends_with_a_line_for_each(tmp_path, capsys):
    good = "from shared.notebook.results import record\nrecord('loss', 1.5)"
    write_notebook(tmp_path / "01_a.ipynb", "raise RuntimeError('first line\\nsecond line')")
    write_notebook(tmp_path / "02_b.ipynb", good)
    write_notebook(tmp_path / "03_c.ipynb", "1", "assert 1 > 2")
    (tmp_path / "04_d.ipynb").write_text("no notebook")
    paths = sorted(map(str, tmp_path.glob("*.ipynb")))
    assert main(["--write", *paths]) == 1
    out = capsys.readouterr().out
    assert "1.5" in out
    folder = tmp_path.name
    assert out.splitlines()[-5:-1] == [
        out.splitlines()[-5],
        "3 failed:",
        f"  {folder}/01_a: code cell 1 of 1: RuntimeError: first line",
        f"  {folder}/03_c: code cell 2 of 2: AssertionError",
    ]
    assert out.splitlines()[-1].startswith(f"  {folder}/04_d: not a readable notebook: ")
    assert main(["--write", "--stop", *paths]) == 1
    out = capsys.readouterr().out
    assert "02_b" not in out and "1 failed:" in out


def test_a_chapter_or_a_place_to_begin_is_named_by_how_it_begins(tmp_path, monkeypatch, capsys):
    for place in ("ch02_text/01_a", "ch02_text/02_b", "ch03_attention/01_c"):
        write_notebook(tmp_path / f"{place}.ipynb", "1")
    paths = sorted(tmp_path.rglob("*.ipynb"))
    assert chosen(paths, "ch02") == paths[:2] == chosen(paths, "ch02_text/")
    assert chosen(paths, "ch02/02") == [paths[1]] == chosen(paths, "ch02_text/02_b.ipynb")
    monkeypatch.setattr(run_notebooks, "notebooks", lambda: paths)
    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    assert main(["--from", "ch02/02"]) == 0
    assert {p.name for p in (tmp_path / "build").rglob("*.ipynb")} == {"02_b.ipynb", "01_c.ipynb"}
    assert main(["--chapter", "ch02"]) == 0
    assert (tmp_path / "build" / "ch02_text" / "01_a.ipynb").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--chapter", "ch09"])
    assert "no notebook is at 'ch09'" in capsys.readouterr().err


def test_cells_see_the_settings_of_a_checked_run(tmp_path):
    path = write_notebook(tmp_path / "01_a.ipynb", "import os\nprint(os.environ['OMP_NUM_THREADS'])")
    assert execute(path, checked_run.environment()).cells[0].outputs[0].text == "1\n"


def test_onednn_is_told_of_the_same_processor_as_torch(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for capability, told in (("avx2", "AVX2"), ("default", None)):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        assert checked_run.environment().get("ONEDNN_MAX_CPU_ISA") == told
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    assert checked_run.environment()["ONEDNN_MAX_CPU_ISA"] == "ALL"


def test_the_users_settings_win_except_where_outputs_are_stored(tmp_path, monkeypatch, capsys):
    path = write_notebook(
        tmp_path / "ch02_a" / "01_a.ipynb", "import os\nprint(os.environ['OMP_NUM_THREADS'])"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    for arguments, target in (([], tmp_path / "build" / "ch02_a" / "01_a.ipynb"), (["--write"], path)):
        assert main([*arguments, str(path)]) == 0
        threads = nbformat.read(target, as_version=4).cells[0].outputs[0].text
        assert threads == ("1\n" if arguments else "2\n")


def test_text_printed_in_pieces_is_stored_in_one(tmp_path):
    path = write_notebook(
        tmp_path / "01_a.ipynb",
        "import sys, time\nfor i in range(3):\n    print(i)\n    sys.stdout.flush()\n    time.sleep(0.3)",
    )
    assert [output.text for output in execute(path, checked_run.environment()).cells[0].outputs] == [
        "0\n1\n2\n"
    ]


def test_a_widget_is_stored_as_its_text(tmp_path):
    show = "display({**slider._repr_mimebundle_(), 'text/plain': 'a slider'}, raw=True)"
    path = write_notebook(
        tmp_path / "01_a.ipynb", f"import ipywidgets\nslider = ipywidgets.IntSlider()\n{show}"
    )
    notebook = execute(path, checked_run.environment())
    assert notebook.cells[0].outputs[0].data == {"text/plain": "a slider"}
    assert "widgets" not in notebook.metadata


def test_unknown_notebook_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing.ipynb")])
    assert "no such notebook" in capsys.readouterr().err


@pytest.mark.posix
def test_interrupt_stops_the_kernel_and_leaves_the_notebook_as_it_was(tmp_path):
    pid_file = tmp_path / "pid"
    sleep = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    path = write_notebook(tmp_path / "01_a.ipynb", sleep)
    before = path.read_bytes()
    command = [sys.executable, "-m", "tests.tools.run_notebooks", "--write", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not pid_file.exists() or not pid_file.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted" in errors and "Traceback" not in errors
    assert path.read_bytes() == before
    assert {found.name for found in tmp_path.iterdir()} == {"pid", "01_a.ipynb"}
    assert not psutil.pid_exists(int(pid_file.read_text()))
