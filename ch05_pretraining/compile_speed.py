"""Measure a training step of one thread with and without `torch.compile`; record it in `compile_speed.csv`.

    python compile_speed.py

Both kinds take turns on the same batch, and their losses must agree. Compiling needs a C++ compiler. Its time is
counted in processor seconds of this process and its children.
"""

import os
import resource
import time
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.records import replace_row
from shared.notebook.tale_runs import story_rows
from shared.pretraining.processes import cpu_name
from shared.training.batches import pad_rows
from shared.training.losses import next_token_loss
from shared.training.optimizers import build_optimizers

OUTPUT = Path(__file__).resolve().parent / "compile_speed.csv"
SIZES = {"2 blocks of 64": (2, 64, 4), "4 blocks of 128": (4, 128, 4)}
ROUNDS = 8
COLUMNS = ["model", "kind", "first_step_seconds", "ms_per_step", "speedup", "hardware", "torch"]


def cpu_seconds() -> float:
    """Return the processor time of this process and its finished children."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def mean_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of a step, in nats per token."""
    return next_token_loss(model(inputs), targets)


def main() -> None:
    """Measure every size and write the record."""
    torch.set_num_threads(1)
    batch = pad_rows(story_rows(1, 8)[0])
    for name, (n_layers, emb_dim, n_heads) in SIZES.items():
        config = GPTConfig.preset("tales-1m", n_layers=n_layers, emb_dim=emb_dim, n_heads=n_heads)
        steps, first, losses = {}, {}, {}
        for kind in ("eager", "compiled"):
            torch.manual_seed(0)
            model = GPTModel(config)
            optimizers = build_optimizers(model, "adamw", 1e-3)
            loss_of = torch.compile(mean_loss) if kind == "compiled" else mean_loss

            def step(model=model, optimizers=optimizers, loss_of=loss_of) -> float:
                loss = loss_of(model, *batch)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                return loss.item()

            started = cpu_seconds()
            losses[kind] = [step()]
            first[kind], steps[kind] = cpu_seconds() - started, step
        seconds = {kind: [] for kind in steps}
        for _ in range(ROUNDS):
            for kind, step in steps.items():
                started = time.process_time()
                losses[kind].append(step())
                seconds[kind].append(time.process_time() - started)
        np.testing.assert_allclose(losses["compiled"], losses["eager"], rtol=1e-3)
        medians = {kind: float(np.median(values)) for kind, values in seconds.items()}
        for kind, median in medians.items():
            row = {"model": name, "kind": kind, "first_step_seconds": round(first[kind], 1)}
            row |= {"ms_per_step": round(1000 * median, 1), "speedup": round(medians["eager"] / median, 2)}
            row |= {"hardware": f"{cpu_name()}, 1 thread", "torch": torch.__version__}
            replace_row(OUTPUT, COLUMNS, row, ("model", "kind"))
            print(row, flush=True)


if __name__ == "__main__":
    main()
