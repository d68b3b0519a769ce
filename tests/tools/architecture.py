"""The layout of the course: the chapter folders in reading order, and the rooms of `shared/`.

A room is wholly promoted from notebooks or wholly written by hand. A module may import from its own room and from rooms
before it, never from one after it; nothing but notebooks and scripts imports from `notebook`.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CHAPTERS = (
    "ch01_intro",
    "ch02_text_data",
    "ch03_attention",
    "ch04_gpt",
    "ch05_pretraining",
    "ch06_classification",
    "ch07_instruction",
    "appendix_lora",
    "appendix_vit_bert",
    "deployment",
)

# The rooms in the order of imports; True: promoted from notebooks.
ROOMS = {
    "data": False,
    "text": True,
    "model": True,
    "tales": False,
    "generation": True,
    "weights": True,
    "training": True,
    "pretraining": False,
    "finetuning": True,
    "compression": True,
    "safety": True,
    "serving": False,
    "doctor": False,
    "notebook": False,
}
PROMOTED_ROOMS = tuple(room for room, promoted in ROOMS.items() if promoted)

# The modules outside every room: earlier than all of them.
FIRST_MODULES = ("checks",)


def notebooks(root: Path = ROOT) -> list[Path]:
    """Return the notebooks of the course in reading order."""
    return [path for chapter in CHAPTERS for path in sorted((root / chapter).glob("[0-9][0-9]_*.ipynb"))]


def modules(room: str, root: Path = ROOT) -> list[Path]:
    """Return the modules of a room, without its face `__init__.py`."""
    return sorted(path for path in (root / "shared" / room).glob("*.py") if path.stem != "__init__")
