"""Adapters in folders: numbers as safetensors and choices as JSON, in our format and in PEFT's.

Our format notes the SHA-256 of the base's weights and refuses another base. PEFT's has the names of
transformers' modules. Everything is checked before a model is changed, and nothing is pickled.

Left out: what PEFT can do and `LoRAConfig` cannot say (it is refused, by name), and adapters of models
without a counterpart in transformers.

Follows the files that PEFT writes (Mangrulkar et al., 2022).

Explained and proven in appendix_lora/01_lora.ipynb; written from there by `make promote`.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.checks import require
from shared.finetuning.lora import (
    attach_lora,
    check_adapter,
    choose_targets,
    lora_layers,
    possible_targets,
    without_lora,
)
from shared.finetuning.lora_layer import LoRAConfig
from shared.model.gpt import GPTModel
from shared.weights.configs import family_of
from shared.weights.files import to_disk, write_folder
from shared.weights.names import FAMILIES, unwrap


def adapter_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the numbers of an adapter by path, part and kind: "blocks.0.attention.qkv.query.A".

    Raises ValueError if there is no adapter of this name.
    """
    check_adapter(model, name)
    require("name", name, name is not None, "the name of an adapter")
    return {
        f"{path}.{key}": parameter
        for path, layer in lora_layers(model).items()
        if name in layer.adapters
        for key, parameter in layer.adapters[name].named_parameters()
    }


def base_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the model's own numbers, as float32 and by name: adapters or not, packed or not.

    Of a float32 model it is the `weights_hash` that it had before `attach_lora`.
    """
    found = hashlib.sha256()
    with without_lora(model) as plain:
        packed = {f"{path}.weight": m for path, m in plain.named_modules() if getattr(m, "n_packed", 0)}
        named = dict(plain.named_parameters()) | packed
        for name in sorted(named):
            one = named[name]
            numbers = (one.weight if isinstance(one, nn.Module) else one.detach()).float()
            found.update(f"{name} {tuple(numbers.shape)} {numbers.dtype}\n".encode())
            found.update(numbers.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    base: str = "",
    extra: Mapping[str, Tensor] | None = None,
    replace: bool = False,
    dtype: torch.dtype = torch.float32,
    **details: object,
) -> None:
    """Write an adapter alone: its numbers as safetensors, and adapter.json, with its choices and the base's hash.

    Args:
        model: It has the adapter.
        folder: See `shared.weights.files.write_folder`, where the errors stand too.
        name: Of the adapter.
        base: What the base is called, for `load_pretrained`.
        extra: Other tensors that belong to it, such as a head, by name.
        replace: Write in the place of an earlier adapter.
        dtype: Of the stored numbers; in bfloat16 they take half the room, and are rounded.
        details: How it came about (JSON).

    Raises:
        ValueError: There is no adapter of this name.
    """
    tensors = adapter_tensors(model, name)
    config = next(layer.configs[name] for layer in lora_layers(model).values() if name in layer.configs)
    about = {"adapter": asdict(config), "base": base, "base_sha256": base_hash(model)}
    more = {f"extra.{key}": value.detach() for key, value in (extra or {}).items()}
    stored = {key: value.detach().to(dtype) for key, value in tensors.items()} | more
    write_folder(folder, {"adapter.json": about | details}, stored, replace=replace)


def read_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file; ValueError if it holds none, FileNotFoundError if there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    require(str(path), type(found).__name__, isinstance(found, dict), "a file with one object")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; ValueError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def attach_tensors(
    model: nn.Module, config: LoRAConfig, stored: Mapping[str, Tensor], name: str, source: str
) -> None:
    """Attach an adapter and give it numbers; ValueError if they do not fit, and the model is then as it was."""
    model, wanted = unwrap(model), {}
    for target in choose_targets(model, config.targets):
        rows, columns = target.rows[1] - target.rows[0], model.get_submodule(target.path).in_features
        shapes = {"A": (config.rank, columns), "B": (rows, config.rank), "magnitude": (rows,)}
        for kind in ("A", "B", "magnitude") if config.dora else ("A", "B"):
            wanted[f"{target.path}.{target.part}.{kind}"] = shapes[kind]
    # Every name, shape and number before anything is attached.
    if wrong := sorted(wanted.keys() ^ stored.keys()):
        where = "is missing in" if wrong[0] in wanted else "has no place in the model, but stands in"
        raise ValueError(f"{wrong[0]} {where} {source}; {len(wrong)} names do not match")
    for key, tensor in stored.items():
        require(
            f"{key} in {source}", tuple(tensor.shape), tensor.shape == wanted[key], f"of shape {wanted[key]}"
        )
        require(f"{key} in {source}", "another", bool(tensor.isfinite().all()), "of finite numbers")
    with torch.random.fork_rng(devices=[]):  # the first weights are overwritten
        attach_lora(model, name=name, **{field.name: getattr(config, field.name) for field in fields(config)})
    tensors = adapter_tensors(model, name)
    with torch.no_grad():
        for key, value in stored.items():
            tensors[key].copy_(value)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default"
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Attach the adapter of a folder that `save_adapter` wrote; return what adapter.json says, and the extra tensors.

    Raises:
        ValueError: The model's weights are not those that the adapter was trained on, the files are damaged or do not
            fit together, or as `attach_lora`. The model is then as it was.
        FileNotFoundError: The folder lacks a file.
    """
    folder = Path(folder)
    about = read_object(folder / "adapter.json")
    stored = read_tensors(folder / "model.safetensors")
    options = about.get("adapter")
    require("adapter.json", options, isinstance(options, dict), "an object with the adapter's choices")
    found = base_hash(model)
    if about.get("base_sha256") != found:
        wanted = f"{str(about.get('base_sha256'))[:12]}... ({about.get('base') or 'no name'})"
        raise ValueError(
            f"model must have the weights that {folder} was trained on, {wanted}, got {found[:12]}..."
        )
    extra = {key.removeprefix("extra."): stored.pop(key) for key in [*stored] if key.startswith("extra.")}
    try:
        config = LoRAConfig(**{**options, "targets": tuple(options.get("targets", ()))})
    except TypeError as error:
        raise ValueError(f"{folder} holds choices that are not known here: {error}") from error
    attach_tensors(model, config, stored, name, str(folder))
    return about, extra


_PREFIX = "base_model.model."
_KINDS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PARTS = ("query", "key", "value")


def peft_layers(model: GPTModel) -> dict[tuple[str, str], str]:
    """Return how PEFT calls what an adapter of ours can change: (path, part) -> path in transformers' model.

    Llama and its relatives have three projections where we have one, and our parts are theirs. GPT-2 has one, too.
    Raises ValueError if transformers has no counterpart of the model.
    """
    model = unwrap(model)
    names, found = FAMILIES[family_of(model.config)], {}
    for target in possible_targets(model).values():
        theirs = names.get(re.sub(r"\.\d+\b", ".{}", target.path))
        if theirs is None:
            continue
        if isinstance(theirs, tuple) and target.part in PARTS:
            theirs = theirs[PARTS.index(target.part)]
        elif isinstance(theirs, tuple) or target.part != "all":
            continue
        found[target.path, target.part] = theirs.format(*re.findall(r"\d+", target.path))
    return found


def _peft_tensors(model: GPTModel, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return an adapter's numbers under PEFT's names, and the modules that it changes there."""
    tensors, theirs, found = adapter_tensors(model, name), peft_layers(model), {}
    rows = {(target.path, target.part): target.rows for target in possible_targets(model).values()}
    for key, value in tensors.items():
        place, _, kind = key.rpartition(".")
        path, _, part = place.rpartition(".")
        pieces = {part: (0, None)} if (path, part) in theirs else {}
        if not pieces and part == "all" and (path, "query") in theirs:  # one of ours, three of theirs
            pieces = {piece: rows[path, piece] for piece in PARTS}
        require("adapter", place, bool(pieces), f"of maps that {family_of(model.config)} has")
        for piece, (start, stop) in pieces.items():
            taken = value.detach() if kind == "A" else value.detach()[start:stop]
            found[f"{_PREFIX}{theirs[path, piece]}.{_KINDS[kind]}"] = taken
    endings = tuple(f".{ending}" for ending in _KINDS.values())
    modules = {
        key.removeprefix(_PREFIX).removesuffix(end) for key in found for end in endings if key.endswith(end)
    }
    return found, sorted(modules)


def _write_peft_folder(folder: Path, values: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write a folder with PEFT's two files; it appears when it is complete."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"folder must be new or empty, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as hidden:
        part = Path(hidden, "part")
        write_folder(part, {"adapter_config.json": values}, tensors)
        (part / "model.safetensors").rename(part / "adapter_model.safetensors")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
        to_disk(folder.parent)


# Fields of adapter_config.json that change what is computed, and the values of them that we know.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base as well
    "layers_pattern": (None, [], ""),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
}


def save_peft_adapter(
    model: GPTModel, folder: str | os.PathLike[str], *, name: str = "default", base: str = ""
) -> None:
    """Write an adapter that PEFT's `PeftModel.from_pretrained` puts on what `export_to_hugging_face` wrote.

    An adapter of a whole `qkv` becomes three in the families that have three projections: A is the same in each, and
    the rows of B are divided. No rows change their order, as our rotary positions pair the numbers of a head as
    transformers does.

    Args:
        model: It has the adapter.
        folder: It must not exist, or be empty.
        name: Of the adapter.
        base: What transformers loads the base by: a name on the Hub, or a folder.

    Raises:
        ValueError: The model or one of its parts has no counterpart, or there is no adapter of this name.
        FileExistsError: The folder holds something.
    """
    model = unwrap(model)
    layers = lora_layers(model).values()
    tensors, modules = _peft_tensors(model, name)
    config = next(layer.configs[name] for layer in layers if name in layer.configs)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.dora,
        "fan_in_fan_out": family_of(model.config) == "gpt2",
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }
    _write_peft_folder(Path(folder).expanduser().absolute(), values, tensors)


def load_peft_adapter(
    model: GPTModel, folder: str | os.PathLike[str], *, name: str = "default"
) -> dict[str, object]:
    """Attach an adapter that PEFT has saved; return its adapter_config.json.

    Args:
        model: Of the architecture that it was trained on; PEFT does not note with which weights, so they are not
            checked.
        folder: With adapter_config.json and adapter_model.safetensors; pickled weights (.bin) are not read.
        name: What the adapter is called here.

    Raises:
        ValueError: It is no LoRA, does something that we do not (see `_PLAIN`), or the files are damaged or do not fit
            the model. The model is then as it was.
        FileNotFoundError: The folder lacks a file.
    """
    folder = Path(folder)
    values = read_object(folder / "adapter_config.json")
    for field_name, known in _PLAIN.items():
        value = values.get(field_name, known[0])
        require(field_name, value, value in known, f"one of {', '.join(map(repr, known))}")
    stored = read_tensors(folder / "adapter_model.safetensors")
    # Their names, and ours.
    possible, ours = possible_targets(model), {}
    by_place = {(target.path, target.part): own for own, target in possible.items()}
    for place, theirs in peft_layers(model).items():
        for kind, ending in _KINDS.items():
            ours[f"{_PREFIX}{theirs}.{ending}"] = (by_place[place], f"{place[0]}.{place[1]}.{kind}")
    unknown = sorted(stored.keys() - ours.keys())
    require(str(folder), unknown[:1], not unknown, "an adapter of linear maps that the model has")
    try:
        config = LoRAConfig(
            targets=tuple(dict.fromkeys(ours[key][0] for key in stored)),
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            rank_stabilized=values.get("use_rslora", False),
            dora=values.get("use_dora", False),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no complete adapter_config.json: {error!r}") from error
    tensors = {ours[key][1]: value.float() for key, value in stored.items()}
    attach_tensors(model, config, tensors, name, str(folder))
    return values


def load_any_adapter(model: GPTModel, folder: str | os.PathLike[str], *, name: str = "default") -> None:
    """Attach the adapter of a folder, ours or PEFT's; errors as `load_adapter` and `load_peft_adapter`."""
    folder = Path(folder)
    if (folder / "adapter.json").is_file():
        load_adapter(model, folder, name=name)
    elif (folder / "adapter_config.json").is_file():
        load_peft_adapter(model, folder, name=name)
    else:
        raise ValueError(f"folder must hold adapter.json or adapter_config.json, got {os.fspath(folder)!r}")
