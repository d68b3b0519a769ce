"""A step of decoding without the cost of calling modules: the same arithmetic, everything looked up once.

A small model spends more time between its operations than in them: each call of a module costs time, and
so does each check of a shape. While text is being written, the modules and the shapes stay the same from
token to token. So a function is put together once and called for each token. It is built from the model's
own parts: a part that it does not know (an adapter, a mixture of experts, a module with hooks) is called
as the module it is, and a model that it does not know is run as always.

Left out: windows, post-norm blocks and interleaved rotary positions, which are run as always.

Explained and proven in ch04_gpt/04_fast_generation.ipynb; written from there by `make promote`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.model.attention import KeyValueCache, MultiHeadAttention, causal_mask
from shared.model.gpt import GPTModel
from shared.model.layers import FeedForward, LayerNorm, RMSNorm, SwiGLU, TransformerBlock
from shared.model.positions import RotaryPositions

# Called as step(tokens, positions, mask, caches): tokens int64 (rows, n), the newest of each row, in most cases one;
# positions int64 (rows, n), or None to count on from the caches; mask bool (rows, keys), True for what is no padding,
# or None; one cache a block, which receives the tokens. It returns the logits (rows, n, vocab_size).
Step = Callable[[Tensor, Tensor | None, Tensor | None, Sequence[KeyValueCache]], Tensor]


def decode_step(model: nn.Module) -> Step:
    """Return a function that computes what `model` computes for a few new tokens a row, with the least overhead.

    The model must be in evaluation mode, the function be called without gradients. It holds on to the weights: build a
    new one after they or the model's parts have been replaced.
    """
    if _is_plain(model):
        return _fast_step(model)

    def step(tokens, positions, mask, caches):
        return model(tokens, positions=positions, key_padding_mask=mask, caches=caches)

    return step


def as_function(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that computes what `module` computes, or the module itself if it is of no known kind."""
    if _has_hooks(module):
        return module
    kind = type(module)  # a subclass may do anything
    if kind is nn.Linear:
        return lambda x, weight=module.weight, bias=module.bias: F.linear(x, weight, bias)
    if kind in (LayerNorm, RMSNorm):
        shape, weight, eps = (module.dim,), module.weight, module.eps
        if kind is RMSNorm:
            return lambda x: F.rms_norm(x, shape, weight, eps)
        return lambda x, bias=module.bias: F.layer_norm(x, shape, weight, bias, eps)
    if kind is FeedForward:
        up, activation, down = as_function(module.up), module.activation, as_function(module.down)
        return lambda x: down(activation(up(x)))
    if kind is SwiGLU:
        gate, up, down = as_function(module.gate), as_function(module.up), as_function(module.down)
        return lambda x: down(F.silu(gate(x)) * up(x))
    return module


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(model: nn.Module) -> bool:
    """Return whether `_fast_step` knows this model and every part that it does not call as a module."""
    if type(model) is not GPTModel:
        return False
    passed_over = [model, model.token_embedding]
    for block in model.blocks:
        attention = block.attention
        if type(block) is not TransformerBlock or type(attention) is not MultiHeadAttention:
            return False
        rotary = attention.rotary
        if (
            not block.pre_norm
            or attention.window
            or (rotary and (type(rotary) is not RotaryPositions or rotary.interleaved))
        ):
            return False
        passed_over += [block, block.dropout, attention, *([rotary] if rotary else [])]
    return type(model.token_embedding) is nn.Embedding and not any(map(_has_hooks, passed_over))


def _fast_step(model: GPTModel) -> Step:
    """`decode_step` for the GPTs that `_is_plain` accepts."""
    embedding, added = model.token_embedding.weight, model.position_embedding
    rotary = model.blocks[0].attention.rotary
    layers = []
    for block in model.blocks:
        norms = as_function(block.attention_norm), as_function(block.feed_forward_norm)
        layers.append((norms, _attention_step(block.attention), as_function(block.feed_forward)))
    final_norm, head = as_function(model.final_norm), as_function(model.output_head)
    counting = torch.arange(model.config.context_length, device=embedding.device)

    def step(tokens, positions, mask, caches):
        start, n = caches[0].length, tokens.shape[1]
        if positions is None:
            positions = counting[start : start + n]  # (n,), the same for all rows
        # Tokens become vectors, and learned or sinusoidal positions are added.
        x = F.embedding(tokens, embedding)  # (rows, n, emb_dim)
        if added is not None:
            x = x + added(positions).to(x.dtype)
        # Rotary positions are cosines and sines, looked up once for all blocks.
        factors = None
        if rotary is not None:
            table = rotary.table_on(x.device)[positions].to(x.dtype).unsqueeze(-3)
            factors = table.chunk(2, dim=-1)  # (.., 1, n, head_dim) each
        # One mask for all blocks: no padding and, among several new tokens, none that comes later.
        if mask is not None:
            mask = mask[:, None, None]  # (rows, 1, 1, keys)
        if n > 1:
            causal = causal_mask(n, start + n, device=x.device)
            mask = causal if mask is None else mask & causal
        # The blocks, each with its own cache.
        for ((before, between), attention, feed_forward), cache in zip(layers, caches, strict=True):
            x = x + attention(before(x), factors, mask, cache)
            x = x + feed_forward(between(x))
        return head(final_norm(x))

    return step


def _attention_step(attention: MultiHeadAttention) -> Callable[..., Tensor]:
    """Return the attention of the new tokens, x (rows, n, emb_dim), to the cached ones and to themselves."""
    project, output, width = as_function(attention.qkv), as_function(attention.output), attention.head_dim
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    norms = [norm and as_function(norm) for norm in (attention.query_norm, attention.key_norm)]

    def step(x, factors, mask, cache):
        # One product makes the heads of all kinds, (rows, heads, n, head_dim).
        heads = project(x).unflatten(2, (-1, width)).transpose(1, 2)
        turned, value = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=1)
        # Queries and keys are normalized and turned, each only where the model does so.
        if any(norms):
            parts = turned.split((n_heads, n_kv_heads), dim=1)
            normed = [norm(part) if norm else part for norm, part in zip(norms, parts, strict=True)]
            turned = torch.cat(normed, dim=1)
        if factors is not None:  # queries and keys at once, as in RotaryPositions
            turned = torch.addcmul(turned * factors[0], turned.roll(width // 2, dims=-1), factors[1])
        # The cache takes the new keys and values and gives all of them; attention reads those.
        query, key = turned.split((n_heads, n_kv_heads), dim=1)
        keys, values = cache.append(key, value)
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=n_heads > n_kv_heads)
        return output(mixed.transpose(1, 2).flatten(2))

    return step
