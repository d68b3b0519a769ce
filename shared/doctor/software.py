"""Checks of Python, its environment, the packages and torch.

A package is looked up, not imported, and torch is asked in a process of its own: either may be broken.

Left out: packages that only tests need.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence  # noqa: UP035 (an old Python has to get past here)

from shared.doctor.findings import ROOT, SYSTEM, Finding, numbers_of, python_of, setting

OLDEST, NEWEST = (3, 11), (3, 13)  # Pythons that the course is tested with


def check_python(
    version: Sequence[int] = sys.version_info[:3],
    bits: int = sys.maxsize.bit_length() + 1,
    system: str = SYSTEM,
) -> Finding:
    """Python has to be one that the course is tested with, and of 64 bits."""
    found = ".".join(map(str, version[:3])) + (f", {bits} bits" if bits != 64 else "")
    install = {
        "Windows": "winget install Python.Python.3.11, then: py -3.11 -m venv .venv",
        "Darwin": "brew install python@3.11, then: make lab PYTHON=python3.11",
    }.get(
        system,
        "sudo apt install python3.11 python3.11-venv (if your system offers it), then: make lab PYTHON=python3.11",
    )
    if tuple(version[:2]) < OLDEST or bits < 64:
        return Finding("Python", "problem", f"{found}; Python 3.11 or newer, 64 bits, is needed", install)
    if tuple(version[:2]) > NEWEST:
        return Finding(
            "Python", "note", f"{found}, newer than what was tested", f"if pip finds no torch: {install}"
        )
    return Finding("Python", "ok", found)


def check_environment(
    prefix: str = sys.prefix, base: str = sys.base_prefix, conda: str = os.environ.get("CONDA_PREFIX", "")
) -> Finding:
    """Packages should go into an environment of their own."""
    if prefix != base:
        return Finding("environment", "ok", f"virtual environment {Path(prefix).name}")
    if conda and Path(conda) == Path(prefix):
        return Finding("environment", "ok", f"conda environment {Path(prefix).name}")
    remedy = f"start the course by make lab, or by {python_of()} -m jupyterlab"
    return Finding("environment", "note", "none: this is the Python of the whole system", remedy)


def read_requirements(root: Path = ROOT) -> dict[str, str]:
    """Return what the notebooks need, each name with its lowest version, from requirements.txt and pyproject.toml."""
    import tomllib

    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines += tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = (re.match(r"([A-Za-z][\w.-]*)[^#>=]*[>=]=\s*([\w.]+)", line) for line in lines)
    return {_normal(match[1]): match[2] for match in found if match}


def read_pins(root: Path = ROOT) -> dict[str, str]:
    """Return the versions that the course was tested with, from constraints.txt."""
    text = (root / "constraints.txt").read_text(encoding="utf-8")
    return {_normal(name): pin for name, pin in re.findall(r"^([A-Za-z][\w.-]*)==(\S+)", text, re.M)}


def _normal(name: str) -> str:
    """Return a package's name as the index compares it: Jinja2 is jinja2, and a_b is a-b."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except Exception:  # none, or one whose description is damaged
        return None


def check_packages(
    root: Path = ROOT, installed: Callable[[str], str | None] = installed_version, system: str = SYSTEM
) -> Finding:
    """Each required package is there and not too old; where it is another version than the tested one, that is said."""
    command = f"{python_of(system)} -m pip install -r requirements.txt -c constraints.txt"
    try:
        required, pins = read_requirements(root), read_pins(root)
    except (OSError, ValueError, KeyError) as error:
        found = f"the list cannot be read: {type(error).__name__}"
        return Finding(
            "packages", "problem", found, "git checkout -- requirements.txt constraints.txt pyproject.toml"
        )
    versions = {name: installed(name) for name in required}
    missing = sorted(name for name, version in versions.items() if version is None)
    there = {name: version for name, version in versions.items() if version is not None}
    too_old = [
        f"{n} {v} is below {required[n]}" for n, v in there.items() if numbers_of(v) < numbers_of(required[n])
    ]
    if missing or too_old:
        parts = ([f"missing: {', '.join(missing)}"] if missing else []) + sorted(too_old)
        return Finding("packages", "problem", "; ".join(parts), command)
    other = {
        n: numbers_of(v) > numbers_of(pins[n]) for n, v in there.items() if n in pins and _differ(v, pins[n])
    }
    if other:
        parts = [
            f"{n} {there[n]} is {'newer' if newer else 'older'} than {pins[n]}" for n, newer in other.items()
        ]
        return Finding(
            "packages", "note", "; ".join(sorted(parts)), f"for exactly what was tested: {command}"
        )
    return Finding("packages", "ok", f"{len(there)} of {len(required)}, as tested")


def _differ(first: str, second: str) -> bool:
    return numbers_of(first) != numbers_of(second)


def check_course(root: Path = ROOT, folder: str | None = None, system: str = SYSTEM) -> Finding:
    """Notebooks in any folder must find `shared`, and that of this copy of the course."""
    if folder is None:
        code = "import shared; print(list(shared.__path__)[0])"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root / "tests", capture_output=True, text=True
        )
        folder = done.stdout.strip()
    install = f"{python_of(system)} -m pip install -e . -c constraints.txt"
    if not folder:
        return Finding("course", "problem", "no notebook finds the package shared", install)
    if Path(folder).resolve() != root / "shared":
        return Finding("course", "note", "notebooks use the package shared of another folder", install)
    return Finding("course", "ok", "notebooks find the package shared of this folder")


PROBE = """
import json, torch
cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
a = torch.arange(65536).reshape(256, 256) % 7 - 3
flags = getattr(torch.cpu, "get_capabilities", dict)()
print(json.dumps({
    "version": torch.__version__, "threads": torch.get_num_threads(), "mps": mps,
    "cuda": torch.cuda.get_device_name() if cuda else "",
    "cuda_memory": torch.cuda.get_device_properties(0).total_memory if cuda else 0,
    "capability": torch.backends.cpu.get_cpu_capability(),
    "bf16": sorted(str(name) for name, value in flags.items() if "bf16" in str(name) and value is True),
    "right": bool(torch.equal((a.float() @ a.float().T).long(), a @ a.T)),
}))
"""


def torch_facts(python: str = sys.executable, seconds: float = 120) -> dict[str, Any]:
    """Return what torch says of itself, asked in a process of its own, which may crash: {"error": ...} if it does."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"error": type(error).__name__}
    if done.returncode < 0:  # POSIX: ended by a signal
        return {"error": f"Python is ended by {signal.Signals(-done.returncode).name} at import torch"}
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:160]}


def check_torch(facts: Mapping[str, Any], system: str = SYSTEM) -> Finding:
    """PyTorch starts, and a product of two matrices comes out right to the last digit."""
    if error := facts.get("error"):
        remedy = f"{python_of(system)} -m pip install --force-reinstall torch -c constraints.txt"
        if "SIGILL" in error:
            remedy = (
                "this processor is too old for torch's instructions: use another machine or an online service"
            )
        elif "DLL" in error or "WinError" in error:
            remedy = "winget install Microsoft.VCRedist.2015+.x64, then open a new terminal"
        return Finding("torch", "problem", error, remedy)
    if not facts["right"]:
        remedy = f"{setting('ATEN_CPU_CAPABILITY', 'default', system)}; if that helps, please report it"
        return Finding("torch", "problem", f"{facts['version']} multiplies two matrices wrongly", remedy)
    return Finding("torch", "ok", f"{facts['version']}, a matrix product is right")
