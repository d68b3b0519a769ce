"""GGUF files of our own: every bit read back by ours and by the package `gguf`, the same tokens from llama.cpp."""

import errno
import itertools

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from shared.data.models import has_model, model_file
from shared.generation.engine import generate
from shared.model.gpt import GPTConfig
from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.text.chat_format import ChatFormat, chat_format_of
from shared.text.tokenizer import BPETokenizer
from shared.weights import files
from shared.weights.gguf import decode_blocks, read_gguf
from shared.weights.gguf_model import load_gguf, tokenizer_from_gguf
from shared.weights.gguf_writer import FILE_TYPES, encode_blocks, gguf_values, kind_of, write_gguf
from shared.weights.pretrained import load_pretrained, load_tokenizer
from tests.configurations import LLAMA
from tests.weights.llama_cpp import ask_llama_cpp, check_choices, needs_llama_cpp
from tests.weights.models import build, same_parameters

needs_smollm2 = pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")
# Rows of whole blocks, in all families that the format has.
WIDE = {"emb_dim": 64, "n_heads": 4, "vocab_size": 320, "context_length": 256}
FAMILIES = {
    "gpt2": {},
    "gpt2, untied": {"tie_weights": False, "feed_forward_dim": 96},
    "llama": {**LLAMA, "n_kv_heads": 2},
    "llama, biased": {**LLAMA, "bias": True, "qkv_bias": True, "tie_weights": False, "head_dim": 8},
    "linear": {**LLAMA, "rope_scaling": "linear", "rope_factor": 4.0, "rope_original_length": 64},
    "ntk": {**LLAMA, "rope_scaling": "ntk", "rope_factor": 4.0, "rope_original_length": 64},
    "yarn": {**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 64},
    "llama3": {
        **LLAMA,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_length": 8192,
        "rope_base": 5e5,
    },
    "qwen3": {**LLAMA, "qk_norm": True, "n_kv_heads": 1, "head_dim": 32},
    "mixtral": {**LLAMA, "feed_forward": "moe", "n_experts": 4, "feed_forward_dim": 96},
}
# The last is longer than the context that the scaled rotary positions were made for.
PROMPTS = [[5, 6, 7], [9], list(range(10, 27)), list(range(10, 120))]


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_blocks_are_those_of_the_package(kind):
    rng = np.random.default_rng(0)
    cases = [rng.normal(size=(2000, 64)) * scale for scale in (1e-6, 1, 100)]
    # Zeros, numbers half-way between two steps, and one that float32 rounds up when a half is added.
    cases += [np.zeros((2, 32)), rng.integers(-8, 9, (2000, 32)) / 4, rng.integers(-127, 128, (2000, 32)) / 2]
    cases += [np.full((1, 32), 0.49999997) * np.r_[127 / 0.49999997, np.ones(31)]]
    for numbers in cases:
        numbers = numbers.astype(np.float32)
        theirs = gguf.quantize(numbers, GGMLQuantizationType[kind]).view(np.uint8).reshape(-1)
        assert np.array_equal(encode_blocks(kind, numbers), theirs)
        back = gguf.dequantize(theirs, GGMLQuantizationType[kind]).astype(np.float32).reshape(-1)
        assert np.array_equal(decode_blocks(kind, encode_blocks(kind, numbers)), back)


def test_a_block_worked_out_by_hand():
    # Farthest is -4: a scale of 0.5; 0 is level 8, so -4 is 0, 1 is 10 and 3.5 is 15.
    numbers = np.zeros(32, np.float32)
    numbers[[0, 1, 16, 17]] = -4, 1, 3.5, -0.5
    raw = encode_blocks("Q4_0", numbers)
    assert raw[:2].view("<f2")[0] == 0.5
    assert raw[2:4].tolist() == [0 | 15 << 4, 10 | 7 << 4] and set(raw[4:].tolist()) == {0x88}
    assert np.array_equal(decode_blocks("Q4_0", raw), numbers)
    numbers[:3] = 127, -64, 0.6
    raw = encode_blocks("Q8_0", numbers)
    assert raw[:2].view("<f2")[0] == 1 and raw[2:5].view(np.int8).tolist() == [127, -64, 1]


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        ("Q8_0", np.ones(33), "whole blocks of 32, got 33"),
        ("Q4_0", np.r_[np.nan, np.ones(31)], "at most"),
        ("F32", np.r_[np.inf], "at most"),
        ("F16", np.r_[1e5], "at most 65504 for F16, got 100000"),
        ("Q4_1", np.ones(32), "kind must be one of F32, F16, Q8_0, Q4_0, got 'Q4_1'"),
    ],
)
def test_numbers_that_cannot_be_packed_are_refused(kind, numbers, message):
    with pytest.raises(ValueError, match=message):
        encode_blocks(kind, numbers.astype(np.float32))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_bit_for_bit(tmp_path, name):
    model = build(**WIDE | FAMILIES[name])
    kinds = write_gguf(model, tmp_path / "model.gguf", kind="F32")
    assert set(kinds.values()) == {"F32"}
    back = load_gguf(tmp_path / "model.gguf")
    assert same_parameters(model, back)
    ids = torch.randint(
        320, (2, 200), generator=torch.Generator().manual_seed(0)
    )  # far beyond the original context
    with torch.no_grad():
        torch.testing.assert_close(back(ids), model(ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_both_readers_find_the_same_numbers(tmp_path, name, kind):
    path = tmp_path / "model.gguf"
    kinds = write_gguf(build(**WIDE | FAMILIES[name]), path, kind=kind)
    ours = read_gguf(path)
    assert {tensor: stored.kind for tensor, stored in ours.tensors.items()} == kinds
    assert kind in kinds.values()
    theirs = gguf.GGUFReader(path)
    assert len(theirs.tensors) == len(kinds)
    for tensor in theirs.tensors:
        reference = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert np.array_equal(ours.read(tensor.name).numpy().reshape(reference.shape), reference)
        assert tensor.data_offset % 32 == 0


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "F32") for name in FAMILIES), ("gpt2", "F16"), ("llama", "F16")]
)
def test_llama_cpp_writes_the_same_tokens(tmp_path, small_tokenizer, name, kind):
    path = tmp_path / "model.gguf"
    write_gguf(build(**WIDE | FAMILIES[name]), path, small_tokenizer, kind=kind)
    texts = ["Hello  world", " ?", "it's 12 o'clock\n\n", "<|endoftext|>", "Grüße 😀"]
    theirs, ids = ask_llama_cpp(path, PROMPTS, texts)
    # llama.cpp looks GELU up in a table of 16 bits, so two nearly equal tokens may change places.
    check_choices(load_gguf(path), PROMPTS, theirs, room=0.1)
    # No begin token, no space in front, no special token from what somebody typed.
    assert ids == [small_tokenizer.encode_ordinary(text) for text in texts]


@pytest.fixture(scope="module")
def small_tokenizer() -> BPETokenizer:
    """286 tokens, with no more pairs to merge; the models have 320 rows, so 34 ids have no token."""
    return BPETokenizer.train("the lamp and the crow, the hill and the old mill " * 9 + "Hello hello", 300)


def test_the_tokenizer_comes_back(tmp_path, small_tokenizer):
    path = tmp_path / "model.gguf"
    chat = ChatFormat("You are brief.", start="<|endoftext|>", end="<|endoftext|>")
    with pytest.raises(ValueError, match="must have the token '<|im_end|>'".replace("|", r"\|")):
        write_gguf(build(**WIDE), path, small_tokenizer, chat_format=ChatFormat())
    assert not path.exists()
    write_gguf(build(**WIDE), path, small_tokenizer, chat_format=chat)
    file = read_gguf(path)
    tokenizer = tokenizer_from_gguf(file)
    for text in ("Hello  world", " ?", "it's 12 o'clock\n\n", "Grüße 😀", "<|endoftext|>"):
        assert tokenizer.encode_ordinary(text) == small_tokenizer.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.special_ids == small_tokenizer.special_ids
    assert file.metadata["tokenizer.ggml.tokens"][286:] == [f"[PAD{i}]" for i in range(286, 320)]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False
    assert file.metadata["tokenizer.ggml.add_space_prefix"] is False


def test_a_tied_model_stores_its_matrix_once(tmp_path):
    tied = write_gguf(build(**WIDE), tmp_path / "tied.gguf")
    untied = write_gguf(build(**WIDE, tie_weights=False), tmp_path / "untied.gguf")
    assert "output.weight" not in tied and "output.weight" in untied
    back = load_gguf(tmp_path / "tied.gguf")
    assert back.output_head.weight is back.token_embedding.weight
    other = load_gguf(tmp_path / "untied.gguf")
    assert not torch.equal(other.output_head.weight, other.token_embedding.weight)


def test_what_is_stored_how():
    assert kind_of("blk.0.ffn_down.weight", (64, 896), "Q4_0") == "Q4_0"
    assert kind_of("blk.0.ffn_down.weight", (64, 344), "Q4_0") == "F16"  # 344 is no multiple of 32
    assert kind_of("blk.0.ffn_down.weight", (64, 344), "F32") == "F32"
    assert kind_of("token_embd.weight", (96, 64), "Q4_0") == "Q8_0"
    assert kind_of("blk.0.attn_q.bias", (64,), "Q8_0") == "F32"
    assert kind_of("position_embd.weight", (64, 64), "Q8_0") == "F32"
    assert kind_of("blk.0.ffn_gate_inp.weight", (4, 64), "Q8_0") == "F32"


def test_rows_that_are_no_whole_blocks_stay_f16_and_are_named(tmp_path):
    kinds = write_gguf(load_pretrained("tales-1m"), tmp_path / "model.gguf", kind="Q8_0")
    assert {name for name, kind in kinds.items() if kind == "F16"} == {
        f"blk.{i}.ffn_down.weight" for i in range(4)
    }
    load_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**LLAMA, "window": 8}, "window must be None in a GGUF file, got 8"),
        ({"activation": "relu"}, "activation must be 'gelu_tanh' in a GGUF file, got 'relu'"),
        ({**LLAMA, "rope_interleaved": True}, "the family of config must be one of .*, got 'helium'"),
        ({"positions": "none"}, "config has no counterpart"),
        (
            {**LLAMA, "rope_scaling": "yarn", "rope_factor": 2.0, "rope_attention_factor": 1.5},
            "rope_attention_factor must be None",
        ),
        (
            {**LLAMA, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 64},
            "rope_original_length must be 8192",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_gguf(build(**WIDE | options), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_other_bad_input_leaves_nothing_behind(tmp_path, small_tokenizer, monkeypatch):
    model, path = build(**WIDE), tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="kind must be one of"):
        write_gguf(model, path, kind="Q4_K")
    with pytest.raises(ValueError, match="chat_format needs the tokenizer"):
        write_gguf(model, path, chat_format=ChatFormat())
    odd = BPETokenizer([], pattern=r"\S+|\s+")
    with pytest.raises(ValueError, match="the tokenizer's pattern must be one of"):
        write_gguf(build(**WIDE), path, odd)
    with pytest.raises(ValueError, match="at most the model's 96 tokens, got 286"):
        write_gguf(build(**WIDE | {"vocab_size": 96}), path, small_tokenizer)
    broken = build(**WIDE)
    broken.blocks[1].feed_forward.up.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="at most"):
        write_gguf(broken, path)

    def full(place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(model, path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="path must be new"):
        write_gguf(model, path)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_a_tale_model_round_trips(tmp_path, kind):
    model, path = load_pretrained("tales-tiny", dtype=torch.float32), tmp_path / "tales.gguf"
    encoding = tale_encoding()
    write_gguf(model, path, encoding, kind=kind, name="tales")
    back, tokenizer = load_pretrained(path), load_tokenizer(path)
    text = 'One windy night, Ingrid said: "It is 4 o\'clock."\n'
    assert tokenizer.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert tokenizer.merges == tale_tokenizer().merges
    # 20 greedy tokens, in a batch whose shorter prompt is padded at its left, too.
    prompts = [[2047], [2047, *encoding.encode_ordinary("In the week when")]]
    new = generate(back, prompts, 20)
    assert new == [row for prompt in prompts for row in generate(back, [prompt], 20)]
    if kind == "F32":
        assert new == generate(model, prompts, 20)
    same = sum(a == b for a, b in itertools.chain(*map(zip, new, generate(model, prompts, 20))))
    assert same >= {"F32": 40, "F16": 30, "Q8_0": 15, "Q4_0": 4}[kind]


@needs_llama_cpp
@needs_smollm2
def test_smollm2_written_by_us_is_read_by_llama_cpp(tmp_path):
    name, path = "smollm2-135m-instruct", tmp_path / "smol.gguf"
    model, tokenizer = load_pretrained(name), load_tokenizer(name)
    chat = chat_format_of(read_gguf(model_file(name)).metadata["tokenizer.chat_template"])
    write_gguf(model, path, tokenizer, kind="F16", chat_format=chat, name=name)
    questions = ("The capital of France is", "Once upon a time", "Water boils at 100 degrees")
    prompts = [tokenizer.encode_ordinary(text) for text in questions]
    texts = ["Hello  12 world", " ?", "<|im_end|>", "Grüße\n\n"]
    theirs, ids = ask_llama_cpp(path, prompts, texts)
    back = load_gguf(path)
    assert theirs == generate(back, prompts, 20)
    assert ids == [tokenizer.encode_ordinary(text) for text in texts]
    file = read_gguf(path)
    assert chat_format_of(file.metadata["tokenizer.chat_template"]) == chat
    assert file.metadata["tokenizer.ggml.eos_token_id"] == tokenizer.special_ids["<|im_end|>"]
    # What somebody typed stays text: two messages, one of which spells the token, have two of it.
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]
    written = chat.encode(tokenizer_from_gguf(file), messages, add_generation_prompt=False)
    assert written.count(tokenizer.special_ids["<|im_end|>"]) == 2 + (chat.default_system is not None)


def test_values_of_a_llama():
    architecture, values = gguf_values(GPTConfig(**LLAMA, **WIDE, n_layers=2, n_kv_heads=2, dropout=0.0))
    assert architecture == "llama"
    assert values["attention.head_count_kv"] == 2 and values["rope.dimension_count"] == 16
    assert values["feed_forward_length"] == 176 and "rope.scaling.type" not in values
