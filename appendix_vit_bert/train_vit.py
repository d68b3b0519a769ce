"""Train small Vision Transformers on scikit-learn's digits beside simpler models, tune them to new tasks.

    python train_vit.py                 everything that is not in train_vit.csv yet
    python train_vit.py vit cnn         only these runs
    python train_vit.py --ship vit      and the model of `vit`, seed 0, goes to shared/checkpoints/digits-vit
    python train_vit.py --steps 40 --output trial.csv       a short trial

    neighbors, logistic     nearest neighbours (k chosen on validation) and logistic regression on the 64 pixels
    cnn                     three convolutions, with the same augmentation, steps and rate
    vit                     the preset "digits" with augmentation
    vit, plain              without augmentation
    vit, no positions       the position vectors stay zero
    vit, patches of 4       four patches in place of 16
    ... by rows             the last 300 rows of scikit-learn's order held out: (mostly) other writers
    eight; ...              trained on the digits 0 to 7 first, then tuned with few examples:
                            8 against 9, and even against odd, by head, LoRA or all weights; or from scratch

Whatever is trained from random numbers has the seeds 0, 1 and 2. Rate and steps were chosen with seed 9 on the
validation images. The test images are looked at once by each run.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from shared.data.images import Digits, load_digit_images
from shared.finetuning.lora import attach_lora
from shared.model.vit import ViTClassifier, ViTConfig, ViTModel
from shared.notebook.records import read_rows, replace_rows
from shared.pretraining.processes import cpu_name
from shared.training.images import image_batches, image_logits, image_loss
from shared.training.loop import train
from shared.training.schedules import build_schedule
from shared.weights.pretrained import CHECKPOINTS
from shared.weights.vit import OWN_VIT_CONFIG, save_vit

RESULTS = Path(__file__).with_suffix(".csv")
COLUMNS = ["run", "seed", "measure", "value", "n", "steps", "seconds", "hardware"]
SEEDS = (0, 1, 2)
N_STEPS, RATE, BATCH = 1500, 3e-3, 64
TUNING_STEPS = 60
SHOTS = (5, 20)
TUNING_RATES = {"head": 1e-2, "lora": 1e-2, "full": 1e-3, "scratch": 3e-3}


def convolutional(n_labels: int = 10) -> nn.Sequential:
    """Three convolutions and a linear layer, of about as many parameters as the ViT."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128 * 4, n_labels)),
    )


def vision(n_labels: int = 10, **options: object) -> ViTClassifier:
    """A new ViT of the preset "digits", with some fields changed."""
    return ViTClassifier(ViTModel(ViTConfig.preset("digits", **options)), n_labels)


def without_positions() -> ViTClassifier:
    """A ViT that cannot know where a patch stood."""
    model = vision()
    model.body.positions.requires_grad_(False).zero_()
    return model


def fit(
    model: nn.Module, data: Digits, seed: int, n_steps: int, rate: float = RATE, augment: bool = True
) -> nn.Module:
    """Train what a model has of trainable parameters, and return it in evaluation mode."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    batches = image_batches(data.images, data.labels, min(BATCH, len(data)), augment=augment, seed=seed)
    schedule = build_schedule("cosine", n_steps, min(50, n_steps // 5))
    train(model, batches, optimizer, n_steps=n_steps, loss=image_loss, schedule=schedule)
    return model.eval()


def count_right(model: nn.Module, data: Digits) -> int:
    """How many images get their own label."""
    return int((image_logits(model, data.images).argmax(1) == data.labels).sum())


def splits(by_rows: bool) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test images: the fixed splits, or the last 300 rows for the test."""
    if not by_rows:
        return tuple(load_digit_images(name) for name in ("train", "validation", "test"))
    everything = load_digit_images()
    place = torch.arange(len(everything))
    tested, n = place >= len(everything) - 300, len(everything)
    checked = (place >= n - 600) & ~tested
    return everything.where(~tested & ~checked), everything.where(checked), everything.where(tested)


def simple(name: str, by_rows: bool = False) -> list[dict]:
    """Nearest neighbours or logistic regression; what is to be chosen is chosen on validation."""
    parts = splits(by_rows)
    (x, y), (x_valid, y_valid), (x_test, y_test) = (
        (part.images.flatten(1).numpy(), part.labels.numpy()) for part in parts
    )
    if name == "neighbors":
        models = [KNeighborsClassifier(k) for k in (1, 3, 5)]
    else:
        models = [LogisticRegression(C=c, max_iter=3000) for c in (0.01, 0.1, 1.0)]
    best = max((model.fit(x, y) for model in models), key=lambda model: model.score(x_valid, y_valid))
    return [
        {
            "measure": "validation right",
            "value": round(best.score(x_valid, y_valid) * len(y_valid)),
            "n": len(y_valid),
        },
        {"measure": "test right", "value": round(best.score(x_test, y_test) * len(y_test)), "n": len(y_test)},
    ]


def network(
    build: Callable[[], nn.Module], seed: int, n_steps: int, *, augment: bool = True, by_rows: bool = False
) -> tuple[list[dict], nn.Module]:
    """Train a network and count what it gets right."""
    data, valid, test = splits(by_rows)
    torch.manual_seed(seed)
    model = fit(build(), data, seed, n_steps, augment=augment)
    rows = [
        {"measure": f"{name} right", "value": count_right(model, part), "n": len(part)}
        for name, part in (("train", data), ("validation", valid), ("test", test))
    ]
    return [
        *rows,
        {"measure": "parameters", "value": sum(p.numel() for p in model.parameters()), "n": 1},
    ], model


def examples(data: Digits, digits: tuple[int, ...], shots: int, seed: int) -> Tensor:
    """Places of `shots` random images of each digit."""
    rng = np.random.default_rng([7, seed])
    return torch.cat(
        [
            torch.from_numpy(rng.permutation((data.labels == digit).nonzero()[:, 0].numpy())[:shots])
            for digit in digits
        ]
    )


def tuned(
    body: dict[str, Tensor], data: Digits, way: str, seed: int, n_steps: int
) -> tuple[ViTClassifier, int]:
    """Tune a trained body to two labels in one of four ways; return the classifier and its trained numbers."""
    torch.manual_seed(100 + seed)
    model = vision(2)
    if way != "scratch":
        model.body.load_state_dict(body)
    if way == "head":
        model.body.requires_grad_(False)
    if way == "lora":
        attach_lora(model.body, ("query", "value"), rank=4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return fit(model, data, seed, n_steps, TUNING_RATES[way]), trained


def transfer(seed: int, n_steps: int, tuning_steps: int) -> list[dict]:
    """Train on eight digits; then tell 8 from 9, and even from odd, with few examples."""
    data, _, test = splits(False)
    torch.manual_seed(seed)
    source = fit(vision(8), data.where(data.labels < 8), seed, n_steps)
    body, rows = source.body.state_dict(), []
    for task, digits in (("8 or 9", (8, 9)), ("even or odd", tuple(range(10)))):
        asked = test.where(torch.isin(test.labels, torch.tensor(digits)))
        asked = Digits(asked.images, asked.labels % 2, asked.rows)
        for shots in SHOTS:
            few = data.where(examples(data, digits, shots, seed))
            few = Digits(few.images, few.labels % 2, few.rows)
            for way in TUNING_RATES:
                model, trained = tuned(body, few, way, seed, tuning_steps)
                row = {"run": f"eight; {task}; {shots}; {way}", "n": len(asked)}
                rows += [row | {"measure": "test right", "value": count_right(model, asked)}]
                rows += [row | {"measure": "trained", "value": trained}]
    return rows


def shipped(seed: int, n_steps: int, ship: bool) -> list[dict]:
    """The main run; with `ship` the model of seed 0 is written for the course."""
    rows, model = network(vision, seed, n_steps)
    if ship and seed == 0:
        recipe = {"seed": seed, "steps": n_steps, "rate": RATE, "batch_size": BATCH, "hardware": cpu_name()}
        results = {row["measure"]: row["value"] for row in rows}
        options = {"dtype": torch.bfloat16, "config_name": OWN_VIT_CONFIG, "replace": True}
        save_vit(model, CHECKPOINTS / "digits-vit", **options, recipe=recipe, results=results)
    return rows


def jobs(options: argparse.Namespace) -> dict[tuple[str, int], Callable[[], list[dict]]]:
    """All runs by name and seed."""
    n, found = options.steps, {}
    for name in ("neighbors", "logistic"):
        found[name, 0] = lambda name=name: simple(name)
        found[f"{name}, by rows", 0] = lambda name=name: simple(name, True)
    for seed in SEEDS:
        found["vit", seed] = lambda seed=seed: shipped(seed, n, options.ship)
        found["cnn", seed] = lambda seed=seed: network(convolutional, seed, n)[0]
        found["eight", seed] = lambda seed=seed: transfer(seed, n * 2 // 5, min(n, TUNING_STEPS))
        found["vit, plain", seed] = lambda seed=seed: network(vision, seed, n, augment=False)[0]
        found["vit, no positions", seed] = lambda seed=seed: network(without_positions, seed, n)[0]
        found["vit, by rows", seed] = lambda seed=seed: network(vision, seed, n, by_rows=True)[0]
        found["cnn, by rows", seed] = lambda seed=seed: network(convolutional, seed, n, by_rows=True)[0]
        found["vit, patches of 4", seed] = lambda seed=seed: network(lambda: vision(patch_size=4), seed, n)[0]
    return found


def main() -> None:
    """Read the options and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("runs", nargs="*", help="names of runs; all if none is given")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=list(SEEDS), help="of the runs that have several"
    )
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--ship", action="store_true", help="also write the model of `vit`, seed 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["run"].split(";")[0], int(row["seed"])) for row in read_rows(options.output)}
    for (name, seed), work in jobs(options).items():
        wanted = seed in options.seeds and (not options.runs or name in options.runs)
        if (name, seed) in done or not wanted:
            continue
        started = time.process_time()
        found = work()
        about = {"seed": seed, "steps": options.steps, "hardware": cpu_name()}
        about["seconds"] = f"{time.process_time() - started:.0f}"
        rows = [{"run": name} | about | row for row in found]
        replace_rows(
            options.output, COLUMNS, rows, lambda row: (row["run"], str(row["seed"]), row["measure"])
        )
        print(name, seed, [row["value"] for row in rows], about["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
