"""GRU, encoder-decoder, attention, and the two ways of decoding; oracles are torch, plain loops and enumeration."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.model.seq2seq import GRU, AdditiveAttention, EncoderDecoder, GRUCell, beam_decode, greedy_decode

START, END = 1, 2


def a_model(attention_size: int | None) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(9, embedding_size=6, hidden_size=5, attention_size=attention_size).eval()


BOTH = pytest.mark.parametrize("attention_size", [None, 4], ids=["fixed", "attention"])


def everything(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, 9, (rows, length)), torch.ones(rows, length, dtype=torch.bool)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_cell_equals_torch_in_values_and_gradients(batch_size, input_size, hidden_size):
    reference, ours = nn.GRUCell(input_size, hidden_size), GRUCell(input_size, hidden_size)
    ours.load_state_dict(reference.state_dict())
    inputs, hidden = torch.randn(batch_size, input_size), torch.randn(batch_size, hidden_size)
    a, b = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    expected, found = reference(a, hidden), ours(b, hidden)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)


def test_layers_equal_torch_bidirectional_on_rows_of_different_lengths():
    torch.manual_seed(1)
    reference = nn.GRU(3, 4, batch_first=True, bidirectional=True)
    inputs, lengths = torch.randn(4, 7, 3), torch.tensor([7, 1, 3, 5])
    mask = torch.arange(7) < lengths[:, None]
    packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    states, last = reference(packed)
    states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
    for direction, ending in enumerate(("_l0", "_l0_reverse")):
        layer = GRU(3, 4, reverse=bool(direction))
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        layer.cell.load_state_dict({name: getattr(reference, name + ending) for name in names})
        ours, ours_last = layer(inputs, mask)
        torch.testing.assert_close(ours[mask], states[..., 4 * direction : 4 * direction + 4][mask])
        torch.testing.assert_close(ours_last, last[direction])


@torch.no_grad()
def test_attention_equals_the_formula_in_loops():
    torch.manual_seed(2)
    attention = AdditiveAttention(3, 4, 5)
    query, memory, lengths = torch.randn(2, 3), torch.randn(2, 6, 4), (6, 2)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    context, weights = attention(query, attention.key(memory), memory, mask)
    for row, length in enumerate(lengths):
        hidden = [attention.query(query[row]) + attention.key(memory[row, j]) for j in range(length)]
        scores = [math.exp(float(attention.score(torch.tanh(values)))) for values in hidden]
        expected = [score / sum(scores) for score in scores] + [0.0] * (6 - length)
        torch.testing.assert_close(weights[row], torch.tensor(expected))
        torch.testing.assert_close(context[row], torch.tensor(expected) @ memory[row])


@BOTH
@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), extra=st.integers(0, 3))
def test_padding_does_not_change_results(attention_size, lengths, extra):
    model, width = a_model(attention_size), max(lengths) + extra
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids, targets = torch.randint(0, 9, mask.shape), torch.randint(0, 9, (len(lengths), 5))
    together = model(ids, mask, targets)
    for row, length in enumerate(lengths):
        rows = slice(row, row + 1)
        alone = model(ids[rows, :length], mask[rows, :length], targets[rows])
        torch.testing.assert_close(together[rows], alone)


@BOTH
def test_gradient_does_not_reach_padding(attention_size):
    model = a_model(attention_size)
    mask = torch.tensor([[True, True, False]])
    model(torch.tensor([[3, 4, 8]]), mask, torch.tensor([[1, 5]])).sum().backward()
    gradient = model.source_embedding.weight.grad
    assert gradient[8].abs().max() == 0 and gradient[3].abs().max() > 0


@BOTH
def test_steps_equal_teacher_forcing_and_later_targets_do_not_matter(attention_size):
    model, (ids, mask) = a_model(attention_size), everything(3, 7)
    targets = torch.randint(0, 9, (3, 6))
    logits, state = model(ids, mask, targets), model.encode(ids, mask)
    assert logits.shape == (3, 6, 9)
    for position in range(6):
        step, state = model.decode_step(targets[:, position], state)
        torch.testing.assert_close(step, logits[:, position])
        assert all(len(tensor) == 3 for tensor in state.values())
    other = targets.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 9
    torch.testing.assert_close(model(ids, mask, other)[:, :4], logits[:, :4])


@BOTH
def test_permuting_the_batch_permutes_the_results(attention_size):
    model, (ids, mask) = a_model(attention_size), everything(4, 5)
    targets, order = torch.randint(0, 9, (4, 3)), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        model(ids[order], mask[order], targets[order]), model(ids, mask, targets)[order]
    )


def test_a_fixed_vector_has_the_same_size_for_every_input_and_attention_keeps_every_position():
    for length in (1, 9):
        assert a_model(None).encode(*everything(2, length))["context"].shape == (2, 10)
        assert a_model(4).encode(*everything(2, length))["memory"].shape == (2, length, 10)


@pytest.mark.parametrize("attention_size", [None, 16], ids=["fixed", "attention"])
def test_a_few_steps_of_training_learn_to_copy(attention_size):
    torch.manual_seed(0)
    model = EncoderDecoder(9, 16, 32, attention_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        ids, mask = everything(32, 2)
        targets = torch.cat([torch.full((32, 1), START), ids, torch.full((32, 1), END)], dim=1)
        loss = nn.functional.cross_entropy(
            model(ids, mask, targets[:, :-1]).flatten(0, 1), targets[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, mask = everything(20, 2)
    assert greedy_decode(model, ids, mask, START, END, 5) == ids.tolist()


class Table:
    """Scores of the next symbol depend on the symbol before and on how many were written."""

    def __init__(self, seed: int, n_symbols: int = 4) -> None:
        self.logits = 2 * torch.randn(6, n_symbols, n_symbols, generator=torch.Generator().manual_seed(seed))

    def encode(self, source_ids, source_mask):
        return {"step": torch.zeros(len(source_ids), dtype=torch.int64)}

    def decode_step(self, previous_ids, state):
        return self.logits[state["step"], previous_ids], {"step": state["step"] + 1}

    def score(self, written) -> float:
        steps = enumerate(zip((START, *written), written, strict=False))
        return sum(float(self.logits[t, a].double().log_softmax(0)[b]) for t, (a, b) in steps)


def every_sequence(model: Table, max_length: int) -> list[tuple[float, tuple[int, ...]]]:
    """Return all sequences with their log-probability, best first; only those of full length may lack the end."""
    symbols = [s for s in range(model.logits.shape[1]) if s != END]
    found = []
    for length in range(max_length + 1):
        for ids in product(symbols, repeat=length):
            found.append((model.score((*ids, END) if length < max_length else ids), ids))
    return sorted(found, reverse=True)


ONE = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(20))
def test_beam_that_holds_everything_finds_the_exact_ranking(seed):
    model = Table(seed)
    expected = every_sequence(model, max_length=4)
    found = beam_decode(model, *ONE, START, END, max_length=4, beam_size=len(expected))
    assert math.isclose(sum(math.exp(h.log_probability) for h in found), 1, rel_tol=1e-9)
    assert [h.ids for h in found] == [ids for _, ids in expected]
    for hypothesis, (score, ids) in zip(found, expected, strict=True):
        assert math.isclose(hypothesis.log_probability, score, rel_tol=1e-6)
        assert hypothesis.finished == (len(ids) < 4)


@pytest.mark.parametrize("seed", range(20))
def test_beam_of_one_equals_greedy_and_scores_are_those_of_the_model(seed):
    model = Table(seed)
    greedy = greedy_decode(model, *ONE, START, END, max_length=5)[0]
    (best,) = beam_decode(model, *ONE, START, END, max_length=5, beam_size=1)
    assert list(best.ids) == greedy
    for hypothesis in beam_decode(model, *ONE, START, END, max_length=5, beam_size=3):
        written = (*hypothesis.ids, END) if hypothesis.finished else hypothesis.ids
        assert math.isclose(hypothesis.log_probability, model.score(written), rel_tol=1e-6)


@BOTH
def test_decoding_a_real_model_beam_of_one_equals_greedy_and_batches_do_not_matter(attention_size):
    model = a_model(attention_size)
    with torch.no_grad():
        model.output.weight *= 8  # decided outputs, some of which end early
    ids, mask = everything(6, 5)
    mask[1, 3:] = mask[4, 1:] = False
    together = greedy_decode(model, ids, mask, START, END, max_length=8)
    for row, written in enumerate(together):
        one = ids[row : row + 1], mask[row : row + 1]
        assert greedy_decode(model, *one, START, END, max_length=8) == [written]
        assert list(beam_decode(model, *one, START, END, 8, beam_size=1)[0].ids) == written
        beam = beam_decode(model, *one, START, END, 8, beam_size=4)
        assert [h.log_probability for h in beam] == sorted((h.log_probability for h in beam), reverse=True)
        assert len({(h.ids, h.finished) for h in beam}) == 4
        for hypothesis in beam:  # its score is what teacher forcing gives to it
            written_out = [*hypothesis.ids, END] if hypothesis.finished else list(hypothesis.ids)
            logits = model(*one, torch.tensor([[START, *written_out[:-1]]]))[0].double()
            expected = float(logits.log_softmax(1)[range(len(written_out)), written_out].sum().detach())
            assert math.isclose(hypothesis.log_probability, expected, abs_tol=1e-4)


def test_output_stops_before_the_end_symbol_or_at_the_limit():
    model = Table(0)
    model.logits[:, :, 0] = 100.0
    assert greedy_decode(model, *ONE, START, END, max_length=3) == [[0, 0, 0]]
    assert not beam_decode(model, *ONE, START, END, 3, 1)[0].finished
    model.logits[:, :, END] = 200.0
    assert greedy_decode(model, *ONE, START, END, max_length=3) == [[]]
    assert beam_decode(model, *ONE, START, END, 3, 1)[0].finished


IDS, MASK = torch.full((2, 3), 4), torch.ones(2, 3, dtype=torch.bool)
TARGETS = torch.full((2, 4), 4)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((IDS[0], MASK, TARGETS), "source_ids must be .* got torch.int64 \\(3,\\)"),
        ((IDS[:, :0], MASK[:, :0], TARGETS), "source_ids .* not empty"),
        ((IDS.float(), MASK, TARGETS), "source_ids must be .* got torch.float32"),
        ((IDS + 5, MASK, TARGETS), "source_ids must be ids from 0 to 8, got 9 to 9"),
        ((IDS - 5, MASK, TARGETS), "source_ids must be ids .* got -1"),
        ((IDS, MASK[:, :2], TARGETS), "source_mask must be .* got torch.bool \\(2, 2\\)"),
        ((IDS, MASK.int(), TARGETS), "source_mask must be bool .* got torch.int32"),
        ((IDS, torch.tensor([[True] * 3, [False] * 3]), TARGETS), "must not be empty"),
        ((IDS, MASK, TARGETS[0]), "target_ids must be .* got torch.int64 \\(4,\\)"),
        ((IDS, MASK, TARGETS[:1]), "target_ids has 1 rows for 2 inputs"),
        ((IDS, MASK, TARGETS[:, :0]), "target_ids .* not empty"),
        ((IDS, MASK, TARGETS[..., None]), "target_ids must be .* got torch.int64 \\(2, 4, 1\\)"),
        ((IDS, MASK, TARGETS + 5), "target_ids must be ids"),
    ],
)
def test_bad_input_of_the_model_is_named(attention_size, arguments, words):
    with pytest.raises(ValueError, match=words):
        a_model(attention_size)(*arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GRUCell(0, 4), "input_size must be at least 1, got 0"),
        (lambda: GRU(4, -1), "hidden_size must be at least 1, got -1"),
        (lambda: AdditiveAttention(3, 3, 0), "attention_size must be at least 1, got 0"),
        (lambda: EncoderDecoder(0, 4, 4), "vocab_size must be at least 1, got 0"),
        (lambda: EncoderDecoder(4, 4, 4, attention_size=0), "attention_size must be at least 1, got 0"),
        (lambda: greedy_decode(Table(0), *ONE, START, END, 0), "max_length must be at least 1, got 0"),
        (lambda: beam_decode(Table(0), *ONE, START, END, 4, 0), "beam_size must be at least 1, got 0"),
        (lambda: beam_decode(Table(0), *ONE, START, END, 0, 1), "max_length must be at least 1, got 0"),
        (lambda: beam_decode(Table(0), IDS, MASK, START, END, 4, 1), "source_ids must be one row, got 2"),
        (lambda: a_model(4).decode_step(IDS, a_model(4).encode(IDS, MASK)), "previous_ids"),
        (lambda: a_model(4).decode_step(IDS[:1, 0], a_model(4).encode(IDS, MASK)), "previous_ids has 1 rows"),
    ],
)
def test_bad_sizes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_gives_the_rounded_result(attention_size, dtype):
    model, (source_ids, source_mask) = a_model(attention_size), everything(3, 6)
    expected = model(source_ids, source_mask, source_ids)
    logits = model.to(dtype)(source_ids, source_mask, source_ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=8 * torch.finfo(dtype).eps, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_additive_attention_in_half_precision_bears_large_vectors_and_scores(dtype):
    torch.manual_seed(0)
    attention, mask = AdditiveAttention(4, 6, 64), torch.tensor([[True, True, True, False]])
    attention.score.weight.mul_(1000)  # scores of thousands, of which only differences count
    query, memory = (1000 * torch.randn(1, 4)).to(dtype), (1000 * torch.randn(1, 4, 6)).to(dtype)
    attention.to(dtype)
    mean, weights = attention(query, attention.key(memory), memory, mask)
    exact = AdditiveAttention(4, 6, 64).double()
    exact.load_state_dict(attention.state_dict())
    _, expected = exact(query.double(), exact.key(memory.double()), memory.double(), mask)
    assert mean.isfinite().all() and weights[0, 3] == 0
    torch.testing.assert_close(weights.double(), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_model_does_not_write(broken):
    model = a_model(4)
    with torch.no_grad():
        model.output.weight[3] = broken
    source = torch.tensor([[3, 4, 5]])
    mask = torch.ones_like(source, dtype=torch.bool)
    with pytest.raises(ValueError, match="logits must be numbers or -inf"):
        greedy_decode(model, source, mask, 1, 2, 5)
    with pytest.raises(ValueError, match="logits must be numbers or -inf"):
        beam_decode(model, source, mask, 1, 2, 5, 2)
