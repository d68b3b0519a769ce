"""The command `llm adapt`: labelled texts to a classifier, saved as an adapter for a model that everybody has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from shared.serving.terminal import Failure, check_utf8, write

DEFAULT, FALLBACK = "smollm2-135m-instruct", "tales-3m"
N_BLOCKS, N_FROZEN = (
    20,
    16,
)  # of the default model: where a text's states are read, and below which nothing learns


def adapt(
    file: Annotated[Path, typer.Argument(help="A CSV or TSV file with the columns text and label.")],
    folder: Annotated[Path, typer.Argument(help="Where the adapter goes; it must not exist.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help=f"The model; {DEFAULT}, or {FALLBACK} where that is missing."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help='What stands around a text, as "Review: {text}\\nSentiment:"; "" for none.'
        ),
    ] = None,
    n_frozen: Annotated[
        int | None, typer.Option("--frozen", min=0, help="Blocks that get no adapter, counted from below.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the adapter.")] = 8,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Of the adapter, at its peak.")
    ] = 1e-3,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Most passes over the texts.")] = 6,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random choices.")] = 0,
    text: Annotated[str, typer.Option("--text", help="The column of the texts.")] = "text",
    label: Annotated[str, typer.Option("--label", help="The column of the labels.")] = "label",
) -> None:
    """Adapt a model to labelled texts of your own; `llm classify FOLDER` then labels others.

    The model is asked for the label behind each text, and learns to answer. A fifth of the texts is held back: it
    decides when training ends, and how sure the classifier may be.

    \b
    llm adapt reviews.csv my_adapter
    llm adapt reviews.csv my_adapter --prompt "Review: {text}\\nSentiment:"
    llm classify my_adapter "Would buy it again"
    """
    from shared.data.models import has_model
    from shared.finetuning.classification import read_labeled_texts
    from shared.finetuning.lora_classifier import train_lora_classifier

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Failure(f"{folder} exists; choose another folder, nothing is overwritten")
    texts, labels = read_labeled_texts(file, text, label)
    if base is None:
        base = DEFAULT if has_model(DEFAULT) else FALLBACK
    classifier = train_lora_classifier(
        texts,
        labels,
        base=check_utf8("--base", base),
        prompt=around(prompt, base, labels),
        n_frozen=(N_FROZEN if base == DEFAULT else 0) if n_frozen is None else n_frozen,
        rank=rank,
        learning_rate=learning_rate,
        n_epochs=epochs,
        seed=seed,
    )
    classifier.save(folder, texts=len(texts), seed=seed)
    write(f"{folder}: {len(texts)} texts, labels {', '.join(classifier.labels)}")


def around(prompt: str | None, base: str, labels: Sequence[str]) -> tuple[str, str] | None:
    """Return what stands before and behind a text; for the default model there is a general prompt."""
    if prompt is None:
        kinds = ", ".join(sorted(set(labels)))
        return ("Text: ", f"\nLabel ({kinds}):") if base == DEFAULT else None
    if not prompt:
        return None
    before, text, behind = check_utf8("--prompt", prompt).replace("\\n", "\n").partition("{text}")
    if not text or not behind.strip():
        raise Failure(f"--prompt must hold {{text}} and something behind it, got {prompt!r}")
    return before, behind
