"""`shared.generation.beam_search` against its definition, complete enumeration, transformers and chapter 3's search."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from shared.generation.beam_search import beam_score, beam_search
from shared.generation.engine import apply_processors, generate
from shared.generation.sampling import NoRepeatNGram, TopK
from shared.model import seq2seq
from shared.model.gpt import GPTModel
from shared.model.seq2seq import Hypothesis
from tests.generation.decoders import BROKEN, HEALTHY, SAID, Told, random_gpt


def with_end(hypothesis: Hypothesis, end: int | None) -> tuple[int, ...]:
    return (*hypothesis.ids, *([end] if hypothesis.finished else []))


@torch.no_grad()
def log_probability(model: GPTModel, prompt: list[int], new: tuple[int, ...], processors=()) -> float:
    """Of a continuation, without a cache."""
    total, ids = 0.0, list(prompt)
    for token in new:
        so_far = torch.tensor([ids])
        total += apply_processors(processors, so_far, model(so_far)[:, -1]).log_softmax(-1)[0, token].item()
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
    old = seq2seq.beam_decode(AsSequenceModel(model), source, source > 0, 4, -1, 10, beam_size=3)
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
        (([1], 21), {"beam_size": 2}, "context_length"),
        (([1], 3), {"beam_size": True}, "beam_size"),
        (([1], 3), {"beam_size": 2, "end_token": True}, "end_token"),
        (([1], 3), {"beam_size": 2, "end_token": 9}, "end_token"),
        (([1], 3), {"beam_size": 2, "length_penalty": math.nan}, "length_penalty"),
        (([1], 3), {"beam_size": 2, "length_penalty": 11}, "length_penalty"),
    ],
)
def test_beam_search_refuses(arguments, options, named):
    with pytest.raises(ValueError, match=named):
        beam_search(random_gpt(9, 0), *arguments, **options)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_does_not_write(name, beam_size):
    message = f"^logits must be numbers or -inf, at least one number a row, got {SAID[name]}$"
    for model in (Told(BROKEN[name]), Told(HEALTHY, BROKEN[name])):
        with pytest.raises(ValueError, match=message):
            beam_search(model, [1], 4, beam_size=beam_size, end_token=0)
    broken = lambda ids, logits: BROKEN[name].expand(len(logits), 6)
    with pytest.raises(ValueError, match=message):
        beam_search(Told(HEALTHY), [1], 4, beam_size=beam_size, processors=[broken])


def test_minus_infinity_is_allowed_beside_a_number():
    found = beam_search(Told(HEALTHY), [1], 3, beam_size=100, length_penalty=0.0)
    assert len(found) == 4**3 and all({0, 2, 3, 4} >= set(h.ids) for h in found)


@pytest.mark.parametrize("length", [1, 12, 20])
def test_the_last_token_needs_no_place_in_the_context(length):
    model, prompt = random_gpt(9, 0), [3] * length
    found = beam_search(model, prompt, 21 - length, beam_size=1)[0]
    assert len(found.ids) == 21 - length
    assert found.log_probability == pytest.approx(log_probability(model, prompt, found.ids), abs=1e-6)
    with pytest.raises(ValueError, match="context_length"):
        beam_search(model, prompt, 22 - length, beam_size=1)


def test_the_sum_of_many_log_probabilities_is_one_of_float64():
    logits = torch.randn(5_000, generator=torch.Generator().manual_seed(0))
    first, second = logits.double().log_softmax(-1).topk(2).values.tolist()
    best, next_best = beam_search(Told(logits), [1], 250, beam_size=2, length_penalty=0.0)
    assert best.log_probability == pytest.approx(250 * first, abs=1e-9)
    assert next_best.log_probability == pytest.approx(249 * first + second, abs=1e-9)


def test_numbers_of_numpy_and_torch_and_iterators():
    model = random_gpt(9, 0)
    expected = beam_search(model, [1, 2], 6, beam_size=2, end_token=0, processors=[TopK(3)])
    for prompt, number in ((np.array([1, 2]), np.int64), (torch.tensor([1, 2]), torch.tensor)):
        numbers = {"beam_size": number(2), "end_token": number(0), "length_penalty": np.float32(1)}
        found = beam_search(model, prompt, number(6), processors=iter([TopK(number(3))]), **numbers)
        assert found == expected


def test_every_module_keeps_its_own_mode():
    model = random_gpt(9, 0).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    beam_search(model, [1], 4, beam_size=2)
    assert [module.training for module in model.modules()] == before
