"""`--adapter`: a LoRA adapter, ours or PEFT's, goes with a model in the terminal, and errors are one clear line."""

import json

import pytest
import torch

from shared.finetuning.lora import attach_lora
from shared.finetuning.lora_files import adapter_tensors, save_adapter, save_peft_adapter
from shared.generation.streaming import generate_text
from shared.serving.models import open_model
from shared.tales.encoding import tale_encoding
from shared.weights.pretrained import load_pretrained
from tests.serving.small import write_small_chat
from tests.serving.test_cli import PROMPT, llm, one_line  # noqa: F401


@pytest.fixture
def folders(tmp_path):
    """An adapter of tales-tiny in both formats, and the text that it makes of the prompt."""
    model = load_pretrained("tales-tiny")
    attach_lora(model, "all-linear", rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_tensors(model, "default").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "ours", base="tales-tiny")
    save_peft_adapter(model, tmp_path / "peft", base="tales-tiny")
    return tmp_path, generate_text(model, tale_encoding(), PROMPT, 20, temperature=0.0)


def test_generate_with_an_adapter(llm, folders):  # noqa: F811
    folder, expected = folders
    plain = llm("generate", "tales-tiny", PROMPT, "--max-tokens", 20)[1]
    for kind in ("ours", "peft"):
        found = llm("generate", "tales-tiny", PROMPT, "--max-tokens", 20, "--adapter", folder / kind)
        assert found == (0, expected + "\n", "") and found[1] != plain


def test_the_adapter_is_merged(folders):
    found = open_model("tales-tiny", adapter=str(folders[0] / "ours")).model
    plain = load_pretrained("tales-tiny")
    names = {name for name, _ in found.named_parameters()}
    assert names == {name for name, _ in plain.named_parameters()}
    assert not torch.equal(found.blocks[0].attention.qkv.weight, plain.blocks[0].attention.qkv.weight)


def test_exported_with_an_adapter_and_as_peft(llm, folders, tmp_path):  # noqa: F811
    folder, expected = folders
    options = ("--to", "gguf", "--type", "F32", "--adapter", folder / "ours")
    assert llm("export", "tales-tiny", tmp_path / "merged.gguf", *options)[0] == 0
    found = llm("generate", tmp_path / "merged.gguf", PROMPT, "--max-tokens", 20)
    assert found[:2] == (0, expected + "\n")
    # As PEFT's: what we read back from it writes the same.
    status, _, said = llm("export", folder / "ours", tmp_path / "out", "--to", "peft")
    assert status == 0 and "adapter_config.json" in said
    found = llm("generate", "tales-tiny", PROMPT, "--max-tokens", 20, "--adapter", tmp_path / "out")
    assert found[:2] == (0, expected + "\n")
    status, _, error = llm("export", "tales-tiny", tmp_path / "other", "--to", "peft")
    assert status == 1 and one_line(error) and not (tmp_path / "other").exists()


def test_chat_with_an_adapter(llm, tmp_path):  # noqa: F811
    path = write_small_chat(tmp_path / "small.gguf")
    model = load_pretrained(path)
    attach_lora(model, "all-linear", rank=2)
    with torch.no_grad():
        for parameter in adapter_tensors(model, "default").values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "a", base="small")
    question = json.dumps({"prompt": "hello"}).encode()
    options = ("--max-tokens", 8, "--json")
    plain = llm("chat", path, *options, stdin=question)
    with_adapter = llm("chat", path, *options, "--adapter", tmp_path / "a", stdin=question)
    assert plain[0] == with_adapter[0] == 0 and plain[1] != with_adapter[1]


@pytest.mark.parametrize("what", ["none", "empty", "other base", "other architecture", "onnx"])
def test_what_does_not_fit_is_one_line(what, llm, folders, tmp_path):  # noqa: F811
    folder = folders[0]
    (tmp_path / "empty").mkdir()
    model, adapter, said = {
        "none": ("tales-tiny", folder / "missing", "must hold adapter.json or adapter_config.json"),
        "empty": ("tales-tiny", tmp_path / "empty", "must hold adapter.json or adapter_config.json"),
        "other base": ("tales-1m", folder / "ours", "must have the weights that"),
        "other architecture": ("tales-1m", folder / "peft", "must be"),
        "onnx": ("tales.onnx", folder / "ours", "an .onnx file takes"),
    }[what]
    status, written, error = llm("generate", model, PROMPT, "--adapter", adapter)
    assert status == 1 and written == "" and one_line(error) and said in error, error
