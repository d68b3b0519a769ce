"""`shared.generation.decode_step` against the model it is built from."""

import pytest
import torch
from torch import nn

from shared.generation.decode_step import as_function, decode_step
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.layers import FeedForward, LayerNorm, MixtureOfExperts, RMSNorm, SwiGLU
from tests.configurations import LLAMA

SMALL = {"vocab_size": 30, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2}
VARIANTS = {
    "gpt2": {},
    "gpt1": {"pre_norm": False},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "n_kv_heads": 2, "head_dim": 8, "qk_norm": True},
    "mistral": {**LLAMA, "n_kv_heads": 1, "window": 3},
    "mixtral": {**LLAMA, "feed_forward": "moe", "feed_forward_dim": 16, "n_experts": 4},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions, untied": {"positions": "none", "tie_weights": False},
    "yarn": {**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 4},
}


def build(**options) -> GPTModel:
    """A model in evaluation mode, every parameter drawn anew."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**{**SMALL, **options})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.inference_mode()
def assert_same_steps(model: GPTModel, padded: bool) -> None:
    """Feed the same tokens to the model and to its step; compare logits and caches."""
    step = decode_step(model)
    ids = torch.randint(30, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 16, dtype=torch.bool)
    if padded:
        mask[1, :4] = mask[2, :1] = False
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    caches, others = model.new_caches(16), model.new_caches(16)
    for used in (caches, others):
        model(ids[:, :6], positions=positions[:, :6], key_padding_mask=mask[:, :6], caches=used)
    for start, end in ((6, 7), (7, 8), (8, 11), (11, 12), (12, 16)):
        seen, where = (mask[:, :end], positions[:, start:end]) if padded else (None, None)
        expected = model(ids[:, start:end], positions=where, key_padding_mask=seen, caches=others)
        torch.testing.assert_close(step(ids[:, start:end], where, seen, caches), expected)
    for cache, other in zip(caches, others, strict=True):
        torch.testing.assert_close(cache.contents(), other.contents())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_equals_the_model(name, padded):
    assert_same_steps(build(**VARIANTS[name]), padded)
    assert_same_steps(build(**VARIANTS[name]).double(), padded)


def n_calls_of(model: GPTModel, module: nn.Module) -> int:
    """How often a step calls `module` as a module: every call makes `forward` be looked up."""
    calls = []
    original = module.forward
    module.forward = lambda *arguments, **options: calls.append(1) or original(*arguments, **options)
    with torch.inference_mode():
        caches = model.new_caches(4)
        model(torch.tensor([[1]]), caches=caches)
        calls.clear()
        decode_step(model)(torch.tensor([[2]]), None, None, caches)
    return len(calls)


def test_only_plain_models_pass_their_modules_by():
    for name, is_plain in (("gpt2", True), ("qwen3", True), ("gpt1", False), ("mistral", False)):
        model = build(**VARIANTS[name])
        assert n_calls_of(model, model) == (not is_plain), name
    for place in ("", "blocks.0", "blocks.1.attention", "token_embedding", "blocks.0.dropout"):
        model = build()
        model.get_submodule(place).register_forward_hook(lambda *_: None)
        assert n_calls_of(model, model) == 1, place
    subclass = type("Special", (GPTModel,), {})(GPTConfig(**SMALL)).eval()
    assert n_calls_of(subclass, subclass) == 1


def test_unknown_parts_are_called_as_they_are():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = build()
    old = model.blocks[0].attention.output
    new = model.blocks[0].attention.output = Adapted(24, 24)
    new.load_state_dict(old.state_dict())
    assert_same_steps(model, padded=True)
    assert n_calls_of(model, new) == 1
    hooked = build()
    hooked.blocks[1].feed_forward.up.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_same_steps(hooked, padded=False)
    mixture = build(**VARIANTS["mixtral"])
    assert n_calls_of(mixture, mixture.blocks[0].feed_forward) == 1


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 6),
        LayerNorm(6),
        LayerNorm(6, bias=False),
        RMSNorm(6, eps=0.1),
        FeedForward(6, activation="relu"),
        SwiGLU(6),
    ],
    ids=lambda module: type(module).__name__,
)
def test_as_function(module):
    x = torch.randn(2, 6)
    assert as_function(module) is not module
    assert torch.equal(as_function(module)(x), module(x))


def test_something_else_is_its_own_function():
    other = MixtureOfExperts(6)
    assert as_function(other) is other
    hooked = nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda *_: None)
    assert as_function(hooked) is hooked
