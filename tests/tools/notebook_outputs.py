"""What may differ between a notebook's stored output and a new one."""

import re
from decimal import Decimal

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
