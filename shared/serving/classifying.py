"""The command `llm classify`: texts or pictures to labels."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.serving.terminal import Failure, check_utf8, input_texts, progress, write, write_json


def classify(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A classifier: its name or folder; an adapted one, too. For pictures digits-vit if not given."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Argument(help="A text; standard input, line by line, if not given.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="A picture in place of texts; may be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Lines of JSON, in and out.")] = False,
) -> None:
    """Say which label a text or a picture has, and how sure the classifier is.

    \b
    llm classify spam "Win a prize now"
    llm classify spam --json < messages.jsonl      lines of {"text": "..."}
    llm classify --image four.png                  a digit, as digits-vit reads it
    llm classify my_vit --image a.png --image b.png
    """
    if image:
        if text is not None:
            raise Failure(f"give texts or --image, not both, got the text {text[:60]!r}")
        from shared.serving.pictures import PICTURES, open_picture_classifier

        paths = [check_utf8("--image", str(path)) for path in image]
        reader = open_picture_classifier(check_utf8("MODEL", model or PICTURES))
        entries = progress([{"image": path} for path in paths], "pictures")
        show(entries, "image", lambda path: reader.shares(reader.read(path)), as_json)
        return
    if model is None:
        raise typer.BadParameter("it must be given; only --image has one to begin with", param_hint="'MODEL'")
    from shared.finetuning.lora_classifier import open_classifier

    found = open_classifier(check_utf8("MODEL", model))

    def shares_of(one: str) -> dict[str, float]:
        return dict(zip(found.labels, map(float, found.predict_proba([one])[0]), strict=True))

    show(progress(input_texts(text, as_json=as_json, field="text"), "texts"), "text", shares_of, as_json)


def show(
    entries: Iterable[dict[str, Any]],
    field: str,
    shares_of: Callable[[str], Mapping[str, float]],
    as_json: bool,
) -> None:
    """Write a line for each entry: the label of what stands under `field`, its probability, and that itself."""
    for entry in entries:
        shares = shares_of(entry[field])
        label = max(shares, key=shares.__getitem__)
        if as_json:
            write_json(entry | {"label": label, "probabilities": dict(shares)})
        else:
            write(f"{label}\t{shares[label]:.3f}\t{entry[field]}")
