"""Small decoders that the tests of this room share, and a slow way to generate that they are compared with."""

import random

import torch
from torch import nn

from shared.generation.engine import choose_tokens, evaluating
from shared.model.gpt import GPTConfig, GPTModel
from tests.configurations import LLAMA

SMALL = {"vocab_size": 40, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "dropout": 0.1}
VARIANTS = {
    "gpt2": {},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "n_kv_heads": 1, "qk_norm": True},
    "mistral": {**LLAMA, "window": 3},
    "mixtral": {**LLAMA, "feed_forward": "moe", "feed_forward_dim": 8, "n_experts": 3},
    "no positions": {"positions": "none"},
    "post-norm": {"pre_norm": False},
}


def build(seed: int = 0, **options) -> GPTModel:
    """A small float64 model, in training mode as it comes, with weights large enough that texts vary."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(**{**SMALL, **options})).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


MODELS = {name: build(**options) for name, options in VARIANTS.items()}
MODEL = MODELS["gpt2"]


@torch.no_grad()
def slowly(model, prompt, n, *, temperature=0.0, processors=(), stop_tokens=(), seed=0, slide=False):
    """The same without cache, batch and stream: every token from a pass over all visible ones."""
    limit, ids, begin = model.config.context_length, list(prompt), 0
    uniforms = torch.empty(n, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(seed))
    with evaluating(model):
        for i in range(n):
            if slide and len(ids) - begin > limit:
                begin = len(ids) - limit // 2
            logits = model(torch.tensor([ids[begin:]]))[:, -1]
            for processor in processors:
                logits = processor(torch.tensor([ids]), logits)
            token = int(choose_tokens(logits, temperature, uniforms[i : i + 1]))
            if token in stop_tokens:
                break
            ids.append(token)
    return ids[len(prompt) :]


def random_prompts(rng: random.Random, n: int, longest: int = 12, vocab_size: int = 40) -> list[list[int]]:
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(n)]


class Told(nn.Module):
    """A decoder without a cache that gives the same logits (vocab_size,), or those of each step, whatever it reads."""

    def __init__(self, *logits: torch.Tensor, context_length: int = 300) -> None:
        super().__init__()
        self.logits, self.n_calls = logits, 0
        self.config = GPTConfig(vocab_size=len(logits[0]), context_length=context_length)
        self.weight = nn.Parameter(torch.zeros(()))

    def new_caches(self, max_length: int | None = None) -> list:
        return []

    def forward(self, tokens: torch.Tensor, **options: object) -> torch.Tensor:
        step = self.logits[min(self.n_calls, len(self.logits) - 1)]
        self.n_calls += 1
        return step.expand(len(tokens), 1, -1)


# Logits from which nothing can be chosen, and what the error calls them.
NOT_A_NUMBER, INFINITE = float("nan"), float("inf")
BROKEN = {
    "nan": torch.full((6,), NOT_A_NUMBER),
    "one nan": torch.tensor([0.0, 1.0, NOT_A_NUMBER, 2.0, 0.0, 0.0]),
    "nan and inf": torch.tensor([0.0, INFINITE, NOT_A_NUMBER, 2.0, 0.0, 0.0]),
    "inf": torch.tensor([0.0, INFINITE, 0.0, 2.0, 0.0, 0.0]),
    "only -inf": torch.full((6,), -INFINITE),
}
SAID = {"nan": "nan", "one nan": "nan", "nan and inf": "nan", "inf": "inf", "only -inf": "only -inf"}
HEALTHY = torch.tensor([0.0, -INFINITE, 0.0, 5.0, 0.0, -INFINITE])


def broken_weights() -> GPTModel:
    """A GPT with one weight that is no number."""
    model = build()
    model.final_norm.weight.data[3] = NOT_A_NUMBER
    return model


def random_gpt(vocab_size: int, seed: int, dtype: torch.dtype = torch.float64) -> GPTModel:
    """A small GPT-2 in evaluation mode."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(vocab_size, context_length=20, emb_dim=16, n_heads=2, n_layers=2, dropout=0.0))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()
