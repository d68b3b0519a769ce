"""GGUF files for the tests: written by hand, byte by byte, and by the package `gguf` from models of transformers."""

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

GGUF_TYPES = {"F32": 0, "Q8_0": 8}


def text(content: str) -> bytes:
    """Return a text as the format has it."""
    raw = content.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def value(name: str, kind: int, raw: bytes) -> bytes:
    """Return one entry of the metadata."""
    return text(name) + struct.pack("<I", kind) + raw


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Return one line of the table of tensors; the shape as the file has it, fastest first."""
    numbers = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + numbers + struct.pack("<IQ", kind, offset)


def whole(
    values: list[bytes],
    table: list[bytes],
    data: bytes = b"",
    *,
    alignment: int = 32,
    version: int = 3,
    n_values: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """Return a file; the counts may be given falsely."""
    counts = (len(table) if n_tensors is None else n_tensors, len(values) if n_values is None else n_values)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(table)
    return head + bytes(-len(head) % alignment) + data


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the rows of a query or key matrix in the order of llama.cpp's converter."""
    rows = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_model(
    path: Path, model: nn.Module, architecture: str, values: Mapping[str, object], kind: str = "F32"
) -> None:
    """Write a model of transformers as its converter would: names, rows of queries and keys, transposes."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, number in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(number)]
        add(f"{architecture}.{name}", number)
    # transformers counts them, to know the size of a GPT-2's vocabulary.
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(model.config.vocab_size)])
    config, names = model.config, GPT2_NAMES if architecture == "gpt2" else LLAMA_NAMES
    for name, parameter in model.named_parameters():
        layer, _, ending = name.rpartition(".")
        parts = layer.split(".")
        block = f"blk.{parts[2]}." if len(parts) > 3 else ""
        theirs = names[layer if not block else ".".join(parts[3:])]
        data = parameter.detach().float().numpy()
        if architecture == "gpt2" and ".c_" in name and data.ndim == 2:
            data = np.ascontiguousarray(data.T)
        if architecture == "llama" and theirs in ("attn_q", "attn_k"):
            n_heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
            data = permuted(data, n_heads)
        stored = gguf.GGMLQuantizationType[kind if data.ndim == 2 else "F32"]
        writer.add_tensor(f"{block}{theirs}.{ending}", gguf.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, norms included, so that no mistake hides behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()
