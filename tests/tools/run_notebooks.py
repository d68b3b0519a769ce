"""Execute notebooks of the course, each in a fresh kernel, and print a table of the results they record.

    python -m tests.tools.run_notebooks                     every notebook in order, copies with outputs in build/
    python -m tests.tools.run_notebooks --chapter ch03      those of one chapter
    python -m tests.tools.run_notebooks --from ch04/02      from the second notebook of chapter 4 on
    python -m tests.tools.run_notebooks --write [NOTEBOOK ...]   rewrite the notebooks themselves

A cell that fails ends its notebook; the others go on, and the last lines say what failed and why (`--stop` ends the
run instead). Cells that need a model package which is not installed are passed over and counted (`needs.py`). A
notebook that fails or is interrupted stays as it was. The exit status is 1 when any failed.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from shared.notebook.results import MIME_TYPE
from tests.tools import checked_run
from tests.tools.architecture import ROOT, notebooks
from tests.tools.needs import missing_tags, report, unavailable

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

# A failing cell reports itself; the kernel's own log (advice to encrypt loopback sockets, complaints about being
# shut down) would only stand between the results.
KERNEL_ARGUMENTS = ["--log-level=CRITICAL"]


class Client(NotebookClient):
    """A client that leaves out the cells at the places in `passed_over`; they keep the outputs that they have."""

    passed_over: Collection[int] = ()

    async def async_execute_cell(
        self, cell: nbformat.NotebookNode, cell_index: int, **options: object
    ) -> nbformat.NotebookNode:
        if cell_index in self.passed_over:
            return cell
        return await super().async_execute_cell(cell, cell_index, **options)


class Failed(Exception):
    """A notebook did not run to its end.

    Attributes:
        reason: Where and why, in a line; the message itself also holds the cell's source and its traceback.
    """

    def __init__(self, reason: str, details: str = ""):
        super().__init__(f"{reason}\n\n{details}" if details else reason)
        self.reason = reason


def label_of(path: Path) -> str:
    """Return how a notebook is named in what is printed: its folder and its name without the ending."""
    return f"{path.parent.name}/{path.stem}"


def execute(path: Path, environment: dict[str, str]) -> nbformat.NotebookNode:
    """Execute one notebook in a fresh kernel in its own folder and return it with its new outputs.

    Raises:
        Failed: A cell raised an error, the kernel died, or the file is no notebook.
        KeyboardInterrupt: The user pressed Ctrl-C; the kernel has ended.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, KeyError, AttributeError, nbformat.reader.NotJSONError) as error:
        raise Failed(f"not a readable notebook: {_first_line(error)}") from None
    code_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    done = 0
    with tqdm(
        total=code_cells, desc=label_of(path), unit="cell", leave=False, disable=not sys.stderr.isatty()
    ) as bar:

        def advance(cell: nbformat.NotebookNode, **_: object) -> None:
            nonlocal done
            if cell.cell_type == "code":
                done += 1
                bar.update()

        client = Client(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_executed=advance,
            extra_arguments=KERNEL_ARGUMENTS,
        )
        client.passed_over = unavailable(notebook.cells, list(missing_tags()))
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            what = f"{error.ename}: {_first_line(error.evalue)}".removesuffix(": ")
            raise Failed(f"code cell {done} of {code_cells}: {what}", str(error)) from None
        except DeadKernelError:
            raise Failed(f"the kernel died in code cell {done + 1}; is there memory left?") from None
        except AssertionError:
            # On Ctrl-C nbclient shuts the kernel down and then stumbles over its absence.
            if client.km is not None:
                raise
            raise KeyboardInterrupt from None
    return _normalized(notebook)


def cells_passed_over(path: Path, missing: Collection[str]) -> dict[int, str]:
    """Return the cells of a notebook that cannot run here, see `needs.unavailable`; none of what is no notebook."""
    try:
        return unavailable(nbformat.read(path, as_version=4).cells, list(missing))
    except (ValueError, KeyError, AttributeError, nbformat.reader.NotJSONError):
        return {}


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _normalized(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what differs between runs and says nothing: Python's version, widgets, how printed text was buffered.

    A widget without its kernel shows as an error; its text takes its place.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number:03d}"
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET_VIEW, None)
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join neighbouring pieces of one stream."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if (
            joined
            and output.output_type == "stream" == joined[-1].output_type
            and output.name == joined[-1].name
        ):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook atomically."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        nbformat.write(notebook, file)
    os.replace(temporary, path)


def recorded(notebook: nbformat.NotebookNode, passed_over: Collection[int] = ()) -> list[dict]:
    """Return what the notebook's cells recorded with `shared.notebook.results.record`.

    Cells that were passed over keep the outputs that are stored: what they recorded did not happen here.
    """
    cells = (cell for place, cell in enumerate(notebook.cells) if place not in passed_over)
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[MIME_TYPE] for output in outputs if MIME_TYPE in output.get("data", {})]


def chosen(paths: list[Path], place: str) -> list[Path]:
    """Return the notebooks at a place: a chapter or a notebook, each by how its name begins ("ch04", "ch04/02").

    Raises:
        ValueError: No notebook is there.
    """
    chapter, _, name = place.strip("/").partition("/")
    found = [p for p in paths if p.parent.name.startswith(chapter) and p.name.startswith(name)]
    if not found:
        raise ValueError(
            f"no notebook is at {place!r}; write a chapter or a notebook, such as ch04 or ch04/02"
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Execute the notebooks of the course.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--write", action="store_true", help="rewrite the notebooks instead of build/")
    parser.add_argument("--chapter", metavar="CH", help="only the notebooks of a chapter, such as ch03")
    parser.add_argument("--from", metavar="PLACE", dest="start", help="begin there, such as ch04/02")
    parser.add_argument("--stop", action="store_true", help="stop at the first notebook that fails")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.notebooks] or notebooks()
    if missing := [path for path in paths if not path.is_file()]:
        parser.error(f"no such notebook: {missing[0]}")
    try:
        if options.chapter:
            paths = chosen(paths, options.chapter)
        if options.start:
            paths = paths[paths.index(chosen(paths, options.start)[0]) :]
    except ValueError as error:
        parser.error(str(error))
    # Cells that cannot run here are passed over, but what is stored must be whole.
    missing = missing_tags()
    passed_over = {path: list(cells_passed_over(path, missing).values()) for path in paths}
    if options.write and (incomplete := [path for path in paths if passed_over[path]]):
        tag = passed_over[incomplete[0]][0]
        parser.error(f"{label_of(incomplete[0])} cannot be rewritten without {tag}: {missing[tag]}")
    # What is stored comes from the settings of a checked run; elsewhere the user's own settings win.
    environment = checked_run.environment() | (checked_run.CHECKED_RUN if options.write else {})
    rows, failures, started = [], {}, time.monotonic()
    try:
        for position, path in enumerate(paths, 1):
            label, head = label_of(path), f"[{position}/{len(paths)}] {label_of(path)}"
            print(f"{head} ...", flush=True)
            notebook_started = time.monotonic()
            try:
                notebook = execute(path, environment)
            except Failed as failure:
                failures[label] = failure.reason
                print(f"{head} failed in {failure}", file=sys.stderr, flush=True)
                if options.stop:
                    break
                continue
            target = path if options.write else ROOT / "build" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            write(notebook, target)
            print(f"{head}: {time.monotonic() - notebook_started:.0f} s", flush=True)
            rows += [(label, entry) for entry in recorded(notebook, cells_passed_over(path, missing))]
    except KeyboardInterrupt:
        print("\nInterrupted; no notebook was changed by the unfinished run.", file=sys.stderr)
        return 130
    print_results(rows)
    print(f"\n{position - len(failures)} notebooks ran in {time.monotonic() - started:.0f} s.")
    counts = Counter(tag for path in paths[:position] for tag in passed_over[path])
    for line in report(counts, missing):
        print(line)
    if failures:
        print(f"{len(failures)} failed:")
        print("\n".join(f"  {label}: {reason}" for label, reason in failures.items()))
    return min(1, len(failures))


def print_results(rows: list[tuple[str, dict]]) -> None:
    """Print one line for each recorded result, with its notebook and what to hold it against."""
    table = [("notebook", "result", "value", "compare with")]
    table += [(label, r["name"], f"{r['value']} {r['unit']}".strip(), r["baseline"]) for label, r in rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    print()
    for row in table:
        cells = [text.ljust(width) for text, width in zip(row[:3], widths, strict=True)]
        print("  ".join([*cells, row[3]]).rstrip())


if __name__ == "__main__":
    sys.exit(main())
