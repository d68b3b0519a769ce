"""What every stored notebook must fulfil, and that the checks of stored outputs can fail."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.tools.architecture import CHAPTERS, ROOT, notebooks
from tests.tools.notebook_outputs import agree

NOTEBOOKS = notebooks()


def test_every_notebook_of_the_tree_is_in_a_chapter_and_numbered():
    stored = {path for chapter in CHAPTERS for path in (ROOT / chapter).rglob("*.ipynb")}
    assert {path for path in stored if ".ipynb_checkpoints" not in path.parts} == set(NOTEBOOKS)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("loss 1.234", "loss 1.235", True),
        ("loss 1.234", "loss 1.237", False),
        ("loss 1.234", "loss 1.236", False),
        ("12 of 20", "13 of 20", False),
        ("a 9.999 b", "a 10.000 b", True),
        ("x  9.99\n", "x 10.00\n", True),
        ("-0.00", "0.00", True),
        ("0.50 words", "0.50 Words", False),
        ("0.5 0.6", "0.5", False),
        ("difference 2.4e-07", "difference 3.6e-07", True),
        ("difference 0.0e+00", "difference 3.6e-07", True),
        ("difference 2.4e-07", "difference 3.6e-03", False),
        ("1.2e+05", "1.3e+05", True),
        ("1.2e+05", "1.5e+05", False),
        ("version 2.13.0", "version 2.14.0", False),
        ("3 items", "3 items ", False),
        ("v1.5", "v1.6", False),
    ],
)
def test_which_outputs_agree(first, second, equal):
    assert agree(first, second) is equal
    assert agree(second, first) is equal


def executed(source: str, text: str, count: int = 1, tag: str | None = None):
    cell = new_code_cell(
        source, execution_count=count, outputs=[new_output("stream", name="stdout", text=text)]
    )
    if tag:
        cell.metadata = nbformat.from_dict({"tags": [tag], "jupyter": {"source_hidden": True}})
    return cell


def good_notebook():
    return new_notebook(
        cells=[
            new_markdown_cell("# Title"),
            executed("print(7)", "7\n", 1),
            executed("print(0.125)", "0.125\n", 2),
            *(executed(f"print('solution {n}')", f"solution {n}\n", n, "solution") for n in (3, 4, 5)),
        ]
    )


def run_nbval(folder: Path, notebook, environment: dict[str, str] | None = None):
    """Run plain `pytest --nbval FILE` on a notebook in `folder`, with the course's conftest.py."""
    path = folder / "01_trial.ipynb"
    nbformat.write(notebook, path)
    options = ["-p", "conftest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command = [sys.executable, "-m", "pytest", *options, "--nbval", str(path)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def failed_cells(done: subprocess.CompletedProcess) -> set[int]:
    """Return the numbers, from 0, of the code cells that a run of nbval found different."""
    return set(map(int, re.findall(r"^FAILED .*::Cell (\d+)", done.stdout, re.M)))


def test_nbval_passes_what_is_right_and_fails_what_is_wrong(tmp_path):
    notebook = good_notebook()
    notebook.cells[2].outputs[0].text = "0.126\n"  # one unit of the last decimal off: allowed
    notebook.cells += [
        executed("print(7)", "8\n", 6),  # a wrong integer
        executed("print(0.125)", "0.128\n", 7),  # three units off
        executed("import sys; print('noise', file=sys.stderr); print('words')", "words\n", 8),
        executed("raise ValueError('stop')", "", 9),
    ]
    done = run_nbval(tmp_path, notebook)
    assert "3 failed, 6 passed" in done.stdout
    assert failed_cells(done) == {5, 6, 8}
