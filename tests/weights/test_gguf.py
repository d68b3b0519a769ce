"""GGUF files: every type of value, alignments, blocks bit for bit as the package `gguf`, and what is refused."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights.gguf import BLOCKS, NUMBERS, Cursor, decode_blocks, read_gguf
from tests.weights.gguf_files import entry, text, value, whole

ONE = value("general.architecture", 8, text("llama"))
RAMP = np.arange(8, dtype=np.float32).tobytes()


def read(tmp_path, content: bytes):
    path = tmp_path / "trial.gguf"
    path.write_bytes(content)
    return read_gguf(path)


@pytest.mark.parametrize(("metadata_end", "alignment", "start"), [(64, 32, 64), (65, 32, 96), (65, 64, 128)])
def test_the_tensors_begin_at_the_next_multiple_of_the_alignment(tmp_path, metadata_end, alignment, start):
    # The table's last byte is placed where the test wants it, by a value of the right length.
    values = [] if alignment == 32 else [value("general.alignment", 4, struct.pack("<I", alignment))]
    table = [entry("t", (8,), 0, 0)]
    length = metadata_end - 24 - sum(map(len, values)) - len(table[0]) - len(value("", 8, text("")))
    while length < 0:
        length += alignment
        start += alignment
    content = whole([*values, value("", 8, text("x" * length))], table, RAMP, alignment=alignment)
    file = read(tmp_path, content)
    assert file.tensors["t"].start == start == content.index(RAMP)
    assert file.read("t").tolist() == list(range(8))
    assert gguf.GGUFReader(file.path).tensors[0].data_offset == start


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.one_of(
            st.booleans(),
            st.integers(-(2**31), 2**31 - 1),
            st.text(
                st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30
            ),  # it leaves empty ones out
            st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
            st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=1, max_size=5),
        ),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_values_that_the_package_writes_are_read_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("gguf") / "values.gguf"
    writer = gguf.GGUFWriter(path, "nothing")
    values.pop("general.architecture", None)
    values.pop("general.alignment", None)
    values.pop("split.count", None)
    for name, content in values.items():
        add = {bool: writer.add_bool, int: writer.add_int32, str: writer.add_string, list: writer.add_array}
        add[type(content)](name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_gguf(path).metadata == {"general.architecture": "nothing", **values}


def test_lists_within_lists_are_read_and_limited(tmp_path):
    inner = struct.pack("<IQ", 4, 2) + struct.pack("<II", 7, 8)
    nested = struct.pack("<IQ", 9, 2) + inner + inner
    assert read(tmp_path, whole([value("n", 9, nested)], [])).metadata["n"] == [[7, 8], [7, 8]]
    deep = struct.pack("<IQ", 9, 1) * 2000 + inner
    with pytest.raises(ValueError, match="at most 4 lists deep"):
        read(tmp_path, whole([value("n", 9, deep)], []))


GOOD = whole([ONE], [entry("t", (8,), 0, 0)], RAMP)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"GG", "the magic, at byte 0, has 4 bytes, but only 2 are left"),
        (b"GGML" + GOOD[4:], "begins with b'GGUF', this one with b'GGML'"),
        (GOOD[:4] + struct.pack("<I", 1) + GOOD[8:], "the version must be 2 or 3, got 1"),
        (GOOD[:4] + struct.pack(">I", 3) + GOOD[8:], "the version must be 2 or 3, got .* big-endian"),
        (GOOD[:20], "the counts, at byte 8, has 16 bytes"),
        (GOOD[:40], "name of value 0, at byte 32, has 20 bytes, but only 8 are left"),
        (GOOD[:-1], "the offset of t must be a multiple of 32 with 32 bytes of the file behind it, got 0"),
        (whole([ONE, ONE], []), "general.architecture stands twice in the metadata"),
        (whole([ONE], [], n_values=10**12), "the metadata cannot have 1000000000000 entries"),
        (whole([ONE], [], n_tensors=10**12), "the table of tensors cannot have 1000000000000 entries"),
        (whole([value("n", 8, struct.pack("<Q", 10**12))], []), "n, at byte .* has 1000000000000 bytes"),
        (whole([value("n", 9, struct.pack("<IQ", 4, 10**12))], []), "n, at byte .* has 4000000000000 bytes"),
        (whole([value("n", 9, struct.pack("<IQ", 8, 10**12))], []), "n cannot have 1000000000000 entries"),
        (whole([value("n", 13, b"\0" * 40)], []), "the type of n must be 0 to 12"),
        (whole([value("n", 8, struct.pack("<Q", 1) + b"\xff")], []), "n must be UTF-8"),
        (whole([ONE], [entry("t", (8,), 99, 0)], RAMP), "t: tensor type 99 is unknown"),
        (whole([ONE], [entry("t", (8,), 0, 8)], RAMP), "the offset of t must be a multiple of 32"),
        (whole([ONE], [entry("t", (8,), 0, 64)], RAMP), "the offset of t must be .* got 64"),
        (whole([ONE], [entry("t", (2**62, 2**62), 0, 0)], RAMP), "the offset of t must be"),
        (whole([ONE], [entry("t", (0,), 0, 0)], RAMP), "must be whole blocks of 1 numbers, got shape .0,."),
        (whole([ONE], [entry("t", (), 0, 0)], RAMP + RAMP), "t must have 1 to 4 dimensions, got 0"),
        (whole([ONE], [entry("t", (1,) * 5, 0, 0)], RAMP), "t must have 1 to 4 dimensions, got 5"),
        (whole([ONE], [entry("t", (8,), 0, 0)] * 2, RAMP), "t stands twice in the table of tensors"),
        (whole([ONE], [entry("t", (896,), 12, 0)], RAMP * 99), "whole blocks of 256 numbers, got shape .896"),
        (whole([value("general.alignment", 4, struct.pack("<I", 12))], []), "general.alignment must be"),
        (whole([value("general.alignment", 8, text("x"))], []), "general.alignment must be"),
        (whole([value("split.count", 2, struct.pack("<H", 3))], []), "cut into several files"),
    ],
)
def test_what_is_wrong_is_named_and_costs_nothing(tmp_path, content, message):
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, content)
    assert time.perf_counter() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert "trial.gguf" in str(caught.value)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_wrong_byte_is_a_value_error_or_another_valid_file(tmp_path_factory, place, byte):
    path = tmp_path_factory.mktemp("gguf") / "wrong.gguf"
    path.write_bytes(GOOD[:place] + bytes([byte]) + GOOD[place + 1 :])
    try:
        file = read_gguf(path)
        for name in file.tensors:
            file.read(name)
    except ValueError as error:
        assert str(path) in str(error) or "cannot be decoded" in str(error)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0"])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_blocks_are_decoded_bit_for_bit_as_the_package_does(kind, scale):
    numbers = np.random.default_rng(1).normal(size=(16, 512)).astype(np.float32) * scale
    numbers[0] = 0
    packed = gguf.quantize(numbers, GGMLQuantizationType[kind])
    reference = gguf.dequantize(packed, GGMLQuantizationType[kind]).astype(np.float32)
    ours = decode_blocks(kind, packed.view(np.uint8).reshape(-1))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference.reshape(-1))


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_bits_are_decoded_as_the_package_does(kind):
    raw = np.random.default_rng(2).integers(0, 256, 64 * BLOCKS[kind][1], dtype=np.uint8)
    with np.errstate(all="ignore"):
        reference = gguf.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32)
        ours = decode_blocks(kind, raw)
    np.testing.assert_array_equal(ours, reference.reshape(-1))  # NaN where the package has NaN


def test_our_sizes_of_blocks_are_those_of_the_package():
    for kind, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == sizes


def test_a_type_that_nobody_decodes_is_named():
    with pytest.raises(ValueError, match="tensors of type Q8_K cannot be decoded"):
        decode_blocks("Q8_K", np.zeros(292, dtype=np.uint8))


def test_rows_come_in_pieces_and_together_are_the_tensor(tmp_path):
    numbers = np.random.default_rng(3).normal(size=(10, 64)).astype(np.float32)
    packed = gguf.quantize(numbers, GGMLQuantizationType.Q8_0)
    file = read(tmp_path, whole([ONE], [entry("t", (64, 10), 8, 0)], packed.tobytes()))
    assert file.tensors["t"].shape == (10, 64)
    pieces = list(file.read_rows("t", piece=200))
    assert [(first, len(rows)) for first, rows in pieces] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    np.testing.assert_array_equal(file.read("t").numpy(), gguf.dequantize(packed, GGMLQuantizationType.Q8_0))


def test_a_cursor_never_passes_the_end():
    for kind in NUMBERS:
        with pytest.raises(ValueError, match="left"):
            Cursor(b"").number(kind, "it")
