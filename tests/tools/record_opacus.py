"""Write `tests/safety/opacus_values.json`: what Opacus computes for a tiny model, for tests that do without it.

    python -m tests.tools.record_opacus

The tests compare with this file. It is made anew only when Opacus is believed to have changed.
"""

import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tools.architecture import ROOT

VALUES = ROOT / "tests" / "safety" / "opacus_values.json"
MAX_NORM = 0.05
SETTINGS = ((1.0, 0.1, 100, 1e-5), (2.0, 0.01, 1000, 1e-5), (0.8, 0.25, 40, 1e-3), (4.0, 1.0, 1, 1e-5))


class Bigram(nn.Module):
    """Embedding, a hidden layer and a head: the smallest model whose gradients go through all three."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, tokens, 7)."""
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def tiny() -> tuple[Bigram, Tensor, Tensor]:
    """Return the model with weights that need no random generator, and a batch of three rows."""
    model = Bigram()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_(torch.sin(places * 1.7 + number).reshape(parameter.shape) * 0.5)
    inputs = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 6], [5, 0, 5, 0]])
    targets = torch.tensor([[1, 2, 3, 4], [4, 4, 6, 6], [0, 5, 0, 5]])
    return model, inputs, targets


def record(path: Path = VALUES) -> None:
    """Compute everything with Opacus, and write it."""
    import opacus
    from opacus import GradSampleModule
    from opacus.accountants import PRVAccountant, RDPAccountant
    from opacus.optimizers import DPOptimizer

    warnings.filterwarnings("ignore")
    model, inputs, targets = tiny()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    losses = F.cross_entropy(wrapped(inputs).transpose(1, 2), targets, reduction="none").mean(dim=1)
    losses.sum().backward()
    per_sample = {name: p.grad_sample.clone() for name, p in model.named_parameters()}
    # Clipped and summed without noise, over an expected batch of 2: what a step would be given.
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=MAX_NORM,
        expected_batch_size=2,
    )
    optimizer.pre_step()
    spent = []
    for noise, rate, steps, delta in SETTINGS:
        row = [noise, rate, steps, delta]
        for kind in (RDPAccountant, PRVAccountant):
            accountant = kind()
            accountant.history = [(noise, rate, steps)]
            row.append(float(accountant.get_epsilon(delta)))
        spent.append(row)
    found = {
        "opacus": opacus.__version__,
        "max_norm": MAX_NORM,
        "expected_batch": 2,
        "per_sample": {name: value.tolist() for name, value in per_sample.items()},
        "clipped": {name: p.grad.tolist() for name, p in model.named_parameters()},
        "spent": spent,
    }
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
