# %% [markdown]
# # The generation engine: fast, in batches, as a stream, and the same text every time
#
# You will build the part that turns a model into a writer: a key/value cache, batches of prompts of different lengths, streaming text, seeds, stops and
# speculative decoding. And you will prove that none of it changes a single token.
#
# | | |
# |---|---|
# | You will build | `generate`, `stream`, `stream_text`, `decode_step`, `generate_speculatively` |
# | You need | [the GPT](02_gpt.ipynb) and the cache of [multi-head attention](../ch03_attention/03_multi_head_attention.ipynb) |
# | Running time on 2 CPU cores | about 90 seconds |
# | Promotes to | [`shared/generation.py`](../shared/generation.py), [`shared/decode_step.py`](../shared/decode_step.py), [`shared/speculation.py`](../shared/speculation.py) |
#
# The last notebook wrote text in ten lines: run the model over all tokens so far, take the most probable next one, append it, start again. That is right, and it wastes nearly
# all of its work. The whole notebook keeps to one rule: the ten lines are the truth, and whatever is faster must write the same.
#
# **Notation.** A prompt has $P$ tokens, $N$ are added. $B$ rows make a batch; $V$ is the vocabulary, $D$ the width, $L$ the number of blocks, $C$ the context length.

# %%
import codecs
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from shared.attention import KeyValueCache, MultiHeadAttention, causal_mask
from shared.download import gpt2_encoding, or_none
from shared.gpt import GPTConfig, GPTModel
from shared.layers import FeedForward, LayerNorm, RMSNorm, SwiGLU, TransformerBlock
from shared.plotting import BLUE, GREEN, GREY, ORANGE, RED, label_line, use_style
from shared.positions import RotaryPositions
from shared.proof import compare
from shared.results import record
from shared.tale_tokenizer import tale_encoding
from shared.tales import TaleGenerator

use_style()
encoding = tale_encoding()
END = encoding.eot_token  # stands before and after each story

# %% [markdown]
# Two models that ship with the course have learnt to write tales; [chapter 5](../ch05_pretraining) trains them. Four lines load one.

# %%
def load_tales(name: str) -> GPTModel:
    folder = Path("../shared/checkpoints") / name
    model = GPTModel(GPTConfig(**json.loads((folder / "config.json").read_text())["model"])).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # the tied head is not stored
    return model


writer, small_writer = load_tales("tales-1m"), load_tales("tales-tiny")
for name, model in (("tales-1m", writer), ("tales-tiny", small_writer)):
    config = model.config
    print(f"{name}: {config.n_layers} blocks of width {config.emb_dim}, context {config.context_length}")

# %% [markdown]
# ## Why naive generation is quadratic
#
# The ten lines again, with a count of the positions that go through the model.

# %%
@torch.inference_mode()
def generate_naively(model: GPTModel, ids: list[int], n_new: int) -> tuple[list[int], int]:
    """Return the new ids, and how many positions the model has computed for them."""
    ids, n_positions = list(ids), 0
    for _ in range(n_new):
        logits = model(torch.tensor([ids]), last_only=True)  # (1, 1, vocab_size)
        n_positions += len(ids)
        ids.append(int(logits[0, -1].argmax()))
    return ids[-n_new:], n_positions


story = next(TaleGenerator(3).stories(1)).text
prompt = [END, *encoding.encode_ordinary(story)[:6]]
print(repr(encoding.decode(prompt[1:])), "->", repr(encoding.decode(generate_naively(writer, prompt, 5)[0])))
for n_new in (1, 2, 4, 100, 200):
    print(f"{n_new:3} new tokens: {generate_naively(writer, prompt, n_new)[1]:6,} positions")

# %% [markdown]
# From a prompt of $P = 7$ tokens the model computes $7 + 8 + 9 + \dots$ positions: $NP + N(N-1)/2$ for $N$ new tokens. Twice as many tokens cost nearly four times as much. All but the
# newest position have been computed before, and nothing about them has changed: a causal model's results at a position depend on no later one.

# %%
with torch.inference_mode():
    ids = torch.tensor([prompt])
    short, long = writer.hidden_states(ids[:, :-1]), writer.hidden_states(ids)
compare("the same positions, computed again", long[:, :-1], short, 1e-5)

# %% [markdown]
# What does a new token need of the old ones? In each block it forms a query, and meets their **keys** and **values**. So those two are kept, and only the new token goes through
# the model. The positions computed are then $P + N - 1$. The work, in floating-point operations (FLOPs), has a formula: each weight of a block's matrices takes part in two operations for each
# position, the scores and the mixing take $4D$ for each pair of positions, and the output head runs once a pass. PyTorch's counter must agree to the last digit.

# %%
def flops_of_pass(model: GPTModel, n_read: int, n_seen: int) -> int:
    """FLOPs of a pass over `n_read` new positions that see `n_seen` in all, with logits for the last alone."""
    config = model.config
    weights = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return (
        2 * weights * n_read
        + 4 * config.emb_dim * n_read * n_seen * config.n_layers
        + 2 * config.emb_dim * config.vocab_size
    )


def count_flops(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


counted = count_flops(lambda: generate_naively(writer, prompt, 20))
by_formula = sum(flops_of_pass(writer, n, n) for n in range(7, 27))
assert counted == by_formula
print(f"20 tokens without a cache: {counted:,} FLOPs counted, {by_formula:,} by formula")

# %% [markdown]
# ## A cache that grows
#
# The simplest cache hangs each new key and value to the old ones with `torch.cat`. `MultiHeadAttention` calls `append` and gets everything stored so far.

# %%
class GrowingCache:
    def __init__(self) -> None:
        self.length = self.bytes_written = 0
        self.keys = self.values = torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take (batch, heads, new tokens, head_dim) and return all of them."""
        if self.length:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values, self.length = keys, values, keys.shape[2]
        self.bytes_written += keys.nbytes + values.nbytes
        return keys, values

    def contents(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


# %% [markdown]
# Generation now has two phases. **Prefill** reads the whole prompt in one pass and fills the cache. **Decode** reads one token a pass, the one chosen last.

# %%
@torch.inference_mode()
def generate_cached(model: GPTModel, ids: list[int], n_new: int, caches: list) -> list[int]:
    new = []
    unread = ids  # prefill
    while len(new) < n_new:
        logits = model(torch.tensor([unread]), caches=caches, last_only=True)
        unread = [int(logits[0, -1].argmax())]  # decode
        new += unread
    return new


for n_new in (5, 100, 200):
    caches = [GrowingCache() for _ in writer.blocks]
    assert generate_cached(writer, prompt, n_new, caches) == generate_naively(writer, prompt, n_new)[0]
    naive = sum(flops_of_pass(writer, n, n) for n in range(7, 7 + n_new))
    cached = count_flops(lambda n=n_new: generate_cached(writer, prompt, n, [GrowingCache() for _ in range(4)]))
    assert cached == sum(flops_of_pass(writer, 7 if n == 7 else 1, n) for n in range(7, 7 + n_new))
    print(f"{n_new:3} tokens, the same ones: {naive / 1e9:6.2f} GFLOPs without, {cached / 1e9:4.2f} with a cache")

# %% [markdown]
# The work of each further token, drawn from the formula. The lower line still rises, with the scores against all earlier tokens, but its slope is hidden by the cost of the weights.

# %%
tokens = range(8, 257)
figure, axes = plt.subplots()
for values, color, name in (
    ([flops_of_pass(writer, n, n) / 1e6 for n in tokens], RED, "without a cache"),
    ([flops_of_pass(writer, 1, n) / 1e6 for n in tokens], BLUE, "with a cache"),
):
    axes.plot(tokens, values, color=color)
    label_line(axes, name, 256, values[-1], color)
axes.set(xlabel="position of the new token", ylabel="MFLOPs for this token", xlim=(0, 310), yscale="log")
axes.set_title("A cache makes the 256th token as cheap as the 8th")
plt.show()

# %% [markdown]
# ## A cache that is there in advance
#
# `torch.cat` copies everything old for every new token: the copies are quadratic again. [`KeyValueCache`](../shared/attention.py) takes its memory once, for the longest text that
# may come, and writes each key and value once.

# %%
n_bytes = []
for n_new in (50, 100, 200):
    growing, fixed = [GrowingCache() for _ in writer.blocks], writer.new_caches(7 + n_new)
    assert generate_cached(writer, prompt, n_new, growing) == generate_cached(writer, prompt, n_new, fixed)
    written = sum(k.nbytes + v.nbytes for k, v in (cache.contents() for cache in fixed))
    n_bytes.append((n_new, sum(cache.bytes_written for cache in growing), written))
table = pd.DataFrame(n_bytes, columns=["new tokens", "bytes written, growing", "bytes written, preallocated"])
assert list(table.iloc[:, 2]) == [2 * 4 * 4 * 128 * (7 + n - 1) for n in (50, 100, 200)]  # 2 D L floats a token
table

# %% [markdown]
# A token takes $2DL$ numbers, keys and values for each block. At GPT-2's size that is a good deal:

# %%
small = GPTConfig.preset("gpt2-small")
per_token = 2 * small.emb_dim * small.n_layers * 4
print(f"GPT-2 small, float32: {per_token:,} bytes a token, {per_token * 1024 / 2**20:.0f} MiB for a full context")

# %% [markdown]
# ## What bounds the two phases
#
# A pass must fetch every weight from memory, whether it serves one token or a thousand. A processor does many more operations than it fetches numbers in the same time. So the question is
# how many FLOPs a pass does for each byte it reads: its **arithmetic intensity**. A weight of 4 bytes takes part in 2 FLOPs for each token.

# %%
for phase, n_tokens in (("prefill of 512 tokens", 512), ("decode, 1 row", 1), ("decode, 32 rows", 32)):
    print(f"{phase:22} {2 * n_tokens / 4:6.1f} FLOPs a byte in float32")

# %% [markdown]
# At half a FLOP a byte, decoding waits for memory on any machine, unless the model is so small that it stays in the processor's own cache. Three ways out follow from the fraction: more rows a
# pass (batches), more tokens a pass (speculative decoding, below), fewer bytes a weight (bfloat16 here, 8 bits in a later chapter). The chart at the end shows where we are.
#
# A small model is bound by something else: the work *between* the operations. That is next.
#
# ## One step without detours
#
# How many Python functions does one decode step call? The profiler counts them.

# %%
import cProfile
import pstats


@torch.inference_mode()
def python_calls(function: Callable[[], object]) -> int:
    profiler = cProfile.Profile()
    profiler.runcall(function)
    return pstats.Stats(profiler).total_calls


with torch.inference_mode():
    caches = writer.new_caches()
    writer(torch.tensor([prompt]), caches=caches)
n_calls = python_calls(lambda: writer(torch.tensor([[5]]), caches=caches, last_only=True))
n_modules = sum(1 for _ in writer.modules())
assert n_calls > 400
print(f"one token: more than 400 calls of functions, through a model of {n_modules} modules")

# %% [markdown]
# A call of a module looks for hooks, checks shapes, reads attributes; a microsecond or two each. A matrix product of this model takes five. While text is written, the modules and the
# shapes stay as they are from token to token, so all this can be done once: `decode_step` puts together a function from the model's own parts. What it does not know, it calls as the module it is.

# %% [markdown] tags=["promote:decode_step"]
# A step of decoding without the cost of calling modules: the same arithmetic, everything looked up once.
#
# A small model spends more time between its operations than in them: each call of a module takes one or two microseconds, and so does each check of a shape. While text is being written, the modules
# and the shapes stay the same from token to token. So a function is put together once and called for each token. It is built from the model's own parts: a part that it
# does not know (an adapter, a mixture of experts, a module with hooks) is called as the module it is, and a model that it does not know is run as always.
#
# Left out: windows, post-norm blocks and interleaved rotary positions, which are run as always.

# %% tags=["promote:decode_step"]
# Called as step(tokens, positions, mask, caches): tokens int64 (rows, n), the newest of each row, in most cases one;
# positions int64 (rows, n), or None to count on from the caches; mask bool (rows, keys), True for what is no padding,
# or None; one cache a block, which receives the tokens. It returns the logits (rows, n, vocab_size).
Step = Callable[[Tensor, Tensor | None, Tensor | None, Sequence[KeyValueCache]], Tensor]


def decode_step(model: nn.Module) -> Step:
    """Return a function that computes what `model` computes for a few new tokens a row, with the least overhead.

    The model must be in evaluation mode, the function be called without gradients. It holds on to the weights: build a
    new one after they or the model's parts have been replaced.
    """
    if _is_plain(model):
        return _fast_step(model)

    def step(tokens, positions, mask, caches):
        options = {"positions": positions, "key_padding_mask": mask, "caches": caches}
        return model(tokens, **options)

    return step


def bare(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that computes what `module` computes, or the module itself if it is of no known kind."""
    if _has_hooks(module):
        return module
    kind = type(module)  # a subclass may do anything
    if kind is nn.Linear:
        return lambda x, weight=module.weight, bias=module.bias: F.linear(x, weight, bias)
    if kind in (LayerNorm, RMSNorm):
        shape, weight, eps = (module.dim,), module.weight, module.eps
        if kind is RMSNorm:
            return lambda x: F.rms_norm(x, shape, weight, eps)
        return lambda x, bias=module.bias: F.layer_norm(x, shape, weight, bias, eps)
    if kind is FeedForward:
        up, activation, down = bare(module.up), module.activation, bare(module.down)
        return lambda x: down(activation(up(x)))
    if kind is SwiGLU:
        gate, up, down = bare(module.gate), bare(module.up), bare(module.down)
        return lambda x: down(F.silu(gate(x)) * up(x))
    return module


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(model: nn.Module) -> bool:
    """Return whether `_fast_step` knows this model and every part that it does not call as a module."""
    if type(model) is not GPTModel:
        return False
    passed_over = [model, model.token_embedding]
    for block in model.blocks:
        attention = block.attention
        if type(block) is not TransformerBlock or type(attention) is not MultiHeadAttention:
            return False
        rotary = attention.rotary
        if not block.pre_norm or attention.window or (rotary and (type(rotary) is not RotaryPositions or rotary.interleaved)):
            return False
        passed_over += [block, block.dropout, attention, *([rotary] if rotary else [])]
    return type(model.token_embedding) is nn.Embedding and not any(map(_has_hooks, passed_over))


def _fast_step(model: GPTModel) -> Step:
    """`decode_step` for the GPTs that `_is_plain` accepts."""
    embedding, added = model.token_embedding.weight, model.position_embedding
    rotary = model.blocks[0].attention.rotary
    layers = [
        (bare(b.attention_norm), _attention_step(b.attention), bare(b.feed_forward_norm), bare(b.feed_forward))
        for b in model.blocks
    ]
    final_norm, head = bare(model.final_norm), bare(model.output_head)
    counting = torch.arange(model.config.context_length, device=embedding.device)

    def step(tokens, positions, mask, caches):
        start, n = caches[0].length, tokens.shape[1]
        if positions is None:
            positions = counting[start : start + n]  # (n,), the same for all rows
        x = F.embedding(tokens, embedding)  # (rows, n, emb_dim)
        if added is not None:
            x = x + added(positions)
        factors = None
        if rotary is not None:
            factors = rotary.table[positions].to(x.dtype).unsqueeze(-3).chunk(2, dim=-1)  # (.., 1, n, head_dim) each
        if mask is not None:
            mask = mask[:, None, None]  # (rows, 1, 1, keys)
        if n > 1:
            causal = causal_mask(n, start + n, device=x.device)
            mask = causal if mask is None else mask & causal
        for (norm, attention, feed_forward_norm, feed_forward), cache in zip(layers, caches, strict=True):
            x = x + attention(norm(x), factors, mask, cache)
            x = x + feed_forward(feed_forward_norm(x))
        return head(final_norm(x))

    return step


def _attention_step(attention: MultiHeadAttention) -> Callable[..., Tensor]:
    """Return the attention of the new tokens, x (rows, n, emb_dim), to the cached ones and to themselves."""
    project, output, width = bare(attention.qkv), bare(attention.output), attention.head_dim
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    norms = [norm and bare(norm) for norm in (attention.query_norm, attention.key_norm)]

    def step(x, factors, mask, cache):
        heads = project(x).unflatten(2, (-1, width)).transpose(1, 2)  # (rows, heads of all kinds, n, head_dim)
        turned, value = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=1)
        if any(norms):
            parts = turned.split((n_heads, n_kv_heads), dim=1)
            turned = torch.cat([norm(part) if norm else part for norm, part in zip(norms, parts, strict=True)], dim=1)
        if factors is not None:  # queries and keys at once, as in RotaryPositions
            turned = torch.addcmul(turned * factors[0], turned.roll(width // 2, dims=-1), factors[1])
        query, key = turned.split((n_heads, n_kv_heads), dim=1)
        keys, values = cache.append(key, value)
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=n_heads > n_kv_heads)
        return output(mixed.transpose(1, 2).flatten(2))

    return step

# %%
caches, others = writer.new_caches(), writer.new_caches()
with torch.inference_mode():
    step = decode_step(writer)
    for used in (caches, others):
        writer(torch.tensor([prompt]), caches=used)
    fast, slow = step(torch.tensor([[5]]), None, None, caches), writer(torch.tensor([[5]]), caches=others)
compare("decode_step against the model", fast, slow, 1e-4)
fewer = python_calls(lambda: step(torch.tensor([[5]]), None, None, caches))
assert fewer < n_calls / 2
print(f"less than half of the function calls: {fewer < n_calls / 2}")

# %% [markdown]
# ## Rows of different lengths
#
# Prompts in one batch must form a rectangle. The shorter ones are padded, and on the **left**: so all rows end at the same place, and the next token of each belongs into the same column.
# Padding must change nothing. Two things are needed: a mask, so that no token sees the padding, and own positions, so that the first real token has position 0. Here is the short row's result in
# the batch against the same row alone, in float64:

# %%
torch.manual_seed(0)
toy_config = GPTConfig(vocab_size=100, context_length=64, emb_dim=32, n_heads=4, n_layers=2)
toy = GPTModel(toy_config).double().eval()
for parameter in toy.parameters():
    nn.init.normal_(parameter, std=0.3)  # larger than usual, so that its texts vary

rows = [[11, 12, 13, 14, 15, 16], [21, 22, 23]]
padded = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])  # (2, 6)
mask = torch.tensor([[True] * 6, [False] * 3 + [True] * 3])
positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # those of padding do not matter
print(positions.tolist())
with torch.no_grad():
    alone = toy(torch.tensor([rows[1]]), last_only=True)[0, 0]
    for name, options in {
        "neither": {},
        "mask": {"key_padding_mask": mask},
        "positions": {"positions": positions},
        "both": {"key_padding_mask": mask, "positions": positions},
    }.items():
        difference = (toy(padded, last_only=True, **options)[1, 0] - alone).abs().max().item()
        print(f"{name:9} largest difference {difference:.2f}")
compare("both", toy(padded, last_only=True, **options)[1, 0], alone, 1e-12)

# %% [markdown]
# ## Choosing a token, and seeds
#
# The most probable token is one choice; the other is to draw from the distribution softmax(logits / temperature). Below 1 the temperature sharpens it, above 1 it flattens it, and 0 stands for the limit: always
# the most probable. Three logits by hand:

# %%
logits = torch.tensor([[2.0, 1.0, 0.0]])
rows = {t: (logits / t).softmax(dim=-1)[0].tolist() for t in (0.5, 1.0, 2.0)}
pd.DataFrame(rows, index=["token 0", "token 1", "token 2"]).T.rename_axis("temperature").round(2)

# %% [markdown]
# To draw, lay the probabilities side by side on the line from 0 to 1 and throw one dart: the token on whose piece it lands is taken. In this way one uniform number decides. Each row gets its own
# generator with its own seed, and its numbers are drawn in advance. So what a row becomes does not depend on its neighbours, nor on how many rows have already finished.

# %% [markdown] tags=["promote:generation"]
# From a decoder's logits to tokens and text: one engine for every decoder of the project, with a key/value cache, in batches, as a stream.
#
# Of a model it needs `config.context_length`, `config.vocab_size`, `new_caches(max_length)`, and a call
# `model(tokens, positions=, key_padding_mask=, caches=, last_only=)` -> logits, as `shared.gpt.GPTModel` has them. What one row of a batch becomes depends neither on the
# other rows nor on whether its tokens are streamed. How logits are reshaped before the choice (top-k and the like) is a matter of processors, which `shared.sampling` has; this module only
# calls them.
#
# Left out: prompts that join a running batch, caches in pages, beam search, speculative decoding (`shared.speculation`).
#
# Follows Pope et al. (2023, "Efficiently Scaling Transformer Inference") on prefill and decode.

# %% tags=["promote:generation"]
# Called as processor(ids, logits): ids int64 (rows, tokens), all that was read and written so far; logits
# (rows, vocab_size); returns the new logits. The rows of one call have the same number of tokens.
Processor = Callable[[Tensor, Tensor], Tensor]


class _Rows:
    """The unfinished rows of a batch: their tokens, and what the model's next pass needs.

    `ids` (rows, width) holds the tokens, so that all rows end at column `end` and row i begins at column `begins[i]`.
    The model sees row i from column `visible[i]` on, which is later where the context has slid.
    """

    def __init__(self, model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.model, self.limit, self.step = model, model.config.context_length, decode_step(model)
        self.device = next(model.parameters()).device
        self.end = max(map(len, prompts))
        self.last_column = self.end + max_new_tokens
        self.begins = [self.end - len(prompt) for prompt in prompts]
        padded = [[0] * self.last_column for _ in prompts]  # any id will do: it is masked
        for row, prompt, begin in zip(padded, prompts, self.begins, strict=True):
            row[begin : self.end] = prompt
        self.ids = torch.tensor(padded, device=self.device)
        self.visible = list(self.begins)

    def read(self) -> Tensor:
        """Run the model over all visible tokens into new caches (prefill); return logits (rows, vocab_size)."""
        for i, first in enumerate(self.visible):
            if self.end - first > self.limit:  # keeps half, so that the next time is not the next token
                self.visible[i] = self.end - max(self.limit // 2, 1)
        left = self.left = min(self.visible)
        self.longest = self.end - left  # tokens that the model sees of the longest row
        size = min(self.limit, self.last_column - left)
        self.caches = self.model.new_caches(size)
        self.mask = self.positions = None
        positions = None
        if any(first > left for first in self.visible):
            columns = torch.arange(left, left + size, device=self.device)
            distances = columns - torch.tensor(self.visible, device=self.device)[:, None]  # (rows, size)
            self.mask = distances >= 0
            positions = distances[:, : self.longest].clamp(min=0)
            self.positions = positions[:, -1:].clone()
        options = {"positions": positions, "key_padding_mask": self._seen(), "caches": self.caches}
        return self.model(self.ids[:, left : self.end], last_only=True, **options).squeeze(1)

    def advance(self, tokens: Tensor) -> Tensor:
        """Append `tokens` (rows,), run the model over them alone (decode) and return logits (rows, vocab_size)."""
        self.ids[:, self.end] = tokens
        self.end += 1
        self.longest += 1
        if self.longest > self.limit:
            return self.read()
        if self.positions is not None:
            self.positions += 1
        return self.step(tokens[:, None], self.positions, self._seen(), self.caches).squeeze(1)

    def _seen(self) -> Tensor | None:
        """Return the mask (rows, keys) of the tokens that are no padding; None if all are."""
        return None if self.mask is None else self.mask[:, : self.longest]

    def process(self, processors: Sequence[Processor], logits: Tensor) -> Tensor:
        """Let the processors change the logits: all rows at once if they are equally long, else one by one."""
        if len(set(self.begins)) == 1:
            return _apply(processors, self.ids[:, self.begins[0] : self.end], logits)
        rows = zip(self.ids, self.begins, logits, strict=True)
        done = [_apply(processors, ids[None, begin : self.end], row[None]) for ids, begin, row in rows]
        return torch.cat(done)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self.device)
        self.begins, self.visible = [self.begins[i] for i in rows], [self.visible[i] for i in rows]
        self.ids = self.ids[index]
        if self.mask is not None:
            self.mask, self.positions = self.mask[index], self.positions[index]
        for cache in self.caches:
            cache.reorder(index)


def _apply(processors: Sequence[Processor], ids: Tensor, logits: Tensor) -> Tensor:
    for processor in processors:
        shape, logits = logits.shape, processor(ids, logits)
        if logits.shape != shape:
            raise ValueError(f"processor must return logits {tuple(shape)}, got {tuple(logits.shape)}")
    return logits


def choose_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Return the next token of each row, int64 (rows,): the most probable if `temperature` is 0, else a random one.

    The random choice inverts the cumulative distribution of softmax(logits / temperature): one uniform number a row
    decides, so that a row's choice depends on nothing but its own logits and its own number.

    Args:
        logits: (rows, vocab_size); -inf for what must not be chosen.
        temperature: Not negative.
        uniforms: float64 (rows,), in [0, 1); not used if `temperature` is 0.

    Raises:
        ValueError: A row to draw from is NaN, or allows no token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)  # (rows, vocab_size)
    cumulative = cumulative / cumulative[:, -1:]  # the last is 1 exactly, above every uniform number
    if cumulative[:, -1].isnan().any():
        raise ValueError("logits must be numbers or -inf, with at least one number a row, got NaN or only -inf")
    return torch.searchsorted(cumulative, uniforms[:, None].contiguous(), right=True).squeeze(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and back to what it was before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

# %%
edges = logits.double().softmax(dim=-1).cumsum(dim=-1)[0]
print("edges", [round(edge, 2) for edge in edges.tolist()])
darts = torch.tensor([0.10, 0.70, 0.95], dtype=torch.float64)
print("darts at 0.10, 0.70, 0.95 hit tokens", choose_tokens(logits.expand(3, 3), 1.0, darts).tolist())

# %% [markdown]
# The class above keeps the books of a batch: where each row begins, what is visible, mask and positions. When a row has ended it leaves the batch, unless hardly any have. A
# **processor** changes the logits before the choice; chapter 5 has a collection. Rows of different lengths are given to processors one by one, so that no processor ever sees padding.
#
# ## The engine
#
# One function for every decoder of the project. All arguments are checked before anything is computed.

# %% tags=["promote:generation"]
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    processors: Sequence[Processor] = (),
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
    overflow: str = "error",
) -> list[list[int]]:
    """Continue each prompt and return the new ids of each, in the order of the prompts.

    Args:
        model: A decoder, as the module's docstring says. It runs in evaluation mode and without gradients.
        prompts: Lists of ids; their lengths may differ.
        max_new_tokens: Most ids to add to each prompt.
        temperature: 0 takes the most probable token; above 0, tokens are drawn from softmax(logits / temperature)
            after the processors. To scale before a processor, put a processor that scales in front of it.
        processors: Functions (ids, logits) -> logits, applied in turn before the choice.
        stop_tokens: Ids that end a row; they are not returned.
        seed: Of the random choices; row i has its own generator with seed + i, or the i-th of several seeds. None: the
            seeds are drawn from torch's global generator.
        overflow: If prompt and new tokens are longer than the model's context: "error" raises before anything is
            computed; "slide" goes on with the newest half of the context, read anew, whenever it is full.

    Raises:
        ValueError: An argument is out of range (it is named), or the context does not suffice.
    """
    options = {"temperature": temperature, "processors": processors, "stop_tokens": stop_tokens}
    steps = _start(model, prompts, max_new_tokens, seed=seed, overflow=overflow, **options)
    new = [[] for _ in prompts]
    for step in steps:
        for row, token in step:
            new[row].append(token)
    return new


def stream(model: nn.Module, prompt: Sequence[int], max_new_tokens: int, **options: object) -> Iterator[int]:
    """Yield the ids that `generate(model, [prompt], ...)` returns, each as soon as it is chosen.

    The options are those of `generate`; errors are raised at the call. Until the iterator is used up or closed, the
    model stays in evaluation mode.
    """
    steps = _start(model, [prompt], max_new_tokens, **options)
    return (token for step in steps for _, token in step)


def _start(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    processors: Sequence[Processor] = (),
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
    overflow: str = "error",
) -> Iterator[list[tuple[int, int]]]:
    """Check every argument and return the iterator of `_steps`."""
    if overflow not in ("error", "slide"):
        raise ValueError(f"overflow must be 'error' or 'slide', got {overflow!r}")
    prompts = check_prompts(model, prompts, max_new_tokens, may_exceed=overflow == "slide")
    stops = check_ids("stop_tokens", stop_tokens, model.config.vocab_size)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if seed is None:
        seeds = torch.randint(2**62, (len(prompts),)).tolist() if temperature and prompts else [0] * len(prompts)
    else:
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed must be one number, or one for each of {len(prompts)} prompts, got {len(seeds)}")
    uniforms = torch.zeros(len(prompts), max_new_tokens, dtype=torch.float64)
    if temperature:
        for row, number in zip(uniforms, seeds, strict=True):
            row.uniform_(generator=torch.Generator().manual_seed(number))
    return _steps(model, prompts, max_new_tokens, temperature, tuple(processors), frozenset(stops), uniforms)


@torch.inference_mode()
def _steps(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    processors: tuple[Processor, ...],
    stop_tokens: frozenset[int],
    uniforms: Tensor,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each step, the pairs (number of the prompt, new id) of the rows that go on."""
    if not prompts:
        return
    with evaluating(model):
        rows = _Rows(model, prompts, max_new_tokens)
        uniforms = uniforms.to(rows.device)
        numbers: list[int | None] = list(range(len(prompts)))  # of each row's prompt; None when the row has ended
        logits = rows.read()
        for step in range(max_new_tokens):
            if logits.dtype in (torch.bfloat16, torch.float16):
                logits = logits.float()
            if processors:
                logits = rows.process(processors, logits)
            tokens = choose_tokens(logits, temperature, uniforms[:, step])
            pairs = list(zip(numbers, tokens.tolist(), strict=True))
            if stop_tokens:
                numbers = [None if token in stop_tokens else number for number, token in pairs]
            yield [pair for pair, number in zip(pairs, numbers, strict=True) if number is not None]
            n_going = len(numbers) - numbers.count(None)
            if not n_going or step == max_new_tokens - 1:
                return
            if n_going <= 0.9 * len(numbers):  # copying the caches for fewer rows than that would not pay
                kept = [i for i, number in enumerate(numbers) if number is not None]
                rows.keep(kept)
                numbers, tokens, uniforms = [numbers[i] for i in kept], tokens[kept], uniforms[kept]
            logits = rows.advance(tokens)


def check_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, may_exceed: bool = False
) -> list[list[int]]:
    """Return the prompts as lists, if they and the number of new tokens are allowed."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}")
    vocab_size, limit = model.config.vocab_size, model.config.context_length
    checked = [check_ids(f"prompts[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(checked):
        if not prompt:
            raise ValueError(f"prompts[{i}] must hold at least one id, got none")
        if len(prompt) + max_new_tokens > limit and not may_exceed:
            raise ValueError(
                f"prompts[{i}] of {len(prompt)} ids and max_new_tokens={max_new_tokens} exceed the model's "
                f"context_length={limit}"
            )
    return checked


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return the ids as a list of ints; ValueError if they are none, or one is out of range."""
    try:
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of ids, got {ids!r}") from None
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"{name} must hold ids from 0 to {vocab_size - 1}, got {token!r}")
    return ids

# %%
prompts = [[END, *encoding.encode_ordinary(start)] for start in ("One", "Early one morning,", "On the")]
print("lengths", [len(p) for p in prompts])
for ids in generate(writer, prompts, 200, stop_tokens=[END]):
    print(f"{len(ids):3} new:", encoding.decode(ids)[:90].replace("\n", " "), "...")

# %% [markdown]
# Sampling, with a processor that forbids a token, as an example of the interface:

# %%
def forbid(token: int) -> Processor:
    def processor(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([token]), float("-inf"))

    return processor


free = generate(toy, [[1, 2, 3]] * 4, 12, temperature=1.0, seed=7)
again = generate(toy, [[1, 2, 3]] * 4, 12, temperature=1.0, seed=7)
without = generate(toy, [[1, 2, 3]] * 4, 12, temperature=1.0, seed=7, processors=[forbid(free[0][0])])
assert free == again and len(set(map(tuple, free))) == 4  # equal prompts, different numbers
assert all(free[0][0] not in row for row in without)
assert free[2] == generate(toy, [[1, 2, 3]], 12, temperature=1.0, seed=9)[0]  # row 2 has seed 7 + 2
print("same seed, same texts; four rows, four texts; row 2 of seed 7 is row 0 of seed 9")

# %% [markdown]
# ### At the end of the context
#
# A model has no positions beyond its context. By default that is an error, before anything is computed. With `overflow="slide"`, whenever the context is full, its newest half is read again as if it were a prompt. (To
# move the window by one token each time would mean a prefill for every token.) A hook shows how many tokens each pass reads:

# %%
n_read = []
hook = toy.register_forward_pre_hook(lambda module, inputs: n_read.append(inputs[0].shape[1]))
try:
    generate(toy, [[1, 2, 3]], 100)
except ValueError as error:
    print(error, "- passes so far:", len(n_read))
ids = generate(toy, [[1, 2, 3]], 100, overflow="slide")[0]
hook.remove()
print(len(ids), "new ids;", "passes that read more than one token:", {i: n for i, n in enumerate(n_read) if n > 1})
assert n_read.count(1) == 97

# %% [markdown]
# Pass 0 is the prompt. Pass 62 would have put a 65th token into a context of 64, so 32 tokens were read anew, and again 33 tokens later.
#
# ### Everything that is refused

# %%
for wrong in (
    {"prompts": [[1, 2], []]},
    {"prompts": [[1, 100]]},
    {"prompts": [[-1]]},
    {"prompts": [1, 2]},
    {"max_new_tokens": 0},
    {"max_new_tokens": -5},
    {"temperature": -0.5},
    {"stop_tokens": [100]},
    {"seed": [1, 2, 3]},
    {"overflow": "wrap"},
):
    try:
        generate(toy, **{"prompts": [[1, 2]], "max_new_tokens": 5, **wrong})
        raise AssertionError(f"{wrong} was accepted")
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Proof: cache = no cache, batch = one by one, stream = whole
#
# The reference is the ten lines, for a single row and without a cache, with the same choice of tokens. In float64, 300 random prompts of 1 to 20 tokens are continued in batches, and each must equal its reference token by token:
# greedily and at random, with and without a processor, with stop tokens. (In float32 sums in another order differ in the last digits, and where two tokens are nearly equally probable,
# that can decide.)

# %%
@torch.inference_mode()
def reference(model, ids, n_new, *, temperature=0.0, processors=(), stop_tokens=(), seed=0) -> list[int]:
    uniforms = torch.empty(n_new, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(seed))
    new = []
    for i in range(n_new):
        tokens = torch.tensor([ids + new])
        logits = model(tokens)[:, -1]
        for processor in processors:
            logits = processor(tokens, logits)
        token = int(choose_tokens(logits, temperature, uniforms[i : i + 1]))
        if token in stop_tokens:
            break
        new.append(token)
    return new


def no_repeats(ids: Tensor, logits: Tensor) -> Tensor:
    return logits.scatter(1, ids[:, -8:], float("-inf"))  # none of the last eight; padding among them would show


randoms = torch.Generator().manual_seed(1)
lengths = torch.randint(1, 21, (300,), generator=randoms).tolist()
random_prompts = [torch.randint(100, (n,), generator=randoms).tolist() for n in lengths]
settings = [{}, {"temperature": 1.0}, {"processors": [no_repeats]}]
settings += [{"temperature": 1.5, "processors": [no_repeats], "stop_tokens": [3, 33, 63]}]

# %%
n_tokens = 0
for options in settings:
    for first in range(0, 300, 60):
        batch = random_prompts[first : first + 60]
        for i, ids in enumerate(generate(toy, batch, 10, seed=first, **options)):
            assert ids == reference(toy, batch[i], 10, seed=first + i, **options)
            assert ids == list(stream(toy, batch[i], 10, seed=first + i, **options))
            n_tokens += len(ids)
    print(f"{', '.join(options) or 'greedy'}: 300 prompts, every token equal")
record("generation: cache, batch and stream against none", "every token equal", "", f"{n_tokens:,} tokens, float64")

# %% [markdown]
# ## Proof: greedy output equals transformers' `generate`
#
# The same weights in Hugging Face's GPT-2, the same prompts, padded for it with its own mask.

# %%
NAMES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}


def as_transformers(ours: GPTModel) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 of the same shape, with our weights."""
    config, state = ours.config, ours.state_dict()
    shape = {"n_positions": config.context_length, "n_embd": config.emb_dim, "n_head": config.n_heads}
    shape |= {"vocab_size": config.vocab_size, "n_layer": config.n_layers, "bos_token_id": None, "eos_token_id": None}
    copied = {f"ln_f.{kind}": state[f"final_norm.{kind}"] for kind in ("weight", "bias")}
    copied |= {"wte.weight": state["token_embedding.weight"], "wpe.weight": state["position_embedding.weight"]}
    for i in range(config.n_layers):
        for mine, other in NAMES.items():
            for kind in ("weight", "bias"):
                tensor = state[f"blocks.{i}.{mine}.{kind}"]
                copied[f"h.{i}.{other}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
    theirs = GPT2LMHeadModel(GPT2Config(**shape, attn_implementation="sdpa"))
    theirs.transformer.load_state_dict(copied)
    return theirs.to(ours.token_embedding.weight.dtype).eval()


theirs = as_transformers(toy)
for first in range(0, 300, 60):
    batch = random_prompts[first : first + 60]
    padded = torch.tensor([[0] * (20 - len(ids)) + ids for ids in batch])
    mask = torch.tensor([[0] * (20 - len(ids)) + [1] * len(ids) for ids in batch])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert generate(toy, batch, 40) == expected[:, 20:].tolist()
print("300 prompts, 40 tokens each: equal to transformers in every token")

# %% [markdown]
# ## From ids to text, as a stream
#
# A reader wants to see text while it is written. Tokens are pieces of bytes, and a character may be spread over several:

# %%
ids = encoding.encode_ordinary("Zoë 🙂")
print([encoding.decode_single_token_bytes(token) for token in ids])
print([encoding.decode([token]) for token in ids])

# %% [markdown]
# Decoded token by token, broken characters become "�". The cure is a decoder that keeps the bytes of an unfinished character until the rest has come; Python's `codecs` has one.
#
# **Stop strings** need the same patience. Text that may become the beginning of a stop string must be held back: once shown, it cannot be taken away. As soon as it cannot become one any more, it goes out.

# %% tags=["promote:generation"]
def stream_text(
    model: nn.Module,
    encoding: tiktoken.Encoding,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    **options: object,
) -> Iterator[str]:
    """Yield the continuation of a prompt as pieces of text, each as soon as it is certain.

    A character of several bytes comes whole, even if its bytes are spread over tokens; bytes that are no text become
    U+FFFD, as in `encoding.decode`. Together the pieces are what `generate_text` returns.

    Args:
        model, max_new_tokens: As in `generate`.
        encoding: The model's tokenizer.
        prompt: A text, encoded without special tokens; or ids, which may hold them.
        stop_strings: Texts that end the generation at the first one that is complete. Neither it nor what comes after
            it is yielded, and what may become the beginning of one is held back until it is known not to be.
        stop_tokens: As in `generate`; None stands for the encoding's end-of-text token.
        options: `temperature`, `processors`, `seed` and `overflow` of `generate`.

    Raises:
        ValueError: As `generate`, at the call; or a stop string is empty.
    """
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"stop_strings must be texts of at least one character, got {stop_strings!r}")
    ids = encoding.encode_ordinary(prompt) if isinstance(prompt, str) else prompt
    stops = (encoding.eot_token,) if stop_tokens is None else stop_tokens
    tokens = stream(model, ids, max_new_tokens, stop_tokens=stops, **options)
    pieces = _until(decode_stream(encoding, tokens), tuple(stop_strings))
    return (piece for piece in pieces if piece)


def generate_text(
    model: nn.Module, encoding: tiktoken.Encoding, prompt: str | Sequence[int], max_new_tokens: int, **options: object
) -> str:
    """Return the continuation of a prompt, without the prompt; arguments and errors are those of `stream_text`."""
    return "".join(stream_text(model, encoding, prompt, max_new_tokens, **options))


def decode_stream(encoding: tiktoken.Encoding, tokens: Iterator[int]) -> Iterator[str]:
    """Turn a stream of ids into one of text, a piece for each id and one for the end; pieces may be empty."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def _until(pieces: Iterator[str], stop_strings: tuple[str, ...]) -> Iterator[str]:
    """Pass on the text before the first stop string that is complete."""
    held = ""
    for piece in pieces:
        held += piece
        # The first to end wins, and of those with the same end the longest, however the text is cut into pieces.
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in stop_strings if stop in held]
        if found:
            yield held[: min(found)[1]]
            return
        n_held = max((_overlap(held, stop) for stop in stop_strings), default=0)
        yield held[: len(held) - n_held]
        held = held[len(held) - n_held :]
    yield held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop`, not all of it, that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

# %%
print(list(decode_stream(encoding, iter(ids))))
print(list(_until(iter(["a ", "T", "HE", " E", "N", "D"]), ("THE END",))))
print(list(_until(iter(["a ", "T", "HE", " E", "N", "T"]), ("THE END",))))

# %%
start = [END, *encoding.encode_ordinary("One")]
for piece in stream_text(writer, encoding, start, 100, stop_strings=["."]):
    print(piece, end="|")
whole = generate_text(writer, encoding, start, 100)
assert whole.startswith(generate_text(writer, encoding, start, 100, stop_strings=["."]) + ".")

# %% [markdown]
# ### Proof: the stream is the whole text
#
# A model with random weights writes random bytes, broken characters among them. For 100 prompts the pieces must add up to what the tokenizer makes of all tokens at once; with a stop string, to what stands before it.

# %%
torch.manual_seed(0)
wild = GPTModel(GPTConfig(encoding.n_vocab, context_length=32, emb_dim=32, n_heads=2, n_layers=1)).double().eval()
broken = stopped = 0
for seed in range(100):
    options = {"temperature": 30.0, "seed": seed, "stop_tokens": []}
    text = encoding.decode(generate(wild, [[seed]], 30, temperature=30.0, seed=seed)[0])
    assert "".join(stream_text(wild, encoding, [seed], 30, **options)) == text
    assert generate_text(wild, encoding, [seed], 30, stop_strings=[" a", "e"], **options) == min(
        text.partition(stop)[0] for stop in (" a", "e")
    )
    broken += "\ufffd" in text
    stopped += " a" in text or "e" in text
assert broken > 10 and stopped > 50
print("100 streams equal their whole texts; some hold broken characters, most hold a stop string")

# %% [markdown]
# ## Speculative decoding
#
# Decode passes are bound by fetching weights or by overhead, not by arithmetic: a pass over five tokens costs little more than a pass over one. So let something cheap *guess* the next four tokens, and let one pass check
# them all. Guess $i$ is right if the model's own choice before it is that guess. Everything before the first mistake is kept, and the model's own choice at that place comes for free. In greedy decoding
# the result is exactly what the model would have written (Leviathan et al., 2023).
#
# Two ways to guess: **prompt lookup** finds the last few tokens earlier in the text and proposes what came after them; a **draft model** is a smaller model of the same vocabulary.

# %% [markdown] tags=["promote:speculation"]
# Speculative decoding: what greedy generation writes, in fewer passes of the model.
#
# Something cheap guesses the next few ids, one pass of the model checks them all, and what it would not have chosen itself is thrown away. The guesses come from the text so far or from a smaller model.
#
# Left out: batches, and drawing at random (for that a guess is accepted with a probability).
#
# Follows Leviathan et al. (2023, "Fast Inference from Transformers via Speculative Decoding") and, for guesses without a model, Saxena (2023, "Prompt Lookup Decoding").

# %% tags=["promote:speculation"]
@dataclass(frozen=True)
class Speculation:
    """What speculative decoding wrote, and what it took: the new ids, forward passes of the model (the prompt's
    included), and how many ids were proposed and accepted."""

    ids: list[int]
    n_passes: int
    n_proposed: int
    n_accepted: int

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposed ids that were accepted; 0 if none was proposed."""
        return self.n_accepted / self.n_proposed if self.n_proposed else 0.0


@torch.inference_mode()
def generate_speculatively(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    propose: Callable[[list[int], int], list[int]],
    *,
    n_ahead: int = 4,
    stop_tokens: Sequence[int] = (),
) -> Speculation:
    """Write what greedy `generate` writes, in fewer passes of the model (Leviathan et al., 2023).

    `propose` guesses the next ids; one pass of the model checks all of them. Those before the first mistake are
    accepted, and the model's own choice after them comes for free. A poor guess costs time, never a different id.

    Args:
        model, prompt, max_new_tokens, stop_tokens: As in `generate`.
        propose: Called with all ids so far and a number n, it returns up to n ids: `PromptLookup`, `DraftModel`.
        n_ahead: Most ids to propose for one pass.

    Raises:
        ValueError: As `generate`; or n_ahead is below 1.
    """
    if n_ahead < 1:
        raise ValueError(f"n_ahead must be at least 1, got {n_ahead}")
    (ids,) = check_prompts(model, [prompt], max_new_tokens)
    stops = set(check_ids("stop_tokens", stop_tokens, model.config.vocab_size))
    device, n_prompt, end = next(model.parameters()).device, len(ids), len(ids) + max_new_tokens
    caches = model.new_caches(end)
    n_passes = n_proposed = n_accepted = 0
    guesses, unread = [], ids
    with evaluating(model):
        step = decode_step(model)
        while True:
            tokens = torch.tensor([unread + guesses], device=device)
            # Of the prompt only the last logits are wanted; later, those after the newest id and after each guess.
            if n_passes:
                logits = step(tokens, None, None, caches)
            else:
                logits = model(tokens, caches=caches, last_only=True)
            choices = logits[0].argmax(dim=-1).tolist()
            n_right = next((i for i, guess in enumerate(guesses) if guess != choices[i]), len(guesses))
            n_passes, n_proposed, n_accepted = n_passes + 1, n_proposed + len(guesses), n_accepted + n_right
            for cache in caches:
                cache.crop(cache.length - len(guesses) + n_right)  # forget the wrong guesses
            unread = choices[n_right : n_right + 1]
            ids = ids + choices[: n_right + 1]
            stop = next((i for i in range(len(ids) - n_right - 1, len(ids)) if ids[i] in stops), None)
            if stop is not None or len(ids) == end:
                return Speculation(ids[n_prompt:stop], n_passes, n_proposed, n_accepted)
            n_room = min(n_ahead, end - len(ids) - 1)  # the pass itself adds one id
            guesses = list(propose(ids, n_room))[:n_room] if n_room else []


class PromptLookup:
    """Propose what followed the last few ids when they occurred before (Saxena, 2023).

    It costs nearly nothing and helps where the text repeats itself or its prompt.

    Args:
        longest: Most ids to look for; where they are not found, fewer are tried, down to one.
        corpus: Other text to look in, when the ids so far hold no match.

    Raises:
        ValueError: longest is below 1.
    """

    def __init__(self, longest: int = 3, corpus: Sequence[int] = ()) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}")
        self.longest, self._corpus = longest, "".join(map(chr, corpus))

    def __call__(self, ids: list[int], n: int) -> list[int]:
        """Return up to n proposed ids; none if even the last id is new."""
        text = "".join(map(chr, ids))  # an id becomes a character: str.rfind is a fast search for sequences
        for size in range(min(self.longest, len(ids)), 0, -1):
            for place, end in ((text, len(text) - 1), (self._corpus, len(self._corpus) - 1)):
                found = place.rfind(text[-size:], 0, end)
                if found >= 0:
                    return [ord(character) for character in place[found + size : found + size + n]]
        return []


class DraftModel:
    """Propose what a smaller model of the same vocabulary would write greedily. It keeps its own caches.

    Args:
        model: A decoder, as for `generate`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._caches, self._read = model.new_caches(), []  # the ids that the caches hold

    @torch.inference_mode()
    def __call__(self, ids: list[int], n: int) -> list[int]:
        """Return n proposed ids, fewer at the end of the small model's context."""
        n = min(n, self.model.config.context_length + 1 - len(ids))
        n_same = min(len(self._read), len(ids) - 1)
        while self._read[:n_same] != ids[:n_same]:
            n_same -= 1
        for cache in self._caches:
            cache.crop(n_same)
        self._read, unread, proposed = ids[:n_same], ids[n_same:], []
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            step = decode_step(self.model)
            while len(proposed) < n:
                tokens = torch.tensor([unread], device=device)
                if self._read:
                    logits = step(tokens, None, None, self._caches)
                else:
                    logits = self.model(tokens, caches=self._caches, last_only=True)
                self._read, unread = self._read + unread, [int(logits[0, -1].argmax())]
                proposed += unread
        return proposed

# %%
lookup = PromptLookup(longest=3)
print("after 1 2 3 came before:", lookup([1, 2, 3, 4, 5, 9, 1, 2, 3], 3), "; nothing known of 7:", lookup([1, 2, 7], 3))

# %% [markdown]
# On the trained model: 20 stories, each begun by its first 30 tokens and continued greedily. Prompt lookup has little to look at in such a short text, so one more variant may also look in 300 other stories.

# %%
other_stories = [token for tale in TaleGenerator(11).stories(300) for token in encoding.encode_ordinary(tale.text)]
drafters = {
    "prompt lookup": PromptLookup(3),
    "lookup in 300 other stories too": PromptLookup(6, other_stories),
    "tales-tiny": DraftModel(small_writer),
    "the model itself": DraftModel(writer),
}
begun = [[END, *encoding.encode_ordinary(tale.text)[:30]] for tale in TaleGenerator(12).stories(20)]
plain = generate(writer, begun, 120, stop_tokens=[END])
rows = []
for name, drafter in drafters.items():
    results = [generate_speculatively(writer, ids, 120, drafter, stop_tokens=[END]) for ids in begun]
    assert [result.ids for result in results] == plain, name
    total = {f: sum(getattr(result, f) for result in results) for f in ("n_passes", "n_proposed", "n_accepted")}
    rows.append((name, total["n_accepted"] / total["n_proposed"], sum(map(len, plain)) + 20, total["n_passes"]))
columns = ["guesses by", "accepted", "passes without", "passes with"]
table = pd.DataFrame(rows, columns=columns).round({"accepted": 2})
table["tokens a pass"] = (table["passes without"] / table["passes with"]).round(1)
assert (table["passes with"] < table["passes without"]).all() and table["tokens a pass"].iloc[-1] > 3.5
table

# %% [markdown]
# Every text is the same, with a fraction of the passes. The last row is a check, not a use: a model that guesses for itself is always right, and saves nothing, as each guess costs what it spares. How much *time* is saved depends on what a
# guess costs and on what a pass over several tokens costs; that is measured below. More guesses a pass help until most of them are wrong:

# %%
counts = range(1, 11)
figure, axes = plt.subplots()
for (name, drafter), color in zip(list(drafters.items())[:3], (GREY, GREEN, BLUE), strict=True):
    runs = [[generate_speculatively(writer, ids, 100, drafter, n_ahead=n) for ids in begun[:6]] for n in counts]
    per_pass = [sum(len(r.ids) for r in run) / sum(r.n_passes for r in run) for run in runs]
    axes.plot(counts, per_pass, color=color, marker="o")
    label_line(axes, name, 10, per_pass[-1], color)
axes.set(xlabel="guesses a pass", ylabel="tokens a pass", xlim=(0.5, 15.5), xticks=range(1, 11))
axes.set_ylim(bottom=0)
axes.set_title("The better the guesses, the more of them pay")
plt.show()

# %% [markdown]
# ## Measured
#
# Times differ from machine to machine; the cells that take them are not compared. All with one thread.
#
# **With and without a cache.** `tales-1m` writes 15 to 240 tokens.

# %% tags=["nbval-ignore-output"]
torch.set_num_threads(1)


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of a few runs: what else the machine does only makes a run longer."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


speeds = {"no cache": [], "cache": [], "cache and decode_step": []}
new_tokens = [15, 30, 60, 120, 240]
for n in new_tokens:
    speeds["no cache"].append(n / seconds(lambda n=n: generate_naively(writer, prompt, n), 1))
    speeds["cache"].append(n / seconds(lambda n=n: generate_cached(writer, prompt, n, writer.new_caches())))
    speeds["cache and decode_step"].append(n / seconds(lambda n=n: generate(writer, [prompt], n)))
plain_time = seconds(lambda: [generate(writer, [ids], 100) for ids in begun[:5]])
for name, drafter in list(drafters.items())[:3]:
    own = seconds(lambda d=drafter: [generate_speculatively(writer, ids, 100, d) for ids in begun[:5]])
    print(f"speculative decoding, guesses by {name}: {plain_time / own:.2f} times as fast")
pd.DataFrame(speeds, index=pd.Index(new_tokens, name="new tokens")).round(0)

# %%
figure, axes = plt.subplots()
for (name, values), color in zip(speeds.items(), (RED, ORANGE, BLUE), strict=True):
    axes.plot(new_tokens, values, color=color, marker="o")
    label_line(axes, name, new_tokens[-1], values[-1], color)
axes.set(xlabel="tokens written", ylabel="tokens per second", xlim=(0, 360), xticks=new_tokens[1:])
axes.set_ylim(bottom=0)
axes.set_title("Without a cache, longer texts are slower per token")
plt.show()

# %% [markdown]
# The red line falls with the length of the text; the others fall only a little. For a model of this size, leaving out the calls between the operations gains much.
#
# **The roofline.** Now a middle-sized model of random weights, 8 blocks of width 512 in GPT-2's layout: about 118 MB, more than a processor's cache holds. It stands in for GPT-2's
# 124M, which `python tests/benchmarks/generation_speed.py` measures. One decode pass reads all weights, and for each row its cache. The time for that many bytes is the least possible; how many bytes a
# second the memory gives is measured right here, by summing a large tensor and by multiplying a large matrix with a vector (reading only, as decoding does); the faster one counts.

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
middle = GPTModel(GPTConfig(8192, context_length=256, emb_dim=512, n_heads=8, n_layers=8)).eval()
middle_theirs, middle_bf16 = as_transformers(middle), GPTModel(middle.config).bfloat16().eval()
middle_bf16.load_state_dict(middle.state_dict())
big = torch.randn(8192, 8192)  # 256 MiB
vector = torch.randn(8192)
bandwidth = big.nbytes / min(seconds(function) for function in (big.sum, lambda: big @ vector))


def greedily(theirs: GPT2LMHeadModel, ids: Tensor, n: int) -> Tensor:
    return theirs.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]


def decode_seconds(run: Callable[[int], object]) -> float:
    """Time of one decode pass: the difference of a longer and a shorter text, without the prefill."""
    return (seconds(lambda: run(17), 2) - seconds(lambda: run(1), 2)) / 16


points = []
for rows in (1, 2, 4, 8, 16):
    ids = torch.randint(8192, (rows, 32))
    theirs_run = lambda n, ids=ids: greedily(middle_theirs, ids, n)
    for name, run in (
        ("ours, float32", lambda n, ids=ids: generate(middle, ids, n)),
        ("transformers, float32", theirs_run),
        ("ours, bfloat16", lambda n, ids=ids: generate(middle_bf16, ids, n)),
    ):
        number = 2 if "bf" in name else 4  # bytes
        n_bytes = number * (middle.n_parameters + rows * 40 * 2 * 512 * 8)
        points.append((name, rows, n_bytes / rows, rows / decode_seconds(run)))
points = pd.DataFrame(points, columns=["who", "rows", "bytes a token", "tokens per second"])
points["share of the bandwidth"] = points["bytes a token"] * points["tokens per second"] / bandwidth
print(f"bandwidth {bandwidth / 1e9:.1f} GB/s")
points.pivot(index="rows", columns="who", values=["tokens per second", "share of the bandwidth"]).round(2)

# %% [markdown]
# The chart: bytes read for each token to the right, tokens per second upwards, both logarithmic. The roof is bandwidth over bytes: nothing that reads its weights from memory gets above it. More rows share one reading of the weights, so a batch moves
# to the left, and up, until arithmetic takes longer than reading.

# %%
figure, axes = plt.subplots(figsize=(7.2, 4.2))
reach = torch.logspace(6.7, 8.3, 50)
axes.plot(reach, bandwidth / reach, color=GREY, linestyle="--")
label_line(axes, "roof: bandwidth / bytes", reach[20], bandwidth / reach[20] * 1.3, GREY)
for name, color, marker in (
    ("ours, float32", BLUE, "o"),
    ("transformers, float32", ORANGE, "s"),
    ("ours, bfloat16", GREEN, "^"),
):
    own = points[points["who"] == name]
    axes.plot(own["bytes a token"], own["tokens per second"], color=color, marker=marker, linewidth=1, label=name)
axes.set(xscale="log", yscale="log", xlabel="bytes read for a token (1 row at the right, 16 at the left)", ylabel="tokens per second")
axes.legend(loc="lower left")
axes.set_title("One row is bound by memory; many rows share what is read")
plt.show()

# %%
figure, axes = plt.subplots()
for name, color in (("ours, float32", BLUE), ("transformers, float32", ORANGE), ("ours, bfloat16", GREEN)):
    own = points[points["who"] == name]
    axes.plot(own["rows"], own["tokens per second"], color=color, marker="o", label=name)
axes.set(xlabel="rows in the batch", ylabel="tokens per second, all rows together", xticks=[1, 2, 4, 8, 16])
axes.set_ylim(bottom=0)
axes.legend()
axes.set_title("Batches multiply the throughput")
plt.show()

# %% [markdown]
# What must hold, whatever the machine: bfloat16 has half the bytes, and the text of float32 comes out the same in ours and theirs.

# %%
ids = torch.randint(8192, (2, 32), generator=torch.Generator().manual_seed(0))
assert generate(middle, ids, 12) == greedily(middle_theirs, ids, 12).tolist()
n_bytes = {m: sum(p.nbytes for p in m.parameters()) for m in (middle, middle_bf16)}
assert n_bytes[middle] == 2 * n_bytes[middle_bf16]
single, half = n_bytes[middle] / 1e6, n_bytes[middle_bf16] / 1e6
print(f"{middle.n_parameters:,} parameters: {single:.0f} MB in float32, {half:.0f} MB in bfloat16")

# %% [markdown]
# ## With a network
#
# GPT-2's tokenizer splits most emoji over two or three tokens, none of which is text alone. Streamed, each character comes when it is complete.

# %% tags=["nbval-ignore-output"]
gpt2 = or_none(gpt2_encoding, "GPT-2's tokenizer", "the tales' tokenizer, above")
if gpt2:
    ids = gpt2.encode_ordinary("雨 and 🦉!")
    print(len(ids), "tokens:", list(decode_stream(gpt2, iter(ids))))

# %% [markdown]
# ## What you built
#
# - [`shared/generation.py`](../shared/generation.py): `generate` for every decoder of the project, in batches, with processors, seeds and stops; `stream`, and text by `stream_text` and `generate_text`.
# - [`shared/decode_step.py`](../shared/decode_step.py): one token a row without the cost of module calls.
# - [`shared/speculation.py`](../shared/speculation.py): the same text in fewer passes.
#
# Chapter 5 adds the processors that make sampling good. A later chapter serves many users at once with a batch that rows can join at any time.
#
# ## What can go wrong
#
# - **Padding on the right.** The newest tokens of the rows then stand in different columns, and the "last position" of a short row is padding.
# - **A mask without positions.** With learned positions a padded row starts at the wrong place; the text stays fluent and is a different one.
# - **`model.eval()` forgotten** in a loop of your own: dropout changes every step. `generate` switches, and switches back.
# - **float32 and equality.** A batch sums in another order than a single row. Compare texts in float64, or expect a different token where two are nearly equal.
# - **A cache kept across prompts.** `length` is not zero, and the model reads on behind the old text: `reset` it, or make new ones.
# - **Weights replaced while a text is being streamed.** `decode_step` holds on to the tensors it was built from.
# - **A draft model with another tokenizer.** Its ids mean other pieces of text: nothing is accepted, and no error says so.
#
# ## Exercises
#
# **1.** Without positions of its own, a left-padded row went wrong above. Show that a model with *rotary* positions does not need them, and say why.

# %% tags=["solution"] jupyter={"source_hidden": true}
# Rotary attention sees only differences of positions: shifting all positions of a row by the width of its padding
# changes nothing. The mask is needed all the same.
torch.manual_seed(0)
turning = GPTModel(GPTConfig(100, 64, emb_dim=32, n_heads=4, n_layers=2, positions="rotary")).double().eval()
padded, mask = torch.tensor([[0, 0, 0, 21, 22, 23]]), torch.tensor([[False] * 3 + [True] * 3])
with torch.no_grad():
    in_batch, alone = turning(padded, key_padding_mask=mask), turning(padded[:, 3:])
compare("rotary, mask alone", in_batch[:, 3:], alone, 1e-12)

# %% [markdown]
# **2.** Write a processor that forbids the end of the story before at least `n` tokens are there, prompt included, and test it.

# %% tags=["solution"] jupyter={"source_hidden": true}
def at_least(n: int, token: int) -> Processor:
    def processor(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([token]), float("-inf")) if ids.shape[1] < n else logits

    return processor


ids = generate(writer, [prompt], 248, stop_tokens=[END], processors=[at_least(250, END)])[0]
assert len(prompt) + len(ids) >= 250
print("forced to go on, the story has at least 250 tokens:", len(prompt) + len(ids) >= 250)

# %% [markdown]
# **3.** A guess is right with probability $a$, independently. How many tokens does a pass with $g$ guesses write on average? Check the formula by simulation.

# %% tags=["solution"] jupyter={"source_hidden": true}
# 1 + a + a^2 + ... + a^g = (1 - a^(g + 1)) / (1 - a): the i-th guess counts if all guesses up to it are right.
a, g = 0.8, 4
right = torch.rand(100_000, g, generator=torch.Generator().manual_seed(0)) < a
simulated = 1 + right.long().cumprod(dim=1).sum(dim=1).double().mean().item()
print(f"formula {(1 - a ** (g + 1)) / (1 - a):.2f}, simulated {simulated:.2f}")
assert abs(simulated - (1 - a ** (g + 1)) / (1 - a)) < 0.02

# %% [markdown]
# **4.** Speculative decoding can also reproduce *sampled* text: the uniform numbers decide, and they are known in advance. Write it for one row, with the draft model using the same numbers.

# %% tags=["solution"] jupyter={"source_hidden": true}
@torch.inference_mode()
def speculative_samples(model, draft, ids, n_new, seed, n_ahead=4) -> tuple[list[int], int]:
    """Return what generate(temperature=1.0, seed=seed) returns, and the passes it took. Without caches, for clarity."""
    uniforms = torch.empty(n_new, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(seed))
    pick = lambda logits, i: choose_tokens(logits, 1.0, uniforms[i : i + len(logits)]).tolist()
    new, n_passes = [], 0
    while len(new) < n_new:
        guesses = []
        for i in range(len(new), min(len(new) + n_ahead, n_new - 1)):
            guesses += pick(draft(torch.tensor([ids + new + guesses]))[:, -1], i)
        logits = model(torch.tensor([ids + new + guesses]))[0, -len(guesses) - 1 :]
        choices, n_passes = pick(logits, len(new)), n_passes + 1
        n_right = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(guesses, choices, strict=False))))
        new += choices[: n_right + 1]
    return new, n_passes


exact, rough = load_tales("tales-1m").double(), load_tales("tales-tiny").double()
sampled, n_passes = speculative_samples(exact, rough, prompt, 60, seed=5)
assert sampled == generate(exact, [prompt], 60, temperature=1.0, seed=5)[0] and n_passes < 60
print("60 sampled tokens, the same ones, in fewer than 60 passes")

# %% [markdown]
# ## References
#
# - Pope, R., et al. (2023). *Efficiently Scaling Transformer Inference*. MLSys.
# - Leviathan, Y., Kalman, M., Matias, Y. (2023). *Fast Inference from Transformers via Speculative Decoding*. ICML.
# - Saxena, A. (2023). *Prompt Lookup Decoding*. github.com/apoorvumang/prompt-lookup-decoding.
# - Williams, S., Waterman, A., Patterson, D. (2009). *Roofline: An Insightful Visual Performance Model for Multicore Architectures*. Communications of the ACM.
# - Kwon, W., et al. (2023). *Efficient Memory Management for Large Language Model Serving with PagedAttention*. SOSP.
# - Radford, A., et al. (2019). *Language Models are Unsupervised Multitask Learners*. OpenAI.
