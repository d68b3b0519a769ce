"""`shared/doctor/machine.py`: processor, threads, graphics card, memory and disk, with readings of every kind."""

import os
from pathlib import Path

import psutil
import pytest

from shared.doctor import machine

FACTS = {"version": "2.13.0", "capability": "AVX2", "bf16": [], "threads": 2, "cuda": "", "mps": False}


def test_processors():
    assert machine.check_processor(FACTS, "x86_64").found == "x86_64, AVX2, no bfloat16 of its own"
    assert machine.check_processor({**FACTS, "bf16": ["avx512_bf16"]}, "x86_64").found.endswith("avx512_bf16")
    old = machine.check_processor({**FACTS, "capability": "DEFAULT"}, "AMD64")
    assert old.status == "note" and "ATEN_CPU_CAPABILITY" in old.remedy
    assert machine.check_processor({**FACTS, "capability": "DEFAULT"}, "arm64").status == "ok"
    assert machine.check_processor({"error": "ImportError"}).status == "note"


def test_threads():
    assert machine.check_threads(FACTS, 2).status == "ok"
    assert machine.check_threads({}, 2).status == "ok"
    many = machine.check_threads({**FACTS, "threads": 16}, 2, "Windows")
    assert many.status == "note" and many.remedy.endswith("$env:OMP_NUM_THREADS = '2'")
    assert machine.check_threads({**FACTS, "threads": 16}, 2, "Linux").remedy.endswith(
        "export OMP_NUM_THREADS=2"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 8),
        ("nonsense", 8),
        (None, 8),
        ("900000 100000", 8),
    ],
)
def test_a_container_may_allow_fewer_cpus(tmp_path, monkeypatch, content, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    if content:
        (tmp_path / "cpu.max").write_text(content, encoding="utf-8")
    assert machine.usable_cpus(tmp_path) == expected


def test_cpus_without_an_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cpus(tmp_path) == 1


def test_graphics_cards():
    assert machine.check_accelerator(FACTS, False).status == "ok"
    assert machine.check_accelerator({**FACTS, "mps": True}, False).found == "Apple GPU (MPS)"
    card = {**FACTS, "cuda": "NVIDIA H200", "cuda_memory": 139_000_000_000}
    assert machine.check_accelerator(card, True).found == "NVIDIA H200, 139 GB"
    unused = machine.check_accelerator(FACTS, True)
    assert unused.status == "note" and "--index-url" in unused.remedy
    assert machine.check_accelerator({"error": "x"}, True).status == "ok"


def test_memory():
    assert machine.check_memory((16_000_000_000, 8_000_000_000)).found == "16.0 GB, 8.0 free"
    assert machine.check_memory((8_000_000_000, 2_000_000_000)).found.endswith("at the moment")
    assert machine.check_memory((2_000_000_000, 1_000_000_000)).status == "note"
    assert machine.check_memory((0, 0)).found == "unknown"


def test_memory_is_what_psutil_says_or_what_a_container_allows(tmp_path):
    assert machine.memory(tmp_path)[0] == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("1000000000", encoding="utf-8")
    (tmp_path / "memory.current").write_text("400000000", encoding="utf-8")
    assert machine.memory(tmp_path) == (1_000_000_000, 600_000_000)
    (tmp_path / "memory.max").write_text("max", encoding="utf-8")
    assert machine.memory(tmp_path)[0] == psutil.virtual_memory().total


def test_memory_without_psutil(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: 1 / 0)
    total, free = machine.memory(tmp_path)
    assert (total > 0) == hasattr(os, "sysconf") and free == total


def test_disk(tmp_path):
    places = {"repository": tmp_path, "cache": tmp_path / "not" / "yet" / "there"}
    free = lambda path: 10 * 10**9
    assert machine.check_disk(places, free).found == "repository 10.0 GB free, cache 10.0 GB free"
    assert machine.check_disk(places, lambda path: 10**9).status == "note"
    full = machine.check_disk(places, lambda path: 10**8)
    assert full.status == "problem" and "pip cache purge" in full.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    finding = machine.check_disk({"cache": tmp_path})
    assert finding.found == "the cache cannot be written to: Permission denied"
    assert finding.status == "problem" and "LLM_CACHE_DIR" in finding.remedy


def test_this_machine_has_a_repository_and_a_cache():
    assert list(machine.folders()) == ["repository", "cache"]
