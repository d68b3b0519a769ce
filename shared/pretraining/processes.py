"""The processes of a training run: who am I, sums over all of them, work that only the first does, sharded tensors.

Left out: several machines with folders of their own (all processes must see the same files), restarts (`torchrun`).
"""

import datetime
import os
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shared.model.gpt import GPTModel
from shared.training.losses import choose_device

T = TypeVar("T")


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Processes:
    """This process among those that `torchrun` started, or alone.

    Args:
        device: "cpu", "cuda" (the process's own, by LOCAL_RANK), "mps", or "auto": what `choose_device` finds,
            except that several processes do not share "mps" but use the CPU.
        threads: CPU threads of a process; 0: torch decides.

    Attributes:
        rank, world_size: Number of this process, and how many there are.
        device: Its device.

    Raises:
        ValueError: This machine has no such device, or several processes cannot share it.
    """

    def __init__(self, device: str = "auto", threads: int = 0) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        chosen = choose_device(device)
        kind = chosen.type
        if kind == "mps" and self.world_size > 1 and device == "auto":
            kind = "cpu"
        if kind == "mps" and self.world_size > 1:
            raise ValueError(f"device must be cpu or cuda for {self.world_size} processes, got mps")

        # Each process has a GPU of its own, on which equal sums are taken in equal order.
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
            # Otherwise equal sums are taken in another order each time, and a continued run drifts away.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            # torch makes this name at run time only, so no type checker finds it.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.device = torch.device(kind)
        if threads:
            torch.set_num_threads(threads)

        # From here on the processes know each other.
        if self.world_size > 1:
            patience = datetime.timedelta(hours=6)  # the others wait for the first to tokenize
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=patience)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, float64 on the CPU."""
        values = values.cpu().double()  # in this order: not every device has float64
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Return `work()` in the first process, None in the others. Where it fails, all of them stop."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as caught:
                error = caught
        if self.total(torch.tensor([error is not None])):
            raise error or SystemExit(1)
        return result

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.rank == 0:
            print(text, flush=True)

    def parallelize(self, model: GPTModel, parallel: str) -> nn.Module:
        """Return what to call in the place of `model` for training; `model` itself where this process is alone.

        Args:
            model: On its device.
            parallel: "ddp" (a copy in each process) or "fsdp" (each holds a part of every parameter; in place).
        """
        if self.world_size == 1:
            return model
        if parallel == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def end_this_process() -> None:
    """End this process with status 0, at once if it is one of many: its files must be closed by now.

    While Python shuts down in the usual way, threads of gloo may still let go of tensors, which now and then aborts
    the process ("terminate called without an active exception"), and torchrun takes a finished run for a failed one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def share_gradients(model: nn.Module, last: bool) -> AbstractContextManager:
    """Return a context for a backward pass: the gradients of all processes meet in the last part of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif not last and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def whole(value: T) -> T:
    """Return a sharded tensor gathered from all processes, anything else as it is."""
    # The Tensor that a DTensor, itself one, stands for.
    return cast(T, value.full_tensor()) if isinstance(value, DTensor) else value


def shard_like(value: T, model: Tensor | None) -> T:
    """Return `value` sharded as `model` is, where it has its shape."""
    if isinstance(model, DTensor) and isinstance(value, Tensor) and value.shape == model.shape:
        whole_value = value.to(model.device)
        sharded = distribute_tensor(whole_value, model.device_mesh, model.placements, src_data_rank=None)
        return cast(T, sharded)  # a DTensor is a Tensor
    return value


def hardware(processes: Processes) -> str:
    """Name processor, processes, threads and torch's version."""
    name = torch.cuda.get_device_name() if processes.device.type == "cuda" else cpu_name()
    return f"{name}, processes {processes.world_size}, threads {torch.get_num_threads()}, torch {torch.__version__}"
