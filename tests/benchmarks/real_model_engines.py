"""The engines that `real_model_speed` compares, each in a process of its own: it is asked in lines of JSON.

    echo '["bandwidth", {}]' | python -m tests.benchmarks.real_model_engines '["machine", "float32", 1]'

The argument says worker, precision and threads; OMP_NUM_THREADS must be the same number. A question is a task of the
worker and its arguments, the answer what the task returns.
"""

import importlib.metadata
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import choose
from shared.data.models import model_file
from shared.generation.engine import generate
from shared.weights.pretrained import load_pretrained

MODEL = "smollm2-135m-instruct"
Texts = list[list[int]]
Write = Callable[
    [Texts, int], tuple[float, Texts]
]  # prompts, new tokens -> seconds from first to last, new ids


class Clock:
    """A logits processor that changes nothing and notes when it was called; it is called before every choice."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return logits

    def seconds(self) -> float:
        """Return the time from the first choice to the last."""
        return self.times[-1] - self.times[0]


def our_writer(model: nn.Module) -> Write:
    """Return a function that writes with our engine, as a reader of the course calls it."""

    def write(prompts: Texts, n: int) -> tuple[float, Texts]:
        clock = Clock()
        written = generate(model, prompts, n, processors=[clock])
        return clock.seconds(), written

    return write


def their_writer(model: nn.Module) -> Write:
    """Return a function that writes with a transformers model's own `generate`, and does not stop at an end of text."""
    model.generation_config.eos_token_id = None

    def write(prompts: Texts, n: int) -> tuple[float, Texts]:
        ids, clock = torch.tensor(prompts), Clock()
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[clock],
        )
        return clock.seconds(), written[:, ids.shape[1] :].tolist()

    return write


def llama_writer(path: Path, threads: int) -> Write:
    """Return a function that writes with llama.cpp's server: a slot for each prompt, all prompts in one request."""
    import xllamacpp

    servers = {}

    def server(n_prompts: int, prompt_tokens: int, n: int) -> xllamacpp.Server:
        room = -(-(prompt_tokens + n) // 256) * 256  # llama.cpp's caches grow by 256 tokens
        if (n_prompts, room) not in servers:
            parameters = xllamacpp.CommonParams()
            parameters.model.path, parameters.warmup = str(path), False
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
            parameters.n_parallel, parameters.n_ctx = n_prompts, n_prompts * room
            # All prompts fit into one batch, so that all slots begin to write together.
            parameters.n_batch = max(parameters.n_batch, n_prompts * prompt_tokens)
            parameters.cache_ram_mib = 0
            servers[n_prompts, room] = xllamacpp.Server(parameters)
        return servers[n_prompts, room]

    def write(prompts: Texts, n: int) -> tuple[float, Texts]:
        # Without samplers but the temperature the choice costs llama.cpp the least; the prompt is read every time.
        asked = {"prompt": prompts, "n_predict": n, "temperature": 0, "samplers": ["temperature"]}
        asked |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        address = server(len(prompts), len(prompts[0]), n).listening_address + "/completion"
        with urllib.request.urlopen(address, json.dumps(asked).encode()) as answer:
            slots = json.load(answer)
        slots = sorted(slots if isinstance(slots, list) else [slots], key=lambda slot: slot["index"])
        milliseconds = max(slot["timings"]["predicted_ms"] for slot in slots)
        return milliseconds / 1000, [slot["tokens"] for slot in slots]

    return write


def best_seconds(run: Callable[[], object], times: int = 3) -> float:
    """Return the seconds of the fastest of some runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def products(model: nn.Module, batch: int) -> float:
    """Return the tokens per second of the model's matrix products alone, each with `batch` rows of inputs."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = {w.shape[1]: torch.randn(batch, w.shape[1]).to(w.dtype) for w in weights}
    with torch.inference_mode():
        return batch / best_seconds(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights])


def logit_gap(model: nn.Module, ids: list[int], token: int) -> float:
    """Return by how much the logit of `token` after `ids` is below the best one."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), last_only=True)[0, -1]
    return (logits.max() - logits[token]).item()


def bandwidth(n_bytes: int = 2**29) -> float:
    """Return GB/s of reading float32 numbers, by the faster of two ways."""
    n_columns = 2**13
    matrix, vector = torch.ones(n_bytes // 4 // n_columns, n_columns), torch.ones(n_columns)
    fastest = min(best_seconds(matrix.sum), best_seconds(lambda: matrix @ vector))
    return matrix.nbytes / fastest / 1e9


def peak(precision: str, size: int = 2048) -> float:
    """Return the GFLOP/s of a product of two square matrices."""
    matrix = torch.randn(size, size).to(getattr(torch, precision))
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix) / 1e9


def our_tasks(precision: str, threads: int) -> dict[str, Any]:
    """Load our model; return what can be asked."""
    model = load_pretrained(MODEL, dtype=getattr(torch, precision))
    return {
        "program": f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "write": our_writer(model),
        "gap": lambda ids, token: logit_gap(model, ids, token),
        "products": lambda batch: products(model, batch),
    }


def their_tasks(precision: str, threads: int) -> dict[str, Any]:
    """Load the same file with transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    path = model_file(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, precision)
    ).eval()
    program = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"program": program, "write": their_writer(model)}


def llama_tasks(precision: str, threads: int) -> dict[str, Any]:
    """Prepare llama.cpp; the program says which instructions it was built for."""
    import xllamacpp

    known = ("AVX512_VNNI", "AVX512", "AVX2", "NEON")
    features = xllamacpp.get_system_info().split()
    built = next((name for name in known if name in features), "unknown instructions")
    version = importlib.metadata.version("xllamacpp")
    return {"program": f"xllamacpp {version}, {built}", "write": llama_writer(model_file(MODEL), threads)}


def machine_tasks(precision: str, threads: int) -> dict[str, Any]:
    """What the machine itself can do."""
    program = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return {"program": program, "bandwidth": bandwidth, "peak": lambda: peak(precision)}


WORKERS = {
    "ours": our_tasks,
    "transformers": their_tasks,
    "llama.cpp": llama_tasks,
    "machine": machine_tasks,
}


def serve(worker: str, precision: str, threads: int) -> None:
    """Answer questions, a line of JSON each: [task, arguments]. What others print must not come between."""
    load = choose("worker", worker, WORKERS)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tasks = load(precision, threads)
    for line in sys.stdin:
        task, arguments = json.loads(line)
        found = tasks[task](**arguments) if callable(tasks[task]) else tasks[task]
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
