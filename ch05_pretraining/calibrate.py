"""Set the scale of a trained model's logits to the one with the lowest loss on held-out tales.

    python ch05_pretraining/calibrate.py build/tales-2m --out build/tales-2m-calibrated

One number is fitted: a factor on all logits, the inverse of a temperature (Guo et al., 2017, "On Calibration of Modern
Neural Networks"). It goes into the final norm, so the model keeps its shape. The stories for the fit come from a seed
of their own; the loss in config.json is measured again on the validation stories that the recipe names. Both folders
have the format of `shared/checkpoints`.
"""

import argparse
import json
from pathlib import Path

import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from shared.model.gpt import GPTModel
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.batches import IGNORE, document_row, pad_rows
from shared.training.losses import bits_per_byte, evaluate
from shared.weights.files import save_checkpoint_folder
from shared.weights.pretrained import load_pretrained


@torch.no_grad()
def best_factor(model: GPTModel, rows: list[list[int]], batch_size: int = 32) -> float:
    """Return the factor on the logits, between 0.25 and 4, with the lowest loss on rows of ids."""
    ordered, hidden, targets = sorted(rows, key=len), [], []
    for start in range(0, len(ordered), batch_size):
        inputs, wanted = pad_rows(ordered[start : start + batch_size])
        counted = wanted != IGNORE
        hidden.append(model.hidden_states(inputs)[counted])  # (targets, emb_dim)
        targets.append(wanted[counted])

    def loss(factor: float) -> float:
        pairs = zip(hidden, targets, strict=True)
        return sum(
            F.cross_entropy(factor * model.output_head(x), y, reduction="sum").item() for x, y in pairs
        )

    return float(minimize_scalar(loss, bounds=(0.25, 4.0), method="bounded", options={"xatol": 1e-3}).x)


@torch.no_grad()
def scale_logits(model: GPTModel, factor: float) -> None:
    """Multiply the logits of a model by a factor, by the parameters of its final norm."""
    for parameter in model.final_norm.parameters():
        parameter.mul_(factor)


def validation_results(model: GPTModel, seed: int, n_stories: int) -> dict[str, float]:
    """Return the losses on tales in the words of `pretrain.py`'s results."""
    stories, encoding = list(TaleGenerator(seed).stories(n_stories)), tale_encoding()
    rows = sorted((document_row(story.text, encoding) for story in stories), key=len)
    found = evaluate(model, (pad_rows(rows[i : i + 32]) for i in range(0, len(rows), 32)))
    floor = -sum(story.log_probability for story in stories) / len(stories)
    n_bytes = sum(len(encoding.decode(row[1:-1]).encode()) for row in rows)
    return {
        "loss": found.loss,
        "bits_per_byte": bits_per_byte(found.nats, n_bytes),
        "loss_per_document": found.nats / len(rows),
        "floor_per_document": floor,
        "percent_above_floor": 100 * (found.nats / len(rows) / floor - 1),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder that pretrain.py exported")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--stories", type=int, default=1000, help="stories for the fit")
    parser.add_argument("--seed", type=int, default=2, help="their seed")
    given = parser.parse_args()

    # The stories for the fit must be new to the model, and none of those that it is judged on.
    config = json.loads((given.checkpoint / "config.json").read_text(encoding="utf-8"))
    recipe = config["recipe"]
    if given.seed in (recipe["tales_seed"], recipe["tales_validation_seed"]):
        parser.error(f"--seed {given.seed} made the training or the validation stories: choose another")

    # The fit, and what it is worth on the validation stories.
    model = load_pretrained(given.checkpoint)
    stories = TaleGenerator(given.seed).stories(given.stories)
    factor = best_factor(model, [document_row(story.text, tale_encoding()) for story in stories])
    scale_logits(model, factor)
    found = validation_results(model, recipe["tales_validation_seed"], recipe["tales_validation"])
    before = config["results"]["loss_per_document"]
    print(f"logits times {factor:.3f}: {before:.3f} -> {found['loss_per_document']:.3f} nats per story")

    # The folder says what was done to the weights; everything else stays as it was recorded.
    details = {name: value for name, value in config.items() if name != "model"}
    details["results"] = config["results"] | found
    details["calibration"] = {
        "factor": factor,
        "stories": given.stories,
        "seed": given.seed,
        "loss_before": before,
    }
    save_checkpoint_folder(model, given.out, **details)


if __name__ == "__main__":
    main()
