"""The audit: every stored notebook is as it must be, each defect is found, and reading figures are counted rightly."""

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.tools import audit
from tests.tools.architecture import CHAPTERS, notebooks
from tests.tools.audit import backward_calls, findings, main, reading


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_stored_notebook(path):
    assert findings(path) == []


def cell(text: str, count: int, printed: str = "", tag: str | None = None, folded: bool = False):
    made = new_code_cell(text, execution_count=count)
    if printed:
        made.outputs = [new_output("stream", name="stdout", text=printed)]
    made.metadata = nbformat.from_dict(
        ({"tags": [tag]} if tag else {}) | ({"jupyter": {"source_hidden": True}} if folded else {})
    )
    return made


def good_notebook():
    picture = cell("draw()", 2, folded=True)
    picture.outputs = [new_output("display_data", data={"image/svg+xml": "<svg/>", "text/plain": "a query"})]
    text = "Here we look at what you have built, and ask our next question. " * 20
    return new_notebook(
        cells=[
            new_markdown_cell("# Title\n\n| You will build | ... |\n| --- | --- |"),
            cell("import math\nx = 7\nprint(x)", 1, "7\n"),
            picture,
            new_markdown_cell(text),
            new_markdown_cell("## Proof\n\n..."),
            cell("# shared/text/cleaning.py\ndef f():\n    return 1", 3),
            new_markdown_cell("## Exercises"),
            *(cell(f"print('{n}')", n, f"{n}\n", "solution", folded=True) for n in (4, 5, 6)),
            new_markdown_cell("## References"),
        ]
    )


def test_a_good_notebook_has_no_findings_and_its_reading_is_counted(tmp_path):
    nbformat.write(good_notebook(), tmp_path / "a.ipynb")
    assert findings(tmp_path / "a.ipynb") == []
    found = reading(tmp_path / "a.ipynb")
    assert (found.median_lines, found.longest_cell, found.longest_promoted) == (3, 3, 3)
    assert (found.first_imports, found.drawings, found.code_cells) == (1, 1, 6)
    assert found.address == pytest.approx(1000 * 60 / (20 * 13 + 7), abs=8)
    assert found.words_per_line == pytest.approx((20 * 13 + 7) / 6, abs=2)
    assert any("drawings" in line for line in found.misses())


def unexecuted(notebook):
    notebook.cells[1].execution_count = None


def out_of_order(notebook):
    notebook.cells[1].execution_count, notebook.cells[2].execution_count = 2, 1


def too_many_ignored(notebook):
    notebook.cells[1].metadata["tags"] = ["nbval-ignore-output"]


def visible_solution(notebook):
    notebook.cells[7].metadata["jupyter"] = {}


def missing_solution(notebook):
    del notebook.cells[9]


def timing(notebook):
    notebook.cells[1].metadata["execution"] = {"iopub.execute_input": "2026-01-01"}


def widget_state(notebook):
    notebook.metadata["widgets"] = {}


def stored_error(notebook):
    notebook.cells[1].outputs = [new_output("error", ename="ValueError", evalue="", traceback=[])]


def stored_stderr(notebook):
    notebook.cells[1].outputs = [new_output("stream", name="stderr", text="noise")]


def stored_warning(notebook):
    notebook.cells[1].outputs[0].text = "x.py:1: UserWarning: careful"


def machine_path(notebook):
    notebook.cells[1].outputs[0].text = "/home/ada/course"


def long_plain_cell(notebook):
    notebook.cells[1].source = "x = 1\n" * 41


def unfinished(notebook):
    notebook.cells[1].source = "x = 1  # TODO"


def empty_cell(notebook):
    notebook.cells[1].source = " "


def remote_image(notebook):
    notebook.cells[3].source = "![a picture](https://example.org/a.png)"


def no_table(notebook):
    notebook.cells[0].source = "# Title"


def no_proof(notebook):
    notebook.cells[4].source = "## A section"


def no_figure(notebook):
    notebook.cells[2].outputs = []


def no_exercises(notebook):
    notebook.cells[6].source = "## At the end"


def no_references(notebook):
    notebook.cells[-1].source = "## Books"


def too_large(notebook):
    notebook.cells[2].outputs[0].data["image/svg+xml"] = "x" * 1_500_001


DEFECTS = [
    (unexecuted, "executed"),
    (out_of_order, "in order"),
    (too_many_ignored, "not compared"),
    (visible_solution, "code cell 4 is a solution and not folded"),
    (missing_solution, "fewer than three"),
    (timing, "running time"),
    (widget_state, "widgets"),
    (stored_error, "code cell 1 ends in ValueError"),
    (stored_stderr, "stderr"),
    (stored_warning, "a warning"),
    (machine_path, "a path of one machine"),
    (long_plain_cell, "41 lines and is not promoted"),
    (unfinished, "unfinished"),
    (empty_cell, "empty"),
    (remote_image, "from the network"),
    (no_table, "title with a table"),
    (no_proof, "headed Proof"),
    (no_figure, "no figure"),
    (no_exercises, "headed Exercises"),
    (no_references, "headed References"),
    (too_large, "MB are stored"),
]


@pytest.mark.parametrize(("spoil", "named"), DEFECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_each_defect_is_found_and_named_alone(tmp_path, spoil, named):
    notebook = copy.deepcopy(good_notebook())
    spoil(notebook)
    nbformat.write(notebook, tmp_path / "a.ipynb")
    found = findings(tmp_path / "a.ipynb")
    assert len(found) == 1 and named in found[0]


def test_what_is_wrong_fails_and_what_concerns_teaching_is_only_printed(tmp_path, capsys):
    path = tmp_path / "a.ipynb"
    nbformat.write(good_notebook(), path)
    assert main(["--teaching", str(path)]) == 0
    assert "aim: 1 drawings of ideas (aim 6 or more)" in capsys.readouterr().out
    notebook = good_notebook()
    no_proof(notebook)
    nbformat.write(notebook, path)
    assert main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "wrong: no section is headed Proof" in out and "aim:" not in out


def test_backward_calls_are_counted_in_modules_scripts_and_notebooks(tmp_path):
    (tmp_path / "shared" / "training").mkdir(parents=True)
    (tmp_path / "shared" / "training" / "loop.py").write_text("loss.backward()\n'loss.backward()'\n")
    (tmp_path / CHAPTERS[1]).mkdir()
    (tmp_path / CHAPTERS[1] / "sweep.py").write_text("a.backward(); b().backward(retain_graph=True)\n")
    cells = [
        new_code_cell("%matplotlib inline"),
        new_code_cell("loss.backward()"),
        new_markdown_cell("x.backward()"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / CHAPTERS[1] / "01_a.ipynb")
    assert backward_calls(tmp_path) == {
        f"{CHAPTERS[1]}/01_a.ipynb": 1,
        f"{CHAPTERS[1]}/sweep.py": 2,
        "shared/training/loop.py": 1,
    }


def test_every_backward_call_of_the_course_has_its_reason():
    assert sorted(backward_calls()) == sorted(audit.TEACHES_OR_MEASURES)
