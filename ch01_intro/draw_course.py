"""Draw the map of the course that the README shows.

python ch01_intro/draw_course.py        writes ch01_intro/course.svg
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from shared.notebook.plotting import BLUE, GRAY, GREEN, ORANGE, PURPLE

STAGES = (
    ("2  Text", "clean, tokenize,\nsample, embed", "tiktoken, tokenizers,\nftfy", BLUE),
    (
        "3  Attention",
        "seq2seq, self-attention,\nthe Transformer",
        "nn.MultiheadAttention,\nnn.Transformer",
        BLUE,
    ),
    ("4  GPT", "blocks, generation\nengine, variants", "transformers: GPT-2,\nLlama, Mixtral", GREEN),
    (
        "5  Pretraining",
        "loop, decoding, scale,\na real model",
        "entropy of the text,\ntransformers, llama.cpp",
        GREEN,
    ),
    ("6, 7  Fine-tuning", "classify, follow\ninstructions, LoRA", "PEFT, scikit-learn\nbaselines", ORANGE),
    ("Deployment", "compress, export,\nserve, judge risks", "ONNX Runtime,\nllama.cpp's format", PURPLE),
)
WIDTH, GAP = 1.95, 0.35


def draw(path: Path) -> None:
    """Write the map as an SVG that is the same on every machine."""
    plt.rcParams.update({"svg.hashsalt": "course", "font.family": "DejaVu Sans"})
    total = len(STAGES) * (WIDTH + GAP) + GAP
    figure, axes = plt.subplots(figsize=(total, 3.0))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set_axis_off()
    axes.set_xlim(0, total)
    axes.set_ylim(0, 3.0)
    for position, (name, built, proof, color) in enumerate(STAGES):
        left = GAP + position * (WIDTH + GAP)
        center = left + WIDTH / 2
        for bottom, height, fill in ((1.45, 1.3, color), (0.2, 0.85, GRAY)):
            box = FancyBboxPatch((left, bottom), WIDTH, height, boxstyle="round,pad=0.03", facecolor=fill)
            box.set(alpha=0.16, edgecolor="none")
            axes.add_patch(box)
        axes.text(center, 2.48, name, ha="center", va="center", weight="bold", fontsize=12)
        axes.text(center, 1.93, built, ha="center", va="center", fontsize=10.5)
        axes.text(center, 0.85, "proven against", ha="center", va="center", fontsize=8.5, color=GRAY)
        axes.text(center, 0.5, proof, ha="center", va="center", fontsize=9.5)
        if position:
            arrow = FancyArrowPatch(
                (left - GAP - 0.02, 2.1),
                (left + 0.02, 2.1),
                arrowstyle="-|>",
                mutation_scale=13,
                color="black",
            )
            axes.add_patch(arrow)
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("course.svg"))
