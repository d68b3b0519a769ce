"""Read the stored notebooks and say what a reader would trip over; nothing is run.

    python -m tests.tools.audit [NOTEBOOK ...]   what is wrong; exit status 1 if anything is
    python -m tests.tools.audit --teaching       also how each notebook reads to a learner: aims, never a failure
    python -m tests.tools.audit --backward       every `.backward()` in shared/, scripts and notebooks, and its reason

nbval passes a cell that was never executed without comparing it, and passes any cell tagged to be ignored; the checks
here keep it honest. What concerns teaching is a list of places to look at: a figure can be missed for a good reason.
"""

import argparse
import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.tools.architecture import CHAPTERS, ROOT, notebooks
from tests.tools.promote import MARK

IGNORED_TAGS = {"nbval-ignore-output", "nbval-skip"}
MAX_IGNORED_SHARE = 0.15
MAX_PLAIN_CELL_LINES = 40
MAX_BYTES = 1_500_000

# Aims for how a notebook teaches.
MAX_MEDIAN_LINES = 10
MAX_PROMOTED_CELL_LINES = 60
MAX_FIRST_IMPORTS = 8
MIN_DRAWINGS = 6
ADDRESS_PER_1000 = (15, 30)
MIN_WORDS_PER_CODE_LINE = 6.0
MAX_CODE_CELLS = 70
ADDRESS = re.compile(r"\b(you|your|yours|we|us|our|ours|let's)\b", re.I)

MACHINE_PATH = re.compile(r"/root/|/home/\w+/|/Users/|/tmp/|[A-Z]:\\+Users")
REMOTE_IMAGE = re.compile(r"!\[[^\]]*\]\(https?://|<img[^>]+https?://")
PROOF = re.compile(r"^#+ .*\b(proof|proven|check(ed)? against)\b", re.I | re.M)

# Files that call `.backward()` themselves, each with its reason; everything else that trains goes through `train`.
TEACHES_OR_MEASURES: dict[str, str] = {
    "appendix_lora/01_lora.ipynb": "gradients at the start looked at and proven; a step timed",
    "appendix_lora/adapt_smollm2.py": "memory and time of single steps over two kinds of base",
    "ch01_intro/03_pytorch_primer.ipynb": "builds autograd and the loop, before they are taught; bugs made on purpose",
    "ch01_intro/two_processes.py": "one gradient shared by two processes, proven against the whole batch",
    "ch02_text_data/05_embeddings.ipynb": "word vectors, before the loop is taught; a gradient looked at",
    "ch03_attention/01_seq2seq.ipynb": "gradients through time measured and compared; a small reader, before the loop",
    "ch03_attention/02_self_attention.ipynb": "gradients measured and proven; a toy reader, before the loop is taught",
    "ch03_attention/03_multi_head_attention.ipynb": "gradients proven; two small readers, before the loop is taught",
    "ch03_attention/04_positions_in_attention.ipynb": "a small reader, before the loop is taught",
    "ch03_attention/05_transformer.ipynb": "gradients measured and proven; small models of four families",
    "ch03_attention/sweep_dates.py": "encoder-decoders of chapter 3: source, mask and target, dates drawn anew",
    "ch04_gpt/01_building_blocks.ipynb": "gradients through depth measured; a few steps by hand",
    "ch04_gpt/02_gpt.ipynb": "gradients proven; the four lines of a step, before the loop is taught",
    "ch04_gpt/05_modern_variants.ipynb": "gradients proven against transformers",
    "ch05_pretraining/01_training_loop.ipynb": "teaches the loop and promotes it",
    "ch05_pretraining/03_schedules_and_optimizers.ipynb": "clipping, accumulation by hand; optimizers against torch",
    "ch05_pretraining/04_precision_memory_and_scaling.ipynb": "loss scaling by hand; memory and arithmetic of one step",
    "ch05_pretraining/09_troubleshooting.ipynb": "promotes the overfitting check; steps in six forms, timed",
    "ch05_pretraining/compile_speed.py": "times one step, compiled and not",
    "ch05_pretraining/distributed_demo.py": "counts the traffic of single steps of DDP and FSDP2",
    "ch06_classification/01_spam.ipynb": "a head alone, a few lines; L-BFGS, which asks for the loss many times a step",
    "ch06_classification/04_contrast.ipynb": "points on a circle, which are no model",
    "deployment/06_privacy.ipynb": "gradients of single rows one by one, proven against all at once and against Opacus",
    "deployment/privacy_runs.py": "forgetting: one loss goes up while another goes down, in one step",
    "shared/finetuning/classification.py": "L-BFGS, which asks for the loss many times a step",
    "shared/pretraining/updates.py": "the step of pretrain.py: several processes, exact resume",
    "shared/text/skipgram.py": "word vectors: pairs and noise words, no language model",
    "shared/training/diagnosis.py": "overfits one batch to see whether a model can learn at all",
    "shared/training/loop.py": "the loop",
}


def source(cell: dict) -> str:
    """Return the text of a cell, which is stored as a string or as a list of lines."""
    return "".join(cell["source"])


def tags(cell: dict) -> set[str]:
    """Return the tags of a cell."""
    return set(cell["metadata"].get("tags", []))


def is_hidden(cell: dict) -> bool:
    """Return whether the source of a cell is folded."""
    return bool(cell["metadata"].get("jupyter", {}).get("source_hidden"))


def shown_lines(cell: dict) -> list[str]:
    """Return the lines of a code cell that are not blank; none where it is folded."""
    return [] if is_hidden(cell) else [line for line in source(cell).splitlines() if line.strip()]


def findings(path: Path) -> list[str]:
    """Return what is wrong with a stored notebook, one line each."""
    raw = path.read_text(encoding="utf-8")
    notebook = json.loads(raw)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    prose = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    found = []
    # The whole notebook: executed in order, compared, small, without the state of widgets.
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("the code cells were not all executed, in order, in one fresh kernel")
    ignored = sum(bool(IGNORED_TAGS & tags(cell)) or "NBVAL_" in source(cell) for cell in code)
    if ignored > MAX_IGNORED_SHARE * len(code):
        found.append(f"{ignored} of {len(code)} code cells are not compared (limit {MAX_IGNORED_SHARE:.0%})")
    if sum("solution" in tags(cell) for cell in code) < 3:
        found.append("fewer than three solutions")
    if "widgets" in notebook["metadata"]:
        found.append("the notebook stores the state of widgets")
    if len(raw) > MAX_BYTES:
        found.append(f"{len(raw) / 1e6:.1f} MB are stored (limit {MAX_BYTES / 1e6} MB)")
    for position, cell in enumerate(code, 1):
        found += [f"code cell {position} {what}" for what in _cell_findings(cell)]
    # What every notebook has.
    text = "\n".join(prose)
    if not prose or not prose[0].lstrip().startswith("# ") or "|" not in prose[0]:
        found.append("the first cell is not a title with a table")
    if REMOTE_IMAGE.search(text):
        found.append("an image is loaded from the network")
    if not PROOF.search(text):
        found.append("no section is headed Proof")
    if not any(_has_image(cell) for cell in code):
        found.append("there is no figure")
    for wanted in ("Exercises", "References"):
        if not re.search(rf"^#+ .*{wanted}", text, re.I | re.M):
            found.append(f"no section is headed {wanted}")
    return found


def _cell_findings(cell: dict) -> list[str]:
    """Return what is wrong with one code cell."""
    found = []
    text = source(cell)
    if not text.strip():
        found.append("is empty")
    if "solution" in tags(cell) and not is_hidden(cell):
        found.append("is a solution and not folded")
    if "execution" in cell["metadata"]:
        found.append("stores its running time")
    if len(text.splitlines()) > MAX_PLAIN_CELL_LINES and not MARK.match(text):
        found.append(f"has {len(text.splitlines())} lines and is not promoted (limit {MAX_PLAIN_CELL_LINES})")
    if re.search(r"\b(TODO|FIXME|XXX)\b", text):
        found.append("speaks of something unfinished")
    for output in cell["outputs"]:
        data = output.get("data", {})
        shown = "".join("".join(part) for part in (output.get("text", ""), data.get("text/plain", "")))
        shown += "".join(data.get("text/html", ""))
        if output["output_type"] == "error" and "raises-exception" not in tags(cell):
            found.append(f"ends in {output['ename']}")
        if output.get("name") == "stderr":
            found.append("writes to stderr")
        if MACHINE_PATH.search(shown):
            found.append("prints a path of one machine")
        if re.search(r"\b[A-Z]\w*Warning:", shown) and not (IGNORED_TAGS | {"raises-exception"}) & tags(cell):
            found.append("prints a warning")
    return found


def _has_image(cell: dict) -> bool:
    return any(kind.startswith("image/") for output in cell["outputs"] for kind in output.get("data", {}))


@dataclass(frozen=True)
class Reading:
    """How a notebook reads: figures that TEACHING compares, each with its aim in `misses`.

    Attributes:
        median_lines, longest_cell: Of the code cells that are not folded.
        first_imports: Import lines of the first code cell.
        drawings: Folded cells, or cells that call the drawing module, with a picture.
        address: "You", "we", "our" and the like in 1,000 words.
        words_per_line: Words of prose for each line of code that is not folded.
        code_cells: Number of code cells.
        longest_promoted: Lines of the longest promoted cell.
    """

    median_lines: int
    longest_cell: int
    first_imports: int
    drawings: int
    address: float
    words_per_line: float
    code_cells: int
    longest_promoted: int

    def misses(self) -> list[str]:
        """Return the aims that are not reached, one line each."""
        low, high = ADDRESS_PER_1000
        checks = (
            (
                self.median_lines <= MAX_MEDIAN_LINES,
                f"median code cell {self.median_lines} lines (aim {MAX_MEDIAN_LINES})",
            ),
            (
                self.longest_promoted <= MAX_PROMOTED_CELL_LINES,
                f"a promoted cell of {self.longest_promoted} lines (aim {MAX_PROMOTED_CELL_LINES})",
            ),
            (
                self.first_imports <= MAX_FIRST_IMPORTS,
                f"{self.first_imports} imports at first (aim {MAX_FIRST_IMPORTS})",
            ),
            (
                self.drawings >= MIN_DRAWINGS,
                f"{self.drawings} drawings of ideas (aim {MIN_DRAWINGS} or more)",
            ),
            (
                low <= self.address <= high,
                f"{self.address:.0f} you/we/our per 1,000 words (aim {low} to {high})",
            ),
            (
                self.words_per_line >= MIN_WORDS_PER_CODE_LINE,
                f"{self.words_per_line:.1f} words of prose for a line of code (aim {MIN_WORDS_PER_CODE_LINE:.0f})",
            ),
            (
                self.code_cells <= MAX_CODE_CELLS,
                f"{self.code_cells} code cells (aim {MAX_CODE_CELLS}): two notebooks?",
            ),
        )
        return [line for holds, line in checks if not holds]


def reading(path: Path) -> Reading:
    """Return how a stored notebook reads to a learner."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    shown = [rows for rows in map(shown_lines, code) if rows] or [[]]
    lines = sorted(map(len, shown))
    words = max(1, len(re.findall(r"[A-Za-z']+", text)))
    drawn = [
        cell
        for cell in code
        if _has_image(cell) and (is_hidden(cell) or re.search(r"\bdrawing\b|\bdraw_\w+\(", source(cell)))
    ]
    return Reading(
        median_lines=lines[len(lines) // 2],
        longest_cell=lines[-1],
        first_imports=sum(line.startswith(("import ", "from ")) for line in shown[0]),
        drawings=len(drawn),
        address=1000 * len(ADDRESS.findall(text)) / words,
        words_per_line=words / max(1, sum(lines)),
        code_cells=len(code),
        longest_promoted=max(
            (len(shown_lines(cell)) for cell in code if MARK.match(source(cell))), default=0
        ),
    )


def backward_calls(root: Path = ROOT) -> dict[str, int]:
    """Return how often each module, script and notebook of the course calls `.backward()`, where it does."""
    counts: dict[str, int] = {}
    scripts = [*(root / "shared").rglob("*.py"), *(p for c in CHAPTERS for p in (root / c).glob("*.py"))]
    texts = {path: [path.read_text(encoding="utf-8")] for path in scripts}
    for path in notebooks(root):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path] = [source(cell) for cell in cells if cell["cell_type"] == "code"]
    for path, parts in texts.items():
        count = 0
        for part in parts:
            try:
                nodes = list(ast.walk(ast.parse(part)))
            except SyntaxError:
                continue  # a magic command
            calls = [node.func for node in nodes if isinstance(node, ast.Call)]
            count += sum(isinstance(call, ast.Attribute) and call.attr == "backward" for call in calls)
        if count:
            counts[path.relative_to(root).as_posix()] = count
    return dict(sorted(counts.items()))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Say what a reader of the notebooks would trip over.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--teaching", action="store_true", help="also how each reads to a learner")
    parser.add_argument(
        "--backward", action="store_true", help="list every call of .backward() and its reason"
    )
    options = parser.parse_args(arguments)
    if options.backward:
        for path, count in backward_calls().items():
            print(f"{count:3}  {path}: {TEACHES_OR_MEASURES.get(path, 'NO REASON IS GIVEN')}")
        return int(backward_calls().keys() != TEACHES_OR_MEASURES.keys())
    bad = 0
    for path in [path.resolve() for path in options.notebooks] or notebooks():
        wrong = findings(path)
        bad += bool(wrong)
        aims = reading(path).misses() if options.teaching else []
        if wrong or aims:
            print(f"{path.parent.name}/{path.name}")
        print(
            "".join(f"    wrong: {line}\n" for line in wrong)
            + "".join(f"    aim: {line}\n" for line in aims),
            end="",
        )
    print(f"audit: {bad} notebooks with something wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
