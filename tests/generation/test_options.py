"""`shared.generation.options`: plain values become the chain that transformers makes of them; the rest is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from shared.generation.engine import apply_processors, generate, stream
from shared.generation.options import GenerationOptions
from shared.generation.sampling import (
    CountPenalty,
    MinP,
    NoRepeatNGram,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from shared.generation.streaming import generate_text, stream_text
from shared.tales.encoding import tale_encoding
from tests.generation.decoders import build

ENCODING = tale_encoding()
MODEL = build(vocab_size=ENCODING.n_vocab)
THEIRS = GPT2LMHeadModel(
    GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None)
)


@settings(deadline=None, max_examples=60)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.1, 3),
            "top_k": st.integers(1, 30),
            "top_p": st.floats(0.05, 0.99),
            "min_p": st.floats(0.01, 0.9),
            "typical": st.floats(0.05, 0.99),
            "repetition_penalty": st.floats(0.5, 2),
            "no_repeat_ngram": st.integers(1, 3),
        },
    ),
    seed=st.integers(0, 10**6),
)
def test_the_chain_is_that_of_transformers(values, seed):
    named = {"typical": "typical_p", "no_repeat_ngram": "no_repeat_ngram_size"}
    config = GenerationConfig(
        do_sample=True, **{"top_k": 0} | {named.get(name, name): value for name, value in values.items()}
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, (2, 8), generator=generator)
    logits = 3 * torch.randn(2, 30, generator=generator, dtype=torch.float64)
    theirs = THEIRS._get_logits_processor(config, input_ids_seq_length=8)(ids, logits.clone())
    ours = apply_processors(GenerationOptions(**values).processors(), ids, logits)
    rows = (theirs > -math.inf).any(dim=-1)  # where theirs leaves nothing, ours does
    torch.testing.assert_close(ours[rows].softmax(-1), theirs[rows].softmax(-1), atol=1e-12, rtol=1e-9)


def test_only_what_changes_something_becomes_a_processor():
    assert GenerationOptions().processors() == ()
    everything = GenerationOptions(
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        typical=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        no_repeat_ngram=2,
    )
    penalties = (RepetitionPenalty(1.2), CountPenalty(0.3, 0.4), NoRepeatNGram(2))
    cuts = (Temperature(0.5), TopK(5), TopP(0.9), MinP(0.1), Typical(0.8))
    assert everything.processors() == penalties + cuts
    greedy = dataclasses.replace(everything, temperature=0)
    assert greedy.processors() == penalties and greedy.text_arguments()["temperature"] == 0


def test_texts_are_those_of_the_engine():
    options = GenerationOptions(max_new_tokens=12, temperature=0.7, top_k=50, seed=3)
    chain = [Temperature(0.7), TopK(50)]
    ids = ENCODING.encode_ordinary("One day")
    plain = generate_text(MODEL, ENCODING, "One day", 12, temperature=1.0, processors=chain, seed=3)
    assert generate_text(MODEL, ENCODING, "One day", **options.text_arguments()) == plain
    assert "".join(stream_text(MODEL, ENCODING, "One day", **options.text_arguments())) == plain
    rows = generate(MODEL, [ids, ids], 12, temperature=1.0, processors=chain, seed=3)
    assert generate(MODEL, [ids, ids], **options.id_arguments()) == rows
    assert list(stream(MODEL, ids, **options.id_arguments())) == rows[0]
    greedy = dataclasses.replace(options, temperature=0, seed=None)
    assert generate(MODEL, [ids], **greedy.id_arguments()) == generate(MODEL, [ids], 12)


def test_stops_and_overflow_are_passed_on():
    ids = ENCODING.encode_ordinary("One day")
    free = GenerationOptions(max_new_tokens=20, temperature=0, stop_tokens=[])
    text = generate_text(MODEL, ENCODING, ids, **free.text_arguments())
    stop = text[len(text) // 2]
    stopped = dataclasses.replace(free, stop_strings=[stop])
    assert generate_text(MODEL, ENCODING, ids, **stopped.text_arguments()) == text.partition(stop)[0]
    written = generate(MODEL, [ids], **free.id_arguments())[0]
    ended = dataclasses.replace(free, stop_tokens=[written[5]])
    assert generate(MODEL, [ids], **ended.id_arguments())[0] == written[: written.index(written[5])]
    long = dataclasses.replace(free, max_new_tokens=40)
    with pytest.raises(ValueError, match="context_length"):
        generate(MODEL, [ids], **long.id_arguments())
    assert len(generate(MODEL, [ids], **dataclasses.replace(long, overflow="slide").id_arguments())[0]) == 40
    with pytest.raises(ValueError, match="stop_strings must be empty"):
        stopped.id_arguments()


def test_they_are_values_and_survive_json():
    options = GenerationOptions(stop_strings=["END"], stop_tokens=[1, 2], min_p=0.1, seed=7)
    assert GenerationOptions(**json.loads(json.dumps(dataclasses.asdict(options)))) == options
    assert options.stop_strings == ("END",) and options.stop_tokens == (1, 2) and hash(options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1
    with pytest.raises(TypeError, match="temprature"):
        GenerationOptions(temprature=1.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 2.0, True, "5", None, np.True_, torch.tensor(True)]),
        ("temperature", [-1, 1e-7, math.nan, math.inf, "1", True, None]),
        ("top_k", [-1, 2.5, True, None]),
        ("top_p", [0, 1.01, math.nan, "0.9"]),
        ("min_p", [-0.1, 1.01, math.nan, None, False]),
        ("typical", [0, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, math.inf]),
        ("presence_penalty", [math.nan, "1", math.inf]),
        ("frequency_penalty", [-math.inf, None]),
        ("no_repeat_ngram", [-1, 1.5, True]),
        ("stop_strings", ["END", 5]),
        ("stop_tokens", [3, "12"]),
        ("seed", [-1, 1.5, "first", True, 2**63]),
        ("overflow", ["wrap", None, 1]),
    ],
)
def test_bad_values(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be .*got") as error:
            GenerationOptions(**{name: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("stop_strings", [""]), ("stop_tokens", [1, -1]), ("stop_tokens", ["a"])]
)
def test_bad_entries(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor])
@pytest.mark.parametrize("whole", [np.int64, np.uint8, torch.tensor])
def test_numbers_of_numpy_and_torch_become_numbers_of_python(number, whole):
    wholes = {"max_new_tokens": 8, "top_k": 5, "no_repeat_ngram": 2, "seed": 3}
    others = {"temperature": 0.5, "top_p": 0.75, "min_p": 0.25, "typical": 0.5, "repetition_penalty": 1.5}
    others |= {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    options = GenerationOptions(
        **{name: whole(value) for name, value in wholes.items()},
        **{name: number(value) for name, value in others.items()},
        stop_tokens=[whole(1), whole(2)],
    )
    plain = GenerationOptions(**wholes, **others, stop_tokens=[1, 2])
    assert options == plain and repr(options) == repr(plain) and hash(options) == hash(plain)
    assert json.loads(json.dumps(dataclasses.asdict(options))) == json.loads(
        json.dumps(dataclasses.asdict(plain))
    )


@pytest.mark.parametrize("series", [iter, set, tuple, list])
def test_stops_may_come_in_any_series(series):
    options = GenerationOptions(stop_tokens=series([7]), stop_strings=series(["END"]))
    assert options.stop_tokens == (7,) and options.stop_strings == ("END",)
    assert GenerationOptions(stop_tokens=np.array([7, 8])).stop_tokens == (7, 8)
    assert GenerationOptions(stop_tokens=torch.tensor([7, 8])).stop_tokens == (7, 8)
