"""Attacks keep to their budget and change what they say; adversarial training leaves no trace in the weights."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.finetuning.adversarial import (
    LETTERS,
    adversarial_loss,
    append_word,
    attack,
    change_often,
    insert_mark,
    of_length,
    replace_letter,
    swap_letters,
    worst_shift,
)
from shared.finetuning.features import pad_inputs
from shared.finetuning.tuning import GPTClassifier, fine_tune, set_trainable, summed_label_loss
from shared.model.gpt import GPTConfig, GPTModel
from tests.timing import seconds

TEXTS = st.text(max_size=60)
SEEDS = st.integers(0, 1000)
LOOKS = {"a": "α@", "e": "ε"}


@given(TEXTS, SEEDS)
def test_swapping_moves_two_letters_and_keeps_ends_of_words(text, seed):
    changed = swap_letters(text, random.Random(seed))
    assert sorted(changed) == sorted(text)
    moved = [i for i, (a, b) in enumerate(zip(text, changed, strict=True)) if a != b]
    assert len(moved) in (0, 2)
    if moved:
        first, second = moved
        assert second == first + 1 and LETTERS.match(text[first - 1]) and LETTERS.match(text[second + 1])


@given(TEXTS, SEEDS)
def test_a_replaced_letter_comes_from_the_table(text, seed):
    changed = replace_letter(text, random.Random(seed), LOOKS)
    moved = [(a, b) for a, b in zip(text, changed, strict=True) if a != b]
    assert len(moved) == any(char.lower() in LOOKS for char in text)
    assert all(b in LOOKS[a.lower()] for a, b in moved)


@given(TEXTS, SEEDS)
def test_a_mark_stands_between_two_letters(text, seed):
    changed = insert_mark(text, random.Random(seed), "|")
    assert changed.replace("|", "") == text.replace("|", "")
    if changed != text:
        assert len(changed) == len(text) + 1


def test_small_cases():
    rng = random.Random(0)
    assert swap_letters("abcd", rng) == "acbd"
    assert swap_letters("abb a cat 1234", rng) == "abb a cat 1234"  # nothing that could be exchanged
    assert replace_letter("xyz", rng, LOOKS) == "xyz"
    assert insert_mark("a b", rng, ".") == "a b" and insert_mark("ab", rng, ".") == "a.b"
    assert append_word("hello", rng, ["you"]) == "hello you"
    assert change_often("a", partial(append_word, words=["b"]), 3, rng) == "a b b b"
    for change in (swap_letters, partial(replace_letter, table=LOOKS), partial(insert_mark, marks=".")):
        with pytest.raises(TypeError, match="text"):
            change(None, rng)


def test_nothing_to_choose_from_is_refused():
    with pytest.raises(ValueError, match="marks must be at least one character"):
        insert_mark("a", random.Random(0), "")
    with pytest.raises(ValueError, match="words must be at least one"):
        append_word("a", random.Random(0), [])


def length_score(texts: list[str]) -> list[float]:
    return [1 - len(text) / 20 for text in texts]


def test_an_attack_stops_at_the_threshold_and_at_the_budget():
    add = partial(append_word, words=["b"])
    weak, strong, below = attack(["a" * 7, "a", "a" * 15], length_score, add, n_queries=9, width=4)
    # Two letters a step: 7 + 2 + 2 letters are below one half, and two steps of four are all that nine questions buy.
    assert (weak.text, weak.n_changes, weak.n_queries) == ("aaaaaaa b b", 2, 8)
    assert (strong.text, strong.n_changes, strong.n_queries) == ("a b b", 2, 8)
    assert (below.text, below.n_changes, below.n_queries) == ("a" * 15, 0, 0)
    assert weak.score == pytest.approx(1 - 11 / 20)


def test_what_makes_it_worse_is_not_kept():
    def shorten(text: str, rng: random.Random) -> str:
        return text[:-1]

    (end,) = attack(["aaaa"], length_score, shorten, n_queries=8, width=2)
    assert (end.text, end.n_changes, end.n_queries) == ("aaaa", 0, 8)


def test_an_attack_does_not_depend_on_the_neighbours():
    texts = ["You are a winner", "Reply now to claim", "Free entry"]

    def score(texts: list[str]) -> np.ndarray:
        return np.array([sum(map(ord, text)) % 1000 / 1000 + 0.5 for text in texts])

    together = attack(texts, score, swap_letters, seed=3)
    assert [attack([text], score, swap_letters, seed=3)[0] for text in texts] == together
    assert attack([], score, swap_letters) == []


@pytest.mark.parametrize(
    "options", [{"n_queries": 0}, {"width": 0}, {"n_queries": 4, "width": 8}], ids=lambda o: str(o)
)
def test_impossible_budgets_are_refused_before_anything_is_asked(options):
    with pytest.raises(ValueError, match="|".join(options)):
        attack(["a"], lambda texts: pytest.fail("asked"), swap_letters, **options)
    with pytest.raises(TypeError, match="texts"):
        attack("a text", lambda texts: pytest.fail("asked"), swap_letters)


@pytest.mark.parametrize(
    "change", [swap_letters, partial(replace_letter, table=LOOKS), partial(insert_mark, marks=".")]
)
def test_time_does_not_grow_with_the_square_of_the_length(change):
    short, long = (seconds(partial(change, "abc d " * n, random.Random(0))) for n in (3_000, 24_000))
    assert long < 32 * short + 0.05  # eight times as long: a square would be 64


@pytest.fixture
def classifier() -> GPTClassifier:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, context_length=16, emb_dim=16, n_heads=2, n_layers=2, dropout=0.0)
    found = GPTClassifier(GPTModel(config), 2)
    torch.nn.init.normal_(found.head.weight)
    return found


@pytest.fixture
def batch() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    return pad_inputs([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]), torch.tensor([1, 0, 1])


@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_the_shift_has_its_length_raises_the_loss_and_spares_padding(classifier, batch, n_steps):
    (tokens, mask), targets = batch
    embedded = classifier.body.token_embedding(tokens)
    shift = worst_shift(classifier, embedded, mask, targets, radius=0.1, n_steps=n_steps)
    torch.testing.assert_close(shift.flatten(1).norm(dim=1), torch.full((3,), 0.1))
    assert not shift[~mask].any() and not shift.requires_grad
    loss = partial(torch.nn.functional.cross_entropy, target=targets, reduction="none")
    with torch.no_grad():
        assert (loss(classifier((embedded + shift, mask))) > loss(classifier((embedded, mask)))).all()


def test_one_step_is_the_gradient_with_the_length_of_the_radius(classifier, batch):
    (tokens, mask), targets = batch
    embedded = classifier.body.token_embedding(tokens).detach().requires_grad_()
    summed = torch.nn.functional.cross_entropy(classifier((embedded, mask)), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(summed, embedded)
    shift = worst_shift(classifier, embedded, mask, targets, radius=0.3)
    torch.testing.assert_close(
        shift, torch.nn.functional.normalize(gradient.flatten(1), dim=1).view_as(shift) * 0.3
    )


def test_the_weights_are_the_same_bits_and_have_no_gradient(classifier, batch):
    (tokens, mask), targets = batch
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    worst_shift(classifier, classifier.body.token_embedding(tokens), mask, targets, radius=5.0, n_steps=3)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_no_gradient_makes_no_nan(classifier, batch):
    torch.nn.init.zeros_(classifier.head.weight)  # the logits no longer depend on the text
    loss = adversarial_loss(classifier, *batch, radius=1.0, n_steps=2)
    assert loss.item() == pytest.approx(summed_label_loss(classifier, *batch).item())
    assert torch.equal(of_length(torch.zeros(2, 3, 4), 1.0), torch.zeros(2, 3, 4))
    tiny = of_length(torch.full((1, 1, 4), 1e-30), 1.0)
    assert torch.isfinite(tiny).all()


def test_a_frozen_embedding_can_be_shifted_too(classifier, batch):
    set_trainable(classifier, "head")
    loss = adversarial_loss(classifier, *batch, radius=0.5)
    assert loss > summed_label_loss(classifier, *batch)
    (gradient,) = torch.autograd.grad(loss, classifier.head.weight)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "options", [{"radius": 0.0}, {"radius": float("nan")}, {"radius": 1.0, "n_steps": 0}], ids=str
)
def test_impossible_shifts_are_refused(classifier, batch, options):
    with pytest.raises(ValueError, match="n_steps" if "n_steps" in options else "radius"):
        adversarial_loss(classifier, *batch, **options)


def test_training_against_the_worst_shift_makes_it_less_bad(classifier):
    torch.manual_seed(1)
    rows = [torch.randint(0, 25, (6,)).tolist() for _ in range(40)]
    rows += [torch.randint(20, 50, (6,)).tolist() for _ in range(40)]
    labels = [0] * 40 + [1] * 40
    inputs, targets = pad_inputs(rows), torch.tensor(labels)
    rises = []
    for loss in (summed_label_loss, partial(adversarial_loss, radius=0.5)):
        torch.manual_seed(0)
        model = GPTClassifier(GPTModel(classifier.body.config), 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        fine_tune(model, rows, labels, (rows, labels), optimizer, n_epochs=8, loss=loss, patience=8)
        clean = summed_label_loss(model, inputs, targets).item()
        # Twice the half-and-half loss, less the clean one: the loss at the worst shift.
        rises.append(2 * adversarial_loss(model, inputs, targets, radius=0.5).item() - 2 * clean)
    assert rises[1] < 0.8 * rises[0]
