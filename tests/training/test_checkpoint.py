"""`shared.training.checkpoint`: read back to the last bit, and whole or not at all, wherever the writer is killed."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from shared.model.gpt import GPTConfig, GPTModel
from shared.training import checkpoint
from shared.training.checkpoint import (
    CheckpointError,
    checkpoints,
    from_json,
    latest_checkpoint,
    load_checkpoint,
    load_model_state,
    model_state,
    random_states,
    save_checkpoint,
    set_random_states,
    to_json,
)
from shared.training.optimizers import OPTIMIZERS, build_optimizers
from tests.weights.models import WRAPPED, process_group

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


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: torch.tensor(1.0))
    return optimizer


def same(a: object, b: object) -> bool:
    """Equal, and of the same types, however deep."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


MAKERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95)),
    "a learning rate that is a tensor": lambda parameters: torch.optim.AdamW(
        parameters, lr=torch.tensor(0.1)
    ),
    "numbers in the state": lambda parameters: torch.optim.ASGD(parameters),
    "tuples with None in them": lambda parameters: torch.optim.Adafactor(parameters),
    "lists of tensors": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_optimizer_states_come_back_with_their_types(kind, tmp_path):
    make = MAKERS[kind]
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 3))]
    optimizer = stepped(make(parameters))
    state = optimizer.state_dict()
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, WEIGHTS, [state, state]))
    assert len(loaded.optimizers) == 2 and all(same(each, state) for each in loaded.optimizers)
    fresh = make([torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters])
    fresh.load_state_dict(loaded.optimizers[0])
    assert same(stepped(fresh).state_dict(), stepped(optimizer).state_dict())


def test_what_json_would_change_comes_back_as_it_was(tmp_path):
    extra = {
        "tuple": (1, (2.5, None), []),
        "keys": {0: "a", 1: {"b": (3,)}, (2, "c"): True, None: False, 1.5: 0, "1": 1},
        "marks": [{"tuple": [1]}, {"pairs": []}, {"tensor": "x"}, {"tensor": 1, "tuple": 2}],
        "floats": [0.1, 1e-300, float("inf"), float("-inf"), float("nan")],
        "tensor": [torch.arange(3), {0: torch.ones(2, dtype=torch.bfloat16)}],
        "text": "Grüße\n\0",
    }
    assert same(load_checkpoint(save_checkpoint(tmp_path, 1, WEIGHTS, extra=extra)).extra, extra)
    numbers = {"loss": np.float32(0.1), "step": np.int64(3), "done": np.bool_(True)}
    found = load_checkpoint(save_checkpoint(tmp_path, 2, WEIGHTS, extra=numbers)).extra
    assert found == numbers and [type(value) for value in found.values()] == [float, int, bool]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.integers() | st.sampled_from(["tuple", "pairs", "tensor", "x"]), inner)
        ),
    )
)
def test_any_plain_value_survives_json(value):
    assert same(from_json(json.loads(json.dumps(to_json(value, "value", {}))), {}), value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {"path": [Path("x")]}}, r"extra\['path'\]\[0\] must be numbers, .* got .*Path"),
        (
            {"optimizers": [{"state": {}, "param_groups": [{"lr": print}]}]},
            r"optimizers\[0\]\['param_groups'\]\[0\]\['lr'\] must be numbers, texts, .* got <built-in",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_there_is_a_file(options, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path, 1, WEIGHTS, **options)
    assert not list(tmp_path.iterdir())


def test_any_error_on_the_way_leaves_nothing_half_written(tmp_path):
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path, 1, {"weight": torch.ones(2), "not a tensor": 3})
    assert not list(tmp_path.iterdir())


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


@pytest.fixture(scope="module")
def alone():
    with process_group():
        yield


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_saved_under_its_own_names_and_loaded_into_any_other(kind, alone, tmp_path):
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    path = save_checkpoint(tmp_path, 1, model_state(WRAPPED[kind](model)))
    torch.manual_seed(1)
    plain, wrapped = GPTModel(CONFIG), WRAPPED[kind](GPTModel(CONFIG))
    saved = load_checkpoint(path).model
    assert saved.keys() == model_state(model).keys()
    for other in (plain, wrapped):
        load_model_state(other, saved)
        found = model_state(other)
        assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


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


LIMITED = """
import resource, signal, sys
import torch
from shared.training.checkpoint import CheckpointError, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_checkpoint(sys.argv[1], 2, {"weight": torch.zeros(100_000)})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.posix
def test_a_real_limit_of_the_file_size_is_a_clear_error(tmp_path):
    save_checkpoint(tmp_path, 1, WEIGHTS)
    # A process of its own: one that is forked from here would wait for threads of torch that it does not have.
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "step-00000002 was not written" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert torch.equal(load_checkpoint(latest_checkpoint(tmp_path)).model["weight"], WEIGHTS["weight"])


def test_a_folder_whose_name_is_no_utf_8_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "a\udcffb"
    with pytest.raises(ValueError, match="this path cannot be used"):
        save_checkpoint(folder, 1, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="this path cannot be used"):
        load_checkpoint(folder / "step-00000001")
    assert list(tmp_path.iterdir()) == []
