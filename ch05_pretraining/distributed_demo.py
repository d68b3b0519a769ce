"""Train a small GPT as several processes with DDP and with FSDP2, and report losses, memory and traffic as JSON.

    torchrun --standalone --nproc-per-node 2 distributed_demo.py --output result.json

The processes talk through gloo, so no GPU is needed. All of them start from the same weights and share each batch: rank
r takes rows r, r + n, r + 2n, ... The losses must be those of `train_alone`, which is one process with the whole batch.
Bytes of weights, gradients and optimizer states are counted on every rank, and so is what is sent.
"""

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from shared.model.gpt import GPTConfig, GPTModel
from shared.pretraining.processes import end_this_process
from shared.training.optimizers import build_optimizers

CONFIG = GPTConfig.preset("tales-1m", emb_dim=64, n_layers=2, vocab_size=512, context_length=64)
N_STEPS, N_ROWS, N_TOKENS = 20, 8, 32
LEARNING_RATE = 3e-3


def new_model() -> GPTModel:
    """Return the model with the same first weights in every process."""
    torch.manual_seed(0)
    return GPTModel(CONFIG)


def batch_of(step: int) -> Tensor:
    """Return the ids of a step, int64 (N_ROWS, N_TOKENS + 1): each row counts on from a random start."""
    start = torch.randint(CONFIG.vocab_size, (N_ROWS, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(N_TOKENS + 1)) % CONFIG.vocab_size


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean loss of the next tokens, in nats."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, optimizers: list, rank: int = 0, n_ranks: int = 1) -> list[float]:
    """Train on this rank's rows; return the loss of the whole batch at each step."""
    losses = []
    for step in range(N_STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, batch_of(step)[rank::n_ranks])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        mean = loss.detach().clone()
        if n_ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / n_ranks)
    return losses


def train_alone(name: str = "adamw") -> list[float]:
    """Return the losses of one process that sees the whole batch."""
    model = new_model()
    return train(model, build_optimizers(model, name, LEARNING_RATE))


def local_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes that this process holds of `tensors`, each storage as far as it is used."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def memory(model: nn.Module, optimizers: list) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer states on this rank, step counters left out."""
    parameters = list(model.parameters())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    averages = [value for state in states for value in state.values() if value.dim()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    counted = {"weights": parameters, "gradients": gradients, "optimizer": averages}
    return {name: local_bytes(tensors) for name, tensors in counted.items()}


class Traffic(TorchDispatchMode):
    """Counts the bytes of the whole buffers that are gathered and scattered while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"gathered": 0, "scattered": 0}

    def __torch_dispatch__(
        self, function: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        name = function._schema.name
        if name == "c10d::_allgather_base_":
            self.counts["gathered"] += args[0].nbytes  # what all ranks have together
        elif name == "c10d::_reduce_scatter_base_":
            self.counts["scattered"] += args[1].nbytes
        return function(*args, **(kwargs or {}))


def run_ddp(rank: int, n_ranks: int) -> dict[str, object]:
    """Train with DistributedDataParallel: whole model on every rank, gradients averaged."""
    model = DistributedDataParallel(new_model())
    optimizers = build_optimizers(model.module, "adamw", LEARNING_RATE)
    traffic = {"reduced": 0}

    def average(state: dict[str, int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP does anyway, with the bytes counted."""
        state["reduced"] += bucket.buffer().nbytes
        bucket.buffer().div_(n_ranks)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(traffic, average)
    losses = train(model, optimizers, rank, n_ranks)
    return {"losses": losses, "memory": memory(model, optimizers), "bytes_per_step": per_step(traffic)}


def run_fsdp(rank: int, n_ranks: int) -> dict[str, object]:
    """Train with FSDP2: every parameter is cut by rows, each block is gathered while it works."""
    model, mesh = new_model(), init_device_mesh("cpu", (n_ranks,))
    before = local_bytes(list(model.parameters()))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = build_optimizers(model, "adamw", LEARNING_RATE)
    with Traffic() as traffic:
        losses = train(model, optimizers, rank, n_ranks)
    found = {"weights_before": before, **memory(model, optimizers)}
    return {"losses": losses, "memory": found, "bytes_per_step": per_step(traffic.counts)}


def per_step(traffic: dict[str, int]) -> dict[str, int]:
    """Return bytes per step."""
    return {name: n_bytes // N_STEPS for name, n_bytes in traffic.items()}


def main() -> None:
    """Run the command line on every rank; rank 0 writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file that rank 0 writes")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --standalone --nproc-per-node 2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    result = {}
    for name, run in (("ddp", run_ddp), ("fsdp", run_fsdp)):
        own = run(rank, n_ranks)
        gathered = [None] * n_ranks
        dist.all_gather_object(gathered, own["memory"])
        result[name] = {**own, "memory": gathered}
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        temporary = options.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, options.output)


if __name__ == "__main__":
    main()
    end_this_process()
