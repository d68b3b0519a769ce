"""`shared.model.layers` (and the scaled rotary frequencies) against torch and transformers, in values and gradients."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from shared.model.attention import KeyValueCache, MultiHeadAttention
from shared.model.layers import (
    ACTIVATIONS,
    FEED_FORWARDS,
    NORMS,
    FeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
    SwiGLU,
    TransformerBlock,
    balance_loss,
    build_feed_forward,
    build_norm,
    check_width,
)
from shared.model.positions import rotary_inverse_frequencies, scaled_rotary_frequencies

DIM = 24


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


def values_and_gradients(function, x: torch.Tensor, parameters) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    output = function(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output * upstream).sum(), [x, *parameters])]


def assert_equal(
    ours: nn.Module, reference: nn.Module, x: torch.Tensor, parameters=None, theirs=None
) -> None:
    pairs = zip(
        values_and_gradients(ours, x, parameters or list(ours.parameters())),
        values_and_gradients(reference, x, theirs or list(reference.parameters())),
        strict=True,
    )
    for mine, other in pairs:
        close(mine, other)


def seeded(module_class, *arguments, seed: int = 0, **options) -> nn.Module:
    """Build a module and draw every parameter anew, so that zeros and ones hide nothing."""
    torch.manual_seed(seed)
    module = module_class(*arguments, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


# --- norms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm_equals_torch_in_values_and_gradients(bias, eps):
    ours, reference = seeded(LayerNorm, DIM, eps, bias=bias), nn.LayerNorm(DIM, eps, bias=bias)
    reference.load_state_dict(ours.state_dict())
    assert_equal(ours, reference, torch.randn(2, 5, DIM) * 3 + 1)


def test_rms_norm_equals_llama_in_values_and_gradients():
    ours, reference = seeded(RMSNorm, DIM, 1e-3), LlamaRMSNorm(DIM, 1e-3)
    reference.load_state_dict(ours.state_dict())
    assert_equal(ours, reference, torch.randn(2, 5, DIM) * 3 + 1)


@given(scale=st.floats(1.0, 1e3), shift=st.floats(-50, 50))
@settings(deadline=None, max_examples=30)
def test_layer_norm_forgets_length_and_offset(scale, shift):
    x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = LayerNorm(DIM, eps=0.0).double()
    close(norm(scale * x + shift), norm(x))


def test_a_vector_of_equal_numbers_becomes_zero_and_not_nan():
    assert torch.equal(LayerNorm(DIM)(torch.full((1, DIM), 7.0)), torch.zeros(1, DIM))
    assert torch.equal(RMSNorm(DIM)(torch.zeros(1, DIM)), torch.zeros(1, DIM))


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "dim"), ((4, -1.0), "eps"), ((4, math.nan), "eps")]
)
def test_norms_refuse(norm, arguments, message):
    with pytest.raises(ValueError, match=message):
        norm(*arguments)
    with pytest.raises(ValueError, match="last dimension of x must be 4"):
        norm(4)(torch.ones(2, 1))  # would broadcast without a word


# --- feed-forward networks


@pytest.mark.parametrize(
    ("name", "reference"),
    [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("relu", nn.ReLU()), ("silu", nn.SiLU())],
)
def test_feed_forward_equals_torch_in_values_and_gradients(name, reference):
    ours = seeded(FeedForward, DIM, 40, activation=name)
    theirs = nn.Sequential(nn.Linear(DIM, 40), reference, nn.Linear(40, DIM))
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    assert_equal(ours, theirs, torch.randn(2, 5, DIM))
    assert set(ACTIVATIONS) == {"gelu", "gelu_tanh", "relu", "silu"}


def test_feed_forward_is_four_times_as_wide_inside_and_has_biases_unless_told_otherwise():
    assert FeedForward(DIM).up.out_features == 4 * DIM
    assert FeedForward(DIM).up.bias is not None
    assert FeedForward(DIM, bias=False).down.bias is None


def test_swiglu_equals_llama_in_values_and_gradients():
    ours = seeded(SwiGLU, DIM, 40)
    reference = LlamaMLP(LlamaConfig(hidden_size=DIM, intermediate_size=40, num_attention_heads=2))
    reference.load_state_dict({n.replace(".weight", "_proj.weight"): t for n, t in ours.state_dict().items()})
    assert_equal(ours, reference, torch.randn(2, 5, DIM))


@pytest.mark.parametrize("dim", [24, 96, 768])
def test_swiglu_has_as_many_weights_as_a_plain_network_where_the_width_divides_by_three(dim):
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    assert count(SwiGLU(dim)) == count(FeedForward(dim, bias=False))


@pytest.mark.parametrize("network", [FeedForward, SwiGLU, MixtureOfExperts])
def test_feed_forward_networks_treat_every_token_alone(network):
    module, x = seeded(network, DIM, 16), torch.randn(2, 5, DIM)
    alone = torch.stack([module(x[:, t]) for t in range(5)], dim=1)
    close(alone, module(x))


@pytest.mark.parametrize("network", [FeedForward, SwiGLU, MixtureOfExperts])
@pytest.mark.parametrize(("arguments", "message"), [((0,), "emb_dim"), ((4, 0), "hidden_dim")])
def test_feed_forward_networks_refuse(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(*arguments)
    with pytest.raises(ValueError, match="last dimension of x must be 4"):
        network(4)(torch.ones(2, 3))


def test_an_unknown_activation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"activation must be one of gelu, .*got 'tanh'"):
        FeedForward(4, activation="tanh")


# --- mixture of experts


def mixtral(ours: MixtureOfExperts, hidden_dim: int) -> MixtralSparseMoeBlock:
    config = MixtralConfig(
        hidden_size=DIM,
        intermediate_size=hidden_dim,
        num_local_experts=len(ours.experts),
        num_experts_per_tok=ours.n_active,
    )
    config._experts_implementation = "eager"
    reference = MixtralSparseMoeBlock(config)
    stack = lambda name: torch.stack([getattr(expert, name).weight for expert in ours.experts]).detach()
    reference.experts.gate_up_proj.data = torch.cat([stack("gate"), stack("up")], dim=1)
    reference.experts.down_proj.data = stack("down")
    reference.gate.weight.data = ours.router.weight.detach().clone()
    return reference


@pytest.mark.parametrize(("n_experts", "n_active"), [(5, 2), (4, 1), (3, 3), (1, 1)])
def test_mixture_equals_mixtral_in_values_and_gradients(n_experts, n_active):
    ours = seeded(MixtureOfExperts, DIM, 16, n_experts=n_experts, n_active=n_active)
    reference, x = mixtral(ours, 16), torch.randn(3, 7, DIM)
    assert_equal(ours, reference, x, [ours.router.weight], [reference.gate.weight])
    ours(x).sum().backward()
    reference(x).sum().backward()
    gradient = reference.experts.down_proj.grad
    close(torch.stack([expert.down.weight.grad for expert in ours.experts]), gradient, 1e-4)
    logits = ours.router(x.flatten(0, 1))
    close(n_active * balance_loss(ours), load_balancing_loss_func((logits,), n_experts, n_active))


def test_balance_loss_is_one_for_even_load_and_its_gradient_reaches_the_router():
    mixture = MixtureOfExperts(DIM, 8, n_experts=4, n_active=2)
    nn.init.zeros_(mixture.router.weight)
    mixture(torch.randn(10, DIM))
    assert balance_loss(mixture).item() == pytest.approx(1.0)
    assert mixture.load.sum().item() == pytest.approx(1.0)
    balance_loss(mixture).backward()
    assert mixture.router.weight.grad is not None


def test_experts_without_tokens_get_zero_gradients_and_not_none():
    mixture = MixtureOfExperts(DIM, 8, n_experts=4, n_active=1)
    mixture(torch.randn(1, 1, DIM)).sum().backward()
    silent = [e.down.weight.grad.abs().sum().item() == 0 for e in mixture.experts]
    assert sum(silent) == 3


def test_a_mixture_can_be_copied_and_pickled_after_a_pass():
    mixture, x = seeded(MixtureOfExperts, DIM, 8), torch.randn(4, DIM)
    expected = mixture(x)
    close(copy.deepcopy(mixture)(x), expected)
    file = io.BytesIO()
    torch.save(mixture, file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(x), expected)
    assert mixture.balance_loss is not None


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"n_active": 0}, ValueError, "n_active must be at least 1, got 0"),
        ({"n_active": 5}, ValueError, "n_active must be between 1 and n_experts=4, got 5"),
        ({"n_active": 2.0}, TypeError, r"n_active must be an int, got 2\.0"),
        ({"n_active": True}, TypeError, "n_active must be an int"),
        ({"n_experts": 4.0}, TypeError, r"n_experts must be an int, got 4\.0"),
        ({"n_experts": 0}, ValueError, "n_experts must be at least 1"),
        ({"hidden_dim": 4.0}, TypeError, "hidden_dim must be an int"),
    ],
)
def test_a_mixture_refuses_wrong_numbers(sizes, error, message):
    with pytest.raises(error, match=message):
        MixtureOfExperts(4, **{"n_experts": 4, **sizes})


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3000.0])
def test_norms_of_large_and_small_vectors_in_half_precision(norm, dtype, size):
    layer, x = norm(64), (size * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = norm(64).double()(x.double())  # the squares of 3000 are beyond float16
    found = layer.to(dtype)(x)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), MixtureOfExperts(4, 4)])
def test_balance_loss_needs_a_mixture_that_has_run(model):
    with pytest.raises(ValueError, match="MixtureOfExperts"):
        balance_loss(model)


# --- the block


def block(
    pre_norm: bool = True, dropout: float = 0.0, causal: bool = True, seed: int = 0
) -> TransformerBlock:
    torch.manual_seed(seed)
    attention = MultiHeadAttention(DIM, 4, causal=causal, qkv_bias=True)
    parts = FeedForward(DIM, activation="gelu"), LayerNorm(DIM), LayerNorm(DIM)
    return TransformerBlock(attention, *parts, dropout=dropout, pre_norm=pre_norm)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_block_equals_torch_in_values_and_gradients(pre_norm, causal):
    options = {"dropout": 0.0, "activation": F.gelu, "batch_first": True, "norm_first": pre_norm}
    reference = seeded(nn.TransformerEncoderLayer, DIM, 4, 4 * DIM, **options)
    ours = block(pre_norm, causal=causal)
    names = {
        "attention_norm": "norm1.{}",
        "attention.qkv": "self_attn.in_proj_{}",
        "attention.output": "self_attn.out_proj.{}",
        "feed_forward_norm": "norm2.{}",
        "feed_forward.up": "linear1.{}",
        "feed_forward.down": "linear2.{}",
    }
    theirs = []
    for name, parameter in ours.named_parameters():
        stem, kind = name.rsplit(".", 1)
        theirs.append(reference.get_parameter(names[stem].format(kind)))
        parameter.data.copy_(theirs[-1])
    mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
    masked = lambda x: reference(x, mask)
    assert_equal(ours, masked, torch.randn(2, 6, DIM), theirs=theirs)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_block_passes_options_on_to_attention(pre_norm):
    module, x = block(pre_norm).eval(), torch.randn(2, 6, DIM)
    with torch.no_grad():
        expected, cache = module(x), KeyValueCache(6)
        steps = [module(x[:, t : t + 1], cache=cache) for t in range(6)]
        close(torch.cat(steps, dim=1), expected)
        padding = torch.tensor([False, False, True, True, True, True]).expand(2, 6)
        close(module(x, key_padding_mask=padding)[:, 2:], module(x[:, 2:]))


def test_block_drops_in_training_only():
    module, x = block(dropout=0.5), torch.randn(1, 4, DIM)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_block_leaves_its_input_as_it_was():
    x = torch.randn(1, 4, DIM)
    before = x.clone()
    block()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_block_refuses_a_dropout_outside_zero_to_one(dropout):
    with pytest.raises(ValueError, match="dropout"):
        block(dropout=dropout)


# --- names


def test_the_registries_build_what_they_name():
    assert isinstance(build_norm("layernorm", 4, bias=False), LayerNorm)
    assert build_norm("layernorm", 4, bias=False).bias is None
    assert isinstance(build_norm("rmsnorm", 4, eps=1e-6), RMSNorm)
    assert build_norm("rmsnorm", 4, eps=1e-6).eps == 1e-6
    assert isinstance(build_feed_forward("gelu", 4), FeedForward)
    assert isinstance(build_feed_forward("swiglu", 4, 8, bias=False), SwiGLU)
    mixture = build_feed_forward("moe", 4, 8, bias=False, n_experts=3, n_active=1)
    assert (len(mixture.experts), mixture.n_active) == (3, 1)
    assert set(NORMS) == {"layernorm", "rmsnorm"}
    assert set(FEED_FORWARDS) == {"gelu", "swiglu", "moe"}


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="norm must be one of layernorm, rmsnorm, got 'batchnorm'"):
        build_norm("batchnorm", 4)
    with pytest.raises(ValueError, match="feed_forward must be one of gelu, swiglu, moe, got 'relu'"):
        build_feed_forward("relu", 4)


def test_the_smallest_sizes_are_allowed():
    check_width(torch.ones(2, 3), 3)
    assert LayerNorm(1, 0.0).eps == RMSNorm(1, 0.0).eps == 0.0
    assert FeedForward(1, 1).up.out_features == SwiGLU(1, 1).up.out_features == 1
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got -1"):
        FeedForward(1, -1)


# --- rotary frequencies for longer contexts


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["linear", "ntk", "yarn", "llama3"]),
    head_dim=st.sampled_from([8, 16, 64, 128]),
    base=st.sampled_from([10_000.0, 500_000.0]),
    factor=st.floats(2.0, 40.0),
    length=st.sampled_from([256, 2048, 8192]),
)
def test_scaled_frequencies_equal_transformers(kind, head_dim, base, factor, length):
    # Theirs grows with the input: at twice the trained length, factor f - 1 means f.
    parameters = {"rope_theta": base, "rope_type": "dynamic" if kind == "ntk" else kind}
    parameters["factor"] = factor - 1 if kind == "ntk" else factor
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = length
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=length if kind in ("linear", "ntk") else int(length * factor) + 1,
        rope_parameters=parameters,
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        config, "cpu", seq_len=2 * length
    )
    ours, attention_factor = scaled_rotary_frequencies(kind, head_dim, base, factor, length)
    close(ours / expected, torch.ones(head_dim // 2))
    assert attention_factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn", "llama3"])
def test_factor_one_changes_nothing(kind):
    ours, attention_factor = scaled_rotary_frequencies(kind, 16, 10_000.0, 1.0, 2048)
    close(ours, rotary_inverse_frequencies(16, 10_000.0))
    assert attention_factor == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cubic", 16, 1e4, 2.0, 64), "kind must be one of"),
        (("linear", 15, 1e4, 2.0, 64), "head_dim"),
        (("linear", 16, 1.0, 2.0, 64), "base"),
        (("linear", 16, 1e4, 0.5, 64), "factor"),
        (("linear", 16, 1e4, math.nan, 64), "factor"),
        (("yarn", 16, 1e4, 2.0, 0), "original_length"),
        (("ntk", 2, 1e4, 2.0, 64), "head_dim must be at least 4"),
    ],
)
def test_scaled_frequencies_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        scaled_rotary_frequencies(*arguments)
