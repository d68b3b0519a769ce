"""Memory and time to load GPT-2's weights: `load_pretrained` against `transformers` and against loading all at once.

    python -m tests.benchmarks.loading_memory [gpt2-small gpt2-medium ...]

For each size a file of random weights is written to a temporary folder (498 MB to 6.2 GB). Each loader runs in a fresh
process with one thread. From outside, the process's own memory (USS) is read every few milliseconds from the end of
its imports on; the peak is given over the size of the weights. Time is processor time of the loading process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from shared.model.gpt import PRESETS, GPTConfig
from shared.weights.configs import config_to_hf
from shared.weights.files import empty_model
from shared.weights.names import huggingface_views

START = """
import sys, time
import torch
from pathlib import Path
from safetensors.torch import load_file
from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.names import huggingface_views
from shared.weights.pretrained import load_pretrained
folder, name = Path(sys.argv[1]), sys.argv[2]
{imports}
print("ready", flush=True)
sys.stdin.readline()
start = time.process_time()
{program}
print(time.process_time() - start, flush=True)
sys.stdin.readline()
"""
QUIET = "import transformers; transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()"
LOADERS = {
    "load_pretrained": ("", "model = load_pretrained(folder)"),
    "transformers": (
        f"{QUIET}; from transformers import GPT2LMHeadModel",
        "model = GPT2LMHeadModel.from_pretrained(folder)\n"
        "total = sum(parameter.double().sum() for parameter in model.parameters())  # touches what is only mapped",
    ),
    "all at once": (
        "",
        "model = GPTModel(GPTConfig.preset(name))\nstate = load_file(folder / 'model.safetensors')\n"
        "for key, view in huggingface_views(model, 'gpt2').items():\n    view.copy_(state[key])",
    ),
}


def write(name: str, folder: Path) -> int:
    """Write a GPT-2 of random weights in Hugging Face's format; return the size of the weights in bytes."""
    config = GPTConfig.preset(name)
    torch.manual_seed(0)
    views = huggingface_views(empty_model(config), "gpt2")
    tensors = {key: torch.empty(view.shape).uniform_(-0.05, 0.05) for key, view in views.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


def measure(loader: str, name: str, folder: Path) -> tuple[int, int, float]:
    """Return the peak and the final growth of a fresh process's USS in bytes, and its processor time in seconds."""
    imports, program = LOADERS[loader]
    command = [sys.executable, "-c", START.format(imports=imports, program=program), str(folder), name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        process, peak = psutil.Process(child.pid), 0
        before = process.memory_full_info().uss
        child.stdin.write("go\n")
        child.stdin.flush()
        os.set_blocking(child.stdout.fileno(), False)
        while not (line := child.stdout.readline()):
            peak = max(peak, process.memory_full_info().uss - before)
            time.sleep(0.005)
        end = process.memory_full_info().uss - before
        child.stdin.write("end\n")
        child.stdin.flush()
    return max(peak, end), end, float(line)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = [name for name in PRESETS if name.startswith("gpt2")]
    parser.add_argument("names", nargs="*", default=["gpt2-small"], help=f"of {', '.join(sizes)}")
    print(
        f"{'model':12} {'loader':16} {'weights':>9} {'peak / weights':>15} {'end / weights':>14} {'time':>8}"
    )
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            size = write(name, Path(folder))
            for loader in LOADERS:
                peak, end, seconds = measure(loader, name, Path(folder))
                ratios = f"{peak / size:15.2f} {end / size:14.2f}"
                print(f"{name:12} {loader:16} {size / 1e6:6,.0f} MB {ratios} {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
