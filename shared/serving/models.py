"""A model with its tokenizer and its chat format, from a name, a folder or a `.gguf` file.

`open_model` finds all three where the model comes from: in the file itself, in the files of Hugging Face beside the
weights, or in the course. A folder's tokenizer is read where we know its rule for cutting text; another one is refused,
since a rule that is nearly right gives other ids without a word.

An adapter may go with it; it is merged into the weights.

Left out: `.onnx` files, which `onnx_runtime` reads.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch

from shared.checks import check_choice, check_path
from shared.data.models import has_model, model_file
from shared.model.gpt import GPTModel
from shared.text.chat_format import ChatFormat, chat_format_of
from shared.text.tokenizer import GPT2_PATTERN, BPETokenizer
from shared.weights.gguf import read_gguf
from shared.weights.gguf_model import PATTERNS, tokenizer_from_json
from shared.weights.pretrained import (
    ALIASES,
    GPT2_REPOSITORIES,
    HUB_REPOSITORIES,
    load_pretrained,
    load_tokenizer,
    shipped_checkpoints,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AnyTokenizer = BPETokenizer | tiktoken.Encoding


@dataclass(frozen=True)
class OpenedModel:
    """A model and what belongs to it.

    Attributes:
        name: As it was asked for.
        model: In evaluation mode.
        tokenizer: None where none was found; `tokenizer_missing` says what was looked for.
        chat_format: None for a model that was not taught one.
        tokenizer_missing: Why there is no tokenizer; empty where there is one.
    """

    name: str
    model: GPTModel
    tokenizer: AnyTokenizer | None
    chat_format: ChatFormat | None
    tokenizer_missing: str = ""

    def needed_tokenizer(self) -> AnyTokenizer:
        """Return the tokenizer; ValueError that says why there is none."""
        if self.tokenizer is None:
            raise ValueError(self.tokenizer_missing)
        return self.tokenizer


def model_names() -> list[str]:
    """Return the names that need no path: what ships, what a package holds, what the Hub holds."""
    return [*shipped_checkpoints(), *HUB_REPOSITORIES, *GPT2_REPOSITORIES]


def open_model(
    name: str, *, dtype: str | None = None, tokenizer: str | None = None, adapter: str | None = None
) -> OpenedModel:
    """Return a model with its tokenizer and chat format.

    Args:
        name: As for `load_pretrained`: a name, the path of a folder or of a `.gguf` file.
        dtype: A name in `DTYPES`; None keeps the stored one.
        tokenizer: A name or path whose tokenizer is taken instead of the model's own.
        adapter: A folder with a LoRA adapter for this model, ours or PEFT's: it is added to the weights.

    Raises:
        ValueError: The name is unknown, a file is damaged or holds what we cannot read, or the adapter does not fit.
        OSError: A file cannot be read, or to be had from the network only, and cannot be had.
    """
    check_path("model", name)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    # The model first: loading needs most, and the tokenizer then takes what loading has given back.
    model = load_pretrained(name, dtype=None if dtype is None else DTYPES[dtype])
    if adapter is not None:
        from shared.finetuning.lora import detach_lora
        from shared.finetuning.lora_files import load_any_adapter

        load_any_adapter(model, adapter)
        detach_lora(model, merge=True)
    found, missing = None, ""
    try:
        found = find_tokenizer(name if tokenizer is None else tokenizer)
    except (ValueError, FileNotFoundError) as error:
        if tokenizer is not None:
            raise
        missing = f"{name} has no tokenizer that can be read ({error}); give one with --tokenizer"
    if found is not None and found.n_vocab > model.config.vocab_size:
        size = model.config.vocab_size
        raise ValueError(f"the tokenizer has {found.n_vocab} tokens, more than the model's {size}")
    return OpenedModel(name, model, found, find_chat_format(name), missing)


def find_tokenizer(name: str) -> AnyTokenizer:
    """Return the tokenizer of a model by its name, folder or `.gguf` file; ValueError if it cannot be read."""
    known = {*model_names(), *ALIASES}
    if name in known or name.endswith(".gguf"):
        return load_tokenizer(name)
    folder = Path(name).expanduser()
    if (folder / "tokenizer.json").is_file():
        return tokenizer_from_json(folder / "tokenizer.json", pattern_of(folder / "tokenizer.json"))
    # Our own folders name their tokenizer in the recipe.
    recipe = read_json(folder / "config.json").get("recipe", {})
    kind = recipe.get("tokenizer") if isinstance(recipe, dict) else None
    if kind == "tales":
        return load_tokenizer("tales-tiny")
    if kind == "gpt2":
        return load_tokenizer("gpt2-small")
    raise ValueError(f"{folder} has no tokenizer.json")


def pattern_of(path: Path) -> str:
    """Return how a `tokenizer.json` cuts text, a pattern in `PATTERNS`; ValueError for a rule that is not there."""
    stated = read_json(path).get("pre_tokenizer") or {}
    parts = stated.get("pretokenizers", [stated]) if isinstance(stated, dict) else []
    kinds = [part.get("type") for part in parts]
    # Written out as a pattern, as we and many others do.
    written = [part.get("pattern", {}).get("Regex") for part in parts if part.get("type") == "Split"]
    if kinds == ["Split", "ByteLevel"] and written[0] in PATTERNS.values():
        return written[0]
    # GPT-2's pattern goes without saying, perhaps after cutting digits one by one.
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return GPT2_PATTERN
    if (
        kinds == ["Digits", "ByteLevel"]
        and parts[0].get("individual_digits")
        and parts[1].get("use_regex", True)
    ):
        return PATTERNS["smollm"]
    raise ValueError(f"{path} cuts text by a rule that is not known here: {kinds}")


def find_chat_format(name: str) -> ChatFormat | None:
    """Return the chat format that a model was taught; None if it says of none.

    Raises ValueError if it says of one that we cannot write.
    """
    plain = ALIASES.get(name, name)
    template: Any = None
    if name.endswith(".gguf"):
        template = read_gguf(Path(name).expanduser()).metadata.get("tokenizer.chat_template")
    elif plain in HUB_REPOSITORIES:
        if not has_model(plain):  # the Hub's original has the template of its package
            return ChatFormat("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
        template = read_gguf(model_file(plain)).metadata.get("tokenizer.chat_template")
    elif (folder := Path(name).expanduser()).is_dir() and name not in model_names():
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        else:
            template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return chat_format_of(template) if isinstance(template, str) else None


def describe(name: str) -> dict[str, Any]:
    """Return what a model is, for people and for programs: name -> number or text. Errors as `open_model`."""
    found = open_model(name)
    config, parameters = found.model.config, list(found.model.parameters())
    n_bytes = sum(parameter.nbytes for parameter in parameters)
    heads = config.n_kv_heads or config.n_heads
    per_token = 2 * config.n_layers * heads * config.actual_head_dim * parameters[0].element_size()
    described = {
        "model": name,
        "parameters": found.model.n_parameters,
        "type in memory": str(parameters[0].dtype).removeprefix("torch."),
        "bytes in memory": n_bytes,
        "bytes of cache for a token": per_token,
        "context": config.context_length,
        "vocabulary": config.vocab_size,
        "blocks": config.n_layers,
        "width": config.emb_dim,
        "heads": config.n_heads,
        "key and value heads": heads,
        "feed-forward": config.feed_forward,
        "norm": config.norm,
        "positions": config.positions,
        "tied head": config.tie_weights,
        "tokenizer": found.tokenizer_missing or f"{found.needed_tokenizer().n_vocab} tokens",
        "chat": "none" if found.chat_format is None else "ChatML",
    }
    if name.endswith(".gguf"):
        kinds = Counter(tensor.kind for tensor in read_gguf(Path(name).expanduser()).tensors.values())
        described["tensors"] = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return described


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no file; ValueError if it holds something else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found
