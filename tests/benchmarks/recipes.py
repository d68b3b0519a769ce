"""Our recipe for `tales-1m` against a plain GPT-2 recipe: the same tales for the same time, then the validation loss.

    python -m tests.benchmarks.recipes --minutes 5 --seeds 0 1 2
    python -m tests.benchmarks.recipes --minutes 5 --recipe gpt2-plain --set learning_rate=0.002
    python -m tests.benchmarks.recipes --minutes 5 --recipe tales-1m --set mimetic=false

A recipe is a file of `ch05_pretraining/recipes`. First the recipes take turns at a few steps, and the median time of a
step gives each as many steps as fit into `--minutes`; schedules are stretched to that number. Then they are trained,
each from the first story of the same generator, in the same order, and judged on the same validation stories.
`--clock cpu` counts processor time in place of time on the wall: for one thread, where other programs are running.
The first recipe is compared with each other one: by how much smaller its distance to the entropy floor is. `--out`
also writes a CSV file.
"""

import argparse
import statistics
import tempfile
import time
import tomllib
from dataclasses import replace
from pathlib import Path

from ch05_pretraining import pretrain
from shared.notebook.records import replace_rows
from shared.pretraining.options import Options, read_options
from shared.pretraining.processes import Processes, hardware
from shared.pretraining.run import Run

RECIPES = Path(pretrain.__file__).resolve().parent / "recipes"
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
COLUMNS = [
    "recipe",
    "changes",
    "seed",
    "parameters",
    "steps",
    "seconds",
    "bits_per_byte",
    "loss_per_document",
    "floor_per_document",
    "percent_above_floor",
    "hardware",
]


def options_of(recipe: str, changes: list[str], seed: int, folder: Path, threads: int) -> Options:
    """Return the options of a recipe with some changed, as NAME=VALUE in TOML."""
    given = ["--recipe", str(RECIPES / f"{recipe}.toml"), "--out", str(folder / recipe), "--no-tensorboard"]
    options = read_options(pretrain.__doc__, [*given, "--shards", str(folder / "shards"), "--device", "cpu"])
    changed = {name: value for change in changes for name, value in tomllib.loads(change).items()}
    return replace(options, **changed, seed=seed, threads=threads)


def median_step(
    options: dict[str, Options], processes: Processes, clock: str, n_rounds: int
) -> dict[str, float]:
    """Return the median time of a training step of each recipe, measured in turns."""
    runs = {name: Run(each, processes) for name, each in options.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n_rounds):
        for name, run in runs.items():
            start = CLOCKS[clock]()
            run.train_step()
            times[name].append(CLOCKS[clock]() - start)
    for run in runs.values():
        run.close()
    return {name: statistics.median(each[3:]) for name, each in times.items()}


def train(options: Options, processes: Processes, clock: str) -> dict[str, object]:
    """Train one recipe to its last step and return its row of the record."""
    run = Run(options, processes)
    start = CLOCKS[clock]()
    for _ in range(options.steps):
        run.train_step()
    seconds = CLOCKS[clock]() - start
    run.check_losses()
    found = run.evaluate()
    run.close()  # its folder is free for the next run of the same recipe
    return {
        "parameters": run.model.n_parameters,
        "steps": options.steps,
        "seconds": f"{seconds:.0f}",
        **{name: f"{found[name]:.4f}" for name in COLUMNS if name in found},
        "floor_per_document": f"{run.floor:.4f}",
        "hardware": hardware(processes),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", nargs="+", default=["tales-1m", "gpt2-plain"])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes to every recipe")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="CSV file for the results")
    given = parser.parse_args()
    processes, rows = Processes("cpu", given.threads), []
    with tempfile.TemporaryDirectory() as folder:
        make = lambda recipe, seed: options_of(recipe, given.set, seed, Path(folder), given.threads)
        seconds = median_step({name: make(name, 0) for name in given.recipe}, processes, given.clock, 23)
        for seed in given.seeds:
            for recipe in given.recipe:
                steps = max(2, round(60 * given.minutes / seconds[recipe]))
                found = train(replace(make(recipe, seed), steps=steps), processes, given.clock)
                rows.append({"recipe": recipe, "changes": " ".join(given.set), "seed": seed, **found})
                print(", ".join(f"{name} {rows[-1][name]}" for name in COLUMNS[:-1]), flush=True)
    for seed in given.seeds:
        first, *others = (row for row in rows if row["seed"] == seed)
        for other in others:
            distances = [float(row["percent_above_floor"]) for row in (first, other)]
            print(
                f"seed {seed}: distance to the floor {distances[0]:.1f} % against {distances[1]:.1f} %, "
                f"{100 * (1 - distances[0] / distances[1]):.0f} % smaller than {other['recipe']}"
            )
    if given.out:
        replace_rows(given.out, COLUMNS, rows, lambda row: (row["recipe"], row["changes"], int(row["seed"])))


if __name__ == "__main__":
    main()
