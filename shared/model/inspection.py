"""Looking into a `GPTModel`: the stream between its blocks, the weights of its heads, and what happens
without a head.

Everything is done by hooks, which are removed when a function returns: the model is not changed. It works
on every configuration of `GPTModel`.

Left out: replacing a head's result by its mean or by that of another text (activation patching), lenses
that are trained, single neurons, and other classes of models.

Follows nostalgebraist (2020, "interpreting GPT: the logit lens") and Olsson et al. (2022, "In-context
Learning and Induction Heads").

Explained and proven in ch05_pretraining/08_inside_a_real_model.ipynb; written from there by `make promote`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from shared.checks import check_sizes, require, whole_number
from shared.model.gpt import GPTModel
from shared.model.layers import check_width


@torch.no_grad()
def residual_stream(model: GPTModel, tokens: Tensor) -> Tensor:
    """Return what enters the first block and what leaves each: (n_layers + 1, batch, tokens, emb_dim).

    The last one is what the final norm is given. Hugging Face's `hidden_states` has the same, but for the last, which
    is normed there.

    Args:
        model: In evaluation mode.
        tokens: int64 ids (batch, tokens).

    Raises:
        ValueError: The model is in training mode, or it refuses the tokens.
    """
    _check_evaluating(model)
    states: list[Tensor] = []
    with ExitStack() as hooks:
        first = model.blocks[0].register_forward_pre_hook(lambda block, inputs: states.append(inputs[0]))
        hooks.enter_context(first)
        for block in model.blocks:
            hooks.enter_context(
                block.register_forward_hook(lambda block, inputs, output: states.append(output))
            )
        model.hidden_states(tokens)
    return torch.stack(states)


def _check_evaluating(model: GPTModel) -> None:
    require("model.training", model.training, not model.training, "False: call model.eval() first")


@torch.no_grad()
def logit_lens(model: GPTModel, stream: Tensor) -> Tensor:
    """Return the logits (..., vocab_size) of vectors (..., emb_dim) of the stream, as if the model ended there.

    The logit lens (nostalgebraist, 2020): the final norm and the output head, applied too early. Choose the places of
    interest first: each vector becomes `vocab_size` numbers. Raises ValueError if the width is not emb_dim.
    """
    check_width(stream, model.config.emb_dim)
    return model.output_head(model.final_norm(stream))


@torch.no_grad()
def attention_weights(model: GPTModel, tokens: Tensor) -> Tensor:
    """Return what each head gives to each token: (n_layers, batch, n_heads, tokens, tokens), rows that sum to 1.

    Entry [l, b, h, i, j] is the share that token i takes from token j in head h of block l. All weights are kept in
    memory at once, so use it on short texts.

    Args:
        model: In evaluation mode.
        tokens: int64 ids (batch, tokens).

    Raises:
        ValueError: The model is in training mode, or it refuses the tokens.
    """
    _check_evaluating(model)
    weights: list[Tensor] = []

    def ask(attention, inputs, options):
        return inputs, {**options, "need_weights": True}

    def keep(attention, inputs, output):
        weights.append(output[1])
        return output[0]

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.attention.register_forward_pre_hook(ask, with_kwargs=True))
            hooks.enter_context(block.attention.register_forward_hook(keep))
        model.hidden_states(tokens)
    return torch.stack(weights)


def repeated_tokens(vocab_size: int, n_rows: int, length: int, *, seed: int, first: int = 0) -> Tensor:
    """Return rows of `length` different random ids, each row twice in succession: int64 (n_rows, 2 * length).

    Args:
        vocab_size: Ids are below it.
        n_rows, length: Number of rows, and of ids before they are repeated.
        seed: Of the draws.
        first: Ids are not below it: special tokens often have the lowest ids.

    Raises:
        ValueError: A number is below 1, or there are fewer ids than `length`.
    """
    check_sizes(vocab_size=vocab_size, n_rows=n_rows, length=length)
    whole_number("first", first, 0)
    require(
        "length", length, length <= vocab_size - first, f"at most vocab_size - first={vocab_size - first}"
    )
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(vocab_size - first, generator=generator)[:length] + first for _ in range(n_rows)]
    return torch.stack(rows).repeat(1, 2)


def induction_scores(model: GPTModel, tokens: Tensor) -> Tensor:
    """Return how much each head looks at what followed the same token before: (n_layers, n_heads), from 0 to 1.

    The prefix-matching score of Olsson et al. (2022): the mean weight from each token of the second half to the token
    behind its first copy.

    Args:
        model: In evaluation mode.
        tokens: int64 ids (batch, 2 * length) as of `repeated_tokens`.

    Raises:
        ValueError: The second half is not the first, or has fewer than two tokens; as `attention_weights`.
    """
    length = tokens.shape[-1] // 2
    repeats = tokens.dim() == 2 and length >= 2 and torch.equal(tokens[:, :length], tokens[:, length:])
    require("tokens", tuple(tokens.shape), repeats, "at least two ids in each row, then the same ids again")
    stripe = attention_weights(model, tokens).diagonal(
        1 - length, -2, -1
    )  # (n_layers, batch, n_heads, length + 1)
    return stripe[..., 1:].mean(dim=(1, 3))  # the first looks from the last token of the first half


def previous_token_scores(model: GPTModel, tokens: Tensor) -> Tensor:
    """Return how much each head looks at the token before: (n_layers, n_heads), from 0 to 1.

    Args and errors are those of `attention_weights`; there must be at least two tokens.
    """
    require("tokens", tuple(tokens.shape), tokens.shape[-1] >= 2, "at least two tokens long")
    return attention_weights(model, tokens).diagonal(-1, -2, -1).mean(dim=(1, 3))


@contextmanager
def cut_heads(model: GPTModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Take heads out of the model for the length of a `with`: what they found is replaced by zeros.

    It holds for the model's own passes and for `generate`, if that is called inside. Several may be nested.

    Args:
        model: It is as before when the `with` ends, however it ends.
        heads: Pairs (layer, head), both counted from 0.

    Raises:
        ValueError: There is no such layer or head.
    """
    by_layer: dict[int, set[int]] = defaultdict(set)
    for layer, head in heads:
        for name, place, size in (("layer", layer, len(model.blocks)), ("head", head, model.config.n_heads)):
            whole_number(name, place, 0)
            require(name, place, place < size, f"below {size}")
        by_layer[layer].add(head)
    with ExitStack() as hooks:
        for layer, cut in by_layer.items():
            attention = model.blocks[layer].attention
            kept = torch.ones(attention.n_heads, 1)
            kept[sorted(cut)] = 0.0

            def mask(output, inputs, kept=kept, head_dim=attention.head_dim):
                found = inputs[0].unflatten(-1, (-1, head_dim))  # (batch, tokens, n_heads, head_dim)
                return ((found * kept.to(found)).flatten(-2),)

            hooks.enter_context(attention.output.register_forward_pre_hook(mask))
        yield
