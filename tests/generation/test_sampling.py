"""`shared.generation.sampling` against transformers, by hand, and what must hold for every processor."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from shared.generation.engine import apply_processors, generate
from shared.generation.sampling import (
    LARGEST,
    SMALLEST,
    CountPenalty,
    MinP,
    NoRepeatNGram,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from tests.generation.decoders import random_gpt

# Every processor in a setting that changes something.
SAMPLES = [
    Temperature(0.6),
    TopK(4),
    TopP(0.7),
    MinP(0.2),
    Typical(0.6),
    RepetitionPenalty(1.7),
    CountPenalty(presence=0.5, frequency=0.3),
    NoRepeatNGram(2),
]
REFERENCES = {
    Temperature: reference.TemperatureLogitsWarper,
    TopK: reference.TopKLogitsWarper,
    TopP: reference.TopPLogitsWarper,
    MinP: reference.MinPLogitsWarper,
    Typical: reference.TypicalLogitsWarper,
    RepetitionPenalty: reference.RepetitionPenaltyLogitsProcessor,
    NoRepeatNGram: reference.NoRepeatNGramLogitsProcessor,
}
NUMBERS = {TopK: st.integers(1, 40), NoRepeatNGram: st.integers(1, 4)}
FACTORS = {Temperature: st.floats(0.05, 5), RepetitionPenalty: st.floats(0.1, 5)}
by_name = {"ids": lambda value: getattr(value, "__name__", type(value).__name__)}


@st.composite
def cases(draw, tied: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens so far and float64 logits, a few of them -inf; rounding errors of sums are far below the differences."""
    rows, vocab_size = draw(st.integers(1, 4)), draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = 3 * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)
    if tied:
        logits = logits.round()
    cut = torch.rand(rows, vocab_size, generator=generator) < draw(st.sampled_from([0, 0.3]))
    cut[:, 0] = False
    ids = torch.randint(min(vocab_size, 9), (rows, draw(st.integers(1, 15))), generator=generator)
    return ids, logits.masked_fill(cut, -math.inf)


def left(logits: torch.Tensor) -> torch.Tensor:
    return logits > -math.inf


# --- against transformers


@pytest.mark.parametrize("kind", REFERENCES, **by_name)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_equal_to_transformers(kind, data):
    setting = data.draw((NUMBERS | FACTORS).get(kind, st.floats(0.01, 0.99)))
    ids, logits = data.draw(cases(tied=kind is not TopP and data.draw(st.booleans())))
    ours, theirs = kind(setting)(ids, logits), REFERENCES[kind](setting)(ids, logits.clone())
    empty = ~left(theirs).any(dim=-1)  # where theirs leaves nothing, ours leaves the row alone
    assert torch.equal(ours[empty], logits[empty])
    assert torch.equal(left(ours[~empty]), left(theirs[~empty]))
    torch.testing.assert_close(ours[~empty].softmax(-1), theirs[~empty].softmax(-1), atol=1e-12, rtol=1e-9)


@settings(deadline=None, max_examples=80)
@given(case=cases(tied=True), p=st.floats(0.01, 0.99))
def test_top_p_keeps_ties_that_transformers_splits(case, p):
    ids, logits = case
    ours, theirs = left(TopP(p)(ids, logits)), left(reference.TopPLogitsWarper(p)(ids, logits))
    smallest = logits.masked_fill(~theirs, math.inf).amin(dim=-1, keepdim=True)
    assert torch.equal(ours, theirs | (logits == smallest))


def test_a_chain_is_transformers_chain():
    torch.manual_seed(0)
    ours = (RepetitionPenalty(1.3), Temperature(0.8), TopK(20), TopP(0.9), MinP(0.05))
    theirs = reference.LogitsProcessorList(
        [
            reference.RepetitionPenaltyLogitsProcessor(1.3),
            reference.TemperatureLogitsWarper(0.8),
            reference.TopKLogitsWarper(20),
            reference.TopPLogitsWarper(0.9),
            reference.MinPLogitsWarper(0.05),
        ]
    )
    for _ in range(100):
        ids, logits = torch.randint(50, (3, 10)), 3 * torch.randn(3, 50)
        torch.testing.assert_close(
            apply_processors(ours, ids, logits).softmax(-1), theirs(ids, logits.clone()).softmax(-1)
        )


# --- by hand

TOY = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0]]).log()  # probabilities 1/2, 1/4, 1/8, 1/16, 1/16
SO_FAR = torch.tensor([[0, 2, 0]])


@pytest.mark.parametrize(
    ("processor", "weights"),
    [
        (Temperature(0.5), [64, 16, 4, 1, 1]),
        (TopK(2), [2, 1, 0, 0, 0]),
        (TopK(4), [8, 4, 2, 1, 1]),
        (TopK(99), [8, 4, 2, 1, 1]),
        (TopP(0.7), [2, 1, 0, 0, 0]),
        (TopP(0.9), [8, 4, 2, 1, 1]),
        (TopP(SMALLEST), [1, 0, 0, 0, 0]),
        (MinP(0.2), [4, 2, 1, 0, 0]),
        (MinP(1), [1, 0, 0, 0, 0]),
        (Typical(0.2), [0, 1, 0, 0, 0]),
        (Typical(0.6), [2, 1, 0, 0, 0]),
        (RepetitionPenalty(2.0), [8**0.5, 4, 2**0.5, 1, 1]),
        (CountPenalty(presence=math.log(2)), [4, 4, 1, 1, 1]),
        (CountPenalty(frequency=math.log(2)), [2, 4, 1, 1, 1]),
        (NoRepeatNGram(1), [0, 4, 0, 1, 1]),
        (NoRepeatNGram(2), [8, 4, 0, 1, 1]),
        (NoRepeatNGram(3), [8, 4, 2, 1, 1]),
    ],
    ids=repr,
)
def test_by_hand(processor, weights):
    expected = torch.tensor([weights], dtype=torch.float32)
    found = processor(SO_FAR, TOY).softmax(dim=-1)
    torch.testing.assert_close(found, expected / expected.sum())


def test_penalties_are_not_rounded_below_the_logits_precision():
    ids, logits = torch.tensor([[0, 1]]), torch.zeros(1, 3, dtype=torch.float64)
    assert CountPenalty(0.1, 0.0)(ids, logits).tolist() == [[-0.1, -0.1, 0.0]]


@settings(deadline=None, max_examples=50)
@given(case=cases(), presence=st.floats(-3, 3), frequency=st.floats(-3, 3))
def test_count_penalty_counts(case, presence, frequency):
    ids, logits = case
    found = CountPenalty(presence, frequency)(ids, logits)
    for row, tokens in enumerate(ids.tolist()):
        expected = logits[row].clone()
        for token, times in Counter(tokens).items():
            expected[token] -= presence + frequency * times
        torch.testing.assert_close(found[row], expected)


@settings(deadline=None, max_examples=50)
@given(case=cases(), n=st.integers(1, 4))
def test_no_repeated_ngram_is_ever_completed(case, n):
    ids, logits = case
    found = NoRepeatNGram(n)(ids, logits)
    for row, tokens in enumerate(ids.tolist()):
        grams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
        allowed = {
            token
            for token in range(logits.shape[1])
            if logits[row, token] > -math.inf and (*tokens[len(tokens) - n + 1 :], token)[-n:] not in grams
        }
        kept = set(left(found[row]).nonzero()[:, 0].tolist())
        assert kept == (allowed or set(left(logits[row]).nonzero()[:, 0].tolist()))


# --- what holds for every processor


@pytest.mark.parametrize("processor", SAMPLES, **by_name)
@settings(deadline=None, max_examples=40)
@given(case=cases(tied=True), data=st.data())
def test_what_holds_for_all(processor, case, data):
    ids, logits = case
    before = logits.clone()
    found = processor(ids, logits)
    assert torch.equal(logits, before)  # nothing is changed in place
    assert found.shape == logits.shape and found.dtype == logits.dtype
    assert left(found).any(dim=-1).all()  # something is left
    assert not found.isnan().any() and not (left(found) & ~left(logits)).any()  # nothing comes back
    # Rows do not see each other, and the numbering of the vocabulary means nothing, ties included.
    one = torch.cat([processor(ids[i : i + 1], logits[i : i + 1]) for i in range(len(ids))])
    torch.testing.assert_close(found, one)
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[1]))))
    renumbered = processor(order.argsort()[ids], logits[:, order])
    torch.testing.assert_close(renumbered, found[:, order])


@pytest.mark.parametrize("processor", SAMPLES, **by_name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(processor, dtype):
    torch.manual_seed(0)
    ids, logits = torch.randint(500, (3, 20)), (4 * torch.randn(3, 500)).to(dtype)
    found = processor(ids, logits)
    assert found.dtype == torch.float32
    assert torch.equal(found, processor(ids, logits.float()))


@pytest.mark.parametrize("processor", [s for s in SAMPLES if not isinstance(s, RepetitionPenalty)], **by_name)
def test_a_constant_added_to_the_logits_changes_nothing(processor):
    torch.manual_seed(0)
    ids, logits = torch.randint(40, (3, 20)), torch.randn(3, 40, dtype=torch.float64)
    moved = processor(ids, logits + 5).softmax(-1)
    torch.testing.assert_close(moved, processor(ids, logits).softmax(-1))


def test_a_constant_changes_what_the_repetition_penalty_does():
    penalty = RepetitionPenalty(2.0)
    assert not torch.allclose(
        penalty(SO_FAR, TOY + 3).softmax(-1), penalty(SO_FAR, TOY).softmax(-1), atol=0.1
    )


@pytest.mark.parametrize(
    "processor",
    [
        Temperature(1),
        TopK(60),
        TopP(1),
        MinP(0),
        Typical(1),
        RepetitionPenalty(1),
        CountPenalty(),
        NoRepeatNGram(99),
    ],
    ids=repr,
)
def test_neutral_settings_change_nothing(processor):
    # In float32 the sum of the first four probabilities is 1 already: the tail must stay all the same.
    logits = torch.tensor([[0.0, -1, -2, -3, -30, -31, -60]])
    assert torch.equal(processor(torch.tensor([[0, 3, 3]]), logits), logits)


@pytest.mark.parametrize(
    "processor",
    [Temperature(SMALLEST), Temperature(LARGEST), RepetitionPenalty(SMALLEST), RepetitionPenalty(LARGEST)],
    ids=repr,
)
def test_extreme_settings_leave_numbers(processor):
    logits = torch.tensor([[1e31, -1e31, 3.0, -math.inf]])
    found = processor(torch.tensor([[0, 1, 3]]), logits)
    assert found[:, :3].isfinite().all() and found[0, 3] == -math.inf


def test_min_p_after_temperature_is_another_min_p_before():
    torch.manual_seed(0)
    for temperature, p in ((0.5, 0.1), (1.7, 0.3), (3.0, 0.05)):
        logits = torch.randn(4, 200, dtype=torch.float64)
        heated = apply_processors(
            (Temperature(temperature), MinP(p)), torch.zeros(4, 1, dtype=torch.int64), logits
        )
        assert torch.equal(left(heated), left(MinP(p**temperature)(torch.zeros(4, 1), logits)))


def test_processors_are_values():
    assert TopK(3) == TopK(3) != TopK(4)
    assert len({TopP(0.5), TopP(0.5), MinP(0.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        TopK(3).k = 4


@pytest.mark.parametrize(
    ("build", "name", "values"),
    [
        (Temperature, "temperature", [0, -1.0, math.nan, math.inf, 1e-7, "1", True, None]),
        (TopK, "k", [0, -3, 2.0, True, "5", None]),
        (TopP, "p", [0, -0.1, 1.01, math.nan, "0.9", True]),
        (MinP, "p", [-0.1, 1.01, math.nan, None, False]),
        (Typical, "mass", [0, 1.1, math.nan, "x"]),
        (RepetitionPenalty, "penalty", [0, -1, math.inf, math.nan, "2"]),
        (lambda v: CountPenalty(presence=v), "presence", [math.inf, math.nan, "1", True]),
        (lambda v: CountPenalty(frequency=v), "frequency", [-math.inf, math.nan, None]),
        (NoRepeatNGram, "n", [0, -1, 1.5, True, None]),
    ],
)
def test_bad_settings(build, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{name} must be .*got") as error:
            build(value)
        assert repr(value) in str(error.value)


def test_they_go_from_first_to_last():
    assert torch.equal(apply_processors((), SO_FAR, TOY), TOY)
    both = TopP(0.7)(SO_FAR, Temperature(2.0)(SO_FAR, TOY))
    assert torch.equal(apply_processors((Temperature(2.0), TopP(0.7)), SO_FAR, TOY), both)
    assert left(both).sum() == 3 != left(apply_processors((TopP(0.7), Temperature(2.0)), SO_FAR, TOY)).sum()


def test_generate_uses_them():
    model = random_gpt(vocab_size=30, seed=1)
    greedy = generate(model, [[1, 2]], 10)[0]
    assert generate(model, [[1, 2]], 10, temperature=1.0, processors=[TopK(1)], seed=3)[0] == greedy
    once = generate(model, [[1, 2]], 12, processors=[NoRepeatNGram(1)])[0]
    assert len(set(once)) == 12 and not {1, 2} & set(once)


# --- numbers of NumPy and torch


@pytest.mark.parametrize("sample", SAMPLES, **by_name)
def test_numbers_of_numpy_and_torch_are_kept_as_numbers_of_python(sample):
    settings_ = dataclasses.asdict(sample)
    for kind in (np.asarray, torch.tensor, lambda value: np.asarray(value)[()]):
        given_ = {
            name: kind(value) if isinstance(value, int) else kind(np.float64(value))
            for name, value in settings_.items()
        }
        processor = type(sample)(**given_)
        assert processor == sample and repr(processor) == repr(sample) and hash(processor) == hash(sample)
    for wrong in (np.True_, torch.tensor(True), np.array([1]), torch.tensor([1]), "1", None):
        with pytest.raises(ValueError, match="must be a"):
            type(sample)(**dict.fromkeys(settings_, wrong))


# --- sums over large vocabularies


def kept_by_definition(distance: np.ndarray, probabilities: np.ndarray, mass: float) -> torch.Tensor:
    """The tokens of the smallest distance whose probability reaches `mass`, and ties; in extended precision."""
    order = np.argsort(distance, kind="stable")
    last = np.argmax(np.cumsum(probabilities[order]) >= mass)
    return torch.from_numpy(distance <= distance[order[last]])


@pytest.mark.parametrize("mass", [0.8, 0.95, 0.98, 0.99, 0.999])
@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("vocab_size", [50_257, 128_256])
def test_cuts_by_mass_keep_what_an_exact_sum_keeps(vocab_size, scale, mass):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(1, vocab_size, generator=generator)
    numbers = logits[0].numpy().astype(np.longdouble)
    probabilities = np.exp(numbers - numbers.max())
    probabilities /= probabilities.sum()
    surprise = -np.log(probabilities)
    distance = np.abs(surprise - (probabilities * surprise).sum())
    ids = torch.zeros(1, 1, dtype=torch.int64)
    kept, expected = left(TopP(mass)(ids, logits))[0], kept_by_definition(-numbers, probabilities, mass)
    assert torch.equal(kept, expected)
    kept, expected = left(Typical(mass)(ids, logits))[0], kept_by_definition(distance, probabilities, mass)
    assert torch.equal(kept, expected)
