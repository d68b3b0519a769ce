"""The checks of the doctor in four groups, run one after the other; none can stop the others.

Left out: what is printed (`findings.report`) and the command line.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping  # noqa: UP035 (an old Python has to get past here)

from shared.doctor import files, machine, network, software
from shared.doctor.findings import Finding

GROUPS: dict[str, list[Callable[[Mapping[str, Any], bool], Finding]]] = {
    "software": [
        lambda facts, full: software.check_python(),
        lambda facts, full: software.check_environment(),
        lambda facts, full: software.check_packages(),
        lambda facts, full: software.check_course(),
        lambda facts, full: software.check_torch(facts),
    ],
    "machine": [
        lambda facts, full: machine.check_processor(facts),
        lambda facts, full: machine.check_threads(facts),
        lambda facts, full: machine.check_accelerator(facts),
        lambda facts, full: machine.check_memory(),
        lambda facts, full: machine.check_disk(),
    ],
    "files": [
        lambda facts, full: files.check_kernel(),
        lambda facts, full: files.check_data(),
        lambda facts, full: files.check_models(full),
        lambda facts, full: files.check_tokenizer(),
    ],
    "network": [lambda facts, full: network.check_network()],
}


def examine(*groups: str, full: bool = False) -> list[Finding]:
    """Return the findings of some groups, or of all; a check that fails itself becomes a note.

    Args:
        groups: Names in `GROUPS`.
        full: Also compute the checksums of the model packages.

    Raises:
        ValueError: A group is unknown.
    """
    if wrong := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"groups must be of {', '.join(GROUPS)}, got {', '.join(wrong)}")
    groups = groups or tuple(GROUPS)
    facts = software.torch_facts() if {"software", "machine"} & set(groups) else {}
    findings = []
    for group in groups:
        for check in GROUPS[group]:
            try:
                findings.append(check(facts, full))
            except Exception as error:  # the others shall still run
                why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                findings.append(Finding(group, "note", f"a check failed itself: {why}", "please report it"))
    return findings
