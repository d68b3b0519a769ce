"""What `llm export` does: one model or adapter, one target, and lines that say what was written."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shared.serving.models import OpenedModel
from shared.text.chat_format import ChatFormat
from shared.weights.files import new_file


def export_model(
    found: OpenedModel,
    path: Path,
    target: str,
    *,
    kind: str,
    modelfile: bool,
    progress: Callable[[Iterable, str], Iterable],
) -> Iterator[str]:
    """Write a model, and yield lines about it.

    Args:
        found: The model and what belongs to it.
        path: A file, or for "hf" a folder; it must not exist.
        target: "gguf", "onnx" or "hf".
        kind: For "gguf": how matrices are stored.
        modelfile: For "gguf": also write Ollama's `Modelfile` into the same folder.
        progress: Wraps an iterable and gets what it is.

    Raises:
        ValueError: The target cannot hold the model.
        FileExistsError: Something is there already.
        OSError: It cannot be written; nothing is left of it.
    """
    if target == "gguf":
        yield from export_gguf(found, path, kind, modelfile, progress)
    elif target == "onnx":
        yield from export_onnx(found, path)
    else:
        from shared.weights.huggingface import export_with_tokenizer

        export_with_tokenizer(found.model, path, found.needed_tokenizer(), found.chat_format)
        yield f"{path}: config.json, model.safetensors, tokenizer.json and what belongs to them"


def export_gguf(
    found: OpenedModel, path: Path, kind: str, modelfile: bool, progress: Callable[[Iterable, str], Iterable]
) -> Iterator[str]:
    """Write a GGUF file, and Ollama's Modelfile if it is wanted."""
    from shared.weights.gguf_writer import write_gguf

    beside = path.parent / "Modelfile"
    if modelfile and beside.exists():
        raise FileExistsError(f"path must be new, got {beside}")
    kinds = write_gguf(
        found.model,
        path,
        found.needed_tokenizer(),
        kind=kind,
        chat_format=found.chat_format,
        name=Path(found.name).stem,
        progress=lambda tensors: progress(tensors, "tensors"),
    )
    counts = {name: list(kinds.values()).count(name) for name in sorted(set(kinds.values()))}
    said = ", ".join(f"{count} in {name}" for name, count in counts.items())
    yield f"{path}: {path.stat().st_size:,} bytes, {len(kinds)} tensors ({said})"
    if kind.startswith("Q") and "F16" in counts:
        first = next(name for name, stored in kinds.items() if stored == "F16")
        yield f"{counts['F16']} matrices have rows that are no multiple of 32 and stay F16, such as {first}"
    if modelfile:
        with new_file(beside) as part:
            part.write_text(ollama_modelfile(path.name, found.chat_format), encoding="utf-8")
        yield f"{beside}: ollama create NAME -f {beside}"


def export_onnx(found: OpenedModel, path: Path) -> Iterator[str]:
    """Write an ONNX file with the tokenizer in its metadata."""
    from shared.weights.huggingface import portable_tokenizer
    from shared.weights.onnx import export_to_onnx

    tokenizer = found.needed_tokenizer()
    stops = [tokenizer.eot_token]
    if found.chat_format is not None:
        stops.append(tokenizer.encode_single_token(found.chat_format.end))
    details = {"tokenizer": portable_tokenizer(tokenizer).to_str(), "stop_tokens": json.dumps(stops)}
    export_to_onnx(found.model, path, **details)
    yield f"{path}: {path.stat().st_size:,} bytes, float32, tokenizer inside"


def export_adapter(folder: str, path: Path) -> Iterator[str]:
    """Write an adapter of ours as a folder of PEFT's, and yield lines about it.

    Raises:
        ValueError: The folder holds no adapter, one of a part of a model, or one whose base has other weights here.
        FileExistsError: Something is there already.
    """
    import torch

    from shared.finetuning.lora_files import load_adapter, read_object, save_peft_adapter
    from shared.weights.pretrained import HUB_REPOSITORIES, load_pretrained

    about = read_object(Path(folder) / "adapter.json")
    if about.get("n_blocks") is not None:
        raise ValueError(f"{folder} must be of a whole model for PEFT, got one of its lower blocks")
    base = str(about.get("base"))
    model = load_pretrained(base, dtype=torch.float32)
    _, extra = load_adapter(model, folder)
    repository, _ = HUB_REPOSITORIES.get(base, (base, ""))
    save_peft_adapter(model, path, base=repository)
    yield f"{path}: adapter_config.json and adapter_model.safetensors, for {repository}"
    if base in HUB_REPOSITORIES:
        yield "it was trained on the weights of the package, in four bits; those of the Hub are a little different"
    if extra:
        yield f"left out: {', '.join(sorted(extra))}, for which PEFT's format has no place"


def ollama_modelfile(file_name: str, chat_format: ChatFormat | None) -> str:
    """Return the text of a Modelfile for a GGUF file that lies beside it.

    The template is in Go's language, since Ollama does not run the one in the file.
    """
    lines = [f"FROM ./{file_name}", "PARAMETER temperature 0"]
    if chat_format is None:
        return "\n".join([*lines, 'TEMPLATE """{{ .Prompt }}"""', ""])
    start, end = chat_format.start, chat_format.end
    lines += [
        f'PARAMETER stop "{end}"',
        f'TEMPLATE """{{{{- range .Messages }}}}{start}{{{{ .Role }}}}',
        f"{{{{ .Content }}}}{end}",
        f"{{{{ end }}}}{start}assistant",
        '"""',
    ]
    if chat_format.default_system is not None:
        lines.append(f'SYSTEM """{chat_format.default_system}"""')
    return "\n".join([*lines, ""])
