"""Our models and tokenizers as folders that transformers loads, in Hugging Face's format.

`export_to_hugging_face` writes the folder, `hugging_face_tokenizer` makes the tokenizer in it.
`load_pretrained` of shared.weights.pretrained reads the folder back.

Left out: models cut into several files, tokenizers with gaps in their ids, templates that add special
tokens, and dropout, which acts at other places there and in training only (GPT-2's is written).

Follows the files that transformers 5 writes (Wolf et al., 2020).

Explained and proven in ch05_pretraining/06_pretrained_weights.ipynb and deployment/02_export_and_local.ipynb;
written from there by `make promote`.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from shared.checks import check_path
from shared.model.gpt import GPTModel
from shared.text.chat_format import ChatFormat, chat_template
from shared.text.merges import BYTE_TO_UNICODE
from shared.text.renumbered import RenumberedTokenizer
from shared.text.tokenizer import BPETokenizer, check_apart
from shared.weights.configs import config_to_hf
from shared.weights.files import to_disk, write_folder
from shared.weights.names import huggingface_views, unwrap


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

    Raises ValueError if the encoding is no byte pair encoding, its ids have gaps, or special tokens overlap.
    """
    # The vocabulary, its bytes as visible characters.
    if isinstance(encoding, BPETokenizer):
        encoding = encoding.to_tiktoken()
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    check_apart(special)
    shown = {token: "".join(map(BYTE_TO_UNICODE.get, token)) for token in sorted(ranks, key=ranks.get)}
    vocabulary = {text: ranks[token] for token, text in shown.items()} | special
    if sorted(vocabulary.values()) != list(range(encoding.n_vocab)):
        raise ValueError(
            f"encoding {encoding.name!r} must have the ids 0 to {encoding.n_vocab - 1}, each once"
        )
    # The merges, in the order of the ranks of what they make.
    pairs = (last_merge(token, ranks) for token in shown if len(token) > 1)
    merges = [(shown[left], shown[right]) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # Before the merges the text is cut by the pattern and made visible; decoding goes back.
    split = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, visible])
    tokenizer.decoder = decoders.ByteLevel()
    # Special tokens are found in the text as it was given.
    names = sorted(special, key=special.get)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def export_to_hugging_face(
    model: GPTModel, folder: str | os.PathLike[str], encoding: tiktoken.Encoding | BPETokenizer | None = None
) -> None:
    """Write a folder that transformers' `AutoModelForCausalLM` and, with an encoding, `AutoTokenizer` load.

    Args:
        model: Of a configuration that has a counterpart, see `family_of`. It may be wrapped, see `unwrap`.
        folder: It must not exist, or be empty; it appears when it is complete.
        encoding: The model's tokenizer, with the token "<|endoftext|>", which becomes the one that ends a text.

    Raises:
        ValueError: The configuration has no counterpart, or the encoding has more tokens than the model.
        FileExistsError: The folder holds something.
    """
    model = unwrap(model)
    values = config_to_hf(model.config)
    files, end = {}, None
    # The tokenizer in two files: what it does, and how transformers wraps it.
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
    # The configuration twice: for the model, and for its `generate`.
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    dtype = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    files |= {"config.json": values | ids | {"dtype": dtype}, "generation_config.json": ids}
    write_folder(folder, files, huggingface_views(model, values["model_type"]))


def portable_tokenizer(tokenizer: BPETokenizer | tiktoken.Encoding) -> Tokenizer:
    """Return Hugging Face's tokenizer with the same ids, also for a tokenizer whose ids are somebody else's."""
    if not isinstance(tokenizer, RenumberedTokenizer):
        return hugging_face_tokenizer(tokenizer)
    shown = lambda token: "".join(map(BYTE_TO_UNICODE.get, token))
    special = set(tokenizer.special_ids.values())
    vocabulary = {shown(token): i for token, i in tokenizer.vocab.items() if i not in special}
    merges = [(shown(left), shown(right)) for left, right in tokenizer.merges]
    result = Tokenizer(models.BPE(vocab=vocabulary | tokenizer.special_ids, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    names = sorted(tokenizer.special_ids, key=tokenizer.special_ids.get)
    result.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return result


def export_with_tokenizer(
    model: GPTModel,
    folder: str | os.PathLike[str],
    tokenizer: BPETokenizer | tiktoken.Encoding,
    chat_format: ChatFormat | None = None,
) -> None:
    """Write the folder of `export_to_hugging_face` with any tokenizer of ours, and with the chat template.

    Args:
        model: As there.
        folder: It must not exist, or be empty; it appears when it is complete.
        tokenizer: The model's own, with the token "<|endoftext|>".
        chat_format: How the model was taught to read messages; its end token then ends a reply.

    Raises:
        ValueError: The configuration has no counterpart, or tokenizer, model and format do not fit.
        FileExistsError: The folder holds something.
        OSError: It cannot be written; nothing is left of it.
    """
    # What must fit.
    check_path("folder", folder)
    folder, size = Path(folder).expanduser().absolute(), unwrap(model).config.vocab_size
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"folder must be new or empty, got {folder}")
    if tokenizer.n_vocab > size:
        raise ValueError(f"tokenizer must have at most the model's {size} tokens, got {tokenizer.n_vocab}")
    portable, end = portable_tokenizer(tokenizer), tokenizer.eot_token
    ends = [end] if chat_format is None else [portable.token_to_id(chat_format.end), end]
    if None in ends:
        raise ValueError(f"tokenizer must have the token {chat_format.end!r} of the chat format")
    # How transformers wraps the tokenizer, and what ends a text.
    wrapped = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": unwrap(model).config.context_length,
        "bos_token": portable.id_to_token(end),
        "eos_token": portable.id_to_token(ends[0]),
        "pad_token": portable.id_to_token(end),
        "clean_up_tokenization_spaces": False,
    }
    if chat_format is not None:
        wrapped["chat_template"] = chat_template(chat_format)
    ids = {"bos_token_id": end, "eos_token_id": ends if len(ends) > 1 else end, "pad_token_id": end}
    # The folder without a tokenizer, and the files that it lacks.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as hidden:
        part = Path(hidden, folder.name)
        export_to_hugging_face(model, part)
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        texts = {
            "config.json": config | ids,
            "generation_config.json": ids,
            "tokenizer_config.json": wrapped,
            "tokenizer.json": json.loads(portable.to_str()),
        }
        for name, content in texts.items():
            (part / name).write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            to_disk(part / name)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
        to_disk(folder.parent)
