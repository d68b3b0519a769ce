"""Write the modules of `shared/` from the notebook cells tagged `promote:<module>`.

    python tests/promote.py            write every module that differs from its notebooks
    python tests/promote.py --check    write nothing, print the differences, exit 1 when there are any

A tagged code cell holds finished definitions (functions, classes, constants); a tagged markdown cell holds the
module's docstring. The imports that the definitions need are looked up by name among the notebook's own import
statements, and names that the notebook promotes to another module become imports from that module. Several
notebooks may promote into one module: chapter order is the order of the definitions.
"""

import argparse
import ast
import builtins
import difflib
import os
import subprocess
import symtable
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.architecture import HAND_WRITTEN, MODULES, ROOT, notebooks

TAG = "promote:"
LINE_LENGTH = 110


class PromotionError(Exception):
    """A notebook cannot be promoted; the message names the notebook and the cell."""


@dataclass
class Module:
    """What the notebooks promote to one module, in chapter order."""

    prose: list[str] = field(default_factory=list)
    notebooks: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    defined: dict[str, str] = field(default_factory=dict)  # name -> where it is defined
    imports: set[str] = field(default_factory=set)


@dataclass
class Cell:
    """A promoted code cell: where it stands, its definitions, and the global names they use."""

    place: str
    module: str
    body: str
    defined: list[str]
    used: set[str]


def collect(root: Path = ROOT) -> dict[str, str]:
    """Return the source text of every promoted module below `root`, by module name.

    Raises:
        PromotionError: A tag names an unknown module, a cell does not parse or holds something other than
            definitions, a name is defined twice, or a name is used that nothing imports or promotes.
    """
    modules: dict[str, Module] = {}
    for path in notebooks(root):
        _collect_notebook(path, path.relative_to(root).as_posix(), modules)
    return {name: _render(module) for name, module in modules.items()}


def _collect_notebook(path: Path, label: str, modules: dict[str, Module]) -> None:
    available: dict[str, str] = {}  # name -> import statement that binds it
    cells: list[Cell] = []
    code_position = 0
    for cell in nbformat.read(path, as_version=4).cells:
        tagged = [tag[len(TAG) :] for tag in cell.metadata.get("tags", []) if tag.startswith(TAG)]
        code_position += cell.cell_type == "code"
        place = f"{label}, code cell {code_position}" if cell.cell_type == "code" else f"{label}, prose"
        if len(tagged) > 1:
            raise PromotionError(
                f"{place}: promoted to {' and '.join(tagged)}; one cell belongs to one module"
            )
        if tagged and (tagged[0] not in MODULES or tagged[0] in HAND_WRITTEN):
            allowed = ", ".join(name for name in MODULES if name not in HAND_WRITTEN)
            raise PromotionError(f"{place}: unknown module {tagged[0]!r}; allowed are {allowed}")
        if tagged:
            module = modules.setdefault(tagged[0], Module())
            if label not in module.notebooks:
                module.notebooks.append(label)
        if cell.cell_type == "markdown" and tagged:
            modules[tagged[0]].prose.append(cell.source.strip())
        if cell.cell_type != "code":
            continue
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            if tagged:
                raise PromotionError(f"{place}: does not parse: {error.msg} (line {error.lineno})") from error
            continue  # a plain cell may hold a magic command
        available.update(_bindings(tree))
        if tagged:
            cells.append(_read_cell(place, tagged[0], cell.source, tree))
    promoted_here = {name: cell.module for cell in cells for name in cell.defined}
    for cell in cells:
        module = modules[cell.module]
        for name in cell.defined:
            if name in module.defined:
                raise PromotionError(f"{cell.place}: {name!r} is already promoted by {module.defined[name]}")
            module.defined[name] = cell.place
        module.bodies.append(cell.body)
    for cell in cells:
        module = modules[cell.module]
        for name in sorted(cell.used - module.defined.keys()):
            if name in available:
                statement = available[name]
            elif name in promoted_here:
                statement = f"from shared.{promoted_here[name]} import {name}"
            else:
                raise PromotionError(
                    f"{cell.place}: uses {name!r}, which module {cell.module!r} would not have; "
                    "import it in the notebook, or promote its definition too"
                )
            if not statement.startswith(f"from shared.{cell.module} import "):
                module.imports.add(statement)


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


def _read_cell(place: str, module: str, source: str, tree: ast.Module) -> Cell:
    lines = source.split("\n")
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
                f"{place}: line {node.lineno} is neither a definition nor an import; a promoted cell holds "
                "finished definitions only"
            )
    body = "\n".join(lines).strip()
    used = {
        name for name in _global_names(symtable.symtable(body, place, "exec")) if not hasattr(builtins, name)
    }
    return Cell(place, module, body, defined, used)


def _global_names(table: symtable.SymbolTable) -> set[str]:
    """Return the module-level names that a block and the blocks inside it read."""
    top = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return names.union(*(_global_names(child) for child in table.get_children()))


def _render(module: Module) -> str:
    prose = "\n\n".join(_wrap(text) for text in module.prose)
    source = f"Explained and proven in {' and '.join(module.notebooks)}."
    docstring = f"{prose}\n\n{textwrap.fill(source, LINE_LENGTH)}\n" if prose else source
    if '"""' in docstring:
        raise PromotionError(f"{module.notebooks[0]}: the docstring cell contains three double quotes")
    prefix = "r" if "\\" in docstring else ""
    body = "\n\n\n".join(module.bodies)
    imports = "\n".join(sorted(module.imports))
    text = f'{prefix}"""{docstring}"""\n\n{imports}\n\n{body}\n'
    return _ruff("format", _ruff("check", text, "--select", "I", "--fix-only"))


def _wrap(markdown: str) -> str:
    """Wrap plain paragraphs to the line length; lists, tables and indented blocks stay as they are."""
    paragraphs = []
    for paragraph in markdown.lstrip("# ").split("\n\n"):
        is_plain = not any(line.startswith(("-", "|", " ", "*", "1.")) for line in paragraph.split("\n"))
        joined = " ".join(paragraph.split())
        # The first line shares its row with the opening quotes.
        width = LINE_LENGTH - 4
        paragraphs.append(textwrap.fill(joined, width, break_on_hyphens=False) if is_plain else paragraph)
    return "\n\n".join(paragraphs)


def _ruff(command: str, text: str, *options: str) -> str:
    arguments = [sys.executable, "-m", "ruff", command, *options, "--quiet"]
    arguments += ["--config", str(ROOT / "pyproject.toml"), "--stdin-filename", "shared/module.py", "-"]
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    if done.returncode:
        raise PromotionError(f"ruff {command} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


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
    differing = 0
    for name, text in wanted.items():
        path = options.root / "shared" / f"{name}.py"
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present == text:
            continue
        differing += 1
        if options.check:
            before, after = present.splitlines(True), text.splitlines(True)
            sys.stdout.writelines(difflib.unified_diff(before, after, f"shared/{name}.py", "the notebooks"))
        else:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, path)
            print(f"wrote shared/{name}.py")
    if options.check and differing:
        print(
            f"promote: {differing} of {len(wanted)} modules differ from their notebooks; run 'make promote'"
        )
        return 1
    if not differing:
        print(f"promote: {len(wanted)} modules agree with their notebooks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
