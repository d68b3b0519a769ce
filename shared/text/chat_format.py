"""How a conversation becomes tokens: ChatML, in which roles and special tokens frame each message.

What is said stays text: a special token that somebody types is encoded as its letters. `chat_format_of`
tries a file's own template on a few conversations and refuses one that writes something else.

Left out: other formats than ChatML, tools, and thinking.

Follows the chat templates of transformers: Jinja in a sandbox, with `trim_blocks` and `lstrip_blocks`.

Explained and proven in ch05_pretraining/07_a_real_model.ipynb and deployment/02_export_and_local.ipynb;
written from there by `make promote`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.checks import check_choice, check_text
from shared.text.tokenizer import BPETokenizer

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]  # {"role": one of ROLES, "content": a text}


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes one sequence of tokens: ChatML, as SmolLM2, Qwen and others were trained with it.

    Attributes:
        default_system: Content of the system message that is put in front where there is none; None puts none.
        start, end: The special tokens around a message.
    """

    default_system: str | None = None
    start: str = "<|im_start|>"
    end: str = "<|im_end|>"

    def complete(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages, the default system message in front where it is missing.

        Raises:
            ValueError: There is no message, or one is not a role of `ROLES` and a content.
        """
        messages = list(messages)
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise ValueError(f"messages[{number}] must have a role and a content, got {message!r}")
            check_choice(f"the role of messages[{number}]", message["role"], ROLES)
            check_text(f"the content of messages[{number}]", message["content"])
        if not messages:
            raise ValueError("messages must hold at least one message, got none")
        if self.default_system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.default_system})
        return messages

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as text, to be looked at; to encode it, use `encode`.

        `add_generation_prompt` begins the assistant's next message.
        """
        parts = [f"{self.start}{m['role']}\n{m['content']}{self.end}\n" for m in self.complete(messages)]
        return "".join(parts) + (f"{self.start}assistant\n" if add_generation_prompt else "")

    def encode(
        self, tokenizer: BPETokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a conversation. A special token within a message stays text. Errors as `complete`."""
        parts = [self.encode_message(tokenizer, message) for message in self.complete(messages)]
        if add_generation_prompt:
            parts.append(self.generation_prompt(tokenizer))
        return [token for part in parts for token in part]

    def encode_message(self, tokenizer: BPETokenizer, message: Message) -> list[int]:
        """Return the ids of one message; those of a conversation are the ids of its messages, one after the other."""
        start, end = tokenizer.special_ids[self.start], tokenizer.special_ids[self.end]
        text = f"{message['role']}\n{message['content']}"
        return [start, *tokenizer.encode_ordinary(text), end, *tokenizer.encode_ordinary("\n")]

    def generation_prompt(self, tokenizer: BPETokenizer) -> list[int]:
        """Return the ids that begin the assistant's next message."""
        return [tokenizer.special_ids[self.start], *tokenizer.encode_ordinary("assistant\n")]


_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "one"}],
    [{"role": "system", "content": " s \n"}, {"role": "user", "content": "{{ 1 }} <b>\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
)


def chat_format_of(template: str) -> ChatFormat:
    """Return the format that writes what a chat template writes, tried on a few conversations.

    The template runs in Jinja's sandbox, with the settings of transformers.

    Raises:
        ValueError: The template cannot be run, or it is not ChatML.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        program = environment.from_string(template)
        written = [
            program.render(messages=messages, add_generation_prompt=add)
            for messages in _PROBES
            for add in (False, True)
        ]
    except Exception as error:  # whatever a stranger's program does
        raise ValueError(f"the chat template cannot be run: {error}") from None
    # What stands in front of the first message is the default system message.
    bare = ChatFormat()
    front = written[0].removesuffix(bare.render(_PROBES[0], add_generation_prompt=False))
    head, tail = f"{bare.start}system\n", f"{bare.end}\n"
    system = front.removeprefix(head).removesuffix(tail) if front else None
    found = ChatFormat(system)
    ours = [
        found.render(messages, add_generation_prompt=add) for messages in _PROBES for add in (False, True)
    ]
    if ours != written:
        raise ValueError(f"the chat template must write ChatML, got {written[-1]!r:.200}")
    return found


def chat_template(chat_format: ChatFormat) -> str:
    """Return the Jinja template that writes what a format writes: the other direction of `chat_format_of`."""
    quoted = lambda text: json.dumps(text, ensure_ascii=False)
    start, end = quoted(chat_format.start), quoted(chat_format.end + "\n")
    template = (
        "{% for message in messages %}"
        f'{{{{ {start} + message["role"] + "\\n" + message["content"] + {end} }}}}'
        "{% endfor %}"
        f'{{% if add_generation_prompt %}}{{{{ {start} + "assistant\\n" }}}}{{% endif %}}'
    )
    if chat_format.default_system is None:
        return template
    system = quoted(f"{chat_format.start}system\n{chat_format.default_system}{chat_format.end}\n")
    return f'{{% if messages[0]["role"] != "system" %}}{{{{ {system} }}}}{{% endif %}}{template}'
