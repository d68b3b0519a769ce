"""Weights and configurations of other programs, by maps of names that can be read in both directions.

`huggingface_views` shows the parameters of a `GPTModel` under the names and in the shapes that
transformers has on disk. To write into the views is to import, to read them is to export.

Left out: other architectures than `FAMILIES`, pickled checkpoints, quantised weights.

Explained and proven in ch04_gpt/05_modern_variants.ipynb and ch05_pretraining/06_pretrained_weights.ipynb;
written from there by `make promote`.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shared.checks import choose
from shared.data.corpus import DATA
from shared.data.download import fetch_model_file
from shared.model.gpt import GPTConfig, GPTModel

_LAYER = "model.layers.{}."
_LLAMA: dict[str, str | tuple[str, ...]] = {
    **{"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "output_head": "lm_head"},
    "blocks.{}.attention_norm": _LAYER + "input_layernorm",
    "blocks.{}.attention.qkv": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
    "blocks.{}.attention.output": _LAYER + "self_attn.o_proj",
    "blocks.{}.feed_forward_norm": _LAYER + "post_attention_layernorm",
}
_SWIGLU = {f"blocks.{{}}.feed_forward.{part}": f"{_LAYER}mlp.{part}_proj" for part in ("gate", "up", "down")}
_QK_NORM = {
    f"blocks.{{}}.attention.{part}_norm": f"{_LAYER}self_attn.{part[0]}_norm" for part in ("query", "key")
}
_EXPERTS = {"blocks.{}.feed_forward.router": _LAYER + "block_sparse_moe.gate"} | {
    f"blocks.{{}}.feed_forward.experts.{{}}.{ours}": f"{_LAYER}block_sparse_moe.experts.{{}}.{theirs}"
    for ours, theirs in {"gate": "w1", "down": "w2", "up": "w3"}.items()
}
_LAYER_GPT2 = "transformer.h.{}."
_GPT2: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "output_head": "lm_head",
    "blocks.{}.attention_norm": _LAYER_GPT2 + "ln_1",
    "blocks.{}.attention.qkv": _LAYER_GPT2 + "attn.c_attn",
    "blocks.{}.attention.output": _LAYER_GPT2 + "attn.c_proj",
    "blocks.{}.feed_forward_norm": _LAYER_GPT2 + "ln_2",
    "blocks.{}.feed_forward.up": _LAYER_GPT2 + "mlp.c_fc",
    "blocks.{}.feed_forward.down": _LAYER_GPT2 + "mlp.c_proj",
    "final_norm": "transformer.ln_f",
}
# Our layer -> theirs on disk, {} for the number of a block or expert. Several: our rows are theirs, stacked.
FAMILIES: dict[str, dict[str, str | tuple[str, ...]]] = {
    **{"gpt2": _GPT2, "llama": _LLAMA | _SWIGLU, "mistral": _LLAMA | _SWIGLU},
    **{"qwen3": _LLAMA | _SWIGLU | _QK_NORM, "mixtral": _LLAMA | _EXPERTS},
}
# In transformers' GPT-2 these matrices stand the other way round, rows are inputs (its class Conv1D).
_TRANSPOSED = re.compile(r"transformer\.h\.\d+\.\w+\.c_\w+\.weight")
# What old files hold besides weights: masks and rotary frequencies.
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def huggingface_views(model: GPTModel, family: str) -> dict[str, Tensor]:
    """Return the parameters of `model` as a family has them on disk: name -> view without gradient.

    A view shares memory with our parameter; what is written into it is loaded. A tied output head is left out.

    Raises:
        ValueError: The family is not in `FAMILIES`, or it has no counterpart of one of the parameters.
    """
    names, config = choose("family", family, FAMILIES), model.config
    query_rows, other_rows = (
        heads * config.actual_head_dim for heads in (config.n_heads, config.n_kv_heads or config.n_heads)
    )
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        theirs = names.get(re.sub(r"\.\d+\b", ".{}", layer))
        if theirs is None:
            raise ValueError(f"{family} has no counterpart of {name}")
        several = theirs if isinstance(theirs, tuple) else (theirs,)
        data, numbers = parameter.detach(), re.findall(r"\d+", name)
        parts = data.split((query_rows, other_rows, other_rows)) if len(several) == 3 else [data]
        for other, part in zip(several, parts, strict=True):
            full = f"{other.format(*numbers)}.{kind}"
            views[full] = part.T if _TRANSPOSED.fullmatch(full) else part
    return views


PIECE_NUMBERS = 2_000_000


def read_header(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type, such as ((4, 2), "F32"), of each tensor in a file; ValueError if it is damaged."""
    try:
        with safe_open(os.fspath(path), "pt") as file:
            entries = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in entries.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def read_pieces(path: str | os.PathLike, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yield whole rows of a tensor in a file, about `PIECE_NUMBERS` at a time, after the number of the first.

    The file is opened anew for each: while it is open, all pages that were read count as the process's own memory.
    """
    start, n_rows = 0, 1
    while start < n_rows:
        with safe_open(os.fspath(path), "pt") as file:
            stored = file.get_slice(name)
            n_rows, *rest = stored.get_shape()
            end = start + max(1, PIECE_NUMBERS // math.prod(rest))
            yield start, stored[start:end]
        start = end


def load_safetensors(
    model: GPTModel, paths: str | os.PathLike | Iterable[str | os.PathLike], family: str | None
) -> None:
    """Copy weights from files into `model`, a few rows at a time, in the model's type and on its device.

    All names and shapes are checked first, so a file that does not fit changes nothing. The names may lack the prefix
    `transformer.` or `model.`, as in files of the model without its head.

    Args:
        model: Its configuration must be that of the file; see `config_from_hf`.
        paths: A safetensors file, or all files of a model that is stored in several.
        family: A name in `FAMILIES`; None for our own names.

    Raises:
        ValueError: A tensor is missing, not known, there twice, of another shape, or a head of its own where the
            model's is tied; a parameter has no counterpart or no memory ("meta"); or a file is damaged.
        FileNotFoundError: A file is missing.
    """
    parameters = model.named_parameters()
    views = huggingface_views(model, family) if family else {name: p.detach() for name, p in parameters}
    if on_meta := [name for name, view in views.items() if view.is_meta]:
        raise ValueError(f"{on_meta[0]} is on the meta device, where nothing can be loaded into it")
    prefix = {None: "", "gpt2": "transformer."}.get(family, "model.")
    sources, shapes = {}, {}
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for name, (shape, _) in read_header(path).items():
            full = name if name.startswith((prefix, "lm_head.")) else prefix + name
            if full in sources:
                raise ValueError(f"{path} holds {name}, which an earlier file holds too")
            if not _BUFFERS.search(full):
                sources[full], shapes[full] = (path, name), shape
    head, embedding = "lm_head.weight", f"{FAMILIES.get(family, {}).get('token_embedding')}.weight"
    # Some programs store a tied head a second time.
    if head not in views and {head, embedding} <= sources.keys():
        pairs = zip(read_pieces(*sources[head]), read_pieces(*sources[embedding]), strict=False)
        if shapes[head] != shapes[embedding] or not all(torch.equal(a, b) for (_, a), (_, b) in pairs):
            raise ValueError(f"{head} differs from {embedding}: the model needs tie_weights=False")
        del sources[head]
    if wrong := sorted(views.keys() ^ sources.keys()):
        where = "is missing in the file" if wrong[0] in views else "has no place in the model"
        raise ValueError(f"{wrong[0]} {where}; {len(wrong)} names do not match")
    for name, view in views.items():
        if shapes[name] != tuple(view.shape):
            raise ValueError(f"{name} must have shape {tuple(view.shape)}, got {shapes[name]}")
    for name, view in views.items():
        for start, rows in read_pieces(*sources[name]):
            view[start : start + len(rows)].copy_(rows)


_LLAMA_FIELDS = {
    **{"vocab_size": "vocab_size", "context_length": "max_position_embeddings", "emb_dim": "hidden_size"},
    **{"n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"},
    **{"feed_forward_dim": "intermediate_size", "norm_eps": "rms_norm_eps"},
}
_GROUPED_FIELDS = _LLAMA_FIELDS | {"n_kv_heads": "num_key_value_heads"}
# Our field -> theirs, without which a configuration is not complete.
CONFIG_FIELDS: dict[str, dict[str, str]] = {
    "gpt2": {
        **{
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "emb_dim": "n_embd",
            "n_heads": "n_head",
        },
        **{"n_layers": "n_layer", "norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"},
    },
    "llama": _LLAMA_FIELDS,
    "mistral": _GROUPED_FIELDS,
    "qwen3": _GROUPED_FIELDS | {"head_dim": "head_dim"},
    "mixtral": _GROUPED_FIELDS
    | {"n_experts": "num_local_experts", "n_active_experts": "num_experts_per_tok"},
}
# Our field -> theirs, which may be missing or null, as ours may.
_OPTIONAL = {
    **{"init_std": "initializer_range", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"},
    **{"rope_base": "rope_theta", "rope_factor": "factor", "feed_forward_dim": "n_inner"},
    "rope_original_length": "original_max_position_embeddings",
}
# What our model always is, hence the only values that a configuration may have; the first is also the default.
_REQUIRED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("add_cross_attention", "scale_attn_by_inverse_layer_idx"), (False,)),
    **dict.fromkeys(("attention_dropout", "router_jitter_noise"), (0.0,)),
    **dict.fromkeys(("partial_rotary_factor", "low_freq_factor", "beta_slow"), (1.0, None)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), (None,)),
    **{"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "hidden_act": ("silu",)},
    **{"scale_attn_weights": (True,), "truncate": (True, None)},
    **{"high_freq_factor": (4.0, None), "beta_fast": (32.0, None)},
}
_ROPE_TYPES = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}


def config_from_hf(config: Mapping[str, object]) -> GPTConfig:
    """Translate the contents of a `config.json`, as transformers 4 or 5 wrote it, into a `GPTConfig`.

    Raises:
        ValueError: The `model_type` is not in `CONFIG_FIELDS`, a field is missing, or one asks for what a GPTConfig
            cannot say: some biases in a Llama, another activation, windows in some layers only, other rotary scaling...
    """
    family = str(config.get("model_type"))
    needed = choose("model_type", family, CONFIG_FIELDS)
    # transformers 5 has the rotary options in rope_parameters, 4 in rope_scaling and beside it.
    config = {**config, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    required, biases = dict(_REQUIRED), ("attention_bias", "mlp_bias")
    biased = family == "llama" and all(config.get(name) for name in biases)  # all of our biases or none
    required |= dict.fromkeys(biases, (biased,))
    if family == "gpt2":  # we have one dropout for all three places
        required |= dict.fromkeys(("attn_pdrop", "embd_pdrop"), (config.get("resid_pdrop"),))
    for name, values in required.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{name} must be {' or '.join(map(repr, values))}, got {config[name]!r}")
    if missing := [theirs for theirs in needed.values() if config.get(theirs) is None]:
        raise ValueError(f"{missing[0]} is missing in the configuration of a {family}")
    fields = (_OPTIONAL | needed).items()
    options = {ours: config[theirs] for ours, theirs in fields if config.get(theirs) is not None}
    options["tie_weights"] = config.get("tie_word_embeddings", family == "gpt2")
    if family != "gpt2":
        options |= {
            "norm": "rmsnorm",
            "positions": "rotary",
            "bias": biased,
            "qkv_bias": biased,
            "dropout": 0.0,
        }
        options |= {"feed_forward": "moe" if family == "mixtral" else "swiglu", "qk_norm": family == "qwen3"}
        rope_type = config.get("rope_type", config.get("type", "default"))
        options |= {"rope_scaling": choose("rope_type", rope_type, _ROPE_TYPES), "window": _window(config)}
    return GPTConfig(**options)


def _window(config: Mapping[str, object]) -> int | None:
    """Return the window of all layers; ValueError if it is not the same in all."""
    default = config["model_type"] in ("mistral", "mixtral")
    window = config.get("sliding_window") if config.get("use_sliding_window", default) else None
    known = "sliding_attention" if window else "full_attention"
    if "use_sliding_window" in config and window and not config.get("layer_types"):
        raise ValueError("use_sliding_window needs layer_types, to say which layers have the window")
    if different := [kind for kind in config.get("layer_types") or [] if kind != known]:
        raise ValueError(f"layer_types must be {known} in all layers, got {different[0]}")
    return window


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
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        name_or_path: A name in `GPT2_REPOSITORIES` (from the Hub's cache or the network), a name in
            `shipped_checkpoints()`, or the path of a folder in our format or in Hugging Face's, of a family that
            `config_from_hf` knows. A name comes before a folder of the same name.
        device: Where the parameters are put.
        dtype: Their type; None keeps the one that most of the stored numbers have.

    Raises:
        ValueError: The name is unknown, or a file is damaged or does not fit the configuration.
        FileNotFoundError: The folder lacks a file.
        DownloadError: The Hub's file cannot be had.
    """
    name = os.fspath(name_or_path)
    if name in GPT2_REPOSITORIES:
        repository, commit = GPT2_REPOSITORIES[name]
        family, config = "gpt2", GPTConfig.preset(name)
        files = [fetch_model_file(repository, "model.safetensors", commit)]
    else:
        known = shipped_checkpoints()
        folder = CHECKPOINTS / name if name in known else Path(name)
        if not folder.is_dir():
            allowed = ", ".join([*GPT2_REPOSITORIES, *known])
            raise ValueError(f"name_or_path must be one of {allowed}, or an existing folder, got {name!r}")
        family, config = read_config(folder / "config.json")
        files = weight_files(folder)
    model = empty_model(config, device, dtype or stored_dtype(files))
    load_safetensors(model, files, family)
    return model.eval()


def read_config(path: Path) -> tuple[str | None, GPTConfig]:
    """Return family (None: our format) and configuration from a config.json; ValueError if it is not understood."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "model" in values:
            return None, GPTConfig(**values["model"])
        return values.get("model_type"), config_from_hf(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder; FileNotFoundError if one is missing."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; pickled weights (.bin, .pt) are not read")
    return [folder / name for name in names]


def stored_dtype(paths: Iterable[Path]) -> torch.dtype:
    """Return the type of most numbers in safetensors files; ValueError if it is not float or a file is damaged."""
    counts = Counter()
    for path in paths:
        for shape, kind in read_header(path).values():
            counts[kind] += math.prod(shape)
    return choose("dtype of the stored weights", max(counts, key=counts.get, default="none"), _STORED)
