"""`shared.checks`: what is allowed passes, what is not is named with what is allowed and what was given."""

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.checks import (
    check_between,
    check_choice,
    check_dropout,
    check_path,
    check_several,
    check_sizes,
    check_text,
    choose,
    plain_number,
    require,
    whole_number,
)


@pytest.mark.parametrize(
    "call",
    [
        lambda: require("p", 0.5, 0 < 0.5 < 1, "between 0 and 1"),
        lambda: check_choice("kind", "a", ("a", "b")),
        lambda: check_choice("kind", "a", {"a": 1}),
        lambda: check_sizes(),
        lambda: check_sizes(width=1, height=10**30),
        lambda: check_sizes(width=np.int64(3)),
        lambda: check_between("k", 1, 1, 3),
        lambda: check_between("k", 3, 1, 3),
        lambda: check_between("share", 0.0, 0, 1),
        lambda: check_dropout(0.0),
        lambda: check_dropout(0.999),
        lambda: check_text("text", ""),
        lambda: check_several("texts", []),
        lambda: check_several("texts", ["a", "b"]),
        lambda: check_several("texts", iter("ab")),
    ],
)
def test_what_is_allowed_passes_in_silence(call):
    assert call() is None


def test_choose_returns_the_entry():
    assert choose("kind", "b", {"a": 1, "b": 2}) == 2


@pytest.mark.parametrize(
    ("value", "smallest"),
    [
        (1, 1),
        (0, 0),
        (-3, -3),
        (10**30, 1),
        (np.int32(7), 1),
        (np.uint8(2), 2),
        (np.array(3), 1),
        (torch.tensor(3), 1),
        (torch.tensor(3, dtype=torch.uint8), 1),
    ],
)
def test_whole_number_returns_an_int(value, smallest):
    number = whole_number("n", value, smallest)
    assert type(number) is int
    assert number == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, 2),
        (0.5, 0.5),
        (Fraction(1, 2), 0.5),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (np.int64(2), 2),
        (torch.tensor(2), 2),
    ],
)
def test_a_plain_number_is_one_of_python(value, expected):
    number = plain_number(value)
    assert type(number) is type(expected)
    assert number == expected


@pytest.mark.parametrize(
    "value",
    [
        True,
        None,
        "3",
        1j,
        [3],
        np.True_,
        np.str_("3"),
        np.complex64(1),
        np.datetime64(3, "D"),
        np.array([3]),
        torch.tensor(True),
        torch.tensor([3]),
        torch.tensor([0.5]),
        torch.tensor(1j),
    ],
)
def test_what_is_no_number_is_none(value):
    assert plain_number(value) is None


def test_several_texts_are_not_read():
    texts = iter(["a", "b"])
    check_several("texts", texts)
    assert list(texts) == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: require("p", 2.0, False, "below 1"), ValueError, "p must be below 1, got 2.0"),
        (lambda: require("name", "x", False, "y"), ValueError, "name must be y, got 'x'"),
        (lambda: check_choice("kind", "c", ("a", "b")), ValueError, "kind must be one of a, b, got 'c'"),
        (lambda: check_choice("n", 3, (1, 2)), ValueError, "n must be one of 1, 2, got 3"),
        (lambda: choose("kind", "c", {"a": 1, "b": 2}), ValueError, "kind must be one of a, b, got 'c'"),
        (lambda: whole_number("n", 0), ValueError, "n must be at least 1, got 0"),
        (lambda: whole_number("seed", -1, 0), ValueError, "seed must be at least 0, got -1"),
        (lambda: whole_number("n", np.int64(0)), ValueError, "n must be at least 1, got 0"),
        (lambda: whole_number("n", 2.0), TypeError, "n must be an int, got 2.0"),
        (lambda: whole_number("n", True), TypeError, "n must be an int, got True"),
        (lambda: whole_number("n", np.bool_(True)), TypeError, "n must be an int, got"),
        (lambda: whole_number("n", np.float32(2)), TypeError, "n must be an int, got"),
        (lambda: whole_number("n", torch.tensor(True)), TypeError, "n must be an int, got tensor(True)"),
        (lambda: whole_number("n", torch.tensor([3])), TypeError, "n must be an int, got tensor([3])"),
        (lambda: whole_number("n", torch.tensor(2.0)), TypeError, "n must be an int, got tensor(2.)"),
        (lambda: whole_number("n", torch.tensor(0)), ValueError, "n must be at least 1, got 0"),
        (lambda: whole_number("n", "4"), TypeError, "n must be an int, got '4'"),
        (lambda: whole_number("n", None), TypeError, "n must be an int, got None"),
        (lambda: check_sizes(width=3, height=0), ValueError, "height must be at least 1, got 0"),
        (lambda: check_sizes(width=3.0), TypeError, "width must be an int, got 3.0"),
        (lambda: check_between("k", 4, 1, 3), ValueError, "k must be between 1 and 3, got 4"),
        (lambda: check_between("k", 0, 1, 3), ValueError, "k must be between 1 and 3, got 0"),
        (lambda: check_between("p", math.nan, 0, 1), ValueError, "p must be between 0 and 1, got nan"),
        (lambda: check_dropout(1.0), ValueError, "dropout must be in [0, 1), got 1.0"),
        (lambda: check_dropout(-0.1), ValueError, "dropout must be in [0, 1), got -0.1"),
        (lambda: check_dropout(math.nan), ValueError, "dropout must be in [0, 1), got nan"),
        (lambda: check_text("text", b"a"), TypeError, "text must be a str, got bytes b'a'"),
        (lambda: check_text("text", None), TypeError, "text must be a str, got NoneType None"),
        (lambda: check_several("texts", "one"), TypeError, "texts must be several texts, got str 'one'"),
        (lambda: check_several("texts", b"one"), TypeError, "texts must be several texts, got bytes b'one'"),
        (lambda: check_several("texts", 5), TypeError, "texts must be several texts, got int 5"),
    ],
)
def test_what_is_not_allowed_is_named(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()


def test_a_long_value_is_cut():
    with pytest.raises(TypeError) as raised:
        check_several("texts", "a" * 10_000)
    assert len(str(raised.value)) < 200


def test_a_path_that_is_no_utf_8_is_refused():
    check_path("folder", "plain/ü")
    check_path("folder", Path("plain"))
    with pytest.raises(ValueError, match="folder: this path cannot be used, as its bytes are not UTF-8"):
        check_path("folder", "a\udcffb")
