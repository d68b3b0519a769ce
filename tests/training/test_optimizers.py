"""`training.optimizers` against torch's optimizers and the papers' rules, whole and sharded over two processes."""

import copy
import math
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.model.gpt import GPTConfig, GPTModel
from shared.training.optimizers import (
    OPTIMIZERS,
    Lion,
    Muon,
    build_optimizers,
    check_options,
    orthogonalize,
    qkv_splits,
    set_learning_rates,
)
from tests.tools.architecture import ROOT

SMALL = {"vocab_size": 40, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.0}


def small_model(seed: int = 0, **options) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(GPTConfig(**{**SMALL, **options}))


def train(model: nn.Module, optimizers: list, n_steps: int, seed: int = 7) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(n_steps):
        ids = torch.randint(40, (4, 12), generator=generator)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 1000))
def test_orthogonalise_keeps_singular_vectors_and_puts_each_singular_value_through_the_polynomial(
    rows, columns, seed
):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix / torch.linalg.matrix_norm(matrix), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(matrix), u @ torch.diag(s) @ vt, atol=1e-9, rtol=0)


def test_orthogonalise_treats_a_batch_as_its_matrices_and_zero_as_zero():
    matrices = torch.randn(2, 3, 6, 4)
    done = orthogonalize(matrices)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(done[i, j], orthogonalize(matrices[i, j]))
    assert not orthogonalize(torch.zeros(3, 4)).any()
    values = torch.linalg.svdvals(orthogonalize(torch.randn(50, 20)))
    assert values.min() > 0.5 and values.max() < 1.3
    with pytest.raises(ValueError, match=r"matrices must be \(\.\.\., rows, columns\).*\(3,\)"):
        orthogonalize(torch.zeros(3))
    with pytest.raises(ValueError, match=r"n_steps at least 1.*0"):
        orthogonalize(torch.zeros(3, 3), 0)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20)])
def test_muon_takes_the_steps_of_torch_s_muon(shape, nesterov, rounded, monkeypatch):
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(shape))
    second = nn.Parameter(first.detach().clone())
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    ours = Muon([first], **options, dtype=torch.bfloat16 if rounded else None)
    if not rounded:  # torch's Muon rounds its updates to bfloat16 by this method
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    theirs = torch.optim.Muon([second], **options)
    for _ in range(10):
        first.grad = torch.randn(shape)
        second.grad = first.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(first, second, atol=4e-2 if rounded else 1e-5, rtol=0)


def test_muon_updates_a_split_matrix_as_separate_matrices_and_a_batch_as_single_ones():
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(12, 8))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split((8, 2, 2))]
    together, apart = Muon([{"params": [whole], "split": (8, 2, 2)}]), [Muon([part]) for part in parts]
    for _ in range(5):
        whole.grad = torch.randn(12, 8)
        for part, gradient in zip(parts, whole.grad.split((8, 2, 2)), strict=True):
            part.grad = gradient.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=0)


def test_muon_skips_parameters_without_gradient_and_refuses_vectors_and_wrong_splits():
    still, moving = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moving.grad = torch.randn(3, 3)
    optimizer = Muon([still, moving], weight_decay=0.1)
    optimizer.step()
    assert torch.equal(still, torch.ones(3, 3)) and not torch.equal(moving, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"params must be matrices.*\(3,\)"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"split.*\(2, 2\).*\(3, 3\)"):
        Muon([{"params": [still], "split": (2, 2)}])
    for wrong in ({"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError):
            Muon([still], **wrong)


def test_lion_follows_the_algorithm_of_its_paper():
    generator = np.random.default_rng(0)
    weights, average = generator.normal(size=(4, 3)), np.zeros((4, 3))
    parameter = nn.Parameter(torch.from_numpy(weights.copy()))
    optimizer = Lion([parameter], lr=0.03, betas=(0.8, 0.95), weight_decay=0.2)
    for _ in range(20):
        gradient = generator.normal(size=(4, 3))
        gradient[0, 0] = 0.0  # an average of zero moves nothing but the decay
        update = np.sign(0.8 * average + 0.2 * gradient)
        weights = weights - 0.03 * (update + 0.2 * weights)
        average = 0.95 * average + 0.05 * gradient
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), weights, atol=1e-12)
    with pytest.raises(ValueError, match="betas must be in"):
        Lion([parameter], betas=(1.0, 0.9))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"tie_weights": False, "n_kv_heads": 2, "positions": "rotary"}])
def test_each_parameter_is_updated_by_one_group_and_vectors_never_decay(name, options):
    model = small_model(**options)
    model.blocks[0].attention_norm.weight.requires_grad_(False)
    optimizers = build_optimizers(model, name, 1e-3, weight_decay=0.3, matrix_learning_rate=0.01)
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    found = [parameter for _, group in groups for parameter in group["params"]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in found} == {id(p) for p in trained} and len(found) == len(trained)
    for optimizer, group in groups:
        assert group["lr"] == (0.01 if isinstance(optimizer, Muon) else 1e-3)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0.0)
    if name == "muon":
        inside = {id(p) for p in model.blocks.parameters() if p.dim() > 1}
        assert inside == {id(p) for _, g in groups[: len(optimizers[0].param_groups)] for p in g["params"]}
    peaks = [group["lr"] for _, group in groups]
    for factor in (0.25, 0.0, 0.5):
        set_learning_rates(optimizers, factor)
        assert [group["lr"] for _, group in groups] == [factor * peak for peak in peaks]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_known_optimizers_are_torch_s(name):
    ours, theirs = small_model(), small_model()
    reference = {
        "sgd": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, nesterov=True),
        "adam": lambda groups: torch.optim.Adam(groups, 0.01, betas=(0.9, 0.95)),
        "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, betas=(0.9, 0.95)),
    }[name]
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    first = train(ours, build_optimizers(ours, name, 0.01, weight_decay=0.1), 6)
    np.testing.assert_allclose(first, train(theirs, [reference(groups)], 6), atol=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_queries_keys_and_values_are_split_at_their_rows():
    model = small_model(n_kv_heads=2, head_dim=8)
    splits = qkv_splits(model)
    assert set(splits) == {block.attention.qkv.weight for block in model.blocks}
    assert set(splits.values()) == {(32, 16, 16)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_resumes_to_the_last_bit(name):
    model = small_model()
    optimizers = build_optimizers(model, name, 3e-3)
    train(model, optimizers, 4)
    saved = copy.deepcopy((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
    losses = train(model, optimizers, 4, seed=8)
    again = small_model(seed=1)
    again.load_state_dict(saved[0])
    restored = build_optimizers(again, name, 1.0)
    for optimizer, state in zip(restored, saved[1], strict=True):
        optimizer.load_state_dict(state)
    assert train(again, restored, 4, seed=8) == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_on_a_repeated_batch_falls(name):
    model = small_model()
    optimizers = build_optimizers(model, name, 0.05 if name == "sgd" else 3e-3)
    losses = [train(model, optimizers, 1)[0] for _ in range(15)]
    assert losses[-1] < losses[0] - 0.3


def test_bad_arguments_are_named():
    model = small_model()
    for arguments, message in (
        (("rmsprop", 1e-3), "name must be one of sgd, adam, adamw, lion, muon, got 'rmsprop'"),
        (("adamw", 0.0), "learning_rate must be above 0, got 0.0"),
        (("adamw", math.nan), "learning_rate must be above 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            build_optimizers(model, *arguments)
    with pytest.raises(ValueError, match="matrices inside `blocks`"):
        build_optimizers(nn.Linear(3, 3), "muon", 1e-3)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        check_options(lr=0.1, weight_decay=-1, betas=(0.9,))


SHARDED = """
    import copy, sys, torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from shared.training.optimizers import build_optimizers
    from shared.pretraining.processes import end_this_process
    from tests.training.test_optimizers import small_model, train

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for name in ("sgd", "adam", "adamw", "lion", "muon"):
        whole = small_model()
        sharded = copy.deepcopy(whole)
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        # Both ranks read the same batch, so the average over ranks is the gradient of one process.
        ours = train(sharded, build_optimizers(sharded, name, 1e-3), 6)
        expected = train(whole, build_optimizers(whole, name, 1e-3), 6)
        worst = max(abs(a - b) for a, b in zip(ours, expected))
        assert worst < 1e-5, (name, worst)
        for a, b in zip(sharded.parameters(), whole.parameters()):
            torch.testing.assert_close(a.full_tensor(), b, atol=2e-4, rtol=0)
    dist.destroy_process_group()
    end_this_process()
"""


@pytest.mark.posix
def test_optimizers_take_the_same_steps_on_parameters_sharded_by_fsdp2(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in ranks:
            process.kill()
