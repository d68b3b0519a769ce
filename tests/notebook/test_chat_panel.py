"""The panel of a conversation: what it shows while a reply is written, when it is stopped, and afterwards."""

import asyncio

import pytest

from shared.notebook.chat_panel import ChatPanel


class Parrot:
    """Stands for a conversation: it repeats each message word by word."""

    def __init__(self) -> None:
        self.messages = []

    def reply(self, content):
        if content == "too long":
            raise ValueError("the message has too many tokens")

        def words():
            said = ""
            try:
                for word in content.split():
                    said += f"{word} "
                    yield f"{word} "
            finally:
                roles = ("user", content), ("assistant", said)
                self.messages += [{"role": role, "content": text} for role, text in roles]

        return words()


@pytest.fixture
def panel():
    return ChatPanel(Parrot())


async def finish(panel):
    while panel.task is not None:
        await asyncio.sleep(0.001)


def test_a_message_is_answered_and_the_panel_is_ready_again(panel):
    async def talk():
        panel.line.value = "one <b>two</b>"
        assert (
            panel.line.disabled and panel.send.disabled and panel.clear.disabled and not panel.stop.disabled
        )
        await asyncio.sleep(0.002)
        assert "▌" in panel.log.value
        await finish(panel)

    asyncio.run(talk())
    assert panel.log.value == (
        "<p><b>You:</b> one &lt;b&gt;two&lt;/b&gt;</p><p><b>Model:</b> one &lt;b&gt;two&lt;/b&gt; </p>"
    )
    assert not panel.line.disabled and not panel.send.disabled and panel.stop.disabled
    assert panel.line.value == ""


def test_a_stopped_reply_stays_as_far_as_it_went(panel):
    async def talk():
        panel.begin("word " * 1000)
        await asyncio.sleep(0.02)
        panel.stop.click()
        await finish(panel)

    asyncio.run(talk())
    said = panel.conversation.messages[-1]["content"].split()
    assert 0 < len(said) < 1000 and "▌" not in panel.log.value
    assert panel.stop.disabled


def test_nothing_is_said_twice_at_once_or_empty(panel):
    async def talk():
        panel.begin("  ")
        assert panel.task is None
        panel.begin("one two three")
        first = panel.task
        panel.begin("four")
        assert panel.task is first
        await finish(panel)

    asyncio.run(talk())
    assert [message["content"] for message in panel.conversation.messages] == [
        "one two three",
        "one two three ",
    ]


def test_what_is_refused_is_said_and_the_panel_goes_on(panel):
    panel.begin("too long")
    assert "the message has too many tokens" in panel.log.value
    assert panel.task is None and not panel.send.disabled


def test_a_new_conversation_keeps_the_system_message(panel):
    panel.conversation.messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    panel.clear.click()
    assert panel.conversation.messages == [{"role": "system", "content": "Be kind."}]
    assert panel.log.value == "<p><b>System:</b> Be kind.</p>"
