"""Cut the labelled lines of personal data into a development half and a test half, once, before any rule is written.

    python split_pii_lines.py written.jsonl generated.jsonl

The inputs have one JSON object a line: `text`, `spans` ([start, end, kind] each, in code points, end exclusive),
`origin` ("written" by hand or "generated" from patterns) and `kind`. What is written, `shared/data/pii_lines.jsonl`,
has the same lines with their `split`, "development" or "test". Half of the lines of each origin, and within it of each
set of kinds of spans, goes to either split, drawn by a fixed seed. Lines that are equal but for their digits count as
one and stay together, so that no pattern of the generator stands word for word in both halves with other numbers.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from shared.checks import require

DEFAULT = Path(__file__).resolve().parents[1] / "shared" / "data" / "pii_lines.jsonl"
SEED = 20


def shape(text: str) -> str:
    """Return a text in lower case, each row of digits as one 0: what two lines from one pattern have in common."""
    return re.sub(r"[\d\W_]+", "0", text.lower())


def split_lines(lines: list[dict], seed: int = SEED) -> list[dict]:
    """Return the lines in their order, each with a `split`.

    Raises:
        ValueError: A text occurs twice, or a span lies outside its text.
    """
    require("lines", len(lines), len({line["text"] for line in lines}) == len(lines), "different texts")
    for line in lines:
        inside = all(0 <= start < end <= len(line["text"]) for start, end, _ in line["spans"])
        require("spans", line["spans"], inside, f"inside the text {line['text']!r}")
    # Lines of one shape are one group; groups are drawn within origin and kinds.
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, line in enumerate(lines):
        groups[line["origin"], shape(line["text"])].append(number)
    strata: dict[tuple[str, tuple[str, ...]], list[list[int]]] = defaultdict(list)
    for (origin, _), members in groups.items():
        strata[origin, tuple(sorted({kind for _, _, kind in lines[members[0]]["spans"]}))].append(members)
    rng, split = np.random.default_rng(seed), {}
    surplus = 0  # a stratum of odd size gives its odd group to the half that is behind
    for key in sorted(strata):
        for place in rng.permutation(len(strata[key])):
            name = "development" if surplus <= 0 else "test"
            members = strata[key][place]
            surplus += len(members) if name == "development" else -len(members)
            split |= dict.fromkeys(members, name)
    return [{**line, "split": split[number]} for number, line in enumerate(lines)]


def main(arguments: list[str] | None = None) -> None:
    """Read the files, cut, and write; an existing file is left as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    options = parser.parse_args(arguments)
    require("--out", str(options.out), not options.out.exists(), "new: a split is made once")
    lines = [json.loads(row) for path in options.files for row in path.read_text("utf-8").splitlines()]
    rows = [json.dumps(line, ensure_ascii=False) for line in split_lines(lines)]
    options.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
