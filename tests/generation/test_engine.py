"""`generation.engine` and `speculation` against generation without cache, batch or stream, and transformers."""

import itertools
import random
from collections import Counter

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from shared.generation.engine import (
    choose_tokens,
    decode_stream,
    evaluating,
    generate,
    generate_text,
    stream,
    stream_text,
)
from shared.generation.speculation import DraftModel, PromptLookup, Speculation, generate_speculatively
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding
from tests.configurations import LLAMA

SMALL = {"vocab_size": 40, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "dropout": 0.1}
VARIANTS = {
    "gpt2": {},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "n_kv_heads": 1, "qk_norm": True},
    "mistral": {**LLAMA, "window": 3},
    "mixtral": {**LLAMA, "feed_forward": "moe", "feed_forward_dim": 8, "n_experts": 3},
    "no positions": {"positions": "none"},
}


def build(seed: int = 0, **options) -> GPTModel:
    """A small float64 model, in training mode as it comes, with weights large enough that texts vary."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(**{**SMALL, **options})).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


MODELS = {name: build(**options) for name, options in VARIANTS.items()}
MODEL = MODELS["gpt2"]
# One token for each byte, and two tokens that cut characters in two.
BYTES = tiktoken.Encoding(
    "bytes",
    pat_str=r"(?s).+",
    mergeable_ranks={bytes([i]): i for i in range(256)} | {b"a\xc3": 256, b"\xa9b": 257},
    special_tokens={"<|endoftext|>": 258},
)


def one_liked(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A processor that looks at the number of tokens, the first and the last: padding would change its mind."""
    liked = (ids.shape[1] + ids[:, 0] + ids[:, -1]) % logits.shape[1]
    return logits + 5 * nn.functional.one_hot(liked, logits.shape[1])


@torch.no_grad()
def slowly(model, prompt, n, *, temperature=0.0, processors=(), stop_tokens=(), seed=0, slide=False):
    """The same without cache, batch and stream: every token from a pass over all visible ones."""
    limit, ids, begin = model.config.context_length, list(prompt), 0
    uniforms = torch.empty(n, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(seed))
    with evaluating(model):
        for i in range(n):
            if slide and len(ids) - begin > limit:
                begin = len(ids) - limit // 2
            logits = model(torch.tensor([ids[begin:]]))[:, -1]
            for processor in processors:
                logits = processor(torch.tensor([ids]), logits)
            token = int(choose_tokens(logits, temperature, uniforms[i : i + 1]))
            if token in stop_tokens:
                break
            ids.append(token)
    return ids[len(prompt) :]


def random_prompts(rng: random.Random, n: int, longest: int = 12, vocab_size: int = 40) -> list[list[int]]:
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(n)]


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


def test_the_whole_context_can_be_used_and_no_more():
    prompt = [3] * 20
    assert len(generate(MODEL, [prompt], 12)[0]) == 12
    calls = []
    handle = MODEL.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"20 ids and max_new_tokens=13 exceed .* context_length=32"):
        generate(MODEL, [[1], prompt], 13)
    handle.remove()
    assert not calls  # refused before anything is computed


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


# --- choice, seeds, stops, modes


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
    half = torch.tensor([0.5], dtype=torch.float64)
    for wrong in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="logits must be numbers or -inf"):
            choose_tokens(torch.full((1, 4), wrong), 1.0, half)


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
    next(stopped)
    assert not model.training and not torch.is_inference_mode_enabled()
    stopped.close()
    generate(model, [[1]], 2)
    assert [module.training for module in model.modules()] == before and True in before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    model(torch.tensor([[1, 2]])).sum().backward()  # weights are still ordinary tensors


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


def test_numpy_and_tensor_prompts():
    expected = generate(MODEL, [[1, 2]], 4)
    assert (
        generate(MODEL, torch.tensor([[1, 2]]), 4)
        == generate(MODEL, [torch.tensor([1, 2]).numpy()], 4)
        == expected
    )


# --- text


def pieces_of(ids: list[int], stop_strings: tuple[str, ...] = ()) -> list[str]:
    """Stream a given list of ids as text: a model that writes what it is told."""
    return list(stream_text(Parrot(ids), BYTES, [0], len(ids), stop_strings=stop_strings))


class Parrot(nn.Module):
    """A decoder that writes the given ids whatever it reads, and needs no cache."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids, self.n_calls = ids, 0
        self.config = GPTConfig(vocab_size=259, context_length=len(ids) + 1)
        self.weight = nn.Parameter(torch.zeros(()))

    def new_caches(self, max_length: int) -> list:
        return []

    def forward(self, tokens: torch.Tensor, **options: object) -> torch.Tensor:
        self.n_calls += 1
        return nn.functional.one_hot(torch.tensor([[self.ids[self.n_calls - 1]]]), 259).float()


@settings(deadline=None)
@given(st.lists(st.integers(0, 257), min_size=1, max_size=30))
def test_pieces_of_any_bytes_make_the_whole(ids):
    assert "".join(decode_stream(BYTES, iter(ids))) == BYTES.decode(ids)
    assert "".join(pieces_of(ids)) == BYTES.decode(ids)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_no_character_is_split(text):
    pieces = pieces_of(list(text.encode("utf-8")))
    assert "".join(pieces) == text and all(len(piece) == 1 for piece in pieces)


def test_a_token_may_hold_parts_of_two_characters():
    assert pieces_of([256, 257]) == ["a", "éb"]
    assert pieces_of([256]) == ["a", "\ufffd"]


@settings(deadline=None, max_examples=200)
@given(
    st.text("abé", min_size=1, max_size=25),
    st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
    st.randoms(use_true_random=False),
)
def test_stop_strings(text, stop_strings, rng):
    """Against a search from left to right over the finished text, however it is cut into tokens."""
    ends = [n for n in range(1, len(text) + 1) if text[:n].endswith(tuple(stop_strings))]
    expected = text
    if ends:
        expected = text[: ends[0] - max(len(s) for s in stop_strings if text[: ends[0]].endswith(s))]
    ids = BYTES.encode_ordinary(text) if rng.random() < 0.5 else list(text.encode("utf-8"))
    pieces = pieces_of(ids, tuple(stop_strings))
    assert "".join(pieces) == expected


def test_a_stop_string_is_held_back_and_ends_the_work():
    ids = list(b"xx END yy")
    model = Parrot(ids)
    assert list(stream_text(model, BYTES, [0], len(ids), stop_strings=["END"])) == ["x", "x", " "]
    assert model.n_calls == 6  # no token is computed after the stop string
    assert pieces_of(list(b"E EN EMD"), ("END",)) == ["E ", "EN ", "EM", "D"]


def test_end_of_text_stops_by_default():
    ids = [*b"ab", 258, *b"cd"]
    assert pieces_of(ids) == ["a", "b"]
    assert "".join(stream_text(Parrot(ids), BYTES, [0], 5, stop_tokens=())) == "ab<|endoftext|>cd"


def test_text_of_a_model():
    encoding = tale_encoding()
    model = build(vocab_size=encoding.n_vocab)
    ids = encoding.encode_ordinary("One day")
    written = generate(model, [ids], 12, temperature=1.0, seed=1)[0]
    options = {"temperature": 1.0, "seed": 1, "stop_tokens": ()}
    assert generate_text(model, encoding, "One day", 12, **options) == encoding.decode(written)
    assert generate_text(model, encoding, ids, 12, **options) == encoding.decode(written)


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
    if "seed" not in change and arguments["prompts"] != [1, 2]:
        (*_, prompt), n = arguments.pop("prompts"), arguments.pop("max_new_tokens")
        with pytest.raises(ValueError):
            result = stream(MODEL, prompt, n, **arguments)  # at the call, but for processors
            if "processors" in change:
                next(result)


def test_bad_text_arguments():
    for wrong in ("", "END", [""], [3]):
        with pytest.raises(ValueError, match="stop_strings must be texts of at least one character"):
            stream_text(Parrot([1]), BYTES, [0], 1, stop_strings=wrong or [wrong])
    with pytest.raises(ValueError, match="at least one id"):
        stream_text(Parrot([1]), BYTES, "", 1)
    with pytest.raises(TypeError, match="temprature"):
        stream_text(Parrot([1]), BYTES, "a", 1, temprature=1.0)


# --- speculative decoding


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(MODELS)),
    rng=st.randoms(use_true_random=False),
    n_new=st.integers(1, 20),
    n_ahead=st.integers(1, 6),
    drafter=st.sampled_from(["lookup", "corpus", "itself", "small", "wild", "none"]),
    n_stops=st.integers(0, 3),
)
def test_speculative_decoding_writes_the_same(name, rng, n_new, n_ahead, drafter, n_stops):
    model, (prompt,) = MODELS[name], random_prompts(rng, 1)
    propose = {
        "lookup": PromptLookup(),
        "corpus": PromptLookup(2, corpus=random_prompts(rng, 1, longest=200)[0]),
        "itself": DraftModel(model),
        "small": DraftModel(build(1, n_layers=1, context_length=16)),  # whose context ends first
        "wild": lambda ids, n: [rng.randrange(40) for _ in range(n + 3)],
        "none": lambda ids, n: [],
    }[drafter]
    stop_tokens = rng.sample(range(40), n_stops)
    expected = generate(model, [prompt], n_new, stop_tokens=stop_tokens)[0]
    for _ in range(2):  # a drafter may be used again
        result = generate_speculatively(
            model, prompt, n_new, propose, n_ahead=n_ahead, stop_tokens=stop_tokens
        )
        assert result.ids == expected
        assert 0 <= result.n_accepted <= result.n_proposed <= n_ahead * result.n_passes
        assert len(expected) <= result.n_passes + result.n_accepted <= n_new
    if drafter == "itself" and not n_stops:
        assert result.acceptance_rate in (1.0, 0.0) and result.n_passes == 1 + -(
            -(n_new - 1) // (n_ahead + 1)
        )


def test_prompt_lookup():
    lookup = PromptLookup(3, corpus=[8, 9, 30, 31])
    assert lookup([1, 2, 3, 4, 1, 2, 3], 2) == [4, 1]
    assert lookup([2, 5, 1, 2, 6, 1, 2], 3) == [6, 1, 2]  # the newest of the longest match
    assert lookup([1, 9], 5) == [30, 31]
    assert lookup([7, 7], 3) == [7]
    assert lookup([1, 2, 3], 4) == []


def test_a_draft_model_reads_each_token_once():
    n_read = []
    draft = build(1)
    handle = draft.register_forward_pre_hook(lambda _, arguments: n_read.append(arguments[0].shape[1]))
    propose = DraftModel(draft)
    first = propose([1, 2, 3], 3)
    assert first == generate(draft, [[1, 2, 3]], 3)[0]
    n_read.clear()
    wrong = [1, 2, 3, first[0], (first[1] + 1) % 40]
    proposed = propose(wrong, 2)
    handle.remove()
    assert n_read == [1, 1] and proposed == slowly(draft, wrong, 2)


def test_speculation_refuses_and_counts():
    with pytest.raises(ValueError, match="n_ahead must be at least 1, got 0"):
        generate_speculatively(MODEL, [1], 2, PromptLookup(), n_ahead=0)
    with pytest.raises(ValueError, match="context_length"):
        generate_speculatively(MODEL, [1] * 30, 3, PromptLookup())
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        PromptLookup(0)
    assert Speculation([1], 1, 0, 0).acceptance_rate == 0.0
    assert Speculation([1], 1, 8, 6).acceptance_rate == 0.75
