"""GGUF files of our models: numbers packed in blocks, values, tokenizer and chat template.

`encode_blocks` packs, `write_gguf` writes a file. What llama.cpp would compute otherwise than we do is
refused. `shared.weights.gguf` and `shared.weights.gguf_model` read the files back.

Left out: other kinds than F32, F16, Q8_0 and Q4_0, models in several files, windows, and architectures
other than `gpt2`, `llama` (Llama, Mistral, Mixtral) and `qwen3`.

Follows llama.cpp's `convert_hf_to_gguf.py` and its package `gguf`, whose bits it writes.

Explained and proven in deployment/02_export_and_local.ipynb; written from there by `make promote`.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import gguf
import numpy as np
import tiktoken
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor

from shared.checks import choose
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.positions import rotary_inverse_frequencies, scaled_rotary_frequencies
from shared.text.chat_format import ChatFormat, chat_template
from shared.text.merges import BYTE_TO_UNICODE
from shared.text.tokenizer import BPETokenizer
from shared.weights.configs import config_to_hf
from shared.weights.files import new_file
from shared.weights.gguf import BLOCKS
from shared.weights.gguf_model import GPT2_FIELDS, LLAMA_FIELDS, PATTERNS, gguf_targets
from shared.weights.huggingface import last_merge
from shared.weights.names import unwrap

# Kind of the matrices -> what a file calls itself.
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}


def encode_blocks(kind: str, numbers: np.ndarray) -> np.ndarray:
    """Return numbers packed as whole blocks, uint8 (bytes,): what `decode_blocks` reads.

    Args:
        kind: A name in `FILE_TYPES`.
        numbers: float32, any shape; for Q8_0 and Q4_0 whole blocks of 32.

    Raises:
        ValueError: The kind is unknown, the numbers are no whole blocks, or one is not finite or beyond what F16 holds.
    """
    choose("kind", kind, FILE_TYPES)
    numbers = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1)
    check_range(kind, numbers)
    if kind in ("F32", "F16"):
        return numbers.astype("<f4" if kind == "F32" else "<f2").view(np.uint8)
    # The scale: of eight bits, 127 steps reach the farthest number; of four, eight steps to the side where it lies.
    blocks = numbers.reshape(-1, 32)
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)  # (blocks, 1)
    scale = np.abs(farthest) / np.float32(127) if kind == "Q8_0" else farthest / np.float32(-8)
    usable = np.abs(scale) >= np.finfo(np.float32).tiny  # of a block of zeros, nothing is divided
    steps = blocks * np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)
    # To the nearest step, and two steps of four bits into one byte.
    if kind == "Q8_0":
        whole = np.floor(np.abs(steps))
        rounded = whole + (np.abs(steps) - whole >= 0.5)  # halves go away from zero, as in llama.cpp
        packed = np.copysign(rounded, steps).astype(np.int8).view(np.uint8)
    else:
        levels = np.trunc(steps + np.float32(8.5)).clip(0, 15).astype(np.uint8)
        packed = levels[:, :16] | levels[:, 16:] << 4
    return np.concatenate((scale.astype("<f2").view(np.uint8), packed), axis=1).reshape(-1)


def check_range(kind: str, numbers: np.ndarray) -> None:
    """Refuse numbers that a kind cannot hold (ValueError): no whole blocks, not finite, too large for a float16."""
    size = BLOCKS[kind][0]
    if numbers.size % size:
        raise ValueError(f"numbers must be whole blocks of {size}, got {numbers.size}")
    largest = np.abs(numbers).max(initial=0.0)
    allowed = {"F32": np.finfo(np.float32).max, "F16": 65_504, "Q8_0": 65_504 * 127, "Q4_0": 65_504 * 8}[kind]
    if not largest <= allowed:
        raise ValueError(f"numbers must be at most {allowed:g} for {kind}, got {largest}")


def gguf_values(config: GPTConfig) -> tuple[str, dict[str, object]]:
    """Return the architecture and the values, without its name in front, with which llama.cpp computes the same.

    Raises ValueError if there is none, or llama.cpp would ignore what the configuration asks for.
    """
    values = config_to_hf(config)
    family = str(values["model_type"])
    names = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen3": "qwen3"}
    architecture = choose("the family of config", family, names)
    # llama.cpp has one activation for GPT-2, and no windows and no second factor in these architectures.
    for field, allowed in (("window", None), ("rope_attention_factor", None), ("activation", "gelu_tanh")):
        if getattr(config, field) != allowed:
            raise ValueError(f"{field} must be {allowed!r} in a GGUF file, got {getattr(config, field)!r}")
    # The fields of Hugging Face under llama.cpp's names.
    values |= values.pop("rope_parameters", {})
    if family == "gpt2":
        values["n_inner"] = values["n_inner"] or 4 * config.emb_dim
    elif values["rope_type"] in ("default", "llama3"):  # of Llama 3 the divisors are a tensor
        for field in ("rope_type", "factor", "original_max_position_embeddings"):
            values.pop(field, None)
    fields = GPT2_FIELDS if family == "gpt2" else LLAMA_FIELDS
    found = {name: values[theirs] for theirs, name in fields.items() if values.get(theirs) is not None}
    if family != "gpt2":
        found |= dict.fromkeys(("attention.value_length", "rope.dimension_count"), config.actual_head_dim)
    return architecture, found | {"vocab_size": config.vocab_size}


def rotary_divisors(config: GPTConfig) -> np.ndarray | None:
    """Return by what Llama 3's scaling divides each frequency, float32 (head_dim / 2,); None without it."""
    if config.rope_scaling != "llama3":
        return None
    length = config.rope_original_length or config.context_length
    if length != 8192:
        raise ValueError(f"rope_original_length must be 8192 for 'llama3' in a GGUF file, got {length}")
    head_dim, base = config.actual_head_dim, config.rope_base
    scaled, _ = scaled_rotary_frequencies("llama3", head_dim, base, config.rope_factor, length)
    return (rotary_inverse_frequencies(head_dim, base) / scaled).float().numpy()


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return how a tensor is stored in a file of this kind.

    Vectors, learned positions and the router of experts stay F32. In a file of four bits the embedding and the head
    have eight. A row that is no whole block makes its matrix F16.
    """
    if len(shape) == 1 or name.startswith("position_embd") or "ffn_gate_inp" in name:
        return "F32"
    if kind == "Q4_0" and name.startswith(("token_embd", "output.")):
        kind = "Q8_0"
    return kind if shape[-1] % BLOCKS[kind][0] == 0 else "F16"


def ordered_rows(views: list[tuple[Tensor, Tensor | None]]) -> Iterator[np.ndarray]:
    """Yield the views of `gguf_targets` as float32 arrays, their rows in the order of the file."""
    for view, order in views:
        rows = view if order is None else view[order]
        yield rows.float().cpu().numpy()


def add_tokenizer(
    writer: GGUFWriter, tokenizer: BPETokenizer | tiktoken.Encoding, vocab_size: int, chat: ChatFormat | None
) -> None:
    """Write a tokenizer into the values of a file: tokens, kinds, merges, special ids, chat template.

    Raises ValueError if it cuts text by a pattern that has no name in `PATTERNS`, has more tokens than the model or
    lacks a special token.
    """
    # The name of its pattern, by which a reader knows how to cut text.
    encoding = tokenizer.to_tiktoken() if isinstance(tokenizer, BPETokenizer) else tokenizer
    names = {pattern: name for name, pattern in PATTERNS.items()}
    pattern = choose("the tokenizer's pattern", encoding._pat_str, names)
    # Its tokens, as visible characters; what nobody has named is filled up, as the model has a row for it.
    special = encoding._special_tokens
    ranks = {token: i for token, i in encoding._mergeable_ranks.items() if i < tokenizer.n_vocab}
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(
            f"tokenizer must have at most the model's {vocab_size} tokens, got {tokenizer.n_vocab}"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    shown = {
        token: "".join(BYTE_TO_UNICODE[byte] for byte in token) for token in sorted(ranks, key=ranks.get)
    }
    for token, text in shown.items():
        tokens[ranks[token]], kinds[ranks[token]] = text, TokenType.NORMAL
    for text, i in special.items():
        tokens[i], kinds[i] = text, TokenType.CONTROL
    # The merges, in their order.
    if isinstance(tokenizer, BPETokenizer):
        pairs = tokenizer.merges
    else:
        pairs = [last_merge(token, ranks) for token in shown if len(token) > 1]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [" ".join("".join(BYTE_TO_UNICODE[b] for b in part) for part in pair) for pair in pairs]
    )
    # What ends a text, and a turn; nothing is put in front of a text.
    end = tokenizer.eot_token
    if chat is not None and chat.end not in special:
        raise ValueError(f"tokenizer must have the token {chat.end!r} of the chat format")
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end if chat is None else special[chat.end])
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if chat is not None:
        writer.add_chat_template(chat_template(chat))


def add_values(writer: GGUFWriter, name: str, kind: str, values: Mapping[str, object]) -> None:
    """Write what the model is called, how it is stored, and the values of `gguf_values`."""
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for field, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{writer.arch}.{field}", value)


def add_entry(writer: GGUFWriter, name: str, views: list[tuple[Tensor, Tensor | None]], kind: str) -> str:
    """Write a line of the table, name, shape, kind and size of a tensor; return its kind."""
    shape = tuple(views[0][0].shape)
    shape = (len(views), *shape) if "_exps." in name else shape
    stored = kind_of(name, shape, kind)
    numbers, n_bytes = BLOCKS[stored]
    size = math.prod(shape) // numbers * n_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, GGMLQuantizationType[stored])
    return stored


def write_gguf(
    model: GPTModel,
    path: str | os.PathLike[str],
    tokenizer: BPETokenizer | tiktoken.Encoding | None = None,
    *,
    kind: str = "Q8_0",
    chat_format: ChatFormat | None = None,
    name: str = "model",
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, str]:
    """Write a model into one GGUF file, with the tokenizer and the chat template inside.

    Args:
        model: Of a configuration that `gguf_values` knows. It may be wrapped, see `unwrap`.
        path: The file must not exist; it appears when it is complete.
        tokenizer: The model's own, of GPT-2's kind; without one the file holds numbers only.
        kind: How matrices are stored, a name in `FILE_TYPES`; exceptions are those of `kind_of`.
        chat_format: How the model was taught to read messages; needs the tokenizer.
        name: What the model is called in the file.
        progress: Wraps the names of the tensors as they are written, such as tqdm.

    Returns:
        The kind of each tensor, by its name in the file.

    Raises:
        ValueError: Configuration, tokenizer or a number cannot be written; it says which.
        FileExistsError: The file exists.
        OSError: It cannot be written; nothing is left of it.
    """
    # Everything that may be refused comes before the first byte.
    choose("kind", kind, FILE_TYPES)
    if chat_format is not None and tokenizer is None:
        raise ValueError("chat_format needs the tokenizer beside it")
    model = unwrap(model)
    architecture, values = gguf_values(model.config)
    targets = gguf_targets(model, architecture)
    divisors = rotary_divisors(model.config)
    with new_file(path) as part:
        writer = GGUFWriter(part, architecture)
        try:
            # Values and table.
            add_values(writer, name, kind, values)
            if tokenizer is None:
                writer.add_tokenizer_model("none")
            else:
                add_tokenizer(writer, tokenizer, model.config.vocab_size, chat_format)
            kinds = {tensor: add_entry(writer, tensor, views, kind) for tensor, views in targets.items()}
            if divisors is not None:
                kinds["rope_freqs.weight"] = "F32"
                writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
            # The numbers, a tensor at a time.
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in progress(targets):
                parts = [encode_blocks(kinds[tensor], rows) for rows in ordered_rows(targets[tensor])]
                writer.write_tensor_data(np.concatenate(parts))
            if divisors is not None:
                writer.write_tensor_data(divisors)
        finally:
            writer.close()
    return kinds
