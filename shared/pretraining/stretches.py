"""Text files cut into stretches of bytes for jobs, and stretches into pieces that can be tokenized one by one.

No cut changes a token: it stands between two documents, or where no token of the usual patterns reaches across.
"""

from collections.abc import Iterator
from typing import BinaryIO

PIECE_BYTES = 1 << 20  # of text in memory at a time
HEAD_BYTES = 4096  # of a document that decide its side

# A stretch of a file: path, first byte, byte after the last, size of the file. The true ends are looked for by the
# job that reads it.
Stretch = tuple[str, int, int, int]


def plan_jobs(files: list[tuple[str, int]], job_bytes: int) -> list[list[Stretch]]:
    """Cut large files into stretches and gather small ones, to jobs of about `job_bytes`."""
    jobs: list[list[Stretch]] = [[]]
    room = job_bytes
    for path, size in files:
        for start in range(0, size, job_bytes):
            end = min(start + job_bytes, size)
            if jobs[-1] and end - start > room:
                jobs.append([])
                room = job_bytes
            jobs[-1].append((path, start, end, size))
            room -= end - start
    if not jobs[-1]:
        raise ValueError("the text files are empty")
    return jobs


def pieces(stretch: Stretch, separator: str | None) -> Iterator[tuple[bytes, bool]]:
    """Yield the text of a stretch in pieces, each with whether a document ends there.

    A document longer than a piece is cut before a space that follows a printable ASCII character: no token of the
    usual patterns reaches across such a place, so the ids are those of the whole.
    """
    path, start, end, size = stretch
    mark = separator.encode() if separator is not None else None
    with open(path, "rb") as file:
        # Where the stretch truly begins and ends, so that no token and no document is cut.
        start = _cut(file, start, mark) if start else 0
        end = _cut(file, end, mark) if end < size else size
        file.seek(start)

        left, buffer = end - start, b""
        while left > 0:
            data = file.read(min(PIECE_BYTES, left))
            if not data:
                raise ValueError(f"{path} became shorter while it was read")
            left -= len(data)
            buffer += data

            # Documents that end in what was read.
            if mark is not None:
                *documents, buffer = buffer.split(mark)
                yield from ((document, True) for document in documents)

            # Pieces of one that does not.
            while len(buffer) >= PIECE_BYTES and left:
                at = _last_safe_cut(buffer, len(buffer) - len(mark or b""))
                if not at and len(buffer) < 4 * PIECE_BYTES:
                    break  # no space in all of it: read on
                if not at:  # a script without spaces: anywhere between two characters
                    at = len(buffer) - len(mark or b"") - 1
                    while buffer[at] & 0xC0 == 0x80:
                        at -= 1
                yield buffer[:at], False
                buffer = buffer[at:]

        # The end of a stretch is the end of a document, unless the file is one and goes on.
        if buffer:
            yield buffer, mark is not None or end == size


def _last_safe_cut(buffer: bytes, limit: int) -> int:
    at = buffer.rfind(b" ", 1, limit)
    while at > 0 and not 0x21 <= buffer[at - 1] <= 0x7E:
        at = buffer.rfind(b" ", 1, at)
    return max(at, 0)


def _cut(file: BinaryIO, position: int, mark: bytes | None) -> int:
    """Return where the stretch after byte `position` begins: after a separator, or before a space as in `pieces`."""
    file.seek(position)
    buffer = b""
    while data := file.read(PIECE_BYTES):
        buffer += data
        if mark is not None:
            if (at := buffer.find(mark)) >= 0:
                return position + at + len(mark)
            drop = max(0, len(buffer) - len(mark) + 1)
        else:
            at = buffer.find(b" ", 1)
            while at > 0 and not 0x21 <= buffer[at - 1] <= 0x7E:
                at = buffer.find(b" ", at + 1)
            if at > 0:
                return position + at
            drop = len(buffer) - 1
        position, buffer = position + drop, buffer[drop:]
    return position + len(buffer)


def head_of(path: str) -> bytes:
    """Return the first bytes of a file, which decide the side of a document that is the whole file."""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)
