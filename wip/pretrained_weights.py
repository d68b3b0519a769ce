# %% [markdown]
# # Pretrained weights: read what others have trained, and write what others can read
#
# You will open a file of weights byte by byte, load GPT-2 in any of its four sizes into our `GPTModel` without ever holding the weights twice,
# and write our own trained models so that Hugging Face's `transformers` loads them and writes the same text.
#
# | | |
# |---|---|
# | You will build | `load_pretrained`, `export_to_hugging_face`, `hugging_face_tokenizer`, and a loader that streams tensor by tensor |
# | You need | [the GPT](../ch04_gpt/02_gpt.ipynb), [modern variants](../ch04_gpt/04_modern_variants.ipynb) with their name maps, [byte pair encoding](../ch02_text_data/02_byte_pair_encoding.ipynb) |
# | Running time on 2 CPU cores | about 90 seconds; at most 2 GB of memory |
# | Promotes to | [`shared/weights.py`](../shared/weights.py), [`shared/export.py`](../shared/export.py) |
#
# To train GPT-2 took weeks on many machines. To use it takes a file, and care with three things: what the numbers in the file are called, how they lie
# there, and how much memory it takes to move them. No weights can be fetched without a network, so this notebook makes a GPT-2 of its own: the true
# shape, 124 million numbers, all drawn at random. The last section loads the real one where it can be had.
#
# **Notation.** A **checkpoint** is a set of named tensors on disk, and a configuration that says which model they belong to. 1 MB is $10^6$ bytes.

# %%
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import tiktoken
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

# %%
from shared.corpus import DATA, load_languages, load_stories
from shared.download import fetch_model_file, gpt2_encoding, or_none
from shared.generation import generate_text
from shared.gpt import GPTConfig, GPTModel
from shared.layers import choose
from shared.plotting import BLUE, GREEN, GREY, ORANGE, SKY, label_line, use_style
from shared.proof import compare
from shared.results import record
from shared.tale_tokenizer import tale_encoding
from shared.tales import TaleGenerator
from shared.tokenizer import BYTE_TO_UNICODE, BPETokenizer
from shared.weights import (
    CONFIG_FIELDS,
    FAMILIES,
    config_from_hf,
    huggingface_views,
    load_safetensors,
    read_header,
    read_pieces,
)

use_style()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
folder = Path(tempfile.mkdtemp())  # everything that this notebook writes goes here

# %% [markdown] tags=["promote:export"]
# Write our models and tokenizers as folders: in Hugging Face's format, which transformers loads, or in our own.
#
# A folder appears under its name only when it is complete. `load_pretrained` of shared.weights reads both kinds.
#
# Left out: models cut into several files, tokenizers with gaps in their ids, templates that add special tokens, and
# dropout, which acts at other places there and in training only (GPT-2's is written).
#
# Follows the files that transformers 5 writes (Wolf et al., 2020).

# %% [markdown]
# ## What lies on disk
#
# ### Why not a pickle
#
# For years weights were pickles: `torch.save` wrote one, `torch.load` read it. A pickle is not data. It is a small program for a machine that can call
# any function by name. Here an object says that, to rebuild it, `print` must be called:

# %%
class Harmless:
    def __reduce__(self):
        return print, ("This line was printed by loading a file.",)


data = pickle.dumps({"weights": [1.0, 2.0], "bias": Harmless()})
loaded = pickle.loads(data)
print(loaded)

# %% [markdown]
# It could have been any other function, with the rights of whoever loads the file. So `torch.load` now refuses everything but tensors unless it is told
# otherwise, and the community has moved to a format that cannot do anything.

# %%
path = folder / "harmless.pt"
torch.save({"bias": Harmless()}, path)
try:
    torch.load(path)
except pickle.UnpicklingError as error:
    print(type(error).__name__, "-", str(error).partition(".")[0])

# %% [markdown]
# ### A safetensors file by hand
#
# A safetensors file has three parts: 8 bytes that hold the length of the header, the header as JSON, and the numbers. We write two small tensors and read
# them back without the library.

# %%
path = folder / "two.safetensors"
tensors = {"norm.weight": torch.tensor([1.0, 2.0, 3.0]), "up.weight": torch.arange(6.0).view(2, 3)}
save_file(tensors, path)

raw = path.read_bytes()
length = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8 : 8 + length])
print(f"{len(raw)} bytes = 8 + {length} of header + {len(raw) - 8 - length} of numbers")
for name, entry in header.items():
    print(name, entry)

# %% [markdown]
# For each tensor: its name, its type, its shape, and from which byte to which byte of the third part it reaches. The rest is `numpy.frombuffer`.

# %%
def read_by_hand(raw: bytes) -> dict[str, np.ndarray]:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = np.frombuffer(raw[begin:end], dtype="<f4").reshape(entry["shape"])
    return arrays


by_hand = read_by_hand(raw)
print(by_hand["up.weight"])
assert all(np.array_equal(by_hand[name], tensor) for name, tensor in tensors.items())

# %% [markdown]
# Two things follow. A reader knows every name and shape after a few kilobytes, before it touches a number. And it can fetch one tensor, or a few rows
# of one, without the rest. We will use both.
#
# ### A GPT-2 on disk
#
# `transformers` writes a GPT-2 of the true shape for us, with random weights. Its norms and biases would be ones and zeros, which hide mistakes, so
# all parameters are drawn anew.

# %%
torch.manual_seed(0)
theirs = GPT2LMHeadModel(GPT2Config()).eval()
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.normal_(std=0.2)
gpt2_folder = folder / "random-gpt2"
theirs.save_pretrained(gpt2_folder)

gpt2_file = gpt2_folder / "model.safetensors"
with gpt2_file.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
header.pop("__metadata__")
sizes = {name: math.prod(entry["shape"]) for name, entry in header.items()}
print(f"{len(sizes)} tensors, {sum(sizes.values()):,} numbers, header {length:,} bytes")
assert sum(sizes.values()) == 124_439_808

# %% [markdown]
# Where are its 498 MB? The picture shows the file from its first byte to its last, one box for each tensor, wide as the tensor is long.

# %%
kinds = {"wte": BLUE, "wpe": SKY, "attn": ORANGE, "mlp": GREEN, "ln_": GREY}
offsets = sorted((entry["data_offsets"], name) for name, entry in header.items())
figure, axes = plt.subplots(figsize=(8, 1.9))
for (begin, end), name in offsets:
    color = next(color for kind, color in kinds.items() if kind in name)
    axes.barh(0, (end - begin) / 1e6, left=begin / 1e6, color=color, edgecolor="white", linewidth=0.4)
labels = {"attn": "attention", "mlp": "feed-forward", "wte": "token embedding", "wpe": "positions"}
for kind, label in labels.items():
    axes.bar(0, 0, color=kinds[kind], label=label)
share = sizes["transformer.wte.weight"] / sum(sizes.values())
axes.set(yticks=[], ylim=(-0.4, 0.4), xlabel="position in the file (MB)")
axes.set_title(f"The token embedding alone is {share:.0%} of GPT-2 small")
axes.grid(False)
axes.legend(ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.42))
plt.show()

# %% [markdown]
# The largest box matters for memory: whoever holds it twice, once in the file's pages and once in the model, holds a third of the model twice.
#
# ## The same numbers under other names
#
# Chapter 4 wrote the name maps down. `huggingface_views` shows our parameters under the names and in the shapes that are on disk: views of the same
# memory, some of them rows of a larger matrix, some transposed. Here are the matrices of GPT-2's first block:

# %%
def map_table(config: GPTConfig, family: str) -> pd.DataFrame:
    with torch.device("meta"):  # shapes are enough
        model = GPTModel(config)
    views = huggingface_views(model, family)
    rows = []
    for ours, theirs in FAMILIES[family].items():
        if ours.startswith("blocks") and "norm" not in ours:
            matrix = f"{ours.format(0)}.weight"
            for name in [theirs] if isinstance(theirs, str) else theirs:
                name = f"{name.format(0)}.weight"
                rows.append((name, tuple(views[name].shape), matrix, tuple(model.get_parameter(matrix).shape)))
    return pd.DataFrame(rows, columns=["on disk", "shape there", "our parameter", "our shape"])


map_table(GPTConfig.preset("gpt2-small"), "gpt2")

# %% [markdown]
# GPT-2's matrices lie as (inputs, outputs), because its authors multiplied from the other side; `nn.Linear` wants (outputs, inputs). The square one,
# `attn.c_proj`, is dangerous: forget its transpose, and every shape still fits. A Llama needs no transposes, but three of its matrices are blocks of
# rows of our `qkv`:

# %%
map_table(GPTConfig.preset("tales-1m", n_kv_heads=2), "llama")

# %% [markdown]
# ## Loading without holding anything twice
#
# ### The obvious way, and what it costs
#
# Build the model, read all tensors, copy them over. We run it in a process of its own and watch that process's memory from outside: the **unique set
# size** (USS), the pages that no other process shares and that would be free if it ended. Pages of a mapped file count while they are mapped.

# %%
START = """
import os, sys, time
import torch
from pathlib import Path
from safetensors.torch import load_file
from shared.gpt import GPTConfig, GPTModel
from shared.weights import huggingface_views, load_pretrained
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
"""
STOP = "time.sleep(0.2)\nos._exit(0)\n"  # at once, with everything still in memory


def memory_curve(program: str, argument: Path) -> list[tuple[float, float]]:
    """Run a program in a fresh process: (seconds, growth of its USS in MB), counted from the end of its imports."""
    command = [sys.executable, "-c", START + program + STOP, str(argument)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        process, curve = psutil.Process(child.pid), []
        before, start = process.memory_full_info().uss, time.perf_counter()
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None:
            try:
                grown = process.memory_full_info().uss - before
            except psutil.Error:  # it has just ended
                break
            curve.append((time.perf_counter() - start, grown / 1e6))
            time.sleep(0.01)
    assert child.returncode == 0
    return curve

# %%
OBVIOUS = """
model = GPTModel(GPTConfig.preset("gpt2-small"))
state = load_file(folder / "model.safetensors")
for name, view in huggingface_views(model, "gpt2").items():
    view.copy_(state[name])
"""
weights_mb = 4 * sum(sizes.values()) / 1e6
curves = {"all at once": memory_curve(OBVIOUS, gpt2_folder)}
obvious = max(megabytes for _, megabytes in curves["all at once"]) / weights_mb
print("more than 1.8 times the weights:", obvious > 1.8)
assert obvious > 1.8

# %% [markdown]
# The process grew by more than 1.8 times the weights: there is the model, which was first filled with random numbers that nobody wanted, and beside it the
# whole file. For GPT-2 small that is a nuisance. For a model that just fits into the machine it is the difference between running and not.
#
# ### A model without first weights
#
# To reserve memory costs next to nothing: the system hands out a page when it is first written. What costs is to write random numbers that the file
# will replace. So the model is built with the functions of `torch.nn.init` switched off. All else runs as always; above all, tables that are computed
# and not loaded, such as the angles of rotary positions, are right. (PyTorch's device "meta" also builds models without numbers. But then these
# tables have none either, and `Module.to_empty`, the way from "meta" to memory, leaves garbage in them without a word.)

# %% tags=["promote:weights"]
class _NoFirstWeights(TorchFunctionMode):
    """Inside this context the functions of torch.nn.init leave tensors as they are."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(
    config: GPTConfig, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> GPTModel:
    """Return a model to load weights into: its parameters are not initialised, its computed tables are right."""
    with _NoFirstWeights():
        model = GPTModel(config)
    for parameter in model.parameters():  # the same objects, so a tied output head stays tied
        parameter.data = torch.empty(parameter.shape, device=device, dtype=dtype)
    return model.to(device)  # the tables

# %%
tales = GPTConfig.preset("tales-1m")
model = empty_model(tales, dtype=torch.bfloat16)
print({parameter.dtype for parameter in model.parameters()}, "with a table of", model.blocks[0].attention.rotary.table.dtype)
assert torch.equal(model.blocks[0].attention.rotary.table, GPTModel(tales).blocks[0].attention.rotary.table)
assert model.output_head.weight is model.token_embedding.weight
reserved = memory_curve("""
from shared.weights import empty_model
model = empty_model(GPTConfig.preset("gpt2-small"))
""", folder)
print("less than a tenth of the weights:", max(megabytes for _, megabytes in reserved) < 0.1 * weights_mb)
assert max(megabytes for _, megabytes in reserved) < 0.1 * weights_mb

# %% [markdown]
# ### Rows at a time
#
# Now the reading. The library `safetensors` maps a file into memory: the system fetches a page when it is touched and counts it as ours for as long as
# the file is mapped. `read_pieces`, on which chapter 4 built `load_safetensors`, therefore reads a few megabytes of rows and opens the file anew for
# the next ones. To open it is cheap, as only the header is read. The rows go straight to their place: a view of the parameter, so the
# copy itself turns the matrix.

# %%
pieces = [(start, len(rows)) for start, rows in read_pieces(gpt2_file, "transformer.wte.weight")]
print(pieces[:3], "…", pieces[-1])
largest = 4 * 768 * max(n_rows for _, n_rows in pieces) / 1e6
print(f"{len(pieces)} pieces of at most {largest:.1f} MB for {4 * sizes['transformer.wte.weight'] / 1e6:.1f} MB")
assert sum(n_rows for _, n_rows in pieces) == 50_257

# %% [markdown]
# ### One function for every source
#
# `load_pretrained` puts the parts together. It takes the name of a GPT-2, whose file comes from the Hugging Face Hub at a fixed commit; the name of a
# checkpoint of ours; or any folder in our format or in Hugging Face's. Large models come in several files with an index beside them.

# %% tags=["promote:weights"]
CHECKPOINTS = DATA.parent / "checkpoints"
# Repository and commit: so a name means the same weights for ever.
GPT2_REPOSITORIES = {
    "gpt2-small": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def shipped_checkpoints() -> list[str]:
    """Return the names of the checkpoints that come with the course."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> GPTModel:
    """Return a trained model in evaluation mode; the process's memory grows by little more than the weights.

    Args:
        name_or_path: A name in `GPT2_REPOSITORIES` (from the Hub's cache or the network), a name in
            `shipped_checkpoints()`, or the path of a folder in our format or in Hugging Face's, of a family that
            `config_from_hf` knows. A name comes before a folder of the same name.
        device: Where the parameters are put.
        dtype: Their type; None keeps the one that most of the stored numbers have.

    Raises:
        ValueError: The name is unknown, or a file is damaged or does not fit the configuration.
        FileNotFoundError: The folder lacks a file.
        DownloadError: The Hub's file cannot be had.
    """
    name = os.fspath(name_or_path)
    if name in GPT2_REPOSITORIES:
        repository, commit = GPT2_REPOSITORIES[name]
        family, config = "gpt2", GPTConfig.preset(name)
        files = [fetch_model_file(repository, "model.safetensors", commit)]
    else:
        known = shipped_checkpoints()
        folder = CHECKPOINTS / name if name in known else Path(name)
        if not folder.is_dir():
            allowed = ", ".join([*GPT2_REPOSITORIES, *known])
            raise ValueError(f"name_or_path must be one of {allowed}, or an existing folder, got {name!r}")
        family, config = read_config(folder / "config.json")
        files = weight_files(folder)
    model = empty_model(config, device, dtype or stored_dtype(files))
    load_safetensors(model, files, family)
    return model.eval()


def read_config(path: Path) -> tuple[str | None, GPTConfig]:
    """Return family (None: our format) and configuration from a config.json; ValueError if it is not understood."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "model" in values:
            return None, GPTConfig(**values["model"])
        return values.get("model_type"), config_from_hf(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder; FileNotFoundError if one is missing."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; pickled weights (.bin, .pt) are not read")
    return [folder / name for name in names]


def stored_dtype(paths: Iterable[Path]) -> torch.dtype:
    """Return the type of most numbers in safetensors files; ValueError if it is not float or a file is damaged."""
    counts = Counter()
    for path in paths:
        for shape, kind in read_header(path).values():
            counts[kind] += math.prod(shape)
    return choose("dtype of the stored weights", max(counts, key=counts.get, default="none"), _STORED)

# %% [markdown]
# ## Proof: the memory of the weights, once
#
# The same file in a fresh process, streamed. The dashed line is the size of the weights; the number beside each curve is its highest point over it.

# %%
curves["streamed"] = memory_curve("model = load_pretrained(folder)\n", gpt2_folder)
streamed = max(megabytes for _, megabytes in curves["streamed"]) / weights_mb
print("between 1.0 and 1.2 times the weights:", 1.0 < streamed < 1.2)
assert 1.0 < streamed < 1.2
record("memory to load GPT-2 small", "at most 1.2", "times its weights", "all at once: above 1.8 times")

# %%
figure, axes = plt.subplots()
for (name, curve), color in zip(curves.items(), (ORANGE, BLUE), strict=True):
    seconds, megabytes = zip(*curve, strict=True)
    axes.plot(seconds, megabytes, color=color)
    label_line(axes, f"{name}: {max(megabytes) / weights_mb:.2f}", seconds[-1], megabytes[-1], color)
axes.axhline(weights_mb, color=GREY, linestyle="--", linewidth=1)
right = 1.4 * max(curve[-1][0] for curve in curves.values())  # room for the names
axes.set(xlabel="time since the imports (s)", ylabel="growth of the process (MB)", ylim=(0, 1200), xlim=(0, right))
axes.set_title("Streamed, a model takes the memory of its weights and no more")
plt.show()

# %% [markdown]
# Loading all at once ends with both copies in memory. The streamed curve climbs to the line and stays there. `python
# tests/benchmarks/loading_memory.py` measures larger sizes, with `transformers` beside them.
#
# ## Proof: the logits of transformers' GPT-2
#
# The 124M file, loaded by us and held by its own author:

# %%
ours = load_pretrained(gpt2_folder)
ids = torch.randint(50_257, (2, 64), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    compare("GPT-2 small, logits", ours(ids), theirs(ids).logits, 2e-5)
del ours, theirs

# %% [markdown]
# A model in several files, and another type of number, at small size:

# %%
torch.manual_seed(2)
small = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=48, n_head=3, n_layer=3)).eval()
for parameter in small.parameters():
    nn.init.normal_(parameter, std=0.2)
sharded = folder / "sharded"
small.save_pretrained(sharded, max_shard_size="100KB")
print(sorted(path.name for path in sharded.glob("model*")))
ids = torch.randint(300, (2, 32))
with torch.no_grad():
    compare("in several files", load_pretrained(sharded)(ids), small(ids).logits)
    halved = load_pretrained(sharded, dtype=torch.bfloat16)
    compare("in bfloat16", halved(ids).float(), small(ids).logits, 0.2)

# %% [markdown]
# ## When it does not fit
#
# Each of these is stopped before a number has moved, and the error says what is meant.

# %%
def show_error(label: str, function: Callable, *arguments: object) -> None:
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        print(f"{label}\n   {type(error).__name__}: {str(error).replace(str(folder), '…')}")
    else:
        raise AssertionError(f"{label}: no error")


def changed_copy(name: str, **changes: int) -> Path:
    """Copy the model's folder and say something else in its config.json."""
    copy = folder / name
    shutil.copytree(sharded, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


show_error("Another context length", load_pretrained, changed_copy("longer", n_positions=64))
show_error("One layer more", load_pretrained, changed_copy("deeper", n_layer=4))
show_error("One layer less", load_pretrained, changed_copy("shallower", n_layer=2))
show_error("A model of another kind", load_pretrained, changed_copy("other", model_type="bert"))
show_error("A name that does not exist", load_pretrained, "gpt2-tiny")

# %%
shard = sorted(sharded.glob("*.safetensors"))[0].name
cut = changed_copy("cut")
os.truncate(cut / shard, 1000)
show_error("A file cut short", load_pretrained, cut)
(cut / shard).unlink()
show_error("A file that is gone", load_pretrained, cut)

# %% [markdown]
# ## The way back: a model that others can load
#
# The other direction needs a configuration in Hugging Face's words, the weights under their names, and the tokenizer. Not every `GPTConfig` has a
# counterpart. Five families of `transformers` cover most: GPT-2, Llama, Mistral (a Llama with a window), Qwen3 (a Llama with norms on queries and
# keys) and Mixtral (a Llama with experts). `family_of` finds the one that fits, and otherwise says what stands in the way.

# %% tags=["promote:export"]
def family_of(config: GPTConfig) -> str:
    """Return the family of transformers, a name in `FAMILIES`, that computes what this configuration does.

    Raises ValueError if there is none, naming the nearest and the fields that it cannot have.
    """
    llama = {"norm": {"rmsnorm"}, "positions": {"rotary"}, "pre_norm": {True}, "feed_forward": {"swiglu"}}
    llama |= {"bias": {False}, "qkv_bias": {False}, "qk_norm": {False}}
    gpt2 = {"norm": {"layernorm"}, "positions": {"learned"}, "pre_norm": {True}, "feed_forward": {"gelu"}}
    gpt2 |= {"bias": {True}, "qkv_bias": {True}, "qk_norm": {False}, "window": {None}}
    gpt2 |= {"n_kv_heads": {None, config.n_heads}, "head_dim": {None, config.emb_dim // config.n_heads}}
    allowed = {
        "gpt2": gpt2,
        "llama": {**llama, "bias": {True, False}, "qkv_bias": {config.bias}, "window": {None}},
        "mistral": llama,
        "qwen3": {**llama, "qk_norm": {True}},
        "mixtral": {**llama, "feed_forward": {"moe"}},
    }
    misfits = {
        family: {name: getattr(config, name) for name in fields if getattr(config, name) not in fields[name]}
        for family, fields in allowed.items()
    }
    nearest = min(misfits, key=lambda family: len(misfits[family]))
    if misfits[nearest]:
        found = ", ".join(f"{name}={value!r}" for name, value in misfits[nearest].items())
        raise ValueError(f"config has no counterpart in transformers: the nearest, {nearest}, cannot have {found}")
    return nearest

# %%
CONFIGS = {
    "gpt2-xl": GPTConfig.preset("gpt2-xl"),
    "tales-1m": GPTConfig.preset("tales-1m"),
    "tales-1m with qk_norm": GPTConfig.preset("tales-1m", qk_norm=True),
    "tales-1m with experts": GPTConfig.preset("tales-1m", feed_forward="moe"),
    "GPT-2 with rotary positions": GPTConfig(positions="rotary"),
    "GPT-1, norms after the additions": GPTConfig(pre_norm=False),
    "tales-1m with a window": GPTConfig.preset("tales-1m", window=64),
    "GPT-2 with norms on queries and keys": GPTConfig(qk_norm=True),
}
for name, config in CONFIGS.items():
    try:
        print(f"{name}: {family_of(config)}")
    except ValueError as error:
        print(f"{name}: {error}")

# %% [markdown]
# Their `config.json` says the same things in other words. Where a field of ours may be left out, theirs must be filled in.

# %% tags=["promote:export"]
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def config_to_hf(config: GPTConfig) -> dict[str, object]:
    """Return the content of Hugging Face's config.json; ValueError if there is no counterpart (`family_of`)."""
    family = family_of(config)
    if family != "gpt2":  # what may be None with us is a number there
        kv_heads, width = config.n_kv_heads or config.n_heads, config.feed_forward_dim or 8 * math.ceil(config.emb_dim / 3)
        config = replace(config, n_kv_heads=kv_heads, feed_forward_dim=width, head_dim=config.actual_head_dim)
    values = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    values |= {theirs: getattr(config, ours) for ours, theirs in CONFIG_FIELDS[family].items()}
    values |= {"initializer_range": config.init_std, "tie_word_embeddings": config.tie_weights}
    if family == "gpt2":
        values |= {f"{where}_pdrop": config.dropout for where in ("resid", "embd", "attn")}
        return values | {"n_inner": config.feed_forward_dim, "activation_function": "gelu_new"}
    values |= {"num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu"}
    values |= {"attention_bias": config.bias, "rope_parameters": rope_to_hf(config)}
    if family == "llama":
        return values | {"mlp_bias": config.bias}
    if family == "qwen3":  # it may have windows in some layers only
        kind = "full_attention" if config.window is None else "sliding_attention"
        values |= {"use_sliding_window": config.window is not None, "layer_types": [kind] * config.n_layers}
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
    turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    return values | turns | {"original_max_position_embeddings": config.rope_original_length or config.context_length}

# %%
values = config_to_hf(GPTConfig.preset("tales-1m"))
print(json.dumps({name: value for name, value in values.items() if name != "architectures"}, indent=1))

# %% [markdown]
# ### The tokenizer
#
# A model without its tokenizer is of no use to anybody. tiktoken stores a table from token to rank, Hugging Face a list of merges in visible characters.
# The merges follow from the table: take a token apart into bytes and merge the pair of lowest rank again and again; the last two parts are the pair
# that made it.

# %% tags=["promote:export"]
def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens whose merge makes `token`, of at least two bytes.

    Raises ValueError if tokens of lower rank do not leave it in two parts: then `ranks` is no byte pair encoding.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        lowest = min(joined)
        if lowest >= ranks[token]:
            raise ValueError(f"{token} is no merge of two tokens with lower ranks")
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def hugging_face_tokenizer(encoding: tiktoken.Encoding | BPETokenizer) -> Tokenizer:
    """Return Hugging Face's tokenizer with the ids of `encoding.encode(text, allowed_special="all")`.

    Raises ValueError if the encoding is no byte pair encoding, or its ids have gaps.
    """
    if isinstance(encoding, BPETokenizer):
        encoding = encoding.to_tiktoken()
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    shown = {token: "".join(map(BYTE_TO_UNICODE.get, token)) for token in sorted(ranks, key=ranks.get)}
    vocabulary = {text: ranks[token] for token, text in shown.items()} | special
    if sorted(vocabulary.values()) != list(range(encoding.n_vocab)):
        raise ValueError(f"encoding {encoding.name!r} must have the ids 0 to {encoding.n_vocab - 1}, each once")
    pairs = (last_merge(token, ranks) for token in shown if len(token) > 1)
    merges = [(shown[left], shown[right]) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, visible])
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted(special, key=special.get)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer

# %%
ranks = tale_encoding()._mergeable_ranks
for token in (b"ing", b" the", b" garden"):
    print(token, "=", " + ".join(map(str, last_merge(token, ranks))))
assert [last_merge(token, ranks) for token in ranks if len(token) > 1] == BPETokenizer.load(
    DATA / "tales_tokenizer.tiktoken"
).merges

# %% [markdown]
# ## Proof: equal ids
#
# Hundreds of texts: tales, our own stories, six languages and code, and random strings of awkward characters.

# %%
encoding = tale_encoding()
written = hugging_face_tokenizer(encoding)
generator = np.random.default_rng(0)
awkward = list("ab AB'sll\n\t 12é漢🎉\u0301.,!_<|>")
texts = [story.text for story in TaleGenerator(1).stories(300)] + [story.text for story in load_stories()]
texts += [paragraph.text for paragraph in load_languages()]
texts += ["".join(generator.choice(awkward, size=40)) for _ in range(300)]
texts.append("One story.<|endoftext|>Another.")
same = sum(written.encode(text).ids == encoding.encode(text, allowed_special="all") for text in texts)
back = sum(written.decode(written.encode(text).ids, skip_special_tokens=False) == text for text in texts)
print(f"{len(texts)} texts, {same} with equal ids, {back} decoded to the same text")
assert same == back == len(texts)

# %% [markdown]
# ### The whole folder
#
# All files are written into a hidden folder beside the place they are meant for, which then gets its name in one step. So a folder of that name is
# complete, whatever interrupts the writing. A folder that already holds something is never touched.

# %% tags=["promote:export"]
def export_to_hugging_face(
    model: GPTModel, folder: str | os.PathLike[str], encoding: tiktoken.Encoding | BPETokenizer | None = None
) -> None:
    """Write a folder that transformers' `AutoModelForCausalLM` and, with an encoding, `AutoTokenizer` load.

    Args:
        model: Of a configuration that has a counterpart, see `family_of`.
        folder: It must not exist, or be empty; it appears when it is complete.
        encoding: The model's tokenizer, with the token "<|endoftext|>", which becomes the one that ends a text.

    Raises:
        ValueError: The configuration has no counterpart, or the encoding has more tokens than the model.
        FileExistsError: The folder holds something.
    """
    values = config_to_hf(model.config)
    files, end = {}, None
    if encoding is not None:
        encoding = encoding.to_tiktoken() if isinstance(encoding, BPETokenizer) else encoding
        if encoding.n_vocab > model.config.vocab_size:
            raise ValueError(f"encoding has {encoding.n_vocab} tokens, the model {model.config.vocab_size}")
        end = encoding.eot_token
        files["tokenizer.json"] = json.loads(hugging_face_tokenizer(encoding).to_str())
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.context_length,
            "bos_token": encoding.decode([end]),
            "eos_token": encoding.decode([end]),
            "clean_up_tokenization_spaces": False,
        }
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    dtype = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    files |= {"config.json": values | ids | {"dtype": dtype}, "generation_config.json": ids}
    write_folder(folder, files, huggingface_views(model, values["model_type"]))


def save_checkpoint_folder(model: GPTModel, folder: str | os.PathLike[str], **details: object) -> None:
    """Write a folder in our own format, which any configuration has: weights, and config.json with `details` (JSON).

    Raises FileExistsError if the folder holds something.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_folder(folder, {"config.json": {"model": asdict(model.config), **details}}, tensors)


def write_folder(
    folder: str | os.PathLike[str], files: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    """Write JSON files and model.safetensors; FileExistsError if the folder holds something."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {folder} exists already and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as hidden:
        part = Path(hidden) / "part"
        part.mkdir()
        for name, content in files.items():
            (part / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        # A copy of each, as the format stores no views.
        copies = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(copies, part / "model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            folder.rmdir()  # Windows gives no folder the name of another, empty or not
        part.rename(folder)

# %% [markdown]
# ## Proof: all families, there and back
#
# Random small models of each family, every parameter drawn anew. Each is exported, loaded by `AutoModelForCausalLM`, compared, and loaded again by us.

# %%
LLAMA = {"norm": "rmsnorm", "positions": "rotary", "feed_forward": "swiglu", "bias": False, "qkv_bias": False}
SIZES = {"vocab_size": 2048, "context_length": 64, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.0}
VARIANTS = {
    "GPT-2": {},
    "Llama, 2 key heads": {**LLAMA, "n_kv_heads": 2, "tie_weights": False},
    "Llama, rotary positions stretched": {**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 16},
    "Qwen3": {**LLAMA, "qk_norm": True, "n_kv_heads": 1, "head_dim": 10},
    "Llama with biases": {**LLAMA, "bias": True, "qkv_bias": True},
    "Mistral, a window of 9": {**LLAMA, "window": 9},
    "Mixtral, 4 experts": {**LLAMA, "feed_forward": "moe", "n_experts": 4},
}
ids = torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(3))
for number, (name, options) in enumerate(VARIANTS.items()):
    torch.manual_seed(number)
    model = GPTModel(GPTConfig(**SIZES, **options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    export_to_hugging_face(model, folder / f"family-{number}", encoding)
    theirs = AutoModelForCausalLM.from_pretrained(folder / f"family-{number}")
    back = load_pretrained(folder / f"family-{number}")
    with torch.no_grad():
        compare(f"{type(theirs).__name__}, {name}", model(ids), theirs(ids).logits)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), back.parameters(), strict=True))

# %% [markdown]
# ## Proof: a trained model tells the same stories
#
# Random weights could agree where it does not matter. So now a model that has learnt something: a checkpoint that ships with the course,
# trained on the tales. It is exported and used through nothing but `transformers`.

# %%
storyteller = load_pretrained("tales-1m")
exported = folder / "tales-1m"
export_to_hugging_face(storyteller, exported, tale_encoding())
print(sorted(path.name for path in exported.iterdir()))

theirs = AutoModelForCausalLM.from_pretrained(exported)
tokenizer = AutoTokenizer.from_pretrained(exported)
print(type(theirs).__name__, f"with {theirs.num_parameters():,} parameters")
assert theirs.num_parameters() == storyteller.n_parameters

# %%
encoding = tale_encoding()
stories = [story.text for story in TaleGenerator(7).stories(8)]
for text in stories:
    assert tokenizer(text)["input_ids"] == encoding.encode(text)
largest = 0.0
with torch.no_grad():
    for text in stories:
        ids = torch.tensor([[encoding.eot_token, *encoding.encode(text)]])
        largest = max(largest, (storyteller(ids) - theirs(ids).logits).abs().max().item())
compare("logits on 8 stories, largest difference", largest, 0.0, 1e-4)

# %% [markdown]
# And the text. Our `generate_text` writes on the left, their `generate` and their tokenizer on the right, both greedy, from the first six words of eight
# stories, to the end of the story.

# %%
def their_text(prompt: str) -> str:
    inputs = tokenizer("<|endoftext|>" + prompt, return_tensors="pt")
    output = theirs.generate(**inputs, do_sample=False, max_new_tokens=200)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


end = encoding.eot_token
equal = 0
for text in stories:
    prompt = " ".join(text.split()[:6])
    written = generate_text(storyteller, encoding, [end, *encoding.encode(prompt)], 200, stop_tokens=[end])
    equal += written == their_text(prompt)
print(f"{equal} of {len(stories)} stories are equal to the last character")
assert equal == len(stories)
record("stories equal through transformers", equal, f"of {len(stories)}")
print(f"\n{prompt}{written}")

# %% [markdown]
# The shortest way for somebody who has never heard of this course is a `pipeline`: three lines, and the model writes.

# %%
writer = pipeline("text-generation", model=str(exported), tokenizer=str(exported))
answer = writer("<|endoftext|>" + prompt, do_sample=False, max_new_tokens=200, return_full_text=False)
assert answer[0]["generated_text"] == written
print("the pipeline writes the same story")

# %% [markdown]
# ## With a network
#
# The real GPT-2, 548 MB, loaded by its name. It is a model of 2019 and was never taught to answer; but it writes English.

# %% tags=["nbval-ignore-output"]
gpt2 = or_none(lambda: load_pretrained("gpt2-small"), "GPT-2's weights", "the random ones above")
gpt2_tokens = or_none(gpt2_encoding, "GPT-2's tokenizer", "the tales' above") if gpt2 else None
if gpt2 and gpt2_tokens:
    for start in ("Every effort moves you", "The capital of France is", "In the beginning"):
        print(start + generate_text(gpt2, gpt2_tokens, start, 24))

# %% [markdown]
# ## What you built
#
# [`shared/weights.py`](../shared/weights.py) now reads GPT-2 in all sizes, our own checkpoints and folders of five families, with the memory of the
# weights and no more. [`shared/export.py`](../shared/export.py) writes models and tokenizers that `transformers` loads. Many later notebooks begin with
# `load_pretrained`.
#
# ## What can go wrong
#
# - **A pickle from a stranger.** `torch.load(..., weights_only=False)` runs what the file says. Ask for safetensors, or convert in a sandbox.
# - **A square matrix not transposed.** No shape complains, the model writes nonsense. Compare logits, not shapes.
# - **`strict=False`.** It makes the error go away and leaves random weights in the model. A missing name is a wrong map.
# - **`to_empty` on a model with computed tables.** The rotary angles are garbage, and no shape or name tells.
# - **The tie lost.** A file with `lm_head.weight` and a configuration that says "tied" disagree; the configuration wins here and in `transformers`.
# - **The tokenizer forgotten.** Equal logits for equal ids are of no use if the ids differ: test the text, end to end.
# - **Memory read from the wrong number.** The resident set counts pages of the file that others may share, and peaks hide between two looks at the clock.
#
# ## Exercises
#
# **1.** How many bytes of GPT-2 small's file must be read to know its number of layers? Write a function that returns it from the header alone.

# %% tags=["solution"] jupyter={"source_hidden": true}
def count_layers(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        names = json.loads(file.read(length))
    return len({name.split(".")[2] for name in names if name.startswith("transformer.h.")}), 8 + length


n_layers, n_read = count_layers(gpt2_file)
print(f"{n_layers} layers, known after {n_read / gpt2_file.stat().st_size:.4%} of the file")
assert n_layers == 12

# %% [markdown]
# **2.** Leave the transpose of one square matrix out, as if the map had forgotten it. Does the check of shapes notice? What happens to the logits?

# %% tags=["solution"] jupyter={"source_hidden": true}
ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(4))
right = load_pretrained(sharded)
wrong = load_pretrained(sharded)
with torch.no_grad():
    square = wrong.blocks[0].attention.output.weight
    assert square.shape[0] == square.shape[1]  # so nothing notices
    square.copy_(square.T.clone())
    difference = (right(ids) - wrong(ids)).abs().max().item()
print("no error; logits differ by more than 0.1:", difference > 0.1)
assert difference > 0.1

# %% [markdown]
# **3.** A damaged file: flip one bit of a weight. Neither the header nor the shapes can tell. What can?

# %% tags=["solution"] jupyter={"source_hidden": true}
# Only a checksum of all bytes, kept somewhere else: the Hub and shared/download.py compare SHA-256.
data = bytearray((folder / "two.safetensors").read_bytes())
before = hashlib.sha256(data).hexdigest()
data[-1] ^= 0b0100_0000  # the last byte of the last float32 holds its sign and the top of its exponent
print(read_by_hand(bytes(data))["up.weight"])
print("the checksums are equal:", hashlib.sha256(data).hexdigest() == before)
assert hashlib.sha256(data).hexdigest() != before

# %% [markdown]
# **4.** Without the biases of queries, keys and values (the 124,412,160 of chapter 4) a GPT-2 has no counterpart. Make one that computes the same and has one.

# %% tags=["solution"] jupyter={"source_hidden": true}
# A bias of zero is no bias.
torch.manual_seed(5)
unbiased = GPTModel(GPTConfig(**SIZES, qkv_bias=False)).eval()
padded = GPTModel(replace(unbiased.config, qkv_bias=True)).eval()
with torch.no_grad():
    for name, parameter in padded.named_parameters():
        parameter.zero_() if name.endswith("qkv.bias") else parameter.copy_(unbiased.get_parameter(name))
    ids = torch.randint(2048, (1, 64))
    export_to_hugging_face(padded, folder / "padded")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "padded")
    compare("without biases, through transformers", unbiased(ids), theirs(ids).logits)

# %% [markdown]
# ## References
#
# - Radford, A., Wu, J., Child, R., Luan, D., Amodei, D., Sutskever, I. (2019). *Language Models are Unsupervised Multitask Learners*. OpenAI.
# - Wolf, T., et al. (2020). *Transformers: State-of-the-Art Natural Language Processing*. EMNLP, system demonstrations.
# - Touvron, H., et al. (2023). *LLaMA: Open and Efficient Foundation Language Models*. arXiv:2302.13971.
# - Jiang, A. Q., et al. (2024). *Mixtral of Experts*. arXiv:2401.04088.
# - Yang, A., et al. (2025). *Qwen3 Technical Report*. arXiv:2505.09388.
# - Sennrich, R., Haddow, B., Birch, A. (2016). *Neural Machine Translation of Rare Words with Subword Units*. ACL.
