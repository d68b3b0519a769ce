"""`shared.model.attention` against torch's own attention, and what must hold for every mask, cache and head count."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from shared.model.attention import (
    KeyValueCache,
    MultiHeadAttention,
    causal_mask,
    check_mask,
    scaled_dot_product_attention,
)
from shared.model.positions import AlibiBias, RelativePositionBias

BATCH, TOKENS, EMB_DIM, N_HEADS = 3, 7, 24, 4


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(seed: int = 0, **options) -> MultiHeadAttention:
    torch.manual_seed(seed)
    return MultiHeadAttention(EMB_DIM, N_HEADS, **options)


class Rotary(nn.Module):
    """A small stand-in for `shared.model.positions.RotaryPositions`."""

    def __init__(self, head_dim: int, context_length: int = 64) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("angles", torch.arange(context_length)[:, None] * frequencies)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if positions.max() >= len(self.angles):
            raise ValueError(f"position {positions.max()} is beyond context_length={len(self.angles)}")
        angles = self.angles[positions]  # (tokens, head_dim / 2) or (batch, tokens, head_dim / 2)
        if positions.dim() == 2:
            angles = angles[:, None]
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()), -1
        )


# --- causal_mask, check_mask, scaled_dot_product_attention


@given(n_keys=st.integers(1, 12), data=st.data())
def test_causal_mask_says_which_positions_are_not_later_and_not_too_far(n_keys, data):
    n_queries = data.draw(st.integers(1, n_keys))
    window = data.draw(st.none() | st.integers(1, 14))
    mask = causal_mask(n_queries, n_keys, window)
    for i, j in itertools.product(range(n_queries), range(n_keys)):
        distance = (n_keys - n_queries + i) - j
        assert mask[i, j].item() == (0 <= distance < (window or n_keys))


def test_causal_mask_is_square_without_a_number_of_keys():
    assert torch.equal(causal_mask(5), torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 2), "n_queries"), ((0,), "n_queries"), ((3, 3, 0), "window"), ((3, 3, -1), "window")],
)
def test_causal_mask_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal_mask(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2.0,), "n_queries must be an int, got 2.0"),
        ((True,), "n_queries must be an int"),
        ((2, 4.0), "n_keys must be an int, got 4.0"),
        ((3, 3, 2.5), "window must be an int, got 2.5"),
        ((3, 3, True), "window must be an int"),
        ((3, 3, "3"), "window must be an int"),
    ],
)
def test_causal_mask_refuses_what_is_no_whole_number(arguments, message):
    with pytest.raises(TypeError, match=message):
        causal_mask(*arguments)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_scaled_dot_product_attention_equals_torch_with_any_mask(seed, share):
    tensors = [inputs(2, 3, n, 8, seed=seed + n) for n in (5, 6, 6)]
    mask = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(seed)) < share
    gradients = []
    for function in (lambda *x: scaled_dot_product_attention(*x)[0], F.scaled_dot_product_attention):
        query, key, value = (x.clone().requires_grad_() for x in tensors)
        output = function(query, key, value, mask)
        (output**2).sum().backward()
        gradients.append((output, query.grad, key.grad, value.grad))
    for ours, reference in zip(*gradients, strict=True):
        assert ours.isfinite().all()
        close(ours, reference, 1e-4)


def test_scaled_dot_product_attention_returns_rows_of_weights_that_sum_to_one_or_to_zero():
    x = inputs(2, 6, 8)
    mask = causal_mask(6)
    mask[2] = False
    output, weights = scaled_dot_product_attention(x, x, x, mask)
    close(weights.sum(-1), torch.tensor([1.0, 1, 0, 1, 1, 1]).expand(2, 6))
    assert not output[:, 2].any() and not weights[:, ~mask].any()


def test_scaled_dot_product_attention_drops_weights_as_torch_does():
    x = inputs(2, 6, 8)
    torch.manual_seed(5)
    output, weights = scaled_dot_product_attention(x, x, x, dropout=0.5)
    torch.manual_seed(5)
    close(weights, F.dropout(scaled_dot_product_attention(x, x, x)[1], 0.5))
    close(output, weights @ x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": inputs(2, 6, 9)}, ValueError, "do not fit"),
        ({"value": inputs(2, 5, 8)}, ValueError, "do not fit"),
        ({"attention_mask": causal_mask(5)}, ValueError, "attention_mask"),
        ({"attention_mask": causal_mask(6).float()}, TypeError, "bool"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"score_bias": causal_mask(6)}, TypeError, "score_bias must be a float tensor"),
        ({"score_bias": torch.zeros(5, 6)}, ValueError, r"score_bias must broadcast to \(2, 6, 6\)"),
        ({"score_bias": torch.zeros(1, 2, 6, 6)}, ValueError, "score_bias must broadcast"),
    ],
)
def test_scaled_dot_product_attention_refuses(change, error, message):
    arguments = {"query": inputs(2, 6, 8), "key": inputs(2, 6, 8), "value": inputs(2, 6, 8)} | change
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**arguments)


@pytest.mark.parametrize("shape", [(5, 6), (1, 6), (2, 1, 5, 6), (2, 3, 5, 6), (1, 1, 1, 6)])
def test_check_mask_accepts_what_broadcasts(shape):
    check_mask("mask", torch.ones(shape, dtype=torch.bool), (2, 3, 5, 6))


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 6), (2, 2, 5, 6), (1, 2, 3, 5, 6)])
def test_check_mask_refuses_other_shapes_and_three_dimensions(shape):
    with pytest.raises(ValueError, match="mask must broadcast"):
        check_mask("mask", torch.ones(shape, dtype=torch.bool), (2, 3, 5, 6))


def test_torchs_own_causal_flag_lines_up_with_the_first_key_and_ours_with_the_last():
    query, key, value = inputs(1, 1, 2, 8), inputs(1, 1, 5, 8, seed=1), inputs(1, 1, 5, 8, seed=2)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    close(theirs[:, :, 0], value[:, :, 0])  # the first of two new queries sees the first key only
    ours, weights = scaled_dot_product_attention(query, key, value, causal_mask(2, 5))
    assert (weights[0, 0, 0, :4] > 0).all() and weights[0, 0, 0, 4] == 0
    close(ours, F.scaled_dot_product_attention(query, key, value, causal_mask(2, 5)))


def test_an_empty_row_spoils_no_gradient_where_minus_infinity_alone_would():
    value = inputs(2, 3).requires_grad_()
    mask = torch.tensor([[True, True], [False, False]])
    query = inputs(2, 4)
    plain = (query @ query.T).masked_fill(~mask, -torch.inf).softmax(-1) @ value
    plain[0].sum().backward()
    assert value.grad.isnan().all()
    value.grad = None
    scaled_dot_product_attention(query, query, value, mask)[0][0].sum().backward()
    assert value.grad.isfinite().all()


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "mask", [None, causal_mask(9), torch.arange(9) < 5], ids=["all", "causal", "first 5"]
)
@pytest.mark.parametrize("size", [1.0, 40.0, 120.0])
def test_large_values_in_half_precision_give_what_torch_gives(dtype, mask, size):
    query, key, value = ((size * inputs(2, 3, 9, 64, seed=i)).to(dtype) for i in range(3))
    bias = inputs(3, 9, 9, seed=4)
    output, weights = scaled_dot_product_attention(query, key, value, mask, score_bias=bias)
    assert output.dtype == weights.dtype == dtype
    # In 64 bits, from the same rounded numbers: the result may be off by its own rounding, and no more.
    total = bias.double() if mask is None else torch.where(mask, bias, -torch.inf).double()
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), total)
    eps = torch.finfo(dtype).eps
    assert (output.double() - exact).abs().max() < 4 * eps * size
    theirs = F.scaled_dot_product_attention(query, key, value, total.float())
    assert (theirs.double() - exact).abs().max() < 4 * eps * size  # the fused kernel keeps the same promise


def test_equal_large_vectors_do_not_overflow_before_they_are_scaled():
    x = torch.full((4, 64), 40.0, dtype=torch.float16)  # products of 102,400
    assert torch.equal(scaled_dot_product_attention(x, x, x)[0], x)
    mixed = (40 * inputs(4, 64)).half()  # the row of the fault's list
    output, _ = scaled_dot_product_attention(mixed, mixed, mixed)
    torch.testing.assert_close(
        output, F.scaled_dot_product_attention(mixed, mixed, mixed), atol=0.3, rtol=2e-3
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"n_kv_heads": 2}])
@torch.no_grad()
def test_a_layer_in_half_precision_is_the_layer_rounded(dtype, options):
    ours = module(**options)
    for parameter in ours.parameters():
        parameter.mul_(4)
    x, bias = inputs(BATCH, TOKENS, EMB_DIM), inputs(N_HEADS, TOKENS, TOKENS, seed=3)
    call = {"key_padding_mask": PADDING, "score_bias": bias}
    expected = ours(x, **call)
    half = ours.to(dtype)
    fused, (explicit, _) = half(x.to(dtype), **call), half(x.to(dtype), need_weights=True, **call)
    for found in (fused, explicit):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=100 * torch.finfo(dtype).eps, rtol=0.05)


# --- MultiHeadAttention against torch


def torch_twin(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    """Return torch's layer with the weights of ours."""
    kv_dim = ours.kv_dim
    twin = nn.MultiheadAttention(EMB_DIM, N_HEADS, batch_first=True, kdim=kv_dim, vdim=kv_dim)
    with torch.no_grad():
        if kv_dim is None:
            twin.in_proj_weight.copy_(ours.qkv.weight)
            twin.in_proj_bias.copy_(ours.qkv.bias)
        else:
            twin.in_proj_bias.copy_(torch.cat((ours.query.bias, ours.key_value.bias)))
            keys, values = ours.key_value.weight.chunk(2)
            if kv_dim == EMB_DIM:
                twin.in_proj_weight.copy_(torch.cat((ours.query.weight, keys, values)))
            else:
                twin.q_proj_weight.copy_(ours.query.weight)
                twin.k_proj_weight.copy_(keys)
                twin.v_proj_weight.copy_(values)
        twin.out_proj.weight.copy_(ours.output.weight)
        twin.out_proj.bias.copy_(ours.output.bias)
    return twin


PADDING = torch.arange(TOKENS) < torch.tensor([7, 4, 2])[:, None]
RANDOM_MASK = inputs(TOKENS, TOKENS, seed=3) > -0.5
RANDOM_MASK.fill_diagonal_(True)
PER_HEAD = inputs(BATCH, N_HEADS, TOKENS, TOKENS, seed=4) > -0.5
PER_HEAD[..., 0] = True


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("attention_mask", [None, RANDOM_MASK, PER_HEAD], ids=["none", "shared", "per head"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention_equals_torch_in_values_and_gradients(causal, padding, attention_mask, need_weights):
    ours = module(causal=causal, qkv_bias=True)
    twin = torch_twin(ours)
    x = inputs(BATCH, TOKENS, EMB_DIM)
    ours_x, twin_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    mask = attention_mask
    if causal:
        mask = causal_mask(TOKENS) if mask is None else mask & causal_mask(TOKENS)
    refused = None if mask is None else ~mask.expand(BATCH, N_HEADS, TOKENS, TOKENS).flatten(0, 1)
    reference, reference_weights = twin(
        twin_x,
        twin_x,
        twin_x,
        key_padding_mask=None if padding is None else ~padding,
        attn_mask=refused,
        average_attn_weights=False,
    )
    output = ours(ours_x, key_padding_mask=padding, attention_mask=attention_mask, need_weights=need_weights)
    if need_weights:
        output, weights = output
        close(weights, reference_weights)
    close(output, reference)
    (output**2).sum().backward()
    (reference**2).sum().backward()
    close(ours_x.grad, twin_x.grad, 1e-4)
    close(ours.qkv.weight.grad, twin.in_proj_weight.grad, 1e-4)
    close(ours.qkv.bias.grad, twin.in_proj_bias.grad, 1e-4)
    close(ours.output.weight.grad, twin.out_proj.weight.grad, 1e-4)


@pytest.mark.parametrize("kv_dim", [EMB_DIM, 10])
@pytest.mark.parametrize("need_weights", [False, True])
def test_cross_attention_equals_torch_in_values_and_gradients(kv_dim, need_weights):
    ours = module(kv_dim=kv_dim, qkv_bias=True)
    twin = torch_twin(ours)
    x = inputs(BATCH, 5, EMB_DIM)
    contexts = [inputs(BATCH, TOKENS, kv_dim, seed=1).requires_grad_() for _ in range(2)]
    output = ours(x, contexts[0], key_padding_mask=PADDING, need_weights=need_weights)
    output = output[0] if need_weights else output
    reference, _ = twin(x, contexts[1], contexts[1], key_padding_mask=~PADDING)
    close(output, reference)
    (output**2).sum().backward()
    (reference**2).sum().backward()
    close(contexts[0].grad, contexts[1].grad, 1e-4)


# --- Properties


@settings(deadline=None, max_examples=15)
@given(
    n_kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    rotary=st.booleans(),
    norms=st.booleans(),
    head_dim=st.sampled_from([None, 10]),
    padded=st.booleans(),
)
def test_the_explicit_computation_gives_the_numbers_of_the_fast_one(
    n_kv_heads, causal, rotary, norms, head_dim, padded
):
    size = head_dim or EMB_DIM // N_HEADS
    ours = module(
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        causal=causal,
        rotary=Rotary(size) if rotary else None,
        query_norm=nn.RMSNorm(size) if norms else None,
        key_norm=nn.RMSNorm(size) if norms else None,
        window=3 if causal else None,
    )
    x, padding = inputs(BATCH, TOKENS, EMB_DIM), PADDING if padded else None
    output, weights = ours(x, key_padding_mask=padding, need_weights=True)
    assert weights.shape == (BATCH, N_HEADS, TOKENS, TOKENS)
    close(output, ours(x, key_padding_mask=padding))


def test_grouped_heads_equal_a_full_layer_whose_key_and_value_heads_are_repeated():
    grouped, full = module(n_kv_heads=2, causal=True), module(causal=True)
    size = EMB_DIM // N_HEADS
    with torch.no_grad():
        query, key, value = grouped.qkv.weight.split((N_HEADS * size, 2 * size, 2 * size))
        repeated = [x.view(2, size, -1).repeat_interleave(2, dim=0).flatten(0, 1) for x in (key, value)]
        full.qkv.weight.copy_(torch.cat((query, *repeated)))
        full.output.load_state_dict(grouped.output.state_dict())
    x = inputs(BATCH, TOKENS, EMB_DIM)
    close(grouped(x), full(x))


@pytest.mark.parametrize("changed", range(1, TOKENS))
@pytest.mark.parametrize("window", [None, 3])
def test_causal_outputs_ignore_the_future_and_what_lies_before_the_window(changed, window):
    ours = module(causal=True, window=window)
    x = inputs(BATCH, TOKENS, EMB_DIM)
    other = x.clone()
    other[:, changed] += 1.0
    differs = (ours(x) - ours(other)).abs().amax(dim=(0, 2)) > 1e-6
    reached = torch.arange(TOKENS) >= changed
    if window is not None:
        reached &= torch.arange(TOKENS) < changed + window
    assert torch.equal(differs, reached)


def test_padding_does_not_change_the_results_of_real_tokens():
    ours = module()
    x = inputs(BATCH, TOKENS, EMB_DIM)
    output = ours(x, key_padding_mask=PADDING)
    for row, length in enumerate(PADDING.sum(1).tolist()):
        close(output[row, :length], ours(x[row : row + 1, :length])[0])


def test_a_permuted_batch_gives_permuted_results():
    ours, order = module(causal=True), torch.tensor([2, 0, 1])
    x = inputs(BATCH, TOKENS, EMB_DIM)
    close(ours(x)[order], ours(x[order]))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_token_with_nothing_to_attend_to_gives_the_output_bias_and_finite_gradients(causal, need_weights):
    ours = module(causal=causal)
    nobody = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    x = inputs(BATCH, TOKENS, EMB_DIM).requires_grad_()
    output = ours(x, key_padding_mask=nobody, need_weights=need_weights)
    output = output[0] if need_weights else output
    close(output, ours.output.bias.expand_as(output))
    (output**2).sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters()) and x.grad.isfinite().all()


def test_dropout_acts_in_training_only():
    ours = module(dropout=0.5)
    x = inputs(BATCH, TOKENS, EMB_DIM)
    assert not torch.allclose(ours(x), ours(x))
    ours.eval()
    close(ours(x), ours(x))
    _, weights = ours.train()(x, need_weights=True)
    assert (weights == 0).any()


def test_rotary_scores_depend_on_distance_only():
    ours = module(causal=True, rotary=Rotary(EMB_DIM // N_HEADS))
    x = inputs(BATCH, TOKENS, EMB_DIM)
    close(ours(x), ours(x, positions=torch.arange(20, 20 + TOKENS)), 1e-4)
    assert not torch.allclose(ours(x), ours(x, positions=3 * torch.arange(TOKENS)), atol=1e-3)


# --- KeyValueCache


@settings(deadline=None, max_examples=20)
@given(
    cuts=st.lists(st.integers(1, TOKENS - 1), max_size=TOKENS - 1, unique=True),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    rotary=st.booleans(),
    window=st.sampled_from([None, 1, 3, 20]),
)
@torch.no_grad()
def test_reading_in_pieces_through_a_cache_gives_what_reading_at_once_gives(cuts, n_kv_heads, rotary, window):
    rotation = Rotary(EMB_DIM // N_HEADS) if rotary else None
    ours = module(causal=True, n_kv_heads=n_kv_heads, rotary=rotation, window=window)
    x = inputs(BATCH, TOKENS, EMB_DIM)
    cache = KeyValueCache(TOKENS)
    bounds = [0, *sorted(cuts), TOKENS]
    pieces = [ours(x[:, a:b], cache=cache) for a, b in itertools.pairwise(bounds)]
    close(torch.cat(pieces, dim=1), ours(x))
    assert cache.length == TOKENS
    assert cache.contents()[0].shape == (BATCH, n_kv_heads, TOKENS, EMB_DIM // N_HEADS)


@torch.no_grad()
def test_a_left_padded_batch_through_a_cache_gives_what_each_row_gives_alone():
    ours = module(causal=True, rotary=Rotary(EMB_DIM // N_HEADS))
    lengths = [7, 4, 2]
    rows = [inputs(1, n, EMB_DIM, seed=n) for n in lengths]
    x = torch.cat([F.pad(row, (0, 0, TOKENS - n, 0)) for row, n in zip(rows, lengths, strict=True)])
    real = torch.arange(TOKENS) >= TOKENS - torch.tensor(lengths)[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache = KeyValueCache(TOKENS)
    first = ours(x[:, :5], key_padding_mask=real[:, :5], positions=positions[:, :5], cache=cache)
    steps = [
        ours(
            x[:, t : t + 1], key_padding_mask=real[:, : t + 1], positions=positions[:, t : t + 1], cache=cache
        )
        for t in range(5, TOKENS)
    ]
    output = torch.cat((first, *steps), dim=1)
    for row, n, found in zip(rows, lengths, output, strict=True):
        close(found[TOKENS - n :], ours(row)[0])


@torch.no_grad()
def test_cross_attention_projects_its_source_once():
    ours = module(kv_dim=10, n_kv_heads=2, key_norm=nn.RMSNorm(EMB_DIM // N_HEADS))
    x, context = inputs(BATCH, 4, EMB_DIM), inputs(BATCH, TOKENS, 10, seed=1)
    cache = KeyValueCache(TOKENS)
    wanted = ours(x, context, key_padding_mask=PADDING)
    close(ours(x, context, key_padding_mask=PADDING, cache=cache), wanted)
    ours.key_value.weight.zero_()  # nothing depends on it any more
    close(ours(x, key_padding_mask=PADDING, cache=cache), wanted)
    close(ours(x[:, 2:], key_padding_mask=PADDING, cache=cache), wanted[:, 2:])


@torch.no_grad()
def test_crop_goes_back_and_reset_starts_anew_also_with_another_batch():
    ours = module(causal=True)
    x = inputs(BATCH, TOKENS, EMB_DIM)
    cache = KeyValueCache(TOKENS)
    ours(x, cache=cache)
    cache.crop(4)
    close(ours(x[:, 4:], cache=cache), ours(x)[:, 4:])
    cache.reset()
    assert cache.length == 0
    close(ours(x[:2], cache=cache), ours(x[:2]))


@torch.no_grad()
def test_reorder_follows_beams_and_drops_finished_rows():
    ours = module(causal=True)
    x = inputs(BATCH, TOKENS, EMB_DIM)
    for rows in ([2, 2, 0], [1], [0, 0, 1, 1, 2, 2]):
        order = torch.tensor(rows)
        cache = KeyValueCache(TOKENS)
        ours(x[:, :5], cache=cache)
        cache.reorder(order)
        close(ours(x[order, 5:], cache=cache), ours(x[order])[:, 5:])


def test_buffers_are_allocated_once_and_counted():
    cache = KeyValueCache(8)
    assert cache.n_bytes == 0
    keys = inputs(2, 3, 5, 4).to(torch.bfloat16)
    stored, _ = cache.append(keys, keys)
    assert stored.dtype == torch.bfloat16
    assert cache.n_bytes == 2 * (2 * 3 * 8 * 4) * 2
    grown, _ = cache.append(keys[:, :, :3], keys[:, :, :3])
    assert grown.data_ptr() == stored.data_ptr()


def test_a_full_cache_refuses_and_stays_as_it_is():
    ours, cache = module(causal=True), KeyValueCache(6)
    with torch.no_grad():
        ours(inputs(BATCH, 5, EMB_DIM), cache=cache)
        with pytest.raises(ValueError, match="max_length=6"):
            ours(inputs(BATCH, 2, EMB_DIM), cache=cache)
        assert cache.length == 5
        with pytest.raises(ValueError, match="key_padding_mask"):
            ours(inputs(BATCH, 1, EMB_DIM), cache=cache, key_padding_mask=PADDING[:, :1])
        assert cache.length == 5


KEYS = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: KeyValueCache(0), "max_length"),
        (lambda cache: cache.append(KEYS, KEYS[:, :, :3]), "values must be"),
        (
            lambda cache: cache.append(KEYS, KEYS.double()),
            r"values must be torch.float32 .*got torch.float64",
        ),
        (
            lambda cache: cache.append(KEYS.double(), KEYS.double()),
            "keys must fit .*float32.*got torch.float64",
        ),
        (lambda cache: cache.append(KEYS.half(), KEYS.half()), "keys must fit"),
        (lambda cache: cache.append(KEYS[0], KEYS[0]), r"keys must be \(batch, .*got \(3, 4, 5\)"),
        (lambda cache: cache.append(KEYS[:, :, :0], KEYS[:, :, :0]), "keys must be"),
        (lambda cache: cache.append(KEYS[:1], KEYS[:1]), "keys must fit the buffers"),
        (lambda cache: cache.append(KEYS.clone().requires_grad_(), KEYS), "no_grad"),
        (lambda cache: cache.append(KEYS[:, :, [0] * 7], KEYS[:, :, [0] * 7]), "exceed max_length=10"),
        (lambda cache: cache.crop(5), "length"),
        (lambda cache: cache.crop(-1), "length"),
        (lambda cache: cache.reorder(torch.tensor([0, 2])), "rows"),
        (lambda cache: cache.reorder(torch.tensor([0.5])), "rows"),
        (lambda cache: KeyValueCache(3).contents(), "empty"),
        (lambda cache: KeyValueCache(3).reorder(torch.tensor([0])), "empty"),
    ],
)
def test_cache_refuses(call, message):
    cache = KeyValueCache(10)
    cache.append(KEYS, KEYS)
    with pytest.raises(ValueError, match=message):
        call(cache)


# --- Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emb_dim": 25}, "not divisible by n_heads"),
        ({"n_kv_heads": 3}, "not divisible by n_kv_heads"),
        ({"n_kv_heads": 0}, "n_kv_heads"),
        ({"n_heads": 0}, "n_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"window": 3}, "causal"),
        ({"window": 0, "causal": True}, "window"),
        ({"kv_dim": 10, "causal": True}, "cross-attention"),
        ({"kv_dim": 10, "rotary": nn.Identity()}, "cross-attention"),
    ],
)
def test_construction_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**({"emb_dim": EMB_DIM, "n_heads": N_HEADS} | options))


@pytest.mark.parametrize("name", ["emb_dim", "n_heads", "n_kv_heads", "head_dim", "window", "kv_dim"])
@pytest.mark.parametrize("wrong", [3.0, True, "3"])
def test_construction_refuses_what_is_no_whole_number(name, wrong):
    causal = name == "window"
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        MultiHeadAttention(**({"emb_dim": EMB_DIM, "n_heads": N_HEADS, "causal": causal} | {name: wrong}))


X = torch.zeros(BATCH, TOKENS, EMB_DIM)
BOOL = torch.ones(BATCH, TOKENS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({}, {"x": X[0]}, ValueError, "x must be"),
        ({"causal": True}, {"x": X[0], "cache": KeyValueCache(9)}, ValueError, "x must be"),
        ({"causal": True}, {"x": X[:, :0], "cache": KeyValueCache(9)}, ValueError, "x must be"),
        ({}, {"x": X[:, :0]}, ValueError, "x must be"),
        ({"kv_dim": EMB_DIM}, {"context": X[:, :0]}, ValueError, "context must be"),
        ({}, {"score_bias": causal_mask(TOKENS)}, TypeError, "score_bias must be a float tensor"),
        ({}, {"score_bias": torch.zeros(N_HEADS, TOKENS)}, ValueError, "score_bias must broadcast"),
        ({}, {"score_bias": torch.zeros(BATCH, TOKENS, TOKENS)}, ValueError, "score_bias must broadcast"),
        ({}, {"x": X[..., :5]}, ValueError, "x must be"),
        ({}, {"context": X}, ValueError, "kv_dim"),
        ({}, {"cache": KeyValueCache(9)}, ValueError, "causal=True"),
        ({}, {"key_padding_mask": BOOL[:, :5]}, ValueError, "key_padding_mask"),
        ({}, {"key_padding_mask": BOOL.long()}, TypeError, "key_padding_mask"),
        ({}, {"attention_mask": causal_mask(5)}, ValueError, "attention_mask"),
        ({}, {"attention_mask": BOOL[:, None].expand(-1, TOKENS, -1)}, ValueError, "attention_mask"),
        ({}, {"attention_mask": causal_mask(TOKENS).float()}, TypeError, "attention_mask"),
        ({}, {"positions": torch.arange(5)}, ValueError, "positions"),
        ({"kv_dim": 10}, {}, ValueError, "needs context"),
        ({"kv_dim": 10}, {"context": X}, ValueError, "context must be"),
        ({"kv_dim": EMB_DIM}, {"context": X[:1]}, ValueError, "context must be"),
    ],
)
def test_forward_refuses(options, call, error, message):
    with pytest.raises(error, match=message):
        module(**options)(**({"x": X} | call))


@torch.no_grad()
def test_more_positions_than_the_rotation_knows_are_refused_and_not_cached():
    ours, cache = module(causal=True, rotary=Rotary(EMB_DIM // N_HEADS, context_length=9)), KeyValueCache(20)
    ours(X, cache=cache)
    with pytest.raises(ValueError, match="context_length=9"):
        ours(X, cache=cache)
    assert cache.length == TOKENS


@torch.no_grad()
def test_a_cache_of_other_sequences_is_refused():
    ours, cross, cache = module(causal=True), module(kv_dim=EMB_DIM), KeyValueCache(9)
    ours(X, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 3 sequences"):
        ours(X[:2, :1], cache=cache)
    # Another context would not be read, whatever its length.
    for context in (X[:, :4], X, X + 1):
        with pytest.raises(ValueError, match="context must be None: the cache holds 7"):
            cross(X, context, cache=cache)
    with pytest.raises(TypeError, match=r"length must be an int, got 1\.0"):
        cache.crop(1.0)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"n_kv_heads": 2, "causal": True}])
def test_the_layer_can_be_exported_as_a_graph(options):
    ours = module(**options).eval()
    x = inputs(BATCH, TOKENS, EMB_DIM)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({1: length},))
    longer = inputs(BATCH, 11, EMB_DIM)
    close(exported.module()(longer), ours(longer))


# --- a bias of the scores


EMPTY_ROW = (torch.arange(TOKENS)[:, None] + torch.arange(TOKENS)) % 3 > 0
EMPTY_ROW[4] = False
BIASES = {
    "a number": (),
    "keys": (TOKENS,),
    "pairs": (TOKENS, TOKENS),
    "heads and pairs": (N_HEADS, TOKENS, TOKENS),
    "heads, all queries alike": (N_HEADS, 1, TOKENS),
    "everything": (BATCH, N_HEADS, TOKENS, TOKENS),
}


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 3}, {"n_kv_heads": 2}])
@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_is_added_to_the_scaled_scores(shape, options, masked):
    ours, x = module(qkv_bias=True, **options), inputs(BATCH, TOKENS, EMB_DIM)
    biases = [inputs(1, *shape, seed=1)[0].requires_grad_() for _ in range(3)]
    call = {"key_padding_mask": PADDING, "attention_mask": EMPTY_ROW} if masked else {}
    fused = ours(x, score_bias=biases[0], **call)
    explicit, weights = ours(x, score_bias=biases[1], need_weights=True, **call)
    # By hand: the formula, head by head.
    query, key, value = (
        ours.qkv(x)
        .unflatten(2, (-1, ours.head_dim))
        .transpose(1, 2)
        .split((N_HEADS, ours.n_kv_heads, ours.n_kv_heads), dim=1)
    )
    key, value = (y.repeat_interleave(N_HEADS // ours.n_kv_heads, dim=1) for y in (key, value))
    scores = query @ key.transpose(2, 3) / ours.head_dim**0.5 + biases[2]
    allowed = torch.ones(BATCH, N_HEADS, TOKENS, TOKENS, dtype=torch.bool)
    if "causal" in options:
        allowed = allowed & causal_mask(TOKENS, window=options.get("window"))
    if masked:
        allowed = allowed & PADDING[:, None, None] & EMPTY_ROW
    wanted = torch.where(allowed, scores, -1e30).softmax(-1) * allowed
    by_hand = ours.output((wanted @ value).transpose(1, 2).flatten(2))
    close(weights, wanted)
    for output, bias in zip((fused, explicit, by_hand), biases, strict=True):
        close(output, by_hand)
        output.pow(2).sum().backward()
        close(bias.grad, biases[0].grad, 1e-4)


@pytest.mark.parametrize("mask", [torch.arange(TOKENS) < 4, torch.tensor(True), torch.tensor(False)])
@pytest.mark.parametrize("bias", [None, torch.zeros(()), torch.zeros(TOKENS)])
def test_masks_of_few_dimensions_broadcast(mask, bias):
    ours, x = module(), inputs(BATCH, TOKENS, EMB_DIM)
    wanted = ours(x, attention_mask=mask.expand(BATCH, N_HEADS, TOKENS, TOKENS))
    close(ours(x, attention_mask=mask, score_bias=bias), wanted)
    close(ours(x, attention_mask=mask, score_bias=bias, need_weights=True)[0], wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    "bias", [AlibiBias(N_HEADS), RelativePositionBias(N_HEADS, 8, 16, bidirectional=False)]
)
def test_a_bias_of_distances_goes_through_a_cache_and_a_window(bias):
    x, where, cache = inputs(BATCH, TOKENS, EMB_DIM), torch.arange(TOKENS), KeyValueCache(TOKENS)
    for window in (None, 4):
        ours, cache = module(causal=True, window=window, n_kv_heads=2), KeyValueCache(TOKENS)
        whole = ours(x, score_bias=bias(where, where))
        steps, start = [], 0
        for part in x.split((3, 1, 1, 2), dim=1):
            end = start + part.shape[1]
            steps.append(ours(part, cache=cache, score_bias=bias(where[start:end], where[:end])))
            start = end
        close(torch.cat(steps, dim=1), whole)
        assert not torch.allclose(whole, ours(x))


@pytest.mark.parametrize("is_decoder", [False, True])
def test_with_t5s_bias_the_layer_is_t5s_attention(is_decoder):
    config = transformers.T5Config(
        d_model=EMB_DIM, d_kv=8, num_heads=N_HEADS, dropout_rate=0.0, is_decoder=is_decoder
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = module(head_dim=8, causal=is_decoder, out_bias=False)
    bias = RelativePositionBias(N_HEADS, bidirectional=not is_decoder)
    with torch.no_grad():  # T5 does not divide by the root of the width
        ours.qkv.weight.copy_(torch.cat((8**0.5 * theirs.q.weight, theirs.k.weight, theirs.v.weight)))
        ours.output.weight.copy_(theirs.o.weight)
        bias.weight.copy_(theirs.relative_attention_bias.weight)
    x, where = inputs(BATCH, 40, EMB_DIM), torch.arange(40)
    hidden = torch.zeros(40, 40).masked_fill(~causal_mask(40), -torch.inf)[None, None] if is_decoder else None
    output, reference = ours(x, score_bias=bias(where, where)), theirs(x, mask=hidden)[0]
    close(output, reference, 2e-5)
    output.pow(2).sum().backward()
    reference.pow(2).sum().backward()
    close(bias.weight.grad, theirs.relative_attention_bias.weight.grad, 1e-3)
    close(ours.output.weight.grad, theirs.o.weight.grad, 1e-3)


@pytest.mark.parametrize("n_heads", [4, 6])
def test_with_alibi_the_layer_is_blooms_attention(n_heads):
    config = transformers.BloomConfig(
        hidden_size=EMB_DIM, n_head=n_heads, attention_dropout=0.0, hidden_dropout=0.0
    )
    theirs = BloomAttention(config, layer_idx=0).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours, bias = MultiHeadAttention(EMB_DIM, n_heads, causal=True, qkv_bias=True), AlibiBias(n_heads)
    with torch.no_grad():  # Bloom's rows are query, key and value of head 0, then those of head 1, ...
        for kind in ("weight", "bias"):
            rows = getattr(theirs.query_key_value, kind).unflatten(0, (n_heads, 3, -1)).transpose(0, 1)
            getattr(ours.qkv, kind).copy_(rows.flatten(0, 2))
        ours.output.load_state_dict(theirs.dense.state_dict())
    x, where = inputs(BATCH, 20, EMB_DIM), torch.arange(20)
    alibi = build_alibi_tensor(torch.ones(BATCH, 20), n_heads, torch.float32)
    hidden = torch.zeros(20, 20).masked_fill(~causal_mask(20), -torch.inf)[None, None]
    reference, _ = theirs(x, residual=torch.zeros_like(x), alibi=alibi, attention_mask=hidden)
    close(ours(x, score_bias=bias(where, where)), reference, 2e-5)


def test_a_layer_with_a_bias_can_be_exported_and_compiled():
    ours, bias = module(causal=True).eval(), AlibiBias(N_HEADS)

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = ours, bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            where = torch.arange(x.shape[1], device=x.device)
            return self.layer(x, score_bias=self.bias(where, where))

    model, x = Biased(), inputs(BATCH, TOKENS, EMB_DIM)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    longer = inputs(BATCH, 11, EMB_DIM)
    close(exported.module()(longer), model(longer))
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
