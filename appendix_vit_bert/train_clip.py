"""Train CLIP on digits in eight styles and their captions, and ask for combinations that were never paired.

    python train_clip.py                 the runs that train_clip.csv lacks, about a minute each
    python train_clip.py --steps 20 --output trial.csv       a short trial

A digit is thin or thick, its ink strong or faint, and it is plain or marked by a dot in the upper right corner: with 10
digits 80 combinations. Of each digit one, two or four styles are held out, others for each digit: so many combinations
are neither drawn nor named in training. Rate, decay and steps were chosen with the seeds 8 and 9 on the validation
images; the test images are looked at once by each run.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.data.images import Digits, load_digit_images
from shared.finetuning.clip import CLIPConfig, CLIPModel
from shared.finetuning.contrastive import contrastive_loss, pair_logits
from shared.model.gpt import GPTConfig
from shared.model.vit import ViTConfig
from shared.notebook.records import read_rows, replace_rows
from shared.pretraining.processes import cpu_name
from shared.training.images import augment_images
from shared.training.loop import train
from shared.training.optimizers import build_optimizers
from shared.training.schedules import build_schedule
from shared.weights.vit import load_vit

RESULTS = Path(__file__).with_suffix(".csv")
COLUMNS = ["held_out", "seed", "measure", "right", "n", "steps", "seconds", "hardware"]
SEEDS, N_STEPS, RATE, DECAY, BATCH = (0, 1, 2), 1500, 2e-3, 0.5, 64
N_HELD_OUT = (1, 2, 4)  # styles of each digit

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STYLES = list(itertools.product(("thin", "thick"), ("strong", "faint"), ("plain", "marked")))
TEMPLATES = ("a {w} {i} {d} , {m}", "a photo of the digit {d} , {w} and {i} , {m}", "{d} : {m} , {i} , {w}")
NEW_WORDING = "the digit {d} , {m} , {i} and {w}"  # never in training


def held_out_styles(n: int = 1) -> Tensor:
    """Return bool (digits, styles): the `n` styles of each digit that training neither draws nor names.

    Style 0 is never among them: it is the digit as it is, which the image encoder knows from elsewhere. What is left of
    a digit has each single word of style.
    """
    steps = torch.tensor([0, 5, 3, 6])[:n]
    found = torch.zeros(10, 8, dtype=torch.bool)
    for digit in range(10):
        found[digit, 1 + (digit * (1 + digit // 7) + steps) % 7] = True
    return found


def draw_in(images: Tensor, style: int) -> Tensor:
    """Return images (n, 1, 8, 8) in one of the eight styles."""
    weight, ink, mark = STYLES[style]
    if weight == "thick":  # each pixel becomes the darkest of its neighborhood
        images = F.max_pool2d(F.pad(images, (0, 1, 0, 1), value=-1.0), 2, stride=1)
    if ink == "faint":
        images = images / 2 - 0.5
    images = images.clone()
    images[:, :, 0, 7] = 1.0 if mark == "marked" else -1.0
    return images


def caption(digit: int, style: int, template: str = TEMPLATES[0]) -> str:
    """Return a caption of a digit in a style."""
    return template.format(d=NAMES[digit], **dict(zip("wim", STYLES[style], strict=True)))


def all_captions(template: str = TEMPLATES[0]) -> list[str]:
    """Return the captions of the 80 combinations, that of a digit and a style at place 8 * digit + style."""
    return [caption(digit, style, template) for digit in range(10) for style in range(8)]


PAD, START, END = 0, 1, 2
WORDS = sorted(
    {
        word
        for template in (*TEMPLATES, NEW_WORDING)
        for text in all_captions(template)
        for word in text.split()
    }
)
LENGTH = 15


def encode_captions(texts: list[str]) -> Tensor:
    """Return ids (texts, 15): start, one id for each word, end, padding."""
    ids = {word: 3 + place for place, word in enumerate(WORDS)}
    rows = [[START, *(ids[word] for word in text.split()), END] for text in texts]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


def new_clip(seed: int) -> CLIPModel:
    """Return a pair of encoders; the image encoder begins with the weights of `digits-vit`."""
    torch.manual_seed(seed)
    text = GPTConfig(
        vocab_size=3 + len(WORDS), context_length=16, emb_dim=64, n_heads=4, n_layers=1, qkv_bias=True
    )
    model = CLIPModel(CLIPConfig(ViTConfig.preset("digits"), text, 32, END, "gelu"))
    model.image_encoder.load_state_dict(
        load_vit("digits-vit").state_dict(), strict=False
    )  # it has no input norm
    return model


def pairs(
    data: Digits, held_out: Tensor, n: int, seed: int
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Yield ((images, ids of captions), 8 * digit + style) of n pairs without end; never a held-out combination."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        places = torch.randint(len(data), (n,), generator=generator)
        digits = data.labels[places]
        styles = torch.multinomial((~held_out).float()[digits], 1, generator=generator)[:, 0]
        turned = augment_images(data.images[places], generator)
        images = turned.clone()
        for style in range(8):
            images[styles == style] = draw_in(turned[styles == style], style)
        templates = torch.randint(len(TEMPLATES), (n,), generator=generator)
        texts = [
            caption(*row, TEMPLATES[t]) for *row, t in torch.stack([digits, styles, templates], 1).tolist()
        ]
        yield (images, encode_captions(texts)), 8 * digits + styles


def pair_loss(model: CLIPModel, inputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Return CLIP's loss times the number of pairs, as `train` wants it."""
    return len(labels) * contrastive_loss(model(*inputs), labels[:, None] == labels)


def fit(held_out: Tensor, seed: int, n_steps: int) -> CLIPModel:
    """Return a trained pair of encoders."""
    model = new_clip(seed)
    train(
        model,
        pairs(load_digit_images("train"), held_out, BATCH, seed),
        build_optimizers(model, "adamw", RATE, weight_decay=DECAY, betas=(0.9, 0.999)),
        n_steps=n_steps,
        loss=pair_loss,
        schedule=build_schedule("cosine", n_steps, min(40, n_steps // 2)),
    )
    return model.eval()


@torch.no_grad()
def zero_shot(
    model: CLIPModel, data: Digits, held_out: Tensor, template: str = TEMPLATES[0]
) -> dict[str, tuple[int, int]]:
    """Ask for the nearest of 80 captions: return (right, asked) for what was paired and for what never was."""
    model.eval()
    texts = model.text_features(encode_captions(all_captions(template)))
    right = torch.empty(len(data), 8, dtype=torch.bool)
    for style in range(8):
        nearest = pair_logits(model.image_features(draw_in(data.images, style)), texts).argmax(dim=1)
        right[:, style] = nearest == 8 * data.labels + style
    never = held_out[data.labels]
    return {
        name: (int(right[which].sum()), int(which.sum()))
        for name, which in (("paired", ~never), ("never paired", never))
    }


def main() -> None:
    """Read the options and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {(int(row["held_out"]), int(row["seed"])) for row in read_rows(options.output)}
    for n, seed in itertools.product(N_HELD_OUT, options.seeds):
        if (n, seed) in done:
            continue
        started, held_out = time.process_time(), held_out_styles(n)
        model, test = fit(held_out, seed, options.steps), load_digit_images("test")
        found = zero_shot(model, test, held_out)
        other = zero_shot(model, test, held_out, NEW_WORDING)
        found |= {f"{name}, new wording": counts for name, counts in other.items()}
        about = {"held_out": n, "seed": seed, "steps": options.steps, "hardware": cpu_name()}
        about["seconds"] = f"{time.process_time() - started:.0f}"
        rows = [
            about | {"measure": name, "right": right, "n": asked} for name, (right, asked) in found.items()
        ]
        replace_rows(
            options.output,
            COLUMNS,
            rows,
            lambda row: (str(row["held_out"]), str(row["seed"]), row["measure"]),
        )
        print(n, seed, found, about["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
