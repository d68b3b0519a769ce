"""Promotion: the notebook is the source of `shared/`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.tools.architecture import ROOT
from tests.tools.promote import PromotionError, collect, main

DOCSTRING = "Squares of numbers.\n\nLeaves out: cubes."
SQUARE = 'def square(x: float) -> float:\n    """Return x times x."""\n    return x * x'


def course(root, *cells, name="02_topic.ipynb", chapter="ch02_text_data"):
    """Write a notebook with the given (kind, source, module) cells below `root`."""
    made = []
    for kind, source, module in cells:
        if kind == "code":
            made.append(new_code_cell(f"# shared/{module}.py\n{source}" if module else source))
        elif module:
            made.append(new_markdown_cell("## What this chapter puts into `shared/`"))
            made.append(new_markdown_cell(f"### `shared/{module}.py`\n\n{source}"))
        else:
            made.append(new_markdown_cell(source))
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


@pytest.mark.parametrize(
    "line",
    [
        "# shared/text/cleaning",
        "# Shared/text/cleaning.py",
        "#shared/text/cleaning.py: clean",
        "# file: shared/a/b.py",
    ],
)
def test_what_looks_like_a_mark_and_is_none_is_refused(tmp_path, line):
    course(tmp_path, ("code", f"{line}\n{SQUARE}", None))
    with pytest.raises(PromotionError, match=r"code cell 1: .* is no mark; write '# shared/room/module.py'"):
        collect(tmp_path)


def test_a_mark_counts_in_the_first_line_only_and_is_not_copied(tmp_path):
    course(
        tmp_path,
        ("code", f"x = 1\n# shared/text/cleaning.py\n{SQUARE}", None),
        ("code", f"\n{SQUARE}", "text/cleaning"),
    )
    module = collect(tmp_path)["text/cleaning"]
    assert "# shared" not in module and "x = 1" not in module


def test_a_description_counts_in_its_section_only(tmp_path):
    course(
        tmp_path,
        ("prose", "### `shared/text/cleaning.py`\n\nA file that we will fill.", None),
        ("code", SQUARE, "text/cleaning"),
        ("prose", "Squares.", "text/cleaning"),
        ("prose", "## Exercises", None),
        ("prose", "### `shared/text/cleaning.py`\n\nOpen it.", None),
    )
    assert collect(tmp_path)["text/cleaning"].startswith('"""Squares.\n\nExplained')


def test_imports_are_found_wherever_they_stand_and_come_out_sorted(tmp_path):
    course(
        tmp_path,
        ("code", "def tau():\n    return math.pi * np.float64(2)", "text/cleaning"),
        ("code", "import numpy as np", None),
        ("code", "if True:\n    import math", None),
    )
    assert "import math\n\nimport numpy as np\n" in collect(tmp_path)["text/cleaning"]


def test_other_kinds_of_cells_and_magic_commands_are_passed_over(tmp_path):
    course(tmp_path, ("code", "%matplotlib inline", None), ("code", SQUARE, "text/cleaning"))
    path = tmp_path / "ch02_text_data" / "02_topic.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_raw_cell("# shared/text/cleaning.py"))
    nbformat.write(notebook, path)
    assert "def square" in collect(tmp_path)["text/cleaning"]


def test_the_whole_course_is_promoted_in_seconds():
    started = time.perf_counter()
    assert len(collect()) > 20
    assert time.perf_counter() - started < 20  # 1 s on a quiet machine; 48 runs of ruff took longer


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


def test_every_module_of_the_course_is_described():
    start = '"""Explained and proven'  # what comes first where a notebook has no description
    assert [name for name, text in collect().items() if text.startswith(start)] == []
