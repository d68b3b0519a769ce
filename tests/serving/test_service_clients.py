"""Clients that were written for other servers: the openai package, curl, chapter 7's judge, two chat front ends."""

import asyncio
import json
import shutil
import subprocess

import openai
import pytest

from shared.finetuning.judge_client import ChatClient, Endpoint
from shared.finetuning.judge_replies import JudgeError
from shared.serving.security import hash_of
from tests.serving.running import events_of, running

pytestmark = pytest.mark.service
HELLO = [{"role": "user", "content": "the crow"}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


# --- the openai package


def test_openai_chat(served, client):
    expected = served.chat(max_tokens=15).json()["choices"][0]["message"]["content"]
    reply = client.chat.completions.create(model="small", messages=HELLO, temperature=0, max_tokens=15)
    assert reply.choices[0].message.content == expected and reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 15
    stream = client.chat.completions.create(
        model="small",
        messages=HELLO,
        temperature=0,
        max_tokens=15,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert last.choices == [] and last.usage.completion_tokens == 15
    tokens = [
        entry.token for piece in pieces if (found := piece.choices[0].logprobs) for entry in found.content
    ]
    assert "".join(tokens) == expected


def test_openai_completions_models_and_embeddings(served, client):
    expected = served.complete(max_tokens=9).json()["choices"][0]["text"]
    assert (
        client.completions.create(model="small", prompt="the old mill", temperature=0, max_tokens=9)
        .choices[0]
        .text
        == expected
    )
    assert [card.id for card in client.models.list()] == ["small"] and client.models.retrieve(
        "small"
    ).id == "small"
    # The package asks for base64 and unpacks it.
    vector = client.embeddings.create(model="small", input="crow").data[0].embedding
    assert len(vector) == 64 and sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)


def test_openai_async_many_at_once(served):
    prompts = [f"the {word}" for word in ("mill", "crow", "hill", "sea", "lamp", "old")] * 2
    expected = [served.complete(prompt, max_tokens=12).json()["choices"][0]["text"] for prompt in prompts]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="small", prompt=prompt, temperature=0, max_tokens=12, stream=True
                )
                return "".join([piece.choices[0].text async for piece in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(ask()) == expected


def test_openai_errors(client, small):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="small", prompt="the " * 300)
    assert caught.value.code == "context_length_exceeded"
    with (
        running(small, keys={"phone": hash_of("sk-right")}, request_s=0.3) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-wrong", max_retries=0) as stranger,
    ):
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        friend = stranger.with_options(api_key="sk-right")
        assert [card.id for card in friend.models.list()] == ["small"]
        # An error within a stream is an error of the package, too.
        served.service.engine.step = lambda: (_ for _ in ()).throw(RuntimeError("no memory"))
        with pytest.raises(openai.APIError, match="the computation failed"):
            list(friend.completions.create(model="small", prompt="x", stream=True))


# --- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served):
    body = json.dumps({"model": "small", "prompt": "the old mill", "max_tokens": 6, "temperature": 0})
    command = ["curl", "-sS", "-N", "--max-time", "20", f"{served.url}/v1/completions"]
    command += ["-H", "Content-Type: application/json", "-d"]
    whole = subprocess.run([*command, body], capture_output=True, text=True, check=True)
    streamed = subprocess.run(
        [*command, body[:-1] + ', "stream": true}'], capture_output=True, text=True, check=True
    )
    text = json.loads(whole.stdout)["choices"][0]["text"]
    lines = [line.removeprefix("data: ") for line in streamed.stdout.splitlines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == text
    assert whole.stderr == streamed.stderr == ""


# --- chapter 7's judge


def test_the_judge_of_chapter_7(served, small):
    full = served.chat(max_tokens=30).json()["choices"][0]["message"]["content"]
    stop = full[14:17]  # the judge refuses replies that were cut at max_tokens
    expected = full.partition(stop)[0]
    options = {"temperature": 0, "seed": 0, "max_tokens": 30, "stop": [stop]}
    judge = ChatClient(Endpoint(f"{served.url}/v1", "small", options=options))
    assert judge.complete(HELLO) == expected
    assert judge.complete(HELLO, {"type": "object", "properties": {"score": {"type": "integer"}}}) == expected
    streaming = ChatClient(Endpoint(f"{served.url}/v1", "small", options=options | {"stream": True}))
    assert streaming.complete(HELLO) == expected
    with running(small, keys={"judge": hash_of("sk-judge")}) as locked:
        assert (
            ChatClient(Endpoint(f"{locked.url}/v1", "small", "sk-judge", options)).complete(HELLO) == expected
        )
        with pytest.raises(JudgeError, match="401"):
            ChatClient(Endpoint(f"{locked.url}/v1", "small", "sk-other", options)).complete(HELLO)


# --- chat front ends: what they send, field for field


OPEN_WEBUI_CHAT = {
    "stream": True,
    "messages": [
        {"role": "system", "content": "User Context:\n\nBe brief."},
        {"role": "user", "content": "the crow"},
        {"role": "assistant", "content": "the sea"},
        {"role": "user", "content": "and the hill?"},
    ],
    "params": {},
    "features": {"image_generation": False, "code_interpreter": False, "web_search": False},
    "variables": {"{{USER_NAME}}": "somebody", "{{CURRENT_DATE}}": "2026-11-29"},
    "user": {"name": "somebody", "id": "7c7f", "email": "somebody@example.org", "role": "admin"},
    "stream_options": {"include_usage": True},
}
# For the title of a chat, for tags, and for questions that may follow.
OPEN_WEBUI_TITLE = {
    "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title.\n### Output:\nJSON\n"}],
    "stream": False,
    "max_completion_tokens": 1000,
    "metadata": {"task": "title_generation", "chat_id": "6a1f"},
}
LIBRECHAT_CHAT = {
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "stop": ["||>", "\nUser:", "<|diff_marker|>"],
    "user": "664f1d2e9b0c",
    "stream": True,
    "messages": [
        {"role": "system", "name": "instructions", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "the crow"}]},
    ],
}
LIBRECHAT_TITLE = {
    "temperature": 0.2,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "max_tokens": 16,
    "messages": [{"role": "system", "content": "Write a title of 5 words or less for this conversation."}],
}


@pytest.mark.parametrize("shape", [OPEN_WEBUI_CHAT, LIBRECHAT_CHAT])
def test_front_ends_chat(served, shape):
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "small"
    events = list(events_of(served.post("/v1/chat/completions", **shape)))
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[0]["delta"]["role"] == "assistant" and choices[-1]["finish_reason"] in ("stop", "length")
    assert "".join(choice["delta"].get("content", "") for choice in choices)
    if "stream_options" in shape:
        assert events[-1]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("shape", [OPEN_WEBUI_TITLE, LIBRECHAT_TITLE])
def test_front_ends_ask_for_a_title(served, shape):
    reply = served.post("/v1/chat/completions", **shape).json()
    assert reply["choices"][0]["message"]["content"] and reply["usage"]["completion_tokens"] > 0
