"""`shared.weights.files`: safetensors as others write them, read in pieces, and folders written whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import shared.weights.files
from shared.data.download import REPOSITORY_ROOT
from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.configs import config_from_hf
from shared.weights.files import (
    load_safetensors,
    new_file,
    read_header,
    read_pieces,
    save_checkpoint_folder,
    stored_dtype,
    write_folder,
)
from shared.weights.huggingface import export_to_hugging_face
from shared.weights.names import huggingface_views
from shared.weights.pretrained import load_pretrained
from tests.model.test_gpt import VARIANTS as MODELS
from tests.weights.models import (
    WRAPPED,
    build,
    config_of,
    logits,
    process_group,
    random_ids,
    same_parameters,
    theirs,
)

# --- files as others write them


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 2, 10]),
    tied=st.booleans(),
    family=st.sampled_from(["llama", "qwen3", "mixtral", "qwen3_moe"]),
)
def test_any_shape_goes_through_a_file_and_back(kv_heads, head_dim, tied, family, tmp_path):
    options = {
        "norm": "rmsnorm",
        "positions": "rotary",
        "bias": False,
        "qkv_bias": False,
        "n_kv_heads": kv_heads,
        "feed_forward": "moe" if family in ("mixtral", "qwen3_moe") else "swiglu",
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "vocab_size": 9,
        "context_length": 4,
        "emb_dim": 16,
        "n_heads": 4,
        "n_layers": 2,
    }
    if "moe" in options.values():
        options["n_experts"] = 3
    config = GPTConfig(**options, head_dim=head_dim, tie_weights=tied)
    model, other = GPTModel(config), GPTModel(config)
    views = huggingface_views(model, family)
    assert sum(view.numel() for view in views.values()) == model.n_parameters
    save_file({name: view.contiguous() for name, view in views.items()}, tmp_path / "one.safetensors")
    load_safetensors(other, tmp_path / "one.safetensors", family)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def tensors_of(name: str, tmp_path) -> tuple[GPTModel, dict[str, torch.Tensor]]:
    """A model of ours that fits, with other weights, and the tensors that transformers stored."""
    theirs(name).save_pretrained(tmp_path)
    return GPTModel(config_from_hf(config_of(tmp_path))), load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "family", "prefix"), [("gpt2", "gpt2", "transformer."), ("default", "llama", "model.")]
)
def test_names_without_prefix_buffers_and_several_files_are_read(name, family, prefix, tmp_path):
    model, tensors = tensors_of(name, tmp_path)
    stripped = {key.removeprefix(prefix): value for key, value in tensors.items()}
    stripped |= {
        "h.0.attn.bias": torch.ones(1, 1, 16, 16),
        "layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    half = len(stripped) // 2
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, keys in zip(paths, (list(stripped)[:half], list(stripped)[half:]), strict=True):
        save_file({key: stripped[key] for key in keys}, path)
    load_safetensors(model, paths, family)
    assert all(torch.equal(view, tensors[key]) for key, view in huggingface_views(model, family).items())
    with pytest.raises(ValueError, match=r"b.safetensors holds .*, which an earlier file holds too"):
        load_safetensors(model, [*paths, paths[1]], family)


def test_weights_are_converted_to_the_models_type(tmp_path):
    model, tensors = tensors_of("default", tmp_path)
    save_file({key: value.bfloat16() for key, value in tensors.items()}, tmp_path / "half.safetensors")
    load_safetensors(model.double(), str(tmp_path / "half.safetensors"), "llama")
    stored = tensors["model.norm.weight"].bfloat16().double()
    assert torch.equal(model.final_norm.weight, stored)


def test_a_head_beside_a_tied_one_must_be_the_embedding(tmp_path):
    model, tensors = tensors_of("llama, tied", tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "head.safetensors")
    load_safetensors(model, tmp_path / "head.safetensors", "llama")
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_safetensors(model, tmp_path / "head.safetensors", "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing in the file; 1 names"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}),
            "model.layers.0.self_attn.q_proj.bias has no place in the model",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(24, 40)}),
            r"model.layers.1.mlp.up_proj.weight must have shape \(40, 24\), got \(24, 40\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(change, message, tmp_path):
    model, tensors = tensors_of("default", tmp_path)
    before = [parameter.clone() for parameter in model.parameters()]
    change(tensors)
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=message):
        load_safetensors(model, tmp_path / "wrong.safetensors", "llama")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_models_without_a_file_or_memory_are_refused(tmp_path):
    model = GPTModel(GPTConfig.preset("bytes-tiny"))
    with pytest.raises(FileNotFoundError):
        load_safetensors(model, tmp_path / "nothing.safetensors", "gpt2")
    with torch.device("meta"):
        empty = GPTModel(model.config)
    with pytest.raises(ValueError, match="meta device"):
        load_safetensors(empty, tmp_path / "nothing.safetensors", "gpt2")


def test_numbers_that_are_not_float_are_refused(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"dtype of the stored weights must be one of F64, F32.*'I8'"):
        stored_dtype([tmp_path / "whole.safetensors"])


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    limit=st.integers(1, 40),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_pieces_are_the_tensor(shape, limit, kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "one.safetensors"
    tensor = torch.randn(shape).to(kind)
    save_file({"x": tensor, "y": torch.ones(2)}, path)
    assert read_header(path)["x"][0] == tuple(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.weights.files, "PIECE_NUMBERS", limit)
        pieces = list(read_pieces(path, "x"))
    assert torch.equal(torch.cat([rows for _, rows in pieces]), tensor)
    starts = [sum(len(rows) for _, rows in pieces[:i]) for i in range(len(pieces))]
    assert [start for start, _ in pieces] == starts
    assert all(rows.numel() <= limit or len(rows) == 1 for _, rows in pieces)


# --- folders


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_variant_comes_back_from_our_own_format(options, tmp_path):
    model = build(**{**options, "vocab_size": 50, "context_length": 16})
    save_checkpoint_folder(model, tmp_path / "saved", recipe={"seed": 3})
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["recipe"] == {"seed": 3}
    back = load_pretrained(tmp_path / "saved")
    assert back.config == model.config and same_parameters(model, back)
    assert len(load_file(tmp_path / "saved" / "model.safetensors")) == len(list(model.parameters()))
    ids = random_ids(50, 16)
    assert torch.equal(logits(back, ids), logits(model, ids))  # tables that are computed are right too


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(FileExistsError, match=name):
            export_to_hugging_face(build(), tmp_path / name)
        with pytest.raises(FileExistsError, match=name):
            save_checkpoint_folder(build(), tmp_path / name)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_to_hugging_face(build(), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "taken"]


@pytest.mark.parametrize("names", [[], ["config.json"], ["config.json", "model.safetensors"]])
def test_a_checkpoint_is_replaced_only_when_that_is_asked_for(names, tmp_path):
    first, second, folder = build(1), build(2, n_layers=1), tmp_path / "saved"
    save_checkpoint_folder(first, folder, note="first")
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    if names:
        with pytest.raises(FileExistsError, match=r"folder must be new or be empty, got .*saved"):
            save_checkpoint_folder(second, folder)
        assert sorted(path.name for path in folder.iterdir()) == names
    save_checkpoint_folder(second, folder, replace=True)
    assert same_parameters(load_pretrained(folder), second)
    assert "note" not in json.loads((folder / "config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_with_more_than_a_checkpoint_is_never_replaced(tmp_path):
    model, folder = build(), tmp_path / "saved"
    save_checkpoint_folder(model, folder)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (folder, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=r"new or hold nothing but config.json, model.safetensors"):
            save_checkpoint_folder(build(2), path, replace=True)
    assert same_parameters(load_pretrained(folder), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "saved"]


def test_a_given_state_is_written_and_must_fit(tmp_path):
    model, other = build(1, tie_weights=True), build(2, tie_weights=True)
    state = {name: parameter.detach() for name, parameter in other.named_parameters()}
    save_checkpoint_folder(model, tmp_path / "saved", state=state)
    assert same_parameters(load_pretrained(tmp_path / "saved"), other)
    norm = "final_norm.weight"
    for wrong, message in (
        ({**state, "extra": state[norm]}, "names of the model's parameters, got a difference in extra"),
        ({name: state[name] for name in state if name != norm}, f"got a difference in {norm}"),
        ({**state, norm: state[norm][:5]}, rf"{norm} of shape \(24,\), got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            save_checkpoint_folder(model, tmp_path / "wrong", state=wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_config_json_is_the_same_text_on_every_system(tmp_path):
    save_checkpoint_folder(build(), tmp_path / "saved", note="für später")
    text = (tmp_path / "saved" / "config.json").read_bytes()
    assert text.endswith(b"\n}\n") and b"\r" not in text and "für später".encode() in text


def state_of(folder: Path, models: dict[str, GPTModel]) -> str:
    """Return which of the models a folder is, "" where there is none; it must not be anything between."""
    if not folder.exists():
        return ""
    config = json.loads((folder / "config.json").read_text())
    assert same_parameters(load_pretrained(folder), models[config["note"]])
    return config["note"]


@pytest.mark.parametrize("replace", [False, True])
def test_at_every_step_the_folder_is_the_earlier_one_or_the_new_one(replace, monkeypatch, tmp_path):
    # Whoever is killed leaves what is there at this moment.
    models, folder, seen = {"first": build(1), "second": build(2)}, tmp_path / "saved", []
    if replace:
        save_checkpoint_folder(models["first"], folder, note="first")

    def watched(function):
        def watching(*arguments, **options):
            seen.append(state_of(folder, models))
            if not seen[-1] and replace:
                hidden = next(tmp_path.glob(".saved-*"))
                assert state_of(hidden / "earlier", models) == "first"
                assert state_of(hidden / "part", models) == "second"
            return function(*arguments, **options)

        return watching

    for owner, name in (
        (shared.weights.files, "save_file"),
        (shared.weights.files, "to_disk"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "rename"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    save_checkpoint_folder(models["second"], folder, note="second", replace=replace)
    seen.append(state_of(folder, models))
    order = [state for state, before in zip(seen, [None, *seen], strict=False) if state != before]
    assert order == (["first", "", "second"] if replace else ["", "second"]) and len(seen) > 8


@pytest.mark.parametrize("failing", ["save_file", "to_disk", "rename"])
@pytest.mark.parametrize(
    "error", [OSError("no space left"), SafetensorError("no space left"), KeyboardInterrupt()]
)
def test_an_error_in_any_step_leaves_what_was_there(error, failing, monkeypatch, tmp_path):
    first, folder = build(1), tmp_path / "saved"
    save_checkpoint_folder(first, folder)
    owner = Path if failing == "rename" else shared.weights.files
    real, left = getattr(owner, failing), {"save_file": 1, "to_disk": 2, "rename": 2}[failing]

    def fail(*arguments: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, failing, fail)
    expected = OSError if isinstance(error, SafetensorError) and failing == "save_file" else type(error)
    with pytest.raises(expected):
        save_checkpoint_folder(build(2), folder, replace=True)
    assert same_parameters(load_pretrained(folder), first)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.posix
def test_a_full_disk_is_one_clear_error_and_leaves_what_was_there(tmp_path):
    import resource

    first, folder = build(1), tmp_path / "saved"
    save_checkpoint_folder(first, folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"saved cannot be written: "):
            save_checkpoint_folder(build(2), folder, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same_parameters(load_pretrained(folder), first)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


KILLED = """
import os, signal, sys
from pathlib import Path
from shared.weights.files import save_checkpoint_folder
from shared.weights.pretrained import load_pretrained
left = int(sys.argv[1])
real = Path.rename
def dying(*values):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*values)
Path.rename = dying
save_checkpoint_folder(load_pretrained(sys.argv[2]), sys.argv[3], note="second", replace=True)
"""


@pytest.mark.posix
@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_process_leaves_the_earlier_folder_whole(stage, tmp_path):
    models = {"first": build(1), "second": build(2)}
    for name, model in models.items():
        save_checkpoint_folder(model, tmp_path / name, note=name)
    command = [sys.executable, "-c", KILLED, str(stage), str(tmp_path / "second"), str(tmp_path / "first")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY_ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    hidden = next(tmp_path.glob(".first-*"))
    where = tmp_path / "first" if stage == 1 else hidden / "earlier"
    assert state_of(where, models) == "first" and state_of(hidden / "part", models) == "second"
    # The next one is not disturbed.
    save_checkpoint_folder(models["second"], tmp_path / "first", note="second", replace=True)
    assert state_of(tmp_path / "first", models) == "second"


# --- wrappers


@pytest.fixture(scope="module")
def alone():
    with process_group():
        yield


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_saved_and_exported_under_its_own_names(kind, alone, tmp_path):
    model = build()
    wrapped = WRAPPED[kind](model)
    save_checkpoint_folder(wrapped, tmp_path / "ours")
    export_to_hugging_face(wrapped, tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert same_parameters(load_pretrained(tmp_path / folder), model)
    # A state that was gathered elsewhere may have the wrapper's names too.
    state = {name: parameter.detach() + 1 for name, parameter in wrapped.named_parameters()}
    save_checkpoint_folder(wrapped, tmp_path / "gathered", state=state)
    found = load_pretrained(tmp_path / "gathered")
    assert all(torch.equal(a, b + 1) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def test_a_path_that_is_no_utf_8_is_refused_and_not_called_damaged(tmp_path):
    with pytest.raises(ValueError, match="this path cannot be used"):
        read_header(tmp_path / "a\udcffb")
    with pytest.raises(ValueError, match="this path cannot be used"):
        write_folder(tmp_path / "a\udcffb", {}, {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_appears_when_it_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "inner" / "file.bin"
    with new_file(path) as part:
        part.write_bytes(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    # What fails, in the block or behind it, leaves nothing of the file and nothing beside it.
    other = tmp_path / "inner" / "other.bin"
    with pytest.raises(ValueError, match="broken"), new_file(other) as part:
        part.write_bytes(b"half")
        raise ValueError("broken")
    monkeypatch.setattr(
        shared.weights.files, "to_disk", lambda place: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"), new_file(other) as part:
        part.write_bytes(b"all")
    monkeypatch.undo()
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="path must be new"), new_file(path):
        raise AssertionError("the block must not run")
    with pytest.raises(ValueError, match="not UTF-8"), new_file("bad\udcff"):
        raise AssertionError("the block must not run")
