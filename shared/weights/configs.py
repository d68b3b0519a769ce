"""Configurations in the words of Hugging Face's `config.json`, there and back.

`config_from_hf` reads one into a `GPTConfig`, `config_to_hf` writes one, and `family_of` says which
family of transformers computes what a configuration describes.

Left out: families other than those in `CONFIG_FIELDS`, and every field that asks for what `GPTModel` does
not have; such a configuration is refused by the name of the field.

Follows the configuration classes of transformers 4 and 5.

Explained and proven in ch04_gpt/05_modern_variants.ipynb and ch05_pretraining/06_pretrained_weights.ipynb;
written from there by `make promote`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shared.checks import choose
from shared.model.gpt import GPTConfig

_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "feed_forward_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_GROUPED_FIELDS = _LLAMA_FIELDS | {"n_kv_heads": "num_key_value_heads"}
# Our field -> theirs, without which a configuration is not complete.
CONFIG_FIELDS: dict[str, dict[str, str]] = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "emb_dim": "n_embd",
        "n_heads": "n_head",
        "n_layers": "n_layer",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
    },
    "llama": _LLAMA_FIELDS,
    "mistral": _GROUPED_FIELDS,
    "qwen3": _GROUPED_FIELDS | {"head_dim": "head_dim"},
    "mixtral": {
        **_GROUPED_FIELDS,
        "n_experts": "num_local_experts",
        "n_active_experts": "num_experts_per_tok",
    },
    "qwen3_moe": {
        **_GROUPED_FIELDS,
        "feed_forward_dim": "moe_intermediate_size",
        "n_experts": "num_experts",
        "n_active_experts": "num_experts_per_tok",
    },
    "helium": _GROUPED_FIELDS | {"head_dim": "head_dim"},
}
# Our field -> theirs, which may be missing or null, as ours may.
_OPTIONAL_GPT2 = {"init_std": "initializer_range", "feed_forward_dim": "n_inner"}
_OPTIONAL_LLAMA = {
    "init_std": "initializer_range",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_base": "rope_theta",
}
# Rotary options that one kind of scaling has, or several.
_OPTIONAL_ROPE = {
    "none": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {"rope_factor": "factor", "rope_original_length": "original_max_position_embeddings"},
    "yarn": {
        "rope_factor": "factor",
        "rope_original_length": "original_max_position_embeddings",
        "rope_attention_factor": "attention_factor",
    },
}


# What our model always is, hence the only values that a configuration may have; the first is also the default.
_REQUIRED: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "attention_dropout": (0.0,),
    "router_jitter_noise": (0.0,),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0, None),
    # Of mixtures: every block has experts, and the weights of the chosen ones add up to 1.
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    # Of the rotary scalings "llama3" and "yarn".
    "low_freq_factor": (1.0, None),
    "high_freq_factor": (4.0, None),
    "beta_slow": (1.0, None),
    "beta_fast": (32.0, None),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (True, None),
}
_ROPE_TYPES = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}
# Their activation -> ours, for GPT-2.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


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
    if (
        family == "qwen3_moe"
    ):  # what is missing means False; transformers 5 writes the number under another name
        config = {"norm_topk_prob": False, "num_experts": config.get("num_local_experts"), **config}
    # What must be as it is with us: all biases or none, one dropout for all three places.
    biased = family == "llama" and bool(config.get("attention_bias") and config.get("mlp_bias"))
    required = _REQUIRED | {"attention_bias": (biased,), "mlp_bias": (biased,)}
    if family == "gpt2":
        dropout = config.get("resid_pdrop")
        required |= {"attn_pdrop": (dropout,), "embd_pdrop": (dropout,)}
    for name, values in required.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{name} must be {' or '.join(map(repr, values))}, got {config[name]!r}")
    if missing := [theirs for theirs in needed.values() if config.get(theirs) is None]:
        raise ValueError(f"{missing[0]} is missing in the configuration of a {family}")
    # What goes without saying in a GPT-2, or in a Llama and its relatives.
    options = {"tie_weights": config.get("tie_word_embeddings", family == "gpt2")}
    if family == "gpt2":
        name, optional = config.get("activation_function", "gelu_new"), _OPTIONAL_GPT2
        options["activation"] = choose("activation_function", name, _ACTIVATIONS)
    else:
        rope_type = config.get("rope_type", config.get("type", "default"))
        options |= {
            "norm": "rmsnorm",
            "positions": "rotary",
            "feed_forward": "moe" if family in ("mixtral", "qwen3_moe") else "swiglu",
            "bias": biased,
            "qkv_bias": biased,
            "qk_norm": family in ("qwen3", "qwen3_moe"),
            "dropout": 0.0,
            "rope_scaling": choose("rope_type", rope_type, _ROPE_TYPES),
            "rope_interleaved": family == "helium",
            "window": _window(config),
        }
        optional = _OPTIONAL_LLAMA | _OPTIONAL_ROPE[options["rope_scaling"]]
    # The fields that only have another name there.
    fields = (optional | needed).items()
    return GPTConfig(
        **options | {ours: config[theirs] for ours, theirs in fields if config.get(theirs) is not None}
    )


def _window(config: Mapping[str, object]) -> int | None:
    """Return the window of all layers; ValueError if it is not the same in all."""
    default = config["model_type"] in ("mistral", "mixtral")
    window = config.get("sliding_window") if config.get("use_sliding_window", default) else None
    known = "sliding_attention" if window else "full_attention"
    if config["model_type"] == "qwen3" and window and not config.get("layer_types"):
        raise ValueError("use_sliding_window needs layer_types, to say which layers have the window")
    if different := [kind for kind in config.get("layer_types") or [] if kind != known]:
        raise ValueError(f"layer_types must be {known} in all layers, got {different[0]}")
    return window


def read_config(path: Path) -> tuple[str | None, GPTConfig]:
    """Return family (None: our format) and configuration from a config.json; ValueError if it is not understood."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "model" in values:
            return None, GPTConfig(**values["model"])
        return values.get("model_type"), config_from_hf(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def family_of(config: GPTConfig) -> str:
    """Return the family of transformers, a name in `FAMILIES`, that computes what this configuration does.

    Raises ValueError if there is none, naming the nearest and the fields that it cannot have.
    """
    # What each family allows.
    gpt2 = {
        "norm": {"layernorm"},
        "positions": {"learned"},
        "pre_norm": {True},
        "feed_forward": {"gelu"},
        "bias": {True},
        "qkv_bias": {True},
        "qk_norm": {False},
        "window": {None},
        "n_kv_heads": {None, config.n_heads},
        "head_dim": {None, config.emb_dim // config.n_heads},
    }
    llama = {
        "norm": {"rmsnorm"},
        "positions": {"rotary"},
        "pre_norm": {True},
        "feed_forward": {"swiglu"},
        "bias": {False},
        "qkv_bias": {False},
        "qk_norm": {False},
        "rope_interleaved": {False},
    }
    allowed = {
        "gpt2": gpt2,
        "llama": {**llama, "bias": {True, False}, "qkv_bias": {config.bias}, "window": {None}},
        "mistral": llama,
        "qwen3": {**llama, "qk_norm": {True}},
        "mixtral": {**llama, "feed_forward": {"moe"}},
        "qwen3_moe": {**llama, "feed_forward": {"moe"}, "qk_norm": {True}},
        "helium": {
            **llama,
            "rope_interleaved": {True},
            "window": {None},
            "head_dim": {None, config.emb_dim // config.n_heads},
        },
    }
    # The family with the fewest fields that do not fit; there must be none.
    misfits = {
        family: {name: getattr(config, name) for name in fields if getattr(config, name) not in fields[name]}
        for family, fields in allowed.items()
    }
    nearest = min(misfits, key=lambda family: len(misfits[family]))
    if misfits[nearest]:
        found = ", ".join(f"{name}={value!r}" for name, value in misfits[nearest].items())
        raise ValueError(
            f"config has no counterpart in transformers: the nearest, {nearest}, cannot have {found}"
        )
    return nearest


ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "helium": "HeliumForCausalLM",
}


def config_to_hf(config: GPTConfig) -> dict[str, object]:
    """Return the content of Hugging Face's config.json; ValueError if there is no counterpart (`family_of`)."""
    family = family_of(config)
    # What may be None with us is a number in all families but GPT-2.
    if family != "gpt2":
        config = replace(
            config,
            n_kv_heads=config.n_kv_heads or config.n_heads,
            feed_forward_dim=config.feed_forward_dim or 8 * math.ceil(config.emb_dim / 3),
            head_dim=config.actual_head_dim,
        )
    # What every family has.
    values = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    values |= {theirs: getattr(config, ours) for ours, theirs in CONFIG_FIELDS[family].items()}
    values |= {"initializer_range": config.init_std, "tie_word_embeddings": config.tie_weights}
    # GPT-2: one dropout for all three places.
    if family == "gpt2":
        return values | {
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "n_inner": config.feed_forward_dim,
            "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        }
    # Llama and its relatives.
    values |= {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "rope_parameters": rope_to_hf(config),
    }
    if family in ("llama", "helium"):
        return values | {"mlp_bias": config.bias}
    # All others may have a window; Qwen3 says whether, and without experts it says so for each layer.
    if family in ("qwen3", "qwen3_moe"):
        values["use_sliding_window"] = config.window is not None
    if family == "qwen3":
        kind = "full_attention" if config.window is None else "sliding_attention"
        values["layer_types"] = [kind] * config.n_layers
    if family == "qwen3_moe":
        values |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return values | {"sliding_window": config.window}


def rope_to_hf(config: GPTConfig) -> dict[str, object]:
    """Return `rope_parameters` of config.json. The larger base that "ntk" stands for is written as the base."""
    kind, base, head_dim = config.rope_scaling, config.rope_base, config.actual_head_dim
    if kind == "ntk":
        base *= config.rope_factor ** (head_dim / (head_dim - 2))
    if kind in ("none", "ntk"):
        return {"rope_type": "default", "rope_theta": base}
    values = {"rope_type": kind, "rope_theta": base, "factor": config.rope_factor}
    if kind == "linear":
        return values
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if config.rope_attention_factor is not None:
        values["attention_factor"] = float(config.rope_attention_factor)
    return values | {"original_max_position_embeddings": config.rope_original_length or config.context_length}
