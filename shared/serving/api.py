"""The addresses of the service, and the way of a request to them: key, size, time, then the model.

OpenAI's protocol, so that clients which were written for it work: `/v1/models`, `/v1/completions`,
`/v1/chat/completions`, `/v1/embeddings`; our own `/v1/classify`; for those who run it `/healthz` (it lives),
`/readyz` (it takes requests) and `/metrics`. `/docs` and `/openapi.json` describe them all.
"""

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, FastAPI, Header, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from shared.checks import check_choice
from shared.serving.errors import ApiError, not_found, on_api_error, on_http_error, on_invalid, unsupported
from shared.serving.gate import Gate
from shared.serving.limits import BodyGuard
from shared.serving.logs import LOG_TEXTS, shown_texts
from shared.serving.replies import Deadline, EventStream, ReplyForm, attended, collect, events_of, usage_of
from shared.serving.schemas import (
    ChatCompletion,
    ChatRequest,
    ClassifyRequest,
    Completion,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    ErrorBody,
    Labels,
    ModelCard,
    ModelList,
    Status,
    Writing,
)
from shared.serving.security import KeyRing
from shared.serving.service import Service
from shared.serving.worker import Job

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's
REFUSALS = {
    400: "Something in the request does not fit.",
    401: "The key is missing or unknown.",
    403: "The request names another host than this one.",
    404: "There is no such model here.",
    408: "The request did not come in time, or the reply not in the time that the client allowed.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    429: "Too many requests wait; `Retry-After` says when to come again.",
    431: "The head of the request is too large.",
    500: "A fault of the server.",
    503: "The server is about to end.",
    504: "The reply was not complete in time.",
}
OPEN = (400, 403, 408, 413, 431, 500)
KEYED = (400, 401, 403, 408, 413, 431, 500, 503)
Seconds = Annotated[
    float | None,
    Header(
        alias="X-Request-Timeout",
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="Most seconds for the reply.",
    ),
]


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the documentation says of refusals."""
    return {status: {"model": ErrorBody, "description": REFUSALS[status]} for status in sorted(statuses)}


ASKED = refusals(*KEYED, 404, 415, 429, 504)


def streamed(model: type) -> dict[int | str, dict[str, Any]]:
    """Return what the documentation says of a reply that is an object or, where `stream` is true, events."""
    content = {"text/event-stream": {"schema": {"type": "string", "description": "Events `data: {...}`."}}}
    return ASKED | {200: {"model": model, "content": content, "description": "The reply."}}


class StrictJson(APIRoute):
    """A route that takes a body only as JSON in UTF-8, without the NaN that Python would let through."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with the check before it."""
        handle = super().get_route_handler()

        async def check(request: Request) -> Response:
            if request.method == "POST":
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise ApiError(415, "Content-Type must be application/json")
                request._json = parse(await request.body())
            return await handle(request)

        return check


def parse(body: bytes) -> Any:
    """Return the value of a JSON text; ApiError (400) if it is none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body must be UTF-8, but byte {error.start} is not") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body must be JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # NaN, and whole numbers of thousands of digits
        raise ApiError(400, f"the body must be JSON: {str(error).partition(';')[0]}") from None


def create_app(
    service: Service,
    keys: KeyRing | None = None,
    *,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    log_texts: str = "none",
) -> FastAPI:
    """Return the application.

    Args:
        service: The model; it is started with the application and stopped with it.
        keys: Who may call; None is everybody.
        hosts: Names under which it may be asked; none means any.
        origins: Web pages of these origins may read replies; by default none may.
        log_texts: What of prompts and replies goes into the log, see `logs.LOG_TEXTS`.
    """
    app = FastAPI(
        title="llm serve",
        version="1",
        description="A small language model behind OpenAI's protocol.",
        redoc_url=None,
    )
    check_choice("log_texts", log_texts, LOG_TEXTS)
    app.state.service, app.state.log_texts = service, log_texts
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.include_router(asked)
    app.include_router(operated)
    # From the inside out: the body is read last, so that nobody without a key makes us read one.
    app.add_middleware(BodyGuard, max_bytes=service.limits.max_body_bytes, seconds=service.limits.body_s)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Timeout"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(
        Gate, service=service, keys=keys or KeyRing(None), hosts=hosts, is_preflight=bool(origins)
    )
    return app


bearer = HTTPBearer(auto_error=False, description="A key, where the server was started with keys.")
asked = APIRouter(route_class=StrictJson, dependencies=[Security(bearer)])
operated = APIRouter()


def deadline_of(request: Request, seconds: float | None) -> Deadline:
    """Return when a reply must be complete: the server's limit, or earlier where the client says so."""
    limit = request.app.state.service.limits.request_s
    is_own = seconds is not None and seconds < limit
    return Deadline(request.state.started + (seconds if is_own else limit), is_own)


# --- models


@asked.get("/v1/models", response_model=ModelList, responses=refusals(*KEYED), tags=["models"])
async def list_models(request: Request) -> dict[str, Any]:
    """List the models that can be asked for."""
    return {"object": "list", "data": [card(request.app.state.service)]}


@asked.get(
    "/v1/models/{model:path}", response_model=ModelCard, responses=refusals(*KEYED, 404), tags=["models"]
)
async def show_model(request: Request, model: str) -> dict[str, Any]:
    """Show one of them."""
    request.app.state.service.check_model(model)
    return card(request.app.state.service)


def card(service: Service) -> dict[str, Any]:
    """Return what is said of the model."""
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "llm-in-notebooks"}


# --- texts


@asked.post("/v1/completions", responses=streamed(Completion), tags=["text"], response_model=None)
async def complete(request: Request, body: CompletionRequest, seconds: Seconds = None) -> Response:
    """Continue a prompt."""
    service: Service = request.app.state.service
    check_writing(service, body)
    if body.echo:
        raise unsupported("echo", "is not supported")
    if body.suffix:
        raise unsupported("suffix", "is not supported")
    if body.best_of not in (None, body.n or 1):
        raise unsupported("best_of", "must be null or equal to n")
    prompts = await service.encode_prompts(body.prompt, "prompt")
    if service.content_filter is not None:
        await service.check_content([service.tokenizer.decode(ids) for ids in prompts], "prompt")
    jobs = service.jobs(
        body,
        prompts,
        param="prompt",
        max_tokens=body.max_tokens,
        default_max=DEFAULT_COMPLETION_TOKENS,
        n_logprobs=body.logprobs,
    )
    return await write(request, body, jobs, False, body.logprobs is not None, seconds, body.prompt)


@asked.post("/v1/chat/completions", responses=streamed(ChatCompletion), tags=["text"], response_model=None)
async def chat(request: Request, body: ChatRequest, seconds: Seconds = None) -> Response:
    """Reply to a conversation."""
    service: Service = request.app.state.service
    check_writing(service, body)
    if body.tools:
        raise unsupported("tools", "are not supported")
    if body.functions:
        raise unsupported("functions", "are not supported")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    prompt = await service.encode_chat(body.messages)
    await service.check_content([message.text() or "" for message in body.messages], "messages")
    jobs = service.jobs(
        body,
        [prompt],
        param="messages",
        max_tokens=body.max_completion_tokens or body.max_tokens,
        default_max=None,
        n_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    shown = [message.model_dump() for message in body.messages]
    return await write(request, body, jobs, True, bool(body.logprobs), seconds, shown)


def check_writing(service: Service, body: Writing) -> None:
    """Refuse what completions and chat refuse alike."""
    service.check_model(body.model)
    if body.logit_bias:
        raise unsupported("logit_bias", "is not supported")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")


async def write(
    request: Request,
    body: Writing,
    jobs: Sequence[Job],
    is_chat: bool,
    logprobs: bool,
    seconds: float | None,
    prompt: object,
) -> Response:
    """Let the model write, and return the reply: an object or a stream."""
    service: Service = request.app.state.service
    deadline, note = deadline_of(request, seconds), request.state.note
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    form = ReplyForm.new(is_chat, service.name, logprobs, with_usage)
    note(prompt=shown_texts(prompt, request.app.state.log_texts))

    def end(how: str) -> None:
        service.worker.cancel(jobs)
        usage = usage_of(jobs)
        note(ended=how, prompt_tokens=usage["prompt_tokens"], new_tokens=usage["completion_tokens"])

    if body.stream:
        service.worker.submit(jobs)
        return EventStream(events_of(form, jobs), deadline, end)
    how = "failed"
    try:
        pieces = await attended(request.receive, lambda: collect(service.worker, jobs), deadline)
        how = "done"
    finally:
        end(how)
    note(reply=shown_texts([piece.text for piece in pieces], request.app.state.log_texts))
    return JSONResponse(form.whole(pieces, usage_of(jobs)))


# --- vectors and labels


@asked.post(
    "/v1/embeddings", responses=ASKED | {200: {"model": Embeddings}}, tags=["texts"], response_model=None
)
async def embed(request: Request, body: EmbeddingRequest, seconds: Seconds = None) -> Response:
    """Turn texts into vectors: the mean of the model's last hidden states, at length 1."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    width = service.model.config.emb_dim
    if body.dimensions not in (None, width):
        raise unsupported("dimensions", f"must be null or {width}")
    inputs = await service.encode_prompts(body.input, "input")
    check_count(service, inputs)

    async def compute() -> list[list[float]]:
        return [await service.embed(ids) for ids in inputs]

    vectors: list[Any] = await attended(request.receive, compute, deadline_of(request, seconds))
    n_tokens = sum(map(len, inputs))
    request.state.note(prompt_tokens=n_tokens)
    if body.encoding_format == "base64":
        vectors = [base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode() for vector in vectors]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})


@asked.post("/v1/classify", responses=ASKED | {200: {"model": Labels}}, tags=["texts"], response_model=None)
async def classify(request: Request, body: ClassifyRequest, seconds: Seconds = None) -> Response:
    """Say which label each text or picture has, and how probable each label is."""
    service: Service = request.app.state.service
    if (body.input is None) == (body.image is None):
        param = "input" if body.image is None else "image"
        raise ApiError(400, "there must be either input, texts, or image, pictures", param=param)
    label: Callable[[str], Coroutine[Any, Any, dict[str, float]]] = service.classify
    name, given = service.classifier_name, body.input
    if body.image is not None:
        label, name, given = service.pictures.classify, service.pictures.name, body.image
    if name is None:
        raise ApiError(404, "this server has no classifier", code="model_not_found", param="model")
    if body.model not in (None, name):
        raise not_found(body.model or "", [name])
    inputs = [given] if isinstance(given, str) else given or []
    if body.image is None:
        check_count(service, inputs)

    async def compute() -> list[dict[str, float]]:
        return [await label(one) for one in inputs]

    found = await attended(request.receive, compute, deadline_of(request, seconds))
    data = [
        {"index": i, "label": max(shares, key=shares.__getitem__), "probabilities": shares}
        for i, shares in enumerate(found)
    ]
    return JSONResponse({"object": "list", "data": data, "model": name})


def check_count(service: Service, inputs: Sequence[object]) -> None:
    """Refuse no text, and too many."""
    if not 1 <= len(inputs) <= service.limits.max_inputs:
        raise ApiError(400, f"input must hold 1 to {service.limits.max_inputs} texts", param="input")


# --- for those who run it


@operated.get("/healthz", response_model=Status, responses=refusals(*OPEN, 503), tags=["operation"])
async def health(request: Request) -> dict[str, str]:
    """Say whether the process lives; if not, it should be started anew."""
    if not request.app.state.service.is_healthy:
        raise ApiError(503, "the engine has stopped, or fails again and again")
    return {"status": "ok"}


@operated.get("/readyz", response_model=Status, responses=refusals(*OPEN, 503), tags=["operation"])
async def ready(request: Request) -> dict[str, str]:
    """Say whether a request would be served; if not, it should go to another server."""
    if not request.app.state.service.is_ready:
        raise ApiError(503, "not taking requests")
    return {"status": "ok"}


@operated.get(
    "/metrics",
    responses=refusals(*KEYED) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_class=Response,
    tags=["operation"],
    dependencies=[Security(bearer)],
)
async def metrics(request: Request) -> Response:
    """Show the counters, for Prometheus."""
    page = await asyncio.to_thread(request.app.state.service.metrics.page)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")
