"""Our parameters under the names of other libraries, by maps that can be read in both directions.

`huggingface_views` shows the parameters of a `GPTModel` under the names and in the shapes that
transformers has on disk. To write into the views is to import, to read them is to export.

Left out: other architectures than `FAMILIES`, and other libraries than transformers.

Follows the files that transformers saves: GPT-2 (Radford et al., 2019), Llama (Touvron et al., 2023),
Mistral, Qwen3 and Mixtral (Jiang et al., 2024).

Explained and proven in ch04_gpt/05_modern_variants.ipynb; written from there by `make promote`.
"""

import re

from torch import Tensor

from shared.model.gpt import GPTModel
from shared.model.layers import choose

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
