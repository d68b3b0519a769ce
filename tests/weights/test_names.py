"""`shared.weights.names`: what transformers saves is what our views show, bit for bit, in every family."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.configs import config_from_hf
from shared.weights.files import load_safetensors
from shared.weights.names import huggingface_views
from shared.weights.pretrained import GPT2_REPOSITORIES, empty_model
from tests.weights.models import ROPES, config_of, config_of_transformers, theirs

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
