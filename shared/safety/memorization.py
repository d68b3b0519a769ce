"""draft"""
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.checks import require, whole_number
from shared.generation.engine import generate
from shared.training.batches import IGNORE, pad_rows
from shared.training.losses import next_token_loss, own_modes


@dataclass(frozen=True)
class Canary:
    """A secret planted into training data to see whether it can be read from the model: `prompt`, then `secret`.

    `repeats` is how many documents of the training data are exactly this one; 0 for a control that was never planted.
    """

    prompt: str
    secret: str
    repeats: int

    @property
    def text(self) -> str:
        """The document that is planted."""
        return f"{self.prompt}{self.secret}."


def draw_canaries(
    names: Sequence[str], repeats: Sequence[int], *, template: str = "{}'s phone number is 07700 900", n_digits: int = 3, seed: int = 0
) -> list[Canary]:
    whole_number("n_digits", n_digits)
    require("names", len(names), len(names) == len(repeats), f"as many as repeats, {len(repeats)}")
    require("names", names, len(set(names)) == len(names), "different from each other")
    rng = np.random.default_rng(seed)
    numbers = rng.integers(10**n_digits, size=len(names))
    return [
        Canary(template.format(name), f"{number:0{n_digits}d}", whole_number("repeats", n, 0))
        for name, number, n in zip(names, numbers, repeats, strict=True)
    ]


@torch.no_grad()
def candidate_losses(
    model: nn.Module, encoding: tiktoken.Encoding, prompt: str, candidates: Sequence[str], batch_size: int = 64
) -> Tensor:
    require("candidates", len(candidates), len(candidates) > 1, "at least two")
    head = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    rows = [[encoding.eot_token, *encoding.encode_ordinary(prompt + text)] for text in candidates]
    for text, row in zip(candidates, rows, strict=True):
        require("candidates", text, row[: len(head)] == head and len(row) > len(head), "texts whose tokens begin after the prompt's")
    # The last id is read by nobody: candidates that differ in nothing else share one pass.
    stems = list(dict.fromkeys(tuple(row[:-1]) for row in rows))
    losses, start = {}, len(head) - 1
    with own_modes(model):
        model.eval()
        device = next(model.parameters()).device
        for first in range(0, len(stems), batch_size):
            part = stems[first : first + batch_size]
            longest = max(map(len, part))
            inputs = torch.tensor([[*stem, *[0] * (longest - len(stem))] for stem in part], device=device)
            chances = model(inputs)[:, start:].float().log_softmax(-1).cpu()
            losses |= dict(zip(part, -chances))
    return torch.stack([
        losses[tuple(row[:-1])][torch.arange(len(row) - len(head)), row[len(head) :]].sum() for row in rows
    ])


def exposure(losses: Tensor, place: int) -> float:
    rest = torch.cat((losses[:place], losses[place + 1 :]))
    rank = 1 + (rest < losses[place]).sum().item() + (rest == losses[place]).sum().item() / 2
    return math.log2(len(losses)) - math.log2(rank)


def chance_exposure(n: int) -> tuple[float, float]:
    values = math.log2(n) - np.log2(np.arange(1, n + 1))
    return float(values.mean()), float(values.std())


def canary_exposures(model, encoding, canaries) -> list[float]:
    found = []
    for canary in canaries:
        n = len(canary.secret)
        candidates = [f"{number:0{n}d}" for number in range(10**n)]
        found.append(exposure(candidate_losses(model, encoding, canary.prompt, candidates), int(canary.secret)))
    return found


def is_extracted(model, encoding, canary) -> bool:
    prompt = [encoding.eot_token, *encoding.encode_ordinary(canary.prompt)]
    secret = encoding.encode_ordinary(canary.prompt + canary.secret)[len(prompt) - 1 :]
    return generate(model, [prompt], len(secret))[0] == secret


@torch.no_grad()
def document_losses(model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int = 32) -> Tensor:
    found = torch.empty(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(model.parameters()).device
    with own_modes(model):
        model.eval()
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs, targets = (part.to(device) for part in pad_rows([rows[i] for i in places]))
            losses = next_token_loss(model(inputs), targets, reduction="none").reshape(targets.shape)
            found[places] = losses.cpu().double().sum(1)
    return found


def document_loss(model: nn.Module, parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    logits = functional_call(model, parameters, (inputs[None],))[0]
    return F.cross_entropy(logits, targets, ignore_index=IGNORE)


def per_sample_gradients(model: nn.Module, inputs: Tensor, targets: Tensor, loss=document_loss) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    one = grad(lambda values, x, y: loss(model, values, x, y))
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(one, in_dims=(None, 0, 0), randomness="different")(parameters, inputs, targets)


def clipped_sum(gradients: dict[str, Tensor], max_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors, g) for name, g in gradients.items()}, norms


def privatize(sums: dict[str, Tensor], max_norm, noise_multiplier, expected_batch, generator):
    return {n: (g + noise_multiplier * max_norm * torch.randn(g.shape, generator=generator)) / expected_batch for n, g in sums.items()}


def train_privately(model, rows, optimizer, *, n_steps, batch_size, max_norm, noise_multiplier, schedule=None, chunk=16, seed=0):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    groups = optimizer.param_groups
    rates = [g["lr"] for g in groups]
    norms_seen = []
    for step in range(n_steps):
        chosen = np.flatnonzero(rng.random(len(rows)) < batch_size / len(rows))
        chosen = sorted(chosen, key=lambda i: len(rows[i]))
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        for first in range(0, len(chosen), chunk):
            inputs, targets = pad_rows([rows[i] for i in chosen[first : first + chunk]])
            part, norms = clipped_sum(per_sample_gradients(model, inputs, targets), max_norm)
            norms_seen += norms.tolist()
            for name, g in part.items():
                sums[name] += g
        noisy = privatize(sums, max_norm, noise_multiplier, batch_size, generator)
        for name, p in model.named_parameters():
            if name in noisy:
                p.grad = noisy[name]
        for g, r in zip(groups, rates):
            g["lr"] = r * (schedule(step + 1) if schedule else 1)
        optimizer.step()
    return norms_seen
