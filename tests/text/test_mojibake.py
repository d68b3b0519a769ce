"""`shared.text.mojibake`: text that was read with the wrong encoding, against ftfy."""

import ftfy
import pytest

from shared.data.corpus import load_languages, load_sms, load_stories
from shared.text.mojibake import fix_mojibake

PROSE = [paragraph.text for paragraph in load_languages() if paragraph.language != "code"]
STORIES = [story.text for story in load_stories()]


def misread(text: str) -> str:
    """Return UTF-8 text as a reader of Windows-1252 sees it."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode("utf-8"))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_mojibake_of_every_language_is_repaired(times):
    for text in PROSE:
        broken = text
        for _ in range(times):
            broken = misread(broken)
        assert fix_mojibake(broken) == text


def test_mojibake_read_as_latin1_is_repaired():
    assert all(fix_mojibake(text.encode("utf-8").decode("latin-1")) == text for text in PROSE)


def test_mojibake_agrees_with_ftfy_on_broken_and_unbroken_text():
    texts = [*PROSE, *STORIES, *(message.text for message in load_sms()), *map(misread, PROSE)]
    assert [fix_mojibake(text) for text in texts] == [ftfy.fix_encoding(text) for text in texts]


@pytest.mark.parametrize(
    "text",
    [
        "NÃO, SÃO PAULO, “MAÇÃ”",
        "MAÇÃ\xa0PODRE",
        "„Das macht Spaß“",
        "« allé…»",
        "É…",
        "„Ä“",
        "“Ø”",
        "MENÜ™",
        "maçã”…",
        "crème brûlée",
        "Ð",
        "",
    ],
)
def test_genuine_letters_are_no_mojibake(text):
    assert fix_mojibake(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Â", "Â"),
        ("Â£5", "£5"),
        ("IÂ\xa0said", "I\xa0said"),
        ("voilÃ\xa0 Paul", "voilà Paul"),
        ("Ð’ Ð½", "В н"),
        ("sÃ»r", "sûr"),
        ("ÃŽle", "Île"),
        ("ðŸ˜€", "😀"),
    ],
)
def test_short_mojibake_sequences(text, expected):
    assert fix_mojibake(text) == expected
