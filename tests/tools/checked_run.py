"""The surroundings in which notebooks are executed and compared: environment variables, and the order of sums."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # nbval is not installed where notebooks are only run
    from nbval.kernel import RunningKernel

ORDER_OF_SUMS = "OTHER_PROCESSOR"  # the variable that holds the seed of `other_processor.install`
DEFAULT_SEED = 1

CHECKED_RUN = {
    # One thread a notebook: two busy-waiting thread pools on a busy machine run many times slower than one thread.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "LLM_DEVICE": "cpu",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}

# Runs inside the kernel and leaves no name behind that a notebook could lean on by mistake.
START = """
def _start(path, seed):
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("other_processor", path)
    module = sys.modules["other_processor"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install(seed)
_start({path!r}, {seed})
del _start
"""


def environment() -> dict[str, str]:
    """Return the variables of this process, with those of a checked run where the user has set none.

    Who tells torch that the processor has only AVX2 (ATEN_CPU_CAPABILITY) tells oneDNN, too: it looks for itself, and
    where it finds more, torch refuses bfloat16 products that it handles on a real AVX2 processor.
    """
    found = {**CHECKED_RUN, **os.environ}
    if found.get("ATEN_CPU_CAPABILITY") == "avx2":
        found.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    return found


def apply() -> None:
    """Set the variables of a checked run in this process, for the processes it starts."""
    os.environ.update(environment())


def seed_of_sums() -> int:
    """Return the seed that OTHER_PROCESSOR holds, by default 1; 0 stands for torch's own order.

    Raises:
        ValueError: The variable holds something other than a whole number from 0 on.
    """
    text = os.environ.get(ORDER_OF_SUMS, str(DEFAULT_SEED)).strip()
    if not text.isdecimal():
        raise ValueError(f"{ORDER_OF_SUMS} must be a whole number, 0 for torch's own order, got {text!r}")
    return int(text)


def reorder_sums(kernel: RunningKernel) -> None:
    """Install `other_processor` in a kernel that nbval has just started.

    Raises:
        RuntimeError: The kernel could not do it.
    """
    path = Path(__file__).with_name("other_processor.py")
    code = START.format(path=str(path), seed=seed_of_sums())
    reply = kernel.kc.execute(code, silent=True, store_history=False, reply=True, timeout=120)
    if reply["content"]["status"] != "ok":
        raise RuntimeError(f"other_processor was not installed: {reply['content'].get('evalue')}")
    kernel.await_idle(reply["parent_header"]["msg_id"], timeout=120)
