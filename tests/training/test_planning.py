"""`training.planning` against models that are built, counted FLOPs and activations, and known tables."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.model.gpt import PRESETS, GPTConfig, GPTModel
from shared.training.planning import (
    H100,
    Layout,
    Machine,
    activation_bytes,
    best_plan,
    block_matrices,
    data_parallel_bytes,
    feed_forward_width,
    flops_per_token,
    kept_numbers,
    parameter_count,
    plan,
    state_bytes,
)
from tests.configurations import LLAMA

SMALL = {"vocab_size": 90, "context_length": 64, "emb_dim": 48, "n_heads": 4, "n_layers": 2, "dropout": 0.0}
VARIANTS = {
    "gpt2": {},
    "gpt1": {"pre_norm": False},
    "modern": LLAMA,
    "grouped": {**LLAMA, "n_kv_heads": 2, "head_dim": 16, "qk_norm": True},
    "untied": {"tie_weights": False, "positions": "sinusoidal", "bias": False},
    "wide swiglu with biases": {"feed_forward": "swiglu", "feed_forward_dim": 100},
}


def config_of(name: str, **options) -> GPTConfig:
    return GPTConfig(**{**SMALL, **VARIANTS[name], **options})


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_presets_are_those_of_the_model(preset):
    with torch.device("meta"):
        model = GPTModel(GPTConfig.preset(preset))
    assert parameter_count(model.config) == model.n_parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_matrices_and_flops_of_variants(name):
    config = config_of(name)
    model = GPTModel(config)
    assert parameter_count(config) == model.n_parameters
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() > 1)
    assert block_matrices(config) * config.n_layers == matrices
    ids = torch.randint(90, (2, 32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert flops_per_token(config, 32) * ids.numel() == counter.get_total_flops()


def kept(config: GPTConfig, n_rows: int, n_tokens: int) -> int:
    model, saved = GPTModel(config), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(config.vocab_size, (n_rows, n_tokens))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model.hidden_states(ids)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)


@pytest.mark.parametrize("name", ["gpt2", "modern", "grouped"])
def test_kept_activations_are_those_that_autograd_keeps(name):
    config = config_of(name)
    deeper = dataclasses.replace(config, n_layers=4)
    per_block = (kept(deeper, 4, 64) - kept(config, 4, 64)) / 2
    assert kept_numbers(config) * 4 * 4 * 64 == pytest.approx(per_block, rel=0.06)
    logits = 90 * (4 + 4) * 4 * 64
    whole = activation_bytes(config, Layout(), 4, 64, width=4, checkpointing=False) - logits
    assert whole == pytest.approx(2 * per_block, rel=0.06)


def test_state_is_sixteen_bytes_a_parameter_and_falls_as_in_the_paper_on_zero():
    # Rajbhandari et al. (2020), figure 1: 7.5 billion parameters, 64 GPUs, 120 GB and 1.9 GB.
    assert state_bytes(7.5e9, Layout(data=64)) == pytest.approx(120e9)
    assert state_bytes(7.5e9, Layout(data=64, sharded=True)) == pytest.approx(1.9e9, rel=0.02)
    assert state_bytes(8e9, Layout(data=4, tensor=4, pipeline=2)) == pytest.approx(16e9)
    assert state_bytes(100, Layout(), weights=4, gradients=4, optimizer=8) == 1600


@settings(deadline=None, max_examples=30)
@given(n_ranks=st.integers(1, 1000), n_bytes=st.integers(1, 10**9))
def test_sharding_sends_half_as_much_again_as_reducing(n_ranks, n_bytes):
    reduced, sharded = (data_parallel_bytes(n_bytes, n_ranks, flag) for flag in (False, True))
    assert sharded == pytest.approx(1.5 * reduced)
    assert reduced == 0 if n_ranks == 1 else n_bytes <= reduced < 2 * n_bytes


def test_checkpointing_and_every_kind_of_parallelism_lower_what_a_gpu_holds():
    config = GPTConfig.preset("gpt2-xl", n_heads=20)
    whole = activation_bytes(config, Layout(), 4, 1024, checkpointing=False)
    assert activation_bytes(config, Layout(), 4, 1024) < whole / 2
    assert activation_bytes(config, Layout(tensor=4), 4, 1024) < activation_bytes(config, Layout(), 4, 1024)
    one = plan(config, Layout(), H100, 64, 1024)
    for layout in (Layout(data=4, sharded=True), Layout(tensor=4), Layout(pipeline=4)):
        spread = plan(config, layout, H100, 64, 1024)
        assert spread.state < 0.3 * one.state
        assert spread.flops == one.flops
        assert one.seconds / 4 <= spread.seconds < one.seconds
        assert spread.sent > 0 == one.sent
    assert plan(config, Layout(data=4), H100, 64, 1024).memory == one.memory


def test_time_by_hand_on_a_round_machine():
    machine = Machine(peak=1e12, memory=1e12, node=8, inside=1e9, between=1e8, utilization=1.0)
    config = config_of("modern")
    flops = flops_per_token(config, 64) * 8 * 64
    assert plan(config, Layout(), machine, 8, 64).seconds == pytest.approx(4 / 3 * flops / 1e12)
    # Two ranks wait for their gradients: 2 bytes a parameter, one all-reduce of two ranks sends them once.
    fast = dataclasses.replace(machine, peak=1e15)
    assert plan(config, Layout(data=2), fast, 8, 64).seconds == pytest.approx(
        2 * parameter_count(config) / 1e9
    )
    # A pipeline of 2 stages and 8 micro-batches takes 9/8 of half the time.
    slow = dataclasses.replace(machine, peak=1e6)
    piped = plan(config, Layout(pipeline=2), slow, 8, 64)
    assert piped.seconds == pytest.approx(4 / 3 * flops / 1e6 / 2 * 9 / 8)


def test_the_best_plan_fits_and_no_small_machine_takes_a_large_model():
    shape = {
        "vocab_size": 32000,
        "context_length": 4096,
        "emb_dim": 8192,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "feed_forward_dim": 28672,
        "tie_weights": False,
    }
    llama = GPTConfig(**LLAMA | shape)
    assert parameter_count(llama) == 68_976_648_192  # Llama 2 70B
    assert best_plan(llama, 1, H100, 1024, 4096) is None
    times = []
    for n_gpus in (64, 256, 1024):
        best = best_plan(llama, n_gpus, H100, 1024, 4096)
        assert best.layout.n_gpus == n_gpus and best.memory <= 0.9 * H100.memory
        times.append(best.seconds)
    assert times == sorted(times, reverse=True)
    assert str(best_plan(GPTConfig.preset("gpt2-small"), 8, H100, 512, 1024).layout) == "DDP 8"
    assert str(Layout()) == "one GPU" and str(Layout(2, 4, 1, True)) == "FSDP 2 × TP 4"


def test_bad_arguments_are_named():
    config = GPTConfig.preset("gpt2-small")
    for call, message in (
        (lambda: Layout(data=0), "data must be at least 1, got 0"),
        (lambda: plan(config, Layout(data=3), H100, 64, 1024), "n_rows=64 must be a multiple of 3 for DDP 3"),
        (lambda: plan(config, Layout(pipeline=5), H100, 64, 1024), "n_layers=12 must be a multiple of 5"),
        (lambda: plan(config, Layout(tensor=8), H100, 64, 1024), "n_heads=12 must be a multiple of 8"),
        (lambda: feed_forward_width(GPTConfig(feed_forward="moe")), "must be gelu or swiglu, got 'moe'"),
        (lambda: parameter_count(GPTConfig(feed_forward="moe")), "must be gelu or swiglu, got 'moe'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
