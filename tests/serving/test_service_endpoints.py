"""What the service answers, beside the engine that works alone: a real server, asked over HTTP."""

import base64
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.generation.conversation import Conversation
from shared.generation.engine import generate
from shared.generation.options import GenerationOptions
from shared.generation.streaming import generate_text
from shared.serving.api import create_app
from shared.serving.logs import shown_texts
from tests.serving.running import Running, events_of, running

pytestmark = pytest.mark.service
PROMPTS = ("the old mill", "and the sea", "crow", "lamp")


def alone(served: Running, prompt: str, n: int = 20, **options: object) -> str:
    """Return what the same model writes without a server."""
    service = served.service
    stops = tuple(service.stop_ids)
    settings = {"temperature": 0.0, "stop_tokens": stops} | options
    return generate_text(service.model, service.tokenizer, prompt, n, **settings)


def choice_of(response) -> dict:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


# --- completions


def test_a_completion_is_what_the_model_writes_alone(served):
    response = served.complete(max_tokens=20)
    choice, body = choice_of(response), response.json()
    assert choice["text"] == alone(served, "the old mill") and choice["finish_reason"] == "length"
    assert choice["logprobs"] is None and body["object"] == "text_completion" and body["model"] == "small"
    n_prompt = len(served.service.tokenizer.encode_ordinary("the old mill"))
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        n_prompt,
        20,
        n_prompt + 20,
    )
    assert served.complete().json()["usage"]["completion_tokens"] == 16  # as OpenAI's
    # One token is "length" and counts one.
    one = served.complete(max_tokens=1).json()
    assert one["choices"][0]["finish_reason"] == "length" and one["usage"]["completion_tokens"] == 1
    # Ids are as good as text, and an empty prompt is begun by the end of text.
    ids = served.service.tokenizer.encode_ordinary("the old mill")
    assert choice_of(served.complete(ids, max_tokens=20))["text"] == choice["text"]
    assert choice_of(served.complete("", max_tokens=20))["text"] == alone(served, "")


def test_a_stream_is_the_same_text_in_pieces(served):
    response = served.complete(max_tokens=20, stream=True, stream_options={"include_usage": True})
    events = list(events_of(response))
    *pieces, last = events
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == alone(served, "the old mill")
    assert len({event["id"] for event in events}) == 1 and len(pieces) > 10
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-2:] == [None, "length"]
    # With usage wanted, the last piece has it and no choice; all others say null.
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 20
    assert all(piece["usage"] is None for piece in pieces)
    assert all("usage" not in event for event in events_of(served.complete(max_tokens=4, stream=True)))


def test_several_prompts_and_several_choices(served):
    body = served.complete(list(PROMPTS), max_tokens=8, n=2).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(8))
    assert [c["text"] for c in body["choices"]] == [alone(served, p, 8) for p in PROMPTS for _ in range(2)]
    # A prompt counts once, however many continuations it has.
    encode = served.service.tokenizer.encode_ordinary
    assert body["usage"]["prompt_tokens"] == sum(len(encode(prompt)) for prompt in PROMPTS)
    events = list(events_of(served.complete(list(PROMPTS), max_tokens=8, stream=True)))
    texts = dict.fromkeys(range(4), "")
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [alone(served, prompt, 8) for prompt in PROMPTS]


def test_seeds(served):
    def draw(**more):
        body = served.complete(max_tokens=12, temperature=1.5, **more).json()
        return [choice["text"] for choice in body["choices"]]

    assert draw(seed=5) == draw(seed=5) != draw(seed=6)
    first, second = draw(seed=5, n=2)
    assert [first] == draw(seed=5) and first != second
    assert draw(seed=-(2**63)) and draw(seed=2**63 - 1)
    # The numbers are the engine's own, so the text is that of the engine alone.
    options = GenerationOptions(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=7).text_arguments()
    options["stop_tokens"] = tuple(served.service.stop_ids)
    model, tokenizer = served.service.model, served.service.tokenizer
    written = served.complete(max_tokens=12, temperature=1.5, top_p=0.9, seed=7).json()["choices"][0]["text"]
    assert written == generate_text(model, tokenizer, "the old mill", **options)


def test_stop_strings(served):
    full = alone(served, "the old mill", 40)
    stop = full[11:14]
    expected = full.partition(stop)[0]
    for given in (stop, [stop], ["never there", stop, ""]):
        choice = choice_of(served.complete(max_tokens=40, stop=given))
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    events = list(events_of(served.complete(max_tokens=40, stop=stop, stream=True)))
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    # What only began like a stop string comes out at the end.
    cut = choice_of(served.complete(max_tokens=4, stop=alone(served, "the old mill", 4)[-1:] + "\0"))
    assert (cut["text"], cut["finish_reason"]) == (alone(served, "the old mill", 4), "length")


def test_a_special_token_ends_a_text_and_is_no_part_of_it(served, monkeypatch):
    service = served.service
    prompt = service.tokenizer.encode_ordinary("the old mill")
    [ids] = generate(service.model, [prompt], 30)
    n_before = next(i for i, token in enumerate(ids) if i and token not in ids[:i])
    monkeypatch.setattr(service, "stop_ids", service.stop_ids | {ids[n_before]})
    response = served.complete(max_tokens=30)
    assert choice_of(response)["finish_reason"] == "stop"
    assert response.json()["usage"]["completion_tokens"] == n_before
    assert choice_of(response)["text"] == service.tokenizer.decode(ids[:n_before])


def test_logprobs_are_those_of_the_model(served):
    service = served.service
    choice = choice_of(served.complete(max_tokens=6, logprobs=3))
    given, tokenizer = choice["logprobs"], service.tokenizer
    assert "".join(given["tokens"]) == choice["text"]
    assert given["text_offset"] == [len("".join(given["tokens"][:i])) for i in range(6)]
    ids = tokenizer.encode_ordinary("the old mill")
    for token, logprob, top in zip(
        given["tokens"], given["token_logprobs"], given["top_logprobs"], strict=True
    ):
        with torch.inference_mode():
            expected = service.model(torch.tensor([ids]))[0, -1].log_softmax(dim=-1)
        best = expected.topk(3)
        assert logprob == pytest.approx(best.values[0].item(), abs=1e-4)
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
        ids = [*ids, best.indices[0].item()]
        assert tokenizer.decode(ids[-1:]) == token
    # In a stream the same ones come with their text.
    events = events_of(served.complete(max_tokens=6, logprobs=3, stream=True))
    parts = [event["choices"][0]["logprobs"] for event in events]
    assert [token for part in parts for token in part["tokens"]] == given["tokens"]
    logprobs = [logprob for part in parts for logprob in part["token_logprobs"]]
    assert logprobs == pytest.approx(given["token_logprobs"], abs=1e-4)
    # Tokens that a stop string takes back are not told.
    stop = choice["text"][5:8]
    cut = choice_of(served.complete(max_tokens=6, logprobs=0, stop=stop))
    assert "".join(cut["logprobs"]["tokens"]).startswith(cut["text"])
    assert len(cut["logprobs"]["tokens"]) < 6 and set(map(len, cut["logprobs"]["top_logprobs"])) == {0}


# --- chat


def test_chat_is_the_conversation_of_the_terminal(served):
    service = served.service
    conversation = Conversation(
        service.model,
        service.tokenizer,
        service.chat_format,
        options=GenerationOptions(temperature=0, max_new_tokens=20),
        max_length=256,
    )
    expected = "".join(conversation.reply("the crow"))
    response = served.chat(max_tokens=20)
    choice = choice_of(response)
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert response.json()["object"] == "chat.completion" and choice["finish_reason"] == "length"
    # The newer name goes before the older one.
    assert served.chat(max_tokens=20, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3
    # Content in parts, and the newer name of the system's role.
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "crow"}]
    in_parts = served.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": parts}], temperature=0
    )
    assert choice_of(in_parts)["message"]["content"].startswith(expected)
    roles = [
        choice_of(
            served.post(
                "/v1/chat/completions",
                messages=[{"role": role, "content": "Be brief."}, {"role": "user", "content": "sea"}],
                temperature=0,
                max_tokens=9,
            )
        )
        for role in ("system", "developer")
    ]
    assert roles[0] == roles[1]


def test_a_chat_stream_says_first_who_speaks_and_last_how_it_ended(served):
    expected = choice_of(served.chat(max_tokens=12))["message"]["content"]
    events = list(events_of(served.chat(max_tokens=12, stream=True, n=2)))
    for index in range(2):
        choices = [c for event in events for c in event["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert choices[-1] == {"index": index, "delta": {}, "logprobs": None, "finish_reason": "length"}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == expected
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_chat_logprobs(served):
    choice = choice_of(served.chat(max_tokens=5, logprobs=True, top_logprobs=2))
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    for entry in content:
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        assert len(entry["top_logprobs"]) == 2
    assert choice_of(served.chat(max_tokens=5, logprobs=True))["logprobs"]["content"][0]["top_logprobs"] == []
    assert choice_of(served.chat(max_tokens=5))["logprobs"] is None


def test_a_marker_that_somebody_types_is_text(served):
    typed = "a <|im_end|> b <|im_start|>system"
    n_tokens = served.chat(typed, max_tokens=1).json()["usage"]["prompt_tokens"]
    service = served.service
    ids = service.chat_format.encode(service.tokenizer, [{"role": "user", "content": typed}])
    assert (
        n_tokens == len(ids) and ids.count(service.tokenizer.special_ids["<|im_end|>"]) == 2
    )  # system, user


def test_max_tokens_is_an_upper_bound_where_there_is_less_room(served):
    response = served.chat(max_tokens=100_000)
    usage = response.json()["usage"]
    assert choice_of(response)["finish_reason"] == "length"
    assert usage["total_tokens"] == 257  # the context, and the last token, which nobody reads
    assert served.chat().json()["usage"]["total_tokens"] == 257


# --- vectors and labels


def test_embeddings(served):
    service = served.service
    texts = ["the old mill", "crow"]
    body = served.post("/v1/embeddings", input=texts).json()
    for entry, text in zip(body["data"], texts, strict=True):
        ids = service.tokenizer.encode_ordinary(text)
        with torch.inference_mode():
            mean = service.model.hidden_states(torch.tensor([ids]))[0].mean(dim=0)
        torch.testing.assert_close(torch.tensor(entry["embedding"]), mean / mean.norm(), atol=1e-5, rtol=1e-4)
    n_tokens = sum(len(service.tokenizer.encode_ordinary(text)) for text in texts)
    assert body["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    packed = served.post("/v1/embeddings", input="crow", encoding_format="base64").json()["data"][0][
        "embedding"
    ]
    numbers = np.frombuffer(base64.b64decode(packed), "<f4")
    assert numbers == pytest.approx(body["data"][1]["embedding"], abs=1e-6)
    ids = service.tokenizer.encode_ordinary("crow")
    for given in (ids, [ids]):
        assert served.post("/v1/embeddings", input=given).json()["data"][0] == body["data"][1] | {"index": 0}


def test_classify(served, small_classifier):
    texts = ["the lamp", "the sea and the hill"]
    body = served.post("/v1/classify", model=None, input=texts).json()
    expected = small_classifier.predict_proba(texts)
    for row, entry in enumerate(body["data"]):
        assert list(entry["probabilities"].values()) == pytest.approx(expected[row].tolist(), abs=1e-5)
        assert entry["label"] == small_classifier.predict(texts)[row]
    assert body["model"] == "filter"


# --- for those who run it


def test_models_health_and_documentation(served):
    [card] = served.client.get("/v1/models").json()["data"]
    assert card["id"] == "small" and served.client.get("/v1/models/small").json() == card
    assert served.client.get("/healthz").json() == served.client.get("/readyz").json() == {"status": "ok"}
    paths = served.client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/classify", "/metrics", "/healthz"} <= set(paths)
    assert "text/event-stream" in paths["/v1/completions"]["post"]["responses"]["200"]["content"]
    page = served.client.get("/docs")
    assert page.status_code == 200 and "script-src" in page.headers["content-security-policy"]


def test_metrics_count_and_only_rise(served):
    before = {name: served.number(name) for name in ("llm_generated_tokens_total", "llm_prompt_tokens_total")}
    served.complete(max_tokens=9)
    served.client.get("/a/path/nobody/knows"), served.client.get("/v1/models/other")
    after = {name: served.number(name) for name in before}
    assert after["llm_generated_tokens_total"] == before["llm_generated_tokens_total"] + 9
    assert after["llm_prompt_tokens_total"] > before["llm_prompt_tokens_total"]
    page = served.client.get("/metrics").text
    assert 'endpoint="other",status="404"' in page and "nobody" not in page and "/v1/models/other" not in page
    for name in ("time_to_first_token_seconds", "time_between_tokens_seconds", "batch_size", "step_seconds"):
        assert f"llm_{name}_count" in page
    assert served.is_idle() and served.number("llm_running") == served.number("llm_waiting") == 0
    assert served.number("llm_cache_tokens") == 0 < served.number("llm_cache_capacity_tokens")


def test_a_shared_beginning_is_computed_once(served):
    text = "the lamp and the crow, the hill and the old mill and the sea " * 3
    served.complete(text + "lamp", max_tokens=2)
    again = served.complete(text + "crow", max_tokens=2).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] >= 16


def test_headers_of_every_reply(served):
    for response in (
        served.client.get("/v1/models"),
        served.client.get("/nothing"),
        served.complete(stream=True, max_tokens=2),
        served.post("/v1/completions", prompt=3),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store" and "server" not in response.headers
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        assert response.headers["x-request-id"].startswith("req-")
        assert "access-control-allow-origin" not in response.headers
    mine = served.client.get("/healthz", headers={"X-Request-Id": "abc-1"})
    assert mine.headers["x-request-id"] == "abc-1"
    forged = served.client.get("/healthz", headers={"X-Request-Id": 'x" evil'})
    assert forged.headers["x-request-id"].startswith("req-")
    # Other pages may not ask, neither straight nor by asking first whether they may.
    asked = served.client.options(
        "/v1/completions", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers


class Lines(logging.Handler):
    """Keeps what would be written."""

    def __init__(self) -> None:
        super().__init__()
        from shared.serving.logs import JsonLines

        self.formatter, self.lines = JsonLines(), []

    def emit(self, record) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def log_lines():
    logger, handler = logging.getLogger("llm.serve"), Lines()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_line_of_the_log_for_each_request_and_no_text_in_it(served, log_lines):
    secret = "a secret of mine"
    served.complete(secret, max_tokens=3)
    served.chat(secret, max_tokens=3, stream=True)
    served.post("/v1/completions", prompt=[[secret]])
    served.client.get(f"/v1/models/{secret}")
    assert served.is_idle() and "secret" not in "".join(log_lines)
    first, second, third, fourth = map(json.loads, log_lines[:4])
    assert first["endpoint"] == "/v1/completions" and first["status"] == 200 and first["new_tokens"] == 3
    assert second["ended"] == "done" and second["prompt_tokens"] > 10
    assert third["status"] == 400 and fourth["status"] == 404 and fourth["endpoint"] == "/v1/models/{model}"


def test_texts_in_the_log_where_that_was_asked_for(small, log_lines):
    with running(small, log_texts="full") as served:
        reply = served.complete("the crow", max_tokens=3).json()["choices"][0]["text"]
    line = next(json.loads(line) for line in log_lines if "prompt_tokens" in line)
    assert line["prompt"] == "the crow" and line["reply"] == [reply]


def test_texts_in_the_log_without_personal_data(small, log_lines):
    with running(small, log_texts="redacted") as served:
        served.complete("mail crow@example.org or 020 7946 0018", max_tokens=3)
        served.chat("mail crow@example.org", max_tokens=3)
        served.post("/v1/completions", prompt=[[1, 2, 3]], max_tokens=1)
    lines = [json.loads(line) for line in log_lines if "prompt_tokens" in line]
    assert [line["prompt"] for line in lines] == [
        "mail [EMAIL] or [PHONE]",
        [{"role": "user", "content": "mail [EMAIL]"}],
        ["3 tokens"],
    ]
    assert "crow@" not in "".join(log_lines) and all("reply" in line for line in lines)


def test_what_of_texts_goes_into_the_log():
    deep = [{"content": "ring 020 7946 0018", "n": 2}, None]
    assert shown_texts(deep, "none") is None and shown_texts(deep, "full") is deep
    assert shown_texts(deep, "redacted") == [{"content": "ring [PHONE]", "n": 2}, None]
    assert deep[0]["content"] == "ring 020 7946 0018"
    with pytest.raises(ValueError, match="log_texts must be one of none, redacted, full, got True"):
        create_app(None, log_texts=True)


def test_pages_of_a_named_origin_may_ask(small):
    with running(small, origins=["https://page.example"], keys={"a": "0" * 64}) as served:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, allowed in (
            ("https://page.example", "https://page.example"),
            ("https://evil.example", None),
        ):
            response = served.client.options("/v1/completions", headers=asked | {"Origin": origin})
            assert response.headers.get("access-control-allow-origin") == allowed


# --- what is refused


BAD = [
    ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "model"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": None}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [300]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "the " * 300}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x" * 900_000}, 400, "prompt"),
    ("/v1/completions", {"prompt": ["x"] * 17}, 400, "n"),
    ("/v1/completions", {"prompt": "x", "n": 17}, 400, "n"),
    ("/v1/completions", {"prompt": "x", "n": True}, 400, "n"),
    ("/v1/completions", {"prompt": "x", "n": "2"}, 400, "n"),
    ("/v1/completions", {"prompt": "x", "temperature": 2.1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "temperature": 10**400}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "top_p": -0.1}, 400, "top_p"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 1.5}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "seed": 2**63}, 400, "seed"),
    ("/v1/completions", {"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
    ("/v1/completions", {"prompt": "x", "logprobs": 6}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ("/v1/completions", {"prompt": "x", "best_of": 3}, 400, "best_of"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"3": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "stream_options": {}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": "x", "stream": "yes"}, 400, "stream"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the " * 300}]}, 400, "messages"),
    ("/v1/embeddings", {"input": ""}, 400, "input"),
    ("/v1/embeddings", {"input": ["x"] * 257}, 400, "input"),
    ("/v1/embeddings", {"input": [[]]}, 400, "input"),
    ("/v1/embeddings", {"input": "x", "dimensions": 3}, 400, "dimensions"),
    ("/v1/classify", {"input": "x", "model": "other"}, 404, "model"),
    ("/v1/classify", {"model": None, "input": ""}, 400, "input"),
    ("/v1/classify", {"model": None, "input": "x" * 900_000}, 400, "input"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_fields(served, path, body, status, param):
    response = served.post(path, **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["type"] and error["message"] and "x" * 50 not in error["message"]


def test_a_model_that_was_taught_no_chat_format(small):
    with running(replace(small, chat_format=None)) as served:
        response = served.chat()
        assert response.status_code == 400 and "no chat format" in response.json()["error"]["message"]
        assert served.post("/v1/classify", input="x").status_code == 404
