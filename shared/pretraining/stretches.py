"""Text files cut into stretches of bytes for jobs, and stretches into pieces that can be tokenized one by one.

Files come from every system: the three line ends (\\r\\n, \\r and \\n) are read as \\n, and a byte-order mark at the
beginning of a file is no text. Cuts stand between two documents, or where no token of the usual patterns reaches
across, so that they change no token; only a text without any space is cut anywhere between two characters.
"""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

PIECE_BYTES = 1 << 20  # of text in memory at a time
HEAD_BYTES = 4096  # of a document that decide its side


class Part(NamedTuple):
    """The bytes `first` to `last` - 1 of a file, and the side that they are for; None: each document decides."""

    path: str
    first: int
    last: int
    side: str | None = None


class Stretch(NamedTuple):
    """The bytes `start` to `end` - 1 of a part, about: the true ends are looked for by the job that reads them."""

    part: Part
    start: int
    end: int


def plan_jobs(parts: list[Part], job_bytes: int) -> list[list[Stretch]]:
    """Cut large parts into stretches and gather small ones, to jobs of about `job_bytes`."""
    jobs: list[list[Stretch]] = [[]]
    room = job_bytes
    for part in parts:
        for start in range(part.first, part.last, job_bytes):
            end = min(start + job_bytes, part.last)
            if jobs[-1] and end - start > room:
                jobs.append([])
                room = job_bytes
            jobs[-1].append(Stretch(part, start, end))
            room -= end - start
    if not jobs[-1]:
        raise ValueError("the text files are empty")
    return jobs


def split_by_position(path: str, size: int, fraction: float) -> int:
    """Return the byte at which about the last `fraction` of a file begins: before a space, or between two characters.

    Equal files are cut at equal places.
    """
    target = min(round(size * (1 - fraction)), size - 1)
    if target < 1:
        return size  # nothing to divide
    with open(path, "rb") as file:
        at = _cut(file, target, None)
        if at <= target + (size - target) // 2:
            return at
        # A text with hardly a space: the next character, but not one inside of a line end.
        file.seek(target - 1)
        near = file.read(8)
    skip = 1
    while skip < len(near) and (near[skip] & 0xC0 == 0x80 or near[skip - 1 : skip + 1] == b"\r\n"):
        skip += 1
    return target - 1 + skip


def with_unix_line_ends(data: bytes) -> bytes:
    """Return the bytes of a text with \\n as its only line end."""
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def pieces(stretch: Stretch, separator: str | None) -> Iterator[tuple[bytes, bool]]:
    """Yield the text of a stretch in pieces, each with whether a document ends there.

    A document longer than a piece is cut before a space that follows a printable ASCII character: no token of the
    usual patterns reaches across such a place, so the ids are those of the whole.

    Args:
        stretch: Of a file.
        separator: What stands between two documents, with \\n as its only line end; None: the part of the file is one.
    """
    part = stretch.part
    mark = separator.encode() if separator is not None else None
    with open(part.path, "rb") as file:
        # Where the stretch truly begins and ends, so that no token and no document is cut.
        start, end = stretch.start, stretch.end
        start = min(_cut(file, start, mark), part.last) if start > part.first else start
        end = min(_cut(file, end, mark), part.last) if end < part.last else end

        buffer = b""
        for data, more in _read(file, part.path, start, end):
            buffer += data

            # Documents that end in what was read.
            if mark is not None:
                *documents, buffer = buffer.split(mark)
                yield from ((document, True) for document in documents)

            # Pieces of one that does not.
            while len(buffer) >= PIECE_BYTES and more:
                at = _last_safe_cut(buffer, len(buffer) - len(mark or b""))
                if not at and len(buffer) < 4 * PIECE_BYTES:
                    break  # no space in all of it: read on
                if not at:  # a script without spaces: anywhere between two characters
                    at = len(buffer) - len(mark or b"") - 1
                    while buffer[at] & 0xC0 == 0x80:
                        at -= 1
                yield buffer[:at], False
                buffer = buffer[at:]

        # The end of a stretch is the end of a document, unless the part is one and goes on.
        if buffer:
            yield buffer, mark is not None or end == part.last


def _read(file: BinaryIO, path: str, start: int, end: int) -> Iterator[tuple[bytes, bool]]:
    """Yield the bytes of a text file from `start` to `end`, line ends unified, each with whether more come."""
    file.seek(start)
    left, held = end - start, b""
    while left > 0:
        data = file.read(min(PIECE_BYTES, left))
        if not data:
            raise ValueError(f"{path} became shorter while it was read")
        is_beginning = left == end  # of the file: all of it up to `end` is left
        left -= len(data)
        if is_beginning:
            data = data.removeprefix(codecs.BOM_UTF8)

        # The last \r waits for what follows: \r\n is one line end.
        data = held + data
        held = data[-1:] if left > 0 and data.endswith(b"\r") else b""
        yield with_unix_line_ends(data[: len(data) - len(held)]), left > 0


def _last_safe_cut(buffer: bytes, limit: int) -> int:
    at = buffer.rfind(b" ", 1, limit)
    while at > 0 and not 0x21 <= buffer[at - 1] <= 0x7E:
        at = buffer.rfind(b" ", 1, at)
    return max(at, 0)


def _cut(file: BinaryIO, position: int, mark: bytes | None) -> int:
    """Return where the stretch after byte `position` begins: after a separator, or before a space as in `pieces`."""
    # In the file, each line end of the separator may be any of the three.
    pattern = rb"(?>\r\n|\r|\n)".join(map(re.escape, mark.split(b"\n"))) if mark is not None else b""
    longest = len(mark) + mark.count(b"\n") if mark is not None else 0

    file.seek(position)
    buffer = b""
    while data := file.read(PIECE_BYTES):
        buffer += data
        if mark is not None:
            if found := re.search(pattern, buffer):
                return _after_line_end(file, position + found.end())
            drop = max(0, len(buffer) - longest + 1)
        else:
            at = buffer.find(b" ", 1)
            while at > 0 and not 0x21 <= buffer[at - 1] <= 0x7E:
                at = buffer.find(b" ", at + 1)
            if at > 0:
                return position + at
            drop = len(buffer) - 1
        position, buffer = position + drop, buffer[drop:]
    return position + len(buffer)


def _after_line_end(file: BinaryIO, position: int) -> int:
    """Return `position`, or the next one where it stands between the two bytes of a line end."""
    file.seek(position - 1)
    return position + (file.read(2) == b"\r\n")


def head_of(path: str) -> bytes:
    """Return the beginning of a text file, which decides the side of a document that is the whole file."""
    with open(path, "rb") as file:
        # Enough for a mark, and for line ends of which each is two bytes.
        data = file.read(2 * HEAD_BYTES + len(codecs.BOM_UTF8))
    return with_unix_line_ends(data.removeprefix(codecs.BOM_UTF8))[:HEAD_BYTES]
