"""The log of a training run: `log.csv` (a row a step), `evaluation.csv`, and the same for TensorBoard; `data.json`.

A run that goes on from a checkpoint cuts its log back to that step and writes the rest anew, so that the files of an
interrupted run equal those of an unbroken one. Floats are written with all their digits. `data.json` says how many of
the tokens are used.

Left out: figures of the machine, such as memory.
"""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from shared.pretraining.rows import Usage

COLUMNS = {
    "log.csv": ("step", "loss", "learning_rate", "grad_norm", "tokens", "cpu_seconds"),
    "evaluation.csv": (
        "step",
        "tokens",
        "cpu_seconds",
        "loss",
        "bits_per_byte",
        "loss_per_document",
        "percent_above_floor",
    ),
}


def lock_folder(folder: Path) -> TextIO:
    """Return a file that no other process can lock until it is closed, at the latest when this process ends.

    Raises:
        BlockingIOError: Another run uses the folder. A `torchrun` that is killed may leave its processes running.
        ValueError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be written, got {folder} ({error.strerror})"
        ) from error
    if os.name == "posix":  # Windows has no lock of this kind
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BlockingIOError(f"{folder} is in use by another run") from None
    return file


def write_usage(folder: Path, usage: Mapping[str, Usage]) -> None:
    """Write `data.json`: for each side what its rows are, and how many tokens are used and lost where."""
    content = {side: asdict(each) | {"used": each.used} for side, each in usage.items()}
    (folder / "data.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


class RunLog:
    """The files of one run, opened for what comes after `last_step`.

    Args:
        folder: Of the run; it is created if needed.
        last_step: Rows of later steps are dropped.
        tensorboard: Whether to write `tensorboard/` too.
    """

    def __init__(self, folder: Path, last_step: int, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files, self.writers = {}, {}
        for name, columns in COLUMNS.items():
            path = folder / name
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.exists() else []
            # A killed process may have left half a line.
            kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= last_step]
            part = path.with_suffix(".part")
            part.write_text(",".join(columns) + "\n" + "".join(kept), encoding="utf-8", newline="\n")
            os.replace(part, path)
            self.files[name] = path.open("a", encoding="utf-8", newline="")
            self.writers[name] = csv.DictWriter(self.files[name], columns, restval="", lineterminator="\n")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1)

    def training(self, row: dict[str, float]) -> None:
        """Append the row of one training step."""
        self._write("log.csv", "train", row)

    def evaluation(self, row: dict[str, float]) -> None:
        """Append the row of one evaluation."""
        self._write("evaluation.csv", "validation", row)

    def _write(self, file: str, group: str, row: dict[str, float]) -> None:
        self.writers[file].writerow(row)
        if self.board is None:
            return
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(f"{group}/{name}", value, row["step"])

    def to_disk(self) -> None:
        """Bring all rows to the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.board:
            self.board.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()
        if self.board:
            self.board.close()
