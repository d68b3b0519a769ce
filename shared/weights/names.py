"""Our parameters under the names of other libraries, by maps that can be read in both directions.

`huggingface_views` shows the parameters of a `GPTModel` under the names and in the shapes that
transformers has on disk. To write into the views is to import, to read them is to export.

Left out: other architectures than `FAMILIES`, and other libraries than transformers.

Follows the files that transformers saves.

`unwrap` and `unwrapped_name` find the model, and its own names, inside the wrappers of a training run.

Explained and proven in ch04_gpt/05_modern_variants.ipynb and ch05_pretraining/05_many_machines.ipynb; written
from there by `make promote`.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from shared.checks import choose
from shared.model.gpt import GPTModel

_LAYER = "model.layers.{}."
_LLAMA: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "output_head": "lm_head",
    "blocks.{}.attention_norm": _LAYER + "input_layernorm",
    "blocks.{}.attention.qkv": (
        _LAYER + "self_attn.q_proj",
        _LAYER + "self_attn.k_proj",
        _LAYER + "self_attn.v_proj",
    ),
    "blocks.{}.attention.output": _LAYER + "self_attn.o_proj",
    "blocks.{}.feed_forward_norm": _LAYER + "post_attention_layernorm",
}
_SWIGLU = {
    "blocks.{}.feed_forward.gate": _LAYER + "mlp.gate_proj",
    "blocks.{}.feed_forward.up": _LAYER + "mlp.up_proj",
    "blocks.{}.feed_forward.down": _LAYER + "mlp.down_proj",
}
_QK_NORM = {
    "blocks.{}.attention.query_norm": _LAYER + "self_attn.q_norm",
    "blocks.{}.attention.key_norm": _LAYER + "self_attn.k_norm",
}
_EXPERTS = {
    "blocks.{}.feed_forward.router": _LAYER + "block_sparse_moe.gate",
    "blocks.{}.feed_forward.experts.{}.gate": _LAYER + "block_sparse_moe.experts.{}.w1",
    "blocks.{}.feed_forward.experts.{}.down": _LAYER + "block_sparse_moe.experts.{}.w2",
    "blocks.{}.feed_forward.experts.{}.up": _LAYER + "block_sparse_moe.experts.{}.w3",
}
_QWEN3_EXPERTS = {
    "blocks.{}.feed_forward.router": _LAYER + "mlp.gate",
    "blocks.{}.feed_forward.experts.{}.gate": _LAYER + "mlp.experts.{}.gate_proj",
    "blocks.{}.feed_forward.experts.{}.up": _LAYER + "mlp.experts.{}.up_proj",
    "blocks.{}.feed_forward.experts.{}.down": _LAYER + "mlp.experts.{}.down_proj",
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
    "gpt2": _GPT2,
    "llama": _LLAMA | _SWIGLU,
    "mistral": _LLAMA | _SWIGLU,
    "qwen3": _LLAMA | _SWIGLU | _QK_NORM,
    "mixtral": _LLAMA | _EXPERTS,
    "qwen3_moe": _LLAMA | _QWEN3_EXPERTS | _QK_NORM,
    "helium": _LLAMA | _SWIGLU,
}
# In transformers' GPT-2 these matrices stand the other way round, rows are inputs (its class Conv1D).
_TRANSPOSED = re.compile(r"transformer\.h\.\d+\.\w+\.c_\w+\.weight")


def named_parts(
    model: GPTModel, names: Mapping[str, str | tuple[str, ...]], family: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of `model`, without gradient and split as a family has them, under the family's names.

    Args:
        model: It may be wrapped.
        names: Our layer -> theirs, as in `FAMILIES`; of several, our rows are theirs, stacked.
        family: What the map is called, for errors.

    Raises:
        ValueError: The map has no counterpart of one of the parameters.
    """
    model = unwrap(model)
    config = model.config
    query_rows = config.n_heads * config.actual_head_dim
    other_rows = (config.n_kv_heads or config.n_heads) * config.actual_head_dim
    for name, parameter in model.named_parameters():
        # Their name of this layer, or their three names; the map has {} for the numbers.
        name = unwrapped_name(name)
        layer, _, kind = name.rpartition(".")
        theirs = names.get(re.sub(r"\.\d+\b", ".{}", layer))
        if theirs is None:
            raise ValueError(f"{family} has no counterpart of {name}")
        several = theirs if isinstance(theirs, tuple) else (theirs,)
        # The rows of queries, keys and values are tensors of their own there.
        data, numbers = parameter.detach(), re.findall(r"\d+", name)
        parts = data.split((query_rows, other_rows, other_rows)) if len(several) == 3 else [data]
        for other, part in zip(several, parts, strict=True):
            yield f"{other.format(*numbers)}.{kind}", part


def huggingface_views(model: GPTModel, family: str) -> dict[str, Tensor]:
    """Return the parameters of `model` as a family has them on disk: name -> view without gradient.

    A view shares memory with our parameter; what is written into it is loaded. A tied output head is left out.

    Raises:
        ValueError: The family is not in `FAMILIES`, or it has no counterpart of one of the parameters.
    """
    parts = named_parts(model, choose("family", family, FAMILIES), family)
    return {name: part.T if _TRANSPOSED.fullmatch(name) else part for name, part in parts}


WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers (torch.compile, DDP, FSDP, averages), which is the same object as before.

    A wrapper is a module whose only child has one of the names in `WRAPPERS`. FSDP2 wraps nothing.
    """
    children = dict(model.named_children())
    inside = next((name for name in WRAPPERS if children.keys() == {name}), None)
    return model if inside is None else unwrap(children[inside])


def unwrapped_name(name: str) -> str:
    """Return the name that a parameter has without wrappers, around the model or around modules inside."""
    parts = [part for part in name.split(".") if part not in WRAPPERS or part == "module"]
    while len(parts) > 1 and parts[0] == "module":  # further inside it may be a module of the model's own
        parts.pop(0)
    return ".".join(parts)
