"""Make a notebook in the house style, to be filled: `make new-notebook NAME=ch06_classification/01_spam`.

    python -m tests.tools.new_notebook ch06_classification/01_spam

It has the cells that every notebook has, in their order; what stands in angle brackets is to be replaced. Nothing is
overwritten.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.tools.architecture import CHAPTERS, ROOT

FIRST = """# <A question that a person would care about>

<One sentence: what you will have at the end.>

| | |
| --- | --- |
| You will build | <the parts> |
| You need | <earlier notebooks, as links> |
| Running time | <measured> on two CPU cores |
| Promotes to | `shared/<room>/<module>.py` |"""

SECTION = """## <The first question>

<Why it comes up here, in a sentence or two. Then a drawing, the smallest case with numbers that can be checked by hand,
the formula with each symbol named, the real thing grown in stages, its proof, and what it costs.>

*In the picture: <what it shows, in words>.*"""

QUESTION = """**Check yourself.** <A question that can be answered in the head.>

<details><summary>Answer</summary>

<The answer.>
</details>"""

PROMOTED = '''# shared/<room>/<module>.py
def finished(x: float) -> float:
    """Return <what it does>.

    Raises:
        ValueError: <when>.
    """
    return x'''

SOLUTION = """# <What the solution shows.>
assert finished(1.0) == 1.0"""

EXERCISES = """## Exercises

**1.** <Change a number: what to find out, and how you will know.>"""

MODULE = """### `shared/<room>/<module>.py`

<What the module is.>

Left out: <what a reader might look for>.

Follows <paper, author, year, title>."""


def build() -> nbformat.NotebookNode:
    """Return the notebook to be filled."""
    solution = {"tags": ["solution"], "jupyter": {"source_hidden": True}}
    notebook = new_notebook(
        cells=[
            new_markdown_cell(FIRST),
            new_code_cell("import torch\n\nfrom shared.notebook.proof import compare"),
            new_markdown_cell(SECTION),
            new_code_cell("# A drawing of the idea.", metadata={"jupyter": {"source_hidden": True}}),
            new_code_cell("x = torch.tensor(1.0)\nx + x"),
            new_markdown_cell("<Read the result aloud.>"),
            new_code_cell(PROMOTED),
            new_markdown_cell("### Proof: <against what>"),
            new_code_cell('compare("<what>", finished(1.0), 1.0)'),
            new_markdown_cell(
                f"{QUESTION}\n\n## With a network\n\n<Real data, or a line on what was skipped.>"
            ),
            new_markdown_cell("## What you built\n\n- <The parts, with links to their modules.>"),
            new_markdown_cell("## What this chapter puts into `shared/`"),
            new_markdown_cell(MODULE),
            new_markdown_cell("## What can go wrong\n\n- **<A mistake.>** <How it shows, and what helps.>"),
            new_markdown_cell(EXERCISES),
            new_code_cell(SOLUTION, metadata=solution),
            new_markdown_cell("**2.** <Vary one thing.>"),
            new_code_cell(SOLUTION, metadata=solution),
            new_markdown_cell("**3.** <Build it.>"),
            new_code_cell(SOLUTION, metadata=solution),
            new_markdown_cell("## Your turn\n\n<A text, a question or a file of the reader's own.>"),
            new_code_cell('yours = "<try your own>"'),
            new_markdown_cell("## References\n\n- <Author, year, *Title*.>"),
        ]
    )
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number:03d}"
    return notebook


def path_of(name: str, root: Path = ROOT) -> Path:
    """Return the file of a notebook that does not exist yet.

    Raises:
        ValueError: The name is none, the chapter is unknown, or the number or the file is taken.
    """
    chapter, _, topic = name.removesuffix(".ipynb").partition("/")
    if chapter not in CHAPTERS:
        raise ValueError(f"NAME must begin with a chapter, one of {', '.join(CHAPTERS)}, got {name!r}")
    if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", topic):
        raise ValueError(f"NAME must be chapter/NN_topic, such as {chapter}/01_topic, got {name!r}")
    if taken := list((root / chapter).glob(f"{topic[:2]}_*.ipynb")):
        raise ValueError(
            f"NAME must have a number that is free in {chapter}, got {topic[:2]}, which {taken[0].name} has"
        )
    return root / chapter / f"{topic}.ipynb"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Make a notebook in the house style.")
    parser.add_argument(
        "name", nargs="?", default="", help="chapter/NN_topic, such as ch06_classification/01_spam"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (for tests)")
    options = parser.parse_args(arguments)
    try:
        path = path_of(options.name, options.root)
    except ValueError as error:
        print(f"new-notebook: {error}", file=sys.stderr)
        return 1
    path.parent.mkdir(exist_ok=True)
    with path.open("x", encoding="utf-8", newline="\n") as file:
        nbformat.write(build(), file)
    print(f"made {path.relative_to(options.root).as_posix()}; fill it, then make promote and make refresh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
