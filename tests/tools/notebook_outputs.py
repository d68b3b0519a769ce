"""What may differ between a notebook's stored output and a new one, and what every stored notebook must fulfil."""

import json
import re
from decimal import Decimal
from pathlib import Path

IGNORED_TAGS = {"nbval-ignore-output", "nbval-skip"}
MAX_IGNORED_SHARE = 0.15
ROUNDING_NOISE = Decimal("1e-5")

# A number with a decimal point or an exponent, with the blanks that pad it in a table. Not part of a word or of
# a version such as 2.13.0.
FLOAT = re.compile(r" *(?<![\w.])[-+]?\d+(?:\.\d+(?:[eE][-+]?\d+)?|[eE][-+]?\d+)(?![\w.]*\.\d|\w)")


class TolerantText(str):
    """A text that equals another when only the last printed decimal of its floats differs, by one unit.

    Integers and words are strict. Numbers in exponent form of at most 1e-5 on both sides are rounding errors:
    their size depends on the processor, and the cell that prints one asserts its bound.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and agree(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def agree(first: str, second: str) -> bool:
    """Return whether two outputs agree in the sense of `TolerantText`."""
    if str.__eq__(first, second):
        return True
    if FLOAT.sub("\0", first) != FLOAT.sub("\0", second):
        return False
    return all(_close(a, b) for a, b in zip(FLOAT.findall(first), FLOAT.findall(second), strict=True))


def _close(first: str, second: str) -> bool:
    a, b = Decimal(first.strip()), Decimal(second.strip())
    if "e" in first.lower() and "e" in second.lower() and max(abs(a), abs(b)) <= ROUNDING_NOISE:
        return True
    unit = Decimal(1).scaleb(max(a.as_tuple().exponent, b.as_tuple().exponent))
    return abs(a - b) <= unit


def findings(path: Path) -> list[str]:
    """Return what is wrong with a stored notebook, one line each; nothing is run.

    nbval passes a cell that was never executed without comparing it, and passes any cell tagged to be ignored;
    these are the checks that keep it honest.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = []
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("the code cells were not all executed, in order, in one fresh kernel")
    ignored = sum(bool(IGNORED_TAGS & tags(cell)) or "NBVAL_" in source(cell) for cell in code)
    if ignored > MAX_IGNORED_SHARE * len(code):
        found.append(f"{ignored} of {len(code)} code cells are not compared (limit {MAX_IGNORED_SHARE:.0%})")
    for position, cell in enumerate(code, 1):
        if not source(cell).strip():
            found.append(f"code cell {position} is empty")
        if "solution" in tags(cell) and not cell["metadata"].get("jupyter", {}).get("source_hidden"):
            found.append(f"code cell {position} is a solution and not collapsed")
        if "execution" in cell["metadata"]:
            found.append(f"code cell {position} stores its running time")
        for output in cell["outputs"]:
            if output["output_type"] == "error" and "raises-exception" not in tags(cell):
                found.append(f"code cell {position} ends in {output['ename']}")
            if output.get("name") == "stderr":
                found.append(f"code cell {position} writes to stderr")
    if sum("solution" in tags(cell) for cell in code) < 3:
        found.append("fewer than three solutions")
    if "widgets" in notebook["metadata"]:
        found.append("the notebook stores the state of widgets")
    return found


def tags(cell: dict) -> set[str]:
    """Return the tags of a cell."""
    return set(cell["metadata"].get("tags", []))


def source(cell: dict) -> str:
    """Return the text of a cell, which is stored as a string or as a list of lines."""
    return "".join(cell["source"])
