# %% [markdown]
# ## Proof: equal to transformers' GPT-2, Llama, Qwen3 and Mixtral
#
# Four random tiny models of transformers, with sizes of which no two are equal where they could be confused. `save_pretrained` writes them as the real ones are published; we read configuration
# and weights from the folder and compare logits, and the gradient with respect to the embedding, which depends on all weights.

# %%
COMMON = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 16, "intermediate_size": 40, "bos_token_id": None, "eos_token_id": None}
scaled = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
gpt2_sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_head": 4, "n_layer": 2}
references = {
    "gpt2": GPT2LMHeadModel(GPT2Config(**gpt2_sizes, bos_token_id=None, eos_token_id=None)),
    "llama": LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=scaled, tie_word_embeddings=True)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=10)),
    "mixtral": MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2)),
}
references["mixtral"].config._experts_implementation = "eager"  # its other ways sum in another order


def read_folder(folder: str) -> GPTModel:
    """Read what `save_pretrained` wrote."""
    described = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    model = GPTModel(config_from_hf(described)).eval()
    load_safetensors(model, Path(folder, "model.safetensors"), described["model_type"])
    return model


# %%
torch.manual_seed(0)
ids = torch.randint(50, (2, 16))
ours = {}
for family, theirs in references.items():
    for parameter in theirs.eval().parameters():
        nn.init.normal_(parameter, std=0.2)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours[family] = read_folder(folder)
    logits, expected = ours[family](ids), theirs(ids).logits
    compare(f"{family:7} logits  ", logits, expected, tolerance=2e-5)
    logits.logsumexp(dim=2).mean().backward()
    expected.logsumexp(dim=2).mean().backward()
    compare(f"{family:7} gradient", ours[family].token_embedding.weight.grad, theirs.get_input_embeddings().weight.grad)

# %% [markdown]
# The other way round: the views, stored under their names, are what transformers has in memory.

# %%
for family, theirs in references.items():
    views, state = huggingface_views(ours[family], family), theirs.state_dict()
    same = [name for name in views if name in state and torch.equal(views[name], state[name])]
    print(f"{family:7}: {len(same)} of {len(views)} tensors equal under the same name", "" if len(same) == len(views) else "(experts: see below)")
    assert len(same) == len(views) or family == "mixtral"
experts = references["mixtral"].model.layers[1].mlp.experts.gate_up_proj  # in memory: (experts, 2 * 40, 24)
views = huggingface_views(ours["mixtral"], "mixtral")
stacked = torch.stack([torch.cat([views[f"model.layers.1.block_sparse_moe.experts.{i}.{w}.weight"] for w in ("w1", "w3")]) for i in range(3)])
assert torch.equal(stacked, experts)
print("Mixtral's experts, stacked as in memory: equal")

# %% [markdown]
# Mixtral is the reason why the map follows the names *on disk*: in memory transformers 5 stacks all experts in one tensor, in files they stand one by one.
#
# ### Proof: sizes of the real ones
#
# The published numbers of parameters, from the published shapes. On the `meta` device nothing is allocated, so 46.7 billion parameters fit.

# %%
llama_7b = {**MODERN, **LARGE, "vocab_size": 32000, "feed_forward_dim": 11008, "tie_weights": False, "context_length": 8}
mistral = {**llama_7b, "n_kv_heads": 8, "feed_forward_dim": 14336}
small_qwen = {"vocab_size": 151936, "emb_dim": 1024, "n_heads": 16, "n_kv_heads": 8, "head_dim": 128, "n_layers": 28}
published = {
    "GPT-2": ({}, 124_439_808),
    "Qwen3 0.6B": ({**MODERN, **small_qwen, "feed_forward_dim": 3072, "qk_norm": True}, 596_049_920),
    "Llama 2 7B": (llama_7b, 6_738_415_616),
    "Mistral 7B": (mistral, 7_241_732_096),
    "Llama 3 8B": ({**mistral, "vocab_size": 128256}, 8_030_261_248),
    "Mixtral 8x7B": ({**mistral, "feed_forward": "moe"}, 46_702_792_704),
}
for name, (options, number) in published.items():
    with torch.device("meta"):
        assert GPTModel(GPTConfig(**options)).n_parameters == number
    print(f"{name:13}{number:>15,}")

# %% [markdown]
# ### What is refused
#
# A file of another shape, and configurations that ask for what our model does not have:

# %%
described = references["llama"].config.to_dict()
for change in ({"attention_bias": True}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "longrope"}}):
    try:
        config_from_hf({**described, **change})
    except ValueError as error:
        print(f"ValueError: {error}")
with tempfile.TemporaryDirectory() as folder:
    references["llama"].save_pretrained(folder)
    wider = GPTModel(replace(ours["llama"].config, feed_forward_dim=48))
    for model, family in ((wider, "llama"), (ours["qwen3"], "qwen3")):
        try:
            load_safetensors(model, Path(folder, "model.safetensors"), family)
        except ValueError as error:
            print(f"ValueError: {error}")

# %% [markdown]
# ## With a network
#
# Configurations of published models, read from the Hub; each must give the number of parameters that its authors state. (Chapter 5 loads the weights.)

# %% tags=["nbval-ignore-output"]
for repository, number in (("openai-community/gpt2", 124_439_808), ("Qwen/Qwen3-0.6B", 596_049_920)):
    path = or_none(lambda repository=repository: fetch_model_file(repository, "config.json", "main"), f"{repository}'s config.json", "the shapes above")
    if path is None:
        break
    config = config_from_hf(json.loads(path.read_text(encoding="utf-8")))
    with torch.device("meta"):
        assert GPTModel(config).n_parameters == number
    print(f"{repository}: {number:,} parameters, as published")

# %% [markdown]
# ## What you built
#
# [`shared/weights.py`](../shared/weights.py) reads GPT-2, Llama, Mistral, Qwen3 and Mixtral into the one `GPTModel`: `FAMILIES` and `huggingface_views` map the names in both directions,
# `config_from_hf` the configuration, `load_safetensors` the numbers. And you have a record of what each change since GPT-2 does at a small size, with its cost, that you can extend by one line in the script.
#
# ## What can go wrong
#
# - **Pairs of rotary numbers.** Llama's published checkpoints exist in two orders: Meta's own files pair numbers $2m$ and $2m + 1$, Hugging Face's $m$ and $m + d/2$, with rows of the projections permuted to match. Read with the wrong order, nothing fails and the text is nonsense. Our map is for Hugging Face's files.
# - **`rms_norm_eps` forgotten.** $10^{-6}$ or $10^{-5}$ hardly shows in a test with large numbers and shows in real models. `norm_eps` comes from the configuration.
# - **`head_dim` derived.** In Qwen3 it is not $D / H$. Shapes then differ, and the loader says where.
# - **A window counted differently.** "4,096" may mean with or without the token itself. Ours includes it, as transformers' does.
# - **Differences within the spread.** With one seed, half of the rows of our table could be told as improvements. Look at the spread first.
# - **Equal steps called equal cost.** A step of a mixture takes longer than a step of the baseline with as many active parameters. Say which budget is meant.
#
# ## Exercises
#
# **1.** How many bytes of cache does Llama 3 8B need for 32 users with 8,192 tokens each, in 16 bits? And with all 32 heads?

# %% tags=["solution"] jupyter={"source_hidden": true}
for heads in (8, 32):
    used = 32 * cache_bytes(GPTConfig(**LARGE, n_kv_heads=heads), 8192, 2)
    print(f"{heads:2} heads: {used / 2**30:.0f} GiB")
assert used == 4 * 32 * 2**30

# %% [markdown]
# **2.** A model without any positions (`positions="none"`) still learns an order. Show that an untrained one with causal attention can tell `a b c` from `b a c` at the last token, and
# that one without the causal mask could not.

# %% tags=["solution"] jupyter={"source_hidden": true}
# One causal layer gives the last token the same set of values in any order; a second layer sees what the first made of
# prefixes, and those differ.
torch.manual_seed(0)
for n_layers in (1, 2):
    model = GPTModel(replace(ablation.BASE, positions="none", n_layers=n_layers, init_std=0.3)).double().eval()
    one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 3]])
    with torch.no_grad():
        difference = (model(one, last_only=True) - model(other, last_only=True)).abs().max().item()
    print(f"{n_layers} block{'s' * (n_layers > 1)}: the last token {'differs' if difference > 1e-9 else 'is the same'}")
    assert (difference > 1e-9) == (n_layers == 2)
attention = MultiHeadAttention(64, 4, causal=False).double()
x = torch.randn(1, 3, 64, dtype=torch.float64)
compare("without a mask the order of the others does not matter", attention(x)[:, 2], attention(x[:, [1, 0, 2]])[:, 2])

# %% [markdown]
# **3.** Write the name map of a new family by hand: `"olmo-like"`, in which a Llama's tensors are called `blk.{}.q`, `blk.{}.k`, `blk.{}.v`, `blk.{}.o`, `blk.{}.n1`, `blk.{}.n2`, `blk.{}.g`, `blk.{}.u`, `blk.{}.d`, `emb`, `norm`.
# Check that all parameters of a model are covered.

# %% tags=["solution"] jupyter={"source_hidden": true}
names = {"token_embedding": "emb", "final_norm": "norm", "blocks.{}.attention.qkv": tuple(f"blk.{{}}.{p}" for p in "qkv")}
names |= {"blocks.{}.attention.output": "blk.{}.o", "blocks.{}.attention_norm": "blk.{}.n1", "blocks.{}.feed_forward_norm": "blk.{}.n2"}
names |= {f"blocks.{{}}.feed_forward.{part}": f"blk.{{}}.{part[0]}" for part in ("gate", "up", "down")}
FAMILIES["olmo-like"] = names
views = huggingface_views(ours["llama"], "olmo-like")
del FAMILIES["olmo-like"]
assert sum(view.numel() for view in views.values()) == ours["llama"].n_parameters
print(len(views), "tensors, all parameters covered;", *list(views)[:3], "...")

# %% [markdown]
# **4.** `Mixtral 8x7B` has 46.7 billion parameters. How many work for one token, and how many would a dense model with the same work per token have?

# %% tags=["solution"] jupyter={"source_hidden": true}
options, total = published["Mixtral 8x7B"]
expert = 3 * 4096 * 14336
active = total - 32 * (8 - 2) * expert
print(f"{active:,} of {total:,} are active ({active / total:.0%}), as in a dense model of {active / 1e9:.1f} billion")
assert 12.8e9 < active < 12.9e9

# %% [markdown]
# ## References
#
# - Zhang, B., Sennrich, R. (2019). *Root Mean Square Layer Normalization*. NeurIPS.
# - Su, J., et al. (2021). *RoFormer: Enhanced Transformer with Rotary Position Embedding*. arXiv:2104.09864.
# - Shazeer, N. (2020). *GLU Variants Improve Transformer*. arXiv:2002.05202.
# - Ainslie, J., et al. (2023). *GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints*. EMNLP.
# - Touvron, H., et al. (2023). *LLaMA: Open and Efficient Foundation Language Models*. arXiv:2302.13971.
# - Jiang, A. Q., et al. (2024). *Mixtral of Experts*. arXiv:2401.04088.
# - Peng, B., Quesnelle, J., Fan, H., Shippole, E. (2023). *YaRN: Efficient Context Window Extension of Large Language Models*. arXiv:2309.00071.
# - DeepSeek-AI (2024). *DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model*. arXiv:2405.04434.
