"""`shared.training.checkpoint`: read back to the last bit, and whole or not at all, wherever the writer is killed."""

import errno
import os
import signal

import pytest
import torch
from safetensors import SafetensorError

from shared.model.gpt import GPTConfig, GPTModel
from shared.training import checkpoint
from shared.training.checkpoint import (
    CheckpointError,
    checkpoints,
    join_optimizer_state,
    latest_checkpoint,
    load_checkpoint,
    load_model_state,
    model_state,
    random_states,
    save_checkpoint,
    set_random_states,
    split_optimizer_state,
)
from shared.training.optimizers import OPTIMIZERS, build_optimizers

CONFIG = GPTConfig(
    vocab_size=20, context_length=8, emb_dim=16, n_heads=2, n_layers=2, dropout=0.1, positions="rotary"
)
WEIGHTS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)}


def new_run(name: str) -> tuple[GPTModel, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    return model, build_optimizers(model, name, 0.01)


def train(model, optimizers, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(step))
        logits = model(ids[:, :-1])  # dropout draws from the global generator
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(name, tmp_path):
    unbroken = train(*new_run(name), range(8))
    model, optimizers = new_run(name)
    first = train(model, optimizers, range(4))
    states = [optimizer.state_dict() for optimizer in optimizers]
    path = save_checkpoint(tmp_path, 4, model_state(model), states, random=random_states(), extra={"seed": 7})

    torch.manual_seed(99)
    model = GPTModel(CONFIG)
    optimizers = build_optimizers(model, name, 0.5)  # the saved learning rate counts
    saved = load_checkpoint(path)
    load_model_state(model, saved.model)
    for optimizer, state in zip(optimizers, saved.optimizers, strict=True):
        optimizer.load_state_dict(state)
    set_random_states(saved.random)
    assert (saved.step, saved.extra) == (4, {"seed": 7})
    assert first + train(model, optimizers, range(4, 8)) == unbroken


def test_types_and_shapes_come_back_and_views_are_stored_whole(tmp_path):
    base = torch.randn(6, 4)
    model = {
        "view": base[:, ::2].T,
        "other": base,
        "half": base.bfloat16(),
        "count": torch.tensor(3),
        "empty": torch.empty(0, 2),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, model))
    assert loaded.model.keys() == model.keys() and loaded.optimizers == [] and loaded.random == {}
    for name, tensor in model.items():
        assert loaded.model[name].dtype == tensor.dtype and torch.equal(loaded.model[name], tensor)


def test_optimizer_state_is_split_and_joined():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95))
    parameter.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["label"] = "plain"
    tensors, rest = split_optimizer_state(state)
    assert set(tensors) == {"0/step", "0/exp_avg", "0/exp_avg_sq"} and rest["values"] == {"0/label": "plain"}
    assert join_optimizer_state(tensors, rest) == state


def test_a_tied_head_is_stored_once_and_a_state_must_fit():
    model = GPTModel(CONFIG)
    state = model_state(model)
    assert "output_head.weight" not in state and "token_embedding.weight" in state
    other = GPTModel(CONFIG)
    load_model_state(other, state)
    assert torch.equal(other.output_head.weight, model.output_head.weight)
    with pytest.raises(
        ValueError, match=r"token_embedding\.weight has shape \(3,\), the model's is \(20, 16\)"
    ):
        load_model_state(other, {**state, "token_embedding.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="more is unknown"):
        load_model_state(other, {**state, "more": torch.ones(3)})
    del state["final_norm.weight"]
    with pytest.raises(ValueError, match=r"final_norm\.weight is missing"):
        load_model_state(other, state)


def test_random_states_repeat_the_numbers():
    states = random_states()
    first = torch.rand(3)
    set_random_states(states)
    assert torch.equal(torch.rand(3), first)
    set_random_states({})
    assert not torch.equal(torch.rand(3), first)


def test_only_the_newest_are_kept_and_numbers_are_ordered_as_numbers(tmp_path):
    assert checkpoints(tmp_path / "none") == [] and latest_checkpoint(tmp_path / "none") is None
    for step in (0, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, WEIGHTS)
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000005").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000000",
        "step-99999999",
        "step-100000000",
    ]
    newest = save_checkpoint(tmp_path, 100_000_001, WEIGHTS, keep_last=2)
    assert latest_checkpoint(tmp_path) == newest
    assert [path.name for path in checkpoints(tmp_path)] == ["step-100000000", "step-100000001"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="step is -1"):
        save_checkpoint(tmp_path, -1, WEIGHTS)
    with pytest.raises(ValueError, match="keep_last 0"):
        save_checkpoint(tmp_path, 1, WEIGHTS, keep_last=0)
    save_checkpoint(tmp_path, 1, WEIGHTS)
    with pytest.raises(CheckpointError, match="step-00000001 was not written: it exists already"):
        save_checkpoint(tmp_path, 1, {})
    assert torch.equal(load_checkpoint(latest_checkpoint(tmp_path)).model["weight"], WEIGHTS["weight"])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_noticed(name, damage, tmp_path):
    path = save_checkpoint(tmp_path, 1, WEIGHTS, random=random_states()) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[0 if name == "state.json" else -1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: -3 if damage == "cut" else None])
    with pytest.raises(CheckpointError, match="step-00000001 cannot be read"):
        load_checkpoint(path.parent)


# ---- interrupted writers

STAGES = [
    (name, call)
    for name, calls in (("save_file", 3), ("_sha256", 3), ("_to_disk", 6))
    for call in range(calls)
]
STAGES += [("rename", 0), ("rename", 1), ("rmtree", 0)]


def fail_at(monkeypatch, name: str, call: int, failure) -> None:
    """Let the call number `call` of a part of `save_checkpoint` do half of its work, and then `failure()`."""
    owner = {"rename": checkpoint.os, "rmtree": checkpoint.shutil}.get(name, checkpoint)
    real, seen = getattr(owner, name), []

    def failing(*arguments, **options):
        seen.append(arguments)
        if len(seen) == call + 1:
            if name == "save_file":
                real(*arguments)
                os.truncate(arguments[1], 50)
            if name == "rmtree":
                os.unlink(next(iter(os.scandir(arguments[0]))).path)
            failure()
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.posix
@pytest.mark.parametrize(("name", "call"), STAGES)
def test_killed_anywhere_the_newest_checkpoint_is_whole(name, call, tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, WEIGHTS)
    child = os.fork()
    if child == 0:
        fail_at(monkeypatch, name, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save_checkpoint(tmp_path, 3, {"weight": torch.zeros(5)}, keep_last=2)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found = [load_checkpoint(path) for path in checkpoints(tmp_path)]
    written = (name, call) in (("rename", 1), ("rmtree", 0), ("_to_disk", 5))
    assert found[-1].step == (3 if written else 2)
    assert torch.equal(found[-1].model["weight"], torch.zeros(5) if written else WEIGHTS["weight"])
    save_checkpoint(tmp_path, 4, WEIGHTS, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(("name", "call"), [stage for stage in STAGES if stage != ("rmtree", 0)])
def test_a_full_disk_leaves_the_earlier_checkpoints(name, call, tmp_path, monkeypatch):
    def full():
        text = os.strerror(errno.ENOSPC)
        raise SafetensorError(text) if name == "save_file" else OSError(errno.ENOSPC, text)

    for step in (1, 2):
        save_checkpoint(tmp_path, step, WEIGHTS)
    with monkeypatch.context() as patch:
        fail_at(patch, name, call, full)
        with pytest.raises(CheckpointError, match=f"step-0000000[13] .*{os.strerror(errno.ENOSPC)}"):
            save_checkpoint(tmp_path, 3, {"weight": torch.zeros(5)}, keep_last=2)
    assert {load_checkpoint(path).step for path in checkpoints(tmp_path)} >= {1, 2}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.posix
def test_a_real_limit_of_the_file_size_is_a_clear_error(tmp_path):
    import resource

    save_checkpoint(tmp_path, 1, WEIGHTS)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(tmp_path, 2, {"weight": torch.zeros(100_000)})
        except CheckpointError as error:
            os._exit(7 if "step-00000002 was not written" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert torch.equal(load_checkpoint(latest_checkpoint(tmp_path)).model["weight"], WEIGHTS["weight"])
