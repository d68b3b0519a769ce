"""A chat in a real terminal: three turns, one of them stopped by Ctrl-C, and the commands."""

import json

import pytest

from shared.generation.conversation import Conversation
from shared.generation.options import GenerationOptions
from shared.serving.chat import TerminalChat
from shared.serving.cli import main
from shared.serving.models import open_model
from tests.serving.small import write_small_chat
from tests.serving.terminals import Terminal


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_chat(tmp_path_factory.mktemp("chat") / "small.gguf")


@pytest.fixture
def chat(small) -> TerminalChat:
    found = open_model(str(small))

    def begin(system):
        options = GenerationOptions(temperature=0, max_new_tokens=8)
        return Conversation(found.model, found.tokenizer, found.chat_format, system=system, options=options)

    return TerminalChat(begin, "small")


@pytest.mark.posix
def test_three_turns_in_a_terminal_one_of_them_stopped(tmp_path):
    model, saved = write_small_chat(tmp_path / "slow.gguf", n_layers=12), tmp_path / "talk.json"
    with Terminal(["chat", str(model), "--max-tokens", "600", "--threads", "1"]) as terminal:
        terminal.until("Ctrl-D ends.")
        terminal.until("you> ")
        # The first reply is stopped as soon as it begins; the program goes on.
        terminal.type("one\n")
        terminal.until("one\r\n")
        terminal.until_something()
        terminal.type("\x03")
        terminal.until("[stopped]")
        terminal.until("you> ")
        # Two whole replies.
        for text in ("two", "three"):
            terminal.type(f"{text}\n")
            terminal.until(f"{text}\r\n")
            assert "[stopped]" not in terminal.until("you> ")
        # At the prompt Ctrl-C gives up the line; then the conversation is saved, and Ctrl-D ends.
        # Between the prompt and its wait for a key, Python itself is deaf to Ctrl-C. And Ctrl-C throws away what was
        # typed and not yet read; readline, which waits for it, would hear no other Ctrl-C. So first it must be read.
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.press_until("\x03", "you> ")
        terminal.type(f"/save {saved}\n")
        terminal.until("6 messages saved")
        terminal.until("you> ")
        terminal.type("\x04")
        assert terminal.status() == 0
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages[::2]] == ["one", "two", "three"]
    first, second, third = (len(message["content"]) for message in messages[1::2])
    assert first < second / 2 and first < third / 2


@pytest.mark.posix
def test_ctrl_c_ends_generate(tmp_path):
    model = write_small_chat(tmp_path / "slow.gguf", n_layers=12)
    with Terminal(["generate", str(model), "the", "--max-tokens", "4000", "--threads", "1"]) as terminal:
        terminal.until_something()
        terminal.type("\x03")
        assert terminal.status() == 130
        assert "Traceback" not in terminal.shown


def test_commands(chat, capsys, tmp_path):
    chat.take("/history")
    assert capsys.readouterr().out == "nothing yet\n"
    chat.take("the old mill")
    reply = capsys.readouterr().out
    chat.take("//slash")
    capsys.readouterr()
    chat.take("/history")
    shown = capsys.readouterr().out
    assert shown.startswith(f"user: the old mill\nassistant: {reply}") and "user: /slash\n" in shown
    for line, said in (("/help", "/save FILE"), ("/reset", "begun anew"), ("/system Be kind.", "begun anew")):
        chat.take(line)
        assert said in capsys.readouterr().out
    assert chat.conversation.messages == [{"role": "system", "content": "Be kind."}]
    chat.take("/save " + str(tmp_path / "talk.json"))
    assert "1 messages saved" in capsys.readouterr().out
    chat.take("/quit")
    assert not chat.is_open


def test_what_does_not_work_is_said_in_a_line_and_the_chat_goes_on(chat, capsys, tmp_path):
    (tmp_path / "talk.json").write_text("mine")
    for line, said in (
        ("/dance", "llm: /dance is no command; /help lists them, //dance says it\n"),
        ("/save", "llm: /save needs the name of a file\n"),
        (f"/save {tmp_path / 'talk.json'}", "path must be new"),
        ("word " * 3000, "too many tokens"),
    ):
        chat.take(line)
        written = capsys.readouterr()
        assert said in written.err and written.err.count("\n") == 1 and not written.out
    assert (
        chat.is_open and chat.conversation.messages == [] and (tmp_path / "talk.json").read_text() == "mine"
    )
    chat.take("hello")
    assert capsys.readouterr().out


def test_a_conversation_equals_one_without_a_terminal(chat, capsys):
    plain = chat.begin(None)
    for text in ("the crow", "the sea"):
        expected = "".join(plain.reply(text))
        chat.take(text)
        assert capsys.readouterr().out == expected + "\n"
    assert chat.conversation.messages == plain.messages


def test_lines_from_a_pipe(small, capsys, monkeypatch):
    import io

    def run(raw: bytes, *options: str):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
        status = main(["chat", str(small), "--max-tokens", "5", *options])
        return status, capsys.readouterr()

    status, written = run("the crow\n\n/history\ncafé\n".encode())
    assert status == 0 and "user: the crow" in written.out and "you>" not in written.out
    status, written = run(b"the crow\nthe sea\n", "--json")
    replies = [json.loads(line) for line in written.out.splitlines()]
    assert [reply["role"] for reply in replies] == ["assistant"] * 2 and not replies[0]["stopped"]
    status, written = run(b"the \xff crow\n")
    assert status == 1 and written.err.startswith("llm: standard input must be UTF-8") and not written.out
