"""The runner behind `make run` and `make refresh`."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

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


def test_unknown_notebook_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing.ipynb")])
    assert "no such notebook" in capsys.readouterr().err
