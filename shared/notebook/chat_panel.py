"""A panel to talk to a model in JupyterLab: what was said, a line to type in, and buttons to send, stop and begin anew.

Left out: several conversations, and the options of generation; the conversation has them.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from html import escape

import ipywidgets as widgets

from shared.generation.conversation import Conversation
from shared.text.chat_format import Message

NAMES = {"user": "You", "assistant": "Model", "system": "System"}


class ChatPanel:
    """The panel of one conversation. `panel.box` is the widget to show.

    A reply is written by a task of the kernel's own event loop, which takes a breath after each piece of text: in it
    the kernel hears the other buttons.

    Args:
        conversation: What is talked to; it keeps what was said.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.task: asyncio.Task | None = None
        self.log = widgets.HTML()
        self.line = widgets.Text(placeholder="Say something and press Enter", layout={"width": "100%"})
        self.send = widgets.Button(description="Send", icon="paper-plane", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.clear = widgets.Button(description="New conversation", icon="trash", layout={"width": "auto"})
        self.send.on_click(lambda _: self.begin(self.line.value))
        self.stop.on_click(lambda _: self.end())
        self.clear.on_click(lambda _: self.forget())
        # Enter: the value of a text that is not continuous changes when the line is finished.
        self.line.continuous_update = False
        self.line.observe(lambda change: self.begin(change["new"]), names="value")
        self.box = widgets.VBox([self.log, self.line, widgets.HBox([self.send, self.stop, self.clear])])
        self.show()

    def show(self, *more: Message) -> None:
        """Write what was said into the panel, and messages that are not part of the conversation yet."""
        self.log.value = "".join(
            f"<p><b>{NAMES[message['role']]}:</b> {escape(message['content']).replace(chr(10), '<br>')}</p>"
            for message in (*self.conversation.messages, *more)
        )

    def begin(self, text: str) -> None:
        """Say `text`, unless it is empty or a reply is being written."""
        if not text.strip() or self.task is not None:
            return
        try:
            pieces = self.conversation.reply(text)
        except ValueError as error:
            self.log.value += f"<p><i>{escape(str(error))}</i></p>"
            return
        self.line.value = ""
        self.writing(True)
        self.task = asyncio.ensure_future(self.write(text, pieces))

    def writing(self, goes_on: bool) -> None:
        """Let nobody send or begin anew while a reply is being written, and nobody stop what is not."""
        self.line.disabled = self.send.disabled = self.clear.disabled = goes_on
        self.stop.disabled = not goes_on

    async def write(self, text: str, pieces: Iterator[str]) -> None:
        """Show a reply while it is written; whatever ends it, the panel is ready for the next message."""
        question, said = {"role": "user", "content": text}, ""
        try:
            with contextlib.closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    said += piece
                    self.show(question, {"role": "assistant", "content": f"{said} ▌"})
                    await asyncio.sleep(0.001)
        finally:
            self.task = None
            self.writing(False)
            self.show()

    def end(self) -> None:
        """Stop the reply that is being written; what was said until now stays."""
        if self.task is not None:
            self.task.cancel()

    def forget(self) -> None:
        """Begin a new conversation, with the system message of the old one."""
        self.conversation.messages = [m for m in self.conversation.messages if m["role"] == "system"]
        self.show()
