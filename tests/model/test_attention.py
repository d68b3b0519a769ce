"""`shared.model.attention` against torch's own attention, and what must hold for every mask, cache and head count."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.model.attention import (
    KeyValueCache,
    MultiHeadAttention,
    causal_mask,
    check_mask,
    scaled_dot_product_attention,
)

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
    [((3, 2), "n_queries"), ((0,), "n_queries"), ((3, 3, 0), "window")],
)
def test_causal_mask_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
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
    close(ours(x[:, 2:], context, key_padding_mask=PADDING, cache=cache), wanted[:, 2:])


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
        (lambda cache: cache.append(KEYS, KEYS[:, :, :3]), "keys have shape"),
        (lambda cache: cache.append(KEYS[:1], KEYS[:1]), "do not fit"),
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


X = torch.zeros(BATCH, TOKENS, EMB_DIM)
BOOL = torch.ones(BATCH, TOKENS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({}, {"x": X[0]}, ValueError, "x must be"),
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
    with pytest.raises(ValueError, match="the cache holds 7"):
        cross(X, X[:, :4], cache=cache)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"n_kv_heads": 2, "causal": True}])
def test_the_layer_can_be_exported_as_a_graph(options):
    ours = module(**options).eval()
    x = inputs(BATCH, TOKENS, EMB_DIM)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({1: length},))
    longer = inputs(BATCH, 11, EMB_DIM)
    close(exported.module()(longer), ours(longer))
