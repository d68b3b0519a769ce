"""`llm serve --content-filter`: prompts are refused, replies cut, and nothing that was cut gets out."""

from dataclasses import replace

import pytest

from shared.safety.filters import OutputGuard, Verdict
from shared.serving.pieces import GuardedWriter
from tests.serving.running import events_of, running

pytestmark = pytest.mark.service


class Blocker:
    """Blocks what holds a word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def check(self, text: str) -> Verdict:
        found = self.word in text
        return Verdict(found, float(found), None)


@pytest.fixture(scope="module")
def filtered(small):
    with running(replace(small, name="guarded"), content_filter=Blocker("forbidden")) as found:
        yield found


def test_prompts_are_refused(filtered):
    service = filtered.service
    asked = [
        filtered.complete("a forbidden thing"),
        filtered.complete(["good", "forbidden"]),
        filtered.complete(service.tokenizer.encode_ordinary("forbidden")),
        filtered.chat("say forbidden"),
    ]
    for response, param in zip(asked, ("prompt", "prompt", "prompt", "messages"), strict=True):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "content_filter", param)
        assert "forbidden" not in error["message"]
    assert filtered.is_idle()


def test_harmless_replies_are_those_without_a_filter(filtered, served):
    for stream in (False, True):
        texts = []
        for server in (filtered, served):
            response = server.complete("the old mill", max_tokens=40, stream=stream)
            choices = (
                [event["choices"][0] for event in events_of(response)]
                if stream
                else response.json()["choices"]
            )
            texts.append("".join(choice["text"] for choice in choices))
            assert choices[-1]["finish_reason"] == "length"
        assert texts[0] == texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_cut_before_what_is_bad(small, served, stream):
    whole = served.complete("the old mill", max_tokens=60).json()["choices"][0]["text"]
    bad = whole[20:26]
    begin = whole.index(bad)
    with running(replace(small, name="guarded"), content_filter=Blocker(bad)) as found:
        response = found.complete("the old mill", max_tokens=60, stream=stream, logprobs=1)
        choices = (
            [event["choices"][0] for event in events_of(response)] if stream else response.json()["choices"]
        )
        text = "".join(choice["text"] for choice in choices)
        assert choices[-1]["finish_reason"] == "content_filter"
        assert bad not in text and whole.startswith(text) and len(text) < begin + len(bad)
        told = sum(len(choice["logprobs"]["tokens"]) for choice in choices if choice["logprobs"])
        assert told <= len(text) + 1
        assert found.is_idle()


def test_a_chat_is_cut_too(small, served):
    whole = served.chat("the crow", max_tokens=60).json()["choices"][0]["message"]["content"]
    with running(replace(small, name="guarded"), content_filter=Blocker(whole[15:20])) as found:
        (choice,) = found.chat("the crow", max_tokens=60).json()["choices"]
        assert (
            choice["finish_reason"] == "content_filter" and whole[15:20] not in choice["message"]["content"]
        )


def test_a_stop_string_still_ends_a_guarded_text(small):
    tokenizer = small.needed_tokenizer()
    writer = GuardedWriter(tokenizer, ("END",), OutputGuard(lambda text: False, hold=30, window=90))
    text = "".join(writer.feed(token)[0] for token in tokenizer.encode_ordinary("before END after"))
    assert writer.stopped and writer.reason == "stop" and text == "before "
