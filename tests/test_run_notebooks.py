"""The runner behind `make run` and `make refresh`."""

import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.architecture import ROOT
from tests.run_notebooks import Failed, execute, main, recorded


def write_notebook(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def test_results_are_read_back_and_the_file_is_rewritten_only_when_asked(tmp_path, capsys):
    path = write_notebook(
        tmp_path / "01_a.ipynb",
        "from shared.results import record\nrecord('loss', 1.5, 'nats', 'floor 1.2')",
    )
    before = path.read_bytes()
    notebook = execute(path)
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
        execute(path)
    assert "raise RuntimeError" in str(failure.value) and "broken on purpose" in str(failure.value)
    assert main(["--write", str(path)]) == 1
    assert "stopped in code cell 2 of 3" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_cells_see_the_settings_of_a_checked_run(tmp_path):
    path = write_notebook(tmp_path / "01_a.ipynb", "import os\nprint(os.environ['OMP_NUM_THREADS'])")
    assert execute(path).cells[0].outputs[0].text == "1\n"


def test_text_printed_in_pieces_is_stored_in_one(tmp_path):
    path = write_notebook(
        tmp_path / "01_a.ipynb",
        "import sys, time\nfor i in range(3):\n    print(i)\n    sys.stdout.flush()\n    time.sleep(0.3)",
    )
    assert [output.text for output in execute(path).cells[0].outputs] == ["0\n1\n2\n"]


def test_a_widget_is_stored_as_its_text(tmp_path):
    show = "display({**slider._repr_mimebundle_(), 'text/plain': 'a slider'}, raw=True)"
    path = write_notebook(
        tmp_path / "01_a.ipynb", f"import ipywidgets\nslider = ipywidgets.IntSlider()\n{show}"
    )
    notebook = execute(path)
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
    command = [sys.executable, "tests/run_notebooks.py", "--write", str(path)]
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
