"""Which text files a training run reads: those that are named, and those of a folder whose name fits a pattern.

Left out: what is in them (`shared.pretraining.stretches` and `shards`), and files that are compressed.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath


def find_text_files(paths: Sequence[str | os.PathLike], pattern: str = "*.txt") -> list[Path]:
    """Return the files among `paths`, and those below its folders whose name fits `pattern`, sorted within each.

    Capitals count as small letters. In folders, names that begin with a dot are passed over (copies that editors keep,
    .ipynb_checkpoints, what macOS writes beside each file), and links to folders are not followed. A file that is
    found twice counts once, where it is found first.

    Raises:
        ValueError: A path is neither file nor folder, a folder has no such file, or something cannot be read.
    """
    found: dict[Path, Path] = {}  # what a path leads to, and the path
    for path in map(Path, paths):
        for file in _files_below(path, pattern) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    for path in found.values():
        try:
            if path.exists() and not path.is_file():  # to open a pipe would wait for ever
                raise ValueError(f"{path} is neither a text file nor a folder")
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return list(found.values())


def _files_below(folder: Path, pattern: str) -> list[Path]:
    """Return the files below a folder whose name fits; ValueError if there is none, or a folder cannot be read."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    fitting: list[Path] = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if PurePath(str(path.relative_to(folder)).lower()).match(pattern.lower()):
                if path.is_file():
                    fitting.append(path)
            else:
                others[path.suffix or path.name] += 1
    if not fitting:
        beside = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) or "nothing else"
        raise ValueError(f"{folder} holds no file that fits {pattern!r} (it holds {beside}): see --pattern")
    return sorted(fitting)
