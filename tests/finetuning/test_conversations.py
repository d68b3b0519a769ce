"""Conversations: what is refused by name, what is read from JSONL, which test prompts stand in the training set."""

import json
import time

import pytest

from shared.data.corpus import load_instructions
from shared.data.download import DownloadError, fetch
from shared.finetuning.conversations import (
    check_conversation,
    conversation_of,
    overlapping,
    prompt_key,
    read_conversations,
)


def ask(content: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("messages", [ask("a"), [SYSTEM, *ask("a")], [*ask("a"), *ask("b")], tuple(ask("a"))])
def test_a_proper_conversation_comes_back_as_it_is(messages):
    assert check_conversation(messages) == list(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "item 7: messages must hold at least one"),
        ([{"role": "user", "content": "a"}], "item 7: the last message must be the assistant's answer"),
        ([SYSTEM], "item 7: the last message must be the assistant's answer, got 'system'"),
        (ask("a")[1:], r"item 7: the role of messages\[0\] must be user there, got 'assistant'"),
        ([*ask("a"), ask("b")[1]], r"item 7: the role of messages\[2\] must be user"),
        ([SYSTEM, ask("a")[1]], r"item 7: the role of messages\[1\] must be user"),
        ([ask("a")[0], *ask("b")], r"item 7: the role of messages\[1\] must be assistant"),
        ([*ask("a"), SYSTEM], r"item 7: the role of messages\[2\] must be user there, got 'system'"),
        (ask("a", " \n"), r"item 7: the answer in messages\[1\] must not be empty"),
        ([{"role": "tool", "content": "a"}], r"item 7: the role of messages\[0\] must be one of"),
        ([{"role": "user"}], "item 7: .* must have a role and a content"),
    ],
)
def test_bad_conversations_are_refused_by_name(messages, message):
    with pytest.raises(ValueError, match=message):
        check_conversation(messages, "item 7")


def test_a_content_that_is_no_text_is_a_type_error_with_the_name():
    with pytest.raises(TypeError, match="item 7: the content"):
        check_conversation([{"role": "user", "content": 3}], "item 7")


# --- reading


def test_both_kinds_of_lines_are_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"messages": [SYSTEM, *ask("a")]},
        {"instruction": "Translate.", "input": "Hund", "output": "dog"},
        {"instruction": "Name a fish.", "input": "", "output": "trout"},
        {"instruction": "Name a fish.", "output": "trout", "source": "me"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n"
    path.write_text(text, encoding="utf-8")
    assert read_conversations(path) == [
        [SYSTEM, *ask("a")],
        ask("Translate.\n\nHund", "dog"),
        ask("Name a fish.", "trout"),
        ask("Name a fish.", "trout"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 must be one JSON object, got"),
        ("[1]", "line 3 must have messages, or instruction and output"),
        ('{"instruction": "a"}', "line 3 must have messages, or instruction and output"),
        ('{"instruction": "a", "output": ""}', r"line 3: the answer in messages\[1\] must not be empty"),
        ('{"instruction": " ", "output": "b"}', "line 3: the instruction must not be empty"),
        (
            '{"instruction": "a", "input": 3, "output": "b"}',
            "line 3: instruction, input and output must be texts",
        ),
        ('{"instruction": null, "output": "b"}', "line 3: instruction, input and output must be texts"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 3: the last message must be the assistant",
        ),
        ('{"messages": "hello"}', "line 3: "),
        ('{"messages": null}', "line 3: messages must be a list, got None"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 3: the content of"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"instruction": "a", "output": "b"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_conversations(path)


def test_no_file_no_text_and_nothing_in_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_conversations(tmp_path / "none.jsonl")
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="at least one conversation"):
        read_conversations(path)
    path.write_bytes(b'{"instruction": "\xff", "output": "b"}')
    with pytest.raises(ValueError, match="UTF-8"):
        read_conversations(path)


def test_the_bundled_instructions_are_conversations():
    entries = load_instructions()
    found = [conversation_of(vars(entry)) for entry in entries]
    assert len(found) == len(entries) and all(talk[-1]["role"] == "assistant" for talk in found)


# --- the same prompt twice


def test_spaces_capitals_and_punctuation_do_not_tell_prompts_apart():
    same = ["Name a fish.", "name  a fish", "Name a \u201cfish\u201d!", "\nNAME A FISH\n"]
    assert len({prompt_key(ask(text)) for text in same}) == 1
    assert prompt_key(ask("What is 2+2?")) == prompt_key(ask("what is 2 + 2"))
    assert prompt_key(ask("a", "b")) == prompt_key(ask("a", "c"))


@pytest.mark.parametrize(
    ("one", "other"), [("2 + 2", "2 - 2"), ("a dog", "adog"), ("5 < 6", "5 > 6"), ("鱼", "鸟")]
)
def test_different_prompts_stay_different(one, other):
    assert prompt_key(ask(one)) != prompt_key(ask(other))


def test_a_prompt_is_the_whole_conversation_before_the_last_answer():
    train = [[*ask("a", "b"), *ask("c", "d")]]
    assert overlapping(train, [[*ask("a", "b"), *ask("c", "x")]]) == [0]
    assert overlapping(train, [[*ask("a", "x"), *ask("c", "d")], ask("c", "d"), ask("a", "b")]) == []
    # A user who writes what an assistant said is another conversation.
    assert prompt_key([*ask("a", "b"), *ask("c")]) != prompt_key(
        [*ask("a\nassistant: b\nuser: c"), *ask("c")]
    )


def test_places_are_those_of_the_test_set_each_once():
    train = (ask(text) for text in ("one", "two", "one"))
    assert overlapping(train, [ask("three"), ask("One"), ask("two!"), ask("one")]) == [1, 2, 3]


def test_the_time_grows_with_the_number_and_not_with_the_pairs():
    train = [ask(f"What is {i} times {i}?") for i in range(20_000)]
    test = [ask(f"What is {i} times {i + i % 2}?") for i in range(20_000)]
    started = time.process_time()
    assert len(overlapping(train, test)) == 10_000
    assert time.process_time() - started < 10  # 400 million pairs would take minutes


def test_two_prompts_of_the_public_test_set_stand_in_its_training_part():
    try:
        path = fetch("instruction-data.json")
    except DownloadError as error:
        pytest.skip(f"instruction-data.json: {error.reason}")
    public = [conversation_of(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    assert len(public) == 1100
    train, test = public[:935], public[935:1045]
    found = overlapping(train, test)
    assert len(found) == 2
    assert {test[place][0]["content"] for place in found} == {
        "Generate a sentence using the word 'innovative'."
    }
