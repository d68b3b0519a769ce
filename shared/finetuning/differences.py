"""A tuned model as its difference to the model it comes from: less than half of the bytes.

The difference is rounded to bfloat16, the rows of new tokens stand whole. Loading checks that the base is
the very one that the difference was made for.

Left out: differences of differences, and low-rank ones.

Follows the weight differences in which LLaMA's first descendants were published (Taori et al., 2023;
Chiang et al., 2023, "Vicuna").

Explained and proven in ch07_instruction/01_instruction_tuning.ipynb; written from there by `make promote`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.checks import require
from shared.finetuning.features import weights_hash
from shared.finetuning.instruction import chat_tokenizer
from shared.model.gpt import GPTConfig, GPTModel
from shared.text.chat_format import ChatFormat
from shared.text.tokenizer import BPETokenizer
from shared.weights.files import empty_model, write_folder
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer


def difference_tensors(base: str, original: GPTModel, tuned: GPTModel) -> dict[str, Tensor]:
    """Return what a tuned model adds to the model it comes from: changed tensors in bfloat16, new rows in float32.

    Args:
        base: What errors call the original.
        original: The model before training.
        tuned: After it, perhaps with more tokens; their rows stand under the name of the tensor with ".new_rows".

    Raises:
        ValueError: `tuned` has other tensors than the original, or fewer rows.
    """
    old, new = dict(original.named_parameters()), dict(tuned.named_parameters())
    if different := sorted(old.keys() ^ new.keys()):
        raise ValueError(f"tuned must have the tensors of {base}, got a difference in {different[0]}")
    tensors = {}
    for name, before in old.items():
        before, after = before.detach(), new[name].detach().float().cpu()
        fits = after.shape[1:] == before.shape[1:] and len(after) >= len(before)
        require(
            f"{name} of tuned", tuple(after.shape), fits, f"as in {base}, {tuple(before.shape)}, or longer"
        )
        if len(after) > len(before):
            tensors[f"{name}.new_rows"] = after[len(before) :]
        if not torch.equal(after[: len(before)], before):
            tensors[name] = (after[: len(before)] - before).bfloat16()
    return tensors


def save_difference(
    base: str,
    tuned: GPTModel,
    folder: str | os.PathLike[str],
    *,
    chat_format: ChatFormat | None = None,
    replace: bool = False,
    **details: object,
) -> None:
    """Write a tuned model as its difference to the model it comes from, in bfloat16, with a file difference.json.

    Only tensors that changed are written. Rows that the base does not have, those of new tokens, are written whole and
    in float32.

    Args:
        base: What `load_pretrained` calls the base.
        tuned: The base after training, perhaps with more tokens and a longer context (`extend_model`).
        chat_format: How it was taught to read messages; its two special tokens are the new ones, if there are any.
        folder, replace: See `shared.weights.files.write_folder`, where the errors stand too.
        details: How it came about, for difference.json.

    Raises:
        ValueError: `tuned` has other tensors than the base, or fewer rows.
    """
    original, chat_format = load_pretrained(base, dtype=torch.float32), chat_format or ChatFormat()
    about = {
        "base": base,
        "base_sha256": weights_hash(original),
        "model": asdict(tuned.config),
        "chat_format": asdict(chat_format),
    }
    tensors = difference_tensors(base, original, tuned)
    write_folder(folder, {"difference.json": about | details}, tensors, replace=replace)


@torch.no_grad()
def add_difference(original: GPTModel, changes: Mapping[str, Tensor], model: GPTModel, source: str) -> None:
    """Write a model plus the difference of `difference_tensors` into `model`, which may be the original itself.

    Args:
        source: Where the difference comes from, for errors.

    Raises:
        ValueError: A tensor does not fit, or belongs to no parameter.
    """
    left = dict(changes)
    for name, parameter in model.named_parameters():
        before = original.get_parameter(name)
        added = left.pop(f"{name}.new_rows", before[:0])
        change = left.pop(name, torch.zeros_like(before))
        require(
            f"{name} in {source}", tuple(change.shape), change.shape == before.shape, f"{tuple(before.shape)}"
        )
        fits = added.shape[1:] == before.shape[1:]
        require(f"{name}.new_rows in {source}", tuple(added.shape), fits, f"of width {before.shape[-1]}")
        whole = torch.cat([before + change.float(), added])
        require(
            f"{name} in {source}",
            tuple(whole.shape),
            whole.shape == parameter.shape,
            f"{tuple(parameter.shape)}",
        )
        parameter.copy_(whole)
    require(f"tensors in {source}", sorted(left), not left, "those of the model, and no others")


def shipped_differences() -> list[str]:
    """Return the names of the tuned models that come with the course as differences."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/difference.json"))


@torch.no_grad()
def load_difference(name_or_folder: str | os.PathLike[str]) -> tuple[GPTModel, BPETokenizer, ChatFormat]:
    """Return a tuned model, its tokenizer and its chat format, from a name or a folder that `save_difference` wrote.

    Raises:
        ValueError: The name is unknown, a file is damaged, the tensors do not fit, or the base has other weights here
            than those that the difference was made for.
        FileNotFoundError: The folder lacks a file.
        DownloadError: The base is not on this machine and cannot be had.
    """
    known = shipped_differences()
    folder = CHECKPOINTS / name_or_folder if name_or_folder in known else Path(name_or_folder)
    if not folder.is_dir():
        allowed = ", ".join([*known, "or a folder"])
        raise ValueError(f"name_or_folder must be {allowed}, got {os.fspath(name_or_folder)!r}")
    # What it says of itself.
    text, tensors = (folder / "difference.json").read_text(encoding="utf-8"), folder / "model.safetensors"
    try:
        about = json.loads(text)
        base, expected = about["base"], about["base_sha256"]
        config, chat_format = GPTConfig(**about["model"]), ChatFormat(**about["chat_format"])
        changes = load_file(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no difference that can be read: {error!r}") from error
    # The base, which must be the very same.
    original = load_pretrained(base, dtype=torch.float32)
    if weights_hash(original) != expected:
        raise ValueError(f"{folder} was made for other weights of {base} than this machine has")
    model = empty_model(config)
    add_difference(original, changes, model, os.fspath(folder))
    tokenizer = load_tokenizer(base)
    if config.vocab_size > original.config.vocab_size:
        tokenizer = chat_tokenizer(tokenizer, chat_format)
    return model.eval(), tokenizer, chat_format
