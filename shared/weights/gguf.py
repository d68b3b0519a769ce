"""GGUF files read by hand: values, table of tensors, and numbers in packed blocks.

`read_gguf` reads everything but the numbers and checks each length, count and place before it is used, so
a damaged or forged file is an error that says what is wrong, and costs no memory. `GGUFFile.read_rows`
decodes a few rows at a time.

Left out: versions before 2, big-endian files, models in several files, and writing. Types other than
those in `BLOCKS` are decoded by the package `gguf`.

Follows the description of the format in llama.cpp (Gerganov et al., 2023), versions 2 and 3.

Explained and proven in ch05_pretraining/07_a_real_model.ipynb; written from there by `make promote`.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

# The types of values: their number in the file -> how `struct` writes them. 8 is a text, 9 a list.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
DEEPEST = 4  # lists within lists: a forged file could nest them until Python gives up


class Cursor:
    """A place in a file that moves on as it is read, and never beyond the end.

    Args:
        data: The bytes of the file, such as a memory map, of which only what is read is loaded.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.position = data, 0

    def take(self, n_bytes: int, what: str) -> bytes:
        """Return the next bytes. Raises ValueError, before anything is read, if the file has not so many."""
        start, end = self.position, self.position + n_bytes
        if end > len(self.data):
            left = len(self.data) - start
            raise ValueError(f"{what}, at byte {start}, has {n_bytes} bytes, but only {left} are left")
        self.position = end
        return self.data[start:end]

    def numbers(self, kind: int, count: int, what: str) -> tuple:
        """Return `count` numbers of a type in `NUMBERS`."""
        letter = NUMBERS[kind]
        raw = self.take(count * struct.calcsize(f"<{letter}"), what)
        return struct.unpack(f"<{count}{letter}", raw)

    def number(self, kind: int, what: str) -> int | float | bool:
        """Return one number of a type in `NUMBERS`."""
        return self.numbers(kind, 1, what)[0]

    def text(self, what: str) -> str:
        """Return a text: its length in eight bytes, then UTF-8."""
        raw = self.take(self.number(10, what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} must be UTF-8: {error}") from None

    def value(self, what: str, kind: int, depth: int = 0) -> object:
        """Return a value of any type: a number, a text, or a list of values of one type."""
        if kind in NUMBERS:
            return self.number(kind, what)
        if kind == TEXT:
            return self.text(what)
        if kind != LIST or depth == DEEPEST:
            raise ValueError(f"the type of {what} must be 0 to 12, at most {DEEPEST} lists deep, got {kind}")
        kind, count = self.number(4, what), self.number(10, what)
        if kind in NUMBERS:
            return list(self.numbers(kind, count, what))
        self.check_count(count, 8, what)
        return [self.value(what, kind, depth + 1) for _ in range(count)]

    def check_count(self, count: int, smallest: int, what: str) -> None:
        """Refuse a number of entries for which the rest of the file is too short, at `smallest` bytes each."""
        left = len(self.data) - self.position
        if count * smallest > left:
            raise ValueError(f"{what} cannot have {count} entries: only {left} bytes are left")


# Name of a type -> numbers in a block, bytes of a block. These are decoded here, all others by the package `gguf`.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
}


def block_of(number: int) -> tuple[str, int, int]:
    """Return a tensor type by its number in the file: its name, the numbers in a block, the bytes of a block."""
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"tensor type {number} is unknown") from None
    return kind.name, *GGML_QUANT_SIZES[kind]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file, and how to read it.

    Attributes:
        shape: Rows first, as in PyTorch.
        kind: Name of its type, such as "Q4_1".
        start: Its first byte, counted from the beginning of the file.
        n_bytes: How many bytes it takes.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    n_bytes: int


def read_entry(cursor: Cursor, number: int) -> tuple[str, tuple[int, ...], int, int]:
    """Read one line of the table of tensors: name, shape with rows first, number of the type, offset."""
    name = cursor.text(f"the name of tensor {number}")
    n_dims = cursor.number(4, f"the number of dimensions of {name}")
    if not 1 <= n_dims <= 4:
        raise ValueError(f"{name} must have 1 to 4 dimensions, got {n_dims}")
    shape = cursor.numbers(10, n_dims, f"the shape of {name}")[::-1]
    return name, shape, cursor.number(4, f"the type of {name}"), cursor.number(10, f"the offset of {name}")


def place_of(
    name: str, shape: tuple[int, ...], type_number: int, offset: int, area: tuple[int, int], alignment: int
) -> StoredTensor:
    """Return where a tensor lies; ValueError if that is no place in the area, from its first byte to its end."""
    try:
        kind, numbers, n_bytes = block_of(type_number)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not math.prod(shape) or shape[-1] % numbers:
        raise ValueError(f"the rows of {name} must be whole blocks of {numbers} numbers, got shape {shape}")
    size, (start, end) = math.prod(shape) // numbers * n_bytes, area
    if offset % alignment or start + offset + size > end:
        allowed = f"a multiple of {alignment} with {size} bytes of the file behind it"
        raise ValueError(f"the offset of {name} must be {allowed}, got {offset}")
    return StoredTensor(shape, kind, start + offset, size)


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says about itself; its tensors are read when they are asked for.

    Attributes:
        path: The file.
        metadata: Name -> number, text, bool, or a list of them.
        tensors: Name -> where it lies.
    """

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, StoredTensor]

    def read_rows(self, name: str, piece: int = 2_000_000) -> Iterator[tuple[int, Tensor]]:
        """Yield rows of a tensor as float32, about `piece` numbers at a time, after the number of the first."""
        stored = self.tensors[name]
        n_rows, *rest = stored.shape
        row_bytes, step = stored.n_bytes // n_rows, max(1, piece // math.prod(rest))
        for first in range(0, n_rows, step):
            n = min(step, n_rows - first)
            raw = np.fromfile(self.path, np.uint8, n * row_bytes, offset=stored.start + first * row_bytes)
            yield first, torch.from_numpy(decode_blocks(stored.kind, raw)).view(n, *rest)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor as float32."""
        return torch.cat([rows for _, rows in self.read_rows(name)])


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read everything of a GGUF file but the numbers of its tensors.

    Raises:
        ValueError: The file is none, ends too early, has another version or byte order, or says something that cannot
            be; the message names the file and what is wrong.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    try:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = read_header(Cursor(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return GGUFFile(path, metadata, tensors)


def read_header(cursor: Cursor) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    """Read what stands before the tensors; return the values and the places of the tensors, by their names."""
    # Is it a file that can be read at all?
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise ValueError(f"a GGUF file begins with b'GGUF', this one with {magic!r}")
    version = cursor.number(4, "the version")
    if version not in (2, 3):
        turned = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = " (its bytes are big-endian)" if turned in (2, 3) else ""
        raise ValueError(f"the version must be 2 or 3, got {version}{hint}")
    n_tensors, n_values = cursor.numbers(10, 2, "the counts")
    # The values: each takes at least 13 bytes.
    cursor.check_count(n_values, 13, "the metadata")
    metadata: dict[str, object] = {}
    for number in range(n_values):
        name = cursor.text(f"the name of value {number}")
        if name in metadata:
            raise ValueError(f"{name} stands twice in the metadata")
        metadata[name] = cursor.value(name, cursor.number(4, f"the type of {name}"))
    if metadata.get("split.count", 1) != 1:
        raise ValueError("the model is cut into several files; join them with llama.cpp's llama-gguf-split")
    # The table: each line takes at least 32 bytes.
    cursor.check_count(n_tensors, 32, "the table of tensors")
    table = [read_entry(cursor, number) for number in range(n_tensors)]
    # The tensors begin at the next multiple of the alignment.
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise ValueError(f"general.alignment must be a multiple of 8, got {alignment!r}")
    area = (-(-cursor.position // alignment) * alignment, len(cursor.data))
    tensors: dict[str, StoredTensor] = {}
    for name, shape, type_number, offset in table:
        if name in tensors:
            raise ValueError(f"{name} stands twice in the table of tensors")
        tensors[name] = place_of(name, shape, type_number, offset, area, alignment)
    return metadata, tensors


def decode_blocks(kind: str, raw: np.ndarray) -> np.ndarray:
    """Return the numbers of whole blocks, float32 (numbers,).

    Args:
        kind: A name in `BLOCKS`, or another type that the package `gguf` can decode.
        raw: uint8 (bytes,).

    Raises:
        ValueError: Nobody here can decode the type.
    """
    if kind in ("F32", "F16"):
        return raw.view("<f4" if kind == "F32" else "<f2").astype(np.float32)
    if kind == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind not in BLOCKS:
        try:
            return gguf.dequantize(raw, GGMLQuantizationType[kind]).reshape(-1)
        except NotImplementedError:
            raise ValueError(f"tensors of type {kind} cannot be decoded") from None
    # Each block begins with its scale, in Q4_1 followed by its smallest number.
    blocks = raw.reshape(-1, BLOCKS[kind][1])
    n_head = 4 if kind == "Q4_1" else 2
    head = blocks[:, :n_head].copy().view("<f2").astype(np.float32)  # (blocks, 1 or 2)
    packed = blocks[:, n_head:]
    if kind == "Q8_0":
        return (packed.view(np.int8) * head).reshape(-1)
    # The lower halves are the first 16 numbers of a block, the upper halves the last 16.
    steps = np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.float32)  # (blocks, 32)
    if kind == "Q4_0":
        return ((steps - 8) * head).reshape(-1)
    return (steps * head[:, :1] + head[:, 1:]).reshape(-1)
