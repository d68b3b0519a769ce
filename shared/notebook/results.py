"""Record a notebook's main figures, so that `make run` can close with one table of them."""

from IPython.display import display

MIME_TYPE = "application/vnd.llm-course.result+json"


def record(name: str, value: float | int | str, unit: str = "", baseline: str = "") -> None:
    """Show one result in the notebook and store it in the cell's output under `MIME_TYPE`.

    Args:
        name: What was measured, for example `"bytes per token, stories"`.
        value: The figure, already rounded to the digits that are meant to be read.
        unit: Its unit; empty for a plain number.
        baseline: What to hold it against, in words: a baseline's figure or a theoretical limit.
    """
    text = f"{name}: {value}{' ' + unit if unit else ''}{f' ({baseline})' if baseline else ''}"
    entry = {"name": name, "value": value, "unit": unit, "baseline": baseline}
    display({"text/plain": text, MIME_TYPE: entry}, raw=True)
