"""Promotion: the notebook is the source of `shared/`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.tools.architecture import ROOT
from tests.tools.promote import PromotionError, collect, main

DOCSTRING = "Squares of numbers.\n\nLeaves out: cubes."
SQUARE = 'def square(x: float) -> float:\n    """Return x times x."""\n    return x * x'


def course(root, *cells, name="02_topic.ipynb", chapter="ch02_text_data"):
    """Write a notebook with the given (kind, source, tag) cells below `root`."""
    made = []
    for kind, source, tag in cells:
        cell = new_code_cell(source) if kind == "code" else new_markdown_cell(source)
        cell.metadata["tags"] = [f"promote:{tag}"] if tag else []
        made.append(cell)
    (root / chapter).mkdir(exist_ok=True)
    (root / "shared").mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=made), root / chapter / name)


def test_module_reads_as_if_written_by_hand(tmp_path):
    course(
        tmp_path,
        ("code", "import torch\nimport math\nfrom collections import Counter, defaultdict", None),
        ("prose", DOCSTRING, "text/cleaning"),
        ("code", "LIMIT = math.pi", "text/cleaning"),
        (
            "code",
            'def count(x: list) -> Counter:\n    """Count."""\n    return Counter(x[:LIMIT])',
            "text/cleaning",
        ),
    )
    assert collect(tmp_path)["text/cleaning"] == (
        '"""Squares of numbers.\n\nLeaves out: cubes.\n\n'
        'Explained and proven in ch02_text_data/02_topic.ipynb; written from there by `make promote`.\n"""\n\n'
        "import math\nfrom collections import Counter\n\n"
        "LIMIT = math.pi\n\n\n"
        'def count(x: list) -> Counter:\n    """Count."""\n    return Counter(x[:LIMIT])\n'
    )


def test_two_notebooks_promote_in_chapter_order_and_writing_twice_changes_nothing(tmp_path, capsys):
    course(
        tmp_path, ("code", "def later():\n    return earlier()", "text/cleaning"), chapter="ch03_attention"
    )
    course(tmp_path, ("code", "def earlier():\n    return 1", "text/cleaning"))
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert not (tmp_path / "shared" / "text" / "cleaning.py").exists()
    assert main(["--root", str(tmp_path)]) == 0
    text = (tmp_path / "shared" / "text" / "cleaning.py").read_text()
    assert text.index("def earlier") < text.index("def later")
    assert main(["--root", str(tmp_path)]) == 0
    assert (tmp_path / "shared" / "text" / "cleaning.py").read_text() == text
    assert main(["--check", "--root", str(tmp_path)]) == 0
    assert "agree" in capsys.readouterr().out


def test_changed_cell_fails_the_check_with_a_diff(tmp_path, capsys):
    course(tmp_path, ("code", SQUARE, "text/cleaning"))
    main(["--root", str(tmp_path)])
    course(tmp_path, ("code", SQUARE.replace("x * x", "x ** 2"), "text/cleaning"))
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "+    return x**2" in capsys.readouterr().out


def test_what_no_notebook_promotes_any_more_is_named_and_removed(tmp_path, capsys):
    course(tmp_path, ("code", SQUARE, "text/cleaning"))
    main(["--root", str(tmp_path)])
    course(tmp_path, ("code", SQUARE, "text/tidying"))
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "no notebook promotes shared/text/cleaning.py" in capsys.readouterr().out
    assert main(["--root", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "shared" / "text").iterdir()] == ["tidying.py"]


def test_names_promoted_to_another_module_are_imported_from_there(tmp_path):
    course(
        tmp_path,
        ("code", SQUARE, "text/cleaning"),
        ("code", "def fourth(x):\n    return square(square(x))", "text/tokenizer"),
    )
    assert "from shared.text.cleaning import square\n" in collect(tmp_path)["text/tokenizer"]


def test_imports_of_the_module_from_itself_are_dropped(tmp_path):
    course(tmp_path, ("code", SQUARE, "text/cleaning"))
    course(
        tmp_path,
        ("code", "from shared.text.cleaning import square", None),
        ("code", "def fourth(x):\n    return square(square(x))", "text/cleaning"),
        name="03_more.ipynb",
    )
    assert "from shared" not in collect(tmp_path)["text/cleaning"]


def test_local_names_attributes_and_builtins_need_no_import(tmp_path):
    source = "def f(rows):\n    total = sum(row.size for row in rows)\n    return [total for _ in range(3)]"
    course(tmp_path, ("code", source, "text/cleaning"))
    assert "import" not in collect(tmp_path)["text/cleaning"].split('"""')[2]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            [("code", SQUARE, "nonsense")],
            "unknown module 'nonsense'; write room/module, rooms are text, model, ",
        ),
        ([("code", SQUARE, "data/download")], "unknown module 'data/download'"),
        ([("code", SQUARE, "text/../gpt")], "unknown module 'text/../gpt'"),
        (
            [("code", SQUARE, "text/cleaning"), ("code", SQUARE, "text/cleaning")],
            "code cell 2: 'square' is already promoted by",
        ),
        ([("code", "def broken(:", "text/cleaning")], "code cell 1: does not parse"),
        (
            [("code", "def f():\n    return torch.ones(1)", "text/cleaning")],
            "uses 'torch', which module 'text/cleaning'",
        ),
        ([("code", SQUARE + "\nprint(square(2))", "text/cleaning")], "neither a definition nor an import"),
    ],
)
def test_errors_name_the_notebook_and_the_cell(tmp_path, capsys, cells, message):
    course(tmp_path, *cells)
    with pytest.raises(PromotionError) as error:
        collect(tmp_path)
    assert message in str(error.value)
    assert "ch02_text_data/02_topic.ipynb" in str(error.value)
    assert main(["--root", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_cell_with_two_modules_is_refused(tmp_path):
    cell = new_code_cell(SQUARE)
    cell.metadata["tags"] = ["promote:text/cleaning", "promote:text/tokenizer"]
    (tmp_path / "ch02_text_data").mkdir()
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "ch02_text_data" / "01_a.ipynb")
    with pytest.raises(PromotionError, match="one cell belongs to one module"):
        collect(tmp_path)


def interpreter(version: str) -> str | None:
    """Return a Python of this version: this one, one of the path, or one of pyenv's."""
    candidates = [shutil.which(f"python{version}"), shutil.which(f"python{version}.exe")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += [str(path) for path in sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    for candidate in [sys.executable, *filter(None, candidates)]:
        show = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(show, capture_output=True, text=True)
        if done.stdout.strip() == version:  # pyenv's shims stand on the path without a version behind them
            return candidate
    return None


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_python_promotes_the_same_and_needs_no_packages_for_it(version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} is installed here")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ruff is
    command = [python, "-S", "-m", "tests.tools.promote", "--check"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree with their notebooks" in done.stdout


def test_variables_of_comprehensions_are_no_global_names(tmp_path):
    source = (
        "def total(rows):\n    pairs = {row: [x for x in row if x] for row in rows}\n"
        "    return sum(y for values in pairs.values() for y in values), lambda z: z"
    )
    course(tmp_path, ("code", source, "text/cleaning"))
    assert "import" not in collect(tmp_path)["text/cleaning"].split('"""')[2]
