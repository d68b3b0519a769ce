"""Adapters in a model: attached by one call that finds the linear maps by name, and taken off without a
trace.

`attach_lora` freezes the model and wraps what the names mean; parts of a fused projection have names of
their own. `use_adapter` switches, `merge_lora` and `unmerge_lora` make one weight and undo it,
`adapter_for_each_row` serves a batch with several adapters, `detach_lora` puts the old modules back, with
the adapter added to their weights if wanted.

Left out: ranks that differ from layer to layer, modules that are trained whole beside the adapter, and
layers that stand at two places of a model.

Follows Hayou et al. (2024, "LoRA+: Efficient Low Rank Adaptation of Large Models") for the two learning
rates.

Explained and proven in appendix_lora/01_lora.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shared.checks import require
from shared.finetuning.lora_layer import LoRAConfig, LoRALayer, LowRankUpdate
from shared.model.attention import MultiHeadAttention
from shared.weights.names import unwrap


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the layers of a model that adapters are attached to, by their path in the model."""
    return {path: module for path, module in unwrap(model).named_modules() if isinstance(module, LoRALayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters that a model has."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.adapters))


def check_adapter(model: nn.Module, name: str | None) -> None:
    """Refuse the name of an adapter that the model does not have (ValueError); None, for no adapter, is allowed."""
    names = adapter_names(model)
    require("name", name, name is None or name in names, f"one of {', '.join(names) or 'none'}, or None")


@dataclass(frozen=True)
class Target:
    """Rows of a linear map that an adapter may change: its path in the model, the part's name, and the rows."""

    path: str
    part: str
    rows: tuple[int, int]


def possible_targets(model: nn.Module) -> dict[str, Target]:
    """Return everything that can be adapted, by name: each linear map, and the parts of each fused projection."""
    found, wrapped = {}, {layer.base for layer in lora_layers(model).values()}
    for path, module in unwrap(model).named_modules():
        is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        if is_linear and module not in wrapped:
            found[path] = Target(path, "all", (0, module.out_features))
        elif isinstance(module, MultiHeadAttention) and module.kv_dim is None:
            start = 0
            for part, heads in (
                ("query", module.n_heads),
                ("key", module.n_kv_heads),
                ("value", module.n_kv_heads),
            ):
                stop = start + heads * module.head_dim
                found[f"{path}.{part}".lstrip(".")] = Target(f"{path}.qkv".lstrip("."), part, (start, stop))
                start = stop
    return found


def choose_targets(model: nn.Module, targets: Sequence[str]) -> list[Target]:
    """Return what the names stand for: a name, or the end of one behind a point, as in PEFT's `target_modules`.

    "all-linear" stands for every linear map but the output head. Raises ValueError if a name fits nothing, or two of
    them mean the same rows.
    """
    possible, chosen = possible_targets(model), {}
    for target in targets:
        if target == "all-linear":
            fitting = [n for n, t in possible.items() if t.part == "all" and not n.endswith("output_head")]
        else:
            fitting = [n for n in possible if f".{n}".endswith(f".{target}") and target]
        ends = sorted({name.rpartition(".")[2] for name in possible})
        require("targets", target, bool(fitting), f"names such as {', '.join(ends)}")
        chosen |= {name: possible[name] for name in fitting}
    # The same rows twice, as the whole and as a part.
    whole = {target.path for target in chosen.values() if target.part == "all"}
    for name, target in chosen.items():
        apart = target.part == "all" or target.path not in whole
        require("targets", tuple(targets), apart, f"either {target.path} or its part {name}, not both")
    return list(chosen.values())


@dataclass(frozen=True)
class LoRACounts:
    """What `attach_lora` did: `layers` got an adapter of `trained` numbers; `frozen` are the model's own."""

    layers: int
    trained: int
    frozen: int

    @property
    def share(self) -> float:
        """The adapter's numbers as a share of the model's own."""
        return self.trained / self.frozen


def attach_lora(
    model: nn.Module,
    targets: str | Sequence[str] = ("query", "value"),
    *,
    name: str = "default",
    **options: object,
) -> LoRACounts:
    """Freeze a model and put a new adapter beside some of its linear maps; it is the active one and alone trained.

    Until it is trained, the model computes what it did. `detach_lora` undoes it. First weights are drawn from torch's
    global generator.

    Args:
        model: Any model with linear maps inside; of a classifier take its body, and its head stays trained.
        targets: Names, or their ends behind a point: "output", "feed_forward.up"; "all-linear" is all but the output
            head. Of a fused projection `qkv` also its parts "query", "key" and "value".
        name: Of the adapter; a model may have several, see `use_adapter`.
        options: Those of `LoRAConfig`: rank, alpha, dropout, rank_stabilized, dora, initialization.

    Returns:
        The counts.

    Raises:
        ValueError: Targets fit nothing or overlap, a number is out of range, the rank is larger than a side of a
            weight, an adapter of this name is there, or another is merged. Nothing has changed then.
    """
    model = unwrap(model)
    # Everything is checked first.
    config = LoRAConfig(targets=(targets,) if isinstance(targets, str) else tuple(targets), **options)
    chosen = choose_targets(model, config.targets)
    # An adapter called "keys" would hide a method of the dictionary that holds it.
    allowed = isinstance(name, str) and name.isidentifier() and not hasattr(nn.ModuleDict, name)
    require("name", name, allowed, "a word of letters, digits and _")
    require("name", name, name not in adapter_names(model), "new: this adapter is attached already")
    check_unmerged(model)
    maps = {target.path: model.get_submodule(target.path) for target in chosen}
    for target in chosen:
        start, stop = target.rows
        largest = min(stop - start, maps[target.path].in_features)
        require("rank", config.rank, config.rank <= largest, f"at most {largest} for {target.path}")
    # Freeze, and remember what was not frozen.
    if not lora_layers(model):
        model._trained_before_lora = [p for p in model.parameters() if p.requires_grad]
    frozen = own_size(model)
    model.requires_grad_(False)
    # Wrap each map once, then add the adapter.
    for path, module in maps.items():
        if not isinstance(module, LoRALayer):
            maps[path] = LoRALayer(module)
            model.set_submodule(path, maps[path])
        maps[path].add(name, config, {t.part: t.rows for t in chosen if t.path == path})
    use_adapter(model, name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return LoRACounts(len(maps), trained, frozen)


def own_size(model: nn.Module) -> int:
    """Return how many numbers the model has without its adapters, those that are packed included."""
    with without_lora(model) as plain:
        packed = sum(getattr(module, "n_packed", 0) for module in plain.modules())
        return packed + sum(parameter.numel() for parameter in plain.parameters())


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, and the only one that learns; None: the model computes as without adapters.

    Raises ValueError if there is none of this name, or adapters are merged.
    """
    check_adapter(model, name)
    check_unmerged(model)
    for layer in lora_layers(model).values():
        layer.active = name
        for other, updates in layer.adapters.items():
            updates.requires_grad_(other == name)


def check_unmerged(model: nn.Module) -> None:
    """Refuse a model whose adapter is merged (ValueError)."""
    merged = [path for path, layer in lora_layers(model).items() if layer.merged is not None]
    require("model", merged, not merged, "unmerged first (unmerge_lora)")


def merge_lora(model: nn.Module) -> None:
    """Let each layer compute with one weight, base and active adapter together: as fast as the model alone.

    The base's weights stay what they are, so merging twice adds nothing twice; it costs a second copy of the weights
    that have adapters. Raises ValueError if the model has no adapter.
    """
    layers = lora_layers(model)
    require("model", type(model).__name__, bool(layers), "a model with adapters")
    for layer in layers.values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit, since the base was never touched."""
    for layer in lora_layers(model).values():
        layer.unmerge()


@contextmanager
def adapter_for_each_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside this context row i of each batch is computed with adapter `names[i]`; None: with the base alone.

    Raises ValueError if there is no such adapter, one is merged, or the model is in training mode.
    """
    for name in names:
        check_adapter(model, name)
    check_unmerged(model)
    require(
        "model.training", model.training, not model.training, "False: rows of their own are for inference"
    )
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer.by_row = tuple(names)
        yield
    finally:
        for layer in layers:
            layer.by_row = None


@contextmanager
def without_lora(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context the model has its own layers, and the names of its parameters, as before `attach_lora`."""
    model = unwrap(model)
    layers = lora_layers(model)
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer.base)
        yield model
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear map of this weight (rows, columns) and bias (rows,)."""
    linear = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


@torch.no_grad()
def detach_lora(model: nn.Module, *, merge: bool = False) -> None:
    """Take all adapters off: the model has its own layers again, and trains what it trained before.

    Args:
        model: Without `merge` its weights are bit for bit what they were before `attach_lora`.
        merge: Add the active adapter to the weights first, for good. An output head that was tied to the embedding and
            has an adapter gets a weight of its own, and `model.config.tie_weights` becomes False. A packed map, which
            cannot hold the sum, is replaced by an `nn.Linear`.

    Raises:
        ValueError: The model has no adapter.
    """
    model = unwrap(model)
    layers = lora_layers(model)
    require("model", type(model).__name__, bool(layers), "a model with adapters")
    for path, layer in layers.items():
        weight = layer.weight if merge else None
        model.set_submodule(path, layer.base)
        if weight is None:
            continue
        if not isinstance(layer.base, nn.Linear):
            model.set_submodule(path, as_linear(weight, layer.bias))
            continue
        owners = sum(p is layer.base.weight for m in model.modules() for p in m._parameters.values())
        if owners == 1:
            layer.base.weight.copy_(weight)
            continue
        layer.base.weight = nn.Parameter(weight)
        if path == "output_head" and getattr(model.config, "tie_weights", False):
            model.config = replace(model.config, tie_weights=False)
    for parameter in model.__dict__.pop("_trained_before_lora", ()):
        parameter.requires_grad_(True)


def lora_groups(
    model: nn.Module, learning_rate: float, *, b_ratio: float = 1.0, other_learning_rate: float | None = None
) -> list[dict[str, object]]:
    """Return parameter groups for an optimizer: the adapters' A and magnitudes, their B, and what else is trained.

    Args:
        model: With a trained adapter; it may be a classifier whose body has it.
        learning_rate: Of A.
        b_ratio: How many times faster B learns. 1 is LoRA; LoRA+ (Hayou et al., 2024) recommends about 16.
        other_learning_rate: Of everything else that is trained, such as a head; `learning_rate` if not given.

    Raises:
        ValueError: A number is not above 0, or no adapter is trained.
    """
    other = learning_rate if other_learning_rate is None else other_learning_rate
    for name, value in (
        ("learning_rate", learning_rate),
        ("b_ratio", b_ratio),
        ("other_learning_rate", other),
    ):
        require(name, value, 0 < value < math.inf, "above 0")
    updates = [module for module in model.modules() if isinstance(module, LowRankUpdate)]
    b = [update.B for update in updates if update.B.requires_grad]
    require("model", type(model).__name__, bool(b), "a model with a trained adapter")
    a = [p for update in updates for p in (update.A, update.magnitude) if p is not None and p.requires_grad]
    known = {*a, *b}
    rest = [p for p in model.parameters() if p.requires_grad and p not in known]
    groups = [{"params": a, "lr": learning_rate}, {"params": b, "lr": learning_rate * b_ratio}]
    return groups + ([{"params": rest, "lr": other}] if rest else [])
