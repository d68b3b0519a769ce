"""How far a checkpoint's distribution of the next token is from the grammar's, and how much of it cannot come at all.

    python -m tests.benchmarks.outside_grammar tales-1m tales-tiny --stories 200

For each token of new stories (seed 4242) the grammar's distribution is known. Printed are means over stories, in nats:
the distance to it (Kullback-Leibler divergence, the model's expected loss less the entropy), the part of the distance
that comes from probability for tokens that cannot stand there, and the share of that probability that falls on tokens
that stand earlier in the story. The mean of exp(-part) estimates the share of sampled stories that are whole.
"""

import argparse

import numpy as np
import torch

from shared.model.gpt import GPTModel
from shared.tales.distribution import expected_loss, next_tokens
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.batches import document_row
from shared.weights.pretrained import load_pretrained


@torch.no_grad()
def measure(model: GPTModel, texts: list[str]) -> tuple[float, float, float, float]:
    """Return distance and its part from outside, in nats a story, the share of tokens used before, whole stories."""
    distance = mass = used = 0.0
    parts = []
    for text in texts:
        row, known = document_row(text, tale_encoding()), next_tokens(text)
        logits = model(torch.tensor([row[:-1]]))  # (1, tokens, vocab_size)
        losses, outside = expected_loss(logits, [known])
        entropy = -(known.probabilities * np.log(known.probabilities)).sum()
        distance += losses.double().sum().item() - entropy
        parts.append(outside.double().sum().item())
        chances = logits[0].softmax(dim=-1)
        places = np.repeat(np.arange(len(known.counts)), known.counts)
        chances[places, known.ids] = 0
        earlier = torch.zeros_like(chances, dtype=torch.bool)
        earlier[torch.arange(1, len(row) - 1), row[1:-1]] = True  # the token before each place
        mass += chances.sum().item()
        used += (chances * (earlier.cumsum(dim=0) > 0)).sum().item()
    return distance / len(texts), np.mean(parts), used / mass, np.exp(-np.array(parts)).mean()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="+", help="names of shipped checkpoints, or folders")
    parser.add_argument("--stories", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4242)
    given = parser.parse_args()
    texts = [story.text for story in TaleGenerator(given.seed).stories(given.stories)]
    for name in given.checkpoint:
        distance, part, used, whole = measure(load_pretrained(name), texts)
        print(
            f"{name}: {distance:.3f} nats a story from the grammar's distribution, {part:.3f} of them by tokens that "
            f"cannot come, {100 * used:.0f} % of these used before; whole stories expected: {100 * whole:.1f} %"
        )


if __name__ == "__main__":
    main()
