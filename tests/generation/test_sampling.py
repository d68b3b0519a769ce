"""`shared.generation.sampling` against transformers, against enumeration, and what must hold for every processor."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as reference

from shared.generation.engine import generate
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
    beam_score,
    beam_search,
    process,
)
from shared.model import seq2seq
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.seq2seq import Hypothesis

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
            process(ours, ids, logits).softmax(-1), theirs(ids, logits.clone()).softmax(-1)
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
        heated = process((Temperature(temperature), MinP(p)), torch.zeros(4, 1, dtype=torch.int64), logits)
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


@pytest.mark.parametrize(
    ("ids", "logits", "name"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(5), "logits"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64), "logits"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 5), "ids"),
        (torch.zeros(1, 2), torch.zeros(1, 5), "ids"),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(1, 5), "ids"),
    ],
)
def test_process_refuses_what_does_not_fit(ids, logits, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        process([TopK(1)], ids, logits)


def test_process_goes_from_first_to_last():
    assert torch.equal(process((), SO_FAR, TOY), TOY)
    both = TopP(0.7)(SO_FAR, Temperature(2.0)(SO_FAR, TOY))
    assert torch.equal(process((Temperature(2.0), TopP(0.7)), SO_FAR, TOY), both)
    assert left(both).sum() == 3 != left(process((TopP(0.7), Temperature(2.0)), SO_FAR, TOY)).sum()


def test_generate_uses_them():
    model = random_gpt(vocab_size=30, seed=1)
    greedy = generate(model, [[1, 2]], 10)[0]
    assert generate(model, [[1, 2]], 10, temperature=1.0, processors=[TopK(1)], seed=3)[0] == greedy
    once = generate(model, [[1, 2]], 12, processors=[NoRepeatNGram(1)])[0]
    assert len(set(once)) == 12 and not {1, 2} & set(once)


# --- beam search


def random_gpt(vocab_size: int, seed: int, dtype: torch.dtype = torch.float64) -> GPTModel:
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(vocab_size, context_length=20, emb_dim=16, n_heads=2, n_layers=2, dropout=0.0))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()


def with_end(hypothesis: Hypothesis, end: int | None) -> tuple[int, ...]:
    return (*hypothesis.ids, *([end] if hypothesis.finished else []))


@torch.no_grad()
def log_probability(model: GPTModel, prompt: list[int], new: tuple[int, ...], processors=()) -> float:
    """Of a continuation, without a cache."""
    total, ids = 0.0, list(prompt)
    for token in new:
        so_far = torch.tensor([ids])
        total += process(processors, so_far, model(so_far)[:, -1]).log_softmax(-1)[0, token].item()
        ids.append(token)
    return total


@torch.no_grad()
def plain_beam_search(
    model: GPTModel, prompt: list[int], n_new: int, size: int, end: int | None, alpha: float
) -> list[tuple[float, tuple[int, ...]]]:
    """The definition in lists: no cache, no early end."""
    beam, finished = [(0.0, ())], []
    for length in range(1, n_new + 1):
        logits = model(torch.tensor([[*prompt, *new] for _, new in beam]))[:, -1].log_softmax(-1)
        candidates = sorted(
            (
                (total + logits[row, token].item(), (*new, token))
                for row, (total, new) in enumerate(beam)
                for token in range(logits.shape[1])
            ),
            reverse=True,
        )
        over = [c for c in candidates[:size] if c[1][-1] == end or length == n_new]
        finished += [(total / len(new) ** alpha, new) for total, new in over]
        beam = [c for c in candidates[: 2 * size] if c[1][-1] != end][:size]
    return sorted(finished, reverse=True)[:size]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(2, 9),
    size=st.integers(1, 6),
    end=st.sampled_from([None, 0, 1]),
    alpha=st.sampled_from([-1.5, -0.5, 0.0, 0.7, 1.0, 2.5]),
    n_new=st.integers(1, 7),
)
def test_beam_search_is_its_definition(seed, vocab_size, size, end, alpha, n_new):
    model, prompt = random_gpt(vocab_size, seed), [1, 0, 1]
    expected = plain_beam_search(model, prompt, n_new, size, end, alpha)
    found = beam_search(model, prompt, n_new, beam_size=size, end_token=end, length_penalty=alpha)
    assert [with_end(h, end) for h in found] == [new for _, new in expected]
    for hypothesis, (value, new) in zip(found, expected, strict=True):
        assert beam_score(hypothesis, alpha) == pytest.approx(value, abs=1e-6)
        assert hypothesis.log_probability == pytest.approx(log_probability(model, prompt, new), abs=1e-6)


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.0])
def test_a_wide_beam_enumerates_everything(alpha):
    model, prompt, n_new = random_gpt(4, seed=3), [2], 4
    texts = {
        tuple(text[: text.index(0) + 1] if 0 in text else text)
        for text in map(list, itertools.product(range(4), repeat=n_new))
    }
    scores = {text: log_probability(model, prompt, text) / len(text) ** alpha for text in texts}
    found = beam_search(model, prompt, n_new, beam_size=1000, end_token=0, length_penalty=alpha)
    assert [with_end(h, 0) for h in found] == sorted(texts, key=scores.get, reverse=True)
    if alpha == 0:
        assert sum(math.exp(h.log_probability) for h in found) == pytest.approx(1, abs=1e-5)


RENAMED = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position_embedding",
    "transformer.ln_f": "final_norm",
    "transformer.h": "blocks",
    "ln_1": "attention_norm",
    "ln_2": "feed_forward_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.output",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}


def twin_of(ours: GPTModel) -> GPT2LMHeadModel:
    """transformers' GPT-2 with our weights."""
    c = ours.config
    sizes = {"n_positions": c.context_length, "n_embd": c.emb_dim, "n_head": c.n_heads, "n_layer": c.n_layers}
    config = GPT2Config(vocab_size=c.vocab_size, **sizes, bos_token_id=None, eos_token_id=None)
    theirs = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            transposed = ".c_" in name and name.endswith("weight")
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            value = ours.get_parameter(name)
            parameter.copy_(value.T if transposed else value)
    return theirs.eval()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("extra", ["plain", "processors"])
def test_beam_search_is_transformers(seed, extra):
    ours = random_gpt(6 + seed % 9, seed, torch.float32)
    prompt, size, alpha = [1 + seed % 4, 2], 2 + seed % 4, (-0.5, 0.0, 0.5, 1.0, 2.0)[seed % 5]
    # renormalize_logits: theirs changes log-probabilities, which then no longer add up to 1; ours always do.
    options = {"no_repeat_ngram_size": 2, "renormalize_logits": True} if extra == "processors" else {}
    out = twin_of(ours).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 2, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=10,
        num_beams=size,
        num_return_sequences=size,
        length_penalty=alpha,
        eos_token_id=0,
        pad_token_id=0,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    processors = [NoRepeatNGram(2)] if options else []
    found = beam_search(
        ours, prompt, 10, beam_size=size, end_token=0, length_penalty=alpha, processors=processors
    )
    rows = [row[2:] for row in out.sequences.tolist()]
    assert [with_end(h, 0) for h in found] == [
        tuple(row[: row.index(0) + 1] if 0 in row else row) for row in rows
    ]
    scores = [beam_score(h, alpha) for h in found]
    assert scores == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)


class AsSequenceModel:
    """A GPT behind the interface of `shared.model.seq2seq`; the state is the number of each row."""

    def __init__(self, gpt: GPTModel) -> None:
        self.gpt = gpt

    def encode(self, source_ids, source_mask):
        self.caches = self.gpt.new_caches()
        self.gpt(source_ids, caches=self.caches)
        return {"row": torch.zeros(1, dtype=torch.int64)}

    def decode_step(self, previous, state):
        for cache in self.caches:
            cache.reorder(state["row"])
        logits = self.gpt(previous[:, None], caches=self.caches)[:, -1]
        return logits, {"row": torch.arange(len(previous))}


@pytest.mark.parametrize("seed", range(10))
def test_without_an_end_it_is_the_beam_search_of_chapter_3(seed):
    model, source = random_gpt(11, seed), torch.tensor([[3, 1]])
    old = seq2seq.beam_search(AsSequenceModel(model), source, source > 0, 4, -1, 10, beam_size=3)
    new = beam_search(model, [3, 1, 4], 10, beam_size=3, length_penalty=0.0)
    assert [h.ids for h in old] == [h.ids for h in new]


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed):
    model = random_gpt(20, seed)
    [found] = beam_search(model, [1, 2], 12, beam_size=1)
    assert list(found.ids) == generate(model, [[1, 2]], 12)[0] and not found.finished


def test_processors_decide_what_is_possible():
    model = random_gpt(20, 0)
    found = beam_search(model, [1], 6, beam_size=5, processors=[TopK(1)])
    assert len(found) == 1 and found[0].log_probability == 0
    two = beam_search(model, [1], 6, beam_size=100, length_penalty=0.0, processors=[TopK(2)])
    assert len(two) == 64 and sum(math.exp(h.log_probability) for h in two) == pytest.approx(1, abs=1e-5)
    for hypothesis in two[:5]:
        expected = log_probability(model, [1], hypothesis.ids, [TopK(2)])
        assert hypothesis.log_probability == pytest.approx(expected, abs=1e-6)


def test_half_precision_models_and_their_mode():
    model = random_gpt(20, 0).to(torch.bfloat16).train()
    found = beam_search(model, [1, 2], 6, beam_size=3, end_token=0)
    assert 0 < len(found) <= 3 and all(math.isfinite(h.log_probability) for h in found)
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize(("finished", "expected"), [(True, -6 / 4), (False, -6 / 3)])
def test_the_length_counts_the_end(finished, expected):
    assert beam_score(Hypothesis((5, 6, 7), -6.0, finished), 1.0) == expected
    assert beam_score(Hypothesis((5, 6, 7), -6.0, finished), 0.0) == -6


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (([1], 3), {"beam_size": 0}, "beam_size"),
        (([1], 3), {"beam_size": 2.0}, "beam_size"),
        (([1], 0), {"beam_size": 2}, "max_new_tokens"),
        (([], 3), {"beam_size": 2}, "prompt"),
        (([9], 3), {"beam_size": 2}, "prompt"),
        (([1], 20), {"beam_size": 2}, "context_length"),
        (([1], 3), {"beam_size": 2, "end_token": 9}, "end_token"),
        (([1], 3), {"beam_size": 2, "length_penalty": math.nan}, "length_penalty"),
        (([1], 3), {"beam_size": 2, "length_penalty": 11}, "length_penalty"),
    ],
)
def test_beam_search_refuses(arguments, options, named):
    with pytest.raises(ValueError, match=named):
        beam_search(random_gpt(9, 0), *arguments, **options)
