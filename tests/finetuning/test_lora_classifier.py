"""One call from texts and labels to an adapted classifier, saved as an adapter and a head."""

import json

import pytest
import torch

from shared.data.corpus import load_reviews, load_sms
from shared.data.models import has_model
from shared.finetuning.classification import load_classifier
from shared.finetuning.features import weights_hash
from shared.finetuning.lora import lora_layers, unmerge_lora
from shared.finetuning.lora_classifier import (
    head_of_words,
    load_adapted_classifier,
    open_classifier,
    prompted_rows,
    shipped_adapters,
    train_lora_classifier,
    upper_targets,
    watched_fifth,
)
from shared.finetuning.lora_files import base_hash
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer

THINGS = ("egg", "fish", "apple", "soup", "bean", "bread")
TEXTS = [
    f"{verb} the {thing} {how}" for how in ("now", "again") for verb in ("boil", "plant") for thing in THINGS
]
LABELS = ["kitchen" if text.startswith("boil") else "garden" for text in TEXTS]
OPTIONS = {"base": "tales-tiny", "rank": 4, "n_epochs": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module", params=[None, ("Text: ", " is for the")], ids=["plain", "prompt"])
def classifier(request):
    state = torch.get_rng_state()
    made = train_lora_classifier(TEXTS, LABELS, prompt=request.param, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is untouched
    return made


def test_it_learns_and_the_base_is_untouched(classifier):
    assert classifier.labels == ("garden", "kitchen")
    assert sum(a == b for a, b in zip(classifier.predict(TEXTS), LABELS, strict=True)) >= 20  # of 24
    assert base_hash(classifier.body) == weights_hash(load_pretrained("tales-tiny", dtype=torch.float32))


def test_saved_and_loaded(classifier, tmp_path):
    classifier.save(tmp_path / "mine", note="of a test")
    about = json.loads((tmp_path / "mine" / "adapter.json").read_text(encoding="utf-8"))
    assert about["note"] == "of a test" and about["base"] == "tales-tiny"
    for load in (load_adapted_classifier, open_classifier):
        again = load(tmp_path / "mine")
        torch.testing.assert_close(again.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
        assert again.prompt == classifier.prompt and again.labels == classifier.labels
    # Merged for speed, and apart again.
    unmerge_lora(again.body)
    torch.testing.assert_close(again.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    with pytest.raises(FileExistsError):
        classifier.save(tmp_path / "mine")


def test_the_seed_decides(classifier):
    prompt = classifier.prompt if any(classifier.prompt) else None
    again = train_lora_classifier(TEXTS, LABELS, prompt=prompt, **OPTIONS)
    torch.testing.assert_close(again.predict_proba(TEXTS), classifier.predict_proba(TEXTS))


def test_frozen_blocks_are_read_once_and_change_nothing():
    n_layers = len(load_pretrained("tales-tiny").blocks)
    made = train_lora_classifier(TEXTS, LABELS, n_frozen=n_layers - 1, **OPTIONS)
    assert {path.split(".")[1] for path in lora_layers(made.body)} == {str(n_layers - 1)}
    # The same adapter in the whole model: the states that were kept are those that the lower blocks compute.
    assert made.predict_proba(TEXTS).shape == (24, 2)


def test_a_lower_part_has_no_final_norm(tmp_path):
    made = train_lora_classifier(TEXTS, LABELS, n_blocks=1, **OPTIONS)
    made.save(tmp_path / "lower")
    again = load_adapted_classifier(tmp_path / "lower")
    assert len(again.body.blocks) == 1 and isinstance(again.body.final_norm, torch.nn.Identity)
    torch.testing.assert_close(again.predict_proba(TEXTS), made.predict_proba(TEXTS))


def test_the_head_of_words_says_what_the_model_would_say():
    model, encoding = load_pretrained("tales-tiny"), load_tokenizer("tales-tiny")
    head = head_of_words(model, encoding, ("dog", "fox"))
    ids = torch.tensor([encoding.encode_ordinary("Once upon a time there was a")])
    with torch.no_grad():
        wanted = model(ids)[0, -1, [encoding.encode_ordinary(w)[0] for w in (" dog", " fox")]]
        torch.testing.assert_close(head(model.hidden_states(ids))[0, -1], wanted)
    with pytest.raises(ValueError, match="labels that begin with different tokens"):
        head_of_words(model, encoding, ("dog", "dog"))


def test_the_prompt_is_around_the_text_and_cut_texts_are_counted():
    encoding = load_tokenizer("tales-tiny")
    before, behind = (encoding.encode_ordinary(part) for part in ("Text: ", " is"))
    rows = prompted_rows(encoding, ["the dog"], ("Text: ", " is"), 256)
    assert rows == [[*before, *encoding.encode_ordinary("the dog"), *behind]]
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to"):
        rows = prompted_rows(encoding, ["the dog " * 90, "the dog"], ("Text: ", " is"), 64)
    assert len(rows[0]) == 64 and rows[0][-len(behind) :] == behind
    with pytest.raises(ValueError, match="prompt must be shorter than 8 tokens"):
        prompted_rows(encoding, ["the dog"], ("a long prompt " * 9, ""), 8)


def test_targets_above_the_frozen_blocks():
    model = load_pretrained("tales-3m")
    assert upper_targets(model, "all-linear", 0) == ("all-linear",)
    found = upper_targets(model, ("query", "value"), 3)
    assert found == tuple(f"blocks.{i}.attention.{part}" for i in (3, 4) for part in ("query", "value"))
    with pytest.raises(ValueError, match="n_frozen must be below the blocks of"):
        upper_targets(model, "blocks.1.feed_forward.up", 3)


@pytest.mark.parametrize(
    ("texts", "labels", "options", "message"),
    [
        (TEXTS, LABELS[1:], {}, "labels must be 24, one for each text"),
        (TEXTS, ["one"] * 24, {}, "labels must be of at least two kinds"),
        (TEXTS, ["one"] * 20 + ["two"] * 4, {}, "at least 5 of each kind"),
        (["", *TEXTS[1:]], LABELS, {}, r"texts\[0\]"),
        (TEXTS, LABELS, {"rank": 0}, "rank must be at least 1"),
        (TEXTS, LABELS, {"targets": "q_proj"}, "targets must be names such as"),
        (TEXTS, LABELS, {"base": "tales-9m"}, "name_or_path"),
        (TEXTS, LABELS, {"prompt": ("", "?"), "n_blocks": 1}, "None where there is a prompt"),
        (TEXTS, ["a b", "a c"] * 12, {"prompt": ("", "?")}, "different tokens"),
        (TEXTS, LABELS, {"n_frozen": 99}, "n_frozen must be"),
        (TEXTS, LABELS, {"watched": ((), ())}, "watched must be None, or"),
        (TEXTS, LABELS, {"watched": (["dig"], ["garden", "kitchen"])}, "watched must be None, or"),
        (TEXTS, LABELS, {"watched": (["row"], ["boat"])}, "of those that are learned"),
    ],
)
def test_bad_input(texts, labels, options, message):
    with pytest.raises(ValueError, match=message):
        train_lora_classifier(texts, labels, **{**OPTIONS, **options})


def test_texts_to_watch_can_be_given():
    options = {**OPTIONS, "n_epochs": 2, "seed": 3}
    numbers = [sorted(set(LABELS)).index(label) for label in LABELS]
    aside = watched_fifth(numbers, seed=3)
    assert [sum(numbers[i] == label for i in aside) for label in (0, 1)] == [2, 2]
    pick = lambda wanted: [
        [items[i] for i in range(len(TEXTS)) if (i in aside) == wanted] for items in (TEXTS, LABELS)
    ]
    # The fifth that would be drawn, given by hand: the same classifier to the last bit.
    given = train_lora_classifier(*pick(False), watched=pick(True), **options)
    drawn = train_lora_classifier(TEXTS, LABELS, **options)
    assert torch.equal(given.predict_proba(TEXTS), drawn.predict_proba(TEXTS))


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="name_or_path must be one of"):
        load_adapted_classifier("no-such-adapter")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError):
        load_adapted_classifier(tmp_path / "other")
    (tmp_path / "other" / "adapter.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds an adapter, but no classifier"):
        load_adapted_classifier(tmp_path / "other")
    with pytest.raises(ValueError, match="name_or_path"):
        open_classifier("no-such-classifier")
    assert type(open_classifier("spam")) is type(load_classifier("spam"))


needs_smollm2 = pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")


def test_the_shipped_adapters_are_small():
    assert shipped_adapters() == ["filter-lora", "sentiment-lora", "spam-lora"]
    for name in shipped_adapters():
        assert sum(path.stat().st_size for path in (CHECKPOINTS / name).iterdir()) < 2_100_000


@needs_smollm2
@pytest.mark.parametrize(("name", "load"), [("spam-lora", load_sms), ("sentiment-lora", load_reviews)])
def test_the_shipped_adapters_are_as_good_as_they_say(name, load):
    about = json.loads((CHECKPOINTS / name / "adapter.json").read_text(encoding="utf-8"))
    said, _, n = about["result"].split()[:3]
    rows = load("test")
    assert len(rows) == int(n)
    sample = rows[::4]
    found = load_adapted_classifier(name)
    n_right = sum(a == b.label for a, b in zip(found.predict([r.text for r in sample]), sample, strict=True))
    # A quarter of the texts: within three standard errors of what the whole split gave.
    share = int(said) / int(n)
    assert abs(n_right / len(sample) - share) < 3 * (share * (1 - share) / len(sample)) ** 0.5
