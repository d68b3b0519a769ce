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


def random_gpt(vocab_size: int, seed: int, dtype: torch.dtype = torch.float64) -> GPTModel:
    """A small GPT-2 in evaluation mode."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(vocab_size, context_length=20, emb_dim=16, n_heads=2, n_layers=2, dropout=0.0))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()
