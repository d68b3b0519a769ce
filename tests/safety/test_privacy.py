"""Finding personal data: checksums by hand, places, hostile texts, redaction. The labelled lines are judged last."""

import hashlib
import hmac
import string
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.safety.privacy import (
    FINDERS,
    Finding,
    find_personal_data,
    iban_remainder,
    is_resident_id,
    is_ssn,
    luhn,
    redact,
)
from shared.safety.privacy_scores import count_findings
from tests.timing import seconds


def found(text: str) -> list[tuple[str, str]]:
    """Return what is found as (text, kind)."""
    return [(text[f.start : f.end], f.kind) for f in find_personal_data(text)]


FOUND = [
    ("Write to a.b+c@mail.example.org.", [("a.b+c@mail.example.org", "email")]),
    ("邮箱lin@example.com。", [("lin@example.com", "email")]),
    ("anna (at) fjord (dot) example, please", [("anna (at) fjord (dot) example", "email")]),
    ("q@x.example/r@x.example", [("q@x.example", "email"), ("r@x.example", "email")]),
    ("from 192.0.2.7:443 to [2001:db8::1]:80", [("192.0.2.7", "ip"), ("2001:db8::1", "ip")]),
    ("2001:db8::5: refused", [("2001:db8::5", "ip")]),
    ("192[.]0[.]2[.]9", [("192[.]0[.]2[.]9", "ip")]),
    ("paid with 4111-1111-1111-1111", [("4111-1111-1111-1111", "card")]),
    ("amex 3782 822463 10005 ok", [("3782 822463 10005", "card")]),
    ("IBAN gb29nwbk60161331926819 thanks", [("gb29nwbk60161331926819", "iban")]),
    ("FR14 2004 1010 0505 0001 3M02 606 et voilà", [("FR14 2004 1010 0505 0001 3M02 606", "iban")]),
    ("SSN 078-05-1120.", [("078-05-1120", "id")]),
    ("social security 078051120", [("078051120", "id")]),
    ("DNI 12.345.678-Z", [("12.345.678-Z", "id")]),
    ("NIE X1234567L", [("X1234567L", "id")]),
    ("证件11010020491001474X号", [("11010020491001474X", "id")]),
    ("ring 020 7946 0018 ext. 4 now", [("020 7946 0018 ext. 4", "phone")]),
    ("+44 (0)20 7946 0018", [("+44 (0)20 7946 0018", "phone")]),
    ("+1 604 555 0122 2031 is the year", [("+1 604 555 0122", "phone")]),
    ("07700900123", [("07700900123", "phone")]),
    ("phone=2125550187", [("2125550187", "phone")]),
    ("at 5 Mistletoe Wharf, Ketterby, LN14 7UE on", [("5 Mistletoe Wharf, Ketterby, LN14 7UE", "address")]),
    ("at 12 Elm Street.", [("12 Elm Street", "address")]),
    ("Am Teich 29, 18999 Wiek", [("Am Teich 29, 18999 Wiek", "address")]),
    ("12 rue des Lilas, 75999 Paris", [("12 rue des Lilas, 75999 Paris", "address")]),
    ("Calle Mayor 5, 28999 Madrid", [("Calle Mayor 5, 28999 Madrid", "address")]),
    ("住址：幸福路88号", [("幸福路88号", "address")]),
    ("no\u2011break +44\u00a07700\u00a0900123", [("+44\u00a07700\u00a0900123", "phone")]),
]
NOTHING = [
    "",
    "git clone git@git.example.org:team/repo.git",
    "@decorator and name@ and @host.example",
    "127.0.0.1, ::1, 0.0.0.0, 256.1.1.1, 192.0.2.0/24, version 1.2.3.4, 1.3.6.1.4.1.9",
    "std::vector 12:30:45 ee:5c:48:db:68:ba",
    "4111 1111 1111 1112",
    "1111 1111 1111 1117",
    "GB28 NWBK 6016 1331 9268 19",
    "ZZ29 NWBK 6016 1331 9268 19",
    "000-12-3456, 666-12-3456, 123-00-4567",
    "12345678A",
    "110100206302141163",
    "1234567890 and 2031-04-02 10:30:00 and 01.02.2031",
    "Chapter 12 Road to nowhere",
]


@pytest.mark.parametrize(("text", "expected"), FOUND)
def test_what_is_found(text, expected):
    assert found(text) == expected


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_left_alone(text):
    assert found(text) == []


def test_checksums_by_hand():
    # 7 9 9 2 7 3 9 8 7 1 3: doubled from the right 1, 8, 3, 2, 9 -> 2, 7, 6, 4, 9; the sum of all is 70.
    assert luhn("79927398713") and not any(luhn(f"7992739871{last}") for last in "012456789")
    assert iban_remainder("DE89370400440532013000") == 1 and iban_remainder("DE88370400440532013000") != 1
    assert is_ssn(78, 5, 1120) and not is_ssn(0, 5, 1120) and not is_ssn(666, 5, 1) and is_ssn(987, 65, 4321)
    assert is_resident_id("11010519491231002X") and not is_resident_id("110105194912310021")
    assert not is_resident_id("110105194913310021")  # a thirteenth month


@given(st.text(alphabet=string.digits, min_size=2, max_size=19), st.data())
def test_luhn_finds_every_wrong_digit(digits, data):
    right = next(digits + last for last in string.digits if luhn(digits + last))
    place = data.draw(st.integers(0, len(right) - 1))
    other = data.draw(st.sampled_from([d for d in string.digits if d != right[place]]))
    assert not luhn(right[:place] + other + right[place + 1 :])


@given(st.text(alphabet="a1 .@+-:()0/é号\n2,DE", max_size=80))
def test_findings_are_ordered_apart_and_inside(text):
    findings = find_personal_data(text)
    assert all(0 <= f.start < f.end <= len(text) and f.kind in FINDERS for f in findings)
    assert all(one.end <= other.start for one, other in pairwise(findings))


HOSTILE = [
    "1",
    "a",
    "1 ",
    "+1-",
    "@",
    "a@a.",
    ":",
    "a1:",
    "1.",
    "A1 ",
    "12 Elm ",
    "DE12 ab ",
    "01-",
    "(0",
    "\0",
]
HOSTILE += [
    "幸",
    "a (at) a (dot) ",
    "Am Am ",
    "phone ",
    "a at a dot ",
    "1 A, ",
    " ",
    "a@b.example ",
    "A" * 60 + " ",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_texts_cost_no_square(unit):
    # Four times the text: four times the time, sixteen times if it were the square.
    texts = ((unit * (n // len(unit) + 1))[:n] for n in (25_000, 100_000))
    short, long = (seconds(partial(find_personal_data, text)) for text in texts)
    assert long < 10 * short + 0.1


def test_kinds_can_be_chosen():
    text = "a@b.example 192.0.2.1"
    assert [f.kind for f in find_personal_data(text, ["ip"])] == ["ip"]
    with pytest.raises(ValueError, match="kinds must be one of email"):
        find_personal_data(text, ["name"])
    with pytest.raises(TypeError, match="text must be a str"):
        find_personal_data(b"a@b.example")


def test_redaction():
    text = "Mail A@b.example or a@B.example, not c@d.example; ring 020 7946 0018."
    assert redact(text) == "Mail [EMAIL] or [EMAIL], not [EMAIL]; ring [PHONE]."
    key = b"0123456789abcdef"
    named = redact(text, key=key).split()
    digest = hmac.new(key, b"email:a@b.example", hashlib.sha256).hexdigest()[:10]
    assert (
        named[1] == f"[EMAIL-{digest}]"
        and named[3].rstrip(",") == named[1]
        and named[5].rstrip(";") != named[1]
    )
    assert redact(text, key=b"another key of 16") != redact(text, key=key)
    assert find_personal_data(redact(text)) == [] and redact("nothing here") == "nothing here"
    with pytest.raises(ValueError, match="key must be at least 16 bytes, got '3 bytes'"):
        redact(text, key=b"abc")


def test_two_spellings_of_one_number_have_one_pseudonym():
    key = b"0123456789abcdef"
    assert redact("+44 7700 900123", key=key) == redact("+44-7700-900123", key=key)


def test_counts_by_hand():
    lines = [("a@b.example", [(0, 11, "email")]), ("x c@d.example", [(3, 13, "email")]), ("1", [])]
    counts = count_findings(
        lines, lambda text: [Finding(0, 1, "ip")] if text == "1" else find_personal_data(text)
    )
    assert counts == {"all": (1, 3, 2), "email": (1, 2, 2), "ip": (0, 1, 0)}
