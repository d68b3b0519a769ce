"""`shared.pretraining.stretches`: files of every system have the tokens of one text, and are divided between words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.pretraining import stretches
from shared.pretraining.shards import tokenize
from shared.pretraining.stretches import Part, Stretch, head_of, pieces, plan_jobs, split_by_position
from shared.tales.encoding import tale_encoding
from shared.text.dataset import open_token_file

ENCODING = tale_encoding()
MARK = b"\xef\xbb\xbf"
LINE_ENDS = {"unix": b"\n", "windows": b"\r\n", "old mac": b"\r"}

words = st.text(st.sampled_from("ab é猫."), min_size=1, max_size=5).map(lambda text: "x" + text.strip())
lines = st.lists(words, min_size=1, max_size=5).map(" ".join)
documents = st.lists(st.lists(lines, min_size=1, max_size=3).map("\n".join), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    texts=documents,
    line_end=st.sampled_from(list(LINE_ENDS.values())),
    marked=st.booleans(),
    separated=st.booleans(),
    job_bytes=st.sampled_from([5, 30, 10_000]),
)
def test_line_ends_and_a_mark_change_no_token(
    texts, line_end, marked, separated, job_bytes, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("texts")
    text = "\n\n\n".join(texts)
    written = MARK * marked + text.encode().replace(b"\n", line_end)
    (folder / "a.txt").write_bytes(written)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretches, "PIECE_BYTES", 16)
        patch.setattr(stretches, "_last_safe_cut", wait)
        found = tokenize(
            [folder],
            folder / "shards",
            "tales",
            separator="\n\n\n" if separated else None,
            job_bytes=job_bytes,
        )
    expected = [
        token
        for document in (texts if separated else [text])
        for token in (*ENCODING.encode_ordinary(document), ENCODING.eot_token)
    ]
    assert np.concatenate([open_token_file(path) for path in found.train]).tolist() == expected


real_cut = stretches._last_safe_cut


def wait(buffer: bytes, limit: int) -> int:
    """Cut as the module does, but never where it would cut a text without spaces anywhere."""
    stretches.PIECE_BYTES = max(16, len(buffer))
    return real_cut(buffer, limit)


@pytest.mark.parametrize("line_end", LINE_ENDS.values(), ids=LINE_ENDS)
def test_a_separator_is_found_whatever_the_line_ends_are(line_end, tmp_path):
    documents = [f"Story {i}.\nIt has\ntwo lines." for i in range(40)]
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + "\n\n\n".join(documents).encode().replace(b"\n", line_end))
    for separator in ("\n\n\n", "\r\n\r\n\r\n"):
        found = tokenize([path], tmp_path / "shards", "tales", separator=separator, job_bytes=100)
        ids = np.concatenate([open_token_file(shard) for shard in found.train]).tolist()
        assert ENCODING.decode(ids).split("<|endoftext|>") == [*documents, ""]
        assert len(found.train) > 5  # cut into jobs at separators, not all in the first


def test_the_side_of_a_document_does_not_depend_on_line_ends(tmp_path):
    text = "A line.\n" * 2000
    heads = set()
    for name, line_end in LINE_ENDS.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(MARK + text.encode().replace(b"\n", line_end))
        heads.add(head_of(str(path)))
    assert heads == {text.encode()[: stretches.HEAD_BYTES]}


@pytest.mark.parametrize("text", ["the quick brown fox jumps " * 50, "猫在垫子上" * 100, "a\r\n" * 300])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
def test_a_file_is_divided_between_words_or_characters(text, fraction, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    size = len(text.encode())
    at = split_by_position(str(path), size, fraction)
    assert abs((size - at) - fraction * size) < 0.55 * fraction * size + 4
    before, after = text.encode()[:at].decode(), text.encode()[at:].decode()  # no character is cut
    assert not (before.endswith("\r") and after.startswith("\n"))
    if " " in text:
        assert after.startswith(" ") and not before.endswith(" ")
        halves = ENCODING.encode_ordinary(before) + ENCODING.encode_ordinary(after)
        assert halves == ENCODING.encode_ordinary(text)


@pytest.mark.parametrize("content", [b"", b"a"])
def test_what_cannot_be_divided_stays_whole(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    assert split_by_position(str(tmp_path / "a.txt"), len(content), 0.5) == len(content)


def test_a_part_ends_where_the_next_begins(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two three four five six seven eight nine ten")
    middle = split_by_position(str(path), path.stat().st_size, 0.4)
    texts = []
    for first, last in ((0, middle), (middle, path.stat().st_size)):
        [*jobs] = plan_jobs([Part(str(path), first, last)], 6)
        found = [piece for job in jobs for stretch in job for piece in pieces(stretch, None)]
        assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True]
        texts.append(b"".join(piece for piece, _ in found))
    assert b"".join(texts) == path.read_bytes() and len(texts[1]) > 10


def test_a_file_that_becomes_shorter_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"a\.txt became shorter while it was read"):
        list(pieces(Stretch(Part(str(tmp_path / "a.txt"), 0, 9), 0, 9), None))
