# %% [markdown]
# # Modern variants: from GPT-2 to the Llama family, one change at a time
#
# You will take GPT-2 apart and put the parts of Llama, Qwen3 and Mixtral in, one after the other, know what each costs and what it gains on our tales,
# and read the files of all of them into the one `GPTModel`, with equal logits.
#
# | | |
# |---|---|
# | You will build | name maps and readers for weights of GPT-2, Llama, Mistral, Qwen3 and Mixtral; an ablation over 3 seeds |
# | You need | [the GPT](02_gpt.ipynb), [the building blocks](01_building_blocks.ipynb), [positions](../ch02_text_data/04_embeddings_and_positions.ipynb) |
# | Running time on 2 CPU cores | about 60 seconds |
# | Promotes to | [`shared/weights.py`](../shared/weights.py) |
#
# **Notation.** $D$ is the width of the hidden vectors, $H$ the number of query heads, $G$ the number of key and value heads, $d$ the width of a head, $L$ the
# number of blocks, $T$ the number of tokens. A **story loss** is minus the log-probability of a whole story in nats; its mean cannot fall below the
# entropy of the tales, which is known (the *floor*).

# %%
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import ablate_variants as ablation
import matplotlib.pyplot as plt
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from shared.attention import MultiHeadAttention
from shared.download import fetch_model_file, or_none
from shared.gpt import GPTConfig, GPTModel
from shared.layers import LayerNorm, MixtureOfExperts, RMSNorm, SwiGLU, balance_loss, choose
from shared.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, label_line, use_style
from shared.positions import RotaryPositions
from shared.proof import compare
from shared.results import record
from shared.tale_tokenizer import tale_encoding
from shared.tales import TaleGenerator

use_style()
logging.set_verbosity_error()
logging.disable_progress_bar()

# %% [markdown]
# ## What changed since 2019
#
# All these models are the same machine: embeddings, blocks of attention and a feed-forward network, a head. What differs fits in a few fields of `GPTConfig`.

# %%
MODERN = {"norm": "rmsnorm", "positions": "rotary", "feed_forward": "swiglu", "bias": False, "qkv_bias": False}
FAMILY = {
    "GPT-2 (2019)": {},
    "Llama 2 7B (2023)": MODERN,
    "Mistral 7B (2023)": {**MODERN, "n_kv_heads": 8, "window": 4096},
    "Mixtral 8x7B (2024)": {**MODERN, "n_kv_heads": 8, "feed_forward": "moe"},
    "Llama 3.1 8B (2024)": {**MODERN, "n_kv_heads": 8, "rope_scaling": "llama3"},
    "Qwen3 8B (2025)": {**MODERN, "n_kv_heads": 8, "qk_norm": True},
}
fields = ["norm", "positions", "feed_forward", "bias", "n_kv_heads", "qk_norm", "rope_scaling", "window"]
families = {
    name: GPTConfig(emb_dim=4096, n_heads=32, head_dim=128, **options) for name, options in FAMILY.items()
}
pd.DataFrame({name: {field: str(getattr(config, field)) for field in fields} for name, config in families.items()}).T

# %% [markdown]
# (Of GPT-2 the table shows the choices, not the size.) We go through the columns from left to right: why, the formula in a few lines, the equality with the
# finished part, the cost. Then comes the question that matters: what does each change do to the loss?
#
# ## RMSNorm
#
# Layer normalisation moves a vector to mean 0 and scales it to variance 1. Zhang and Sennrich (2019) found that the move is not needed: it is enough to divide by
# the root of the mean square. One pass over the numbers less, and one vector of parameters in place of two.
#
# $$\text{RMSNorm}(x)_i = w_i \, \frac{x_i}{\sqrt{\frac{1}{D}\sum_j x_j^2 + \varepsilon}}$$

# %%
def naive_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


x = torch.tensor([1.0, 2.0, 2.0])  # mean square 3
print("RMSNorm          ", [round(v, 3) for v in naive_rms_norm(x, torch.ones(3)).tolist()], "= x / sqrt(3)")
print("LayerNorm        ", [round(v, 3) for v in LayerNorm(3)(x).tolist()])
print("RMSNorm of x + 10", [round(v, 3) for v in RMSNorm(3)(x + 10).tolist()], "sees the shift")
print("LayerNorm, x + 10", [round(v, 3) for v in LayerNorm(3)(x + 10).tolist()], "does not")
compare("naive against RMSNorm", naive_rms_norm(x, torch.ones(3)), RMSNorm(3)(x))

# %% [markdown]
# ## Rotary positions
#
# GPT-2 adds a learned vector for each place: nothing connects place 5 with place 6, and after the last row of the table there is nothing at all. Rotary
# positions (Su et al., 2021) add nothing. They turn queries and keys: number $m$ and number $m + d/2$ are a point in a plane, turned by the angle $p \, b^{-2m/d}$
# at position $p$. The scalar product of two turned vectors depends on the difference of their angles, so scores see distances only.

# %%
def naive_rotary(x: Tensor, position: int, base: float = 10_000.0) -> Tensor:
    turned, half = x.clone(), len(x) // 2
    for m in range(half):
        angle = position * base ** (-2 * m / len(x))
        a, b, cos, sin = x[m], x[m + half], math.cos(angle), math.sin(angle)
        turned[m], turned[m + half] = a * cos - b * sin, b * cos + a * sin
    return turned


torch.manual_seed(0)
query, key = torch.randn(16), torch.randn(16)
rotary = RotaryPositions(head_dim=16, context_length=256)
fast = rotary(query.expand(1, 1, 1, 16), torch.tensor([7]))
compare("naive against RotaryPositions", naive_rotary(query, 7), fast[0, 0, 0])
score = lambda p, q: (naive_rotary(query, p) @ naive_rotary(key, q)).item()
print(f"query at 5, key at 2: {score(5, 2):.3f};  at 105 and 102: {score(105, 102):.3f};  at 5 and 4: {score(5, 4):.3f}")
compare("scores at equal distance", score(5, 2), score(105, 102))

# %% [markdown]
# There is no table to train, $C \cdot D$ parameters less, and the keys go into the cache already turned. What happens beyond the trained length is a question of its own,
# [below](#Longer-contexts).
#
# ## SwiGLU
#
# The feed-forward network of GPT-2 is `down(gelu(up(x)))`. Shazeer (2020) lets a second map decide how much of each inner number passes, a *gate*:
#
# $$\text{SwiGLU}(x) = W_\text{down}\,\bigl(\text{silu}(W_\text{gate}\,x) \odot W_\text{up}\,x\bigr), \qquad \text{silu}(z) = \frac{z}{1 + e^{-z}}$$
#
# Three matrices in place of two: with an inner width of $\frac{8}{3} D$ in place of $4 D$ their size is the same, so the comparison is fair. Shazeer's
# explanation of why it works is "divine benevolence"; the measurement decides.

# %%
torch.manual_seed(0)
swiglu, x = SwiGLU(64), torch.randn(5, 64)
gate, up = x @ swiglu.gate.weight.T, x @ swiglu.up.weight.T  # (5, 176) each
by_hand = (gate / (1 + (-gate).exp()) * up) @ swiglu.down.weight.T  # (5, 64)
compare("by hand against SwiGLU", by_hand, swiglu(x))
count = lambda module: sum(parameter.numel() for parameter in module.parameters())
gelu_block = GPTModel(ablation.BASE).blocks[0]
print(f"inner width 176: {count(swiglu):,} parameters; GELU with 256: {count(gelu_block.feed_forward):,} with biases")

# %% [markdown]
# ## No biases
#
# The biases of the linear maps are few, $9 D$ numbers a block, $2 D$ more in its layer norms. Llama leaves them out, as PaLM did before (Chowdhery et al., 2022, who
# report steadier training of large models). It also saves a small operation at every map.
#
# ## Grouped-query attention
#
# When a model writes, it must read the keys and values of all earlier tokens at each step. If several query heads share one key and value head, there is less to
# store and to read (Ainslie et al., 2023). $G = H$ is GPT-2, $G = 1$ is multi-query attention. It is the same as full attention in which heads have equal keys and values:

# %%
torch.manual_seed(0)
grouped = MultiHeadAttention(64, n_heads=4, n_kv_heads=2, causal=True)
full = MultiHeadAttention(64, n_heads=4, causal=True)
full.output.load_state_dict(grouped.output.state_dict())
queries, keys, values = grouped.qkv.weight.data.split((64, 32, 32))
repeat = lambda rows: rows.unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)  # (32, 64) -> (64, 64)
full.qkv.weight.data = torch.cat([queries, repeat(keys), repeat(values)])
x = torch.randn(2, 10, 64)
compare("2 shared heads against 4 equal in pairs", grouped(x), full(x))
print(f"parameters: {count(full):,} with 4 key and value heads, {count(grouped):,} with 2")

# %% [markdown]
# ## QK norm
#
# Scores are products of two projections, so they grow with the square of the weights; when they become large, the softmax picks one token and hardly any gradient
# passes. A norm over each query and key (Henry et al., 2020; in Qwen3 an RMSNorm) sets their lengths: with weight 1 each has length $\sqrt d$, so no score is
# larger than $\sqrt d \cdot \sqrt d / \sqrt d = \sqrt d$, however large the projections are.

# %%
torch.manual_seed(0)
x = torch.randn(1, 32, 64)
for normed in (False, True):
    norms = {"query_norm": RMSNorm(16), "key_norm": RMSNorm(16)} if normed else {}
    attention = MultiHeadAttention(64, n_heads=4, causal=True, **norms)
    for factor in (1, 10):
        with torch.no_grad():
            attention.qkv.weight.mul_(factor)
            weights = attention(x, need_weights=True)[1]  # (1, 4, 32, 32)
        largest = weights[0, :, 16:].amax(dim=-1).mean()
        print(f"norm {normed!s:5}, projections x {factor:2}: largest weight of a query {largest:.2f} on average")

# %% [markdown]
# Ten times larger projections make attention nearly a choice of one token; with the norm nothing changes. The cost: $2 d$ parameters a block.
#
# ## Sliding window
#
# With a window of $w$ a token sees itself and the $w - 1$ tokens before it (Mistral 7B: 4,096). The work per token no longer grows with the text, and a cache that rolls
# needs $w$ places only. The far past is not lost: each block passes what it saw on, so through $L$ blocks a token can be reached from $L\,(w - 1)$ places away. We
# change the first token and look which positions notice.

# %%
def noticed(n_layers: int, window: int = 5, length: int = 24) -> Tensor:
    """Which positions of the last block change when token 0 does: bool (length,)."""
    torch.manual_seed(0)
    config = replace(ablation.BASE, n_layers=n_layers, window=window, positions="rotary", init_std=0.3)
    model, ids = GPTModel(config).double().eval(), torch.arange(length)[None]
    changed = ids.clone()
    changed[0, 0] = 99
    with torch.no_grad():
        return ((model.hidden_states(ids) - model.hidden_states(changed)).abs().amax(dim=2) > 1e-12)[0]


depths = range(1, 6)
seen = torch.stack([noticed(n_layers) for n_layers in depths])
reach = [int(row.nonzero().max()) for row in seen]
print("blocks", list(depths), " farthest position that notices", reach)
assert reach == [n_layers * 4 for n_layers in depths]
figure, axes = plt.subplots(figsize=(7.2, 2.6))
axes.imshow(seen, cmap="Blues", aspect="auto", vmax=1.6)
axes.set_yticks(range(5), [f"{n} block{'s' * (n > 1)}" for n in depths])
axes.set(xlabel="position of a token", title="Each block carries token 0 another 4 places (window 5)")
axes.grid(False)
plt.show()

# %% [markdown]
# The dark cells in each row are the positions that notice a change of token 0: with 1 block only those within the window, with 5 blocks those up to place 20.
# Reachable is not the same as well seen: what arrives has been mixed with everything on the way. (Our mask limits what a token sees; our cache still keeps
# everything, since a rolling one would complicate it.)
#
# ## Mixture of experts
#
# A wide feed-forward network knows more, but every token pays for all of it. A mixture (Shazeer et al., 2017; Mixtral: Jiang et al., 2024) has several networks, the *experts*, and
# a small *router* that picks the best $k$ of $E$ for each token. Many parameters, little work. The definition, token by token:

# %%
def naive_mixture(mixture: MixtureOfExperts, tokens: Tensor) -> Tensor:
    results = []
    for token in tokens:  # (D,)
        probabilities = mixture.router(token).softmax(dim=0)  # (E,)
        best, chosen = probabilities.topk(mixture.n_active)
        shares = best / best.sum()
        results.append(sum(share * mixture.experts[int(i)](token) for share, i in zip(shares, chosen, strict=True)))
    return torch.stack(results)


torch.manual_seed(0)
mixture, tokens = MixtureOfExperts(64, 88, n_experts=4, n_active=2), torch.randn(10, 64)
compare("token by token against MixtureOfExperts", mixture(tokens), naive_mixture(mixture, tokens))
active = count(mixture.router) + 2 * count(mixture.experts[0])
print(f"{count(mixture):,} parameters, {active:,} at work for a token; one SwiGLU of width 176 has {count(swiglu):,}")

# %% [markdown]
# Nothing in this makes the router use all experts. An expert that is chosen gets the gradient, becomes better, and is chosen more. So a **balance loss** is added (Fedus et
# al., 2022): with $f_i$ the share of the choices that went to expert $i$ and $P_i$ the mean probability that the router gave it, $E \sum_i f_i P_i$. Ours is 1 when all experts
# get the same, and $E / k$ when always the same $k$ are chosen:

# %%
preference = torch.tensor([9.0, 9.0, -9.0, -9.0])[:, None] / 64  # of the router, felt by tokens whose mean is not 0
with torch.no_grad():
    mixture.router.weight.normal_(std=0.01).add_(preference - mixture.router.weight.mean(dim=1, keepdim=True))
noise = torch.randn(4000, 64)
for name, tokens in (("even", noise - noise.mean(dim=1, keepdim=True)), ("collapsed", noise + 1)):
    mixture(tokens)
    shares = [round(share, 2) for share in mixture.load.tolist()]
    print(f"{name:9}: shares {shares}, balance loss {balance_loss(mixture).item():.2f}")

# %% [markdown]
# Whether the balance loss is needed for a model as small as ours, the ablation below will tell.
#
# ## Memory of the cache
#
# A cache holds $2 \cdot L \cdot G \cdot d$ numbers for each token: keys and values of every block. First that formula against our own cache:

# %%
def cache_bytes(config: GPTConfig, n_tokens: int, bytes_each: int = 4) -> int:
    """Bytes of keys and values for one sequence, if a window needs no more places than it is long."""
    heads = config.n_kv_heads or config.n_heads
    kept = min(n_tokens, config.window or n_tokens)
    return 2 * config.n_layers * heads * config.actual_head_dim * kept * bytes_each


for name in ("gpt2", "llama, GQA"):
    model = GPTModel(replace(ablation.BASE, **ablation.VARIANTS[name])).eval()
    caches = model.new_caches(200)
    with torch.no_grad():
        model(torch.zeros(1, 200, dtype=torch.int64), caches=caches)
    used = sum(cache.n_bytes for cache in caches)
    print(f"{name:10}: {used:,} bytes for 200 tokens, formula {cache_bytes(model.config, 200):,}")
    assert used == cache_bytes(model.config, 200)

# %% [markdown]
# With it, the variants that we are going to train, by context length. Norms, positions, SwiGLU, biases and experts do not appear: they store nothing in the cache.

# %%
kinds = {"gpt2, llama, MoE": {}, "GQA": ablation.GQA, "window": ablation.WINDOW, "GQA and window": {**ablation.GQA, **ablation.WINDOW}}
KIB = {name: {n: cache_bytes(replace(ablation.BASE, **o), n) // 1024 for n in (32, 256, 2048, 16384)} for name, o in kinds.items()}
pd.DataFrame(KIB).T.rename_axis(columns="KiB at tokens")

# %% [markdown]
# ### Multi-head latent attention
#
# DeepSeek-V2 (2024) goes another way: do not share heads, compress them. A token's hidden vector is projected down to a *latent* $c$ of $d_c$ numbers, and only $c$ is
# stored. Keys and values of all heads are linear maps of it, $k_h = W^K_h c$ and $v_h = W^V_h c$. They never need to be computed: in a score, $q_h^\top W^K_h c = (W^{K\top}_h q_h)^\top c$, so the
# up-projection moves to the query side, once per new token instead of once per old one. Only rotation stands in the way, because it sits between $W^K_h$ and $q_h$ and differs from place to place; so a
# separate rotated key of $d_r$ numbers, shared by all heads, is stored beside it. The cache takes $L\,(d_c + d_r)$ numbers a token. We explain it and count it; our model does not have it.
#
# With DeepSeek-V2's sizes, $L = 60$, $H = 128$, $d = 128$, $d_c = 512$, $d_r = 64$:

# %%
def latent_bytes(n_layers: int, latent: int, rotated: int, n_tokens: int, bytes_each: int = 2) -> int:
    return n_layers * (latent + rotated) * n_tokens * bytes_each


full_heads = 2 * 60 * 128 * 128
latent = latent_bytes(60, 512, 64, n_tokens=1, bytes_each=1)
print(f"numbers per token: all 128 heads {full_heads:,}, latent {latent:,}: {latent / full_heads:.1%}")
print(f"as many as grouped-query attention with {latent / (2 * 60 * 128)} key and value heads")

# %% [markdown]
# The last line is the paper's own way to state it. Now real models, 16 bits a number, one sequence:

# %%
LARGE = {"emb_dim": 4096, "n_heads": 32, "n_layers": 32, "head_dim": 128}
shapes = {
    "all heads (Llama 2 7B)": GPTConfig(**LARGE),
    "8 of 32 heads (Llama 3 8B)": GPTConfig(**LARGE, n_kv_heads=8),
    "8 heads, window 4,096 (Mistral 7B)": GPTConfig(**LARGE, n_kv_heads=8, window=4096),
}
lengths = [2**n for n in range(10, 18)]
memory = pd.DataFrame({name: [cache_bytes(c, n, 2) / 2**30 for n in lengths] for name, c in shapes.items()}, lengths)
memory["latent (DeepSeek-V2, 236B)"] = [latent_bytes(60, 512, 64, n) / 2**30 for n in lengths]
memory.rename_axis("tokens").round(2)

# %%
figure, axes = plt.subplots(figsize=(7.2, 4))
for (name, column), color in zip(memory.items(), (BLUE, ORANGE, GREEN, PURPLE), strict=True):
    axes.loglog(lengths, column, color=color, marker="o", markersize=4)
    shift = 0.72 if "latent" in name else 1.0
    label_line(axes, name.replace(" (", "\n("), lengths[-1], column.iloc[-1] * shift, color, fontsize=9)
axes.set_xlim(900, lengths[-1] * 1.1)
axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
axes.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
axes.minorticks_off()
axes.set(xlabel="tokens in the cache", ylabel="GiB, 16-bit numbers", title="Fewer heads, a window or a latent keep the cache small")
axes.spines["right"].set_visible(False)
plt.show()

# %% [markdown]
# Both axes are logarithmic. The top line is all heads: at 128k tokens its cache is several times as large as the model, whose 6.7 billion weights take 12.6 GiB in 16 bits. Sharing heads
# divides it by 4, the window stops its growth at 4k tokens. The latent of a model with twice the blocks and four times the heads stays below the grouped heads of the small one.
