"""Runners of chapter 1's race that later chapters do not build: rules by hand, a feed-forward and a recurrent network.

They are black boxes there, small and plain. Left out: everything that would make them faster or better, such as
dropout, several layers, or a softmax in groups.

`FeedForwardLM` follows Bengio, Ducharme, Vincent and Jauvin (2003), "A Neural Probabilistic Language Model", without
its direct connections from the input to the output; `RecurrentLM` is a GRU (Cho et al., 2014) between two tables.
Recurrent networks as language models are due to Mikolov et al. (2010).
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checks import check_sizes, check_text, whole_number

# What the hand-written rules can say: sentences one after the other, each a row of choices.
RULES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("One morning ", "Long ago ", "On a Sunday "),
        ("Anna", "Clara", "Elena"),
        (" lost ", " found ", " hid ", " sold "),
        ("a red ", "a blue ", "a silver "),
        ("scarf", "kite", "clock", "map"),
        (" near the ", " behind the "),
        ("library. ", "bakery. ", "river. ", "school. "),
    ),
    (
        ("A ", "Then a ", "At noon a "),
        ("baker", "farmer", "doctor", "nurse"),
        (" saw it and ", " heard of it and "),
        ("laughed. ", "helped her. ", "ran away. ", "asked for soup. "),
    ),
    (
        ('"Thank you," she said', '"What a day," she said', '"Never again," she said'),
        (", and went home.", ", and began to sing.", ", and ate an apple."),
    ),
)


class RuleWriter:
    """Stories by hand-written rules: each choice is made by chance, every alternative alike.

    Args:
        rules: Sentences, each a row of choices, each choice some alternatives.

    Raises:
        ValueError: A choice has no alternative.
    """

    def __init__(self, rules: Sequence[Sequence[Sequence[str]]] = RULES) -> None:
        self.choices = [tuple(choice) for sentence in rules for choice in sentence]
        if not all(self.choices):
            raise ValueError(f"rules must have an alternative for each choice, got {rules!r:.80}")

    @property
    def n_stories(self) -> int:
        """How many different rows of choices there are."""
        return math.prod(map(len, self.choices))

    def sample(self, seed: int) -> str:
        """Return a story; the same seed gives the same one."""
        draw = random.Random(seed).random
        return "".join(choice[int(draw() * len(choice))] for choice in self.choices)

    def probability(self, text: str) -> float:
        """Return the probability of writing exactly this text: 0 for whatever the rules do not foresee."""
        check_text("text", text)
        reached = {0: 1.0}  # place in the text -> probability of having written it up to there
        for choice in self.choices:
            further: dict[int, float] = {}
            for place, chance in reached.items():
                for words in choice:
                    if text.startswith(words, place):
                        end = place + len(words)
                        further[end] = further.get(end, 0.0) + chance / len(choice)
            reached = further
        return reached.get(len(text), 0.0)


class FeedForwardLM(nn.Module):
    """Predict a token from the `context` tokens before it, which are put side by side into one hidden layer.

    Args:
        vocab_size: Number of tokens.
        context: How many earlier tokens it sees, and no more.
        emb_dim: Width of a token's vector.
        hidden_size: Width of the hidden layer.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, vocab_size: int, context: int, emb_dim: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, context=context, emb_dim=emb_dim, hidden_size=hidden_size)
        self.context = context
        self.embedding = nn.Embedding(vocab_size, emb_dim)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.hidden = nn.Linear(context * emb_dim, hidden_size)
        self.output = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, tokens, vocab_size); before the first token stand vectors of zeros."""
        vectors = F.pad(self.embedding(tokens), (0, 0, self.context - 1, 0))  # (B, context - 1 + T, E)
        windows = vectors.unfold(1, self.context, 1)  # (B, T, E, context)
        return self.output(torch.tanh(self.hidden(windows.flatten(2))))


class RecurrentLM(nn.Module):
    """Predict a token from a state that has read all tokens before it, one after the other.

    Args:
        vocab_size: Number of tokens.
        emb_dim: Width of a token's vector.
        hidden_size: Width of the state.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, vocab_size: int, emb_dim: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, emb_dim=emb_dim, hidden_size=hidden_size)
        self.embedding = nn.Embedding(vocab_size, emb_dim)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.gru = nn.GRU(emb_dim, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, tokens, vocab_size)."""
        states, _ = self.gru(self.embedding(tokens))  # (B, T, H)
        return self.output(states)


@torch.no_grad()
def sample_ids(model: nn.Module, first: int, n: int, *, seed: int, stop: int | None = None) -> list[int]:
    """Draw up to `n` ids after the id `first` from any model that returns logits, reading everything anew each time.

    Args:
        model: Called as model(ids (1, tokens)) it returns logits (1, tokens, vocab_size).
        first: Where the text begins; it is not returned.
        n: How many, at least 1.
        seed: Of the draws.
        stop: The id to stop at; it is not returned.

    Raises:
        ValueError: n is below 1.
    """
    whole_number("n", n)
    generator, ids = torch.Generator().manual_seed(seed), [first]
    for _ in range(n):
        probabilities = model(torch.tensor([ids]))[0, -1].double().softmax(-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == stop:
            return ids[1:-1]
    return ids[1:]
