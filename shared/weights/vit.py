"""Vision Transformers in files: those of transformers read by name, ours written so that transformers reads
them.

`load_vit` takes the name of a model that ships, or a folder. All names and shapes are checked before a
number moves.

Left out: files of PyTorch's own format, which can run code, models in several files, the pooler, and
relatives with other layers (DeiT, DINOv2, Swin).

Follows the files that transformers saves.

Explained and proven in appendix_vit_bert/03_vit.ipynb; written from there by `make promote`.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shared.checks import check_path, require
from shared.model.vit import ViTClassifier, ViTConfig, ViTModel
from shared.weights.files import read_header, read_pieces, weight_files, write_folder
from shared.weights.pretrained import CHECKPOINTS

_LAYER = "encoder.layer.{}."
# Our layer -> theirs, {} for the number of a block. Of three: our rows are theirs, stacked.
VIT_NAMES: dict[str, str | tuple[str, ...]] = {
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patch_embedding.projection": "embeddings.patch_embeddings.projection",
    "blocks.{}.attention_norm": _LAYER + "layernorm_before",
    "blocks.{}.attention.qkv": (
        _LAYER + "attention.attention.query",
        _LAYER + "attention.attention.key",
        _LAYER + "attention.attention.value",
    ),
    "blocks.{}.attention.output": _LAYER + "attention.output.dense",
    "blocks.{}.feed_forward_norm": _LAYER + "layernorm_after",
    "blocks.{}.feed_forward.up": _LAYER + "intermediate.dense",
    "blocks.{}.feed_forward.down": _LAYER + "output.dense",
    "final_norm": "layernorm",
    "head": "classifier",
}
# What the modules of transformers 5 are called, should a file have these names.
_NEW_NAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)


def vit_views(model: ViTModel | ViTClassifier) -> dict[str, Tensor]:
    """Return the parameters under the names that transformers' ViT has on disk: name -> view without gradient.

    A view shares memory with our parameter; what is written into it is loaded. The encoder alone has no prefix, the
    classifier's encoder has "vit.", as there.
    """
    classifier = isinstance(model, ViTClassifier)
    config = model.body.config if classifier else model.config
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.removeprefix("body.").rpartition(".")
        if kind not in (
            "weight",
            "bias",
        ):  # two parameters that are no layers; theirs have a dimension for the batch
            full = ("vit." if classifier else "") + str(VIT_NAMES[kind])
            views[full] = parameter.detach().view(1, -1, config.emb_dim)
            continue
        theirs = VIT_NAMES[re.sub(r"\.\d+\b", ".{}", layer)]
        several = theirs if isinstance(theirs, tuple) else (theirs,)
        # Queries, keys and values are layers of their own there.
        for other, part in zip(several, parameter.detach().chunk(len(several)), strict=True):
            if layer == "patch_embedding.projection" and kind == "weight":  # a convolution there
                part = part.view(-1, config.n_channels, config.patch_size, config.patch_size)
            full = f"{other.format(*re.findall(r'[0-9]+', layer))}.{kind}"
            views[full if layer == "head" or not classifier else f"vit.{full}"] = part
    return views


# Our field -> theirs.
_FIELDS = {
    "patch_size": "patch_size",
    "n_channels": "num_channels",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "feed_forward_dim": "intermediate_size",
    "qkv_bias": "qkv_bias",
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


def vit_config_from_hf(config: Mapping[str, object]) -> ViTConfig:
    """Translate the contents of a ViT's `config.json`, as transformers 4 or 5 wrote it.

    Raises:
        ValueError: It is not a ViT's, a field is missing, or one asks for what `ViTModel` does not have.
    """
    found = config.get("model_type")
    require("model_type", found, found == "vit", "'vit'")
    names = [*_FIELDS.values(), "image_size"]
    missing = [name for name in names if name not in config and name != "qkv_bias"]
    require("config", f"one without {', '.join(missing)}", not missing, "complete")
    dropout = config["hidden_dropout_prob"]
    other = config.get("attention_probs_dropout_prob", dropout)
    require("attention_probs_dropout_prob", other, other == dropout, f"hidden_dropout_prob={dropout}")
    activation = config.get("hidden_act", "gelu")
    require("hidden_act", activation, activation in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}")
    values = {ours: config.get(theirs, True) for ours, theirs in _FIELDS.items()}
    return ViTConfig(image_size=config["image_size"], activation=_ACTIVATIONS[activation], **values)


def vit_config_to_hf(config: ViTConfig, n_labels: int | None = None) -> dict[str, object]:
    """Return the `config.json` for which transformers builds the same model; with labels, a classifier."""
    values = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    values["intermediate_size"] = config.feed_forward_dim or 4 * config.emb_dim
    height, width = config.image_size
    labels = {} if n_labels is None else {"id2label": {str(i): str(i) for i in range(n_labels)}}
    return {
        "architectures": ["ViTModel" if n_labels is None else "ViTForImageClassification"],
        "model_type": "vit",
        "image_size": height if height == width else [height, width],
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
        "attention_probs_dropout_prob": config.dropout,
        **values,
        **labels,
    }


def load_vit_weights(model: ViTModel | ViTClassifier, path: str | os.PathLike[str]) -> None:
    """Copy weights from a safetensors file of transformers' ViT into `model`, a few rows at a time.

    All names and shapes are checked first, so a file that does not fit changes nothing. Names of the modules of
    transformers 5 are understood too. An encoder can be loaded from a classifier's file; a pooler, which we do
    not have, is left.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape, or the file is damaged.
        FileNotFoundError: There is no such file.
    """
    views, classifier = vit_views(model), isinstance(model, ViTClassifier)
    # Where the numbers come from: the names of today, with the prefix that the views have.
    sources: dict[str, str] = {}
    header = read_header(path)
    for name in header:
        bare = name.removeprefix("vit.")
        for new, released in _NEW_NAMES:
            bare = re.sub(new, released, bare)
        is_head = bare.startswith("classifier.")
        if not bare.startswith("pooler.") and (classifier or not is_head):
            sources[f"vit.{bare}" if classifier and not is_head else bare] = name
    # All names and shapes must fit before a number moves.
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


OWN_VIT_CONFIG = "vit.json"  # the shipped model's: "config.json" would make it one of the course's GPTs


def load_vit(
    name_or_path: str | os.PathLike[str], *, classifier: bool = False, device: str | torch.device = "cpu"
) -> ViTModel | ViTClassifier:
    """Return a trained encoder, or a classifier, in evaluation mode, in float32.

    Args:
        name_or_path: "digits-vit", which ships with the course, or a folder that transformers or `save_vit` wrote.
        classifier: Whether the head is wanted too.
        device: Where the parameters are put.

    Raises:
        ValueError: The name is unknown, or the files are damaged, incomplete or not a ViT's.
        FileNotFoundError: The folder lacks a file.
    """
    check_path("name_or_path", name_or_path)
    shipped = {path.parent.name: path.parent for path in CHECKPOINTS.glob(f"*/{OWN_VIT_CONFIG}")}
    folder = shipped.get(os.fspath(name_or_path), Path(name_or_path))
    allowed = f"one of {', '.join(sorted(shipped))}, or a folder"
    require("name_or_path", os.fspath(name_or_path), folder.is_dir(), allowed)
    own = folder / OWN_VIT_CONFIG
    path = own if own.is_file() else folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON in UTF-8: {error}") from error
    model: ViTModel | ViTClassifier = ViTModel(vit_config_from_hf(values))
    if classifier:
        # transformers names two labels when nothing is said, and does not write them down.
        model = ViTClassifier(model, len(values.get("id2label", "01")))
    load_vit_weights(model, weight_files(folder)[0])
    return model.to(device).eval()


def save_vit(
    model: ViTModel | ViTClassifier,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    config_name: str = "config.json",
    replace: bool = False,
    **details: object,
) -> None:
    """Write a folder that `load_vit` and transformers' ViT read.

    Args:
        model: An encoder, or a classifier that reads the class token.
        folder, replace: See `shared.weights.files.write_folder`, where the errors stand too.
        dtype: In which the numbers are stored.
        config_name: Of the configuration's file.
        details: How the weights came about; they go into the configuration.

    Raises:
        ValueError: A classifier takes the mean of the patches, which transformers' does not.
    """
    body, n_labels = model, None
    if isinstance(model, ViTClassifier):
        require("pooling", model.pooling, model.pooling == "class", "'class', as in transformers")
        body, n_labels = model.body, model.head.out_features
    tensors = {name: view.to(dtype) for name, view in vit_views(model).items()}
    config = vit_config_to_hf(body.config, n_labels) | {"dtype": str(dtype).removeprefix("torch.")} | details
    write_folder(folder, {config_name: config}, tensors, replace=replace)
