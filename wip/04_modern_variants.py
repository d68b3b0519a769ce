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
# %% [markdown]
# ## The ablation
#
# Now the question. [`ablate_variants.py`](ablate_variants.py) trains a GPT of 2 blocks and 64 dimensions on tales, once for each variant and seed, and records the loss of 256
# new stories in [`ablate_variants.csv`](ablate_variants.csv). All variants see the same stories in the same order with the same learning rate, tuned for none of them in particular. Two budgets:
#
# - **equal tokens**: all variants make the same number of steps;
# - **equal time**: a variant makes as many steps as fit into the time of the baseline's. The time of a step was measured first, in alternating runs, and recorded; so the
#   budget is a number of steps and no clock decides anything in a run.
#
# One run serves both: the learning rate stays constant, and for each budget a copy branches off and is cooled down to 0 in its last quarter.

# %%
table = pd.read_csv("ablate_variants.csv")
times = pd.read_csv("ablate_variants_time.csv").set_index("variant")
floor = table["floor"].iloc[0]
N_TARGETS = round((ablation.rows(ablation.validation_stories())[:, 1:] >= 0).sum().item() / ablation.N_VALIDATION)
long = table[table["recipe"] != "short"]
order = [name for name in ablation.VARIANTS if name in set(long["variant"])]
assert (long.groupby(["recipe", "variant"])["seed"].nunique() == 3).all()
row = long.iloc[0]
print(f"{len(order)} variants; baseline: {row.steps:,} steps of {ablation.BATCH} stories, {row.tokens:,} tokens")
print(f"entropy of the validation stories (floor): {floor:.1f} nats per story, {N_TARGETS} tokens each on average")

# %% [markdown]
# The table has the mean over 3 seeds, the spread between the best and the worst seed, and the difference from the baseline. `time` is the time of a step relative
# to the baseline's, the median of alternating rounds.

# %%
def summary(recipe: str) -> pd.DataFrame:
    """Mean and spread over the seeds, by variant."""
    groups = long[long["recipe"] == recipe].groupby("variant")["validation_loss"]
    return pd.DataFrame({"loss": groups.mean(), "spread": groups.max() - groups.min()}).loc[order]


tokens, seconds = summary("equal-tokens"), summary("equal-time")
cache = {name: cache_bytes(replace(ablation.BASE, **ablation.VARIANTS[name]), 256) // 1024 for name in order}
results = pd.DataFrame(
    {
        "parameters": long.groupby("variant")["parameters"].first().loc[order],
        "cache KiB": pd.Series(cache),
        "time": times["ratio"].loc[order],
        "equal tokens": tokens["loss"].round(1),
        "spread": tokens["spread"].round(1),
        "against gpt2": (tokens["loss"] - tokens["loss"]["gpt2"]).round(1),
        "equal time": seconds["loss"].round(1),
        "times floor": (seconds["loss"] / floor).round(2),
    }
)
results

# %%
figure, axes = plt.subplots(figsize=(7.6, 5.6))
for position, name in enumerate(reversed(order)):
    for recipe, color, shift in (("equal-tokens", BLUE, 0.14), ("equal-time", ORANGE, -0.14)):
        values = long[(long["variant"] == name) & (long["recipe"] == recipe)]["validation_loss"]
        axes.plot(values, [position + shift] * len(values), "o", color=color, markersize=4, alpha=0.7)
        axes.plot([values.mean()] * 2, [position + shift - 0.13, position + shift + 0.13], color=color)
axes.set_yticks(range(len(order)), reversed(order))
axes.axvline(tokens["loss"]["gpt2"], color=GREY, linewidth=1, linestyle=":")
axes.set_xlabel(f"nats per story (floor: {floor:.1f})")
axes.set_title(f"The best mean of {len(order)} variants at equal tokens: {tokens['loss'].idxmin()}")
axes.text(0.98, 0.97, "equal tokens", color=BLUE, transform=axes.transAxes, ha="right")
axes.text(0.98, 0.93, "equal time", color=ORANGE, transform=axes.transAxes, ha="right")
plt.show()

# %% [markdown]
# Each dot is a seed, each bar a mean; the dotted line is the baseline at equal tokens. All variants are still far above the floor: the runs are short, the models small.
# So this is a table about *how fast a small model learns*, and the dots say how far it can be trusted.
#
# ### Which step helps?
#
# A step is judged against the variant that it started from, seed by seed, since equal seeds saw equal stories. We call it better or worse only if all three seeds agree.

# %%
STEPS = {
    "RMSNorm": ("gpt2", "gpt2, RMSNorm"),
    "rotary": ("gpt2, RMSNorm", "RMSNorm, rotary"),
    "SwiGLU": ("RMSNorm, rotary", "RMSNorm, rotary, SwiGLU"),
    "no biases (= Llama)": ("RMSNorm, rotary, SwiGLU", "llama"),
    "GQA, 2 of 4 heads": ("llama", "llama, GQA"),
    "QK norm (= Qwen3)": ("llama, GQA", "qwen3"),
    "window of 32": ("qwen3", "qwen3, window"),
    "mixture of 4 experts": ("qwen3", "qwen3, MoE"),
    "its balance loss": ("qwen3, MoE unbalanced", "qwen3, MoE"),
    "no positions at all": ("gpt2", "gpt2, no positions"),
    "all of Llama": ("gpt2", "llama"),
}
by_seed = long.pivot_table("validation_loss", ["recipe", "variant"], "seed")


def judge(recipe: str, before: str, after: str) -> str:
    """Mean difference over the seeds and whether all of them agree about its sign."""
    change = by_seed.loc[(recipe, after)] - by_seed.loc[(recipe, before)]
    verdict = "better" if change.max() < 0 else "worse" if change.min() > 0 else "undecided"
    return f"{change.mean():+.1f} {verdict}"


steps = {name: {recipe: judge(recipe, *pair) for recipe in ("equal-tokens", "equal-time")} for name, pair in STEPS.items()}
pd.DataFrame(steps).T

# %% [markdown]
# STEP PROSE

# %%
loads = long[long["recipe"] == "equal-tokens"].groupby("variant")["largest_load"].mean()
for name in ("qwen3, MoE", "qwen3, MoE unbalanced"):
    print(f"{name:22}: the busiest of 4 experts gets {loads[name]:.0%} of the choices; even would be 25 %, at most 50 %")
assert loads["qwen3, MoE"] < loads["qwen3, MoE unbalanced"]

# %% [markdown]
# ### The same live
#
# A record can be believed more easily if a part of it is made again. The recipe `short` of the script, one seed, two variants:

# %%
live = {}
for name in ablation.SHORT:
    trained = ablation.train(name, 0, [ablation.RECIPES["short"].steps])[0]
    live[name] = ablation.validate(trained.model)[0]
    recorded = table.query("recipe == 'short' and variant == @name and seed == 0")["validation_loss"].item()
    assert abs(live[name] - recorded) < 0.02 * recorded, (live[name], recorded)
    print(f"{name:5} after {trained.steps} steps: within 2 % of the recorded loss of {recorded:.0f} nats per story")
assert live["llama"] < 0.95 * live["gpt2"]

# %% [markdown]
# Not the last decimals are compared, since another processor adds in another order and training amplifies it; 2 % is a fraction of the difference between the two variants.
#
# ## A trained model: `tales-tiny`
#
# The course ships `tales-tiny`: the shape of `llama` above, trained much longer (chapter 5 shows how). Its file has our own names, without the tied head.

# %%
folder = Path("../shared/checkpoints/tales-tiny")
config = GPTConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"])
tiny = GPTModel(config).eval()
keys = tiny.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
assert (keys.missing_keys, keys.unexpected_keys) == (["output_head.weight"], [])
print(f"{tiny.n_parameters:,} parameters, context {config.context_length}")
trained_loss = ablation.validate(tiny)[0]
print(f"{trained_loss:.1f} nats per story, {trained_loss / floor - 1:.0%} above the floor of {floor:.1f}")
assert floor < trained_loss < tokens["loss"].min()

# %%
record("tales-tiny, loss", round(trained_loss, 1), "nats per story", f"floor {floor:.1f}")

# %% [markdown]
# It is better than all variants of the ablation, because it saw many more stories. What do its heads do, with rotary positions? We catch what each block's attention is given and
# ask it for its weights.

# %%
encoding = tale_encoding()
story = TaleGenerator(7).sample().text
ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(story)]])
inputs = []
hooks = [block.attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in tiny.blocks]
with torch.no_grad():
    tiny(ids)
    for hook in hooks:
        hook.remove()
    maps = torch.cat([b.attention(x, need_weights=True)[1][0] for b, x in zip(tiny.blocks, inputs, strict=True)])
place = torch.arange(ids.shape[1])
distance = (maps * (place[:, None] - place)).sum(dim=2)[16:].mean(dim=1)  # (heads of all blocks,)
names = [f"block {1 + i // config.n_heads}, head {1 + i % config.n_heads}" for i in range(len(distance))]
near, far = int(distance.argmin()), int(distance.argmax())
print(f"mean distance looked back: {names[near]} {distance[near]:.0f} tokens, {names[far]} {distance[far]:.0f} tokens")
assert distance[far] > 2 * distance[near]

# %%
shown = [encoding.decode([i]).replace("\n", "¶") for i in ids[0, 1:31].tolist()]
figure, panels = plt.subplots(1, 2, figsize=(11, 5.2))
for axes, head in zip(panels, (near, far), strict=True):
    axes.imshow(maps[head, 1:31, 1:31], cmap="Blues", aspect="auto")
    axes.set_xticks(range(30), shown, rotation=90, fontsize=7)
    axes.set_yticks(range(30), shown, fontsize=7)
    axes.set(xlabel="token looked at", title=names[head])
    axes.grid(False)
panels[0].set_ylabel("token that looks")
figure.suptitle("One head watches its neighbours, another the beginning of the story", x=0.02, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# Each row is a token of a story, each column one that it can look at; darker means more weight. On the left the head that looks back least on average, on the right the one that looks back most.
#
# ### A window put on afterwards
#
# How far back does the model have to see? The same weights with a window: nothing is trained.

# %%
def with_options(model: GPTModel, **options: object) -> GPTModel:
    """The same weights in a model whose configuration differs in options that have no weights."""
    other = GPTModel(replace(model.config, **options)).eval()
    other.load_state_dict(model.state_dict())
    return other


windows = [8, 16, 32, 64, 128, None]
by_window = {str(w): ablation.validate(with_options(tiny, window=w))[0] for w in windows}
print({name: round(loss, 1) for name, loss in by_window.items()}, f"floor {floor:.1f}")
assert by_window["8"] > by_window["32"] > by_window["128"] > 0.99 * by_window["None"]

# %% [markdown]
# A story names a person or a thing early and returns to it late; a model trained with full attention relies on that, and a short window takes it away. The ablation
# shows the fairer comparison, with models that were trained with their window.
# %% [markdown]
# ## Longer contexts
#
# `tales-tiny` was trained on single stories of at most some 200 tokens. What if it must read four in a row? Its context becomes 1,024, four times the trained one. Rotary positions have an
# angle for every position, so nothing stops it; but keys that are 800 tokens away are something it has never seen. First: is it the *position* or the *distance* that is new?

# %%
rows = ablation.rows(TaleGenerator(11).stories(32))
longer = with_options(tiny, context_length=1024)
with torch.no_grad():
    losses = {}
    for start in (0, 700):
        logits = longer(rows[:, :-1].clamp(min=0), positions=start + torch.arange(rows.shape[1] - 1))
        chosen = logits.log_softmax(dim=2).gather(2, rows[:, 1:, None].clamp(min=0))[..., 0]
        losses[start] = -(chosen * (rows[:, 1:] >= 0)).sum(dim=1)
compare("story losses at position 0 and at position 700", losses[0], losses[700], tolerance=0.05)

# %% [markdown]
# A single story at positions 700 and later is as easy as at 0: scores depend on distances only. So what is new in four stories are the large distances. The remedies change the angles
# (chapter 2 built them): *linear* interpolation divides all by the factor, so that 1,024 positions look like 256; *NTK-aware* scaling enlarges the base; *YaRN* and *Llama 3* slow the slow
# pairs down and leave the fast ones alone. We read 32 rows of four stories and take the loss of the first, second, third and fourth story.

# %%
def rows_of_four(seed: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Ids (rows, tokens) of four stories one after the other, -1 at the end; and for each target its story 0 to 3."""
    ids, numbers = [], []
    for _ in range(n_rows):
        stories = [torch.tensor([*encoding.encode_ordinary(s.text), encoding.eot_token]) for s in TaleGenerator(seed).stories(4)]
        ids.append(torch.cat([torch.tensor([encoding.eot_token]), *stories]))
        numbers.append(torch.cat([torch.full((len(s),), i) for i, s in enumerate(stories)]))
        seed += 1
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=-1), pad(numbers, batch_first=True, padding_value=-1)


@torch.no_grad()
def losses_by_place(model: GPTModel, ids: Tensor, numbers: Tensor) -> list[float]:
    """Mean loss in nats of the first, second, third and fourth stories of the rows."""
    losses = torch.cat([ablation.story_losses(model, part) for part in ids.split(8)])
    return [losses[numbers == i].sum().item() / len(ids) for i in range(4)]


four, number = rows_of_four(seed=500, n_rows=32)
scalings = {"no scaling": {}, "window 200": {"window": 200}}
for kind in ("linear", "ntk", "yarn", "llama3"):
    scalings[kind] = {"rope_scaling": kind, "rope_factor": 4.0, "rope_original_length": 256}
models = {name: with_options(tiny, context_length=1024, **options) for name, options in scalings.items()}
by_place = pd.DataFrame(
    {name: losses_by_place(model, four, number) for name, model in models.items()}, ["first", "second", "third", "fourth"]
).T
by_place.round(0).astype(int)

# %% [markdown]
# CONTEXT PROSE 1
#
# ### After a short training on long rows
#
# Scaling was invented to be followed by a short training with long rows. We give 60 steps of two rows each to three of them, and to the model without scaling.

# %%
def fine_tuned(model: GPTModel, n_steps: int = 60) -> GPTModel:
    """The model after a short training on rows of four stories, the learning rate falling linearly to 0."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3, fused=True)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / n_steps)
        ids, places = rows_of_four(seed=10_000 + 2 * step, n_rows=2)
        loss = ablation.story_losses(model, ids).sum() / (places >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


after = {}
for name in ("no scaling", "linear", "ntk", "yarn"):
    trained = fine_tuned(with_options(tiny, context_length=1024, **scalings[name]))
    after[name] = losses_by_place(trained, four, number)
after = pd.DataFrame(after, by_place.columns).T
after.round(0).astype(int)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
colors = dict(zip(by_place.index, (BLACK, SKY, BLUE, ORANGE, GREEN, PURPLE), strict=True))
for axes, frame, title in zip(panels, (by_place, after), ("as trained", "after 60 steps on long rows"), strict=True):
    for name, row in frame.iterrows():
        axes.plot(range(1, 5), row, marker="o", markersize=4, color=colors[name], label=name)
    axes.axhline(floor, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="place of the story in its row", title=title, xticks=range(1, 5), ylim=(0, None))
panels[0].set_ylabel("nats per story (dotted: floor)")
panels[0].legend(fontsize=9, ncols=2)
figure.suptitle("CONTEXT FINDING", x=0.02, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# CONTEXT PROSE 2
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
