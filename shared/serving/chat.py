"""A conversation in a terminal: a line is said, the reply appears while it is written, `/` begins a command.

Ctrl-C stops the reply and not the program; at the prompt it clears the line. Ctrl-D ends. Where standard input is no
terminal, its lines are said one after the other, and nothing but the replies is written.

Left out: several lines in one message, and conversations that go on another day (`/save` writes one down).
"""

import contextlib
import json
import sys
from collections.abc import Callable, Generator
from typing import cast

from shared.generation.conversation import Conversation
from shared.serving.terminal import Failure, Interruptible, complain, message_of, write, write_json
from shared.weights.files import new_file

PROMPT = "you> "
HELP = """\
/help            this list
/history         what was said
/reset           begin anew
/system TEXT     begin anew with another system message
/save FILE       write what was said to a new JSON file
/quit            end; so does Ctrl-D
//TEXT           say a text that begins with /
Ctrl-C           stop the reply"""


class TerminalChat:
    """A conversation that is read from lines.

    Args:
        begin: Returns a new conversation with a system message, None for the model's own.
        name: Of the model, for `/save`.
        system: The first system message.
        as_json: Replies are written as lines of JSON, not while they are made.
    """

    def __init__(
        self,
        begin: Callable[[str | None], Conversation],
        name: str,
        system: str | None = None,
        *,
        as_json: bool = False,
    ) -> None:
        self.begin, self.name, self.system, self.as_json = begin, name, system, as_json
        self.conversation = begin(system)
        self.is_open = True

    def run(self) -> None:
        """Read lines until there are no more, or `/quit`."""
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not self.as_json
        if is_terminal:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401 (arrows and history at the prompt)
            write(f"{self.name}: say something. /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.")
        while self.is_open:
            try:
                self.take(input(PROMPT if is_terminal else "").strip())
            except EOFError:
                if is_terminal:
                    write("")
                return
            except KeyboardInterrupt:  # at the prompt, or a second one within a reply
                if not is_terminal:
                    raise
                write("")  # a new prompt below what was given up
            except UnicodeDecodeError as error:
                raise Failure(f"standard input must be UTF-8: {error}") from None

    def take(self, line: str) -> None:
        """Say a line, or do what it commands; what does not work is said, and the conversation goes on."""
        if not line:
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.command(line)
            else:
                self.say(line.removeprefix("/") if line.startswith("//") else line)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, Failure) as error:
            complain(message_of(error))

    def say(self, text: str) -> None:
        """Say a text and write the reply; Ctrl-C ends it, and what was said until then is remembered."""
        said = []
        with Interruptible() as keys:
            pieces = cast(Generator[str, None, None], self.conversation.reply(text))
            for piece in pieces:
                said.append(piece)
                if not self.as_json:
                    write(piece, end="")
                if keys.stopped:
                    break
            pieces.close()
        if self.as_json:
            write_json({"role": "assistant", "content": "".join(said), "stopped": keys.stopped})
        else:
            write(" [stopped]" if keys.stopped else "")

    def command(self, line: str) -> None:
        """Do what a line that begins with / says. Raises Failure for an unknown command."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            self.is_open = False
        elif name == "/help":
            write(HELP)
        elif name == "/history":
            write(
                "\n".join(f"{m['role']}: {m['content']}" for m in self.conversation.messages) or "nothing yet"
            )
        elif name in ("/reset", "/system"):
            self.system = rest if name == "/system" else self.system
            self.conversation = self.begin(self.system or None)
            write("begun anew")
        elif name == "/save":
            self.save(rest)
        else:
            raise Failure(f"{name} is no command; /help lists them, //{line[1:]} says it")

    def save(self, path: str) -> None:
        """Write what was said to a new file. Raises Failure without a name, FileExistsError if the file exists."""
        if not path:
            raise Failure("/save needs the name of a file")
        content = {"model": self.name, "messages": [dict(message) for message in self.conversation.messages]}
        with new_file(path) as part:
            part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write(f"{len(self.conversation.messages)} messages saved to {path}")
