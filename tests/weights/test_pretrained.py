"""`load_pretrained` and `weights.huggingface`: the Hub, folders of both kinds, there and back through transformers."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tiktoken
import torch
import transformers
from huggingface_hub import constants as hub_constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from shared.data.corpus import load_languages, load_stories
from shared.data.download import REPOSITORY_ROOT, DownloadError, gpt2_encoding
from shared.model.gpt import PRESETS, GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.tales.generator import TaleGenerator
from shared.text.tokenizer import BPETokenizer
from shared.weights import huggingface as export
from shared.weights import pretrained as weights
from shared.weights.huggingface import (
    config_to_hf,
    export_to_hugging_face,
    family_of,
    hugging_face_tokenizer,
    last_merge,
    save_checkpoint_folder,
)
from shared.weights.pretrained import (
    GPT2_REPOSITORIES,
    config_from_hf,
    empty_model,
    huggingface_views,
    load_pretrained,
    read_header,
    read_pieces,
    shipped_checkpoints,
    stored_dtype,
)
from tests.configurations import LLAMA
from tests.data.test_download import REAL_DATA, Handler, LoopbackServer, closed_port
from tests.model.test_gpt import VARIANTS as MODELS

SIZES = {"vocab_size": 2048, "context_length": 64, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.0}
LONGER = {"rope_factor": 4.0, "rope_original_length": 16}
# Name -> (class of transformers, options).
EXPORTED = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2, untied, other width": ("GPT2LMHeadModel", {"tie_weights": False, "feed_forward_dim": 40}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, biased": (
        "LlamaForCausalLM",
        {**LLAMA, "bias": True, "qkv_bias": True, "tie_weights": False, "n_kv_heads": 2, "head_dim": 8},
    ),
    "linear": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "linear", **LONGER}),
    "ntk": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "ntk", **LONGER}),
    "yarn": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "yarn", **LONGER}),
    "llama3": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "llama3", **LONGER, "rope_base": 500.0}),
    "mistral": ("MistralForCausalLM", {**LLAMA, "window": 5, "norm_eps": 1e-3}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "qk_norm": True, "n_kv_heads": 1, "head_dim": 10}),
    "qwen3, window": ("Qwen3ForCausalLM", {**LLAMA, "qk_norm": True, "window": 5, "tie_weights": False}),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "feed_forward": "moe", "n_experts": 4}),
    "mixtral, window": (
        "MixtralForCausalLM",
        {**LLAMA, "feed_forward": "moe", "n_experts": 3, "n_active_experts": 1, "window": 5, "n_kv_heads": 2},
    ),
}

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def build(seed: int = 0, **options) -> GPTModel:
    """A small model in evaluation mode, every parameter away from zero and one."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def random_ids(vocab_size: int = 2048, tokens: int = 48) -> torch.Tensor:
    return torch.randint(vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids)
    return getattr(found, "logits", found)


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def write_greedily(model: GPTModel, encoding: tiktoken.Encoding, prompt: str, n_tokens: int) -> str:
    ids = torch.tensor([[encoding.eot_token, *encoding.encode(prompt)]])
    start = ids.shape[1]
    for _ in range(n_tokens):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
        if ids[0, -1] == encoding.eot_token:
            break
    return encoding.decode([token for token in ids[0, start:].tolist() if token != encoding.eot_token])


def same_parameters(one: GPTModel, other: GPTModel) -> bool:
    names = [name for name, _ in one.named_parameters()]
    assert names == [name for name, _ in other.named_parameters()]
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- GPT-2 from the Hub, served from loopback


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackServer]:
    """A server that answers like the Hub, and an empty cache."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with LoopbackServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.headers["ETag"] = f'"{hashlib.sha1(b"weights").hexdigest()}"'
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
        server.shutdown()


def serve(server: LoopbackServer, name: str, file: Path) -> None:
    """Serve a file where `load_pretrained(name)` asks for it, piece by piece."""

    def answer(handler: Handler) -> None:
        handler.send(b"", announced=file.stat().st_size)
        if handler.command == "GET":
            with file.open("rb") as source:
                shutil.copyfileobj(source, handler.wfile, 1 << 20)

    repository, commit = GPT2_REPOSITORIES[name]
    server.headers["X-Repo-Commit"] = commit
    server.routes[f"/{repository}/resolve/{commit}/model.safetensors"] = answer


def gpt2_as_on_the_hub(config: GPTConfig) -> dict[str, torch.Tensor]:
    """Random weights as the four repositories have them: no outer prefix, and the causal masks as buffers."""
    torch.manual_seed(0)
    views = huggingface_views(empty_model(config), "gpt2")
    tensors = {
        name.removeprefix("transformer."): 0.02 * torch.randn(view.shape) for name, view in views.items()
    }
    for i in range(config.n_layers):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, config.context_length, config.context_length)
    return tensors


def transformers_gpt2(config: GPTConfig, tensors: dict[str, torch.Tensor]) -> GPT2LMHeadModel:
    with torch.device("meta"):
        model = GPT2LMHeadModel(config_of_transformers(config))
    state = {
        f"transformer.{name}": tensor for name, tensor in tensors.items() if not name.endswith(".attn.bias")
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def config_of_transformers(config: GPTConfig) -> GPT2Config:
    sizes = {"n_embd": config.emb_dim, "n_head": config.n_heads, "n_layer": config.n_layers}
    return GPT2Config(vocab_size=config.vocab_size, n_positions=config.context_length, **sizes)


@pytest.mark.parametrize("name", GPT2_REPOSITORIES)
def test_every_size_of_gpt2_has_the_names_and_shapes_of_its_file(name):
    # One block: all are alike, and test_gpt counts the parameters of the whole.
    config = GPTConfig.preset(name, n_layers=1)
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(config_of_transformers(config)).state_dict()
    theirs.pop("lm_head.weight")  # tied, so not in the file
    ours = huggingface_views(empty_model(config), "gpt2")
    assert {key: value.shape for key, value in ours.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize("name", GPT2_REPOSITORIES)
def test_every_name_of_gpt2_is_fetched_once_and_loaded(name, hub, monkeypatch, tmp_path):
    # The shape is small here; what is tested is that a name leads to its repository and its preset.
    small = {"vocab_size": 90, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2}
    monkeypatch.setitem(PRESETS, name, {**small, "n_layers": 1 + list(GPT2_REPOSITORIES).index(name)})
    config = GPTConfig.preset(name)
    tensors = gpt2_as_on_the_hub(config)
    save_file(tensors, tmp_path / "served.safetensors")
    serve(hub, name, tmp_path / "served.safetensors")
    model = load_pretrained(name)
    assert model.config == config and not model.training
    ids = random_ids(90, 16)
    close(logits(model, ids), logits(transformers_gpt2(config, tensors), ids))
    asked = len(hub.requests)
    assert same_parameters(model, load_pretrained(name)) and len(hub.requests) == asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("h.1.mlp.c_fc.bias"), r"transformer\.h\.1\.mlp\.c_fc\.bias is missing"),
        (lambda t: t.update({"h.2.ln_1.bias": torch.ones(24)}), r"h\.2\.ln_1\.bias has no place"),
        (
            lambda t: t.update({"wpe.weight": torch.ones(17, 24)}),
            r"transformer\.wpe\.weight must have shape \(16, 24\), got \(17, 24\)",
        ),
        (
            lambda t: t.update({"h.0.mlp.c_fc.weight": torch.ones(96, 24)}),
            r"h\.0\.mlp\.c_fc\.weight must have shape \(24, 96\), got \(96, 24\)",
        ),
    ],
)
def test_a_file_of_the_hub_that_does_not_fit_is_named(change, message, hub, monkeypatch, tmp_path):
    small = {"vocab_size": 90, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2}
    monkeypatch.setitem(PRESETS, "gpt2-small", small)
    tensors = gpt2_as_on_the_hub(GPTConfig.preset("gpt2-small"))
    change(tensors)
    save_file(tensors, tmp_path / "served.safetensors")
    serve(hub, "gpt2-small", tmp_path / "served.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pretrained("gpt2-small")


def test_without_a_network_gpt2_is_one_clear_error(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    with pytest.raises(DownloadError, match="no network"):
        load_pretrained("gpt2-medium")
    assert hub.requests == []


MEASURED = """
import os, sys
import torch
from huggingface_hub import constants
constants.HF_HUB_CACHE = sys.argv[1]
from shared.weights.pretrained import load_pretrained
print("ready", flush=True)
sys.stdin.readline()
model = load_pretrained("gpt2-small")
print("loaded", flush=True)
sys.stdin.readline()
ids = torch.arange(0, 50_000, 1_700)[None]
with torch.no_grad():
    torch.save(model(ids), sys.argv[2])
"""


def test_the_124m_shape_is_loaded_in_the_memory_of_its_weights(hub, tmp_path):
    config = GPTConfig.preset("gpt2-small")
    tensors = gpt2_as_on_the_hub(config)
    save_file(tensors, tmp_path / "served.safetensors")
    serve(hub, "gpt2-small", tmp_path / "served.safetensors")
    weights.fetch_model_file(
        GPT2_REPOSITORIES["gpt2-small"][0], "model.safetensors", GPT2_REPOSITORIES["gpt2-small"][1]
    )
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "hub"), str(tmp_path / "logits.pt")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY_ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        process, peak, loaded = psutil.Process(child.pid), 0, threading.Event()
        before = process.memory_full_info().uss
        child.stdin.write("go\n")
        child.stdin.flush()
        threading.Thread(target=lambda: (child.stdout.readline(), loaded.set()), daemon=True).start()
        while not loaded.is_set():
            peak = max(peak, process.memory_full_info().uss - before)
            time.sleep(0.003)
        end = process.memory_full_info().uss - before
        child.stdin.write("go on\n")
        child.stdin.flush()
    assert child.returncode == 0
    size = 4 * 124_439_808
    assert size < end < 1.2 * size and peak < 1.2 * size
    ids = torch.arange(0, 50_000, 1_700)[None]
    close(torch.load(tmp_path / "logits.pt"), logits(transformers_gpt2(config, tensors), ids))


# --- folders, ours and Hugging Face's


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_variant_comes_back_from_our_own_format(options, tmp_path):
    model = build(**{**options, "vocab_size": 50, "context_length": 16})
    save_checkpoint_folder(model, tmp_path / "saved", recipe={"seed": 3})
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["recipe"] == {"seed": 3}
    back = load_pretrained(tmp_path / "saved")
    assert back.config == model.config and same_parameters(model, back)
    assert len(load_file(tmp_path / "saved" / "model.safetensors")) == len(list(model.parameters()))
    ids = random_ids(50, 16)
    assert torch.equal(logits(back, ids), logits(model, ids))  # tables that are computed are right too


def test_a_name_of_a_shipped_checkpoint_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "CHECKPOINTS", tmp_path)
    model = build()
    save_checkpoint_folder(model, tmp_path / "tales-test")
    assert shipped_checkpoints() == ["tales-test"]
    assert same_parameters(load_pretrained("tales-test"), model)
    with pytest.raises(ValueError, match=r"one of gpt2-small, .*gpt2-xl, tales-test, or .*got 'tales-none'"):
        load_pretrained("tales-none")


def test_a_model_in_several_files_is_read(tmp_path):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=16, n_embd=24, n_head=4, n_layer=2)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    ids = random_ids(90, 16)
    close(logits(load_pretrained(str(tmp_path)), ids), logits(theirs, ids))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load_pretrained(tmp_path)


def test_types_are_kept_or_converted(tmp_path):
    model = build(**LLAMA).bfloat16()
    export_to_hugging_face(model, tmp_path / "half")
    assert stored_dtype([tmp_path / "half" / "model.safetensors"]) == torch.bfloat16
    kept = load_pretrained(tmp_path / "half")
    assert same_parameters(kept, model) and kept.output_head.weight is kept.token_embedding.weight
    wide = load_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    rounded = build(**LLAMA)  # the same weights, and a table that was never in bfloat16
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    close(logits(wide, random_ids()), logits(rounded, random_ids()))
    # What is computed is not rounded to the type of the weights.
    assert kept.blocks[0].attention.rotary.table.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_loaded_model_can_be_trained(tmp_path):
    save_checkpoint_folder(build(**LLAMA), tmp_path / "saved")
    model = load_pretrained(tmp_path / "saved")
    model(random_ids()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def damage(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            "has no model.safetensors; pickled",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 5000), ValueError, "model.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ValueError, "model.safetensors is damaged"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
        (lambda f: damage(f, b"{"), ValueError, "config.json: "),
        (lambda f: damage(f, b"[]"), ValueError, "config.json: "),
        (lambda f: damage(f, b"{}"), ValueError, "config.json: model_type must be one of gpt2, llama"),
        (
            lambda f: damage(f, b'{"model": {"n_heads": 0}}'),
            ValueError,
            "config.json: n_heads must be at least 1",
        ),
        (lambda f: damage(f, b'{"model": {"n_head": 2}}'), ValueError, "config.json: .*n_head"),
    ],
)
def test_a_damaged_folder_is_a_clear_error(change, error, message, tmp_path):
    save_checkpoint_folder(build(), tmp_path / "saved")
    change(tmp_path / "saved")
    with pytest.raises(error, match=message):
        load_pretrained(tmp_path / "saved")


def test_numbers_that_are_not_float_are_refused(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"dtype of the stored weights must be one of F64, F32.*'I8'"):
        stored_dtype([tmp_path / "whole.safetensors"])


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    limit=st.integers(1, 40),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_pieces_are_the_tensor(shape, limit, kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "one.safetensors"
    tensor = torch.randn(shape).to(kind)
    save_file({"x": tensor, "y": torch.ones(2)}, path)
    assert read_header(path)["x"][0] == tuple(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "PIECE_NUMBERS", limit)
        pieces = list(read_pieces(path, "x"))
    assert torch.equal(torch.cat([rows for _, rows in pieces]), tensor)
    starts = [sum(len(rows) for _, rows in pieces[:i]) for i in range(len(pieces))]
    assert [start for start, _ in pieces] == starts
    assert all(rows.numel() <= limit or len(rows) == 1 for _, rows in pieces)


@pytest.mark.parametrize("options", [{}, LLAMA, {"positions": "sinusoidal"}, {"tie_weights": False}])
def test_an_empty_model_is_not_initialised_and_has_right_tables(options):
    config = GPTConfig(**{**SIZES, **options})
    before = torch.get_rng_state()
    model = empty_model(config, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    reference = GPTModel(config)
    assert [(name, p.shape) for name, p in model.named_parameters()] == [
        (name, p.shape) for name, p in reference.named_parameters()
    ]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert (model.output_head.weight is model.token_embedding.weight) == config.tie_weights
    tables = dict(model.named_buffers())
    assert tables.keys() == dict(reference.named_buffers()).keys()
    assert all(torch.equal(table, tables[name]) for name, table in reference.named_buffers())
    assert not torch.equal(nn.init.ones_(torch.zeros(2)), torch.zeros(2))  # the switch is back


# --- export


@pytest.mark.parametrize(("name", "options"), EXPORTED.values(), ids=EXPORTED)
def test_an_exported_model_computes_and_writes_the_same_in_transformers(name, options, tmp_path):
    model, encoding, folder = build(**options), tale_encoding(), tmp_path / "exported"
    export_to_hugging_face(model, folder, encoding)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == name
    assert theirs.num_parameters() == model.n_parameters
    close(logits(model, random_ids()), logits(theirs, random_ids()))
    for prompt in ("Mia had a red", "One day, Tom ran to the"):
        inputs = tokenizer("<|endoftext|>" + prompt, return_tensors="pt")
        output = theirs.generate(**inputs, do_sample=False, max_new_tokens=24)[
            0, inputs["input_ids"].shape[1] :
        ]
        text = tokenizer.decode(output, skip_special_tokens=True)
        assert text and text == write_greedily(model, encoding, prompt, 24)
    back = load_pretrained(folder)
    assert same_parameters(model, back)
    close(logits(back, random_ids()), logits(model, random_ids()))


@pytest.mark.parametrize(("name", "options"), EXPORTED.values(), ids=EXPORTED)
def test_a_configuration_means_the_same_after_the_way_there_and_back(name, options):
    config = GPTConfig(**{**SIZES, **options})
    back = config_from_hf(config_to_hf(config))
    assert config_to_hf(back) == config_to_hf(config)
    assert config_from_hf(config_to_hf(back)) == back
    assert family_of(back) == family_of(config)


def test_the_configuration_of_gpt2_is_the_published_one():
    published = GPT2Config(architectures=["GPT2LMHeadModel"]).to_dict()
    assert config_to_hf(GPTConfig()).items() <= published.items()
    assert config_from_hf(config_to_hf(GPTConfig())) == GPTConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_norm": False}, "the nearest, gpt2, cannot have pre_norm=False"),
        ({"qkv_bias": False}, "gpt2, cannot have qkv_bias=False"),
        ({"positions": "sinusoidal"}, "gpt2, cannot have positions='sinusoidal'"),
        ({"positions": "none"}, "positions='none'"),
        ({"window": 4}, "gpt2, cannot have window=4"),
        ({"n_kv_heads": 2}, "gpt2, cannot have n_kv_heads=2"),
        ({"head_dim": 10}, "gpt2, cannot have head_dim=10"),
        ({**LLAMA, "norm": "layernorm"}, "llama, cannot have norm='layernorm'"),
        ({**LLAMA, "qkv_bias": True}, "llama, cannot have qkv_bias=True"),
        ({**LLAMA, "qk_norm": True, "bias": True}, "qwen3, cannot have bias=True"),
        ({**LLAMA, "feed_forward": "moe", "qk_norm": True}, "cannot have (feed_forward='moe'|qk_norm=True)"),
        ({**LLAMA, "feed_forward": "gelu"}, "llama, cannot have feed_forward='gelu'"),
    ],
)
def test_a_configuration_without_counterpart_is_refused_by_its_field(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_to_hugging_face(build(**options), tmp_path / "exported", tale_encoding())
    assert list(tmp_path.iterdir()) == []


def test_all_presets_have_a_counterpart():
    assert {family_of(GPTConfig.preset(name)) for name in PRESETS} == {"gpt2", "llama"}


def test_every_file_is_there_and_without_a_tokenizer_none_of_its(tmp_path):
    export_to_hugging_face(build(), tmp_path / "deep" / "with", tale_tokenizer())
    export_to_hugging_face(build(), tmp_path / "without")
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    names = lambda folder: {path.name for path in folder.iterdir()}
    assert names(tmp_path / "without") == model_files
    assert names(tmp_path / "deep" / "with") == model_files | {"tokenizer.json", "tokenizer_config.json"}
    assert names(tmp_path / "deep") == {"with"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "deep" / "with")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 2047)
    assert tokenizer.model_max_length == 64


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(FileExistsError, match=name):
            export_to_hugging_face(build(), tmp_path / name)
        with pytest.raises(FileExistsError, match=name):
            save_checkpoint_folder(build(), tmp_path / name)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_to_hugging_face(build(), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "taken"]


def test_an_interrupted_export_leaves_nothing(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export_to_hugging_face(build(), tmp_path / "exported", tale_encoding())
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="encoding has 2048 tokens, the model 2000"):
        export_to_hugging_face(build(vocab_size=2000), tmp_path / "exported", tale_encoding())


# --- the tokenizer

WRITTEN = hugging_face_tokenizer(tale_encoding())
SPECIALS = BPETokenizer.train(
    [story.text for story in load_stories()], 600, special_tokens=("<|endoftext|>", "<|user|>", "<|end|>")
)
WRITTEN_SPECIALS = hugging_face_tokenizer(SPECIALS)


def test_hundreds_of_texts_have_equal_ids():
    texts = [story.text for story in TaleGenerator(5).stories(300)] + [story.text for story in load_stories()]
    texts += [paragraph.text for paragraph in load_languages()]
    texts += [
        "",
        " ",
        "\n\n",
        "a<|endoftext|>b",
        "<|endoftext|><|endoftext|>",
        "\u00a0x\u3000y\x85z",
        "e\u0301 🎉🏽",
    ]
    for text in texts:
        ids = tale_encoding().encode(text, allowed_special="all")
        assert WRITTEN.encode(text).ids == ids
        assert WRITTEN.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None, max_examples=150)
@given(st.text())
def test_any_text_has_equal_ids(text):
    assert WRITTEN.encode(text).ids == tale_encoding().encode(text, allowed_special="all")
    ids = SPECIALS.encode(text, allowed_special="all")
    assert WRITTEN_SPECIALS.encode(text).ids == ids


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["<|user|>", "<|end|>", "<|endoftext|>", "<|", " the", "'s", "\n ", "  x"])))
def test_special_tokens_are_found_in_any_company(parts):
    text = "".join(parts)
    assert WRITTEN_SPECIALS.encode(text).ids == SPECIALS.encode(text, allowed_special="all")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2047), max_size=30))
def test_any_ids_have_the_same_text(ids):
    assert WRITTEN.decode(ids, skip_special_tokens=False) == tale_encoding().decode(ids)


def test_both_kinds_of_encoding_give_the_same_file():
    assert hugging_face_tokenizer(tale_tokenizer()).to_str() == WRITTEN.to_str()


@pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="../shared/data, the folder with the real files, is not here"
)
def test_the_tokenizer_of_gpt2_has_equal_ids(monkeypatch):
    monkeypatch.setenv("LLM_DATA_DIR", str(REAL_DATA))
    encoding = gpt2_encoding()
    written = hugging_face_tokenizer(encoding)
    for paragraph in load_languages():
        assert written.encode(paragraph.text).ids == encoding.encode(paragraph.text)
    assert written.get_vocab_size() == 50_257


def test_merges_are_those_of_training():
    merges = BPETokenizer.train("low lower lowest newer newest wider", 290).merges
    ranks = {bytes([byte]): byte for byte in range(256)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    assert [last_merge(a + b, ranks) for a, b in merges] == merges


def test_what_is_no_byte_pair_encoding_is_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(ValueError, match="b'abc' is no merge"):
        hugging_face_tokenizer(
            tiktoken.Encoding("odd", pat_str=r".", mergeable_ranks=ranks, special_tokens={})
        )
    ranks = {bytes([byte]): byte for byte in range(256)}
    gap = tiktoken.Encoding("gap", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
    with pytest.raises(ValueError, match="encoding 'gap' must have the ids 0 to 300, each once"):
        hugging_face_tokenizer(gap)
