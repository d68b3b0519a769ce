"""What a model has learned by heart, and training that bounds it: canaries and exposure, membership
inference, DP-SGD.

`draw_canaries` and `canary_exposures` measure secrets, `membership` judges an attack by its scores,
`train_privately` is DP-SGD with gradients of single rows, and `privacy_spent` asks Opacus's accountant
what was promised.

Left out: attacks with many shadow models, canaries that are no digits, gradients of single rows without
memory for all of them, and random numbers that an adversary cannot foresee.

Follows Carlini et al. (2019, "The Secret Sharer"), Yeom et al. (2018) and Abadi et al. (2016).

Explained and proven in deployment/06_privacy.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from shared.checks import check_between, require, whole_number
from shared.generation.engine import generate
from shared.training.batches import IGNORE, pad_rows
from shared.training.losses import next_token_loss, own_modes


@dataclass(frozen=True)
class Canary:
    """A secret planted into training data, to see later whether it can be read from the model.

    `repeats` is how many documents of the training data are exactly this one; 0 makes it a control.
    """

    prompt: str
    secret: str
    repeats: int

    @property
    def text(self) -> str:
        """The whole document."""
        return f"{self.prompt}{self.secret}."


def draw_canaries(
    names: Sequence[str],
    repeats: Sequence[int],
    *,
    template: str = "{}'s phone number is 07700 900",
    n_digits: int = 3,
    seed: int = 0,
) -> list[Canary]:
    """Return one canary for each name, with digits drawn at random; the numbers 07700 900000 to 900999 are nobody's.

    Args:
        names: Different from each other.
        repeats: How often each will be planted.
        template: What stands before the digits; `{}` becomes the name.
        n_digits: How many digits are secret.
        seed: Of the digits.

    Raises:
        ValueError: A name occurs twice, or there are not as many repeats as names.
    """
    whole_number("n_digits", n_digits)
    require("names", list(names), len(set(names)) == len(names), "different from each other")
    require("repeats", len(repeats), len(repeats) == len(names), f"as many as names, {len(names)}")
    numbers = np.random.default_rng(seed).integers(10**n_digits, size=len(names))
    return [
        Canary(template.format(name), f"{number:0{n_digits}d}", whole_number("repeats", n, 0))
        for name, number, n in zip(names, numbers, repeats, strict=True)
    ]


def exposure(losses: Tensor, place: int) -> float:
    """Return log2(number of candidates) - log2(rank of the one at `place`), in bits (Carlini et al., 2019).

    Rank 1 has the least loss. Candidates of equal loss share their ranks: a model that knows nothing gives nobody away.

    Raises:
        ValueError: `losses` is not one row, or `place` is not in it.
    """
    require("losses", tuple(losses.shape), losses.dim() == 1 and len(losses) > 1, "one row of at least two")
    require("place", place, 0 <= place < len(losses), f"between 0 and {len(losses) - 1}")
    smaller, equal = (losses < losses[place]).sum().item(), (losses == losses[place]).sum().item()
    return math.log2(len(losses)) - math.log2(smaller + (equal + 1) / 2)


def chance_exposure(n_candidates: int) -> tuple[float, float]:
    """Return mean and standard deviation of the exposure of a secret that the model never saw, among `n_candidates`.

    Its rank is any with the same chance. For many candidates both numbers come near log2(e) = 1.44.
    """
    bits = math.log2(whole_number("n_candidates", n_candidates, 2)) - np.log2(np.arange(1, n_candidates + 1))
    return float(bits.mean()), float(bits.std())


def canary_exposures(
    model: nn.Module, encoding: tiktoken.Encoding, canaries: Sequence[Canary]
) -> list[float]:
    """Return the exposure of each canary among all secrets of as many digits."""
    found = []
    for canary in canaries:
        n_digits = len(canary.secret)
        candidates = [f"{number:0{n_digits}d}" for number in range(10**n_digits)]
        losses = candidate_losses(model, encoding, canary.prompt, candidates)
        found.append(exposure(losses, int(canary.secret)))
    return found


def is_extracted(model: nn.Module, encoding: tiktoken.Encoding, canary: Canary) -> bool:
    """Return whether the model goes on from the canary's prompt with the secret, if it always takes the likeliest."""
    prompt = [encoding.eot_token, *encoding.encode_ordinary(canary.prompt)]
    whole = [encoding.eot_token, *encoding.encode_ordinary(canary.prompt + canary.secret)]
    return generate(model, [prompt], len(whole) - len(prompt))[0] == whole[len(prompt) :]


@torch.no_grad()
def candidate_losses(
    model: nn.Module,
    encoding: tiktoken.Encoding,
    prompt: str,
    candidates: Sequence[str],
    batch_size: int = 64,
) -> Tensor:
    """Return -log p(candidate | prompt) for every candidate, in nats, float32 (candidates,).

    The model reads the end token, the prompt and the candidate. Candidates that differ only in their last token share
    a pass: a thousand numbers of three digits cost a hundred.

    Raises:
        ValueError: There are fewer than two candidates, or the tokens of one run into those of the prompt.
    """
    require("candidates", len(candidates), len(candidates) > 1, "at least two")
    head = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    rows = [[encoding.eot_token, *encoding.encode_ordinary(prompt + text)] for text in candidates]
    for text, row in zip(candidates, rows, strict=True):
        is_apart = row[: len(head)] == head and len(row) > len(head)
        require("candidates", text, is_apart, "texts whose tokens begin where the prompt's end")
    stems = list(dict.fromkeys(tuple(row[:-1]) for row in rows))
    log_p: dict[tuple[int, ...], Tensor] = {}
    device = next(model.parameters()).device
    with own_modes(model):
        model.eval()
        for start in range(0, len(stems), batch_size):
            part = stems[start : start + batch_size]
            longest = max(map(len, part))
            inputs = torch.tensor([[*stem, *[0] * (longest - len(stem))] for stem in part], device=device)
            logits = model(inputs)[:, len(head) - 1 :].float()
            log_p |= zip(part, logits.log_softmax(-1).cpu(), strict=True)
    ends = [torch.tensor(row[len(head) :]) for row in rows]
    return torch.stack(
        [-log_p[tuple(row[:-1])][range(len(end)), end].sum() for row, end in zip(rows, ends, strict=True)]
    )


@torch.no_grad()
def document_losses(model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int = 32) -> Tensor:
    """Return -log p(row) of each row of ids, in nats, float64 (rows,), read from its first token."""
    found = torch.empty(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(model.parameters()).device
    with own_modes(model):
        model.eval()
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs, targets = (part.to(device) for part in pad_rows([rows[i] for i in places]))
            losses = next_token_loss(model(inputs), targets, reduction="none").reshape(targets.shape)
            found[places] = losses.cpu().double().sum(dim=1)
    return found


@dataclass(frozen=True)
class Membership:
    """How well scores tell members from others: the curve of false and true alarms, and the area under it."""

    false_positive_rates: np.ndarray
    true_positive_rates: np.ndarray
    auc: float
    interval: tuple[float, float]

    def tpr_at(self, false_positive_rate: float) -> float:
        """Return the share of members that are found where at most such a share of others is accused."""
        check_between("false_positive_rate", false_positive_rate, 0, 1)
        return float(self.true_positive_rates[self.false_positive_rates <= false_positive_rate].max())


def membership(
    members: Sequence[float] | Tensor,
    others: Sequence[float] | Tensor,
    *,
    n_resamples: int = 500,
    seed: int = 0,
) -> Membership:
    """Judge an attack by its scores of documents that were trained on, and of others of the same kind.

    Args:
        members, others: A higher score says "member". The loss with a minus is the simplest; the loss of a reference
            model less the model's own takes out how hard a text is for anybody.
        n_resamples: Draws of documents, with replacement, for the 95 % interval of the area.
        seed: Of these draws.

    Raises:
        ValueError: One side is empty, or a score is not a number.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # two seconds, which the service should not wait

    sides = [np.asarray(side, dtype=np.float64) for side in (members, others)]
    for name, side in zip(("members", "others"), sides, strict=True):
        require(name, len(side), len(side) > 0 and bool(np.isfinite(side).all()), "at least one finite score")
    truth, scores = np.repeat([1, 0], [len(side) for side in sides]), np.concatenate(sides)
    rng = np.random.default_rng(seed)
    areas = [
        roc_auc_score(truth, np.concatenate([rng.choice(side, len(side)) for side in sides]))
        for _ in range(n_resamples)
    ]
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    interval = (float(np.quantile(areas, 0.025)), float(np.quantile(areas, 0.975)))
    return Membership(false, true, float(roc_auc_score(truth, scores)), interval)


RowLoss = Callable[[nn.Module, Mapping[str, Tensor], Tensor, Tensor], Tensor]


def mean_token_loss(
    model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
) -> Tensor:
    """Return the mean loss of one row's targets (tokens,), computed with the given parameters."""
    logits = functional_call(model, dict(parameters), (inputs[None],))[0]
    return F.cross_entropy(logits, targets, ignore_index=IGNORE)


def per_sample_gradients(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: RowLoss = mean_token_loss
) -> dict[str, Tensor]:
    """Return the gradient of each row's own loss, by parameter: (batch, *shape of the parameter).

    `grad` makes of the loss of one row a function that returns its gradient, `vmap` runs it over all rows at once.

    Args:
        model: Its parameters that require gradients are differentiated; nothing is changed.
        inputs, targets: A batch; the first dimension counts the rows.
        loss: Called with the model, parameters, and one row's inputs and targets, without their first dimension.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    one_row = grad(lambda values, x, y: loss(model, values, x, y))
    # The fused kernels for attention cannot be run over one more dimension.
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(one_row, in_dims=(None, 0, 0), randomness="different")(parameters, inputs, targets)


def clip_rows(gradients: Mapping[str, Tensor], max_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Shorten each row's gradient to at most `max_norm`, add the rows up, and return the sums and the norms before.

    The norm of a row is taken over all parameters together. Raises ValueError if `max_norm` is not above 0.
    """
    require("max_norm", max_norm, max_norm > 0, "above 0")
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors, g) for name, g in gradients.items()}, norms


def add_noise(
    sums: Mapping[str, Tensor], scale: float, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return the sums with normal noise of standard deviation `scale` on every number."""
    require("scale", scale, scale >= 0, "at least 0")
    if scale == 0:
        return dict(sums)
    return {name: s + scale * torch.randn(s.shape, generator=generator) for name, s in sums.items()}


def train_privately(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    optimizer: Optimizer,
    *,
    n_steps: int,
    sample_rate: float,
    max_norm: float,
    noise_multiplier: float,
    schedule: Callable[[int], float] | None = None,
    chunk: int = 16,
    seed: int = 0,
) -> list[float]:
    """Train by DP-SGD (Abadi et al., 2016) and return the norm of every row's gradient, before clipping.

    In each step every row takes part with chance `sample_rate`, for itself: the accountant reckons with that. The
    optimizer may be any, as it sees nothing but the noisy gradient.

    Args:
        rows: Documents as ids. One row is what is protected: a person of 32 rows is not protected as well.
        n_steps: Number of updates.
        sample_rate: Above 0, at most 1; times the number of rows, what the sum is divided by.
        max_norm: Longest gradient of a row.
        noise_multiplier: Standard deviation of the noise, in units of `max_norm`; with 0 nothing is private.
        schedule: Of the step it returns the factor of the learning rates.
        chunk: Rows whose gradients are held at once.
        seed: Of sampling and noise. A generator of this kind is for study; a secret needs one that nobody can foresee.

    Raises:
        ValueError: A number is out of range, or there is no row.
    """
    whole_number("n_steps", n_steps)
    require("rows", len(rows), len(rows) > 0, "at least one")
    require("sample_rate", sample_rate, 0 < sample_rate <= 1, "above 0, at most 1")
    require("noise_multiplier", noise_multiplier, noise_multiplier >= 0, "at least 0")
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms_seen: list[float] = []
    for step in range(n_steps):
        # Poisson sampling: the number of rows differs from step to step.
        chosen = np.flatnonzero(rng.random(len(rows)) < sample_rate)
        places = sorted(chosen.tolist(), key=lambda i: len(rows[i]))
        sums = {name: torch.zeros_like(p) for name, p in trained.items()}
        for start in range(0, len(places), chunk):
            inputs, targets = pad_rows([rows[i] for i in places[start : start + chunk]])
            clipped, norms = clip_rows(per_sample_gradients(model, inputs, targets), max_norm)
            norms_seen += norms.tolist()
            sums = {name: total + clipped[name] for name, total in sums.items()}
        # The divisor is fixed: the true number of rows would tell who took part.
        for name, total in add_noise(sums, noise_multiplier * max_norm, generator).items():
            trained[name].grad = total / (sample_rate * len(rows))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1.0 if schedule is None else schedule(step))
        optimizer.step()
        optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return norms_seen


def privacy_spent(noise_multiplier: float, sample_rate: float, n_steps: int, delta: float) -> float:
    """Return epsilon of `train_privately`, reckoned by the accountant of Opacus (Gopi, Lee and Wutschitz, 2021).

    With it holds: whatever is done with the model, its chance with a row and without it differ at most by the factor
    exp(epsilon), but for a chance of `delta`.

    Raises:
        ValueError: A number is out of range; without noise there is no epsilon.
    """
    require("noise_multiplier", noise_multiplier, noise_multiplier > 0, "above 0")
    require("sample_rate", sample_rate, 0 < sample_rate <= 1, "above 0, at most 1")
    require("delta", delta, 0 < delta < 1, "between 0 and 1")
    from opacus.accountants import PRVAccountant  # takes seconds to import

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, whole_number("n_steps", n_steps))]
    with np.errstate(divide="ignore"):  # a logarithm of 0 on the way, where every row takes part
        return float(accountant.get_epsilon(delta))
