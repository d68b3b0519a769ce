"""Trained models from a name or a folder, without holding the weights twice.

`load_pretrained` takes the name of a GPT-2, of a checkpoint that ships with the course, or the path of a
folder, in our format or in Hugging Face's.

Left out: models that do not fit into memory, quantised weights, and families that `config_from_hf` does
not know.

Follows GPT-2's published files (Radford et al., 2019), at commits that are fixed here.

Explained and proven in ch05_pretraining/06_pretrained_weights.ipynb; written from there by `make promote`.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from shared.data.corpus import DATA
from shared.data.download import fetch_model_file
from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.configs import read_config
from shared.weights.files import load_safetensors, stored_dtype, weight_files


class _NoFirstWeights(TorchFunctionMode):
    """Inside this context the functions of torch.nn.init leave tensors as they are."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(
    config: GPTConfig, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> GPTModel:
    """Return a model to load weights into: its parameters are not initialised, its computed tables are right."""
    with _NoFirstWeights():
        model = GPTModel(config)
    for parameter in model.parameters():  # the same objects, so a tied output head stays tied
        parameter.data = torch.empty(parameter.shape, device=device, dtype=dtype)
    return model.to(device)  # the tables


CHECKPOINTS = DATA.parent / "checkpoints"
# Repository and commit: so a name means the same weights for ever.
GPT2_REPOSITORIES = {
    "gpt2-small": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
# What others call the same four.
ALIASES = {"gpt2": "gpt2-small"} | {repository: name for name, (repository, _) in GPT2_REPOSITORIES.items()}


def shipped_checkpoints() -> list[str]:
    """Return the names of the checkpoints that come with the course."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> GPTModel:
    """Return a trained model in evaluation mode; the process's memory grows by little more than the weights.

    Args:
        name_or_path: A name in `GPT2_REPOSITORIES` or `ALIASES` (from the Hub's cache or the network), a name in
            `shipped_checkpoints()`, or the path of a folder in our format or in Hugging Face's, of a family that
            `config_from_hf` knows. A name comes before a folder of the same name, which is "./name".
        device: Where the parameters are put.
        dtype: Their type; None keeps the one that most of the stored numbers have.

    Raises:
        ValueError: The name is unknown, or a file is damaged or does not fit the configuration.
        FileNotFoundError: The folder lacks a file.
        DownloadError: The Hub's file cannot be had.
    """
    # Configuration and files: from the Hub, or from a folder.
    name = ALIASES.get(os.fspath(name_or_path), os.fspath(name_or_path))
    if name in GPT2_REPOSITORIES:
        repository, commit = GPT2_REPOSITORIES[name]
        family, config = "gpt2", GPTConfig.preset(name)
        files = [fetch_model_file(repository, "model.safetensors", commit)]
    else:
        known = shipped_checkpoints()
        folder = CHECKPOINTS / name if name in known else Path(name)
        if not folder.is_dir():
            allowed = ", ".join([*GPT2_REPOSITORIES, *ALIASES, *known])
            raise ValueError(f"name_or_path must be one of {allowed}, or an existing folder, got {name!r}")
        family, config = read_config(folder / "config.json")
        files = weight_files(folder)
    # The weights go straight into a model that has none.
    model = empty_model(config, device, dtype or stored_dtype(files))
    load_safetensors(model, files, family)
    return model.eval()
