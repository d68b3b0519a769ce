"""From a GGUF file to a `GPTModel` and its tokenizer: configuration, names, the rows of queries and keys,
vocabulary.

`load_gguf` returns the model, `tokenizer_from_gguf` the tokenizer. Architectures: `gpt2`, `llama` (Llama,
Mistral, Mixtral) and `qwen3`.

Left out: other architectures, SentencePiece vocabularies, rotary scalings that Hugging Face's
configuration cannot say, and computing with packed numbers: they become float32 or another type of torch.

Follows the converter of llama.cpp, `convert_hf_to_gguf.py`.

Explained and proven in ch05_pretraining/07_a_real_model.ipynb; written from there by `make promote`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shared.checks import check_choice, choose
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.positions import rotary_inverse_frequencies, scaled_rotary_frequencies
from shared.text.renumbered import RenumberedTokenizer
from shared.text.tokenizer import GPT2_PATTERN, UNICODE_TO_BYTE
from shared.weights.configs import config_from_hf
from shared.weights.files import empty_model
from shared.weights.gguf import GGUFFile, read_gguf
from shared.weights.names import named_parts


def gguf_rows(n_rows: int, head_dim: int) -> Tensor:
    """Return, for each row of a query or key matrix in a Llama's file, which row of ours it is: int64 (n_rows,).

    We turn number i of a head together with number i + head_dim / 2, llama.cpp turns neighbours.
    """
    return torch.arange(n_rows).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)


# Hugging Face's field -> llama.cpp's, after the architecture and a dot.
GPT2_FIELDS = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
LLAMA_FIELDS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "sliding_window": "attention.sliding_window",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}


def config_from_gguf(file: GGUFFile) -> GPTConfig:
    """Return the configuration that a file describes.

    Raises:
        ValueError: The architecture is not in `GGUF_NAMES`, a value is missing, or a GPTConfig cannot say it.
    """
    architecture = str(file.metadata.get("general.architecture"))
    check_choice("general.architecture", architecture, GGUF_NAMES)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor token_embd.weight")
    # The numbers that only have another name here.
    values = {name.removeprefix(f"{architecture}."): value for name, value in file.metadata.items()}
    fields = GPT2_FIELDS if architecture == "gpt2" else LLAMA_FIELDS
    config = {theirs: values[name] for theirs, name in fields.items() if name in values}
    if lists := [name for name, number in config.items() if isinstance(number, list)]:
        raise ValueError(f"{file.path}: {lists[0]} must be the same in all layers, got {config[lists[0]]}")
    # One name for three families.
    family = architecture
    if architecture == "llama":
        family = (
            "mixtral" if values.get("expert_count") else "mistral" if "sliding_window" in config else "llama"
        )
    # What the tensors themselves tell.
    config |= {
        "model_type": family,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    try:
        if family == "gpt2":
            config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        else:
            config |= rotary_fields(file, config, values)
        return config_from_hf(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file.path}: {error}") from None


def rotary_fields(
    file: GGUFFile, config: Mapping[str, object], values: Mapping[str, object]
) -> dict[str, object]:
    """Return what Hugging Face's configuration says of rotary positions, where llama.cpp says it in another way.

    Raises ValueError if the file divides the frequencies by another rule than Llama 3's.
    """
    width, n_heads = config.get("hidden_size"), config.get("num_attention_heads")
    head_dim = config.get("head_dim") or (width // n_heads if width and n_heads else 1)
    base = config.get("rope_theta", 10_000.0)
    rotated = values.get("rope.dimension_count", head_dim)
    fields: dict[str, object] = {"rope_theta": base, "partial_rotary_factor": rotated / head_dim}
    if config.get("rope_type") == "none":
        fields["rope_type"] = "default"
    # Llama 3: the slowest pairs are divided by the factor, the fastest by one, the others by something between.
    if "rope_freqs.weight" in file.tensors:
        divisors = file.read("rope_freqs.weight")
        factor, length = divisors.max().item(), 8192
        ours, _ = scaled_rotary_frequencies("llama3", head_dim, base, factor, length)
        theirs = rotary_inverse_frequencies(head_dim, base) / divisors
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=0):
            raise ValueError("rope_freqs.weight divides by another rule than Llama 3's")
        fields |= {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": length}
    return fields


_BLOCK = "blk.{}."
_COMMON: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "token_embd",
    "output_head": "output",
    "final_norm": "output_norm",
    "blocks.{}.attention_norm": _BLOCK + "attn_norm",
    "blocks.{}.attention.output": _BLOCK + "attn_output",
    "blocks.{}.feed_forward_norm": _BLOCK + "ffn_norm",
    "blocks.{}.feed_forward.gate": _BLOCK + "ffn_gate",
    "blocks.{}.feed_forward.up": _BLOCK + "ffn_up",
    "blocks.{}.feed_forward.down": _BLOCK + "ffn_down",
}
_THREE: dict[str, str | tuple[str, ...]] = {
    "blocks.{}.attention.qkv": (_BLOCK + "attn_q", _BLOCK + "attn_k", _BLOCK + "attn_v"),
}
# Our layer -> llama.cpp's, by architecture; {} stands for a number. Three: our rows are theirs, stacked.
GGUF_NAMES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "gpt2": {
        **_COMMON,
        "position_embedding": "position_embd",
        "blocks.{}.attention.qkv": _BLOCK + "attn_qkv",
    },
    "llama": {
        **_COMMON,
        **_THREE,
        "blocks.{}.feed_forward.router": _BLOCK + "ffn_gate_inp",
        "blocks.{}.feed_forward.experts.{}.gate": _BLOCK + "ffn_gate_exps",
        "blocks.{}.feed_forward.experts.{}.up": _BLOCK + "ffn_up_exps",
        "blocks.{}.feed_forward.experts.{}.down": _BLOCK + "ffn_down_exps",
    },
    "qwen3": {
        **_COMMON,
        **_THREE,
        "blocks.{}.attention.query_norm": _BLOCK + "attn_q_norm",
        "blocks.{}.attention.key_norm": _BLOCK + "attn_k_norm",
    },
}


def gguf_targets(model: GPTModel, architecture: str) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """Return where the tensors of a file go: name -> views of our parameters, each with the order of its rows.

    Several views are the experts of a layer, one for each index of the tensor's first dimension. An order of None
    leaves the rows as they are. Raises ValueError if the architecture has no counterpart of a parameter.
    """
    names, head_dim = choose("architecture", architecture, GGUF_NAMES), model.config.actual_head_dim
    targets: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    for name, part in named_parts(model, names, architecture):
        moved = architecture == "llama" and (".attn_q." in name or ".attn_k." in name)
        targets.setdefault(name, []).append((part, gguf_rows(len(part), head_dim) if moved else None))
    return targets


def checked_targets(file: GGUFFile, model: GPTModel) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """Return `gguf_targets` of a file, all of whose names and shapes fit the model; ValueError if one does not."""
    targets = gguf_targets(model, str(file.metadata["general.architecture"]))
    # The frequencies are computed, not loaded.
    if wrong := sorted(targets.keys() ^ (file.tensors.keys() - {"rope_freqs.weight"})):
        where = "is missing in the file" if wrong[0] in targets else "has no place in the model"
        raise ValueError(f"{file.path}: {wrong[0]} {where}; {len(wrong)} names do not match")
    for name, views in targets.items():
        found, shape = file.tensors[name].shape, tuple(views[0][0].shape)
        wanted = (len(views), *shape) if "_exps." in name else shape
        if found != wanted:
            raise ValueError(f"{file.path}: {name} must have shape {wanted}, got {found}")
    return targets


def load_gguf(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> GPTModel:
    """Return the model of a GGUF file in evaluation mode; the numbers are decoded a few rows at a time.

    Args:
        path: A file of an architecture in `GGUF_NAMES`, with any types that `decode_blocks` knows.
        device: Where the parameters are put.
        dtype: Their type; None is float32.

    Raises:
        ValueError: The file is damaged, describes what a GPTConfig cannot say, or its tensors do not fit.
        FileNotFoundError: There is no such file.
    """
    file = read_gguf(path)
    config = config_from_gguf(file)
    check_vocabulary(file, config)
    model = empty_model(config, device, dtype or torch.float32)
    targets = checked_targets(file, model)  # before a number moves
    # The numbers, a few rows, or a few experts, at a time.
    for name, views in targets.items():
        for first, rows in file.read_rows(name):
            if "_exps." in name:
                for (view, _), expert in zip(views[first:], rows, strict=False):
                    view.copy_(expert)
            else:
                view, order = views[0]
                place = slice(first, first + len(rows)) if order is None else order[first : first + len(rows)]
                view[place] = rows.to(view)
    return model.eval()


def check_vocabulary(file: GGUFFile, config: GPTConfig) -> None:
    """Refuse a file whose list of tokens is longer than the embedding has rows (ValueError)."""
    n_tokens = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    if n_tokens > config.vocab_size:
        raise ValueError(
            f"{file.path}: {n_tokens} tokens, but token_embd.weight has {config.vocab_size} rows"
        )


_DIGITS_APART = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
# What a file calls its rule for cutting text -> our pattern.
PATTERNS = {
    "gpt-2": GPT2_PATTERN,
    "smollm": _DIGITS_APART,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def tokenizer_from_gguf(file: GGUFFile) -> RenumberedTokenizer:
    """Return the tokenizer that a file holds, with the file's ids.

    Raises:
        ValueError: It is no byte pair encoding of GPT-2's kind, cuts text by a rule that is not in `PATTERNS`, or its
            lists do not fit together.
    """
    values = file.metadata
    check_choice("tokenizer.ggml.model", values.get("tokenizer.ggml.model"), ("gpt2",))
    pattern = choose("tokenizer.ggml.pre", values.get("tokenizer.ggml.pre"), PATTERNS)
    tokens, kinds, merges = (
        values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
    )
    if not tokens or not merges or len(kinds or ()) != len(tokens):
        raise ValueError(
            f"{file.path}: tokens, token_type and merges must be lists, the first two equally long"
        )
    # Kind 1 is an ordinary token in visible characters; 3 and 4 are special ones, as they are written.
    ids = {as_bytes(token): i for i, token in enumerate(tokens) if kinds[i] == 1}
    special = {token: i for i, token in enumerate(tokens) if kinds[i] in (3, 4)}
    pairs = [tuple(map(as_bytes, merge.split(" "))) for merge in merges]
    return RenumberedTokenizer(pairs, ids, special, pattern)


def as_bytes(shown: str) -> bytes:
    """Return the bytes that visible characters stand for in GPT-2's files; ValueError for other characters."""
    try:
        return bytes(UNICODE_TO_BYTE[character] for character in shown)
    except KeyError as error:
        raise ValueError(f"{shown!r} must be in GPT-2's visible characters, got {error}") from None


def tokenizer_from_json(path: str | os.PathLike[str], pattern: str) -> RenumberedTokenizer:
    """Return a byte pair encoding from Hugging Face's `tokenizer.json`; ValueError if the file holds something else.

    The file's own rules for cutting text are many; the caller says which pattern they come to.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        special = {entry["content"]: entry["id"] for entry in values["added_tokens"]}
        vocabulary = {token: i for token, i in values["model"]["vocab"].items() if token not in special}
        merges = (m.split(" ") if isinstance(m, str) else m for m in values["model"]["merges"])
        pairs = [(as_bytes(left), as_bytes(right)) for left, right in merges]
        ids = {as_bytes(token): i for token, i in vocabulary.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no tokenizer.json of a byte pair encoding: {error}") from None
    return RenumberedTokenizer(pairs, ids, special, pattern)
