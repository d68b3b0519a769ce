"""Join a class that grows over several cells, `class X(X):  # continued`, into one.

In the notebook each continuation is a subclass of the class so far, with its name. That equals the one joined class as
long as nothing depends on which of the two a definition stands in; whatever would, is refused here with the name of the
cell.
"""

import ast
import re
from dataclasses import dataclass

CONTINUED = re.compile(r"^class\s+(\w+)\s*\(\s*(\w+)\s*\)\s*:\s*#\s*continued\b")


SPECIAL_BASES = (
    "Enum",
    "IntEnum",
    "StrEnum",
    "Flag",
    "IntFlag",
    "NamedTuple",
    "Protocol",
    "TypedDict",
    "ABC",
)
SPECIAL_NAMES = ("__slots__", "__init_subclass__", "__new__")


class ContinuationError(Exception):
    """A class cannot be continued; the message names the cell and what to do."""


@dataclass
class _Grown:
    """A class as it grows: where it began, which lines it has, which names its body defines."""

    place: str
    notebook: str
    node: ast.ClassDef
    lines: list[str]
    defined: dict[str, str]  # name -> place


def join_classes(cells: list[tuple[str, str, str]]) -> str:
    """Return the definitions of a module's cells in order, each class in one piece where it began.

    Args:
        cells: (place for messages, notebook, source text without imports) of each cell.

    Raises:
        ContinuationError: A name is defined twice, or a continuation would not equal the joined class.
    """
    texts: list[
        list[list[str]]
    ] = []  # of each cell its pieces, of each piece its lines; a class grows in its piece
    grown: dict[str, _Grown] = {}
    taken: dict[str, str] = {}
    for place, notebook, source in cells:
        lines, rest, pieces = source.split("\n"), 0, []
        for node in ast.parse(source).body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            above, own = lines[rest:first], lines[first : node.end_lineno]
            rest = node.end_lineno
            # A continuation goes to the lines of its class, comments above it included.
            if isinstance(node, ast.ClassDef) and _continues(place, node, lines[node.lineno - 1], taken):
                _grow(place, notebook, node, grown.get(node.name))
                comments = [f"    {line}" for line in above if line.strip()]
                grown[node.name].lines.extend(["", *comments, *lines[node.lineno : node.end_lineno]])
                continue
            # Everything else stays where it is, under names of its own.
            for name in _names(node):
                if name in taken:
                    raise ContinuationError(
                        f"{place}: {name!r} is already promoted by {taken[name]}; take another name"
                    )
                taken[name] = place
            pieces.append(above + own)
            if isinstance(node, ast.ClassDef):
                defined = {name: place for part in node.body for name in _names(part)}
                grown[node.name] = _Grown(place, notebook, node, pieces[-1], defined)
        texts.append([*pieces, lines[rest:]])
    joined = ("\n".join("\n".join(piece) for piece in pieces if piece) for pieces in texts)
    return "\n\n\n".join(text.strip() for text in joined if text.strip())


def _continues(place: str, node: ast.ClassDef, header: str, taken: dict[str, str]) -> bool:
    """Return whether a class statement continues an earlier class; refuse what only looks like it."""
    if (form := CONTINUED.match(header)) and form[1] == form[2]:
        return True
    bases = [ast.unparse(base) for base in node.bases]
    if "# continued" in header or (node.name in taken and node.name in bases):
        raise ContinuationError(
            f"{place}: a continuation is written 'class {node.name}({node.name}):  # continued', with no other base"
        )
    return False


def _grow(place: str, notebook: str, node: ast.ClassDef, begun: _Grown | None) -> None:
    """Check a continuation against the class so far, and note the names it adds.

    Raises:
        ContinuationError: The two forms would not be equal.
    """
    name = node.name
    if begun is None:
        raise ContinuationError(
            f"{place}: continues {name!r}, which no cell before it promotes to this module"
        )
    if begun.notebook != notebook:
        raise ContinuationError(
            f"{place}: continues {name!r} of another notebook ({begun.place}); continue a class where it began"
        )
    if node.decorator_list:
        raise ContinuationError(
            f"{place}: a decorator on a continuation of {name!r} would act on it alone; remove it"
        )
    # What acts on the first piece alone, or on every subclass, cannot be joined. Of decorators only dataclass is known
    # to look at nothing that a continuation may add.
    decorators = [ast.unparse(d).split("(")[0].split(".")[-1] for d in begun.node.decorator_list]
    reasons = [f"is decorated by {d!r}" for d in decorators if d != "dataclass"]
    reasons += [f"has the class keyword {keyword.arg!r}" for keyword in begun.node.keywords]
    bases = [ast.unparse(base).split(".")[-1].split("[")[0] for base in begun.node.bases]
    reasons += [f"is a {base}" for base in bases if base in SPECIAL_BASES]
    reasons += [f"defines {special}" for special in SPECIAL_NAMES if special in begun.defined]
    if reasons:
        raise ContinuationError(f"{place}: {name!r} {reasons[0]} and cannot be continued; write it whole")
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if len(body) < len(node.body):
        raise ContinuationError(
            f"{place}: the docstring of {name!r} stands in its first cell; remove this one"
        )
    for part in body:
        for added in _names(part):
            if added in begun.defined:
                raise ContinuationError(
                    f"{place}: {name}.{added} is already defined by {begun.defined[added]}; a continuation only adds"
                )
            if decorators and (isinstance(part, ast.AnnAssign) or re.fullmatch("__.*__", added)):
                raise ContinuationError(
                    f"{place}: the dataclass {name!r} was made without {added!r}; put it into its first cell"
                )
            begun.defined[added] = place
        for inner in ast.walk(part):
            if isinstance(inner, ast.Name) and inner.id in ("super", "__class__"):
                raise ContinuationError(
                    f"{place}: line {inner.lineno} uses {inner.id} in a continuation, where it means the class so far; "
                    "put this method into the first cell"
                )


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a statement binds in its own scope."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        # A property's setter has the property's name on purpose.
        accessors = [
            d
            for d in node.decorator_list
            if isinstance(d, ast.Attribute) and ast.unparse(d.value) == node.name
        ]
        return [] if accessors else [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return []
