"""What the first assignment of Stanford's CS336 ("Language Modeling from Scratch", 2025) asks of a solution.

The assignment's tests call a solution through adapters with fixed names and shapes. Here the adapters lead to our code,
and the requirements are written anew, each against torch, transformers or the assignment's formula. What the course
takes from torch as it is (linear maps, embeddings, softmax) and the tokenizer are left out.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from shared.model.attention import MultiHeadAttention, scaled_dot_product_attention
from shared.model.gpt import GPTConfig, GPTModel, build_block, build_rotary
from shared.model.layers import RMSNorm, SwiGLU, TransformerBlock
from shared.model.positions import RotaryPositions
from shared.text.dataset import TokenDataset, sample_batch
from shared.training.checkpoint import load_checkpoint, load_model_state, model_state, save_checkpoint
from shared.training.loop import train
from shared.training.losses import next_token_loss
from shared.training.optimizers import build_optimizers
from shared.training.schedules import build_schedule

D, HEADS, HIDDEN, BATCH, TOKENS, V = 32, 4, 48, 3, 12, 50

# --- adapters: names and shapes only


def run_rmsnorm(d_model: int, eps: float, weight: Tensor, x: Tensor) -> Tensor:
    module = RMSNorm(d_model, eps)
    module.load_state_dict({"weight": weight})
    return module(x)


def run_swiglu(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor) -> Tensor:
    module = SwiGLU(x.shape[-1], len(w1))
    module.load_state_dict({"gate.weight": w1, "down.weight": w2, "up.weight": w3})
    return module(x)


def run_scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, mask)[0]


def run_rope(d_k: int, theta: float, max_seq_len: int, x: Tensor, positions: Tensor) -> Tensor:
    rotated = RotaryPositions(d_k, max_seq_len, theta, interleaved=True)(
        x.reshape(-1, 1, *x.shape[-2:]), positions
    )
    return rotated.reshape(x.shape)


def run_multihead_self_attention(
    n_heads: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, x: Tensor, rotary: nn.Module | None = None
) -> Tensor:
    module = MultiHeadAttention(x.shape[-1], n_heads, causal=True, out_bias=False, rotary=rotary)
    module.load_state_dict({"qkv.weight": torch.cat([q, k, v]), "output.weight": o}, strict=rotary is None)
    return module(x)


def run_transformer_block(n_heads: int, weights: dict[str, Tensor], x: Tensor, rotary: nn.Module) -> Tensor:
    attention = MultiHeadAttention(x.shape[-1], n_heads, causal=True, out_bias=False, rotary=rotary)
    feed_forward = SwiGLU(x.shape[-1], len(weights["ffn.w1.weight"]))
    block = TransformerBlock(attention, feed_forward, RMSNorm(x.shape[-1]), RMSNorm(x.shape[-1]))
    projections = [weights[f"attn.{name}_proj.weight"] for name in "qkv"]
    state = {
        "attention.qkv.weight": torch.cat(projections),
        "attention.output.weight": weights["attn.output_proj.weight"],
        "feed_forward.gate.weight": weights["ffn.w1.weight"],
        "feed_forward.down.weight": weights["ffn.w2.weight"],
        "feed_forward.up.weight": weights["ffn.w3.weight"],
        "attention_norm.weight": weights["ln1.weight"],
        "feed_forward_norm.weight": weights["ln2.weight"],
    }
    block.load_state_dict(state)
    return block(x)


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(inputs[None], targets[None])


def run_get_batch(
    dataset: np.ndarray, batch_size: int, context_length: int, step: int = 0
) -> tuple[Tensor, Tensor]:
    return sample_batch(TokenDataset(dataset, context_length, stride=1), batch_size, step)


def run_get_lr_cosine_schedule(it: int, high: float, low: float, warmup: int, cycle: int) -> float:
    return high * build_schedule("cosine", cycle, warmup, final=low / high)(it)


def run_save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: Path
) -> None:
    save_checkpoint(out, iteration, model_state(model), [optimizer.state_dict()])


def run_load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    saved = load_checkpoint(path)
    load_model_state(model, saved.model)
    optimizer.load_state_dict(saved.optimizers[0])
    return saved.step


# --- what is asked of the model


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_rmsnorm_equals_torch_and_transformers():
    x, weight = draw(BATCH, TOKENS, D, scale=3.0), 1 + draw(D, seed=1)
    found = run_rmsnorm(D, 1e-5, weight, x)
    close(found, F.rms_norm(x, (D,), weight, 1e-5))
    theirs = LlamaRMSNorm(D, 1e-5)
    theirs.weight.copy_(weight)
    close(found, theirs(x))


@torch.no_grad()
def test_swiglu_is_w2_of_silu_w1_times_w3():
    x = draw(BATCH, TOKENS, D)
    w1, w2, w3 = draw(HIDDEN, D, seed=1), draw(D, HIDDEN, seed=2), draw(HIDDEN, D, seed=3)
    close(run_swiglu(w1, w2, w3, x), F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2), 1e-4)


@pytest.mark.parametrize("leading", [(BATCH,), (BATCH, HEADS)])
def test_attention_equals_torch_with_any_leading_dimensions(leading):
    query, key, value = (draw(*leading, n, 8, seed=seed) for seed, n in enumerate((TOKENS, 15, 15)))
    mask = draw(BATCH, *[1] * (len(leading) - 1), TOKENS, 15, seed=3) > 0
    mask[..., 0] = True  # where a token may see nothing, implementations differ
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    close(run_scaled_dot_product_attention(query, key, value, mask), expected)


def turned(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Neighbouring numbers as complex ones, each multiplied by e to the i times its angle."""
    width = x.shape[-1]
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = torch.polar(
        torch.ones(len(positions), width // 2, dtype=torch.float64), positions[:, None] * frequencies
    )
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def test_rotary_positions_equal_products_of_complex_numbers():
    x, positions = draw(BATCH, TOKENS, 8), torch.tensor([*range(3, TOKENS + 2), 40])
    close(run_rope(8, 10_000.0, 64, x, positions), turned(x, positions))


@pytest.mark.parametrize("rotary", [False, True])
@torch.no_grad()
def test_self_attention_equals_torch(rotary):
    x = draw(BATCH, TOKENS, D)
    q, k, v, o = (draw(D, D, seed=seed, scale=0.2) for seed in range(1, 5))
    heads = [F.linear(x, weight).unflatten(-1, (HEADS, -1)).transpose(1, 2) for weight in (q, k, v)]
    if rotary:
        heads[:2] = (turned(part, torch.arange(TOKENS)) for part in heads[:2])
    expected = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2) @ o.T
    module = RotaryPositions(D // HEADS, TOKENS, interleaved=True) if rotary else None
    close(run_multihead_self_attention(HEADS, q, k, v, o, x, module), expected)


@torch.no_grad()
def test_a_block_equals_transformers():
    sizes = {"hidden_size": D, "intermediate_size": HIDDEN, "num_attention_heads": HEADS}
    config = LlamaConfig(**sizes, num_key_value_heads=HEADS, rms_norm_eps=1e-5, attn_implementation="eager")
    theirs = LlamaDecoderLayer(config, 0).eval()
    for number, parameter in enumerate(theirs.parameters()):
        parameter.copy_(draw(*parameter.shape, seed=number, scale=0.2) + (parameter.dim() == 1))
    names = {
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.output_proj",
        "mlp.gate_proj": "ffn.w1",
        "mlp.down_proj": "ffn.w2",
        "mlp.up_proj": "ffn.w3",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
    }
    state = theirs.state_dict()
    weights = {f"{name}.weight": state[f"{other}.weight"] for other, name in names.items()}
    x, mask = draw(BATCH, TOKENS, D, seed=20), torch.full((TOKENS, TOKENS), -math.inf).triu(1)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(TOKENS)[None])
    expected = theirs(x, attention_mask=mask[None, None], position_embeddings=angles)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = run_transformer_block(
        HEADS, weights, x, RotaryPositions(D // HEADS, TOKENS)
    )  # paired as in Llama
    close(found, expected, 1e-4)


LM = GPTConfig(
    vocab_size=V,
    context_length=TOKENS,
    emb_dim=D,
    n_heads=HEADS,
    n_layers=2,
    dropout=0.0,
    norm="rmsnorm",
    positions="rotary",
    feed_forward="swiglu",
    bias=False,
    qkv_bias=False,
    tie_weights=False,
)


def build_lm(seed: int = 0) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(LM)


@torch.no_grad()
def test_the_language_model_is_its_parts_and_reads_shorter_inputs():
    model, ids = build_lm(), torch.randint(V, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    x = F.embedding(ids, model.token_embedding.weight)
    for block in model.blocks:
        part = build_block(LM, build_rotary(LM))
        part.load_state_dict(block.state_dict())
        x = part(x)
    x = F.rms_norm(x, (D,), model.final_norm.weight, 1e-5) @ model.output_head.weight.T
    logits = model(ids)
    close(logits, x)
    close(model(ids[:, : TOKENS // 2]), logits[:, : TOKENS // 2])


# --- what is asked of training


def test_cross_entropy_equals_torch_also_for_huge_logits():
    logits, targets = draw(8, 5), torch.tensor([1, 0, 2, 2, 4, 1, 4, 0])
    close(run_cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    found = run_cross_entropy(1_000 * logits, targets)
    assert found.isfinite()
    close(found, F.cross_entropy(1_000.0 * logits.double(), targets).float())


def test_batches_are_windows_with_their_targets_from_everywhere():
    tokens = np.arange(100)
    firsts = []
    for step in range(1_000):
        inputs, targets = run_get_batch(tokens, 32, 7, step)
        assert inputs.shape == targets.shape == (32, 7)
        assert torch.equal(inputs + 1, targets)
        firsts += inputs[:, 0].tolist()
    counts = np.bincount(firsts, minlength=93)
    # Starts 0 to 92, each as often as chance has it: within five standard deviations.
    share = 1 / 93
    deviation = math.sqrt(len(firsts) * share * (1 - share))
    assert len(counts) == 93 and abs(counts - len(firsts) * share).max() < 5 * deviation


def test_the_schedule_rises_in_a_line_and_falls_in_half_a_cosine():
    high, low, warmup, cycle = 1.0, 0.1, 7, 21
    for it in range(25):
        if it < warmup:
            expected = it / warmup * high
        elif it <= cycle:
            expected = low + 0.5 * (1 + math.cos((it - warmup) / (cycle - warmup) * math.pi)) * (high - low)
        else:
            expected = low
        assert run_get_lr_cosine_schedule(it, high, low, warmup, cycle) == pytest.approx(expected, abs=1e-12)


class Linear(nn.Module):
    """A regression as small as the assignment's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(42)
        self.map = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def squared(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return (model(x) - targets).square().sum()


def test_adamw_of_the_training_loop_equals_torch():
    ours, theirs = Linear(), Linear()
    options = {"betas": (0.9, 0.999), "eps": 1e-8}
    mine = build_optimizers(ours, "adamw", 1e-3, weight_decay=0.01, **options)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01, **options)
    batches = [(draw(1, 3, seed=step), draw(1, 2, seed=1_000 + step)) for step in range(200)]
    train(ours, batches, mine, n_steps=200, loss=squared, max_grad_norm=None)
    for x, targets in batches:
        reference.zero_grad()
        (squared(theirs, x, targets) / targets.numel()).backward()
        reference.step()
    close(ours.map.weight, theirs.map.weight, 1e-6)


@pytest.mark.parametrize("limit", [1e-2, 1.0, 1e6])
def test_gradients_are_clipped_together_and_parameters_without_one_are_left_alone(limit):
    model = nn.ModuleDict({"used": Linear(), "unused": Linear(), "frozen": Linear()})
    model["frozen"].requires_grad_(False)
    x, targets = draw(4, 3), draw(4, 2, seed=1)
    loss = lambda model, x, targets: 10 * squared(model["used"], x, targets)
    expected = copy.deepcopy(model)
    (loss(expected, x, targets) / targets.numel()).backward()
    nn.utils.clip_grad_norm_([p for p in expected.parameters() if p.grad is not None], limit)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    log = train(model, [(x, targets)], optimizer, n_steps=1, loss=loss, max_grad_norm=limit)
    close(model["used"].map.weight.grad, expected["used"].map.weight.grad, 1e-6)
    assert model["used"].map.weight.grad.norm().item() <= limit * 1.0001
    assert (log[1].grad_norm > limit) == (limit < 1e6)
    assert model["unused"].map.weight.grad is None and model["frozen"].map.weight.grad is None


def test_a_checkpoint_gives_back_the_step_the_weights_and_equal_states(tmp_path):
    model = build_lm()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), eps=1e-8
    )
    ids = torch.randint(V, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    batch = ids[:, :-1], ids[:, 1:]
    train(model, [batch], optimizer, n_steps=10)
    run_save_checkpoint(model, optimizer, 10, tmp_path)

    other = build_lm(seed=1)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    assert run_load_checkpoint(tmp_path / "step-00000010", other, fresh) == 10
    before, after = model.state_dict(), other.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = optimizer.state_dict(), fresh.state_dict()
    assert before.keys() == after.keys() and before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for index, values in before["state"].items():
        assert values.keys() == after["state"][index].keys()
        assert all(torch.equal(value, after["state"][index][name]) for name, value in values.items())
    # And both go on alike.
    logs = [train(m, [batch], o, n_steps=12, start_step=10) for m, o in ((model, optimizer), (other, fresh))]
    assert [record.loss for record in logs[0][1:]] == [record.loss for record in logs[1][1:]]
