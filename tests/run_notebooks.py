"""Execute notebooks of the course, each in a fresh kernel, and print a table of the results they record.

    python tests/run_notebooks.py                      every notebook in order, copies with outputs in build/
    python tests/run_notebooks.py --write [NOTEBOOK ...]  the same, but rewrite the notebooks themselves

A failing cell stops the run with its source and its error. An interrupted run leaves the notebooks as they were.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shared.results import MIME_TYPE
from tests.architecture import ROOT, notebooks

# One thread a notebook: two busy-waiting thread pools on a busy machine run many times slower than one thread.
CHECKED_RUN = {
    "LLM_DEVICE": "cpu",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

# A failing cell reports itself; the kernel's own log (advice to encrypt loopback sockets, complaints about being
# shut down) would only stand between the results.
KERNEL_ARGUMENTS = ["--log-level=CRITICAL"]


class Failed(Exception):
    """A cell raised; the message holds its source and its error."""


def execute(path: Path) -> nbformat.NotebookNode:
    """Execute one notebook in a fresh kernel in its own folder and return it with its new outputs."""
    notebook = nbformat.read(path, as_version=4)
    code_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    label = f"{path.parent.name}/{path.name}"
    done = 0
    with tqdm(total=code_cells, desc=label, unit="cell", leave=False, disable=not sys.stderr.isatty()) as bar:

        def advance(cell: nbformat.NotebookNode, **_: object) -> None:
            nonlocal done
            if cell.cell_type == "code":
                done += 1
                bar.update()

        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_executed=advance,
            extra_arguments=KERNEL_ARGUMENTS,
        )
        try:
            client.execute(env={**os.environ, **CHECKED_RUN})
        except CellExecutionError as error:
            raise Failed(f"{label} stopped in code cell {done} of {code_cells}:\n\n{error}") from None
        except DeadKernelError:
            raise Failed(f"{label}: the kernel died in code cell {done + 1}; is there memory left?") from None
        except AssertionError:
            # On Ctrl-C nbclient shuts the kernel down and then stumbles over its absence.
            if client.km is not None:
                raise
            raise KeyboardInterrupt from None
    return _normalised(notebook)


def _normalised(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
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


def recorded(notebook: nbformat.NotebookNode) -> list[dict]:
    """Return what the notebook's cells recorded with `shared.results.record`."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[MIME_TYPE] for output in outputs if MIME_TYPE in output.get("data", {})]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Execute the notebooks of the course.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--write", action="store_true", help="rewrite the notebooks instead of build/")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.notebooks] or notebooks()
    if missing := [path for path in paths if not path.is_file()]:
        parser.error(f"no such notebook: {missing[0]}")
    rows, started = [], time.monotonic()
    try:
        for position, path in enumerate(paths, 1):
            label = f"{path.parent.name}/{path.stem}"
            print(f"[{position}/{len(paths)}] {label} ...", flush=True)
            notebook_started = time.monotonic()
            notebook = execute(path)
            target = path if options.write else ROOT / "build" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            write(notebook, target)
            print(
                f"[{position}/{len(paths)}] {label}: {time.monotonic() - notebook_started:.0f} s", flush=True
            )
            rows += [(label, entry) for entry in recorded(notebook)]
    except Failed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; no notebook was changed by the unfinished run.", file=sys.stderr)
        return 130
    print_results(rows)
    print(f"\n{len(paths)} notebooks ran in {time.monotonic() - started:.0f} s.")
    return 0


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
