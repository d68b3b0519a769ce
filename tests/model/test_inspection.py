"""Looking inside: equal to what transformers reports, for every kind of GPT; cuts that are exact and leave no trace."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.generation.engine import generate
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.inspection import (
    attention_weights,
    cut_heads,
    induction_scores,
    logit_lens,
    previous_token_scores,
    repeated_tokens,
    residual_stream,
)
from shared.weights.huggingface import export_to_hugging_face

SMALL = {"vocab_size": 50, "context_length": 32, "emb_dim": 24, "n_heads": 4, "n_layers": 3, "dropout": 0.0}
MODERN = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "feed_forward": "swiglu",
    "bias": False,
    "qkv_bias": False,
}
VARIANTS = {
    "gpt2": {},
    "llama": {**MODERN, "n_kv_heads": 2},
    "qwen3": {**MODERN, "n_kv_heads": 2, "qk_norm": True, "head_dim": 8, "norm_eps": 1e-6},
    "mixtral": {**MODERN, "feed_forward": "moe", "n_experts": 4, "tie_weights": False},
    "mistral": {**MODERN, "window": 5},
}
OWN = {
    "post-norm": {"pre_norm": False},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "interleaved": {**MODERN, "rope_interleaved": True},
    "untied": {"tie_weights": False},
}


def small_model(**options: object) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SMALL, **options, "init_std": 0.2})).eval()


def ids(n_rows: int = 2, n: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (n_rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path):
    """A model of ours and the same model in transformers."""
    ours = small_model(**VARIANTS[request.param])
    export_to_hugging_face(ours, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    return ours, theirs.eval()


@torch.no_grad()
def test_stream_and_weights_are_those_of_transformers(pair):
    ours, theirs = pair
    report = theirs(ids(), output_hidden_states=True, output_attentions=True)
    stream = residual_stream(ours, ids())
    assert stream.shape == (4, 2, 12, 24)
    torch.testing.assert_close(stream[:-1], torch.stack(report.hidden_states[:-1]), atol=1e-4, rtol=1e-4)
    last = ours.final_norm(stream[-1])
    torch.testing.assert_close(last, report.hidden_states[-1], atol=1e-4, rtol=1e-4)
    weights = attention_weights(ours, ids())
    assert weights.shape == (3, 2, 4, 12, 12)
    torch.testing.assert_close(weights, torch.stack(report.attentions), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cut_heads_are_zero_columns_of_their_output_matrix(pair):
    ours, theirs = pair
    before, width = ours(ids()), ours.config.actual_head_dim
    with cut_heads(ours, [(0, 1), (2, 0), (2, 3), (2, 3)]):
        cut = ours(ids())
    for layer, head in ((0, 1), (2, 0), (2, 3)):
        columns = slice(width * head, width * (head + 1))
        if hasattr(theirs, "transformer"):  # GPT-2 keeps its matrices turned round
            theirs.transformer.h[layer].attn.c_proj.weight[columns] = 0.0
        else:
            theirs.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0.0
    torch.testing.assert_close(cut, theirs(ids()).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours(ids()), before) and not torch.allclose(cut, before)


@pytest.mark.parametrize("variant", [*VARIANTS, *OWN])
@torch.no_grad()
def test_every_configuration_can_be_looked_into(variant):
    model = small_model(**{**VARIANTS, **OWN}[variant])
    logits = model(ids())
    stream = residual_stream(model, ids())
    assert torch.equal(logit_lens(model, stream[-1]), logits)
    weights = attention_weights(model, ids())
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert torch.equal(weights, weights.tril())
    assert torch.equal(model(ids()), logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_the_stream_is_what_the_blocks_read_and_write():
    model = small_model(**VARIANTS["llama"])
    stream = residual_stream(model, ids())
    assert torch.equal(stream[0], model.token_embedding(ids()))
    for block, before, after in zip(model.blocks, stream, stream[1:], strict=False):
        torch.testing.assert_close(block(before, positions=torch.arange(12)), after)


@torch.no_grad()
def test_a_head_that_is_cut_adds_nothing_and_all_heads_cut_leave_only_the_bias():
    model = small_model(n_layers=1)
    with cut_heads(model, [(0, head) for head in range(4)]):
        cut = residual_stream(model, ids())
    block = model.blocks[0]
    x = cut[0] + block.attention.output.bias
    torch.testing.assert_close(cut[1], x + block.feed_forward(block.feed_forward_norm(x)))


def test_cuts_hold_for_generation_nest_and_end_with_an_error():
    model = small_model(**VARIANTS["llama"])
    whole = generate(model, [[1, 2, 3]], 12)
    with cut_heads(model, [(0, 0), (1, 1)]), cut_heads(model, [(1, 2), (2, 3)]):
        nested = generate(model, [[1, 2, 3]], 12)
    with cut_heads(model, [(0, 0), (1, 1), (1, 2), (2, 3)]):
        at_once = generate(model, [[1, 2, 3]], 12)
        again = [1, 2, 3]
        for _ in range(12):
            with torch.no_grad():
                again.append(int(model(torch.tensor([again]))[0, -1].argmax()))
    assert nested == at_once == [again[3:]] and nested != whole
    with pytest.raises(RuntimeError, match="inside"), cut_heads(model, [(0, 0)]):
        raise RuntimeError("inside")
    assert generate(model, [[1, 2, 3]], 12) == whole


def test_hooks_are_gone_when_the_model_refuses_its_input():
    model = small_model()
    for look in (residual_stream, attention_weights, previous_token_scores):
        with pytest.raises(ValueError, match="tokens must be ids from 0 to 49"):
            look(model, torch.tensor([[1, 50]]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_bfloat16_model_can_be_cut():
    model = small_model(**VARIANTS["llama"]).to(torch.bfloat16)
    with torch.no_grad(), cut_heads(model, [(0, 0)]):
        assert model(ids()).dtype == torch.bfloat16


def copying_model() -> GPTModel:
    """A model of two blocks whose head (1, 0) copies, by weights that were written by hand.

    The width is four times 20: what the token is, what the token before was, where it stands, and what is to be said.
    """
    n = 20
    config = GPTConfig(
        vocab_size=n, context_length=n, emb_dim=4 * n, n_heads=2, head_dim=n, n_layers=2, dropout=0.0, bias=False,
        qkv_bias=False, tie_weights=False,
    )  # fmt: skip
    model = GPTModel(config).eval()
    eye, strong = torch.eye(n), 200.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if parameter.dim() > 1 else parameter.fill_(1.0)
        model.token_embedding.weight[:, :n] = eye
        model.position_embedding.weight[:, 2 * n : 3 * n] = eye
        first, second = (block.attention for block in model.blocks)
        # Head 0 of block 0 looks one place back and writes which token stood there.
        query, key, value = (first.qkv.weight[2 * n * part : 2 * n * part + n] for part in range(3))
        query[:, 2 * n : 3 * n] = strong * torch.roll(eye, 1, 1)
        key[:, 2 * n : 3 * n] = eye
        value[:, :n] = eye
        first.output.weight[n : 2 * n, :n] = eye
        # Head 0 of block 1 looks where the token before was this one, and says what stands there.
        query, key, value = (second.qkv.weight[2 * n * part : 2 * n * part + n] for part in range(3))
        query[:, :n] = strong * eye
        key[:, n : 2 * n] = eye
        value[:, :n] = eye
        second.output.weight[3 * n :, :n] = eye
        model.output_head.weight[:, 3 * n :] = eye
    return model


def test_scores_find_the_heads_that_were_built_to_copy():
    model, tokens = copying_model(), repeated_tokens(20, 4, 8, seed=3)
    induction, previous = induction_scores(model, tokens), previous_token_scores(model, tokens)
    assert induction.shape == previous.shape == (2, 2)
    assert induction[1, 0] > 0.9 and induction.flatten().sort().values[-2] < 0.3
    assert previous[0, 0] > 0.9 and previous.flatten().sort().values[-2] < 0.5
    with torch.no_grad():
        # From the second token on: the very first has none before it, so its head looks at itself.
        said = model(tokens)[:, 9:-1].argmax(-1)
        assert torch.equal(said, tokens[:, 10:])
        for head in ((0, 0), (1, 0)):
            with cut_heads(model, [head]):
                assert (model(tokens)[:, 9:-1].argmax(-1) == tokens[:, 10:]).float().mean() < 0.5
        with cut_heads(model, [(0, 1), (1, 1)]):
            assert torch.equal(model(tokens)[:, 9:-1].argmax(-1), said)


def test_repeated_tokens_are_different_ids_twice():
    tokens = repeated_tokens(30, 5, 10, seed=1, first=20)
    assert tokens.shape == (5, 20) and tokens.dtype == torch.int64
    assert torch.equal(tokens[:, :10], tokens[:, 10:])
    assert all(sorted(row[:10].tolist()) == list(range(20, 30)) for row in tokens)
    assert torch.equal(tokens, repeated_tokens(30, 5, 10, seed=1, first=20))
    assert not torch.equal(tokens, repeated_tokens(30, 5, 10, seed=2, first=20))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: residual_stream(m.train(), ids()), "model.training must be False"),
        (lambda m: attention_weights(m.train(), ids()), "model.training must be False"),
        (lambda m: logit_lens(m, torch.zeros(2, 23)), "the last dimension of x must be 24"),
        (lambda m: cut_heads(m, [(3, 0)]).__enter__(), "layer must be below 3, got 3"),
        (lambda m: cut_heads(m, [(0, 4)]).__enter__(), "head must be below 4, got 4"),
        (lambda m: cut_heads(m, [(-1, 0)]).__enter__(), "layer must be at least 0, got -1"),
        (lambda m: induction_scores(m, ids()), "tokens must be at least two ids"),
        (lambda m: induction_scores(m, ids(n=2)), "tokens must be at least two ids"),
        (
            lambda m: induction_scores(m, repeated_tokens(50, 1, 6, seed=0)[:, :-1]),
            "tokens must be at least two",
        ),
        (lambda m: previous_token_scores(m, ids(n=1)), "tokens must be at least two tokens long"),
        (
            lambda m: repeated_tokens(50, 1, 51, seed=0),
            "length must be at most vocab_size - first=50, got 51",
        ),
        (lambda m: repeated_tokens(50, 0, 5, seed=0), "n_rows must be"),
        (lambda m: repeated_tokens(50, 1, 5, seed=0, first=-1), "first must be at least 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model())
