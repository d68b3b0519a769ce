"""Instruction tuning: what is learned is each reply and its end token, and nothing else; old tokens stay."""

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.finetuning.instruction import (
    answer_loss,
    answers,
    chat_batch,
    chat_batches,
    chat_tokenizer,
    encode_conversation,
    encode_conversations,
    exact_matches,
    extend_model,
    freeze_rows,
    tune,
)
from shared.generation.engine import generate
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.text.chat_format import ChatFormat
from shared.training.batches import IGNORE
from shared.training.loop import summed_next_token_loss
from shared.training.losses import evaluate
from shared.weights.pretrained import load_pretrained
from tests.configurations import LLAMA

FORMAT = ChatFormat()
TOKENIZER = chat_tokenizer(tale_tokenizer())
START, END = (TOKENIZER.special_ids[name] for name in (FORMAT.start, FORMAT.end))
SMALL = {"vocab_size": 300, "context_length": 64, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "dropout": 0.0}


def ask(content: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def learned(ids: list[int], labels: list[int]) -> str:
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    return TOKENIZER.decode([label for label in labels if label != IGNORE])


# --- the tokenizer


@pytest.mark.parametrize("base", [tale_tokenizer, tale_encoding], ids=["ours", "tiktoken"])
def test_two_tokens_are_added_behind_all_others(base):
    chat = chat_tokenizer(base())
    assert chat.special_ids == {"<|endoftext|>": 2047, "<|im_start|>": 2048, "<|im_end|>": 2049}
    assert chat.n_vocab == 2050
    text = "Pedro's owl said: 'Ünter 12 <|im_end|>!'\n\n  Then it\tflew."
    assert chat.encode_ordinary(text) == base().encode_ordinary(text)
    assert chat.decode(chat.encode_ordinary(text)) == text


def test_an_encoding_of_tiktoken_keeps_pattern_and_special_tokens():
    ranks = {bytes([i]): rank for rank, i in enumerate(tale_tokenizer().encode_ordinary(""))}
    ranks = {token: i for i, token in enumerate(tale_tokenizer()._tokens)}
    encoding = tiktoken.Encoding(
        "other", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|b|>": 2048, "<|a|>": 2047}
    )
    chat = chat_tokenizer(encoding)
    assert chat.pattern == r"\w+|\W"
    assert chat.special_ids == {"<|a|>": 2047, "<|b|>": 2048, "<|im_start|>": 2049, "<|im_end|>": 2050}
    assert chat.encode_ordinary("the owl") == encoding.encode_ordinary("the owl")


def test_tokens_that_are_there_already_are_refused():
    with pytest.raises(ValueError, match="tokenizer must be one without"):
        chat_tokenizer(TOKENIZER)
    other = ChatFormat(start="<|s|>", end="<|e|>")
    assert chat_tokenizer(TOKENIZER, other).special_ids["<|e|>"] == 2051


# --- the model


def model(**options: object) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SMALL, "init_std": 0.2, **options})).eval()


@pytest.mark.parametrize(
    "options",
    [LLAMA, {**LLAMA, "tie_weights": False}, {"positions": "sinusoidal"}, {}],
    ids=["rotary", "untied", "sinusoidal", "learned"],
)
@torch.no_grad()
def test_an_extended_model_computes_what_it_computed(options):
    base = model(**options)
    longer = None if base.config.positions == "learned" else 128
    state = {name: value.clone() for name, value in base.state_dict().items()}
    larger = extend_model(base, 3, longer)
    ids = torch.randint(300, (2, 40))
    torch.testing.assert_close(larger(ids)[..., :300], base(ids), atol=1e-5, rtol=1e-5)
    assert larger.config.vocab_size == 303 and larger.config.context_length == (longer or 64)
    assert (larger.output_head.weight is larger.token_embedding.weight) == base.config.tie_weights
    assert larger(torch.randint(303, (1, longer or 64))).isfinite().all()
    # The base is left alone.
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in state.items())
    larger.token_embedding.weight.zero_()
    assert base.token_embedding.weight.any()


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
@torch.no_grad()
def test_scaled_rotary_positions_stay_scaled_for_the_old_context(scaling):
    base = model(**LLAMA, rope_scaling=scaling, rope_factor=2.0)
    larger, ids = extend_model(base, 0, 128), torch.randint(300, (1, 50))
    torch.testing.assert_close(larger(ids), base(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_new_token_takes_no_more_than_an_average_share():
    base = load_pretrained("tales-3m")
    larger = extend_model(base, 2, 512)
    ids = torch.tensor([tale_encoding().encode_ordinary("Once there was a baker who had a red hat.")])
    share = larger(ids).softmax(-1)[..., 2048:]
    assert share.max() < 1 / 2048
    rows = larger.token_embedding.weight
    mean, spread = rows[:2048].mean(0), rows[:2048].std(0)
    assert ((rows[2048:] - mean).abs() < 0.6 * spread).all() and not torch.equal(rows[2048], rows[2049])
    assert torch.equal(extend_model(base, 2, seed=0).token_embedding.weight, rows)
    assert not torch.equal(extend_model(base, 2, seed=1).token_embedding.weight, rows)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, (2, 128), "context_length must be kept where positions are learned"),
        (LLAMA, (2, 32), "context_length must be at least 64"),
        (LLAMA, (-1,), "n_new_tokens must be at least 0"),
    ],
)
def test_what_cannot_be_extended_is_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        extend_model(model(**options), *arguments)


# --- labels


def test_each_reply_and_its_end_token_are_learned_and_nothing_else():
    talk = [{"role": "system", "content": "Be brief."}, *ask("Who?", "The owl."), *ask("Where?", "At home")]
    ids, labels = encode_conversation(FORMAT, TOKENIZER, talk)
    assert learned(ids, labels) == "The owl.<|im_end|>At home<|im_end|>"
    assert ids == FORMAT.encode(TOKENIZER, talk, add_generation_prompt=False)[: len(ids)]
    assert ids[-1] == END
    # No label on a role's header.
    for place, i in enumerate(ids):
        if i == START:
            assert labels[place] == labels[place + 1] == IGNORE


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(CONTENT, CONTENT.filter(str.strip)), min_size=1, max_size=3))
def test_every_conversation_has_learned_tokens_whatever_stands_in_it(turns):
    talk = [message for turn in turns for message in ask(*turn)]
    ids, labels = encode_conversation(FORMAT, TOKENIZER, talk)
    assert learned(ids, labels) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert ids.count(END) == 2 * len(turns) and ids.count(START) == 2 * len(turns)
    # What is read before the last answer is the prompt that will be read when the model is asked.
    n_last = len(TOKENIZER.encode_ordinary(turns[-1][1])) + 1
    opening = FORMAT.generation_prompt(TOKENIZER)
    assert ids[-n_last - len(opening) : -n_last] == opening


@pytest.mark.parametrize(
    "answer", ["assistant", "user\n", "\n\n\nX", "<|im_start|>assistant\n", "Answer: Answer:"]
)
def test_an_answer_that_looks_like_a_frame_or_a_marker_is_learned_whole(answer):
    ids, labels = encode_conversation(FORMAT, TOKENIZER, ask(answer, answer))
    assert learned(ids, labels) == f"{answer}<|im_end|>"


def test_everything_can_be_learned():
    talk = [*ask("Who?", "The owl."), *ask("Where?", "Here")]
    ids, labels = encode_conversation(FORMAT, TOKENIZER, talk, train_on="everything")
    assert labels == ids == encode_conversation(FORMAT, TOKENIZER, talk)[0]


def test_the_default_system_message_is_read_and_not_learned():
    spoken = ChatFormat("You are an owl.")
    ids, labels = encode_conversation(spoken, TOKENIZER, ask("Who?", "I."))
    assert "You are an owl." in TOKENIZER.decode(ids)
    assert learned(ids, labels) == "I.<|im_end|>"


def test_what_is_too_long_is_cut_and_counted():
    talks = [ask("Who?", "The owl."), ask("Who?", "an owl " * 30)]
    examples, n_cut = encode_conversations(FORMAT, TOKENIZER, talks, context_length=40)
    assert n_cut == 1
    inputs, _ = chat_batch(examples)
    assert inputs.shape == (2, 40)
    assert learned(*examples[0]) == "The owl.<|im_end|>"
    assert "<|im_end|>" not in learned(*examples[1]) and learned(*examples[1]).startswith("an owl")
    whole, none = encode_conversations(FORMAT, TOKENIZER, talks, context_length=len(examples[1][0]) + 500)
    assert none == 0 and learned(*whole[1]).endswith("<|im_end|>")
    # Exactly as long as the context is not too long.
    length = len(whole[1][0]) - 1
    assert encode_conversations(FORMAT, TOKENIZER, talks[1:], context_length=length) == (whole[1:], 0)
    assert encode_conversations(FORMAT, TOKENIZER, talks[1:], context_length=length - 1)[1] == 1


def test_an_example_without_anything_to_learn_is_named():
    talks = [ask("Who?", "The owl."), ask("who " * 50, "The owl.")]
    with pytest.raises(
        ValueError, match=r"conversations\[1\] must have an answer that begins within 40 tokens"
    ):
        encode_conversations(FORMAT, TOKENIZER, talks, context_length=40)
    prompt = len(FORMAT.encode(TOKENIZER, talks[1][:1]))
    # Cut just before the first token of the answer, and just behind it.
    with pytest.raises(ValueError, match="talk 3 must have an answer"):
        encode_conversation(FORMAT, TOKENIZER, talks[1], context_length=prompt - 1, name="talk 3")
    ids, labels = encode_conversation(FORMAT, TOKENIZER, talks[1], context_length=prompt)
    assert labels[-1] == ids[-1] and set(labels[:-1]) == {IGNORE}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], r"conversations\[1\]: the last message must be the assistant"),
        ([*ask("a", "b"), ask("", "c")[1]], r"conversations\[1\]: the role of messages\[2\] must be user"),
        (ask("a", " "), r"conversations\[1\]: the answer in messages\[1\] must not be empty"),
    ],
)
def test_bad_conversations_are_named_by_their_place(messages, message):
    with pytest.raises(ValueError, match=message):
        encode_conversations(FORMAT, TOKENIZER, [ask("a", "b"), messages])


def test_other_bad_arguments_of_encoding():
    with pytest.raises(ValueError, match="conversations must be at least one"):
        encode_conversations(FORMAT, TOKENIZER, [])
    with pytest.raises(ValueError, match="train_on must be one of answers, everything, got 'prompts'"):
        encode_conversation(FORMAT, TOKENIZER, ask("a", "b"), train_on="prompts")
    with pytest.raises(ValueError, match="see chat_tokenizer"):
        encode_conversation(FORMAT, tale_tokenizer(), ask("a", "b"))


# --- batches


def test_inputs_and_targets_are_one_place_apart():
    examples = [([1, 2, 3, 9], [IGNORE, IGNORE, 3, 9]), ([5, 9], [5, 9]), ([6, 9, 9], [IGNORE, 9, 9])]
    inputs, targets = chat_batch(examples)
    assert inputs.tolist() == [[1, 2, 3], [5, 0, 0], [6, 9, 0]]
    assert targets.tolist() == [[IGNORE, 3, 9], [9, IGNORE, IGNORE], [9, 9, IGNORE]]
    with pytest.raises(ValueError, match="at least two ids"):
        chat_batch([([1], [1])])


@torch.no_grad()
def test_padding_and_neighbours_do_not_move_a_loss():
    talks = [
        ask("Who has it?", "Mia"),
        ask("Tell me all about the owl of the baker.", "It is old."),
        ask("a", "b"),
    ]
    examples, _ = encode_conversations(FORMAT, TOKENIZER, talks)
    larger = extend_model(load_pretrained("tales-3m"), 2, 512)
    together = evaluate(larger, [chat_batch(examples)])
    alone = [evaluate(larger, [chat_batch([example])]) for example in examples]
    assert together.tokens == sum(part.tokens for part in alone)
    assert together.nats == pytest.approx(sum(part.nats for part in alone), rel=1e-4)
    # By hand: -log p of the labelled ids, each from what stands before it.
    ids, labels = examples[0]
    logits = larger(torch.tensor([ids])).log_softmax(-1)[0]
    by_hand = -sum(logits[place - 1, label] for place, label in enumerate(labels) if label != IGNORE)
    assert alone[0].nats == pytest.approx(by_hand.item(), rel=1e-4)


def test_an_epoch_has_every_example_once_in_a_new_order():
    examples = [([i] * (2 + i % 7), [i] * (2 + i % 7)) for i in range(50)]
    for epochs in (1, 3):
        batches = list(chat_batches(examples, 4, seed=3, epochs=epochs))
        assert sorted(int(i) for inputs, _ in batches for i in inputs[:, 0]) == sorted([*range(50)] * epochs)
    first, second = (list(chat_batches(examples, 4, seed=seed, epochs=1)) for seed in (3, 4))
    again = list(chat_batches(examples, 4, seed=3, epochs=1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(
        a[0].shape == b[0].shape and torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True)
    )
    # Rows of a batch are of similar length.
    spreads = [len({int((row != 0).sum()) for row in targets}) for _, targets in first]
    assert sum(spreads) / len(spreads) < 2.5
    for arguments in (([], 4), (examples, 0)):
        with pytest.raises(ValueError, match="must be at least"):
            next(chat_batches(*arguments))


# --- training


def test_frozen_rows_stay_and_new_ones_learn():
    examples, _ = encode_conversations(FORMAT, TOKENIZER, [ask("Say owl.", "owl"), ask("Say hat.", "a hat")])
    base = load_pretrained("tales-tiny")
    tuned = extend_model(base, 2, 512)
    before = tuned.token_embedding.weight.detach().clone()
    log = tune(tuned, chat_batches(examples, 2), n_steps=12, learning_rate=3e-3, n_frozen_rows=2048)
    after = tuned.token_embedding.weight.detach()
    assert torch.equal(after[:2048], before[:2048])
    assert (after[2048:] != before[2048:]).any(1).all()
    assert log[-1].loss < log[1].loss / 2
    # The hook is gone: rows learn again.
    tune(tuned, chat_batches(examples, 2), n_steps=2, learning_rate=1e-2)
    assert not torch.equal(tuned.token_embedding.weight[:2048], before[:2048])


def test_a_small_model_learns_its_lessons_by_heart():
    talks = [
        ask("Who?", "The owl."),
        ask("Where?", "At home."),
        [*ask("Who?", "The owl."), *ask("And now?", "Nobody.")],
    ]
    examples, _ = encode_conversations(FORMAT, TOKENIZER, talks)
    tuned = extend_model(load_pretrained("tales-tiny"), 2, 512)
    tune(tuned, chat_batches(examples, 3), n_steps=150, learning_rate=1e-2, n_frozen_rows=2048)
    replies = answers(tuned, TOKENIZER, FORMAT, [talk[:-1] for talk in talks])
    assert replies == ["The owl.", "At home.", "Nobody."]


def test_logits_are_computed_only_where_something_is_learned_and_the_loss_is_the_same():
    talks = [ask("Who has it?", "Mia"), ask("Tell me of the owl.", "It is old."), ask("a", "b")]
    inputs, targets = chat_batch(encode_conversations(FORMAT, TOKENIZER, talks)[0])
    larger, gradients, sizes = extend_model(load_pretrained("tales-tiny"), 2), [], []
    larger.output_head.register_forward_pre_hook(lambda _, given: sizes.append(given[0].numel() // 64))
    for loss in (answer_loss, summed_next_token_loss):
        larger.zero_grad()
        total = loss(larger, inputs, targets)
        total.backward()
        gradients.append([total.detach(), *(parameter.grad.clone() for parameter in larger.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert sizes == [int((targets != IGNORE).sum()), targets.numel()]


def test_freeze_rows_is_a_matter_of_gradients():
    weight = torch.nn.Parameter(torch.ones(4, 2))
    handle = freeze_rows(weight, 3)
    weight.sum().backward()
    assert weight.grad.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    handle.remove()
    weight.grad = None
    weight.sum().backward()
    assert weight.grad.eq(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1"),
        ({"n_steps": 3, "learning_rate": 0}, "learning_rate must be above 0"),
        ({"n_steps": 3, "n_frozen_rows": 301}, "n_frozen_rows must be at most 300"),
        ({"n_steps": 3, "n_warmup": -1}, "n_warmup must be at least 0"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        tune(model(), iter(()), **options)


# --- answers


def test_answers_are_what_greedy_decoding_writes_one_by_one():
    larger = extend_model(load_pretrained("tales-tiny"), 2, 512)
    prompts = [
        ask("Who has the hat?", "")[:1],
        [*ask("a", "b"), *ask("c", "")[:1]],
        ask("Tell a story.", "")[:1],
    ]
    together = answers(larger, TOKENIZER, FORMAT, prompts, 12, batch_size=2)
    for prompt, reply in zip(prompts, together, strict=True):
        ids = FORMAT.encode(TOKENIZER, prompt)
        (written,) = generate(larger, [ids], 12, stop_tokens=list(TOKENIZER.special_ids.values()))
        assert reply == TOKENIZER.decode(written).strip()
    assert answers(larger, TOKENIZER, FORMAT, []) == []
    with pytest.raises(ValueError, match="at least one message"):
        answers(larger, TOKENIZER, FORMAT, [[]])
    with pytest.raises(ValueError, match="context"):
        answers(larger, TOKENIZER, FORMAT, [ask("owl " * 600, "")[:1]])


def test_exact_matches_are_counted_by_family():
    found = exact_matches(["a", "b", "a", "a"], [" x", "y", "X", "x."], ["x", "y\n", "x", "x"])
    assert found == {"a": (1, 3), "b": (1, 1)}
    assert exact_matches([], [], []) == {}
    for replies, references in (([], ["x"]), (["x"], [])):
        with pytest.raises(ValueError, match="one for each family"):
            exact_matches(["a"], replies, references)
