"""Continuous batching: whatever joins, leaves or is cancelled, each text is what its prompt becomes alone."""

import random
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.models import has_model
from shared.generation.batching import BatchEngine, Request, n_common
from shared.generation.engine import generate
from shared.generation.options import GenerationOptions
from shared.model.gpt import GPTModel
from shared.weights.pretrained import load_pretrained, load_tokenizer
from tests.generation.decoders import MODEL, MODELS, NOT_A_NUMBER, build, random_prompts

ROTARY = MODELS["llama"]
GREEDY = GenerationOptions(temperature=0)


def finish(engine: BatchEngine, limit: int = 2000) -> list:
    """Step until nothing is left; return all events."""
    events = []
    for _ in range(limit):
        if not engine.has_work:
            return events
        events += engine.step()
    raise AssertionError("the engine does not come to an end")


def alone(model: GPTModel, request: Request) -> list[int]:
    """What the older engine makes of a request's prompt."""
    return generate(
        model,
        [request.prompt],
        request.max_new_tokens,
        stop_tokens=sorted(request.stop_ids),
        temperature=float(request.options.temperature > 0),
        processors=request.processors,
        seed=request.options.seed,
    )[0]


def check_empty(engine: BatchEngine) -> None:
    """Assert that no request has left anything behind but what can be shared."""
    assert (engine.n_running, engine.n_waiting, engine.cache_tokens) == (0, 0, 0)
    assert engine.n_free == len(engine._rows) and not engine._reading
    assert all(len(row.held) <= engine.context_length for row in engine._rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_each_text_is_that_of_its_prompt_alone(name, chunk):
    rng = random.Random(chunk)
    model = MODELS[name]
    engine = BatchEngine(model, max_batch_size=4, prefill_chunk=chunk)
    requests = [
        engine.submit(prompt, GREEDY, max_new_tokens=rng.randint(1, 20)) for prompt in random_prompts(rng, 11)
    ]
    finish(engine)
    for request in requests:
        assert request.generated == alone(model, request), name
        assert request.finish_reason == "length"
    check_empty(engine)


@st.composite
def schedules(draw):
    """Prompts with their options, the step at which each comes, and perhaps the step at which it is cancelled."""
    stems = draw(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=12), min_size=1, max_size=3))
    requests = []
    for _ in range(draw(st.integers(1, 9))):
        prompt = draw(st.sampled_from(stems)) + draw(st.lists(st.integers(0, 39), max_size=6))
        options = {"temperature": draw(st.sampled_from([0, 0, 0.7, 1])), "seed": draw(st.integers(0, 99))}
        options |= draw(
            st.sampled_from([{}, {"top_k": 5}, {"repetition_penalty": 1.3}, {"top_p": 0.8, "min_p": 0.01}])
        )
        n_new, stops = draw(st.integers(1, 14)), draw(st.lists(st.integers(0, 39), max_size=4))
        start = draw(st.integers(0, 12))
        cancelled = draw(st.none() | st.integers(start, start + 12))
        requests.append((start, cancelled, prompt, GenerationOptions(**options), n_new, stops))
    sizes = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.booleans())
    return requests, *sizes


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_no_schedule_changes_a_text(schedule):
    requests, n_rows, chunk, least, shares = schedule
    engine = BatchEngine(ROTARY, max_batch_size=n_rows, prefill_chunk=chunk, share_prefixes=shares)
    engine.MIN_SHARED = least
    running, told = {}, {}
    for step in range(400):
        for number, (start, cancelled, prompt, options, n_new, stops) in enumerate(requests):
            if start == step:
                running[number] = engine.submit(prompt, options, max_new_tokens=n_new, stop_ids=stops)
                told[running[number]] = []
            if cancelled == step:
                engine.cancel(running[number])
                engine.cancel(running[number])  # once more changes nothing
        assert engine.n_running <= n_rows
        for event in engine.step():
            assert event.request.state == "running" or event.finish_reason
            told[event.request].append(event)
    check_empty(engine)
    for request, events in told.items():
        expected = alone(ROTARY, request)
        shown = [event.token for event in events if event.token is not None]
        assert request.state == "done" and shown == request.generated
        if request.finish_reason == "cancelled":
            assert request.generated == expected[: len(request.generated)]
            assert not any(event.finish_reason for event in events)
            continue
        assert request.generated == expected
        assert [event.finish_reason for event in events if event.finish_reason] == [request.finish_reason]
        assert request.finish_reason == ("length" if len(expected) == request.max_new_tokens else "stop")


def test_a_long_prompt_does_not_keep_others_from_writing():
    model = build(context_length=300, positions="none")
    engine = BatchEngine(model, max_batch_size=3, prefill_chunk=8)
    first = engine.submit([1, 2, 3], max_new_tokens=60)
    engine.step()
    long = engine.submit(list(range(40)) * 5, max_new_tokens=2)
    short = engine.submit([7, 8, 9], max_new_tokens=5)
    for _ in range(20):
        before = len(first.generated)
        events = engine.step()
        assert len(first.generated) == before + 1
        assert len(events) <= 3
    # 200 tokens in pieces of 8 are 25 steps; the short prompt, which came later, is long done.
    assert not long.generated and short.state == "done"
    finish(engine)
    assert long.generated == alone(model, long)


def test_a_step_reads_no_more_than_it_may():
    engine = BatchEngine(MODEL, max_batch_size=4, prefill_chunk=5)
    seen = []
    read = engine._read

    def watched(pieces):
        # What is being written has its prompt behind it.
        writing = sum(piece.start >= len(engine._rows[piece.row].request.prompt) for piece in pieces)
        seen.append((writing, sum(len(piece.tokens) for piece in pieces) - writing))
        return read(pieces)

    engine._read = watched
    for prompt in random_prompts(random.Random(0), 9):
        engine.submit(prompt, max_new_tokens=6)
    finish(engine)
    # Five tokens of prompts beside what is being written; four times as many while nothing is.
    assert len(seen) > 9 and {bool(writing) for writing, _ in seen} == {False, True}
    assert (
        max(n for writing, n in seen if writing) == 5
        and 5 < max(n for writing, n in seen if not writing) <= 20
    )


class TestSharedPrefixes:
    STEM = random.Random(5).choices(range(40), k=20)

    def engine(self, **options) -> BatchEngine:
        return BatchEngine(ROTARY, **{"max_batch_size": 3, "prefill_chunk": 4, **options})

    def test_a_prefix_is_computed_once(self):
        engine = self.engine(max_batch_size=8)
        counted = []
        read = engine._read
        engine._read = lambda pieces: counted.extend(len(p.tokens) for p in pieces) or read(pieces)
        requests = [engine.submit([*self.STEM, i], max_new_tokens=3) for i in range(6)]
        finish(engine)
        # The stem once, and of each request its last token and two new ones.
        assert sum(counted) == len(self.STEM) + 6 * 3
        assert [request.n_shared for request in requests] == [0, 20, 20, 20, 20, 20]
        assert engine.prefix_hits == 5 and engine.n_shared_tokens == 100
        assert [request.generated for request in requests] == [alone(ROTARY, r) for r in requests]

    def test_the_whole_of_an_equal_prompt_but_its_last_token_is_shared(self):
        engine = self.engine()
        first, second = (engine.submit(self.STEM, max_new_tokens=4) for _ in range(2))
        finish(engine)
        assert second.n_shared == len(self.STEM) - 1 and first.generated == second.generated

    def test_a_conversation_goes_on_in_its_row(self):
        engine = self.engine(max_batch_size=2)
        first = engine.submit(self.STEM, max_new_tokens=5)
        finish(engine)
        before = engine.cache.storage.clone()
        second = engine.submit([*first.prompt, *first.generated, 3], max_new_tokens=3)
        finish(engine)
        assert second.n_shared == len(self.STEM) + 4  # the last new token was never read
        assert second.generated == alone(ROTARY, second)
        assert torch.equal(before[:, :, 1], engine.cache.storage[:, :, 1])  # the other row was left alone

    def test_a_row_that_others_may_need_is_copied_and_not_taken_over(self):
        engine = self.engine()
        engine.MIN_SHARED = 8
        stem = engine.submit(self.STEM, max_new_tokens=8)
        finish(engine)
        held = next(row.held for row in engine._rows if row.held)
        engine.submit([*self.STEM[:10], 1, 2], max_new_tokens=1)
        longer = engine.submit([*stem.prompt, *stem.generated, 3], max_new_tokens=2)
        finish(engine)
        assert longer.n_shared == len(held)

    def test_those_who_share_nothing_overtake_those_who_wait_for_a_prefix(self):
        engine = self.engine()
        engine.submit([*self.STEM, 1], max_new_tokens=2)
        shares, other = engine.submit([*self.STEM, 2], max_new_tokens=2), engine.submit([9], max_new_tokens=2)
        engine.step()
        engine.step()
        assert shares.state == "waiting" and other.generated
        finish(engine)
        assert shares.n_shared == 20

    def test_a_prefix_whose_reader_is_cancelled_is_not_waited_for(self):
        engine = self.engine()
        reader = engine.submit([*self.STEM, 1], max_new_tokens=2)
        sharer = engine.submit([*self.STEM, 2], max_new_tokens=2)
        engine.step()
        engine.cancel(reader)
        finish(engine)
        assert sharer.generated == alone(ROTARY, sharer)

    def test_without_sharing_everything_is_read(self):
        engine = self.engine(share_prefixes=False)
        requests = [engine.submit(self.STEM, max_new_tokens=2) for _ in range(5)]
        finish(engine)
        assert engine.n_shared_tokens == engine.prefix_hits == 0
        assert len({tuple(request.generated) for request in requests}) == 1

    def test_n_common(self):
        assert n_common([], [1]) == 0 and n_common([1, 2, 3], [1, 2, 4]) == 2 and n_common([1], [1, 2]) == 1


def test_logprobs_are_the_models_own():
    model = ROTARY
    engine = BatchEngine(model, forbidden_ids=[3, 7])
    options = GenerationOptions(temperature=0.5, top_k=3, seed=1)
    request = engine.submit([1, 2], options, max_new_tokens=6, n_logprobs=4)
    silent = engine.submit([1, 2], options, max_new_tokens=6)
    events = finish(engine)
    assert request.generated == silent.generated
    ids = [1, 2]
    model.eval()
    for event in (event for event in events if event.request is request):
        logits = model(torch.tensor([ids]))[0, -1].detach().index_fill(0, torch.tensor([3, 7]), -torch.inf)
        expected = logits.log_softmax(dim=-1)
        assert event.logprob == pytest.approx(expected[event.token].item(), abs=1e-9)
        assert list(event.top_logprobs) == expected.topk(4).indices.tolist()
        ids.append(event.token)
    assert all(event.logprob is None for event in events if event.request is silent)
    model.train()


def test_forbidden_ids_are_never_chosen():
    engine = BatchEngine(MODEL, forbidden_ids=range(1, 40))
    request = engine.submit([5], max_new_tokens=5)
    drawn = engine.submit([5], GenerationOptions(temperature=5.0), max_new_tokens=9)
    finish(engine)
    assert request.generated == [0] * 5 and drawn.generated == [0] * 9


def test_options_give_what_the_arguments_leave_open():
    engine = BatchEngine(MODEL)
    options = GenerationOptions(temperature=1.0, max_new_tokens=7, stop_tokens=[3], seed=11)
    whole = engine.submit([1, 2], options)
    other = engine.submit([1, 2], options, seed=11, stop_ids=[], max_new_tokens=4)
    finish(engine)
    assert whole.max_new_tokens == 7 and whole.stop_ids == {3} and whole.generated == alone(MODEL, whole)
    assert other.stop_ids == set() and other.max_new_tokens == 4
    assert engine.submit([1], max_new_tokens=1).options.temperature == 0


def test_without_a_seed_texts_differ():
    engine = BatchEngine(MODEL)
    hot = GenerationOptions(temperature=2.0)
    texts = [engine.submit([1], hot, max_new_tokens=12) for _ in range(4)]
    finish(engine)
    assert len({tuple(request.generated) for request in texts}) == 4


def test_memory_is_back_where_it_was():
    engine = BatchEngine(ROTARY, max_batch_size=4)
    size, address = engine.cache.storage.nbytes, engine.cache.storage.data_ptr()
    rng = random.Random(3)
    for _ in range(20):
        requests = [engine.submit(prompt, max_new_tokens=9) for prompt in random_prompts(rng, 9)]
        for _ in range(rng.randint(0, 12)):
            engine.step()
        for request in rng.sample(requests, 5):
            engine.cancel(request)
        finish(engine)
        check_empty(engine)
    assert (engine.cache.storage.nbytes, engine.cache.storage.data_ptr()) == (size, address)


def test_an_idle_engine_does_nothing():
    engine = BatchEngine(MODEL)
    assert engine.step() == [] and not engine.has_work
    engine.cancel(engine.submit([1], max_new_tokens=1))
    assert engine.step() == [] and engine.cache_tokens == 0
    assert engine.cache_capacity == 32 * 32 and engine.n_free == 32


def test_a_broken_pass_leaves_an_engine_that_goes_on():
    model = build(**{"positions": "rotary"})
    engine = BatchEngine(model, max_batch_size=2, prefill_chunk=2)
    requests = [engine.submit(prompt, max_new_tokens=8) for prompt in ([1, 2, 3, 4, 5], [6], [7, 8])]
    read, turn = engine._read, iter(range(10_000))

    def sometimes(pieces):
        logits = read(pieces)
        if next(turn) % 3 == 1:
            raise KeyboardInterrupt
        return logits

    engine._read = sometimes
    for _ in range(100):
        with suppress(KeyboardInterrupt):
            engine.step()
    assert [request.generated for request in requests] == [alone(model, request) for request in requests]


def test_a_text_whose_logits_are_no_numbers_ends_and_the_others_go_on():
    model = build(positions="none")
    with torch.no_grad():
        model.token_embedding.weight[39] = NOT_A_NUMBER
    model.output_head = torch.nn.Linear(
        16, 40, dtype=torch.float64
    )  # a head of its own, without the bad number
    engine = BatchEngine(model)
    good, bad = engine.submit([1, 2], max_new_tokens=6), engine.submit([1, 39], max_new_tokens=6)
    engine._forbidden = torch.tensor([39])
    events = finish(engine)
    assert bad.finish_reason == "error" and not bad.generated
    assert len(good.generated) == 6 and good.finish_reason == "length"
    assert [event.token for event in events if event.request is bad] == [None]


def test_the_mode_of_the_model_between_steps_is_its_own():
    model = build()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    engine = BatchEngine(model)
    engine.submit([1, 2], max_new_tokens=3)
    while engine.has_work:
        engine.step()
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt must be at least one id"),
        ({"prompt": [40]}, "prompt must hold ids from 0 to 39"),
        ({"prompt": "abc"}, "prompt must hold ids"),
        ({"prompt": 7}, "prompt must be a sequence"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 32}, "exceed context_length=32"),
        ({"stop_ids": [99]}, "stop_ids must hold ids"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"n_logprobs": 41}, "n_logprobs must be a whole number from 0 to 40"),
        ({"options": GenerationOptions(overflow="slide")}, "overflow must be 'error' in a batch"),
        ({"options": GenerationOptions(stop_strings=["a"])}, "stop_strings must be empty"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_by_name(arguments, message):
    engine = BatchEngine(MODEL)
    with pytest.raises(ValueError, match=message):
        engine.submit(**{"prompt": [1, 2], "max_new_tokens": 2, **arguments})
    assert not engine.has_work


def test_the_context_may_be_filled_to_its_end():
    engine = BatchEngine(MODEL, max_batch_size=1)
    request = engine.submit([1, 2], max_new_tokens=31)  # the last new token is never read
    finish(engine)
    assert request.generated == alone(MODEL, request) and len(engine._rows[0].held) == 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_batch_size": 0}, ValueError, "max_batch_size"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk"),
        ({"prefill_chunk": 2.0}, TypeError, "prefill_chunk"),
        ({"context_length": 33}, ValueError, "context_length must be at most the model's 32"),
        ({"forbidden_ids": [40]}, ValueError, "forbidden_ids"),
    ],
)
def test_engines_that_cannot_be_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        BatchEngine(MODEL, **options)


def check_up_to_ties(model: GPTModel, requests: list[Request], lead: float = 1e-3) -> int:
    """Assert that each text is that of its prompt alone, or parts from it where two tokens are as good as tied.

    Returns how many are equal to the end.
    """
    n_equal = 0
    for request in requests:
        expected = alone(model, request)
        n_same = n_common(request.generated, expected)
        n_equal += n_same == len(expected) == len(request.generated)
        if n_same < len(expected):
            with torch.inference_mode():
                logits = model(torch.tensor([request.prompt + expected[:n_same]]))[0, -1]
            assert logits[expected[n_same]] - logits[request.generated[n_same]] < lead
    return n_equal


def test_tales_in_float32_are_those_of_each_prompt_alone():
    model, tokenizer = load_pretrained("tales-3m", dtype=torch.float32), load_tokenizer("tales-3m")
    words = ["One evening", "In the week when", "Long ago", "On a hill by the sea", "The old miller"]
    engine = BatchEngine(model, max_batch_size=5, prefill_chunk=3)
    requests = []
    for number in range(15):
        prompt = [*tokenizer.encode_ordinary(words[number % 5]), *[number] * (number // 5)]
        requests.append(engine.submit(prompt, max_new_tokens=12 + 3 * number))
        engine.step()
    finish(engine)
    assert check_up_to_ties(model, requests) >= 14


@pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")
def test_a_real_model_in_float32_writes_what_it_writes_alone():
    name = "smollm2-135m-instruct"
    model, tokenizer = load_pretrained(name, dtype=torch.float32), load_tokenizer(name)
    stem = "You answer briefly and in plain words, and you never say what you do not know. Question: "
    engine = BatchEngine(model, max_batch_size=4, prefill_chunk=8, context_length=64)
    requests = []
    for question in ("What is water?", "Why?", "Where is Paris?", "Who sleeps in winter?", "Is bread old?"):
        requests.append(engine.submit(tokenizer.encode_ordinary(stem + question), max_new_tokens=6))
        engine.step()
    finish(engine)
    assert check_up_to_ties(model, requests) == 5
    assert engine.prefix_hits == 4
