"""`shared.weights.pretrained`: GPT-2 from the Hub, folders of both kinds, damaged ones, and its memory."""

import hashlib
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
import torch
import transformers
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import shared.weights.pretrained
from shared.data.download import REPOSITORY_ROOT, DownloadError, fetch_model_file
from shared.model.gpt import PRESETS, GPTConfig, GPTModel
from shared.weights.files import empty_model, save_checkpoint_folder, stored_dtype
from shared.weights.huggingface import export_to_hugging_face
from shared.weights.names import huggingface_views
from shared.weights.pretrained import GPT2_REPOSITORIES, load_pretrained, shipped_checkpoints
from tests.configurations import LLAMA
from tests.data.test_download import Handler, LoopbackServer, closed_port
from tests.weights.models import (
    SIZES,
    build,
    close,
    config_of_transformers,
    logits,
    random_ids,
    same_parameters,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


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
    ("alias", "name"),
    [
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("openai-community/gpt2-medium", "gpt2-medium"),
        ("openai-community/gpt2-large", "gpt2-large"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
    ],
)
def test_the_usual_names_of_gpt2_are_known(alias, name, hub, monkeypatch, tmp_path):
    small = {"vocab_size": 90, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 1}
    monkeypatch.setitem(PRESETS, name, small)
    save_file(gpt2_as_on_the_hub(GPTConfig.preset(name)), tmp_path / "served.safetensors")
    serve(hub, name, tmp_path / "served.safetensors")
    assert same_parameters(load_pretrained(alias), load_pretrained(name))
    # A folder of that name is another thing.
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_pretrained("./gpt2")


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
    fetch_model_file(
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


def test_a_name_of_a_shipped_checkpoint_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(shared.weights.pretrained, "CHECKPOINTS", tmp_path)
    model = build()
    save_checkpoint_folder(model, tmp_path / "tales-test")
    assert shipped_checkpoints() == ["tales-test"]
    assert same_parameters(load_pretrained("tales-test"), model)
    allowed = r"one of gpt2-small, .*smollm2-135m-instruct, .*tales-test, a folder or a \.gguf file, got 'tales-none'"
    with pytest.raises(ValueError, match=allowed):
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
