"""Healthy runs and faulty ones for `diagnose`, none of which had a part in choosing its checks and their ranges.

`tests.benchmarks.diagnosis` prints what it says of each. The chapter's own runs, on which the ranges were set, are
others: tales of 64 tokens, two blocks of width 32, a rate of 0.01.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shared.data.corpus import load_reviews, load_sms, load_stories
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding
from shared.training.batches import Batch, document_row, row_batches, shuffled_rows
from shared.training.diagnosis import Check, Optimizers, diagnose
from shared.training.optimizers import build_optimizers

V = 2048
GPT2 = {"vocab_size": V, "context_length": 128, "emb_dim": 64, "n_heads": 4, "n_layers": 3, "dropout": 0.0}
LLAMA = {
    **GPT2,
    "norm": "rmsnorm",
    "positions": "rotary",
    "feed_forward": "swiglu",
    "bias": False,
    "qkv_bias": False,
}


@dataclass(frozen=True)
class Case:
    """A run before it begins, and what `diagnose` should say first; None where nothing is wrong."""

    config: GPTConfig
    batches: Callable[[int], list[Batch]]
    optimizers: Callable[[nn.Module], Optimizers]
    n_steps: int
    wanted: str | None = None
    change: Callable[[nn.Module], nn.Module] = lambda model: model

    def checks(self, seed: int) -> list[Check]:
        """Return what `diagnose` finds."""
        torch.manual_seed(seed)
        model = self.change(GPTModel(self.config))
        return diagnose(model, self.batches(seed), self.optimizers, self.n_steps)


def using(name: str, rate: float) -> Callable[[nn.Module], Optimizers]:
    return lambda model: build_optimizers(model, name, rate)


# --- data


def rows_of(texts: Sequence[str], limit: int = 97) -> list[list[int]]:
    return [document_row(text, tale_encoding())[:limit] for text in texts]


def messages(seed: int, size: int = 8) -> list[Batch]:
    """Short messages, those of a batch of similar length."""
    rows = rows_of([sms.text for sms in load_sms()[:400]])
    return list(row_batches(shuffled_rows(rows, seed=seed, epochs=1), size, seed=seed))


def reviews(seed: int) -> list[Batch]:
    rows = rows_of([review.text for review in load_reviews()[:240]])
    return list(row_batches(shuffled_rows(rows, seed=seed, epochs=1), 8, seed=seed, pool=1))


def windows(seed: int, encode: Callable[[str], Sequence[int]]) -> list[Batch]:
    """Windows of 64 tokens of the stories, shuffled."""
    ids = torch.tensor(encode("\n\n".join(story.text for story in load_stories())))
    parts = ids[: len(ids) // 65 * 65].view(-1, 65)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))[:320]
    return [(part[:, :-1], part[:, 1:]) for part in parts[order].split(8)]


def story_tokens(seed: int) -> list[Batch]:
    return windows(seed, tale_encoding().encode_ordinary)


def story_bytes(seed: int) -> list[Batch]:
    return windows(seed, lambda text: list(text.encode()))


HEALTHY = {
    "bytes, AdamW 3e-4": Case(GPTConfig.preset("bytes-tiny"), story_bytes, using("adamw", 3e-4), 2_000),
    "messages, AdamW 6e-4": Case(GPTConfig(**LLAMA), messages, using("adamw", 6e-4), 3_000),
    "width 128, AdamW 3e-4": Case(
        GPTConfig.preset("tales-1m"),
        story_tokens,
        lambda model: torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1),
        5_000,
    ),
    "six blocks, dropout 0.3, untied": Case(
        GPTConfig(**{**GPT2, "n_layers": 6, "dropout": 0.3, "tie_weights": False}),
        reviews,
        using("adamw", 1e-3),
        1_000,
    ),
    "post-norm, sinusoidal, Adam": Case(
        GPTConfig(**{**GPT2, "pre_norm": False, "positions": "sinusoidal"}),
        story_tokens,
        using("adam", 5e-4),
        2_000,
    ),
    "four experts, Lion": Case(
        GPTConfig(**{**LLAMA, "feed_forward": "moe", "n_experts": 4}), messages, using("lion", 1e-4), 3_000
    ),
    "eight blocks, grouped heads, Muon": Case(
        GPTConfig(**{**LLAMA, "n_layers": 8, "n_kv_heads": 2, "qk_norm": True}),
        story_tokens,
        using("muon", 3e-3),
        800,
    ),
    "first weights of 0.09": Case(
        GPTConfig(**{**LLAMA, "init_std": 0.09}), reviews, using("adamw", 3e-3), 600
    ),
}

# --- faults

SOUND = Case(GPTConfig(**GPT2), story_tokens, using("adamw", 1e-3), 1_000)


def behind(seed: int) -> list[Batch]:
    """The target is the token before."""
    return [(targets, inputs) for inputs, targets in story_tokens(seed)]


def twice(seed: int) -> list[Batch]:
    """Shifted by the loader and by the loss."""
    return [(inputs[:, :-1], targets[:, 1:]) for inputs, targets in story_tokens(seed)]


def one_source_after_the_other(seed: int) -> list[Batch]:
    """First all messages, then all reviews."""
    return messages(seed)[:25] + reviews(seed)[:25]


def rows_mixed_up(seed: int) -> list[Batch]:
    """The targets belong to another row."""
    return [(inputs, targets.roll(1, dims=0)) for inputs, targets in story_tokens(seed)]


class Probabilities(nn.Module):
    """Softmax inside the model, and once more inside the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).softmax(dim=-1)


class ByPosition(nn.Module):
    """Reads the same tokens whatever it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(torch.zeros_like(ids))[:, :1].expand(-1, ids.shape[1], -1)


def see_the_future(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attention.causal = False
    return model


def uphill(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, maximize=True)


MODEL = "anything above; model; loss"
FAULTS = {
    "targets one behind": replace(SOUND, batches=behind, wanted="shift of the targets"),
    "targets shifted twice": replace(SOUND, batches=twice, wanted="shift of the targets"),
    "targets of another row": replace(SOUND, batches=rows_mixed_up, wanted="shift of the targets"),
    "one source after the other": replace(
        SOUND, batches=one_source_after_the_other, wanted="data not shuffled"
    ),
    "first weights of 0.3": replace(
        SOUND, config=replace(SOUND.config, init_std=0.3), wanted="initial weights"
    ),
    "first weights of 0.0001": replace(
        SOUND, config=replace(SOUND.config, init_std=1e-4), wanted="initial weights"
    ),
    "rate of 0.1": replace(
        SOUND, optimizers=using("adamw", 0.1), wanted="learning rate too high, no warm-up"
    ),
    "rate of 3e-6": replace(SOUND, optimizers=using("adamw", 3e-6), wanted="learning rate too low"),
    "softmax twice": replace(SOUND, change=Probabilities, wanted=MODEL),
    "deaf to its input": replace(SOUND, change=ByPosition, wanted=MODEL),
    "uphill": replace(SOUND, optimizers=uphill, wanted=MODEL),
    "attention sees the future": replace(SOUND, change=see_the_future, wanted=MODEL),
}


def first_suspect(checks: Sequence[Check]) -> str | None:
    """Return what the first check that has not passed suspects."""
    return next((check.suspect for check in checks if not check.passed), None)
