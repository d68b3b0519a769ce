"""What a check of the doctor returns, and the lines that say it.

Left out: the checks themselves (`software`, `machine`, `files`, `network`). Like them this module is for old Pythons,
too.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable  # noqa: UP035 (an old Python has to get as far as being told that it is old)

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = platform.system()
STATUSES = ("ok", "note", "problem")
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: What was looked at.
        status: "ok"; "note": the course runs, with a difference; "problem": something will fail.
        found: What is there, in one line.
        remedy: What to do about it, in one line, with a command where there is one; only "ok" may have none.
    """

    name: str
    status: str
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if (self.status == "problem" and not self.remedy) or "\n" in self.found + self.remedy:
            raise ValueError(
                f"a finding is one line, a problem's remedy too, got {self.found!r}, {self.remedy!r}"
            )


def python_of(system: str = SYSTEM) -> str:
    """Return how the course's own Python is called from the repository's folder."""
    return r".venv\Scripts\python" if system == "Windows" else ".venv/bin/python"


def setting(name: str, value: str, system: str = SYSTEM) -> str:
    """Return the line that sets an environment variable in a terminal."""
    return f"$env:{name} = '{value}'" if system == "Windows" else f"export {name}={value}"


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) for "2.13.0+cpu"."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", version)[0].split(".") if part)  # type: ignore[index]


def report(findings: Iterable[Finding]) -> str:
    """Return the findings as aligned lines, and after them what to do, problems first."""
    findings = list(findings)
    width = max(len(finding.name) for finding in findings)
    lines = [f"{f.status:8} {f.name:{width}}  {f.found}" for f in findings]
    for status, heading in (("problem", "To be mended:"), ("note", "Good to know:")):
        some = [f"  {f.name}: {f.remedy}" for f in findings if f.status == status and f.remedy]
        lines += ["", heading, *some] if some else []
    return "\n".join(lines)
