"""The floors of `shared/`: which module may import which, and how long a module may be."""

import ast
from pathlib import Path

import pytest

from tests.architecture import CHAPTERS, FLOORS, HAND_WRITTEN, MODULES, ROOT
from tests.promote import collect

FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
PRESENT = sorted(path for path in (ROOT / "shared").glob("*.py") if path.stem != "__init__")


def imported_modules(source: str) -> set[str]:
    """Return the modules of `shared` that a source text imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == "shared"
        ):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("shared.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"line {node.lineno}: relative import; write 'from shared.module import name'")
    return found


def offences(imports: dict[str, set[str]]) -> list[str]:
    """Return one line for each import that goes down a floor, is unknown, or closes a cycle."""
    found = []
    for name, targets in imports.items():
        for target in sorted(targets):
            if target not in FLOOR:
                found.append(f"{name} imports {target}, which stands on no floor")
            elif FLOOR[target] > FLOOR[name]:
                found.append(f"{name} imports {target} from a floor below its own")
            elif target == "plotting":
                found.append(f"{name} imports plotting, which is for notebooks and scripts")
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


def test_imports_go_up_only():
    assert offences({path.stem: imported_modules(path.read_text(encoding="utf-8")) for path in PRESENT}) == []


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ({"attention": {"corpus"}}, 0),
        ({"corpus": {"attention"}}, 1),
        ({"attention": {"layers"}, "layers": {"attention"}}, 2),
        ({"attention": {"layers"}, "layers": {"positions"}, "positions": {"attention"}}, 3),
        ({"serving": {"plotting"}}, 1),
        ({"gpt": {"nowhere"}}, 1),
    ],
)
def test_the_check_itself_finds_offences(imports, expected):
    assert len(offences(imports)) == expected


def test_imports_are_read_from_every_form():
    source = "import shared.gpt\nfrom shared.attention import A\nfrom shared import layers\nimport torch"
    assert imported_modules(source) == {"gpt", "attention", "layers"}


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.stem)
def test_module_has_a_floor_and_a_bearable_length(path: Path):
    assert path.stem in MODULES
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source)), "a module opens with what it is"


def test_every_module_is_promoted_or_written_by_hand():
    promoted = set(collect())
    assert {path.stem for path in PRESENT} == promoted | {
        n for n in HAND_WRITTEN if (ROOT / "shared" / f"{n}.py").exists()
    }


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.stem)
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
