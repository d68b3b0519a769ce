"""Every relative link of the repository leads to a file that is there, and every anchor to a heading."""

import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.tools.architecture import CHAPTERS, ROOT, notebooks

# Folders with nothing of the course, at any depth.
FOREIGN = {".venv", ".git", "build", "node_modules", ".ipynb_checkpoints", ".hypothesis", ".ruff_cache"}
FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1[`~]*[ \t]*$", re.M | re.S)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
FORMULA = re.compile(r"\$\$.+?\$\$|(?<![\\$])\$[^$\n]+\$", re.S)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'(][^)]*)?\s*\)")
DEFINED = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", re.M)
HTML = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)\s*=\s*[\"']([^\"']+)", re.I)
OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:|//|attachment:", re.I)


def documents() -> list[Path]:
    """Return all Markdown files and notebooks of the repository."""
    places = [ROOT / ".github", *(ROOT / name for name in (*CHAPTERS, "shared", "tests"))]
    found = [*ROOT.glob("*.md"), *(path for place in places for path in place.rglob("*.md"))]
    return [path for path in found if not FOREIGN & {*path.relative_to(ROOT).parts}] + notebooks()


@cache
def prose(path: Path) -> str:
    """Return the Markdown text of a file, without code and formulas."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Return the targets of a text's links and images that lead to no other site."""
    text = FORMULA.sub("", CODE.sub("code", text))
    found = [target for pattern in (LINK, DEFINED, HTML) for target in pattern.findall(text)]
    return [target for target in found if not OUTSIDE.match(target)]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a file's headings: as GitHub makes them, as JupyterLab does, and those set by hand."""
    found: set[str] = set(re.findall(r"<a\s+(?:id|name)\s*=\s*[\"']([^\"']+)", prose(path)))
    counts: dict[str, int] = {}
    for heading in re.findall(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*$", prose(path), re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        counts[slug] = counts.get(slug, 0) + 1
        found.add(slug if counts[slug] == 1 else f"{slug}-{counts[slug] - 1}")
        found.add(shown.replace(" ", "-"))
    return found


def fault(path: Path, target: str, root: Path = ROOT) -> str:
    """Return what is wrong with a link of a file in the repository at `root`, or ""."""
    name, _, anchor = unquote(target).partition("#")
    there = path if not name else (root / name.lstrip("/") if name.startswith("/") else path.parent / name)
    if not there.exists():
        return "no such file"
    if not there.resolve().is_relative_to(root.resolve()):
        return "leads out of the repository"
    if anchor and there.suffix in (".md", ".ipynb") and anchor not in anchors(there):
        return "no such heading"
    return ""


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    wrong = [f"{target}: {why}" for target in links(prose(path)) if (why := fault(path, target))]
    assert wrong == []


def test_there_is_something_to_test():
    assert sum(len(links(prose(path))) for path in documents()) > 100
    assert {ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"} <= set(documents())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](b.md) and ![c](d.svg 'title')", ["b.md", "d.svg"]),
        ("| [`x`](y/z.ipynb) | [w](<u.md>) |", ["y/z.ipynb", "u.md"]),
        ("[![picture](a.png)](b.md)", ["a.png", "b.md"]),
        ("[text][label]\n\n[label]: c.md#part", ["c.md#part"]),
        ('<img alt="x" src="d.svg"> <a href="#e">', ["d.svg", "#e"]),
        ("[far](https://x.org/y) [post](mailto:a@b.c) [file](attachment:f.png)", []),
        ("`[no](link)` and ``x[0](`y`)`` and $a[i](b)$", []),
    ],
)
def test_what_a_link_is(text, found):
    assert links(text) == found


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One `two`: three?\n\n```\n# no heading\n[no](link)\n```\n\n## Again\n\n## Again\n\n[x](b.md)\n",
        encoding="utf-8",
    )
    page = tmp_path / "a.md"
    assert [fault(page, target, tmp_path) for target in links(prose(page))] == ["no such file"]
    for good in ("#one-two-three", "a.md#again-1", "a.md#One-two:-three?", "/a.md", "%61.md"):
        assert fault(page, good, tmp_path) == ""
    assert fault(page, "#no-heading", tmp_path) == fault(page, "a.md#again-2", tmp_path) == "no such heading"
    assert fault(page, "..", tmp_path) == "leads out of the repository"
