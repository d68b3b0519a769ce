"""How long a notebook is read, as README and the notes for teachers count it."""

import json
import re
from pathlib import Path


def minutes(path: Path) -> float:
    """Return how long a notebook is read: 130 words or 12 lines of code a minute, and a minute for each question."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    code = [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and not cell["metadata"].get("jupyter", {}).get("source_hidden")
    ]
    words = sum(len(re.findall(r"[A-Za-z']+", text)) for text in prose)
    lines = sum(1 for text in code for line in text.splitlines() if line.strip())
    return words / 130 + lines / 12 + sum("Check yourself" in text for text in prose)
