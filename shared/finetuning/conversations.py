"""Conversations to learn from: checked, read from a file, compared with others.

A conversation is a list of messages as in `shared.text.chat_format`: perhaps a system message, then user
and assistant in turns, an answer at the end. `overlapping` finds test prompts that also stand among the
training prompts.

Left out: tools, pictures, and prompts that are alike but not equal.

Follows the JSONL files that many tools share: one object a line, with `messages`, or with `instruction`,
`input` and `output` (Taori et al., 2023, "Stanford Alpaca").

Explained and proven in ch07_instruction/01_instruction_tuning.ipynb; written from there by `make promote`.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from shared.checks import check_path, check_text, require
from shared.text.chat_format import ChatFormat, Message


def prompt_key(messages: Sequence[Message]) -> str:
    """Return what two equal prompts have in common: all but the last message, in small letters.

    Punctuation, quotation marks and white space do not count. The role of a message does.
    """
    lines = []
    for message in messages[:-1]:
        text = re.sub(r"[^\w+*/%=<>-]+", " ", message["content"].casefold())
        text = re.sub(r" ?([+*/%=<>-]) ?", r"\1", text).strip()
        lines.append(f"{message['role']}: {text}")
    return "\n".join(lines)


def overlapping(train: Iterable[Sequence[Message]], test: Iterable[Sequence[Message]]) -> list[int]:
    """Return the places in `test` of conversations whose prompt stands in `train` too, see `prompt_key`.

    Each conversation is looked at once, so the time grows with their number, not with the number of pairs.
    """
    known = {prompt_key(messages) for messages in train}
    return [place for place, messages in enumerate(test) if prompt_key(messages) in known]


def check_conversation(messages: Sequence[Message], name: str = "messages") -> list[Message]:
    """Return the messages of a conversation that a model can be tuned on; a system message may stand in front.

    Raises:
        ValueError: The roles are not user, assistant, user, assistant ..., with an assistant's reply at the end, or a
            reply is empty. The message begins with `name`.
    """
    check_text("name", name)
    try:
        messages = ChatFormat().complete(messages)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    for place, role in enumerate(turns):
        wanted = ("user", "assistant")[place % 2]
        if role != wanted:
            number = place + len(roles) - len(turns)
            raise ValueError(f"{name}: the role of messages[{number}] must be {wanted} there, got {role!r}")
    if not turns or turns[-1] != "assistant":
        raise ValueError(f"{name}: the last message must be the assistant's answer, got {roles[-1]!r}")
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{name}: the answer in messages[{number}] must not be empty")
    return messages


def conversation_of(entry: Mapping[str, object], name: str = "entry") -> list[Message]:
    """Return the conversation of `{"messages": [...]}` or of `{"instruction": ..., "input": ..., "output": ...}`.

    `input` may be empty or missing; it follows the instruction after an empty line. Raises ValueError, beginning with
    `name`, for anything else, and as `check_conversation`.
    """
    if isinstance(entry, Mapping) and "messages" in entry:
        require(f"{name}: messages", entry["messages"], isinstance(entry["messages"], list | tuple), "a list")
        try:
            return check_conversation(entry["messages"], name)
        except TypeError as error:
            raise ValueError(str(error)) from None
    if not isinstance(entry, Mapping) or not {"instruction", "output"} <= entry.keys():
        raise ValueError(f"{name} must have messages, or instruction and output, got {entry!r:.80}")
    parts = [entry["instruction"], entry.get("input") or "", entry["output"]]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name}: instruction, input and output must be texts, got {entry!r:.80}")
    instruction, given, output = parts
    content = f"{instruction}\n\n{given}" if given.strip() else instruction
    if not content.strip():
        raise ValueError(f"{name}: the instruction must not be empty")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": output}]
    return check_conversation(messages, name)


def read_conversations(path: str | os.PathLike[str]) -> list[list[Message]]:
    """Return the conversations of a JSONL file: one JSON object a line, see `conversation_of`; empty lines are passed.

    Raises:
        ValueError: The file is no UTF-8 or holds no conversation, or a line is wrong; the message has its number.
        FileNotFoundError: There is no such file.
    """
    check_path("path", path)
    conversations = []
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                name = f"{os.fspath(path)}, line {number}"
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} must be one JSON object, got: {error}") from None
                conversations.append(conversation_of(entry, name))
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)} must be in UTF-8, got: {error}") from None
    require("path", os.fspath(path), bool(conversations), "a file with at least one conversation")
    return conversations
