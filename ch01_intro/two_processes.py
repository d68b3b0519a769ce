"""One of several processes that share a batch: each takes its part, and the gradients meet in their mean.

    python two_processes.py RANK N_PROCESSES FOLDER

FOLDER holds `start.safetensors`: the weights of the digit network, pictures and labels. Each process leaves its
gradients there, as `gradients-RANK.safetensors`; after the mean has been taken, they are the same in all of them. The
processes find each other through a file in the same folder and talk through gloo, so no GPU and no fixed port is
needed. `03_pytorch_primer.ipynb` starts two of these and compares.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


def main(rank: int, n_processes: int, folder: Path) -> None:
    """Compute the gradients of this process's part of the batch, and share them."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "meeting"), n_processes)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=n_processes, timeout=patience)

    # Every process has the same model and, of the batch, every n-th picture from its own number on.
    start = load_file(folder / "start.safetensors")
    pictures, labels = (start.pop(name)[rank::n_processes] for name in ("pictures", "labels"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model.load_state_dict(start)
    F.cross_entropy(model(pictures), labels).backward()

    # The sum over all processes takes the place of each gradient; divided by their number, it is the mean.
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= n_processes

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    save_file(gradients, folder / f"gradients-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # All files are closed. Ending at once spares us threads of gloo that now and then abort a process which is
    # already shutting down, after its work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
