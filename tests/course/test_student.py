"""`make student`: solutions go, checks stay, nothing that somebody made is lost, and the copy works."""

import ast
import json
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.tools.architecture import ROOT, notebooks
from tests.tools.promote import MARK, collect
from tests.tools.student import MANIFEST, check_of, main, without_solutions, write_copy

DEFINED = """def double(x):
    return 2 * x

# Twice is more.
for n in range(3):
    assert double(n) == n + n  # by adding
print("all doubled")"""


@pytest.mark.parametrize(
    ("solution", "check", "names"),
    [
        # Definitions, then their tests: all that follows the last definition, without the remarks between.
        (
            DEFINED,
            'for n in range(3):\n    assert double(n) == n + n  # by adding\nprint("all doubled")',
            ["double"],
        ),
        # Assertions at the end; what is printed between them goes.
        ("a = f(3)\nprint(a)\nassert a > 2\nprint('so')", "assert a > 2", ["a"]),
        (
            "a, b = f(3)\nassert a > 2\ncompare('two', b, a)\na",
            "assert a > 2\ncompare('two', b, a)",
            ["a", "b"],
        ),
        # A check in the middle may no longer hold at the end.
        ("a = 1\nassert a == 1\na += 1\nprint(a)", "", []),
        # An assertion about nothing that was found, and a comparison that computes the answer.
        ("print(50257 / 144)\nassert round(50257 / 144) == 349", "", []),
        ("p = f()\ncompare('gradient', p.T @ d, v.grad)", "", []),
        # The check's own names are not asked for.
        (
            "k = [1]\nassert all(x in k for x in range(1, 2))",
            "assert all(x in k for x in range(1, 2))",
            ["k"],
        ),
        ("print('nothing to check')", "", []),
        ("%timeit f()\nassert a", "", []),
    ],
)
def test_what_stays_of_a_solution(solution, check, names):
    assert check_of(solution) == (check, names)


def solved(source: str, text: str = "", tags: tuple[str, ...] = ("solution",)):
    outputs = [new_output("stream", name="stdout", text=text)] if text else []
    metadata = {"tags": list(tags), "jupyter": {"source_hidden": True}}
    return new_code_cell(source, metadata=metadata, outputs=outputs, execution_count=1)


def test_a_notebook_without_its_solutions():
    notebook = new_notebook(
        cells=[
            new_code_cell("x = 3", execution_count=1),
            new_markdown_cell("## Exercises\n\n**1.** Square x."),
            solved("square = x * x\nassert square == 9"),
            new_markdown_cell("**Solution 2.** It is even, as everybody sees."),
            solved("print(`what`)", "a fence: ```\n", ("solution", "needs-smollm2")),
            new_markdown_cell("<details><summary>Answer</summary>\n\nStays.\n</details>"),
        ]
    )
    counts = without_solutions(notebook)
    nbformat.validate(notebook)
    assert (counts.total, counts.checked) == (2, 1)
    first, task, mine, check, spoken, other, expected, answer = notebook.cells
    assert first.execution_count == 1 and task.source.endswith("Square x.") and "Stays." in answer.source
    assert "".join(mine["source"]) == "# Your solution\nsquare = ..." and mine["outputs"] == []
    assert "".join(check["source"]) == "# Check\nassert square == 9"
    assert check["metadata"]["tags"] == ["check", "raises-exception"]
    assert "".join(spoken["source"]) == "**Solution 2.**"
    assert other["metadata"]["tags"] == ["exercise", "needs-smollm2"]
    assert "\n````\na fence: ```\n````\n" in "".join(expected["source"])


def test_a_check_fails_until_the_exercise_is_solved(tmp_path):
    notebook = new_notebook(
        cells=[new_code_cell("total = 3"), solved("total = 1 + 1\nassert total == 2"), new_code_cell("1")]
    )
    without_solutions(notebook)
    path = tmp_path / "trial.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3").execute()  # goes on behind the failing check
    kinds = [[output.output_type for output in cell.outputs] for cell in notebook.cells]
    assert kinds == [[], [], ["error"], ["execute_result"]]
    notebook.cells[1].source = "total = sum([1, 1])"
    NotebookClient(notebook, kernel_name="python3").execute()
    assert notebook.cells[2].outputs == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("students") / "course"
    return out, write_copy(ROOT, out)


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def tags_of(cell):
    return cell["metadata"].get("tags", [])


def test_the_copy_is_the_course_without_solutions(copy):
    out, counts = copy
    assert not any("solution" in tags_of(cell) for name in counts for cell in cells_of(out / name))
    for name, exercises in counts.items():
        assert exercises.total == sum("solution" in tags_of(cell) for cell in cells_of(ROOT / name))
        assert exercises.checked == sum("check" in tags_of(cell) for cell in cells_of(out / name))
        # Everything that is no solution is as it was.
        others = [cell for cell in cells_of(ROOT / name) if "solution" not in tags_of(cell)]
        kept = [cell for cell in cells_of(out / name) if not {"exercise", "check"} & {*tags_of(cell)}]
        kept = [cell for cell in kept if not cell["id"].endswith("-expected")]
        spoken = [(a, b) for a, b in zip(others, kept, strict=True) if a != b]
        assert all(b["source"] == ["".join(a["source"])[: len("**Solution 1.**")]] for a, b in spoken)
    assert counts.keys() >= {path.relative_to(ROOT).as_posix() for path in notebooks()}
    assert (out / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


def test_no_check_says_more_than_its_solution_did(copy):
    out, counts = copy
    for name in counts:
        solutions = {cell["id"]: "".join(cell["source"]) for cell in cells_of(ROOT / name)}
        for cell in cells_of(out / name):
            if "check" in tags_of(cell):
                whole = ast.dump(ast.parse(solutions[cell["id"].removesuffix("-check")]))
                assert all(ast.dump(part) in whole for part in ast.parse("".join(cell["source"])).body)


def test_no_lesson_needs_what_a_solution_binds(copy):
    """Else the copy would break behind an exercise that nobody solved."""
    out, counts = copy
    for name in counts:
        open_names: set[str] = set()
        for cell in cells_of(out / name):
            if cell["cell_type"] != "code":
                continue
            source = "".join(cell["source"])
            lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
            names = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Name)]
            stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            if "exercise" in tags_of(cell):
                open_names |= stored
            elif "check" not in tags_of(cell) and not MARK.match(source):
                used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
                assert not open_names & (used - stored), (name, cell["id"])
                open_names -= stored


def test_promotion_agrees_in_the_copy(copy):
    assert collect(copy[0]) == collect(ROOT)


def small_course(folder):
    (folder / "ch01_intro").mkdir(parents=True)
    (folder / "README.md").write_text("read me\n", encoding="utf-8")
    nbformat.write(new_notebook(cells=[solved("a = 1\nassert a")]), folder / "ch01_intro" / "01_a.ipynb")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "untracked.txt").write_text("mine\n", encoding="utf-8")
    return folder


def test_a_copy_is_made_again_but_never_over_work(tmp_path, capsys):
    root, out = small_course(tmp_path / "course"), tmp_path / "deep" / "students"
    assert main(["--root", str(root), "--out", str(out)]) == 0
    assert "1 notebooks, 1 exercises, 1 with a check" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "README.md", "ch01_intro"]
    # Made again: what changed in the course is there, what running left behind does not stand in the way.
    (root / "README.md").write_text("read me again\n", encoding="utf-8")
    for name in (".git", "ch01_intro/__pycache__", "build"):
        (out / name).mkdir()
        (out / name / "something").write_text("kept?", encoding="utf-8")
    assert main(["--root", str(root), "--out", str(out)]) == 0
    assert (out / "README.md").read_text(encoding="utf-8") == "read me again\n"
    assert (out / ".git" / "something").exists() and not (out / "build").exists()
    # Changed, added, removed: each is somebody's work.
    for spoil in (
        lambda: (out / "README.md").write_text("mine\n", encoding="utf-8"),
        lambda: (out / "notes.txt").write_text("mine\n", encoding="utf-8"),
        lambda: (out / "README.md").unlink(),
    ):
        shutil.rmtree(out)
        write_copy(root, out)
        spoil()
        before = sorted(out.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            main(["--root", str(root), "--out", str(out)])
        assert stopped.value.code == 2 and "1 of its files differ" in capsys.readouterr().err
        assert sorted(out.rglob("*")) == before


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    root, out = small_course(tmp_path / "course"), tmp_path / "mine"
    out.mkdir()
    write_copy(root, out)  # empty: allowed
    (out / MANIFEST).unlink()
    for folder in (out, root, out / "README.md"):
        with pytest.raises(ValueError, match="must be new, empty, or an earlier copy") as refused:
            write_copy(root, folder)
        assert str(folder) in str(refused.value)
    with pytest.raises(ValueError, match="must be a clone made with git"):
        write_copy(tmp_path / "mine", tmp_path / "other")


def test_a_copy_appears_whole_or_not_at_all(tmp_path):
    root, out = small_course(tmp_path / "course"), tmp_path / "students"
    (root / "ch01_intro" / "01_a.ipynb").write_text("no notebook", encoding="utf-8")
    with pytest.raises(ValueError):
        write_copy(root, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["course"]


@pytest.mark.posix
def test_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "tests.tools.student", "--out", str(tmp_path / "copy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "with a check" in done.stdout.splitlines()[-1]
    promoted = [sys.executable, "-m", "tests.tools.promote", "--check"]
    assert subprocess.run(promoted, cwd=tmp_path / "copy", capture_output=True).returncode == 0
