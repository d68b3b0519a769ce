"""What scripts that record measurements share: records that grow and change row by row."""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


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
