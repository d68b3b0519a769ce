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

@@decode_step_doc0@@
@@decode_step0@@
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

@@generation_doc0@@
@@generation0@@
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

@@generation1@@
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

@@generation2@@
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

@@speculation_doc0@@
@@speculation0@@
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
