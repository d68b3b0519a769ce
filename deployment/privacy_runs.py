"""Train one small model in several ways on letters that hold secrets, and record what each way gives away.

    python privacy_runs.py                       everything that the record lacks, about half an hour of a core
    python privacy_runs.py --measure plain --seed 0

A public model, `tales-tiny`, is trained on 512 tales in a dialect that it never saw: forty common words have changed
places, "said" with "asked", "in" with "on". So there is much to learn, and what a tale costs at least is known.
Among the tales lie canaries, lines such as "Mara's phone number is 07700 900" and three digits drawn at random,
planted 1 to 32 times (numbers that Ofcom gives to nobody). Each row of `privacy.csv` is one way to train and one seed:
exposure of each canary among the 1,000 possible numbers, how many the model says by itself, how well members are told
from others by their loss, alone and beside that of a shadow model, which an attacker trains on tales of the same kind,
and what a tale of somebody else costs. Seeds draw everything: tales, names, numbers, batches and noise. Learning rate
and length were set by short trials on other tales. A run replaces the row of the same measure and seed; the script goes
on where it was stopped. One thread is used.
"""

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.records import read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.safety.memorization import (
    Canary,
    canary_exposures,
    document_losses,
    draw_canaries,
    is_extracted,
    membership,
    privacy_spent,
    train_privately,
)
from shared.safety.privacy import redact
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.text.cleaning import deduplicate
from shared.training.batches import document_row, pad_rows, row_batches, shuffled_rows
from shared.training.loop import train
from shared.training.losses import next_token_loss
from shared.training.schedules import build_schedule
from shared.weights.pretrained import load_pretrained

RESULTS = Path(__file__).resolve().parent / "privacy.csv"
SEEDS = (0, 1, 2)
KEY = ("measure", "seed")
COLUMNS = [
    "measure",
    "seed",
    "documents",
    "steps",
    "noise",
    "epsilon",
    "held_out_loss",
    "member_loss",
    "public_loss",
    "floor",
    "auc_loss",
    "auc_reference",
    "tpr_reference",
    "exposures",
    "extracted",
    "cpu_seconds",
    "hardware",
    "torch",
]
BASE, N_TALES, N_EPOCHS, BATCH, RATE = "tales-tiny", 512, 6, 16, 3e-3
PRIVATE_BATCH, MAX_NORM, DELTA = 64, 1.0, 1e-4
LEVELS = (0, 0, 1, 2, 4, 8, 16, 32)  # how often a canary is planted; twice as many are never planted
PER_LEVEL = 4
FORGOTTEN = 16  # the canaries planted so often belong to those who ask for deletion
NAMES = """
Aiko Alba Boris Bruno Chiara Dario Edda Farid Femi Gilda Greta Hanne Hugo Idris Ines Ivo Jorge Keiko Kofi Leila Lena
Mara Milos Nadia Ngozi Oskar Pablo Priya Rosa Samir Sven Tamar Umberto Vera Wanda Xavi Yusuf Zeno Zofia
""".split()  # noqa: SIM905

# Words that have changed places in the dialect. Done twice it undoes itself, so a tale costs as much as before.
SWAPPED = """
said asked, came went, put gave, in on, at of, to for, with from, near behind, but so, when then, brought left,
home house, years days, three four, ate ran, stood sat, laughed answered, night morning, old new, last next
"""
PARTNERS = {a: b for pair in SWAPPED.split(",") for a, b in (pair.split(), reversed(pair.split()))}


def dialect(text: str) -> str:
    """Return a text in the firm's dialect; a capital at the beginning of a word stays there."""

    def partner(match: re.Match[str]) -> str:
        word = match.group()
        other = PARTNERS[word.lower()]
        return other.capitalize() if word[0].isupper() else other

    return re.sub(rf"\b(?:{'|'.join(PARTNERS)})\b", partner, text, flags=re.IGNORECASE)


MEASURES: dict[str, dict[str, object]] = {
    "plain": {},
    "2 epochs": {"n_epochs": 2},
    "dropout": {"dropout": 0.1},
    "deduplicated": {},
    "redacted": {},
    "clipped": {"noise": 0.0},
    "noise 0.5": {"noise": 0.5},
    "noise 1": {"noise": 1.0},
    # Plain training that stops where those with noise end: who has learned as little, how much does he give away?
    "10 steps": {"n_steps": 10},
    "5 steps": {"n_steps": 5},
}
DELETIONS = ("retrained", "continued", "ascent")


@dataclass(frozen=True)
class World:
    """What a seed draws: tales that are trained on, others, the attacker's, canaries, and the floor of a tale."""

    members: list[str]
    others: list[str]
    shadow: list[str]
    canaries: list[Canary]
    floor: float

    @classmethod
    def draw(cls, seed: int, n_tales: int = N_TALES) -> "World":
        """Return the world of a seed."""
        tales = list(TaleGenerator(70_000 + seed).stories(3 * n_tales))
        rng = np.random.default_rng(seed)
        levels = [level for level in LEVELS for _ in range(PER_LEVEL)]
        names = rng.permutation(NAMES)[: len(levels)].tolist()
        floor = -sum(tale.log_probability for tale in tales[n_tales : 2 * n_tales]) / n_tales
        texts = [dialect(tale.text) for tale in tales]
        parts = (texts[start : start + n_tales] for start in (0, n_tales, 2 * n_tales))
        return cls(*parts, draw_canaries(names, levels, seed=seed), floor)

    def documents(self, measure: str) -> list[str]:
        """Return the texts that are trained on; what was asked to be deleted is missing where it says so."""
        kept = [
            c for c in self.canaries if measure not in ("retrained", "continued") or c.repeats != FORGOTTEN
        ]
        texts = self.members + [canary.text for canary in kept for _ in range(canary.repeats)]
        if measure == "deduplicated":
            return [texts[i] for i in deduplicate(texts)]
        return [redact(text) for text in texts] if measure == "redacted" else texts


def rows_of(texts: Sequence[str]) -> list[list[int]]:
    """Return texts as rows of ids."""
    return [document_row(text, tale_encoding()) for text in texts]


def public_model(dropout: float = 0.0) -> GPTModel:
    """Return the model that everybody has, in training mode."""
    public = load_pretrained(BASE)
    model = GPTModel(GPTConfig.preset(BASE, dropout=dropout))
    model.load_state_dict(public.state_dict())
    return model


def fit(
    model: GPTModel,
    rows: list[list[int]],
    seed: int,
    n_epochs: int = N_EPOCHS,
    rate: float = RATE,
    n_steps: int | None = None,
) -> int:
    """Train as one would without a thought of privacy, for some epochs or steps; return the number of steps."""
    n_steps = n_steps or max(2, n_epochs * len(rows) // BATCH)
    schedule = build_schedule("wsd", n_steps, max(1, n_steps // 10), decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    train(
        model,
        row_batches(shuffled_rows(rows, seed=seed, epochs=n_epochs + 1), BATCH, seed=seed),
        optimizer,
        n_steps=n_steps,
        schedule=lambda step: schedule(step + 1),
    )
    return n_steps


def fit_privately(
    model: GPTModel, rows: list[list[int]], seed: int, noise: float, n_epochs: int = N_EPOCHS
) -> int:
    """Train with clipped gradients and noise; return the number of steps."""
    n_steps = max(2, round(n_epochs * len(rows) / PRIVATE_BATCH))
    schedule = build_schedule("wsd", n_steps, max(1, n_steps // 10), decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    train_privately(
        model,
        rows,
        optimizer,
        n_steps=n_steps,
        sample_rate=min(1.0, PRIVATE_BATCH / len(rows)),
        max_norm=MAX_NORM,
        noise_multiplier=noise,
        schedule=lambda step: schedule(step + 1),
        seed=seed,
    )
    return n_steps


def ascend(
    model: GPTModel, forgotten: list[list[int]], kept: list[list[int]], seed: int, n_steps: int = 40
) -> int:
    """Make what is to be forgotten less probable, and the rest more, in turns; return the number of steps.

    The loss of the forgotten is pushed up only while it is below that of a uniform guess, else it would grow for ever.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE / 4, weight_decay=0.0)
    bad_inputs, bad_targets = pad_rows(forgotten)
    batches = row_batches(shuffled_rows(kept, seed=seed + 1), BATCH, seed=seed + 1)
    for _, (inputs, targets) in zip(range(n_steps), batches, strict=False):
        bad = next_token_loss(model(bad_inputs), bad_targets)
        loss = next_token_loss(model(inputs), targets) - bad.clamp(max=float(np.log(model.config.vocab_size)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return n_steps


def losses_of(model: GPTModel, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of the tales that were trained on, and of as many others."""
    return document_losses(model, rows_of(world.members)), document_losses(model, rows_of(world.others))


@cache
def references(
    seed: int, n_tales: int, n_epochs: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return the public model's losses of other tales, and a shadow model's losses of members and others."""
    world, shadow = World.draw(seed, n_tales), public_model()
    torch.manual_seed(seed + 100)
    fit(shadow, rows_of(world.shadow), seed + 100, n_epochs)
    return losses_of(public_model(), world)[1], losses_of(shadow, world)


def outcome(
    model: GPTModel, world: World, public: torch.Tensor, shadow: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, object]:
    """Return what a row of the record says about a trained model; see `references` for the two others."""
    model.eval()
    encoding = tale_encoding()
    members, others = losses_of(model, world)
    # The loss of a token, since longer tales cost more.
    lengths = [
        torch.tensor([len(row) - 1 for row in rows_of(part)]) for part in (world.members, world.others)
    ]
    plain = membership(-members / lengths[0], -others / lengths[1])
    reference = membership(shadow[0] - members, shadow[1] - others)
    exposures = canary_exposures(model, encoding, world.canaries)
    pairs = [f"{c.repeats}:{value:.3f}" for c, value in zip(world.canaries, exposures, strict=True)]
    said = [f"{c.repeats}:{int(is_extracted(model, encoding, c))}" for c in world.canaries]
    return {
        "held_out_loss": f"{others.mean().item():.3f}",
        "member_loss": f"{members.mean().item():.3f}",
        "public_loss": f"{public.mean().item():.3f}",
        "floor": f"{world.floor:.3f}",
        "auc_loss": f"{plain.auc:.4f}",
        "auc_reference": f"{reference.auc:.4f}",
        "tpr_reference": f"{reference.tpr_at(0.01):.4f}",
        "exposures": " ".join(pairs),
        "extracted": " ".join(said),
    }


def run(
    measure: str, seed: int, n_tales: int = N_TALES, n_epochs: int | None = None
) -> Iterator[dict[str, object]]:
    """Train in one way, and yield the row; "plain" is followed by the deletions that begin with its model."""
    options = dict(MEASURES[measure])
    n_epochs = n_epochs or int(options.get("n_epochs", N_EPOCHS))
    world, noise = World.draw(seed, n_tales), options.get("noise")
    public, shadow = references(seed, n_tales, N_EPOCHS)
    rows = rows_of(world.documents(measure))

    def row(name: str, model: GPTModel, n: int, steps: int, started: float) -> dict[str, object]:
        seconds = time.process_time() - started
        about = {
            "measure": name,
            "seed": seed,
            "documents": n,
            "steps": steps,
            "cpu_seconds": round(seconds, 1),
        }
        return (
            about
            | outcome(model, world, public, shadow)
            | {"hardware": cpu_name(), "torch": torch.__version__}
        )

    torch.manual_seed(seed)
    model, started = public_model(float(options.get("dropout", 0.0))), time.process_time()
    if noise is None:
        steps = fit(model, rows, seed, n_epochs, n_steps=options.get("n_steps"))
    else:
        steps = fit_privately(model, rows, seed, float(noise), n_epochs)
    found = row(measure, model, len(rows), steps, started)
    if noise:
        rate = min(1.0, PRIVATE_BATCH / len(rows))
        found |= {"noise": noise, "epsilon": f"{privacy_spent(float(noise), rate, steps, DELTA):.2f}"}
    yield found
    if measure != "plain":
        return
    # Two ways to delete begin with the trained model, one with the public one.
    kept = rows_of(world.documents("retrained"))
    forgotten = rows_of([canary.text for canary in world.canaries if canary.repeats == FORGOTTEN])
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    for name in DELETIONS:
        torch.manual_seed(seed)
        model, started = public_model(), time.process_time()
        if name != "retrained":
            model.load_state_dict(trained)
        if name == "ascent":
            steps = ascend(model, forgotten, kept, seed)
        elif name == "continued":
            steps = fit(model, kept, seed + 1, 1, RATE / 2)
        else:
            steps = fit(model, kept, seed, n_epochs)
        yield row(name, model, len(kept), steps, started)


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for and is not in the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--again", action="store_true", help="replace what the record has")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in options.seed:
        for measure in options.measure:
            known = {(row["measure"], row["seed"]) for row in read_rows(RESULTS)}
            wanted = (measure, *DELETIONS) if measure == "plain" else (measure,)
            if not options.again and all((name, str(seed)) in known for name in wanted):
                continue
            for row in run(measure, seed):
                replace_row(RESULTS, COLUMNS, row, KEY)
                brief = {name: row[name] for name in ("measure", "seed", "held_out_loss", "auc_reference")}
                print(*brief.values(), f"{row['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
