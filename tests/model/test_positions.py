"""Positions: against formulas written out, against transformers, and what must hold for any position."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.xlm.modeling_xlm import create_sinusoidal_embeddings

from shared.model.attention import MultiHeadAttention
from shared.model.positions import (
    AlibiBias,
    ComputedTable,
    LearnedPositions,
    RelativePositionBias,
    RotaryPositions,
    SinusoidalPositions,
    alibi_slopes,
    relative_position_bucket,
    rotary_inverse_frequencies,
    rows_at,
    sinusoidal_positions,
)

ABSOLUTE = [LearnedPositions, SinusoidalPositions]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Absolute positions


@pytest.mark.parametrize(("length", "width"), [(1, 2), (50, 16), (300, 64)])
def test_sinusoidal_table_is_the_formula(length, width):
    expected = np.empty((length, width))
    for i in range(length):
        for m in range(width // 2):
            expected[i, 2 * m] = math.sin(i / 10000 ** (2 * m / width))
            expected[i, 2 * m + 1] = math.cos(i / 10000 ** (2 * m / width))
    table = sinusoidal_positions(length, width)
    assert table.dtype == torch.float32 and table.shape == (length, width)
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-7)


def test_sinusoidal_table_is_xlms():
    theirs = create_sinusoidal_embeddings(512, 64, torch.empty(512, 64))
    torch.testing.assert_close(sinusoidal_positions(512, 64), theirs, atol=1e-7, rtol=0)


@given(st.integers(0, 90), st.integers(0, 90), st.integers(0, 37))
@settings(deadline=None, max_examples=50)
def test_sinusoidal_product_depends_on_the_distance_only(i, j, shift):
    table = sinusoidal_positions(128, 32).double()
    assert float(table[i] @ table[j]) == pytest.approx(float(table[i + shift] @ table[j + shift]), abs=1e-5)


def test_learned_positions_equal_an_embedding_in_value_and_gradient():
    ours, reference = LearnedPositions(10, 4), torch.nn.Embedding(10, 4)
    reference.weight.data.copy_(ours.weight.data)
    positions = torch.tensor([[0, 3, 3], [9, 1, 0]])
    for module in (ours, reference):
        module(positions).pow(3).sum().backward()
    assert torch.equal(ours(positions), reference(positions))
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad)
    assert list(ours.state_dict()) == ["weight"]


@pytest.mark.parametrize("module", ABSOLUTE)
def test_absolute_positions_have_one_interface(module):
    positions = module(16, 8)
    batch = torch.tensor([[0, 5, 2], [15, 15, 1]])
    assert positions(torch.arange(16)).shape == (16, 8)
    assert positions(batch).shape == (2, 3, 8)
    assert torch.equal(positions(batch)[1], positions(batch[1]))
    assert torch.equal(positions(batch.int()), positions(batch))
    assert positions(torch.empty(0, dtype=torch.int64)).shape == (0, 8)


@pytest.mark.parametrize("module", ABSOLUTE)
@pytest.mark.parametrize("wrong", [16, -1, 1000])
def test_absolute_position_without_a_vector_is_named(module, wrong):
    with pytest.raises(ValueError, match=rf"position {wrong} .*context_length is 16"):
        module(16, 8)(torch.tensor([0, wrong]))


def test_rows_at_takes_positions_of_any_shape():
    table = random(5, 3)
    for where in (torch.tensor(4), torch.tensor([0, 4]), torch.tensor([[[1, 1], [2, 0]]])):
        assert torch.equal(rows_at(where, table), table[where])
    with pytest.raises(ValueError, match="position 5 is outside 0 to 4"):
        rows_at(torch.tensor([0, 5]), table)
    with pytest.raises(TypeError, match=r"positions must be int64, got torch\.float32"):
        rows_at(torch.tensor([0.0]), table)


@pytest.mark.parametrize("module", ABSOLUTE)
def test_positions_must_be_integers(module):
    for wrong in (torch.tensor([0.0]), torch.tensor([True])):
        with pytest.raises(TypeError, match="int64"):
            module(16, 8)(wrong)


@pytest.mark.parametrize("module", ABSOLUTE)
@pytest.mark.parametrize(
    ("sizes", "error"), [((0, 8), ValueError), ((8, -2), ValueError), ((8.0, 8), TypeError)]
)
def test_absolute_positions_refuse_bad_sizes(module, sizes, error):
    with pytest.raises(error, match=r"context_length|emb_dim"):
        module(*sizes)


def test_sinusoidal_refuses_odd_widths_and_small_bases():
    with pytest.raises(ValueError, match=r"emb_dim must be even.*7"):
        sinusoidal_positions(4, 7)
    with pytest.raises(ValueError, match=r"base.*1"):
        sinusoidal_positions(4, 8, base=1.0)


# Relative positions


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (64, 256), (4, 5)])
def test_buckets_are_t5s(bidirectional, n_buckets, max_distance):
    relative = torch.arange(-2000, 2001).view(1, -1)
    ours = relative_position_bucket(relative, n_buckets, max_distance, bidirectional)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, n_buckets, max_distance)
    assert torch.equal(ours, theirs)
    assert ours.min() == 0 and ours.max() == n_buckets - 1


@pytest.mark.parametrize("is_decoder", [True, False])
def test_relative_bias_is_t5s_in_value_and_gradient(is_decoder):
    config = transformers.T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=is_decoder)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = RelativePositionBias(4, bidirectional=not is_decoder)
    ours.load_state_dict({"weight": theirs.relative_attention_bias.weight.detach()})
    upstream = random(4, 50, 70)
    bias, reference = ours(torch.arange(50), torch.arange(70)), theirs.compute_bias(50, 70)[0]
    assert torch.equal(bias, reference)
    (bias * upstream).sum().backward()
    (reference * upstream).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.relative_attention_bias.weight.grad)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_is_blooms(n_heads):
    theirs = build_alibi_tensor(torch.ones(1, 12), n_heads, torch.float32)  # (heads, 1, keys)
    torch.testing.assert_close(alibi_slopes(n_heads), theirs[:, 0, 1])
    # Bloom leaves out what is the same for all keys of a query, which no softmax sees.
    hidden = torch.full((12, 12), -math.inf).triu(1)
    ours = AlibiBias(n_heads)(torch.arange(12), torch.arange(12))
    torch.testing.assert_close((ours + hidden).softmax(-1), (theirs + hidden).softmax(-1))


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize("bias", [AlibiBias(4), RelativePositionBias(4, 8, 16)], ids=["alibi", "t5"])
def test_relative_biases_depend_on_distances_and_take_batches(bias):
    queries, keys = torch.tensor([5, 6]), torch.tensor([0, 3, 6, 9])
    alone = bias(queries, keys)
    assert alone.shape == (4, 2, 4)
    assert torch.equal(alone, bias(queries + 10_000, keys + 10_000))
    batch = bias(torch.stack((queries, queries + 1)), torch.stack((keys, keys)))
    assert batch.shape == (2, 4, 2, 4)
    assert torch.equal(batch[0], alone) and torch.equal(batch[1], bias(queries + 1, keys))


def test_relative_biases_refuse_bad_input():
    for bias in (AlibiBias(2), RelativePositionBias(2)):
        with pytest.raises(TypeError, match="key_positions"):
            bias(torch.arange(3), torch.arange(3.0))
        with pytest.raises(ValueError, match="query_positions"):
            bias(torch.tensor(3), torch.arange(3))
    for sizes in ((0,), (2, 3), (2, 2), (2, 9, 128), (2, 32, 8)):
        with pytest.raises(ValueError, match=r"n_heads|n_buckets|max_distance"):
            RelativePositionBias(*sizes)
    with pytest.raises(ValueError, match="n_buckets"):
        RelativePositionBias(2, 1, bidirectional=False)
    RelativePositionBias(2, 9, bidirectional=False)
    with pytest.raises(ValueError, match="n_heads"):
        AlibiBias(0)


# Rotary positions


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("batched", [True, False])
def test_rotary_is_llamas_in_value_and_gradient(base, batched):
    rope = {"rope_type": "default", "rope_theta": base}
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    x = random(2, 4, 7, 16).requires_grad_()
    positions = torch.stack((torch.arange(7), torch.arange(90, 97)))
    if not batched:
        positions = positions[1:].expand(2, 7)
    cosine, sine = modeling_llama.LlamaRotaryEmbedding(config)(x, positions)
    reference = modeling_llama.apply_rotary_pos_emb(x, x, cosine, sine)[0]
    ours = RotaryPositions(16, 128, base)(x, positions if batched else positions[0])
    torch.testing.assert_close(ours, reference, atol=2e-6, rtol=0)
    upstream = random(2, 4, 7, 16, seed=1)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, reference)]
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=0)


def test_interleaved_rotary_is_gptjs():
    x, positions = random(2, 4, 7, 16), torch.stack((torch.arange(7), torch.arange(90, 97)))
    sine, cosine = modeling_gptj.create_sinusoidal_positions(128, 16)[positions].chunk(2, dim=-1)
    theirs = modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2), sine, cosine).transpose(1, 2)
    ours = RotaryPositions(16, 128, interleaved=True)(x, positions)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_takes_the_frequencies_of_scaled_models(rope):
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    theirs = modeling_llama.LlamaRotaryEmbedding(config)
    x, positions = random(1, 4, 128, 16), torch.arange(128)
    reference = modeling_llama.apply_rotary_pos_emb(x, x, *theirs(x, positions[None]))[0]
    ours = RotaryPositions(
        16, 128, inverse_frequencies=theirs.inv_freq, attention_factor=theirs.attention_scaling
    )
    torch.testing.assert_close(ours(x, positions), reference, atol=2e-6, rtol=0)


@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 50),
    st.booleans(),
    st.sampled_from([2, 4, 10, 64]),
)
@settings(deadline=None, max_examples=60)
def test_rotary_scores_depend_on_the_distance_only(i, j, shift, interleaved, head_dim):
    rotary = RotaryPositions(head_dim, 256, interleaved=interleaved).double()
    query, key = random(1, 1, 1, head_dim).double(), random(1, 1, 1, head_dim, seed=1).double()

    def score(a: int, b: int) -> float:
        return float((rotary(query, torch.tensor([a])) * rotary(key, torch.tensor([b]))).sum())

    # The angles are float32: 250 radians are known to about 1e-5.
    assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-3)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_keeps_lengths_and_leaves_position_0_alone(interleaved):
    rotary, x = RotaryPositions(16, 64, interleaved=interleaved), random(2, 3, 5, 16)
    rotated = rotary(x, torch.tensor([0, 1, 2, 40, 63]))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert not torch.allclose(rotated[:, :, 1], x[:, :, 1])


def test_rotary_rows_of_a_batch_and_heads_are_independent():
    rotary, x = RotaryPositions(8, 64), random(3, 2, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8], [9, 3, 60, 0]])
    together = rotary(x, positions)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], rotary(x[row : row + 1], positions[row]))
    torch.testing.assert_close(together[:, :1], rotary(x[:, :1], positions))


def test_conventions_differ_by_an_order_of_the_numbers():
    x, where = random(1, 2, 6, 12), torch.arange(6)
    order = torch.cat((torch.arange(0, 12, 2), torch.arange(1, 12, 2)))
    interleaved = RotaryPositions(12, 6, interleaved=True)(x, where)
    torch.testing.assert_close(RotaryPositions(12, 6)(x[..., order], where), interleaved[..., order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rotary_keeps_the_type_of_its_input(dtype):
    rotary, x = RotaryPositions(8, 16), random(1, 1, 4, 8)
    rotated = rotary(x.to(dtype), torch.arange(4))
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated.float(), rotary(x, torch.arange(4)), atol=0.03, rtol=0)


COMPUTED = {
    "rotary": lambda: RotaryPositions(8, 16),
    "interleaved": lambda: RotaryPositions(8, 16, interleaved=True, attention_factor=1.5),
    "sinusoidal": lambda: SinusoidalPositions(16, 8),
    "alibi": lambda: AlibiBias(3),  # slopes that bfloat16 does not have
}


@pytest.mark.parametrize("build", COMPUTED.values(), ids=COMPUTED)
def test_what_is_computed_is_neither_stored_nor_trained(build):
    assert not build().state_dict() and not list(build().parameters())


@pytest.mark.parametrize("build", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.bfloat16().float(),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.to("meta").to_empty(device="cpu"),
        lambda module: torch.nn.ModuleList([module, module]).to_empty(device="cpu")[0],
        lambda module: module.to("meta"),
        lambda module: copy.deepcopy(module),
        lambda module: pickle.loads(pickle.dumps(module)),
    ],
)
def test_a_computed_table_keeps_its_numbers(build, move):
    expected = build().table
    assert torch.equal(move(build()).table, expected) and expected.dtype == torch.float32


@pytest.mark.parametrize("build", COMPUTED.values(), ids=COMPUTED)
def test_a_table_is_computed_on_meta_too_and_only_its_stand_in_is_there(build):
    with torch.device("meta"):
        module = build()
    assert torch.equal(module.table, build().table)
    assert module.table_on(torch.device("meta")).is_meta
    assert module.table_on(torch.device("cpu")) is module.table
    with torch.device("meta"):  # shapes can be found out without numbers
        where = torch.arange(4)
        if isinstance(module, AlibiBias):
            assert module(where, where).shape == (3, 4, 4)
        elif isinstance(module, RotaryPositions):
            assert module(torch.empty(1, 2, 4, 8), where).shape == (1, 2, 4, 8)
        else:
            assert module(where).shape == (4, 8)


def test_a_computed_table_is_computed_once():
    calls = []
    table = ComputedTable(lambda: calls.append(1) or torch.arange(3.0))
    table.half().to("meta").to_empty(device="cpu").table_on(torch.device("cpu"))
    assert calls == [1] and table.table.tolist() == [0.0, 1.0, 2.0]


def test_rotary_serves_multi_head_attention():
    torch.manual_seed(0)
    layer = MultiHeadAttention(32, 4, n_kv_heads=2, causal=True, rotary=RotaryPositions(8, 64)).eval()
    x = random(2, 10, 32)
    # Shifting all positions changes no distance and so no output.
    torch.testing.assert_close(layer(x), layer(x, positions=torch.arange(20, 30)), atol=1e-5, rtol=0)
    assert not torch.allclose(layer(x), layer(x, positions=2 * torch.arange(10)), atol=1e-3)


def test_rotary_compiles_to_one_graph():
    rotary, x = RotaryPositions(8, 16), random(1, 2, 4, 8)
    compiled = torch.compile(rotary, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, torch.arange(4)), rotary(x, torch.arange(4)))


def test_rotary_refuses_bad_input():
    rotary = RotaryPositions(8, 16)
    with pytest.raises(ValueError, match=r"position 16 .*context_length is 16"):
        rotary(random(1, 1, 2, 8), torch.tensor([3, 16]))
    with pytest.raises(ValueError, match="position -1 "):
        rotary(random(1, 1, 2, 8), torch.tensor([[3, -1]]))
    with pytest.raises(TypeError, match="int64"):
        rotary(random(1, 1, 2, 8), torch.tensor([0.0, 1.0]))
    for shape in ((1, 2, 8), (1, 1, 2, 6)):
        with pytest.raises(ValueError, match="head_dim=8"):
            rotary(random(*shape), torch.arange(2))
    for positions in (torch.arange(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(0)):
        with pytest.raises(ValueError, match="positions must be"):
            rotary(random(1, 1, 2, 8), positions)
    with pytest.raises(ValueError, match=r"head_dim must be even.*7"):
        RotaryPositions(7, 16)
    with pytest.raises(ValueError, match="context_length"):
        RotaryPositions(8, 0)
    with pytest.raises(ValueError, match="base"):
        RotaryPositions(8, 16, base=-1.0)
    for factor in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="attention_factor must be above 0"):
            RotaryPositions(8, 16, attention_factor=factor)
    with pytest.raises(ValueError, match=r"inverse_frequencies must be .*\(4,\).*\(8,\)"):
        RotaryPositions(8, 16, inverse_frequencies=torch.ones(8))


def test_rotary_inverse_frequencies_are_llamas():
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4)
    theirs = modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(rotary_inverse_frequencies(16), theirs)
    with pytest.raises(ValueError, match="even"):
        rotary_inverse_frequencies(5)
