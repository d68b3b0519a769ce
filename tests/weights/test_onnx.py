"""Models as ONNX graphs: ONNX Runtime computes the same logits and writes the same tokens, whatever the sizes."""

import errno

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from shared.generation.engine import generate
from shared.model.gpt import GPTModel
from shared.serving.onnx_runtime import OnnxModel
from shared.weights import files
from shared.weights import onnx as exporting
from shared.weights.onnx import CacheOutside, example_inputs, export_to_onnx, graph_names, trace_decoder
from shared.weights.pretrained import load_pretrained
from tests.configurations import LLAMA
from tests.weights.models import build, same_parameters

# Every kind of part is in one of them.
MODELS = {
    "gpt2": {},
    "qwen3, window": {**LLAMA, "qk_norm": True, "n_kv_heads": 2, "head_dim": 10, "window": 5},
    "helium, yarn, post-norm": {
        **LLAMA,
        "rope_interleaved": True,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "pre_norm": False,
    },
    "mixture": {**LLAMA, "feed_forward": "moe", "n_experts": 4},
    "tales": None,
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> tuple[GPTModel, onnxruntime.InferenceSession, OnnxModel]:
    options = MODELS[request.param]
    if options is None:
        model = load_pretrained("tales-tiny", dtype=torch.float32)
    else:
        model = build(**{"vocab_size": 61} | options)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_to_onnx(model, path)
    onnx.checker.check_model(path)
    return model, onnxruntime.InferenceSession(path), OnnxModel(path)


def prompt(n: int, seed: int = 0, size: int = 61) -> list[int]:
    return torch.randint(size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("prompts", [[1], [5], [17], [3, 17, 1], [9, 2]], ids=str)
def test_the_same_20_tokens_as_our_engine(exported, prompts):
    model, _, ours = exported
    given = [prompt(n, seed) for seed, n in enumerate(prompts)]
    assert ours.generate(given, 20) == generate(model, given, 20)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("past", [0, 1, 17])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_same_logits_for_every_size(exported, batch, past, tokens):
    model, session, _ = exported
    ids = torch.randint(61, (batch, past + tokens), generator=torch.Generator().manual_seed(past))
    # Our cache holds the past, and the graph is given it.
    caches = model.new_caches(past + tokens)
    if past:
        model(ids[:, :past], caches=caches)
    kept = [tensor for cache in caches for tensor in (cache.contents() if past else (None, None))]
    shape = (batch, model.config.n_kv_heads or model.config.n_heads, past, model.config.actual_head_dim)
    remembered = [np.zeros(shape, np.float32) if tensor is None else tensor.numpy() for tensor in kept]
    inputs, _ = graph_names(len(model.blocks))
    values = [ids[:, past:], torch.ones_like(ids), torch.arange(past, past + tokens).repeat(batch, 1)]
    feed = dict(zip(inputs, [*(value.numpy() for value in values), *remembered], strict=True))
    logits, *present = session.run(None, feed)
    expected = model(ids[:, past:], caches=caches)
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip([t for cache in caches for t in cache.contents()], present, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=1e-4)


def test_padding_at_the_left_changes_nothing(exported):
    model, _, ours = exported
    pair = [prompt(4), prompt(17, 1)]
    alone = [row for given in pair for row in ours.generate([given], 20)]
    assert ours.generate(pair, 20) == alone == generate(model, pair, 20)


def test_inputs_and_outputs_are_named_and_open(exported):
    model, session, ours = exported
    inputs, outputs = graph_names(len(model.blocks))
    assert [entry.name for entry in session.get_inputs()] == inputs
    assert [entry.name for entry in session.get_outputs()] == outputs
    shapes = [entry.shape for entry in session.get_inputs()]
    assert shapes[:3] == [["batch", "tokens"], ["batch", "past + tokens"], ["batch", "tokens"]]
    assert all(shape[0] == "batch" and shape[2] == "past" for shape in shapes[3:])
    assert ours.config["n_layers"] == len(model.blocks)


def test_a_model_in_half_precision_is_written_in_float32_and_stays_as_it_was(tmp_path):
    model = build(vocab_size=61, n_layers=1).bfloat16().train()
    before = [parameter.clone() for parameter in model.parameters()]
    export_to_onnx(model, tmp_path / "model.onnx")
    assert model.training and model.token_embedding.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    reference = build(vocab_size=61, n_layers=1).bfloat16().float().eval()
    assert OnnxModel(tmp_path / "model.onnx").generate([[1, 2]], 20) == generate(reference, [[1, 2]], 20)


def test_the_traced_program_is_the_model_for_open_sizes():
    model = build(vocab_size=61, **LLAMA)
    program = trace_decoder(model)
    for sizes in ((1, 5, 0), (3, 1, 17), (2, 7, 9)):
        inputs = example_inputs(model, *sizes)
        with torch.no_grad():
            ours, theirs = CacheOutside(model)(*inputs), program.module()(*inputs)
        torch.testing.assert_close(theirs[0], ours[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="evaluation mode and float32"):
        trace_decoder(build(vocab_size=61).half())


def test_bad_input_leaves_nothing_behind(tmp_path, monkeypatch):
    model, path = build(vocab_size=61), tmp_path / "model.onnx"
    monkeypatch.setattr(exporting, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="model must have at most 250 numbers"):
        export_to_onnx(model, path)
    monkeypatch.undo()

    def full(place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        export_to_onnx(model, path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="path must be new"):
        export_to_onnx(model, path)
    assert path.read_bytes() == b"mine" and same_parameters(model, build(vocab_size=61))
