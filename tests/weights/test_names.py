"""`shared.weights.names`: what transformers saves is what our views show, bit for bit, in every family."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.configs import config_from_hf
from shared.weights.files import empty_model, load_safetensors
from shared.weights.names import huggingface_views, unwrap, unwrapped_name
from shared.weights.pretrained import GPT2_REPOSITORIES
from tests.weights.models import (
    ROPES,
    WRAPPED,
    build,
    config_of,
    config_of_transformers,
    process_group,
    theirs,
)

THEIRS = (
    "gpt2",
    "gpt2, inner width",
    *ROPES,
    "llama, tied",
    "llama, biases",
    "qwen3",
    "qwen3, window",
    "mistral",
    "mixtral",
    "gpt2, gelu",
    "gpt2, relu",
    "helium",
    "helium, yarn",
    "qwen3_moe",
    "qwen3_moe, window",
)


def loaded(folder) -> GPTModel:
    config = config_of(folder)
    model = GPTModel(config_from_hf(config)).eval()
    load_safetensors(model, folder / "model.safetensors", config["model_type"])
    return model


@pytest.fixture(scope="module", params=THEIRS)
def saved(request, tmp_path_factory):
    model = theirs(request.param)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_a_saved_model_of_transformers_computes_the_same_here(saved):
    reference, folder = saved
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(folder)(ids), reference(ids).logits, atol=2e-5, rtol=2e-5)


def test_the_views_of_a_loaded_model_are_the_file_bit_for_bit(saved):
    _, folder = saved
    views = huggingface_views(loaded(folder), config_of(folder)["model_type"])
    stored = load_file(folder / "model.safetensors")
    assert views.keys() == stored.keys()
    assert all(torch.equal(views[name], stored[name]) for name in stored)


@torch.no_grad()
def test_transformers_reads_what_the_views_store(saved, tmp_path):
    reference, folder = saved
    views = huggingface_views(loaded(folder), config_of(folder)["model_type"])
    save_file(
        {name: view.contiguous() for name, view in views.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = type(reference).from_pretrained(tmp_path).eval()
    ids = torch.arange(12)[None]
    assert all(map(torch.equal, again.state_dict().values(), reference.state_dict().values()))
    torch.testing.assert_close(again(ids).logits, reference(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", GPT2_REPOSITORIES)
def test_every_size_of_gpt2_has_the_names_and_shapes_of_its_file(name):
    # One block: all are alike, and test_gpt counts the parameters of the whole.
    config = GPTConfig.preset(name, n_layers=1)
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(config_of_transformers(config)).state_dict()
    theirs.pop("lm_head.weight")  # tied, so not in the file
    ours = huggingface_views(empty_model(config), "gpt2")
    assert {key: value.shape for key, value in ours.items()} == {key: t.shape for key, t in theirs.items()}


def test_families_that_do_not_fit_are_refused():
    model = GPTModel(GPTConfig.preset("bytes-tiny"))
    with pytest.raises(ValueError, match=r"family must be one of gpt2, llama, .*got 'bert'"):
        huggingface_views(model, "bert")
    with pytest.raises(ValueError, match=r"llama has no counterpart of position_embedding.weight"):
        huggingface_views(model, "llama")


# --- wrappers


@pytest.fixture(scope="module")
def alone():
    with process_group():
        yield


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_model_and_its_names_are_found_inside_any_wrapper(kind, alone):
    model = build()
    wrapped = WRAPPED[kind](model)
    inside = unwrap(wrapped)
    assert type(inside) is GPTModel and inside.n_parameters == model.n_parameters
    assert kind in ("average", "compiled blocks") or inside is model
    names = [name for name, _ in model.named_parameters()]
    assert [unwrapped_name(name) for name, _ in wrapped.named_parameters()] == names
    assert [name for name, _ in wrapped.named_parameters()] != names
    views, own = huggingface_views(wrapped, "gpt2"), huggingface_views(model, "gpt2")
    assert views.keys() == own.keys() and all(torch.equal(views[name], own[name]) for name in own)


def test_what_is_not_wrapped_stays_as_it_is():
    class Module(torch.nn.Module):
        """A child of that name, and another."""

        def __init__(self):
            super().__init__()
            self.module, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    model = Module()
    assert unwrap(model) is model and unwrap(model.head) is model.head
    for name in ("blocks.0.module.weight", "blocks.10.attention.qkv.bias", "modules.0.weight", "module"):
        assert unwrapped_name(name) == name


def test_a_file_with_the_names_of_wrappers_is_read(tmp_path):
    model, other = build(), build(seed=1)
    weights = {f"module._orig_mod.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    load_safetensors(torch.compile(other), tmp_path / "model.safetensors", None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
