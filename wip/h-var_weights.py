# %% [markdown]
# ## Reading weights of other programs
#
# A trained model is two things: a configuration and named tensors. Hugging Face stores them as `config.json` and `model.safetensors`. To read them we
# need a map of names, a rule where one of our tensors is several of theirs, and the same for the configuration.
#
# ### The map of names
#
# Our name with `{}` in place of the block's number stands for that layer in all blocks; in a mixture a second `{}` is the expert's number.
# Three names on the right mean that our fused `qkv` holds their rows one below the other.

# %% [markdown] tags=["promote:weights"]
# Weights and configurations of other programs, by maps of names that can be read in both directions.
#
# `huggingface_views` shows the parameters of a `GPTModel` under the names and in the shapes that transformers has on
# disk. To write into the views is to import, to read them is to export.
#
# Left out: other architectures than `FAMILIES`, pickled checkpoints, quantised weights.

# %% tags=["promote:weights"]
_LAYER = "model.layers.{}."
_LLAMA: dict[str, str | tuple[str, ...]] = {
    **{"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "output_head": "lm_head"},
    "blocks.{}.attention_norm": _LAYER + "input_layernorm",
    "blocks.{}.attention.qkv": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
    "blocks.{}.attention.output": _LAYER + "self_attn.o_proj",
    "blocks.{}.feed_forward_norm": _LAYER + "post_attention_layernorm",
}
_SWIGLU = {f"blocks.{{}}.feed_forward.{part}": f"{_LAYER}mlp.{part}_proj" for part in ("gate", "up", "down")}
_QK_NORM = {f"blocks.{{}}.attention.{part}_norm": f"{_LAYER}self_attn.{part[0]}_norm" for part in ("query", "key")}
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


# %% [markdown]
# A *view* shares its numbers with the parameter. So one function serves both directions: who copies a file's tensor into the view has loaded it, who
# stores the views has exported the model. A Llama of 1 block, and a GPT-2, whose matrices stand the other way round:

# %%
small = {"vocab_size": 50, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 1}
llama_options = {"norm": "rmsnorm", "positions": "rotary", "feed_forward": "swiglu", "bias": False, "qkv_bias": False}
little = GPTModel(GPTConfig(**small, **llama_options, n_kv_heads=2))
for name, view in huggingface_views(little, "llama").items():
    print(f"{name:50}{tuple(view.shape)}")
c_fc = huggingface_views(GPTModel(GPTConfig(**small)), "gpt2")["transformer.h.0.mlp.c_fc.weight"]
print("transformer.h.0.mlp.c_fc.weight", tuple(c_fc.shape), "is a view of our (96, 24)")

# %% [markdown]
# ### The file
#
# A safetensors file begins with the names and shapes of all its tensors, so they can be checked before a single number is read. Either all fit, or nothing is
# changed and the error names the tensor.

# %% tags=["promote:weights"]
def load_safetensors(model: GPTModel, paths: str | os.PathLike | Iterable[str | os.PathLike], family: str) -> None:
    """Copy weights that transformers saved into `model`, one tensor at a time, in the model's type and on its device.

    All names and shapes are checked first, so a file that does not fit changes nothing. The names may lack the prefix
    `transformer.` or `model.`, as in files of the model without its head.

    Args:
        model: Its configuration must be that of the file; see `config_from_hf`.
        paths: A safetensors file, or all files of a model that is stored in several.
        family: A name in `FAMILIES`.

    Raises:
        ValueError: A tensor is missing, not known, there twice, of another shape, or a head of its own where the
            model's is tied; a parameter has no counterpart or no memory ("meta"). A file that is missing or damaged
            raises safetensors' errors.
    """
    views = huggingface_views(model, family)
    if on_meta := [name for name, view in views.items() if view.is_meta]:
        raise ValueError(f"{on_meta[0]} is on the meta device, where nothing can be loaded into it")
    prefix = "transformer." if family == "gpt2" else "model."
    sources: dict[str, tuple[safe_open, str]] = {}
    with ExitStack() as stack, torch.no_grad():
        for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
            file = stack.enter_context(safe_open(os.fspath(path), "pt"))
            for name in file.keys():  # noqa: SIM118, it is no dict
                full = name if name.startswith((prefix, "lm_head.")) else prefix + name
                if full in sources:
                    raise ValueError(f"{path} holds {name}, which an earlier file holds too")
                if not _BUFFERS.search(full):
                    sources[full] = file, name
        read = lambda name: sources[name][0].get_tensor(sources[name][1])
        head, embedding = "lm_head.weight", f"{FAMILIES[family]['token_embedding']}.weight"
        if head not in views and head in sources:  # some programs store a tied head a second time
            if not torch.equal(read(head), read(embedding)):
                raise ValueError(f"{head} differs from {embedding}: the model needs tie_weights=False")
            del sources[head]
        if wrong := sorted(views.keys() ^ sources.keys()):
            place = "is missing in the file" if wrong[0] in views else "has no place in the model"
            raise ValueError(f"{wrong[0]} {place}; {len(wrong)} names do not match")
        for name, view in views.items():
            file, stored = sources[name]
            if (shape := tuple(file.get_slice(stored).get_shape())) != tuple(view.shape):
                raise ValueError(f"{name} must have shape {tuple(view.shape)}, got {shape}")
        for name, view in views.items():
            view.copy_(read(name))


# %% [markdown]
# ### The configuration
#
# Their `config.json` has other words for most of our fields, some that describe only training, and some that ask for things which our model does not
# have. The last kind is refused by name: a model that loads without an error and computes something else would be worse than none.

# %% tags=["promote:weights"]
_LLAMA_FIELDS = {
    **{"vocab_size": "vocab_size", "context_length": "max_position_embeddings", "emb_dim": "hidden_size"},
    **{"n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"},
    **{"feed_forward_dim": "intermediate_size", "norm_eps": "rms_norm_eps"},
}
_GROUPED_FIELDS = _LLAMA_FIELDS | {"n_kv_heads": "num_key_value_heads"}
# Our field -> theirs, without which a configuration is not complete.
CONFIG_FIELDS: dict[str, dict[str, str]] = {
    "gpt2": {
        **{"vocab_size": "vocab_size", "context_length": "n_positions", "emb_dim": "n_embd", "n_heads": "n_head"},
        **{"n_layers": "n_layer", "norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"},
    },
    "llama": _LLAMA_FIELDS,
    "mistral": _GROUPED_FIELDS,
    "qwen3": _GROUPED_FIELDS | {"head_dim": "head_dim"},
    "mixtral": _GROUPED_FIELDS | {"n_experts": "num_local_experts", "n_active_experts": "num_experts_per_tok"},
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
    **dict.fromkeys(("attention_bias", "mlp_bias"), (False,)),
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
            cannot say: biases in a Llama, another activation, windows in some layers only, other rotary scaling, ...
    """
    family = str(config.get("model_type"))
    needed = choose("model_type", family, CONFIG_FIELDS)
    # transformers 5 has the rotary options in rope_parameters, 4 in rope_scaling and beside it.
    config = {**config, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    required = dict(_REQUIRED)
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
        options |= {"norm": "rmsnorm", "positions": "rotary", "bias": False, "qkv_bias": False, "dropout": 0.0}
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
