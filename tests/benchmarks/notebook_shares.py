"""Where the time of a notebook goes: matrix products, memory, or many small steps.

    python -m tests.benchmarks.notebook_shares ch05_pretraining/04_precision_memory_and_scaling.ipynb ...

Each notebook is executed once while every operation of torch is counted: the arithmetic of its matrix products, the
bytes of its large tensors (4 MB or more, which no cache of one core holds) and the operation itself. Divided by the
speeds of the reference machine they are seconds; with README's time of the notebook, shares of it. What is left over
is Python, drawing and loading, and goes with the small steps. `shared.doctor.speed.SHARES` is the mean of several.

Not counted: operations outside torch, and what libraries do in threads of their own.
"""

import argparse
import json
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from shared.doctor.speed import REFERENCE, readme_times
from tests.tools import checked_run
from tests.tools.architecture import ROOT

START = """
import torch as _torch
from torch.utils._python_dispatch import TorchDispatchMode as _Mode
from torch.utils._pytree import tree_leaves as _leaves
from torch.utils.flop_counter import flop_registry as _registry

class _Counter(_Mode):
    flops = bytes = operations = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        _Counter.operations += 1
        packet = function._overloadpacket
        if packet in _registry:
            _Counter.flops += _registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet not in (_torch.ops.aten.view, _torch.ops.aten.t, _torch.ops.aten.detach):
            sizes = [t.numel() * t.element_size() for t in _leaves((args, out)) if isinstance(t, _torch.Tensor)]
            _Counter.bytes += sum(size for size in sizes if size >= 4_000_000)
        return out

_counter = _Counter()
_counter.__enter__()
"""
END = "import json\nprint(json.dumps([_Counter.flops, _Counter.bytes, _Counter.operations]))"


def counts(path: Path) -> tuple[int, int, int]:
    """Return the FLOPs of matrix products, the bytes of large tensors and the number of operations of a notebook."""
    notebook = nbformat.read(path, as_version=4)
    # The mode lasts as long as the kernel: each cell runs inside of it.
    notebook.cells = [new_code_cell(START), *notebook.cells, new_code_cell(END)]
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    flops, n_bytes, operations = json.loads(notebook.cells[-1].outputs[0].text)
    return flops, n_bytes, operations


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Say where the time of notebooks goes.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    checked_run.apply()
    times = readme_times((ROOT / "README.md").read_text(encoding="utf-8"))
    total = [0.0, 0.0, 0.0]
    print(f"{'notebook':52} {'seconds':>7} {'products':>9} {'memory':>9} {'the rest':>9} {'operations':>11}")
    for path in parser.parse_args().notebooks:
        path = path.resolve()
        flops, n_bytes, operations = counts(path)
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        products, memory = flops / REFERENCE.float32 / 1e9, n_bytes / REFERENCE.bandwidth / 1e9
        rest = times[name] - products - memory
        print(
            f"{name:52} {times[name]:7} {products:9.1f} {memory:9.1f} {rest:9.1f} {operations:11,}",
            flush=True,
        )
        total = [a + b for a, b in zip(total, (products, memory, rest), strict=True)]
    print("shares of all:", ", ".join(f"{part / sum(total):.2f}" for part in total))


if __name__ == "__main__":
    main()
