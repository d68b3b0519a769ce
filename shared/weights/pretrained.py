"""Trained models from a name or a folder, without holding the weights twice.

`load_pretrained` takes the name of a GPT-2, of a checkpoint that ships with the course, of a model from
the package index, or the path of a folder, in our format or in Hugging Face's, or of a GGUF file.
`load_tokenizer` returns the tokenizer that belongs to a name.

Left out: models that do not fit into memory, computing with quantised weights, and families that
`config_from_hf` does not know.

Follows GPT-2's published files (Radford et al., 2019), at commits that are fixed here.

Explained and proven in ch05_pretraining/06_pretrained_weights.ipynb and
ch05_pretraining/07_a_real_model.ipynb; written from there by `make promote`.
"""

import os
from pathlib import Path

import tiktoken
import torch

from shared.checks import choose
from shared.data.corpus import DATA
from shared.data.download import fetch_model_file, gpt2_encoding
from shared.data.models import has_model, model_file
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding
from shared.text.tokenizer import BPETokenizer
from shared.weights.configs import read_config
from shared.weights.files import empty_model, load_safetensors, stored_dtype, weight_files
from shared.weights.gguf import read_gguf
from shared.weights.gguf_model import PATTERNS, load_gguf, tokenizer_from_gguf, tokenizer_from_json

CHECKPOINTS = DATA.parent / "checkpoints"
# Repository and commit: so a name means the same weights for ever.
GPT2_REPOSITORIES = {
    "gpt2-small": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
# What a package of the index holds as GGUF (`shared.data.models`), and where it comes from if the package is missing.
HUB_REPOSITORIES = {
    "smollm2-135m-instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    ),
}
# What others call the same models.
ALIASES = {
    "gpt2": "gpt2-small",
    **{repository: name for name, (repository, _) in (GPT2_REPOSITORIES | HUB_REPOSITORIES).items()},
}


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
            `shipped_checkpoints()`, one in `HUB_REPOSITORIES` (from its package, else from the Hub), the path of a
            `.gguf` file, or the path of a folder in our format or in Hugging Face's, of a family that
            `config_from_hf` knows. A name comes before a folder of the same name, which is "./name".
        device: Where the parameters are put.
        dtype: Their type; None keeps the one that most of the stored numbers have, or is float32 where they are packed.

    Raises:
        ValueError: The name is unknown, or a file is damaged or does not fit the configuration.
        FileNotFoundError: There is no such file, or the folder lacks one.
        DownloadError: A file can be had neither from a package nor from the Hub.
    """
    # One file that holds everything.
    name = ALIASES.get(os.fspath(name_or_path), os.fspath(name_or_path))
    if name.endswith(".gguf"):
        return load_gguf(Path(name).expanduser(), device=device, dtype=dtype)
    if name in HUB_REPOSITORIES and has_model(name):
        return load_gguf(model_file(name), device=device, dtype=dtype)
    # Configuration and files: from the Hub, or from a folder.
    if name in GPT2_REPOSITORIES:
        repository, commit = GPT2_REPOSITORIES[name]
        family, config = "gpt2", GPTConfig.preset(name)
        files = [fetch_model_file(repository, "model.safetensors", commit)]
    elif name in HUB_REPOSITORIES:
        repository, commit = HUB_REPOSITORIES[name]
        family, config = read_config(fetch_model_file(repository, "config.json", commit))
        files = [fetch_model_file(repository, "model.safetensors", commit)]
    else:
        known = shipped_checkpoints()
        folder = CHECKPOINTS / name if name in known else Path(name)
        if not folder.is_dir():
            allowed = ", ".join([*GPT2_REPOSITORIES, *HUB_REPOSITORIES, *ALIASES, *known])
            raise ValueError(f"name_or_path must be one of {allowed}, a folder or a .gguf file, got {name!r}")
        family, config = read_config(folder / "config.json")
        files = weight_files(folder)
    # The weights go straight into a model that has none.
    model = empty_model(config, device, dtype or stored_dtype(files))
    load_safetensors(model, files, family)
    return model.eval()


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> BPETokenizer | tiktoken.Encoding:
    """Return the tokenizer of a model that `load_pretrained` loads by the same name, or of a `.gguf` file.

    Raises:
        ValueError: The name is unknown, or the file holds no tokenizer that can be read.
        FileNotFoundError: There is no such file.
        DownloadError: It is to be had from the network only, and cannot be had.
    """
    name = ALIASES.get(os.fspath(name_or_path), os.fspath(name_or_path))
    if name in GPT2_REPOSITORIES:
        return gpt2_encoding()
    if name in shipped_checkpoints():
        return tale_encoding()
    if name.endswith(".gguf"):
        return tokenizer_from_gguf(read_gguf(Path(name).expanduser()))
    repository, commit = choose("name_or_path", name, HUB_REPOSITORIES)
    if has_model(name):
        return tokenizer_from_gguf(read_gguf(model_file(name)))
    return tokenizer_from_json(fetch_model_file(repository, "tokenizer.json", commit), PATTERNS["smollm"])
