"""`shared.generation.engine` against generation without cache, batch or stream, and against transformers."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from shared.generation.engine import apply_processors, choose_tokens, evaluating, generate, stream
from shared.model.gpt import GPTConfig, GPTModel
from tests.generation.decoders import (
    BROKEN,
    HEALTHY,
    MODEL,
    MODELS,
    SAID,
    Told,
    broken_weights,
    build,
    random_prompts,
    slowly,
)


def one_liked(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A processor that looks at the number of tokens, the first and the last: padding would change its mind."""
    liked = (ids.shape[1] + ids[:, 0] + ids[:, -1]) % logits.shape[1]
    return logits + 5 * nn.functional.one_hot(liked, logits.shape[1])


# --- cache = no cache, batch = one by one, stream = whole


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(MODELS)),
    rng=st.randoms(use_true_random=False),
    n_prompts=st.integers(1, 9),
    n_new=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    processors=st.sampled_from([(), (one_liked,)]),
    n_stops=st.integers(0, 4),
)
def test_cache_batch_and_stream_change_nothing(name, rng, n_prompts, n_new, temperature, processors, n_stops):
    model, prompts = MODELS[name], random_prompts(rng, n_prompts)
    stop_tokens = rng.sample(range(40), n_stops)
    options = {"temperature": temperature, "processors": processors, "stop_tokens": stop_tokens}
    seeds = [rng.randrange(1000) for _ in prompts]
    together = generate(model, prompts, n_new, seed=seeds, **options)
    for prompt, seed, ids in zip(prompts, seeds, together, strict=True):
        assert ids == slowly(model, prompt, n_new, seed=seed, **options)
        assert ids == list(stream(model, prompt, n_new, seed=seed, **options))


@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(sorted(MODELS)),
    rng=st.randoms(use_true_random=False),
    n_new=st.integers(1, 50),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_sliding_window_keeps_the_newest_half(name, rng, n_new, temperature):
    model, prompts = MODELS[name], random_prompts(rng, 4, longest=50)
    options = {"temperature": temperature, "stop_tokens": [1], "processors": [one_liked]}
    together = generate(model, prompts, n_new, seed=5, overflow="slide", **options)
    for i, (prompt, ids) in enumerate(zip(prompts, together, strict=True)):
        assert ids == slowly(model, prompt, n_new, seed=5 + i, slide=True, **options)


def test_slide_is_no_different_while_the_context_suffices():
    assert generate(MODEL, [[1, 2]], 30, overflow="slide") == generate(MODEL, [[1, 2]], 30)


def test_more_than_the_context_is_refused_before_anything_is_computed():
    calls = []
    handle = MODEL.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"20 ids and max_new_tokens=14 exceed .* context_length=32"):
        generate(MODEL, [[1], [3] * 20], 14)
    with pytest.raises(ValueError, match="33 ids and max_new_tokens=1 exceed"):
        generate(MODEL, [[3] * 33], 1)
    handle.remove()
    assert not calls


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("length", [1, 20, 32])
def test_the_last_token_needs_no_place_in_the_context(name, length):
    """Prompt and new tokens are one more than the context, which is read to its end and not anew."""
    model, prompt, n_new = MODELS[name], [3] * length, 33 - length
    options = {"temperature": 1.0, "seed": 1}
    expected, n_read = slowly(model, prompt, n_new, **options), []
    assert len(expected) == n_new
    handle = model.register_forward_pre_hook(lambda _, arguments: n_read.append(arguments[0].shape[1]))
    assert generate(model, [prompt], n_new, **options) == [expected]
    assert list(stream(model, prompt, n_new, overflow="slide", **options)) == expected
    handle.remove()
    assert all(n in (1, length) for n in n_read)
    assert generate(model, [[5], prompt], n_new, seed=[0, 1], temperature=1.0)[1] == expected


@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_transformers(seed):
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=60,
            n_positions=40,
            n_embd=24,
            n_head=3,
            n_layer=2,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=7,
            pad_token_id=0,
        )
    )
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = GPTModel(GPTConfig(vocab_size=60, context_length=40, emb_dim=24, n_heads=3, n_layers=2)).double()
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    their = theirs.transformer
    with torch.no_grad():
        ours.token_embedding.weight.copy_(their.wte.weight)
        ours.position_embedding.weight.copy_(their.wpe.weight)
        for kind in ("weight", "bias"):
            ours.final_norm.get_parameter(kind).copy_(their.ln_f.get_parameter(kind))
            for i, (mine, other) in itertools.product(range(2), parts.items()):
                tensor = their.get_parameter(f"h.{i}.{other}.{kind}")
                ours.get_parameter(f"blocks.{i}.{mine}.{kind}").copy_(
                    tensor.T if tensor.dim() == 2 else tensor
                )
    prompts = random_prompts(random.Random(seed), 6, vocab_size=60)
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=25, do_sample=False)[:, width:]
    expected = [list(itertools.takewhile(lambda token: token != 7, row)) for row in expected.tolist()]
    assert generate(ours, prompts, 25, stop_tokens=[7]) == expected


# --- choice and seeds


def test_seeds():
    run = lambda **options: generate(MODEL, [[1, 2], [1, 2], [5]], 15, temperature=1.0, **options)
    assert run(seed=3) == run(seed=3) == run(seed=[3, 4, 5])
    assert run(seed=3) != run(seed=4)
    assert run(seed=3)[0] != run(seed=3)[1]  # equal prompts, own generators
    assert run(seed=3)[1] == run(seed=4)[0]
    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert first == run() and first != second
    assert [row[:6] for row in run(seed=3)] == generate(
        MODEL, [[1, 2], [1, 2], [5]], 6, temperature=1.0, seed=3
    )


def test_temperature_zero_is_greedy_and_the_limit_of_small_ones():
    greedy = generate(MODEL, [[1, 2]], 20)
    assert greedy == generate(MODEL, [[1, 2]], 20, seed=9)
    assert greedy == generate(MODEL, [[1, 2]], 20, temperature=1e-9, seed=9)


def test_random_choice_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0, float("-inf")]]).expand(20_000, 5)
    uniforms = torch.empty(20_000, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 3.0):
        counts = Counter(choose_tokens(logits, temperature, uniforms).tolist())
        expected = (logits[0] / temperature).softmax(-1) * len(logits)
        assert counts[2] == counts[4] == 0
        for token in (0, 1, 3):
            assert abs(counts[token] - expected[token]) < 4 * expected[token].sqrt()


def test_choice_at_the_edges():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    for uniform, token in ((0.0, 1), (0.4999, 1), (0.5, 2), (1 - 2**-53, 2)):
        assert choose_tokens(logits, 1.0, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


# --- a broken model does not write


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_logits_are_refused(name, dtype, temperature):
    message = f"^logits must be numbers or -inf, at least one number a row, got {SAID[name]}$"
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    rows = torch.stack([HEALTHY, BROKEN[name]]).to(dtype)
    with pytest.raises(ValueError, match=message):
        choose_tokens(rows, temperature, half)
    model = Told(BROKEN[name].to(dtype))
    with pytest.raises(ValueError, match=message):
        generate(model, [[1], [2]], 3, temperature=temperature)
    with pytest.raises(ValueError, match=message):
        next(stream(model, [1], 3, temperature=temperature))
    with pytest.raises(ValueError, match=message):  # a processor may break it too
        broken = lambda ids, logits: BROKEN[name].to(logits.dtype).expand(len(logits), 6)
        generate(Told(HEALTHY), [[1], [2, 3]], 3, temperature=temperature, processors=[broken])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_is_allowed_beside_a_number(temperature):
    written = generate(Told(HEALTHY), [[1]] * 20, 20, temperature=temperature, seed=0)
    allowed = {3} if temperature == 0 else {0, 2, 3, 4}
    assert {token for row in written for token in row} == allowed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_weight_and_what_was_written_before(temperature):
    with pytest.raises(ValueError, match="logits must be numbers"):
        generate(broken_weights(), [[1, 2, 3]], 8, temperature=temperature)
    steps = stream(Told(HEALTHY, HEALTHY, BROKEN["nan"]), [1], 8, temperature=temperature)
    assert next(steps) in range(6) and next(steps) in range(6)
    with pytest.raises(ValueError, match="got nan"):
        next(steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_has_ended_cannot_break_the_others(temperature):
    """One of eleven rows stays in the batch after its end, when a processor leaves it nothing."""
    end = generate(MODEL, [[7]], 1, temperature=temperature, seed=0)[0][0]

    def only_the_first_ends(ids, logits):  # prompts differ in length, so it gets one row at a time
        is_first, has_ended = ids[0, 0] == 7, end in ids[0]
        cut = torch.arange(40) >= 0 if has_ended else torch.arange(40) == end
        return logits if is_first and not has_ended else logits.masked_fill(cut, -torch.inf)

    prompts = [[7], *([token, token] for token in range(8, 20) if token != end)][:11]
    options = {"temperature": temperature, "processors": [only_the_first_ends], "stop_tokens": [end]}
    together = generate(MODEL, prompts, 6, seed=0, **options)
    alone = [generate(MODEL, [prompt], 6, seed=i, **options)[0] for i, prompt in enumerate(prompts)]
    assert together == alone and together[0] == [] and all(len(row) == 6 for row in together[1:])


# --- stops and modes


def test_stop_tokens_end_their_row_only():
    prompts = random_prompts(random.Random(1), 20)
    free = generate(MODEL, prompts, 20, temperature=1.0, seed=0)
    stopped = generate(MODEL, prompts, 20, temperature=1.0, seed=0, stop_tokens=[4, 9])
    for long, short in zip(free, stopped, strict=True):
        assert short == list(itertools.takewhile(lambda token: token not in (4, 9), long))
    assert len({len(row) for row in stopped}) > 3  # the rows do end at different times


def test_finished_rows_leave_the_batch():
    prompts, sizes = random_prompts(random.Random(1), 20), []
    handle = MODEL.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    stopped = generate(MODEL, prompts, 20, temperature=1.0, seed=0, stop_tokens=[4, 9])
    handle.remove()
    assert sizes[-1] < 15
    assert sizes[0] == 20 and sizes == sorted(sizes, reverse=True)
    for step, size in enumerate(sizes[1:]):
        going = sum(len(row) > step for row in stopped)
        assert going <= size <= going / 0.9 + 1
    assert generate(MODEL, [], 5) == []


def test_mode_and_gradients_are_left_as_they_were():
    model = build()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    stopped = stream(model, [1, 2], 5)
    for _ in range(2):
        next(stopped)
        assert [module.training for module in model.modules()] == before
        assert not torch.is_inference_mode_enabled()
    model.blocks[0].eval()  # what is changed meanwhile stays changed
    next(stopped)
    assert not model.blocks[0].training
    model.blocks[0].train()
    stopped.close()
    assert [module.training for module in model.modules()] == before
    generate(model, [[1]], 2)
    assert [module.training for module in model.modules()] == before and True in before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    model(torch.tensor([[1, 2]])).sum().backward()  # weights are still ordinary tensors


SIDE_BY_SIDE = {
    "fast": ({}, "error"),
    "window": ({"window": 3}, "error"),
    "post-norm": ({"pre_norm": False}, "error"),
    "sliding": ({}, "slide"),
}


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_streams_side_by_side_are_those_alone(name):
    options, overflow = SIDE_BY_SIDE[name]
    model, n_new = build(dropout=0.5, **options), 60 if overflow == "slide" else 20
    assert model.training
    write = {"temperature": 1.0, "overflow": overflow}
    first, second = generate(model, [[1, 2], [3]], n_new, seed=[4, 9], **write)
    for lengths in (
        (n_new, n_new // 2),
        (n_new // 2, n_new),
    ):  # the one that was begun later ends first, or last
        streams = [
            stream(model, prompt, length, seed=seed, **write)
            for prompt, length, seed in zip(([1, 2], [3]), lengths, (4, 9), strict=True)
        ]
        pairs = zip(*itertools.zip_longest(*streams), strict=True)
        for written, alone, length in zip(pairs, (first, second), lengths, strict=True):
            assert list(written[:length]) == alone[:length]
        assert all(module.training for module in model.modules())


def test_a_model_can_be_trained_between_two_tokens():
    model = build(dropout=0.5)
    for _ in stream(model, [1, 2], 3):
        tokens = torch.tensor([[1, 2, 3]])
        assert not torch.equal(model(tokens), model(tokens))  # dropout is on
        model(tokens).sum().backward()


def test_stream_comes_as_it_is_made():
    calls = []
    handle = MODEL.register_forward_pre_hook(lambda *_: calls.append(1))
    for i, _ in enumerate(stream(MODEL, [1, 2], 5)):
        assert len(calls) == i + 1
    handle.remove()


def test_bfloat16_and_half_logits_reach_processors_as_float32():
    kinds = []
    model = build().bfloat16()
    generate(model, [[1, 2], [3]], 3, processors=[lambda ids, logits: kinds.append(logits.dtype) or logits])
    assert set(kinds) == {torch.float32}


PROMPTS = {
    "lists of numpy numbers": [[np.int64(1), np.int32(2)]],
    "lists of torch numbers": [[torch.tensor(1), torch.tensor(2)]],
    "numpy rows": [np.array([1, 2])],
    "torch rows": [torch.tensor([1, 2])],
    "a tensor": torch.tensor([[1, 2]]),
    "an array": np.array([[1, 2]]),
    "a tensor of one prompt": torch.tensor([1, 2]),
    "an array of one prompt": np.array([1, 2], dtype=np.int32),
    "tuples": ((1, 2),),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_all_kinds(name):
    options = {"temperature": 1.0, "seed": 3, "stop_tokens": [30]}
    expected = generate(MODEL, [[1, 2]], 8, **options)
    assert generate(MODEL, PROMPTS[name], 8, **options) == expected
    assert all(type(token) is int for token in generate(MODEL, PROMPTS[name], 8, **options)[0])


def test_iterators_and_numbers_of_numpy_and_torch():
    options = {"temperature": 1.0, "seed": 3, "stop_tokens": [30], "processors": [one_liked]}
    expected = generate(MODEL, [[1, 2], [3]], 8, **options)
    for number, stops in ((np.int64, np.array([30])), (torch.tensor, torch.tensor([30])), (int, {30})):
        options = {
            "temperature": 1.0,
            "seed": number(3),
            "stop_tokens": stops,
            "processors": iter([one_liked]),
        }
        assert generate(MODEL, (iter(prompt) for prompt in ([1, 2], [3])), number(8), **options) == expected
    for heat, seeds in (
        (np.float32(1), np.array([3, 4])),
        (torch.tensor(1.0), [np.int64(3), torch.tensor(4)]),
    ):
        options |= {"temperature": heat, "seed": seeds, "processors": [one_liked], "stop_tokens": iter([30])}
        assert generate(MODEL, [[1, 2], [3]], 8, **options) == expected
    options = {"temperature": np.float64(1), "seed": np.uint8(3), "processors": iter([one_liked])}
    written = stream(MODEL, torch.tensor([1, 2]), np.int64(8), stop_tokens=iter([np.int64(30)]), **options)
    assert list(written) == expected[0]


# --- bad input

BAD = [
    ({"prompts": [[]]}, r"prompts\[0\] must hold at least one id"),
    ({"prompts": [[1], [40]]}, r"prompts\[1\] must hold ids from 0 to 39, got 40"),
    ({"prompts": [[-1]]}, "from 0 to 39, got -1"),
    ({"prompts": [[1.0]]}, "from 0 to 39, got 1.0"),
    ({"prompts": [1, 2]}, r"prompts\[0\] must be a sequence of ids, got 1"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
    ({"max_new_tokens": -3}, "got -3"),
    ({"max_new_tokens": 2.0}, "got 2.0"),
    ({"max_new_tokens": True}, "max_new_tokens must be an int of at least 1, got True"),
    ({"max_new_tokens": torch.tensor(True)}, r"got tensor\(True\)"),
    ({"prompts": [[True]]}, "from 0 to 39, got True"),
    ({"prompts": [[np.True_]]}, "from 0 to 39, got"),
    ({"prompts": [torch.tensor([True])]}, "from 0 to 39, got True"),
    ({"prompts": [torch.tensor([0.5])]}, "from 0 to 39, got 0.5"),
    ({"prompts": [torch.tensor(3)]}, r"prompts\[0\] must be a sequence of ids, got tensor\(3\)"),
    ({"prompts": torch.tensor([0.5])}, "from 0 to 39|sequence of ids"),
    ({"prompts": 5}, "prompts must be a sequence of prompts, got 5"),
    ({"temperature": True}, "temperature must be a number of at least 0, got True"),
    ({"temperature": "1"}, "temperature must be a number of at least 0, got '1'"),
    ({"seed": True}, "seed must be whole numbers from 0 to .*, got True"),
    ({"seed": 1.5}, "seed must be whole numbers from 0 to .*, got 1.5"),
    ({"seed": -1}, "seed must be whole numbers from 0 to .*, got -1"),
    ({"seed": 2**70}, "seed must be whole numbers"),
    ({"seed": ["a"]}, "seed must be whole numbers"),
    ({"temperature": -0.1}, "temperature must be a number of at least 0, got -0.1"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"stop_tokens": [40]}, "stop_tokens must hold ids from 0 to 39, got 40"),
    ({"stop_tokens": 3}, "stop_tokens must be a sequence of ids, got 3"),
    ({"seed": [1, 2]}, "seed must be one number, or one for each of 1 prompts, got 2"),
    ({"overflow": "wrap"}, "overflow must be 'error' or 'slide', got 'wrap'"),
    (
        {"processors": [lambda ids, logits: logits[:, :5]]},
        r"processor must return logits \(1, 40\), got \(1, 5\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(change, message):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3, **change}
    with pytest.raises(ValueError, match=message):
        generate(MODEL, **arguments)
    if "seed" not in change and isinstance(arguments["prompts"], list) and arguments["prompts"] != [1, 2]:
        (*_, prompt), n = arguments.pop("prompts"), arguments.pop("max_new_tokens")
        with pytest.raises(ValueError):
            result = stream(MODEL, prompt, n, **arguments)  # at the call, but for processors
            if "processors" in change:
                next(result)


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
def test_applying_processors_refuses_what_does_not_fit(ids, logits, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        apply_processors([one_liked], ids, logits)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="top_k"):
        stream(MODEL, [1], 2, top_k=3)
