"""Measure how the loss on tales falls with parameters and tokens; record it in `sweep_scaling.csv`.

    python sweep_scaling.py                              every size with every number of tokens of the record
    python sweep_scaling.py --size 2x64 --tokens 500000  only some

Every run is a whole one, with warm-up and decay (`train_on_tales` in `shared/notebook/tale_runs.py`), on stories seen
once, by Muon with the same rates at every size. A run replaces the row of the same size, tokens and seed. `parameters`
counts the blocks and the last norm, without the embedding, as in Kaplan et al. (2020). One thread is used; on another
processor the last decimals differ.
"""

import argparse
from pathlib import Path

import torch

from shared.model.gpt import GPTConfig
from shared.notebook.records import replace_row
from shared.notebook.tale_runs import Outcome, train_on_tales
from shared.pretraining.processes import cpu_name
from shared.training.optimizers import build_optimizers

RESULTS = Path(__file__).resolve().parent / "sweep_scaling.csv"
BATCH = 8  # stories
TOKENS_PER_STORY = 185  # about
RATE = 0.02  # of Muon's matrices
VECTOR_RATE = 6e-3  # of AdamW for the embedding and the norms, beside Muon
SIZES = {
    "2x32": (2, 32),
    "2x64": (2, 64),
    "3x80": (3, 80),
    "4x96": (4, 96),
    "5x128": (5, 128),
}  # blocks x width
TOKENS = (250_000, 500_000, 1_000_000)
MORE_TOKENS = {
    "2x32": (2_000_000, 4_000_000, 8_000_000),
    "2x64": (2_000_000, 4_000_000),
    "3x80": (2_000_000,),
}
COLUMNS = [
    *("size", "parameters", "all_parameters", "tokens", "seed", "steps", "trained_tokens", "loss_per_story"),
    *("floor", "cpu_seconds", "hardware", "torch"),
]


def config_of(size: str) -> GPTConfig:
    """Return the configuration of a size; heads are 16 wide. ValueError if it is unknown."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    n_layers, emb_dim = SIZES[size]
    return GPTConfig.preset(
        "tales-1m", emb_dim=emb_dim, n_layers=n_layers, n_heads=emb_dim // 16, qk_norm=True
    )


def run(size: str, tokens: int, seed: int = 0) -> Outcome:
    """Train one size on about that many tokens and evaluate it."""
    n_steps = round(tokens / TOKENS_PER_STORY / BATCH)
    build = lambda model: build_optimizers(model, "muon", VECTOR_RATE, matrix_learning_rate=RATE)
    return train_on_tales(config_of(size), seed, n_steps, BATCH, build)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: those of the record")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.size:
        for tokens in options.tokens or (*TOKENS, *MORE_TOKENS.get(size, ())):
            done = run(size, tokens, options.seed)
            whole = done.model.n_parameters
            row = {
                "size": size,
                "parameters": whole - done.model.token_embedding.weight.numel(),
                "all_parameters": whole,
                "tokens": tokens,
                "seed": options.seed,
                "steps": len(done.losses),
                "trained_tokens": done.tokens,
                "loss_per_story": round(done.loss_per_story, 4),
                "floor": round(done.floor, 4),
                "cpu_seconds": round(done.cpu_seconds, 1),
                "hardware": f"{cpu_name()}, 1 thread",
                "torch": torch.__version__,
            }
            replace_row(RESULTS, COLUMNS, row, ("size", "tokens", "seed"))
            print(
                f"{size} {tokens}: {row['loss_per_story']} of {row['floor']}, {row['cpu_seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
