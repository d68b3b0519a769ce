# %% [markdown] tags=["promote:decode_step"]
# One step of decoding without the cost of calling modules: the same arithmetic, everything looked up once.
#
# A small model spends more time between its operations than in them: each call of a module takes one or two microseconds, and so does each check of a shape. While text is being written, the modules
# and the shapes stay the same from token to token. So a function is put together once and called for each token. It is built from the model's own parts: a part that it
# does not know (an adapter, a mixture of experts, a module with hooks) is called as the module it is, and a model that it does not know is run as always.
#
# Left out: windows, post-norm blocks and interleaved rotary positions, which are run as always.

# %% tags=["promote:decode_step"]
# Called as step(tokens, positions, mask, caches): tokens int64 (rows,), the newest of each row; positions int64
# (rows, 1), or None to count on from the caches; mask bool (rows, keys) or None; one cache a block, which receives
# the tokens. It returns the logits of the next token, (rows, vocab_size).
Step = Callable[[Tensor, Tensor | None, Tensor | None, Sequence[KeyValueCache]], Tensor]


def decode_step(model: nn.Module) -> Step:
    """Return a function that computes what `model` computes for one new token a row, as fast as can be.

    The model must be in evaluation mode, the function be called without gradients. It holds on to the weights: build a
    new one after they or the model's parts have been replaced.
    """
    if _is_plain(model):
        return _fast_step(model)

    def step(tokens, positions, mask, caches):
        options = {"positions": positions, "key_padding_mask": mask, "caches": caches}
        return model(tokens[:, None], last_only=True, **options).squeeze(1)

    return step


def bare(module: nn.Module) -> Callable[[Tensor], Tensor]:
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
        up, activation, down = bare(module.up), module.activation, bare(module.down)
        return lambda x: down(activation(up(x)))
    if kind is SwiGLU:
        gate, up, down = bare(module.gate), bare(module.up), bare(module.down)
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
        if not block.pre_norm or attention.window or (rotary and (type(rotary) is not RotaryPositions or rotary.interleaved)):
            return False
        passed_over += [block, block.dropout, attention, *([rotary] if rotary else [])]
    return type(model.token_embedding) is nn.Embedding and not any(map(_has_hooks, passed_over))


def _fast_step(model: GPTModel) -> Step:
    """`decode_step` for the GPTs that `_is_plain` accepts."""
    embedding, added = model.token_embedding.weight, model.position_embedding
    rotary = model.blocks[0].attention.rotary
    layers = [
        (bare(b.attention_norm), _attention_step(b.attention), bare(b.feed_forward_norm), bare(b.feed_forward))
        for b in model.blocks
    ]
    final_norm, head = bare(model.final_norm), bare(model.output_head)
    counting = torch.arange(model.config.context_length, device=embedding.device)

    def step(tokens, positions, mask, caches):
        if positions is None:
            positions = counting[caches[0].length, None]  # (1,), the same for all rows
        else:
            positions = positions.squeeze(1)  # (rows,)
        x = F.embedding(tokens, embedding)  # (rows, emb_dim)
        if added is not None:
            x = x + added(positions)
        factors = None
        if rotary is not None:
            factors = rotary.table[positions].to(x.dtype)[:, None, None].chunk(2, dim=-1)  # (rows or 1, 1, 1, head_dim)
        if mask is not None:
            mask = mask[:, None, None]  # (rows, 1, 1, keys)
        for (norm, attention, feed_forward_norm, feed_forward), cache in zip(layers, caches, strict=True):
            x = x + attention(norm(x), factors, mask, cache)
            x = x + feed_forward(feed_forward_norm(x))
        return head(final_norm(x))

    return step


def _attention_step(attention: MultiHeadAttention) -> Callable[..., Tensor]:
    """Return the attention of one new token a row, x (rows, emb_dim), to itself and to the cached ones."""
    project, output, width = bare(attention.qkv), bare(attention.output), attention.head_dim
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    norms = [norm and bare(norm) for norm in (attention.query_norm, attention.key_norm)]

    def step(x, factors, mask, cache):
        heads = project(x).view(len(x), -1, 1, width)  # (rows, all heads, 1, head_dim): with one token, no transpose
        turned, value = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=1)
        if any(norms):
            parts = turned.split((n_heads, n_kv_heads), dim=1)
            turned = torch.cat([norm(part) if norm else part for norm, part in zip(norms, parts, strict=True)], dim=1)
        if factors is not None:  # queries and keys at once, as in RotaryPositions
            turned = torch.addcmul(turned * factors[0], turned.roll(width // 2, dims=-1), factors[1])
        query, key = turned.split((n_heads, n_kv_heads), dim=1)
        keys, values = cache.append(key, value)
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=n_heads > n_kv_heads)
        return output(mixed.reshape(len(x), -1))

    return step


