"""Write the promoted rooms of `shared/` from the notebooks: their cells are the source.

    python -m tests.tools.promote            write what differs, remove what no notebook promotes
    python -m tests.tools.promote --check    write nothing, print the differences, exit 1 when there are any

A code cell whose first line is the comment `# shared/<room>/<module>.py` goes there, without that line. It holds
finished definitions: functions, classes, constants. `class X(X):  # continued` goes on with a class of an earlier cell;
the module holds one class (`tests/tools/classes.py`). A markdown cell whose first line is the heading
`### `shared/<room>/<module>.py``, below "What this chapter puts into `shared/`", describes the module and becomes its
docstring. Imports are looked up by name among all import statements of the notebook; names that it promotes to another
module are imported from there. Several notebooks may promote into one module: chapter order is the order of the
definitions.
"""

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from tests.tools.architecture import PROMOTED_ROOMS, ROOT, modules, notebooks
from tests.tools.classes import ContinuationError, join_classes

MARK = re.compile(r"#\s*shared/(\S+?)\.py\s*(?:\n|$)")  # the first line of a promoted code cell
ALMOST = re.compile(r"#\s*(?:file:|promote:?)?\s*shared/\S*", re.I)
DESCRIPTION = re.compile(r"#{2,6}\s+`?shared/(\S+?)\.py`?\s*(?:\n|$)")  # that of a module's description
SECTION = "What this chapter puts into `shared/`"
MODULE = re.compile(rf"({'|'.join(PROMOTED_ROOMS)})/[a-z][a-z0-9_]*")
LINE_LENGTH = 110
GAP = "\n\n\n"  # between two definitions


class PromotionError(Exception):
    """A notebook cannot be promoted; the message is one line with the notebook, the cell and the remedy."""


@dataclass
class Cell:
    """A promoted code cell: where it stands, its definitions, and the imports of its notebook."""

    place: str
    notebook: str
    body: str
    available: dict[str, str]  # name -> import statement that binds it, anywhere in the notebook
    promoted_here: dict[str, str]  # name -> module that the same notebook promotes it to


@dataclass
class Module:
    """What the notebooks promote to one module, in chapter order."""

    descriptions: list[str] = field(default_factory=list)
    notebooks: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)

    def body(self) -> str:
        """Return all definitions, two blank lines between cells."""
        return GAP.join(cell.body for cell in self.cells)

    def cell_at(self, line: int) -> Cell:
        """Return the cell that a line of `body`, counted from 1, comes from."""
        end = 0
        for cell in self.cells:
            end += (cell.body + GAP).count("\n")
            if line <= end:
                return cell
        return self.cells[-1]


def collect(root: Path = ROOT) -> dict[str, str]:
    """Return the source text of every promoted module below `root`, by name ("room/module").

    Raises:
        PromotionError: A mark names no module, a cell does not parse or holds something other than definitions, a name
            is defined twice, a class cannot be continued, or a name is used that nothing imports or promotes.
    """
    found: dict[str, Module] = {}
    for path in notebooks(root):
        _collect_notebook(path, path.relative_to(root).as_posix(), found)
    bodies = {name: _joined(module) for name, module in found.items()}
    # Names are looked up in the cells as they stand: there a line tells its cell.
    for name, line, used in _unbound_names({name: module.body() for name, module in found.items()}):
        module, cell = found[name], found[name].cell_at(line)
        if used in cell.available:
            statement = cell.available[used]
        elif used in cell.promoted_here:
            statement = f"from {dotted(cell.promoted_here[used])} import {used}"
        else:
            raise PromotionError(
                f"{cell.place}: uses {used!r}, which module {name!r} would not have; "
                "import it in the notebook, or promote its definition too"
            )
        if not statement.startswith(f"from {dotted(name)} import "):
            module.imports.add(statement)
    return _tidied({name: _render(name, module, bodies[name]) for name, module in found.items()})


def dotted(module: str) -> str:
    """Return how a module, "room/module", is imported."""
    return f"shared.{module.replace('/', '.')}"


def _collect_notebook(path: Path, label: str, found: dict[str, Module]) -> None:
    """Add the promoted cells of one notebook to `found`."""
    available: dict[str, str] = {}
    promoted_here: dict[str, str] = {}
    code_position, in_section = 0, False

    def module_of(name: str, place: str) -> Module:
        if not MODULE.fullmatch(name):
            rooms = ", ".join(PROMOTED_ROOMS)
            raise PromotionError(f"{place}: unknown module {name!r}; write room/module, rooms are {rooms}")
        module = found.setdefault(name, Module())
        if label not in module.notebooks:
            module.notebooks.append(label)
        return module

    for position, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # A description counts below its heading only, so that prose may speak of files.
            if re.match(r"#+ ", source):
                in_section = source.split("\n")[0].lstrip("# ") == SECTION or (
                    in_section and bool(DESCRIPTION.match(source))
                )
            if in_section and (mark := DESCRIPTION.match(source)):
                module = module_of(mark[1], f"{label}, cell {position}")
                module.descriptions.append(source[mark.end() :].strip())
            continue
        if cell["cell_type"] != "code":
            continue
        code_position += 1
        place = f"{label}, code cell {code_position}"
        mark = MARK.match(source)
        if mark is None and ALMOST.match(source):
            line = source.split("\n")[0]
            raise PromotionError(
                f"{place}: {line!r} is no mark; write '# shared/room/module.py' alone on the line"
            )
        # Imports count wherever they stand; definitions only where they are promoted.
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            if mark:
                raise PromotionError(
                    f"{place}: does not parse: {error.msg} (line {error.lineno}); mend the cell"
                ) from error
            continue  # a plain cell may hold a magic command
        available.update(_bindings(tree))
        if mark:
            module = module_of(mark[1], place)
            body, defined = _definitions(place, source, tree)
            promoted_here.update(dict.fromkeys(defined, mark[1]))
            module.cells.append(Cell(place, label, body, available, promoted_here))


def _bindings(tree: ast.Module) -> dict[str, str]:
    """Return the names bound by the import statements of a cell, each with a statement that binds it alone."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                rename = f" as {alias.asname}" if alias.asname else ""
                if isinstance(node, ast.Import):
                    bound, statement = alias.name.split(".")[0], f"import {alias.name}{rename}"
                else:
                    bound, statement = alias.name, f"from {node.module} import {alias.name}{rename}"
                found[alias.asname or bound] = statement
    return found


def _definitions(place: str, source: str, tree: ast.Module) -> tuple[str, list[str]]:
    """Return the text of a promoted cell without its mark and its imports, and the names that it defines."""
    lines = source.split("\n")
    lines[0] = ""
    defined: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined += [
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            ]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
        else:
            raise PromotionError(
                f"{place}: line {node.lineno} is neither a definition nor an import; move it to a cell of its own, a "
                "promoted cell holds finished definitions only"
            )
    return "\n".join(lines).strip(), defined


def _unbound_names(bodies: dict[str, str]) -> list[tuple[str, int, str]]:
    """Return (module, line, name) for each name that a module's text uses and does not bind, as ruff finds them.

    Python's own symbol tables differ between versions (since 3.12 comprehensions have none); ruff's do not.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name).resolve())
        _write_all(bodies, folder)
        options = ["--isolated", "--no-cache", "--ignore-noqa", "--target-version", "py311", "--exit-zero"]
        found = json.loads(_ruff("check", "--select", "F821", "--output-format", "json", *options, folder))
    unbound = []
    for entry in found:
        module = Path(entry["filename"]).relative_to(folder).with_suffix("").as_posix()
        name = re.search("`(.+)`", entry["message"])
        if entry["code"] != "F821" or name is None:
            raise PromotionError(f"module {module!r}, line {entry['location']['row']}: {entry['message']}")
        unbound.append((module, entry["location"]["row"], name[1]))
    return unbound


def _tidied(texts: dict[str, str]) -> dict[str, str]:
    """Return module texts with sorted imports, formatted."""
    with tempfile.TemporaryDirectory() as folder:
        _write_all(texts, folder)
        config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--quiet"]
        _ruff("check", "--select", "I", "--fix-only", *config, folder)
        _ruff("format", *config, folder)
        return {name: Path(folder, f"{name}.py").read_text(encoding="utf-8") for name in texts}


def _write_all(texts: dict[str, str], folder: str) -> None:
    for name, text in texts.items():
        path = Path(folder, f"{name}.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def _ruff(command: str, *arguments: str) -> str:
    """Run ruff, this Python's own or that of the path, and return what it prints."""
    program = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if program is None:
        raise PromotionError('ruff is not installed: python -m pip install -e ".[test]" -c constraints.txt')
    done = subprocess.run([program, command, *arguments], capture_output=True, encoding="utf-8", cwd=ROOT)
    if done.returncode:
        raise PromotionError(f"ruff {command} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _joined(module: Module) -> str:
    """Return the definitions of a module, each class in one piece."""
    try:
        return join_classes([(cell.place, cell.notebook, cell.body) for cell in module.cells])
    except ContinuationError as error:
        raise PromotionError(str(error)) from error


def _render(name: str, module: Module, body: str) -> str:
    """Return the text of a module: description, imports, definitions; neither sorted nor formatted."""
    source = (
        f"Explained and proven in {' and '.join(module.notebooks)}; written from there by `make promote`."
    )
    prose = "\n\n".join(_wrap(text) for text in module.descriptions)
    docstring = f"{prose}\n\n{textwrap.fill(source, LINE_LENGTH)}\n" if prose else source
    if '"""' in docstring:
        raise PromotionError(
            f"{module.notebooks[0]}: the description of {name} has three double quotes; take others"
        )
    prefix = "r" if "\\" in docstring else ""
    imports = "\n".join(sorted(module.imports))
    return f'{prefix}"""{docstring}"""\n\n{imports}\n\n{body}\n'


def _wrap(markdown: str) -> str:
    """Wrap plain paragraphs to the line length; lists, tables and indented blocks stay as they are."""
    paragraphs = []
    for paragraph in markdown.split("\n\n"):
        is_plain = not any(line.startswith(("-", "|", " ", "*", "1.")) for line in paragraph.split("\n"))
        joined = " ".join(paragraph.split())
        # The first line shares its row with the opening quotes.
        width = LINE_LENGTH - 4
        paragraphs.append(textwrap.fill(joined, width, break_on_hyphens=False) if is_plain else paragraph)
    return "\n\n".join(paragraphs)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write shared/ from the promoted notebook cells.")
    parser.add_argument(
        "--check", action="store_true", help="only print what differs; exit 1 if anything does"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (for tests)")
    options = parser.parse_args(arguments)
    try:
        wanted = collect(options.root)
    except PromotionError as error:
        print(f"promote: {error}", file=sys.stderr)
        return 1
    shared = options.root / "shared"
    # A module whose cells were renamed or removed leaves nothing behind.
    stale = [p for room in PROMOTED_ROOMS for p in modules(room, options.root)]
    stale = [p for p in stale if p.relative_to(shared).with_suffix("").as_posix() not in wanted]
    differing = len(stale)
    for path in stale:
        name = path.relative_to(shared).as_posix()
        print(f"{'no notebook promotes' if options.check else 'removed'} shared/{name}")
        if not options.check:
            path.unlink()
    # What differs is shown or written, each file whole or not at all.
    for name, text in wanted.items():
        path = shared / f"{name}.py"
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present == text:
            continue
        differing += 1
        if options.check:
            before, after = present.splitlines(True), text.splitlines(True)
            sys.stdout.writelines(difflib.unified_diff(before, after, f"shared/{name}.py", "the notebooks"))
        else:
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, path)
            print(f"wrote shared/{name}.py")
    if options.check and differing:
        print(f"promote: {differing} modules differ from their notebooks; run 'make promote'")
        return 1
    if not differing:
        print(f"promote: {len(wanted)} modules agree with their notebooks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
