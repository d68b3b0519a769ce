"""Recurrent sequence-to-sequence models: GRU, encoder-decoder, additive attention, greedy and beam decoding.

The encoder-decoder has one fixed vector between its halves, or attention. The decoders work with every
model that offers `encode` and `decode_step`, a Transformer included. Padding never changes a result.
Leaves out: several layers, dropout, length normalisation in the beam search. Follows Cho et al. (2014)
for the unit and the fixed vector, and Bahdanau, Cho and Bengio (2015) for attention; the order of the
gates and the names of the weights are those of torch.nn.GRUCell, so that its state dictionaries load.

Explained and proven in ch03_attention/01_seq2seq.ipynb; written from there by `make promote`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checks import check_sizes


class GRUCell(nn.Module):
    """One step of a gated recurrent unit (Cho et al. 2014, in the variant of `torch.nn.GRUCell`).

    An input vector has `input_size` D numbers, the state has `hidden_size` H. Raises ValueError if one is below 1.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        self.hidden_size = hidden_size
        # The rows are the reset gate's, the update gate's and the proposal's, H each.
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)

    def project(self, inputs: Tensor) -> Tensor:
        """Return the part of the gates that depends on the inputs only: (..., D) -> (..., 3H)."""
        return F.linear(inputs, self.weight_ih, self.bias_ih)

    def step(self, projected: Tensor, hidden: Tensor) -> Tensor:
        """Return the next state (B, H) from a projected input (B, 3H) and the state (B, H)."""
        gates_size = 2 * self.hidden_size
        recurrent = F.linear(hidden, self.weight_hh, self.bias_hh)  # (B, 3H)
        gates = torch.sigmoid(projected[:, :gates_size] + recurrent[:, :gates_size])
        reset, update = gates.chunk(2, dim=1)  # (B, H) each
        proposal = torch.tanh(projected[:, gates_size:] + reset * recurrent[:, gates_size:])
        return torch.lerp(proposal, hidden, update)  # (1 - update) * proposal + update * hidden

    def forward(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """Return the next state (B, H) from inputs (B, D) and the state (B, H)."""
        return self.step(self.project(inputs), hidden)


class GRU(nn.Module):
    """A gated recurrent unit run over sequences, from left to right or, if `reverse`, from right to left."""

    def __init__(self, input_size: int, hidden_size: int, reverse: bool = False) -> None:
        super().__init__()
        self.cell = GRUCell(input_size, hidden_size)
        self.reverse = reverse

    def forward(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states at all positions (B, S, H) and the state after the last one read (B, H).

        The inputs are (B, S, D). Where the mask (B, S) is False the state stays as it was.
        """
        projected = self.cell.project(inputs).unbind(1)  # S times (B, 3H)
        real = mask.unsqueeze(2).unbind(1)  # S times (B, 1)
        hidden = inputs.new_zeros(inputs.shape[0], self.cell.hidden_size)
        states = [hidden] * len(projected)
        step = -1 if self.reverse else 1
        for position in range(len(projected))[::step]:
            new = self.cell.step(projected[position], hidden)
            hidden = states[position] = torch.where(real[position], new, hidden)
        return torch.stack(states, dim=1), hidden


State = dict[str, Tensor]


class SequenceModel(Protocol):
    """What decoding asks of a model; a Transformer can offer it as well."""

    def encode(self, source_ids: Tensor, source_mask: Tensor) -> State:
        """Return the state before the first output symbol; each tensor has the batch as first dimension."""

    def decode_step(self, previous_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Return logits (B, V) for the next symbol and the next state, given the symbols before (B,)."""


class EncoderDecoder(nn.Module):
    """A bidirectional GRU encoder and a GRU decoder, with one fixed vector between them or with attention.

    Args:
        vocab_size: Number V of symbols, shared by input and output.
        embedding_size: Length of a symbol's vector.
        hidden_size: Length H of each direction's state and of the decoder's state.
        attention_size: Hidden units of additive attention (Bahdanau, Cho and Bengio 2015). None gives the decoder
            the same vector of 2H numbers at every step (Cho et al. 2014).

    Raises ValueError if a size is below 1.
    """

    def __init__(
        self, vocab_size: int, embedding_size: int, hidden_size: int, attention_size: int | None = None
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, embedding_size=embedding_size)
        self.vocab_size = vocab_size
        self.source_embedding = nn.Embedding(vocab_size, embedding_size)
        self.target_embedding = nn.Embedding(vocab_size, embedding_size)
        self.read_forward = GRU(embedding_size, hidden_size)
        self.read_backward = GRU(embedding_size, hidden_size, reverse=True)
        self.start = nn.Linear(2 * hidden_size, hidden_size)
        self.cell = GRUCell(embedding_size + 2 * hidden_size, hidden_size)
        self.output = nn.Linear(3 * hidden_size, vocab_size)
        self.attention = None
        if attention_size is not None:
            self.attention = AdditiveAttention(hidden_size, 2 * hidden_size, attention_size)

    def encode(self, source_ids: Tensor, source_mask: Tensor) -> State:
        """Read inputs (B, S), with a mask (B, S) that is True at real symbols; return the decoder's first state.

        Raises ValueError if a shape is wrong, an id is not in the vocabulary, or a row is empty.
        """
        _check_ids("source_ids", source_ids, self.vocab_size)
        if source_mask.shape != source_ids.shape or source_mask.dtype != torch.bool:
            found = f"{source_mask.dtype} {tuple(source_mask.shape)}"
            raise ValueError(f"source_mask must be bool {tuple(source_ids.shape)}, got {found}")
        if not source_mask.any(dim=1).all():
            raise ValueError("source_mask has a row without a real symbol; an input must not be empty")
        inputs = self.source_embedding(source_ids)  # (B, S, E)
        left_states, left_last = self.read_forward(inputs, source_mask)
        right_states, right_last = self.read_backward(inputs, source_mask)
        last = torch.cat([left_last, right_last], dim=1)  # (B, 2H)
        state = {"hidden": torch.tanh(self.start(last))}
        if self.attention is None:
            return state | {"context": last}
        memory = torch.cat([left_states, right_states], dim=2)  # (B, S, 2H)
        return state | {"memory": memory, "keys": self.attention.key(memory), "mask": source_mask}

    def decode_step(self, previous_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Return logits (B, V) for the symbol after `previous_ids` (B,), and the next state.

        With attention the next state holds the weights of this step (B, S) under `"alignment"`. Raises
        ValueError if `previous_ids` has another shape or an id that is not in the vocabulary.
        """
        _check_ids("previous_ids", previous_ids.unsqueeze(-1), self.vocab_size, len(state["hidden"]))
        state, features = self._advance(self.target_embedding(previous_ids), state)
        return self.output(features), state

    def forward(self, source_ids: Tensor, source_mask: Tensor, target_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) by teacher forcing: each position sees the right symbols and predicts the next.

        `target_ids` (B, T) are the outputs from the start symbol on. Raises ValueError as `encode`, and if the
        targets have another shape or ids that are not in the vocabulary.
        """
        state = self.encode(source_ids, source_mask)
        _check_ids("target_ids", target_ids, self.vocab_size, len(source_ids))
        features = []
        for embedded in self.target_embedding(target_ids).unbind(1):  # T times (B, E)
            state, now = self._advance(embedded, state)
            features.append(now)
        return self.output(torch.stack(features, dim=1))

    def _advance(self, embedded: Tensor, state: State) -> tuple[State, Tensor]:
        """Return the next state, and what the output layer reads: decoder state and context (B, 3H)."""
        if self.attention is None:
            context = state["context"]
        else:
            inputs = (state[name] for name in ("hidden", "keys", "memory", "mask"))
            context, alignment = self.attention(*inputs)
            state = state | {"alignment": alignment}
        hidden = self.cell(torch.cat([embedded, context], dim=1), state["hidden"])
        return state | {"hidden": hidden}, torch.cat([hidden, context], dim=1)


def _check_ids(name: str, ids: Tensor, vocab_size: int, batch_size: int | None = None) -> None:
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.int64:
        found = f"{ids.dtype} {tuple(ids.shape)}"
        raise ValueError(f"{name} must be int64 (batch, length), not empty, got {found}")
    if batch_size is not None and len(ids) != batch_size:
        raise ValueError(f"{name} has {len(ids)} rows for {batch_size} inputs")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} must be ids from 0 to {vocab_size - 1}, got {low} to {high}")


class AdditiveAttention(nn.Module):
    """Weights over the positions of a memory by a small network, and the weighted mean (Bahdanau et al. 2015).

    A query has `query_size` numbers, a memory vector `memory_size` M; the scoring network has `attention_size` A
    hidden units. Raises ValueError if a size is below 1.
    """

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        check_sizes(query_size=query_size, memory_size=memory_size, attention_size=attention_size)
        self.query = nn.Linear(query_size, attention_size, bias=False)
        self.key = nn.Linear(memory_size, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the memory (B, M) and its weights (B, S), which are 0 where the mask is False.

        The query is (B, query_size), `memory` (B, S, M), and `keys` is `key(memory)` (B, S, A), computed once an
        input. The mask (B, S) is True at real positions, at least one in each row.
        """
        scores = self.score(torch.tanh(keys + self.query(query).unsqueeze(1))).squeeze(2)  # (B, S)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


@torch.no_grad()
def check_logits(logits: Tensor) -> None:
    """Refuse logits (B, V) with a row from which no symbol can be chosen: ValueError for NaN, inf or only -inf."""
    if not logits.amax(dim=1).isfinite().all():
        raise ValueError(
            "logits must be numbers or -inf, with at least one number a row; the model is broken"
        )


def greedy_decode(
    model: SequenceModel, source_ids: Tensor, source_mask: Tensor, start_id: int, end_id: int, max_length: int
) -> list[list[int]]:
    """Return for each input the ids written by taking the most probable symbol at each step.

    Inputs and mask are (B, S). An output holds at most `max_length` symbols; start and end are left out. The model
    is used in the mode it is in: call `model.eval()` before. Raises ValueError if `max_length` is below 1 or the
    model refuses the input or gives no numbers.
    """
    check_sizes(max_length=max_length)
    state = model.encode(source_ids, source_mask)
    previous = source_ids.new_full((len(source_ids),), start_id)
    ended = torch.zeros_like(previous, dtype=torch.bool)
    steps = []
    for _ in range(max_length):
        logits, state = model.decode_step(previous, state)
        check_logits(logits)
        previous = logits.argmax(dim=1)  # (B,)
        ended |= previous == end_id
        steps.append(previous)  # what follows an end is cut off below
        if ended.all():
            break
    rows = torch.stack(steps, dim=1).tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


@dataclass(frozen=True)
class Hypothesis:
    """A sequence in a beam search: ids without start and end, natural log of its probability, end written or not."""

    ids: tuple[int, ...]
    log_probability: float
    finished: bool


@torch.no_grad()
def beam_decode(
    model: SequenceModel,
    source_ids: Tensor,
    source_mask: Tensor,
    start_id: int,
    end_id: int,
    max_length: int,
    beam_size: int,
) -> list[Hypothesis]:
    """Return the `beam_size` best sequences that a beam search finds for one input, the most probable first.

    A beam of 1 is greedy decoding; a beam that is never full is complete enumeration. Scores are sums of
    log-probabilities, without length normalisation. The other arguments are those of `greedy_decode`.
    There is one input (1, S). An output with `max_length` symbols and no end is returned unfinished. Raises
    ValueError if `beam_size` or `max_length` is below 1, there is not one input, or the model refuses it.
    """
    check_sizes(beam_size=beam_size, max_length=max_length)
    if len(source_ids) != 1:
        raise ValueError(f"source_ids must be one row, got {len(source_ids)}")
    state = model.encode(source_ids, source_mask)
    beam = [Hypothesis((), 0.0, False)]
    for _ in range(max_length):
        # The rows of `state` are the unfinished hypotheses, in the order of the beam.
        growing = [hypothesis for hypothesis in beam if not hypothesis.finished]
        if not growing:
            break
        # One step of the model for all of them together.
        previous = source_ids.new_tensor([h.ids[-1] if h.ids else start_id for h in growing])
        logits, state = model.decode_step(previous, state)
        check_logits(logits)
        scores = logits.double().log_softmax(dim=1)  # (hypotheses, V)
        scores = scores + scores.new_tensor([h.log_probability for h in growing]).unsqueeze(1)
        # The best continuations of any hypothesis, beside those that have ended (row -1).
        best = scores.flatten().topk(min(beam_size, scores.numel()))
        candidates = [(h, -1) for h in beam if h.finished]
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row, symbol = divmod(place, scores.shape[1])
            finished = symbol == end_id
            ids = growing[row].ids if finished else (*growing[row].ids, symbol)
            candidates.append((Hypothesis(ids, score, finished), row))
        # The best of both stay, and of the state the rows of those that still grow.
        candidates.sort(key=lambda candidate: -candidate[0].log_probability)
        beam = [hypothesis for hypothesis, _ in candidates[:beam_size]]
        kept = [row for hypothesis, row in candidates[:beam_size] if not hypothesis.finished]
        state = {name: tensor[kept] for name, tensor in state.items()}
    return beam
