"""Checks of arguments that every room shares, with one phrasing: "... must be ..., got ...".

A value of the wrong kind raises TypeError, a wrong value ValueError; the message names the argument, says what is
allowed, and shows what was given. The module imports nothing of the course, so every room may import it. Left out:
checks that belong to one class alone, and of tensors' values, which would make the CPU wait for a GPU.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import TypeVar

T = TypeVar("T")


def choose(name: str, value: str, choices: Mapping[str, T]) -> T:
    """Return the entry of `choices` called `value`; ValueError names the argument and what is allowed."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is no int (TypeError) or below 1 (ValueError), by its name."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
