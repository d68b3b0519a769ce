"""Write a copy of the course without its solutions, for students: `make student`, `make student OUT=../for-students`.

    python -m tests.tools.student                   writes build/student
    python -m tests.tools.student --out FOLDER      writes there

The copy holds every file that git tracks, as it lies in the working tree. In its notebooks a cell tagged `solution`
becomes the line `# Your solution`, without its output. What checks the solution stays, in a cell of its own with the
tag `check`, and each name that it needs is bound to `...` where the solution was:

- Where a solution defines functions or classes and then tests them, the tests are the check.
- Otherwise the assertions and comparisons at its end are, as far as they use what the solution found. A comparison that
  computes the answer in its own arguments is left out.

Such a check fails until the solution is there; the tag `raises-exception` lets the rest of the notebook run. Where
nothing is checked, the solution's output stays, folded, as what to expect. Everything else is untouched: questions with
folded answers, promoted modules, stored outputs of all other cells.

A folder that something else made, or in which somebody worked, is never overwritten; `.git` and `.venv` in an earlier
copy are kept. The copy appears whole or not at all.

Left out: grading. A solved check cell has no error in its output.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tests.tools.architecture import ROOT

MANIFEST = ".student-copy.json"  # what was written, by SHA-256; marks a folder as a copy
KEPT = (".git", ".venv")  # of an earlier copy
# What running the course leaves behind, besides.
LEFT_BEHIND = re.compile(
    r"\.git|\.venv|\.student-copy\.json|build|__pycache__|\.ipynb_checkpoints|\.ruff_cache|\.hypothesis|.*\.egg-info"
)
SPOKEN = re.compile(r"(\*\*Solution \d+\.\*\*)")  # the beginning of a cell that explains a solution in words


@dataclass(frozen=True)
class Exercises:
    """How many exercises a notebook has, and how many of them keep a check."""

    total: int
    checked: int


def check_of(solution: str) -> tuple[str, list[str]]:
    """Return the part of a solution that checks it, or "", and the names that the check takes from the rest."""
    try:
        statements = ast.parse(solution).body
    except SyntaxError:  # a magic command
        return "", []
    definitions = [
        place for place, node in enumerate(statements) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    if definitions and any(map(_tests, statements[definitions[-1] + 1 :])):
        start = definitions[-1] + 1
        kept = statements[start:]
    else:
        # The end of the solution, as far back as it only asserts, compares and shows.
        start = len(statements)
        while start and (
            isinstance(statements[start - 1], ast.Assert)
            or _calls(statements[start - 1], "compare")
            or _calls(statements[start - 1], "print")
            or (start == len(statements) and isinstance(statements[start - 1], ast.Expr))
        ):
            start -= 1
        found = _bound(statements[:start])
        kept = [
            node
            for node in statements[start:]
            if _tests(node) and found & set(_loaded(node)) and not _answers(node)
        ]
    # Names that the check binds itself are not the student's to find.
    own = {name for node in kept for name in _stored(node)}
    found = _bound(statements[:start]) - own
    names = list(dict.fromkeys(name for node in kept for name in _loaded(node) if name in found))
    if not names:
        return "", []
    lines = solution.splitlines()
    return "\n".join("\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in kept), names


def _tests(statement: ast.stmt) -> bool:
    """Return whether a statement asserts or compares, itself or inside."""
    return any(isinstance(node, ast.Assert) or _calls(node, "compare") for node in ast.walk(statement))


def _calls(node: ast.AST, name: str) -> bool:
    node = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _answers(statement: ast.stmt) -> bool:
    """Return whether a comparison computes what it compares, so that it would give the solution away."""
    if not (_calls(statement, "compare") and isinstance(statement, ast.Expr)):
        return False
    return isinstance(statement.value, ast.Call) and any(
        isinstance(node, ast.BinOp) for node in ast.walk(statement.value.args[1])
    )


def _loaded(statement: ast.stmt) -> list[str]:
    """Return the names that a statement reads, in order."""
    names = [
        node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    ]
    return [node.id for node in sorted(names, key=lambda node: (node.lineno, node.col_offset))]


def _stored(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds anywhere, arguments of lambdas and comprehensions included."""
    names = {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return names | {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}


def _bound(statements: list[ast.stmt]) -> set[str]:
    """Return the names that statements bind for the cells after them: not those inside functions or comprehensions."""
    names: set[str] = set()
    inner = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    stack: list[ast.AST] = list(statements)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.split(".")[0])
        elif not isinstance(node, inner):
            stack += ast.iter_child_nodes(node)
    return names


def without_solutions(notebook: dict) -> Exercises:
    """Take the solutions out of a notebook (parsed JSON, changed in place) and count its exercises."""
    cells: list[dict] = []
    total = checked = 0
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "solution" not in tags:
            cells.append(cell)
            continue
        total += 1
        # What explains the solution in words goes with it.
        if cells and cells[-1]["cell_type"] == "markdown":
            heading = SPOKEN.match("".join(cells[-1]["source"]))
            if heading:
                cells[-1] = cells[-1] | {"source": [heading[1]]}
        check, names = check_of("".join(cell["source"]))
        others = [tag for tag in tags if tag != "solution"]
        # A name that an earlier cell has bound would let the check pass before anything was solved.
        text = "\n".join(["# Your solution", *(f"{name} = ..." for name in names)])
        cells.append(_code_cell(cell["id"], text, ["exercise", *others]))
        if check:
            checked += 1
            tagged = ["check", "raises-exception", *others]
            cells.append(_code_cell(f"{cell['id']}-check", f"# Check\n{check}", tagged))
        elif expected := _shown(cell["outputs"]):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", expected)), default=0))
            text = (
                f"<details><summary>Expected output</summary>\n\n{fence}\n{expected}\n{fence}\n\n</details>"
            )
            cells.append(
                {
                    "cell_type": "markdown",
                    "id": f"{cell['id']}-expected",
                    "metadata": {},
                    "source": text.splitlines(keepends=True),
                }
            )
    notebook["cells"] = cells
    return Exercises(total, checked)


def _code_cell(name: str, text: str, tags: list[str]) -> dict:
    """Return a code cell that has not been run, in the order of keys in which notebooks are stored."""
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": name,
        "metadata": {"tags": tags},
        "outputs": [],
        "source": text.splitlines(keepends=True),
    }


def _shown(outputs: list[dict]) -> str:
    """Return the text of stored outputs."""
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    return "\n".join("".join(text).strip("\n") for text in texts if text)


def tracked(root: Path) -> list[str]:
    """Return the files that git tracks below `root` and that are there, with "/" between folders.

    Raises:
        ValueError: `root` is not a working tree, or there is no git.
    """
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"the course must be a clone made with git, got {root}") from None
    names = listed.stdout.decode("utf-8").split("\0")
    return [name for name in names if name and (root / name).is_file()]


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def check_replaceable(out: Path) -> None:
    """Check that `out` is absent, empty, or a copy made by this tool in which nobody has worked.

    Raises:
        ValueError: It holds something else; the message names it.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        written = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"the folder must be new, empty, or an earlier copy, got {out}") from None
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    present = [
        path.as_posix() for path in files if not any(LEFT_BEHIND.fullmatch(part) for part in path.parts)
    ]
    now = _digests(out, present)
    if changed := sorted(name for name in {*now, *written} if now.get(name) != written.get(name)):
        raise ValueError(
            f"{out} must be as it was written, but {len(changed)} of its files differ, first {changed[0]}; "
            "move it away or choose another folder"
        )


def write_copy(root: Path, out: Path) -> dict[str, Exercises]:
    """Write the copy of `root` to `out` and return the exercises of each notebook, by its path.

    Raises:
        ValueError: `root` is not a clone, or `out` holds what must not be overwritten.
    """
    check_replaceable(out)
    names = tracked(root)
    counts: dict[str, Exercises] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written beside the folder first; two renames make it appear.
    with tempfile.TemporaryDirectory(prefix=".student-", dir=out.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        for name in names:
            target = new / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target)
            if PurePosixPath(name).suffix == ".ipynb":
                notebook = json.loads(target.read_text(encoding="utf-8"))
                counts[name] = without_solutions(notebook)
                text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
                target.write_text(text, encoding="utf-8", newline="\n")
        manifest = json.dumps(_digests(new, names), indent=1) + "\n"
        (new / MANIFEST).write_text(manifest, encoding="utf-8", newline="\n")
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)
        for kept in KEPT:
            if (old / kept).exists():
                os.replace(old / kept, out / kept)
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="student", description="Write a copy of the course without solutions."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "student", help="default: build/student")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (for tests)")
    options = parser.parse_args(arguments)
    try:
        counts = write_copy(options.root, options.out.absolute())
    except ValueError as error:
        parser.error(str(error))
    for name, exercises in counts.items():
        print(f"{name:55} {exercises.total} exercises, {exercises.checked} with a check")
    total, checked = sum(e.total for e in counts.values()), sum(e.checked for e in counts.values())
    print(f"{options.out}: {len(counts)} notebooks, {total} exercises, {checked} with a check")
    return 0


if __name__ == "__main__":
    sys.exit(main())
