"""A model small enough to train in a test, and batches for it."""

import torch

from shared.model.gpt import GPTConfig, GPTModel


def build(seed: int = 0, **options) -> GPTModel:
    shape = {"vocab_size": 20, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    torch.manual_seed(seed)
    return GPTModel(GPTConfig(**{**shape, "dropout": 0.0, **options}))


def random_batch(rows: int = 4, tokens: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]
