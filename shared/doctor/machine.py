"""Checks of processor, threads, graphics card, memory and disk.

Left out: how fast they are (`speed`).
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Mapping  # noqa: UP035 (an old Python has to get past here)

from shared.doctor.findings import GB, ROOT, SYSTEM, Finding, python_of, setting

DISK = 2.2 * GB  # what an installation takes
LEAST_DISK = 0.5 * GB
LEAST_MEMORY = 3.5 * GB  # the largest notebook takes 3


def check_processor(facts: Mapping[str, Any], machine: str = platform.machine()) -> Finding:
    """Wide vector instructions make matrix products fast; bfloat16 needs some of its own."""
    if "version" not in facts:
        return Finding("processor", "note", f"{machine}; torch cannot be asked for more", "see torch")
    found = f"{machine}, {facts['capability']}, " + (", ".join(facts["bf16"]) or "no bfloat16 of its own")
    if facts["capability"] == "DEFAULT" and machine.lower() in ("x86_64", "amd64"):
        remedy = "everything runs, several times slower; unset ATEN_CPU_CAPABILITY if you have set it"
        return Finding("processor", "note", f"{found}: no AVX2 is used", remedy)
    return Finding("processor", "ok", found)


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many CPUs this process may use; an affinity or a container may allow fewer than there are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):  # no container, or version 1 of cgroups
        return count
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


def check_threads(facts: Mapping[str, Any], usable: int | None = None, system: str = SYSTEM) -> Finding:
    """No more threads than CPUs, or they wait for each other."""
    usable, threads = usable_cpus() if usable is None else usable, facts.get("threads", 0)
    found = f"{usable} CPUs can be used, torch takes {threads or 'unknown'} of them"
    if threads > usable:
        remedy = f"before you start JupyterLab: {setting('OMP_NUM_THREADS', str(usable), system)}"
        return Finding(
            "threads", "note", f"{threads} threads for {usable} CPUs: they wait for each other", remedy
        )
    return Finding("threads", "ok", found)


def check_accelerator(
    facts: Mapping[str, Any], has_driver: bool | None = None, system: str = SYSTEM
) -> Finding:
    """A graphics card is welcome and never needed."""
    has_driver = shutil.which("nvidia-smi") is not None if has_driver is None else has_driver
    if facts.get("cuda"):
        return Finding("GPU", "ok", f"{facts['cuda']}, {facts['cuda_memory'] / GB:.0f} GB")
    if facts.get("mps"):
        return Finding("GPU", "ok", "Apple GPU (MPS)")
    if has_driver and "version" in facts:
        remedy = f"{python_of(system)} -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return Finding("GPU", "note", "an NVIDIA driver is there, but this torch does not use it", remedy)
    return Finding("GPU", "ok", "none; the course needs none")


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return the bytes of memory of this machine or container, and how many of them are free; 0, 0 if unknown."""
    try:
        import psutil

        total, available = psutil.virtual_memory().total, psutil.virtual_memory().available
    except Exception:  # the package is missing or damaged
        if not hasattr(os, "sysconf"):
            return 0, 0
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = total
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return total, available
    return min(total, limit), max(0, min(available, limit - used))


def check_memory(amounts: tuple[int, int] | None = None) -> Finding:
    """The largest notebook takes 3 GB."""
    total, free = memory() if amounts is None else amounts
    found = f"{total / GB:.1f} GB, {free / GB:.1f} free" if total else "unknown"
    if total and free < LEAST_MEMORY:
        remedy = "close other programs, above all browser windows; two notebooks need 3 GB, most need 1"
        enough = total >= LEAST_MEMORY
        return Finding(
            "memory",
            "note",
            found + (" at the moment" if enough else ": too little for two notebooks"),
            remedy,
        )
    return Finding("memory", "ok", found)


def folders() -> dict[str, Path]:
    """Return the folders that the course writes into."""
    try:
        from shared.data.download import cache_dir

        return {"repository": ROOT, "cache": cache_dir()}
    except Exception:  # its packages are missing
        return {"repository": ROOT}


def check_disk(
    places: Mapping[str, Path] | None = None, free: Callable[[Path], int] | None = None
) -> Finding:
    """There is room, and the folders can be written to."""
    places = folders() if places is None else places
    free = free or (lambda path: shutil.disk_usage(path).free)
    sizes = {}
    for name, folder in places.items():
        # A cache that does not exist yet is made in the first folder above it that does.
        there = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                sizes[name] = free(there)
        except OSError as error:
            remedy = (
                "LLM_CACHE_DIR can name another folder"
                if name == "cache"
                else "clone into a folder of your own"
            )
            return Finding("disk", "problem", f"the {name} cannot be written to: {error.strerror}", remedy)
    found = ", ".join(f"{name} {size / GB:.1f} GB free" for name, size in sizes.items())
    if min(sizes.values()) < LEAST_DISK:
        remedy = f"free {DISK / GB:.1f} GB; pip cache purge is a quick start, LLM_CACHE_DIR moves the cache"
        return Finding("disk", "problem", found, remedy)
    if min(sizes.values()) < DISK:
        return Finding("disk", "note", found, f"enough to run; an installation takes {DISK / GB:.1f} GB")
    return Finding("disk", "ok", found)
