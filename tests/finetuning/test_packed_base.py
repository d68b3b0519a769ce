"""A base that stays in a file's blocks computes what the unpacked one computes, and adapters learn on it alike."""

import pytest
import torch

from shared.finetuning.features import weights_hash
from shared.finetuning.lora import attach_lora, detach_lora, lora_layers, merge_lora, unmerge_lora
from shared.finetuning.lora_files import base_hash, load_adapter, save_adapter
from shared.finetuning.packed_base import PackedEmbedding, PackedLinear, load_packed
from shared.weights.gguf_model import load_gguf
from shared.weights.gguf_writer import write_gguf
from tests.weights.models import build
from tests.weights.test_gguf_writer import FAMILIES, WIDE

IDS = torch.randint(0, 320, (3, 9), generator=torch.Generator().manual_seed(1))


def written(tmp_path, kind, family="llama"):
    """A small model with random weights in a file."""
    path = tmp_path / "model.gguf"
    write_gguf(build(**{**WIDE, **FAMILIES[family]}), path, kind=kind)
    return path


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama, biased", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_it_computes_what_the_unpacked_model_computes(tmp_path, name, kind):
    path = written(tmp_path, kind, name)
    plain, packed = load_gguf(path), load_packed(path)
    torch.testing.assert_close(packed(IDS), plain(IDS), rtol=1e-4, atol=1e-5)
    for path_, module in packed.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            torch.testing.assert_close(module.weight, plain.get_submodule(path_).weight, rtol=0, atol=0)
    assert weights_hash(plain) == base_hash(packed) == base_hash(plain)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_adapters_learn_alike(tmp_path, kind):
    path = written(tmp_path, kind)
    models = [load_gguf(path), load_packed(path)]
    counts = []
    for model in models:
        torch.manual_seed(2)
        counts.append(attach_lora(model, "all-linear", rank=2))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
        model(IDS).square().mean().backward()
    assert counts[0] == counts[1]
    grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in models]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 8
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6, msg=name)
    # The base got none, and is not a parameter.
    assert all(
        "base" not in name or "norm" in name for name, _ in models[1].named_parameters() if _.requires_grad
    )


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rank_stabilized": True}])
def test_merged_and_detached(tmp_path, options):
    path = written(tmp_path, "Q4_0")
    model = load_packed(path)
    before = model(IDS)
    attach_lora(model, ("query", "value"), rank=2, **options)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn_like(parameter))
    apart = model(IDS)
    assert not torch.allclose(apart, before, atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), apart, rtol=1e-3, atol=1e-4)
    unmerge_lora(model)
    detach_lora(model, merge=True)
    assert not lora_layers(model)
    torch.testing.assert_close(model(IDS), apart, rtol=1e-3, atol=1e-4)
    kinds = {type(block.attention.qkv) for block in model.blocks}
    assert kinds == {torch.nn.Linear} and isinstance(model.blocks[0].attention.output, PackedLinear)


def test_an_adapter_of_the_packed_base_fits_the_unpacked_one(tmp_path):
    path = written(tmp_path, "Q4_0")
    packed, plain = load_packed(path), load_gguf(path)
    attach_lora(packed, "all-linear", rank=2)
    with torch.no_grad():
        for parameter in (p for p in packed.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_adapter(packed, tmp_path / "adapter", base="made here")
    load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain(IDS), packed(IDS), rtol=1e-3, atol=1e-4)


def test_the_packed_rows_are_small_and_counted_once(tmp_path):
    path = written(tmp_path, "Q4_0")
    packed, plain = load_packed(path), load_gguf(path)
    raw = {
        buffer.data_ptr(): buffer.numel()
        for m in packed.modules()
        if isinstance(m, PackedLinear | PackedEmbedding)
        for buffer in m.buffers()
    }
    assert sum(raw.values()) < 0.3 * 4 * plain.n_parameters
    assert attach_lora(packed, "output", rank=1).frozen == plain.n_parameters
    # A second adapter counts the base's numbers alike.
    assert attach_lora(packed, "up", rank=1, name="other").frozen == plain.n_parameters


def test_gradients_reach_what_is_below(tmp_path):
    packed = load_packed(written(tmp_path, "Q8_0"))
    module = packed.blocks[0].feed_forward.up
    x = torch.randn(2, 5, module.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), atol=1e-4)


def test_bad_input(tmp_path):
    path = written(tmp_path, "Q4_0")
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="offset"):
        load_packed(cut)
    packed = load_packed(path)
    with pytest.raises(ValueError, match=r"ids from 0 to"):
        packed(torch.full((1, 3), packed.config.vocab_size))
    (tmp_path / "mixtral").mkdir()
    with pytest.raises(ValueError, match="a model without experts"):
        load_packed(written(tmp_path / "mixtral", "Q8_0", "mixtral"))
