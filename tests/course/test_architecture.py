"""The rooms of `shared/`: which module may import which, who writes it, what its face lists, how long it may be."""

import ast
import re
from pathlib import Path

import pytest

from tests.tools.architecture import CHAPTERS, FIRST_MODULES, PROMOTED_ROOMS, ROOMS, ROOT, modules
from tests.tools.promote import collect

PRESENT = [path for room in ROOMS for path in modules(room)]
PRESENT += [path for name in FIRST_MODULES if (path := ROOT / "shared" / f"{name}.py").exists()]
FACES = [path for room in ROOMS if (path := ROOT / "shared" / room / "__init__.py").exists()]
WITHOUT_NAMES = ("pretraining", "serving")  # their imports are heavy


def name_of(path: Path) -> str:
    """Return "room.module" or, outside a room, "module"."""
    return ".".join(path.relative_to(ROOT / "shared").with_suffix("").parts)


def imported(source: str) -> set[str]:
    """Return what a source text imports of `shared`, such as "model.gpt"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(
                f"line {node.lineno}: relative import; write 'from shared.room.module import name'"
            )
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shared":
            inside = node.module.removeprefix("shared").removeprefix(".")
            # A room or the whole package gives modules by name.
            parts = [inside] if "." in inside or inside in FIRST_MODULES else []
            found |= set(parts or {f"{inside}.{alias.name}".removeprefix(".") for alias in node.names})
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("shared.") for a in node.names if a.name.startswith("shared.")}
    return found


def offences(imports: dict[str, set[str]]) -> list[str]:
    """Return one line for each import of a later room, of `notebook`, of a face, or that closes a cycle."""
    order = [*FIRST_MODULES, *ROOMS]
    found = []
    for name, targets in imports.items():
        room = name.split(".")[0]
        for target in sorted(targets):
            there = target.split(".")[0]
            if target not in imports:
                found.append(f"{name} imports {target}, which is no module")
            elif order.index(there) > order.index(room):
                found.append(f"{name} imports {target} from a later room")
            elif reaches(imports, target, name):
                found.append(f"{name} and {target} import each other")
    return found


def reaches(imports: dict[str, set[str]], start: str, goal: str) -> bool:
    """Return whether `start` imports `goal`, directly or through others."""
    seen, stack = set(), [start]
    while stack:
        name = stack.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            stack += imports.get(name, ())
    return False


def test_imports_run_one_way():
    assert offences({name_of(path): imported(path.read_text(encoding="utf-8")) for path in PRESENT}) == []


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ({"model.gpt": {"data.corpus"}, "data.corpus": set()}, 0),
        ({"data.corpus": {"model.gpt"}, "model.gpt": set()}, 1),
        ({"model.a": {"model.b"}, "model.b": {"model.a"}}, 2),
        ({"model.a": {"model.b"}, "model.b": {"model.c"}, "model.c": {"model.a"}}, 3),
        ({"serving.api": {"notebook.plotting"}, "notebook.plotting": set()}, 1),
        ({"model.gpt": {"data.nowhere"}}, 1),
        ({"weights.a": {"model.GPTModel"}}, 1),
    ],
)
def test_the_check_itself_finds_offences(imports, expected):
    assert len(offences(imports)) == expected


def test_imports_are_read_from_every_form():
    source = "import shared.model.gpt\nfrom shared.model.attention import A\nfrom shared.model import layers\nimport re"
    assert imported(source) == {"model.gpt", "model.attention", "model.layers"}
    with pytest.raises(ValueError, match="line 1: relative import"):
        imported("from .gpt import GPTModel")


def test_every_module_is_in_a_room():
    outside = {path.stem for path in (ROOT / "shared").glob("*.py")} - {"__init__"}
    assert outside <= set(FIRST_MODULES)
    rooms = {path.name for path in (ROOT / "shared").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert rooms - {"checkpoints"} <= set(ROOMS)
    nested = [path for path in (ROOT / "shared").glob("*/*/*.py") if "checkpoints" not in path.parts]
    assert nested == []


def test_a_room_is_wholly_promoted_or_wholly_written_by_hand():
    promoted = {name.replace("/", ".") for name in collect()}
    assert promoted == {name_of(path) for room in PROMOTED_ROOMS for path in modules(room)}


@pytest.mark.parametrize("path", FACES, ids=lambda path: path.parent.name)
def test_a_face_lists_every_module_and_shows_at_most_eight_names(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed = re.findall(r"^- `(\w+)`:", ast.get_docstring(tree), re.M)
    assert sorted(listed) == [module.stem for module in modules(path.parent.name)]
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(names) <= 8
    assert bool(names) != (path.parent.name in WITHOUT_NAMES)
    exported = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert (exported or [[]]) == [sorted(names)]


def test_every_room_with_modules_has_a_face():
    assert {path.parent.name for path in FACES} == {room for room in ROOMS if modules(room)}


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_module_has_a_docstring_and_a_bearable_length(path: Path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "a module opens with what it is"
    assert ("written from there by `make promote`" in " ".join(docstring.split())) == (
        path.parent.name in PROMOTED_ROOMS
    )


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_public_definitions_have_docstrings_and_type_hints(path: Path):
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            members = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
            missing += [f"{node.name}.{n.name}" for n in members if not ast.get_docstring(n)]
            if not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(node.name)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            hints = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
            if not ast.get_docstring(node) or None in hints:
                missing.append(node.name)
    assert missing == []


def test_only_the_folders_of_the_blueprint_stand_at_the_top():
    allowed = {*CHAPTERS, "shared", "tests", "build"}
    assert {
        p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] != "." and "egg-info" not in p.name
    } <= allowed
    assert all((ROOT / chapter / "README.md").is_file() for chapter in CHAPTERS)


def test_nobody_edits_the_search_path():
    scripts = [*ROOT.glob("tests/**/*.py"), *(path for c in CHAPTERS for path in (ROOT / c).glob("*.py"))]
    own = Path(__file__)
    assert [p.name for p in scripts if p != own and "sys.path" in p.read_text(encoding="utf-8")] == []
