"""Write our models and tokenizers as folders: in Hugging Face's format, which transformers loads, or in our
own.

A folder appears under its name only when it is complete. `load_pretrained` of shared.weights.pretrained
reads both kinds.

Left out: models cut into several files, tokenizers with gaps in their ids, templates that add special
tokens, and dropout, which acts at other places there and in training only (GPT-2's is written).

Follows the files that transformers 5 writes (Wolf et al., 2020).

Explained and proven in ch05_pretraining/06_pretrained_weights.ipynb; written from there by `make promote`.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import tiktoken
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from shared.model.gpt import GPTConfig, GPTModel
from shared.text.tokenizer import BYTE_TO_UNICODE, BPETokenizer
from shared.weights.pretrained import CONFIG_FIELDS, huggingface_views


def family_of(config: GPTConfig) -> str:
    """Return the family of transformers, a name in `FAMILIES`, that computes what this configuration does.

    Raises ValueError if there is none, naming the nearest and the fields that it cannot have.
    """
    llama = {"norm": {"rmsnorm"}, "positions": {"rotary"}, "pre_norm": {True}, "feed_forward": {"swiglu"}}
    llama |= {"bias": {False}, "qkv_bias": {False}, "qk_norm": {False}}
    gpt2 = {"norm": {"layernorm"}, "positions": {"learned"}, "pre_norm": {True}, "feed_forward": {"gelu"}}
    gpt2 |= {"bias": {True}, "qkv_bias": {True}, "qk_norm": {False}, "window": {None}}
    gpt2 |= {"n_kv_heads": {None, config.n_heads}, "head_dim": {None, config.emb_dim // config.n_heads}}
    allowed = {
        "gpt2": gpt2,
        "llama": {**llama, "bias": {True, False}, "qkv_bias": {config.bias}, "window": {None}},
        "mistral": llama,
        "qwen3": {**llama, "qk_norm": {True}},
        "mixtral": {**llama, "feed_forward": {"moe"}},
    }
    misfits = {
        family: {name: getattr(config, name) for name in fields if getattr(config, name) not in fields[name]}
        for family, fields in allowed.items()
    }
    nearest = min(misfits, key=lambda family: len(misfits[family]))
    if misfits[nearest]:
        found = ", ".join(f"{name}={value!r}" for name, value in misfits[nearest].items())
        raise ValueError(
            f"config has no counterpart in transformers: the nearest, {nearest}, cannot have {found}"
        )
    return nearest


ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def config_to_hf(config: GPTConfig) -> dict[str, object]:
    """Return the content of Hugging Face's config.json; ValueError if there is no counterpart (`family_of`)."""
    family = family_of(config)
    if family != "gpt2":  # what may be None with us is a number there
        kv_heads, width = (
            config.n_kv_heads or config.n_heads,
            config.feed_forward_dim or 8 * math.ceil(config.emb_dim / 3),
        )
        config = replace(config, n_kv_heads=kv_heads, feed_forward_dim=width, head_dim=config.actual_head_dim)
    values = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    values |= {theirs: getattr(config, ours) for ours, theirs in CONFIG_FIELDS[family].items()}
    values |= {"initializer_range": config.init_std, "tie_word_embeddings": config.tie_weights}
    if family == "gpt2":
        values |= {f"{where}_pdrop": config.dropout for where in ("resid", "embd", "attn")}
        return values | {"n_inner": config.feed_forward_dim, "activation_function": "gelu_new"}
    values |= {"num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu"}
    values |= {"attention_bias": config.bias, "rope_parameters": rope_to_hf(config)}
    if family == "llama":
        return values | {"mlp_bias": config.bias}
    if family == "qwen3":  # it may have windows in some layers only
        kind = "full_attention" if config.window is None else "sliding_attention"
        values |= {"use_sliding_window": config.window is not None, "layer_types": [kind] * config.n_layers}
    return values | {"sliding_window": config.window}


def rope_to_hf(config: GPTConfig) -> dict[str, object]:
    """Return `rope_parameters` of config.json. The larger base that "ntk" stands for is written as the base."""
    kind, base, head_dim = config.rope_scaling, config.rope_base, config.actual_head_dim
    if kind == "ntk":
        base *= config.rope_factor ** (head_dim / (head_dim - 2))
    if kind in ("none", "ntk"):
        return {"rope_type": "default", "rope_theta": base}
    values = {"rope_type": kind, "rope_theta": base, "factor": config.rope_factor}
    if kind == "linear":
        return values
    turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    return (
        values
        | turns
        | {"original_max_position_embeddings": config.rope_original_length or config.context_length}
    )


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens whose merge makes `token`, of at least two bytes.

    Raises ValueError if tokens of lower rank do not leave it in two parts: then `ranks` is no byte pair encoding.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        lowest = min(joined)
        if lowest >= ranks[token]:
            raise ValueError(f"{token} is no merge of two tokens with lower ranks")
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def hugging_face_tokenizer(encoding: tiktoken.Encoding | BPETokenizer) -> Tokenizer:
    """Return Hugging Face's tokenizer with the ids of `encoding.encode(text, allowed_special="all")`.

    Raises ValueError if the encoding is no byte pair encoding, or its ids have gaps.
    """
    if isinstance(encoding, BPETokenizer):
        encoding = encoding.to_tiktoken()
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    shown = {token: "".join(map(BYTE_TO_UNICODE.get, token)) for token in sorted(ranks, key=ranks.get)}
    vocabulary = {text: ranks[token] for token, text in shown.items()} | special
    if sorted(vocabulary.values()) != list(range(encoding.n_vocab)):
        raise ValueError(
            f"encoding {encoding.name!r} must have the ids 0 to {encoding.n_vocab - 1}, each once"
        )
    pairs = (last_merge(token, ranks) for token in shown if len(token) > 1)
    merges = [(shown[left], shown[right]) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, visible])
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted(special, key=special.get)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def export_to_hugging_face(
    model: GPTModel, folder: str | os.PathLike[str], encoding: tiktoken.Encoding | BPETokenizer | None = None
) -> None:
    """Write a folder that transformers' `AutoModelForCausalLM` and, with an encoding, `AutoTokenizer` load.

    Args:
        model: Of a configuration that has a counterpart, see `family_of`.
        folder: It must not exist, or be empty; it appears when it is complete.
        encoding: The model's tokenizer, with the token "<|endoftext|>", which becomes the one that ends a text.

    Raises:
        ValueError: The configuration has no counterpart, or the encoding has more tokens than the model.
        FileExistsError: The folder holds something.
    """
    values = config_to_hf(model.config)
    files, end = {}, None
    if encoding is not None:
        encoding = encoding.to_tiktoken() if isinstance(encoding, BPETokenizer) else encoding
        if encoding.n_vocab > model.config.vocab_size:
            raise ValueError(f"encoding has {encoding.n_vocab} tokens, the model {model.config.vocab_size}")
        end = encoding.eot_token
        files["tokenizer.json"] = json.loads(hugging_face_tokenizer(encoding).to_str())
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.context_length,
            "bos_token": encoding.decode([end]),
            "eos_token": encoding.decode([end]),
            "clean_up_tokenization_spaces": False,
        }
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    dtype = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    files |= {"config.json": values | ids | {"dtype": dtype}, "generation_config.json": ids}
    write_folder(folder, files, huggingface_views(model, values["model_type"]))


def save_checkpoint_folder(model: GPTModel, folder: str | os.PathLike[str], **details: object) -> None:
    """Write a folder in our own format, which any configuration has: weights, and config.json with `details` (JSON).

    Raises FileExistsError if the folder holds something.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_folder(folder, {"config.json": {"model": asdict(model.config), **details}}, tensors)


def write_folder(
    folder: str | os.PathLike[str], files: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    """Write JSON files and model.safetensors; FileExistsError if the folder holds something."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {folder} exists already and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as hidden:
        part = Path(hidden) / "part"
        part.mkdir()
        for name, content in files.items():
            (part / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        # A copy of each, as the format stores no views.
        copies = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(copies, part / "model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            folder.rmdir()  # Windows gives no folder the name of another, empty or not
        part.rename(folder)
