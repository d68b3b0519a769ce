"""The layout of the course: the chapter folders in reading order and the floors of `shared/`.

A module of `shared/` may import from its own floor or from a floor above it (earlier in `FLOORS`), never from
one below. `tests/promote.py` takes the names of the modules that notebooks may promote to from here.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

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

FLOORS = (
    ("corpus", "tales", "tale_grammar", "tale_scoring", "dates", "download", "proof", "results", "sweeps"),
    (
        "cleaning",
        "simple_tokenizer",
        "tokenizer",
        "tale_tokenizer",
        "tale_distribution",
        "dataset",
        "rows",
        "text_shards",
    ),
    ("positions", "attention", "layers", "skipgram"),
    ("gpt", "seq2seq", "transformer", "bert", "vit"),
    ("sampling", "decode_step", "generation", "speculation"),
    (
        "optimizers",
        "schedules",
        "planning",
        "training",
        "checkpoint",
        "weights",
        "export",
        "diagnosis",
        "processes",
        "run_log",
        "run_options",
    ),
    (
        "classification",
        "instruction",
        "question_answering",
        "preference",
        "reasoning",
        "lora",
        "adapters",
        "prompt_tuning",
        "distillation",
        "pruning",
        "quantization",
    ),
    ("serving",),
    ("plotting",),
)

# Modules written by hand because they teach nothing; every other module comes out of a notebook.
HAND_WRITTEN = (
    "corpus",
    "tales",
    "tale_grammar",
    "tale_scoring",
    "tale_tokenizer",
    "tale_distribution",
    "download",
    "proof",
    "results",
    "sweeps",
    "rows",
    "text_shards",
    "processes",
    "run_log",
    "run_options",
    "serving",
    "plotting",
)

MODULES = tuple(name for floor in FLOORS for name in floor)


def notebooks(root: Path = ROOT) -> list[Path]:
    """Return the notebooks of the course in reading order."""
    return [path for chapter in CHAPTERS for path in sorted((root / chapter).glob("[0-9][0-9]_*.ipynb"))]
