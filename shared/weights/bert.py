"""Encoders in files: BERTs of transformers read by name, ours written so that transformers reads them.

`load_bert` takes the name of a model that ships or comes with a package, or a folder. All names and
shapes are checked before a number moves. Old names of the norms' vectors are understood.

Left out: files of PyTorch's own format, which can run code, models in several files, and relatives of
BERT with other layers (RoBERTa, ALBERT, DistilBERT).

Follows the files that transformers saves.

Explained and proven in appendix_vit_bert/01_bert.ipynb; written from there by `make promote`.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shared.checks import check_path, require
from shared.data.models import model_file
from shared.model.bert import BERTConfig, BERTForPreTraining, BERTModel
from shared.text.wordpiece import WordPieceTokenizer
from shared.weights.files import read_header, read_pieces, weight_files, write_folder
from shared.weights.pretrained import CHECKPOINTS

_LAYER = "encoder.layer.{}."
# Our layer -> theirs, {} for the number of a block. Of three: our rows are theirs, stacked.
BERT_NAMES: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "segment_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "blocks.{}.attention.qkv": (
        _LAYER + "attention.self.query",
        _LAYER + "attention.self.key",
        _LAYER + "attention.self.value",
    ),
    "blocks.{}.attention.output": _LAYER + "attention.output.dense",
    "blocks.{}.attention_norm": _LAYER + "attention.output.LayerNorm",
    "blocks.{}.feed_forward.up": _LAYER + "intermediate.dense",
    "blocks.{}.feed_forward.down": _LAYER + "output.dense",
    "blocks.{}.feed_forward_norm": _LAYER + "output.LayerNorm",
    "pooler": "pooler.dense",
    "token_head.transform": "cls.predictions.transform.dense",
    "token_head.norm": "cls.predictions.transform.LayerNorm",
    "token_head": "cls.predictions",
    "next_head": "cls.seq_relationship",
}


def bert_views(model: BERTModel | BERTForPreTraining) -> dict[str, Tensor]:
    """Return the parameters under the names that transformers' BERT has on disk: name -> view without gradient.

    A view shares memory with our parameter; what is written into it is loaded. The encoder alone has no prefix, the
    encoder with its heads has "bert.", as there.
    """
    views: dict[str, Tensor] = {}
    prefix = "bert." if isinstance(model, BERTForPreTraining) else ""
    for name, parameter in model.named_parameters():
        layer, _, kind = name.removeprefix("bert.").rpartition(".")
        theirs = BERT_NAMES[re.sub(r"\.\d+\b", ".{}", layer)]
        several = theirs if isinstance(theirs, tuple) else (theirs,)
        # Queries, keys and values are layers of their own there.
        for other, part in zip(several, parameter.detach().chunk(len(several)), strict=True):
            full = f"{other.format(*re.findall(r'[0-9]+', layer))}.{kind}"
            views[full if full.startswith("cls.") else prefix + full] = part
    return views


# Our field -> theirs.
_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_segments": "type_vocab_size",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "feed_forward_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
# What our encoder always is, and what a file therefore may say.
_REQUIRED: dict[str, object] = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def bert_config_from_hf(config: Mapping[str, object]) -> BERTConfig:
    """Translate the contents of a BERT's `config.json`, as transformers 4 or 5 wrote it.

    Raises:
        ValueError: It is not a BERT's, a field is missing, or one asks for what `BERTModel` does not have.
    """
    for name, ours in _REQUIRED.items():
        found = config.get(name, None if name == "model_type" else ours)
        require(name, found, found == ours, repr(ours))
    missing = [theirs for theirs in _FIELDS.values() if theirs not in config]
    require("config", f"one without {', '.join(missing)}", not missing, "complete")
    dropouts = {
        config["hidden_dropout_prob"],
        config.get("attention_probs_dropout_prob", config["hidden_dropout_prob"]),
    }
    require("attention_probs_dropout_prob", dropouts, len(dropouts) == 1, "the same as hidden_dropout_prob")
    activation = config.get("hidden_act", "gelu")
    require("hidden_act", activation, activation in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}")
    return BERTConfig(
        **{ours: config[theirs] for ours, theirs in _FIELDS.items()}, activation=_ACTIVATIONS[activation]
    )


def bert_config_to_hf(config: BERTConfig, *, pretraining: bool = True) -> dict[str, object]:
    """Return the `config.json` for which transformers builds the same model."""
    values = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    values["intermediate_size"] = config.feed_forward_dim or 4 * config.emb_dim
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    return {
        "architectures": ["BertForPreTraining" if pretraining else "BertModel"],
        "model_type": "bert",
        "hidden_act": activation,
        "attention_probs_dropout_prob": config.dropout,
        "pad_token_id": 0,
        **values,
    }


# What old files hold besides weights, and old names of a norm's two vectors.
_BUFFERS = re.compile(r"embeddings\.position_ids$")
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def load_bert_weights(model: BERTModel | BERTForPreTraining, path: str | os.PathLike[str]) -> None:
    """Copy weights from a safetensors file of transformers' BERT into `model`, a few rows at a time.

    All names and shapes are checked first, so a file that does not fit changes nothing. An encoder can be loaded from
    a file with heads, which are left; a model with heads needs a file with both.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape, the output matrix is not the token embedding, or
            the file is damaged.
        FileNotFoundError: There is no such file.
    """
    views, with_heads = bert_views(model), isinstance(model, BERTForPreTraining)
    # Where the numbers come from: the names of today, with the prefix that the views have.
    sources: dict[str, str] = {}
    header = read_header(path)
    for name in header:
        plain = name
        for old, new in _OLD_NAMES:
            plain = plain.replace(old, new)
        bare = plain.removeprefix("bert.")
        if not _BUFFERS.search(bare) and (with_heads or not bare.startswith("cls.")):
            sources[f"bert.{bare}" if with_heads and not bare.startswith("cls.") else bare] = name
    # The output layer may be stored a second time: it must be the same.
    for extra, twin in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        if extra in sources and twin in sources:
            both = zip(read_pieces(path, sources[extra]), read_pieces(path, sources[twin]), strict=True)
            if not all(torch.equal(a, b) for (_, a), (_, b) in both):
                raise ValueError(f"{extra} must be {twin}, as in BERT, got other numbers in {path}")
            del sources[extra]
    # All names and shapes must fit before a number moves. An encoder may come without the pooler's two tensors.
    if wrong := sorted(views.keys() ^ sources.keys()):
        where = "is missing in the file" if wrong[0] in views else "has no place in the model"
        raise ValueError(f"{wrong[0]} {where}; {len(wrong)} names do not match")
    for name, view in views.items():
        shape = header[sources[name]][0]
        require(name, shape, shape == tuple(view.shape), f"of shape {tuple(view.shape)}")
    # Then the numbers, a few rows at a time.
    for name, view in views.items():
        for start, rows in read_pieces(path, sources[name]):
            view[start : start + len(rows)].copy_(rows)


PACKAGED = {"all-minilm-l6-v2": "minilm-l6"}  # of the package index -> its shape in `BERT_PRESETS`
OWN_CONFIG = "bert.json"  # the shipped model's: "config.json" would make it one of the course's GPTs


def shipped_berts() -> list[str]:
    """Return the names of the encoders that come with the course."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{OWN_CONFIG}"))


def _folder_of(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the folder in which a model's files are; ValueError for an unknown name."""
    check_path("name_or_path", name_or_path)
    name = os.fspath(name_or_path)
    if name in PACKAGED:
        return model_file(name).parent
    folder = CHECKPOINTS / name if name in shipped_berts() else Path(name)
    if not folder.is_dir():
        allowed = ", ".join([*PACKAGED, *shipped_berts()])
        raise ValueError(f"name_or_path must be one of {allowed}, or a folder, got {name!r}")
    return folder


def load_bert(
    name_or_path: str | os.PathLike[str], *, pretraining: bool = False, device: str | torch.device = "cpu"
) -> BERTModel | BERTForPreTraining:
    """Return a trained encoder in evaluation mode, in float32.

    Args:
        name_or_path: A name in `shipped_berts()` or `PACKAGED`, or a folder that transformers or `save_bert` wrote.
        pretraining: Whether the two heads are wanted too; MiniLM has none.
        device: Where the parameters are put.

    Raises:
        ValueError: The name is unknown, or the files are damaged, incomplete or not a BERT's.
        FileNotFoundError: The folder lacks a file.
        DownloadError: A packaged model is not installed.
    """
    name, folder = os.fspath(name_or_path), _folder_of(name_or_path)
    if name in PACKAGED:
        config = BERTConfig.preset(PACKAGED[name])
    else:
        own = folder / OWN_CONFIG
        path = own if own.is_file() else folder / "config.json"
        try:
            config = bert_config_from_hf(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be JSON in UTF-8: {error}") from error
    model = BERTForPreTraining(config) if pretraining else BERTModel(config)
    load_bert_weights(model, weight_files(folder)[0])
    return model.to(device).eval()


def load_bert_tokenizer(name_or_path: str | os.PathLike[str]) -> WordPieceTokenizer:
    """Return the tokenizer of a model that `load_bert` loads by the same name, from tokenizer.json or vocab.txt.

    Raises ValueError and FileNotFoundError as `load_bert` does.
    """
    folder = _folder_of(name_or_path)
    file = folder / "tokenizer.json"
    return WordPieceTokenizer.load(file if file.is_file() else folder / "vocab.txt")


def save_bert(
    model: BERTForPreTraining,
    tokenizer: WordPieceTokenizer,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    config_name: str = "config.json",
    replace: bool = False,
    **details: object,
) -> None:
    """Write a folder that `load_bert` and transformers' `BertForPreTraining` read.

    Args:
        model: The encoder with its heads.
        tokenizer: Its vocabulary goes to vocab.txt.
        folder, replace: See `shared.weights.files.write_folder`, where the errors stand too.
        dtype: In which the numbers are stored.
        config_name: Of the configuration's file.
        details: How the weights came about; they go into the configuration.
    """
    require(
        "tokenizer",
        tokenizer.vocab_size,
        tokenizer.vocab_size == model.config.vocab_size,
        "of the model's size",
    )
    tensors = {name: view.to(dtype) for name, view in bert_views(model).items()}
    config = bert_config_to_hf(model.config) | {"dtype": str(dtype).removeprefix("torch.")} | details
    files = {config_name: config}
    if replace:
        Path(folder, "vocab.txt").unlink(missing_ok=True)
    write_folder(folder, files, tensors, replace=replace)
    tokenizer.save(Path(folder, "vocab.txt"))
