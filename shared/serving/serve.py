"""The commands `llm serve` and `llm key`: a model behind HTTP, and keys for those who may call it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.serving.terminal import Failure, check_utf8, complain, write

if TYPE_CHECKING:
    from shared.finetuning.classification import TextClassifier
    from shared.serving.pictures import PictureClassifier

DEFAULT, FALLBACK, CLASSIFIER = "smollm2-135m-instruct", "tales-3m", "spam"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"A name, a folder or a .gguf file; {DEFAULT}, or {FALLBACK} where that is missing."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; 0.0.0.0 is all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", help="A file of hashed keys; `llm key` writes it.")
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Let everybody call, also from other machines.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="A name under which it may be asked; may be repeated."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Web pages from here may ask; may be repeated.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option("--classifier", help=f"For /v1/classify; {CLASSIFIER} where it can be had.")
    ] = None,
    image_classifier: Annotated[
        str | None,
        typer.Option("--image-classifier", help="For pictures in /v1/classify; digits-vit if not given."),
    ] = None,
    content_filter: Annotated[
        bool,
        typer.Option(
            "--content-filter",
            help="Refuse prompts, and cut replies, that the filter of the course blocks. It errs: see the notebook.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts written at a time.")] = 32,
    queue: Annotated[
        int, typer.Option("--queue", min=0, help="Texts that may wait; the next gets 429.")
    ] = 64,
    context: Annotated[
        int | None,
        typer.Option("--context", min=2, help="Tokens of prompt and reply; at most 2048 if not given."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Most tokens of a reply.")
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Most bytes of a request.")] = 1_000_000,
    request_timeout: Annotated[
        float,
        typer.Option("--request-timeout", min=0.001, help="Most seconds for a reply, the wait included."),
    ] = 300.0,
    drain_timeout: Annotated[
        float,
        typer.Option("--drain-timeout", min=0.001, help="Most seconds to finish replies after SIGTERM."),
    ] = 60.0,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    log_texts: Annotated[
        str,
        typer.Option(
            "--log-texts",
            help="Prompts and replies in the log: none, redacted (of mails, phones, cards ...) or full.",
        ),
    ] = "none",
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Take the tokenizer of this model instead.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="How many threads compute.")] = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's protocol. Ctrl-C and SIGTERM end it when what was accepted is written.

    \b
    llm serve                                        then http://127.0.0.1:8000/docs
    llm serve tales-3m --port 8080
    llm key keys.txt phone                           prints a key once, and keeps its hash
    llm serve --host 0.0.0.0 --api-keys keys.txt
    """
    from shared.serving import server
    from shared.serving.limits import Limits
    from shared.serving.security import LOOPBACK, read_keys

    # What can be refused is refused before anything is loaded.
    if log_level not in ("debug", "info", "warning", "error"):
        raise Failure(f"--log-level must be debug, info, warning or error, got {log_level}")
    if log_texts not in ("none", "redacted", "full"):
        raise Failure(f"--log-texts must be none, redacted or full, got {log_texts}")
    hashes = None if api_keys is None else read_keys(api_keys)
    is_local = host in LOOPBACK
    if not is_local and hashes is None and not no_keys:
        raise Failure(
            f"on {host} other machines can call: give --api-keys FILE, or --no-keys if all of them may"
        )
    limits = Limits(
        max_batch_size=batch_size,
        max_waiting=queue,
        context_length=context,
        max_new_tokens=max_tokens,
        max_body_bytes=max_body,
        request_s=request_timeout,
        drain_s=drain_timeout,
    )
    started = time.monotonic()
    bound = server.listen(host, port)
    try:
        import torch

        from shared.serving import logs
        from shared.serving.api import create_app
        from shared.serving.models import model_names, open_model
        from shared.serving.security import KeyRing
        from shared.serving.service import Service
        from shared.weights.pretrained import ALIASES

        logs.set_up(log_level)
        # Each thread that computes keeps helpers of its own, which wait for more; more of them than cores are put to
        # sleep between two products, and waking them costs a fifth of the speed. So only the engine's thread has any.
        n_threads = threads or torch.get_num_threads()
        torch.set_num_threads(1)
        name = check_utf8("MODEL", model) if model is not None else default_model()
        found = open_model(name, dtype=dtype, tokenizer=tokenizer)
        if name not in {*model_names(), *ALIASES}:  # a path is nobody's business
            found = replace(found, name=Path(name).stem)
        pictures = find_picture_classifier(image_classifier)
        blocker = None
        if content_filter:
            from shared.safety.filters import load_filter

            blocker = load_filter()
        service = Service(found, limits, find_classifier(classifier), n_threads, pictures, blocker)
        hosts = allowed_host or (LOOPBACK if is_local else ())
        app = create_app(
            service, KeyRing(hashes), hosts=hosts, origins=cors_origin or (), log_texts=log_texts
        )

        def on_start() -> None:
            logs.log(
                "listening",
                url=server.url_of(bound),
                model=found.name,
                classifier=service.classifier_name,
                image_classifier=service.pictures.name,
                content_filter=content_filter,
                keys=len(hashes or {}),
                seconds=round(time.monotonic() - started, 3),
            )

        server.Server(app, service, on_start).run(sockets=[bound])
    finally:
        bound.close()


def default_model() -> str:
    """Return the model that is served where none is named."""
    from shared.data.models import has_model

    if has_model(DEFAULT):
        return DEFAULT
    complain(f"{DEFAULT} is not on this machine, so {FALLBACK} is served; it only continues tales")
    return FALLBACK


def find_classifier(name: str | None) -> "tuple[str, Callable[[], TextClassifier]] | None":
    """Return the name of a classifier and what loads it.

    One that was named is loaded at once, so that errors come before anybody is served. Without a name it is the shipped
    one, loaded when it is first asked, or None where its base is missing.
    """
    from shared.data.models import has_model

    def load(name: str = CLASSIFIER) -> "TextClassifier":
        from shared.finetuning.lora_classifier import open_classifier

        return open_classifier(name)

    if name is not None:
        found = load(check_utf8("--classifier", name))
        return Path(name).stem, lambda: found
    return (CLASSIFIER, load) if has_model(DEFAULT) else None


def find_picture_classifier(name: str | None) -> "tuple[str, Callable[[], PictureClassifier]] | None":
    """Return the name of a classifier of pictures and what loads it, as `find_classifier`; None is the shipped one."""
    if name is None:
        return None
    from shared.serving.pictures import open_picture_classifier

    found = open_picture_classifier(check_utf8("--image-classifier", name))
    return Path(name).stem, lambda: found


def key(
    path: Annotated[Path, typer.Argument(help="The file of keys; it is made if it is not there.")],
    name: Annotated[str, typer.Argument(help="Whose key it is; it stands in the log.")],
) -> None:
    """Make a key for `llm serve --api-keys`. It is printed once; the file keeps its hash.

    \b
    llm key keys.txt phone
    """
    from shared.serving.security import add_key

    write(add_key(path, name))
