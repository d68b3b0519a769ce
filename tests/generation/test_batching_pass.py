"""A pass over pieces of many texts: the logits of each text alone, in any cut and any order."""

import random

import pytest
import torch
from torch import nn

from shared.generation.batching_pass import (
    CALL_COST,
    BatchedPass,
    CacheRows,
    Piece,
    group_mask,
    group_pieces,
    untouched_zeros,
)
from shared.model.attention import causal_mask
from tests.generation.decoders import MODELS, VARIANTS, Told, build, random_prompts

VARIED = VARIANTS | {
    "sinusoidal": {"positions": "sinusoidal"},
    "interleaved": {"positions": "rotary", "rope_interleaved": True},
    "one head for keys": {"n_heads": 4, "n_kv_heads": 1, "qk_norm": True, "positions": "rotary"},
}


@pytest.mark.parametrize("name", VARIED)
@torch.no_grad()
def test_pieces_give_the_logits_of_whole_texts(name):
    model = build(**VARIED[name]).eval()
    rng = random.Random(1)
    texts = random_prompts(rng, 6, longest=30)
    cache = CacheRows(model, 8, 32)
    read = BatchedPass(model, cache)
    rows = rng.sample(range(8), 6)
    held = [0] * 6
    while any(held[i] < len(text) for i, text in enumerate(texts)):
        # Some texts, in any order, each with a piece of any length.
        going = [i for i, text in enumerate(texts) if held[i] < len(text) and rng.random() < 0.8]
        rng.shuffle(going)
        pieces = [
            Piece(
                rows[i],
                held[i],
                texts[i][held[i] : held[i] + rng.choice([1, 1, 1, 5])],
                rng.random() < 0.7,
            )
            for i in going
        ]
        if not pieces:
            continue
        logits = iter(read(pieces))
        for i, piece in zip(going, pieces, strict=True):
            held[i] = piece.end
            if piece.needs_logits:
                expected = model(torch.tensor([texts[i][: held[i]]]))[0, -1]
                assert (next(logits) - expected).abs().max() < 1e-9
        assert next(logits, None) is None


@torch.no_grad()
def test_a_copied_row_goes_on_like_its_source_and_the_source_stays():
    model = MODELS["llama"].eval()
    cache = CacheRows(model, 3, 16)
    read = BatchedPass(model, cache)
    read([Piece(0, 0, [1, 2, 3, 4, 5])])
    cache.copy(0, 2, 3)
    first, second = read([Piece(0, 5, [6]), Piece(2, 3, [9, 8])])
    assert (first - model(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0, -1]).abs().max() < 1e-9
    assert (second - model(torch.tensor([[1, 2, 3, 9, 8]]))[0, -1]).abs().max() < 1e-9
    assert not cache.storage[:, :, 1].any()
    MODELS["llama"].train()


def test_groups_hold_neighbours_that_read_one_token_each():
    pieces = [Piece(0, 5, [1]), Piece(1, 7, [1]), Piece(3, 7, [1]), Piece(4, 0, [1, 2]), Piece(5, 2, [1])]
    assert [[piece.row for piece in group] for group in group_pieces(pieces)] == [[0, 1], [3], [4], [5]]
    assert group_pieces([]) == []


def test_a_long_row_does_not_make_its_neighbours_read_for_nothing():
    lengths = [100] * 5 + [5000] + [100] * 6
    pieces = [Piece(row, length - 1, [1]) for row, length in enumerate(lengths)]
    assert list(map(len, group_pieces(pieces))) == [5, 1, 6]


def test_no_cut_into_groups_wastes_more_than_it_saves():
    rng = random.Random(2)
    for _ in range(200):
        pieces = [Piece(row, rng.choice([10, 300, 900]), [1]) for row in range(rng.randint(1, 20))]
        groups = group_pieces(pieces)
        assert [piece for group in groups for piece in group] == pieces
        for group in groups:
            longest = max(piece.end for piece in group)
            wasted = sum(longest - piece.end for piece in group)
            assert wasted <= CALL_COST * (len(group) - 1)


@pytest.mark.parametrize("window", [None, 3])
def test_masks_allow_what_the_causal_mask_of_the_whole_text_allows(window):
    device = torch.device("cpu")
    group = [Piece(0, 4, [1]), Piece(1, 6, [1]), Piece(2, 0, [1])]
    mask = group_mask(group, window, device)
    for row, piece in zip(mask[:, 0, 0], group, strict=True):
        expected = causal_mask(1, piece.end, window)[0]
        assert torch.equal(row[: piece.end], expected) and not row[piece.end :].any()
    assert torch.equal(group_mask([Piece(0, 2, [1, 1])], window, device), causal_mask(2, 4, window))
    assert group_mask(group[:1] * 2, None, device) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_untouched_zeros_are_zeros(dtype):
    zeros = untouched_zeros((2, 3, 5), dtype, torch.device("cpu"))
    assert zeros.shape == (2, 3, 5) and zeros.dtype == dtype and not zeros.any()
    zeros[1, 2] = 1
    assert zeros.sum() == 5


def test_a_model_of_another_kind_is_refused():
    class Block(nn.Module):
        pass

    model = build()
    with pytest.raises(ValueError, match="model must be a GPTModel"):
        BatchedPass(Told(torch.zeros(4)), CacheRows(model, 1, 4))
    model.blocks[1] = Block()
    with pytest.raises(ValueError, match="model must be a GPTModel"):
        BatchedPass(model, CacheRows(MODELS["gpt2"], 1, 4))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_cache_of_no_size_is_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        CacheRows(build(), *sizes)
