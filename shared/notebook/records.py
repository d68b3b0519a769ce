"""What scripts that record measurements share: records that grow row by row, comparison in pairs, other scripts."""

import csv
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def replace_rows(
    path: Path, columns: Sequence[str], new: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> None:
    """Write rows to a CSV file atomically: old ones with the key of a new one go, all others stay.

    Args:
        path: The file; it is made if there is none.
        columns: Names of the columns; a row may leave some out, which stay empty.
        new: Rows by name of column. Several may have the same key.
        key: Called with a row, new or old; in old rows all values are text. Rows are sorted by it; equal keys keep
            their order.

    Raises:
        ValueError: A row has a column that is not in `columns`; the file stays as it was.
    """
    old = read_rows(path)
    replaced = {key(row) for row in new}
    rows = sorted([*(row for row in old if key(row) not in replaced), *new], key=key)
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_row(path: Path, columns: Sequence[str], row: dict[str, Any], names: Sequence[str]) -> None:
    """Write one row as `replace_rows` does; it replaces the row with the same values in the columns `names`.

    Raises:
        ValueError: As `replace_rows` does.
    """
    replace_rows(path, columns, [row], lambda entry: tuple(str(entry[name]) for name in names))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a record by name of column, all values as text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def paired_difference(both: Mapping[tuple[int, int], tuple[bool, bool]]) -> tuple[float, float, float]:
    """Return how much oftener one method was right than another, in percentage points, and its 95 % interval's ends.

    Texts are what is drawn: several seeds of one text count as their mean. The interval is 1.96 standard errors of the
    mean over the texts, to each side.

    Args:
        both: (seed, number of the text) -> whether the one was right, and the other.

    Raises:
        ValueError: There are fewer than two texts.
    """
    by_text: dict[int, list[int]] = {}
    for (_, place), (one, other) in both.items():
        by_text.setdefault(place, []).append(100 * (int(one) - int(other)))
    if len(by_text) < 2:
        raise ValueError(f"both must hold at least two texts, got {len(by_text)}")
    gained = np.array([np.mean(values) for values in by_text.values()])
    half = 1.96 * gained.std(ddof=1) / np.sqrt(len(gained))
    return float(gained.mean()), float(gained.mean() - half), float(gained.mean() + half)


def load_script(path: Path) -> ModuleType:
    """Return a script that lies in the folder of another chapter as a module. Raises FileNotFoundError."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
