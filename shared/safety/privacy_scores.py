"""How well personal data is found: findings counted against labels.

Explained and proven in deployment/06_privacy.ipynb; written from there by `make promote`.
"""

from collections.abc import Callable, Iterable, Sequence

from shared.safety.privacy import Finding


def count_findings(
    lines: Sequence[tuple[str, Sequence[tuple[int, int, str]]]], find: Callable[[str], Iterable[Finding]]
) -> dict[str, tuple[int, int, int]]:
    """Count, for each kind and for "all", the findings that are right, all findings, and all that was to be found.

    Right is what has exactly the place and the kind of a label: precision is the first number by the second, recall
    the first by the third.

    Args:
        lines: Texts, each with its labels (start, end, kind).
        find: Called with a text.
    """
    counts: dict[str, list[int]] = {}
    for text, labels in lines:
        wanted = {Finding(*label) for label in labels}
        found = set(find(text))
        for place, group in enumerate((wanted & found, found, wanted)):
            for finding in group:
                for kind in (finding.kind, "all"):
                    counts.setdefault(kind, [0, 0, 0])[place] += 1
    return {kind: (right, found, wanted) for kind, (right, found, wanted) in sorted(counts.items())}
