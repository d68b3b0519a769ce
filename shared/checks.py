"""Checks of arguments that every room shares, with one phrasing: "... must be ..., got ...".

A value of the wrong kind raises TypeError, a wrong value ValueError; the message names the argument, says what is
allowed, and shows what was given. The module imports nothing of the course, so every room may import it. Left out:
checks that only one class needs, and whatever looks into a tensor of several numbers, which would make the CPU wait
for a GPU.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from operator import index
from typing import TypeVar

T = TypeVar("T")


def require(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raise ValueError, "`name` must be `allowed`, got `value`", unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Refuse what is not among the choices (ValueError), and list them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def choose(name: str, value: str, choices: Mapping[str, T]) -> T:
    """Return the entry of `choices` called `value`; ValueError names the argument and what is allowed."""
    check_choice(name, value, choices)
    return choices[value]


def plain_number(value: object) -> int | float | None:
    """Return a number as Python's int or float, and None for what is no number (True and "3" are none).

    Numbers are Python's and NumPy's, and arrays and tensors without dimensions.
    """
    kind = str(getattr(value, "dtype", ""))
    if isinstance(value, bool) or "bool" in kind or getattr(value, "ndim", 0):
        return None
    try:
        return index(value)
    except TypeError:  # no whole number
        pass
    if isinstance(value, Real):
        return float(value)
    item = value.item() if kind and hasattr(value, "item") else None
    return item if isinstance(item, float) else None


def whole_number(name: str, value: int, smallest: int = 1) -> int:
    """Return `value` as an int; TypeError if it is no whole number (True and 2.0 are none), ValueError if too small.

    Whole numbers of NumPy and torch count as well, see `plain_number`.
    """
    number = plain_number(value)
    if not isinstance(number, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {number}")
    return number


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is no int (TypeError) or below 1 (ValueError), by its name."""
    for name, size in sizes.items():
        whole_number(name, size)


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse a value below `low` or above `high`, or nan (ValueError); both limits are allowed."""
    require(name, value, low <= value <= high, f"between {low} and {high}")


def check_dropout(dropout: float) -> None:
    """Refuse a probability of dropping a number that is not at least 0 and below 1 (ValueError)."""
    require("dropout", dropout, 0.0 <= dropout < 1.0, "in [0, 1)")


def check_path(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path whose bytes are not UTF-8 (ValueError): JSON and safetensors could not hold or open it."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        shown = repr(os.fspath(path))
        raise ValueError(f"{name}: this path cannot be used, as its bytes are not UTF-8: {shown}") from None


def check_text(name: str, text: str) -> None:
    """Refuse what is no str (TypeError)."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__} {text!r:.80}")


def check_several(name: str, texts: Iterable[str]) -> None:
    """Refuse one str or bytes, and what is no iterable, where several texts are wanted (TypeError).

    Python would otherwise take each letter for a text.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be several texts, got {type(texts).__name__} {texts!r:.80}")
