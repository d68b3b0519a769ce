"""`model.gpt` against transformers (GPT-2, Llama, Qwen3, Mistral, Mixtral), and what must hold for every variant."""

import copy
import dataclasses
import io
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shared.generation.decode_step import decode_step
from shared.model.attention import KeyValueCache
from shared.model.gpt import (
    ADDED_POSITIONS,
    PRESETS,
    GPTConfig,
    GPTModel,
    build_block,
    build_norm_of,
    build_rotary,
)
from shared.model.layers import LayerNorm, RMSNorm, balance_loss
from shared.weights.names import huggingface_views
from tests.configurations import LLAMA
from tests.weights.models import process_group

SMALL = {"vocab_size": 50, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.0}

# Every option away from its default, alone or in the company it has in real models.
VARIANTS = {
    "gpt2": {},
    "gpt1": {"pre_norm": False},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "n_kv_heads": 2, "head_dim": 8, "qk_norm": True},
    "mistral": {**LLAMA, "n_kv_heads": 1, "window": 3},
    "mixtral": {
        **LLAMA,
        "feed_forward": "moe",
        "feed_forward_dim": 16,
        "n_experts": 4,
        "n_active_experts": 2,
    },
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "untied, no bias": {"tie_weights": False, "bias": False, "qkv_bias": False},
    "yarn": {**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 4},
    "helium": {**LLAMA, "rope_interleaved": True, "n_kv_heads": 2},
    "exact gelu": {"activation": "gelu"},
}


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


def build(seed: int = 0, **options) -> GPTModel:
    """A small model in evaluation mode, every parameter drawn anew: zeros and ones hide mistakes."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(**{**SMALL, **options})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def random_ids(batch: int = 3, tokens: int = 9, vocab_size: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# --- against transformers


def assert_same_model(ours: GPTModel, theirs: nn.Module, named: list[tuple[str, nn.Parameter, bool]]) -> None:
    """Give ours their weights and compare logits and every gradient. `named`: our name, theirs, whether transposed."""
    theirs.eval()
    for _, other, _ in named:
        nn.init.normal_(other, std=0.2)
    with torch.no_grad():
        for name, other, transposed in named:
            ours.get_parameter(name).copy_(other.T if transposed else other)
    assert {name for name, _, _ in named} == {name for name, _ in ours.named_parameters()}
    ids = random_ids(2, ours.config.context_length, ours.config.vocab_size)
    our_logits, their_logits = ours(ids), theirs(ids).logits
    close(our_logits, their_logits)
    loss(our_logits, ids).backward()
    loss(their_logits, ids).backward()
    for name, other, transposed in named:
        close(ours.get_parameter(name).grad, other.grad.T if transposed else other.grad)


@settings(deadline=None, max_examples=12)
@given(
    vocab_size=st.integers(2, 80),
    context_length=st.integers(2, 20),
    n_heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    n_layers=st.integers(1, 3),
    eps=st.sampled_from([1e-5, 1e-3]),
)
def test_logits_and_gradients_equal_gpt2(vocab_size, context_length, n_heads, head_dim, n_layers, eps):
    shape = {
        "vocab_size": vocab_size,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "emb_dim": n_heads * head_dim,
    }
    ours = GPTModel(GPTConfig(**shape, context_length=context_length, norm_eps=eps)).eval()
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=context_length,
            n_embd=n_heads * head_dim,
            n_head=n_heads,
            n_layer=n_layers,
            layer_norm_epsilon=eps,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    outer = {
        "token_embedding.weight": "wte.weight",
        "position_embedding.weight": "wpe.weight",
        "final_norm.weight": "ln_f.weight",
        "final_norm.bias": "ln_f.bias",
    }
    named = [(mine, theirs.transformer.get_parameter(other), False) for mine, other in outer.items()]
    for i in range(n_layers):
        for mine, other in parts.items():
            for kind in ("weight", "bias"):
                parameter = theirs.get_parameter(f"transformer.h.{i}.{other}.{kind}")
                named.append((f"blocks.{i}.{mine}.{kind}", parameter, parameter.dim() == 2))
    assert_same_model(ours, theirs, named)


def llama_like(ours: GPTModel, theirs: nn.Module) -> None:
    """Give a Llama-like model random weights and ours the same; compare logits and gradients."""
    theirs.eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    inner = theirs.model
    pairs = [
        (ours.token_embedding.weight, [inner.embed_tokens.weight]),
        (ours.final_norm.weight, [inner.norm.weight]),
    ]
    if not ours.config.tie_weights:
        pairs.append((ours.output_head.weight, [theirs.lm_head.weight]))
    for mine, other in zip(ours.blocks, inner.layers, strict=True):
        attention = other.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        pairs += [
            (mine.attention_norm.weight, [other.input_layernorm.weight]),
            (mine.feed_forward_norm.weight, [other.post_attention_layernorm.weight]),
            (mine.attention.qkv.weight, [projection.weight for projection in projections]),
            (mine.attention.output.weight, [attention.o_proj.weight]),
        ]
        if ours.config.qkv_bias:
            pairs.append((mine.attention.qkv.bias, [projection.bias for projection in projections]))
        if ours.config.qk_norm:
            pairs.append((mine.attention.query_norm.weight, [attention.q_norm.weight]))
            pairs.append((mine.attention.key_norm.weight, [attention.k_norm.weight]))
        if ours.config.feed_forward == "swiglu":
            for name in ("gate", "up", "down"):
                weight = getattr(other.mlp, f"{name}_proj").weight
                pairs.append((getattr(mine.feed_forward, name).weight, [weight]))
        else:
            hidden = ours.config.feed_forward_dim
            pairs.append((mine.feed_forward.router.weight, [other.mlp.gate.weight]))
            for i, expert in enumerate(mine.feed_forward.experts):
                expert.gate.weight.data.copy_(other.mlp.experts.gate_up_proj.data[i, :hidden])
                expert.up.weight.data.copy_(other.mlp.experts.gate_up_proj.data[i, hidden:])
                expert.down.weight.data.copy_(other.mlp.experts.down_proj.data[i])
    for mine, others in pairs:
        mine.data.copy_(torch.cat([other.data for other in others]))
    assert ours.n_parameters == sum(parameter.numel() for parameter in theirs.parameters())
    ids = random_ids(2, ours.config.context_length)
    our_logits, their_logits = ours(ids), theirs(ids).logits
    close(our_logits, their_logits, 2e-5)
    loss(our_logits, ids).backward()
    loss(their_logits, ids).backward()
    for mine, others in pairs:
        close(mine.grad, torch.cat([other.grad for other in others]), 2e-5)
    if ours.config.feed_forward == "moe":
        for mine, other in zip(ours.blocks, inner.layers, strict=True):
            grads = torch.stack([expert.down.weight.grad for expert in mine.feed_forward.experts])
            close(grads, other.mlp.experts.down_proj.grad, 2e-5)


COMMON = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "sdpa",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        ({}, {"rope_type": "default"}),
        (
            {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 8},
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        ),
        (
            {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 4},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
        ),
    ],
)
def test_the_llama_variant_equals_llama(tied, scaling, parameters):
    options = {**LLAMA, "n_kv_heads": 2, "feed_forward_dim": 40, "rope_base": 500.0, "tie_weights": tied}
    rope = {"rope_theta": 500.0, **parameters}
    theirs = LlamaConfig(
        **COMMON, intermediate_size=40, num_key_value_heads=2, tie_word_embeddings=tied, rope_parameters=rope
    )
    llama_like(build(**options, **scaling), LlamaForCausalLM(theirs))


def test_the_qwen3_variant_equals_qwen3():
    options = {"n_kv_heads": 2, "head_dim": 10, "qk_norm": True, "feed_forward_dim": 40}
    theirs = Qwen3Config(
        **COMMON,
        rope_parameters=ROPE,
        intermediate_size=40,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=True,
    )
    llama_like(build(**LLAMA, **options), Qwen3ForCausalLM(theirs))


def test_the_mistral_variant_with_its_window_equals_mistral():
    options = {"n_kv_heads": 1, "window": 5, "feed_forward_dim": 40}
    theirs = MistralConfig(
        **COMMON,
        rope_parameters=ROPE,
        intermediate_size=40,
        num_key_value_heads=1,
        sliding_window=5,
        head_dim=6,
        tie_word_embeddings=True,
    )
    llama_like(build(**LLAMA, **options), MistralForCausalLM(theirs))


@pytest.mark.parametrize(("ours", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu", "relu")])
def test_activations_are_those_of_transformers(ours, theirs):
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=24,
            n_layer=2,
            n_head=4,
            activation_function=theirs,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    reference, model = reference.double(), build(activation=ours).double()  # both forms of GELU are close
    views = huggingface_views(model, "gpt2")
    for name, parameter in reference.named_parameters():
        parameter.data.copy_(views[name])
    ids = random_ids(2, 16)
    expected = reference(ids).logits
    close(model(ids), expected, 1e-9)
    for other in {"gelu", "gelu_tanh", "relu"} - {ours}:
        changed = GPTModel(dataclasses.replace(model.config, activation=other)).double().eval()
        changed.load_state_dict(model.state_dict())
        assert (changed(ids) - expected).abs().max() > 1e-5


@pytest.mark.parametrize(
    "rope", [{}, {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 4}]
)
def test_the_interleaved_variant_equals_helium(rope):
    parameters = {**ROPE}
    if rope:
        parameters |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
    theirs = HeliumConfig(
        **COMMON,
        rope_parameters=parameters,
        intermediate_size=40,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=True,
    )
    options = {"rope_interleaved": True, "n_kv_heads": 2, "feed_forward_dim": 40, **rope}
    llama_like(build(**LLAMA, **options), HeliumForCausalLM(theirs))


def test_yarns_attention_factor_is_transformers():
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
    theirs = LlamaConfig(
        **COMMON,
        rope_parameters={"rope_theta": 500.0, **parameters, "attention_factor": 1.7},
        intermediate_size=40,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    options = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 4, "rope_base": 500.0}
    factor = {"rope_attention_factor": 1.7}
    llama_like(build(**LLAMA, **options, **factor, feed_forward_dim=40), LlamaForCausalLM(theirs))
    assert build(**LLAMA, **options, **factor).blocks[0].attention.rotary.table.abs().max() == pytest.approx(
        1.7
    )


def test_the_qwen3_mixture_equals_qwen3_moe():
    theirs = Qwen3MoeConfig(
        **COMMON,
        rope_parameters=ROPE,
        moe_intermediate_size=16,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        head_dim=10,
        tie_word_embeddings=True,
    )
    theirs._experts_implementation = "eager"
    options = {"feed_forward": "moe", "feed_forward_dim": 16, "n_experts": 4, "qk_norm": True}
    llama_like(build(**{**LLAMA, **options}, n_kv_heads=2, head_dim=10), Qwen3MoeForCausalLM(theirs))


def test_the_mixtral_variant_equals_mixtral():
    options = {"feed_forward": "moe", "feed_forward_dim": 16, "n_experts": 4, "n_active_experts": 2}
    theirs = MixtralConfig(
        **COMMON,
        rope_parameters=ROPE,
        intermediate_size=16,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        sliding_window=None,
    )
    theirs._experts_implementation = "eager"
    llama_like(build(**{**LLAMA, **options}), MixtralForCausalLM(theirs))


# --- what must hold for every variant


@pytest.fixture(params=VARIANTS, name="model")
def variant(request) -> GPTModel:
    return build(**VARIANTS[request.param])


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(model):
    ids = random_ids()
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 50
    difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))  # (tokens,)
    # Not 0: a mixture of experts multiplies other rows together, and so adds in another order.
    assert difference[:5].max() < 1e-6
    assert difference[5] > 1e-3


@torch.no_grad()
def test_sentences_of_a_batch_do_not_see_each_other(model):
    ids = random_ids()
    logits, order = model(ids), torch.tensor([2, 0, 1])
    close(model(ids[order]), logits[order])
    close(model(ids[1:2]), logits[1:2])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 1, 1, 3), (9,)])
def test_caches_change_nothing(model, sizes):
    ids, caches = random_ids(), model.new_caches(9)
    parts = [model(part, caches=caches) for part in ids.split(sizes, dim=1)]
    close(torch.cat(parts, dim=1), model(ids))
    assert all(isinstance(cache, KeyValueCache) and cache.length == 9 for cache in caches)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model):
    ids = random_ids()
    padded, mask = F.pad(ids, (4, 0)), (torch.arange(13) >= 4).expand(3, 13)
    positions = (torch.arange(13) - 4).clamp(min=0)
    close(model(padded, positions=positions, key_padding_mask=mask)[:, 4:], model(ids))
    caches = model.new_caches()
    model(padded[:, :-1], positions=positions[:-1], key_padding_mask=mask[:, :-1], caches=caches)
    last = model(padded[:, -1:], positions=positions[-1:], key_padding_mask=mask, caches=caches)
    close(last, model(ids)[:, -1:])


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(model):
    ids = random_ids()
    close(model(F.pad(ids, (0, 4)))[:, :9], model(ids))


@torch.no_grad()
def test_parts_of_the_forward_pass_agree(model):
    ids = random_ids()
    logits, hidden = model(ids), model.hidden_states(ids)
    assert logits.shape == (3, 9, 50)
    assert hidden.shape == (3, 9, 24)
    close(model.output_head(hidden), logits)
    close(model(ids, last_only=True), logits[:, -1:])
    close(model(model.token_embedding(ids)), logits)
    close(model(ids, positions=torch.arange(9).expand(3, 9)), logits)
    close(model(ids.int()), logits)


def test_every_parameter_gets_a_gradient(model):
    ids = random_ids(4, 16)
    loss(model(ids), ids).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def is_tied(model: GPTModel) -> bool:
    return model.output_head.weight is model.token_embedding.weight


def on_meta(config: GPTConfig) -> GPTModel:
    with torch.device("meta"):
        return GPTModel(config).eval()


def refilled(model: GPTModel, state: dict[str, torch.Tensor], **options: bool) -> GPTModel:
    model.load_state_dict(state, **options)
    return model


def stored_and_read(model: GPTModel) -> GPTModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# What people do with models: each takes a model and a copy of its weights, and returns one that must be its equal.
MOVES = {
    "rounded and refilled": lambda model, state: refilled(model.bfloat16().float(), state),
    "halved, doubled, refilled": lambda model, state: refilled(model.half().double().float(), state),
    "emptied": lambda model, state: refilled(model.to_empty(device="cpu"), state),
    "built on meta, emptied": lambda model, state: refilled(
        on_meta(model.config).to_empty(device="cpu"), state
    ),
    "moved to meta and back": lambda model, state: refilled(model.to("meta").to_empty(device="cpu"), state),
    "built on meta, weights assigned": lambda model, state: refilled(
        on_meta(model.config), state, assign=True
    ),
    "weights assigned": lambda model, state: refilled(model, state, assign=True),
    "assigned inside another module": lambda model, state: refilled(
        nn.Sequential(on_meta(model.config)), {f"0.{name}": state[name] for name in state}, assign=True
    )[0],
    "deep copy": lambda model, state: copy.deepcopy(model),
    "deep copy, emptied": lambda model, state: refilled(copy.deepcopy(model).to_empty(device="cpu"), state),
    "deep copy, weights assigned": lambda model, state: refilled(copy.deepcopy(model), state, assign=True),
    "pickle": lambda model, state: pickle.loads(pickle.dumps(model)),
    "pickle, weights assigned": lambda model, state: refilled(
        pickle.loads(pickle.dumps(model)), state, assign=True
    ),
    "torch.save": lambda model, state: stored_and_read(model),
    "new first weights": lambda model, state: refilled(build(1, **dataclasses.asdict(model.config)), state),
    "shared memory": lambda model, state: model.share_memory(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@torch.no_grad()
def test_a_model_survives_being_moved(model, move):
    ids, expected = random_ids(), model(random_ids())
    moved = move(model, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert torch.equal(moved(ids), expected)
    assert is_tied(moved) == model.config.tie_weights
    assert moved.n_parameters == model.n_parameters
    # The fast step of decoding and another copy find everything in its place too.
    assert torch.equal(copy.deepcopy(moved)(ids), expected)
    close(decode_step(moved)(ids, None, None, moved.new_caches()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["cast", "assigned"])
@torch.no_grad()
def test_a_model_computes_in_every_type_with_tables_that_are_not_rounded(model, dtype, how):
    ids, expected = random_ids(), model(random_ids())
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    moved = model.to(dtype) if how == "cast" else refilled(on_meta(model.config), state, assign=True)
    assert {name: table.dtype for name, table in moved.named_buffers() if table.dtype != torch.float32} == {}
    logits = moved(ids)
    assert logits.dtype == dtype
    if model.config.feed_forward != "moe":  # a router that rounds another way picks another expert
        torch.testing.assert_close(logits.float(), expected, atol=0.3, rtol=0.05)
    close(decode_step(moved)(ids, None, None, moved.new_caches()), logits, 0.1)


def test_an_untied_head_and_a_head_of_another_kind_stay_what_they_are():
    model = build(tie_weights=False)
    state = model.state_dict()
    for moved in (refilled(on_meta(model.config), state, assign=True), model.to_empty(device="cpu")):
        assert moved.output_head.weight is not moved.token_embedding.weight
    # Somebody gives a tied model a head of its own, or one that is no matrix.
    model = build()
    model.output_head.weight = nn.Parameter(torch.zeros_like(model.token_embedding.weight))
    refilled(model.double(), model.state_dict(), assign=True)
    assert model.output_head.weight is not model.token_embedding.weight
    model.output_head = nn.Identity()
    assert not list(model.float().output_head.parameters())


@pytest.fixture(scope="module")
def alone():
    with process_group():
        yield


@torch.no_grad()
def test_wrappers_compute_what_the_model_computes(model, alone):
    ids, expected = random_ids(), model(random_ids())
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert torch.equal(wrapped(ids), expected)
    wrapped.load_state_dict(wrapped.state_dict(), assign=True)
    assert torch.equal(wrapped(ids), expected)
    assert is_tied(model) == model.config.tie_weights


def test_a_model_compiles_to_one_graph(model):
    if model.config.feed_forward == "moe":
        pytest.skip("the number of tokens of an expert depends on the data")
    ids, expected = random_ids(), model(random_ids())
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(ids), expected)
    # The first call may come after the weights: nothing is left to be moved in the graph.
    torch._dynamo.reset()
    assigned = refilled(on_meta(model.config), model.state_dict(), assign=True)
    compiled = torch.compile(assigned, fullgraph=True, backend="aot_eager")
    close(compiled(ids), expected)
    compiled.load_state_dict(compiled.state_dict(), assign=True)
    assert is_tied(assigned) == model.config.tie_weights
    close(compiled(ids), expected)


# --- weights


def test_tied_weights_are_one_parameter_and_stay_one_when_moved():
    model = build()
    assert model.output_head.weight is model.token_embedding.weight
    model.to(torch.float64)
    assert model.output_head.weight is model.token_embedding.weight
    untied = build(tie_weights=False)
    assert untied.n_parameters == model.n_parameters + 50 * 24


@pytest.mark.parametrize("variant", ["gpt2", "llama", "mixtral"])
def test_first_weights_are_normal_and_smaller_at_the_end_of_branches(variant):
    torch.manual_seed(0)
    config = GPTConfig(**{**SMALL, "emb_dim": 128, "n_layers": 8, **VARIANTS[variant]}, init_std=0.05)
    model = GPTModel(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name
            continue
        is_last = name.endswith(("attention.output.weight", "down.weight"))
        expected = 0.05 / math.sqrt(16) if is_last else 0.05
        assert parameter.std().item() == pytest.approx(expected, rel=0.15), name
        assert abs(parameter.mean().item()) < 0.2 * expected, name


def test_an_untrained_model_finds_all_tokens_about_equally_probable():
    torch.manual_seed(0)
    model, ids = GPTModel(GPTConfig.preset("bytes-tiny")).eval(), random_ids(4, 64, 256)
    assert loss(model(ids), ids).item() == pytest.approx(math.log(256), abs=0.1)


def test_the_seed_decides_the_weights_and_initialise_draws_them_anew():
    torch.manual_seed(5)
    first = GPTModel(GPTConfig(**SMALL))
    torch.manual_seed(5)
    second = GPTModel(GPTConfig(**SMALL))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.initialize()
    assert not torch.equal(first.token_embedding.weight, second.token_embedding.weight)


def test_dropout_acts_in_training_only():
    model, ids = build(dropout=0.3), random_ids()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("gpt2-small", {}, 124_439_808),
        ("gpt2-small", {"qkv_bias": False}, 124_412_160),
        ("gpt2-small", {"qkv_bias": False, "tie_weights": False}, 163_009_536),
        ("gpt2-medium", {}, 354_823_168),
        ("gpt2-large", {}, 774_030_080),
        ("gpt2-xl", {}, 1_557_611_200),
        ("tales-tiny", {}, 231_744),
        ("tales-1m", {}, 1_053_824),
        ("tales-3m", {}, 3_049_920),
        ("bytes-tiny", {}, 120_576),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, overrides, count):
    with torch.device("meta"):
        assert GPTModel(GPTConfig.preset(name, **overrides)).n_parameters == count


def test_every_preset_is_valid():
    assert all(isinstance(GPTConfig.preset(name), GPTConfig) for name in PRESETS)
    assert GPTConfig.preset("gpt2-small") == GPTConfig()


# --- the parts


def test_parts_follow_the_configuration():
    config = GPTConfig(**SMALL, **LLAMA, rope_base=100.0)
    assert isinstance(build_norm_of(config), RMSNorm)
    assert isinstance(build_norm_of(GPTConfig()), LayerNorm)
    rotary = build_rotary(config)
    assert rotary.head_dim == 6
    block = build_block(config, rotary)
    assert block.attention.rotary is rotary
    assert block.attention.causal
    assert set(ADDED_POSITIONS) == {"learned", "sinusoidal"}


def test_blocks_share_one_rotary_table_that_is_not_stored():
    model = build(**LLAMA)
    assert model.blocks[0].attention.rotary is model.blocks[1].attention.rotary
    assert not [name for name in model.state_dict() if "rotary" in name]


def test_balance_loss_reaches_the_routers_of_all_blocks():
    model = build(**VARIANTS["mixtral"])
    model(random_ids())
    balance_loss(model).backward()
    assert all(block.feed_forward.router.weight.grad.abs().sum() > 0 for block in model.blocks)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"n_layers": -1}, "n_layers must be at least 1, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"feed_forward_dim": 0}, "feed_forward_dim must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": math.nan}, "dropout"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"init_std": -0.1}, "init_std"),
        ({"init_std": math.inf}, "init_std"),
        ({"rope_base": 1.0}, "rope_base"),
        ({"rope_factor": 0.5}, "rope_factor"),
        ({"norm": "batchnorm"}, "norm must be one of layernorm, rmsnorm, got 'batchnorm'"),
        ({"feed_forward": "relu"}, "feed_forward must be one of gelu, swiglu, moe, got 'relu'"),
        ({"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"positions": "alibi"}, "positions must be one of learned, sinusoidal, rotary, none"),
        ({"rope_scaling": "dynamic"}, "rope_scaling must be one of"),
        ({"emb_dim": 25}, "emb_dim must be a multiple of n_heads=4 unless head_dim is given, got 25"),
        ({"n_kv_heads": 3}, "n_kv_heads must be a divisor of n_heads=4, got 3"),
        ({"n_kv_heads": 8}, "n_kv_heads"),
        ({"n_experts": 2, "n_active_experts": 3}, "n_active_experts must be at most n_experts=2, got 3"),
        ({"positions": "rotary", "head_dim": 5}, "head_dim must be even for rotary positions, got 5"),
        ({"positions": "sinusoidal", "emb_dim": 25, "n_heads": 5}, "emb_dim must be even"),
        # What nothing would read.
        ({"rope_scaling": "yarn"}, "rope_scaling must be 'none' unless positions is rotary, got 'yarn'"),
        ({"rope_base": 500.0}, "rope_base must be 10000.0 unless positions is rotary, got 500.0"),
        ({"positions": "none", "rope_interleaved": True}, "rope_interleaved must be False unless positions"),
        ({**LLAMA, "rope_factor": 4.0}, "rope_factor must be 1.0 unless rope_scaling is linear or ntk or"),
        ({**LLAMA, "rope_original_length": 8}, "rope_original_length must be None unless rope_scaling"),
        (
            {**LLAMA, "rope_scaling": "linear", "rope_factor": 2.0, "rope_attention_factor": 1.1},
            "rope_attention_factor must be None unless rope_scaling is yarn, got 1.1",
        ),
        ({"n_experts": 4}, "n_experts must be 8 unless feed_forward is moe, got 4"),
        ({"n_active_experts": 1}, "n_active_experts must be 2 unless feed_forward is moe"),
        ({**LLAMA, "activation": "gelu"}, "activation must be 'gelu_tanh' unless feed_forward is gelu"),
        ({**LLAMA, "rope_scaling": "yarn", "rope_attention_factor": math.nan}, "rope_attention_factor"),
    ],
)
def test_a_configuration_refuses_values(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 2.0}, "n_layers must be int, got 2.0"),
        ({"n_layers": True}, "n_layers must be int, got True"),
        ({"qkv_bias": 1}, "qkv_bias must be bool, got 1"),
        ({"dropout": "0.1"}, "dropout must be float"),
        ({"dropout": False}, "dropout must be float"),
        ({"norm": None}, "norm must be str"),
        ({"window": "all"}, "window must be int | None"),
        ({"n_kv_heads": 2.0}, "n_kv_heads must be int | None"),
        ({"vocab_size": None}, "vocab_size must be int, got None"),
        ({"width": 5}, "width"),
    ],
)
def test_a_configuration_refuses_types_and_unknown_fields(options, message):
    with pytest.raises(TypeError, match=message):
        GPTConfig(**{**SMALL, **options})


# A value that no GPTConfig may have, for every field that is not True or False.
WRONG = {
    "vocab_size": 0,
    "context_length": 0,
    "emb_dim": 0,
    "n_heads": 0,
    "n_layers": 0,
    "feed_forward_dim": 0,
    "n_experts": 0,
    "n_active_experts": 0,
    "rope_original_length": 0,
    "n_kv_heads": 0,
    "head_dim": 0,
    "window": -1,
    "dropout": -0.1,
    "norm": "",
    "norm_eps": 1.0,
    "feed_forward": "glu",
    "positions": "rope",
    "rope_base": math.inf,
    "activation": "tanh",
    "rope_scaling": "dynamic",
    "rope_factor": math.nan,
    "rope_attention_factor": 0.0,
    "init_std": 0.0,
}


@pytest.mark.parametrize("field", dataclasses.fields(GPTConfig), ids=lambda field: field.name)
def test_each_field_of_a_configuration_has_its_errors(field):
    with pytest.raises(TypeError, match=f"^{field.name} must be "):
        GPTConfig(**{**SMALL, field.name: [1]})
    if field.type is bool:
        assert field.name not in WRONG
    else:
        with pytest.raises(ValueError, match=f"^{field.name} must be "):
            GPTConfig(**{**SMALL, field.name: WRONG[field.name]})


def test_a_configuration_is_frozen_hashable_and_survives_json():
    config = GPTConfig(**SMALL, **VARIANTS["qwen3"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.emb_dim = 5
    assert GPTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert hash(config) == hash(dataclasses.replace(config))
    assert GPTConfig(dropout=0) == GPTConfig(dropout=0.0)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name must be one of gpt2-small, .*got 'gpt3'"):
        GPTConfig.preset("gpt3")
    with pytest.raises(TypeError, match="width"):
        GPTConfig.preset("gpt2-small", width=5)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.tensor([[1, 50]]), ValueError, "tokens must be ids from 0 to 49, got 1 to 50"),
        (torch.tensor([[-1, 3]]), ValueError, "tokens must be ids from 0 to 49, got -1 to 3"),
        (torch.zeros(1, 17, dtype=torch.int64), ValueError, "at most context_length=16 .*got 17"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "at least one token"),
        (torch.zeros(5, dtype=torch.int64), ValueError, r"\(batch, tokens\)"),
        (torch.zeros(1, 5, 7), ValueError, r"\(batch, tokens\)"),
        (torch.zeros(1, 5), TypeError, "int64"),
        (torch.zeros(1, 5, dtype=torch.bool), TypeError, "int64"),
        (torch.zeros(1, 5, 24, dtype=torch.int64), ValueError, r"\(batch, tokens\)"),
    ],
)
def test_a_model_refuses_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        build()(tokens)


@torch.no_grad()
def test_a_model_refuses_positions_and_caches_that_do_not_fit():
    model, ids = build(), random_ids()
    for wrong in (torch.arange(8, 17), torch.arange(-1, 8)):
        with pytest.raises(ValueError, match="position"):
            model(ids, positions=wrong)
    with pytest.raises(ValueError, match="positions must be"):
        model(ids, positions=torch.arange(1))
    with pytest.raises(ValueError, match="caches must be 2, one for each block, got 1"):
        model(ids, caches=[KeyValueCache(9)])
    caches = model.new_caches()
    model(ids, caches=caches)
    with pytest.raises(ValueError, match="context_length=16 with the cached, got 18"):
        model(ids, caches=caches)
    assert [cache.length for cache in caches] == [9, 9]
    with pytest.raises(ValueError, match="max_length"):
        model.new_caches(0)
