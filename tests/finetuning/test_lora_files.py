"""Adapters in folders: ours, checked against their base, and PEFT's, which computes the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from shared.data.models import has_model
from shared.finetuning.features import weights_hash
from shared.finetuning.lora import (
    adapter_names,
    attach_lora,
    detach_lora,
    lora_layers,
    merge_lora,
    use_adapter,
)
from shared.finetuning.lora_files import (
    adapter_tensors,
    base_hash,
    load_adapter,
    load_any_adapter,
    load_peft_adapter,
    save_adapter,
    save_peft_adapter,
)
from shared.generation.engine import generate
from shared.weights.huggingface import export_to_hugging_face
from shared.weights.onnx import export_to_onnx
from shared.weights.pretrained import load_pretrained
from tests.configurations import LLAMA
from tests.finetuning.test_lora import KINDS, TARGETS, shake, small, tokens
from tests.weights.models import build

needs_smollm2 = pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")


def adapted(kind: str = "llama", targets=("query", "value"), **options):
    model = small(kind)
    attach_lora(model, targets, rank=2, **options)
    shake(model)
    return model


# --- our own folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", TARGETS)
def test_saved_and_loaded(targets, kind, tmp_path):
    model, x = adapted("gpt2", TARGETS[targets], dropout=0.1, **KINDS[kind]), tokens()
    head = {"head.weight": torch.randn(2, 24)}
    save_adapter(model, tmp_path / "a", base="small", extra=head, recipe="shaken", seed=1)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapter.json", "model.safetensors"]
    other = small("gpt2")
    state = torch.get_rng_state()
    about, extra = load_adapter(other, tmp_path / "a", name="again")
    assert torch.equal(torch.get_rng_state(), state)  # no first weights are drawn from the caller's generator
    assert torch.equal(other(x), model(x)) and adapter_names(other) == ["again"]
    assert (
        about["recipe"] == "shaken"
        and about["base"] == "small"
        and torch.equal(extra["head.weight"], head["head.weight"])
    )
    assert about["base_sha256"] == weights_hash(small("gpt2")) == base_hash(other)
    configs = [next(iter(lora_layers(m).values())).configs for m in (model, other)]
    assert configs[0]["default"] == configs[1]["again"]
    # Only the adapter is in the file.
    n = sum(p.numel() for p in adapter_tensors(model, "default").values()) + 48
    assert sum(t.numel() for t in load_file(tmp_path / "a" / "model.safetensors").values()) == n


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "a", base="small")
    other = small()
    with torch.no_grad():
        other.token_embedding.weight[0, 0] += 1e-4
    with pytest.raises(ValueError, match=r"model must have the weights that .* was trained on, .*\(small\)"):
        load_adapter(other, tmp_path / "a")
    assert not lora_layers(other) and all(p.requires_grad for p in other.parameters())


def broken(folder: Path, what: str) -> str:
    """Damage a folder in one way; return what the error must say."""
    about, tensors = (
        json.loads((folder / "adapter.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    if what == "no JSON":
        (folder / "adapter.json").write_text("{")
        return "is no JSON file"
    if what == "a list":
        (folder / "adapter.json").write_text("[]")
        return "must be a file with one object"
    if what == "no choices":
        del about["adapter"]
    if what == "unknown choice":
        about["adapter"]["colour"] = "red"
    if what == "rank":
        about["adapter"]["rank"] = 0
    if what == "other rank":
        about["adapter"]["rank"] = 3
    (folder / "adapter.json").write_text(json.dumps(about))
    name = min(tensors)
    if what == "missing":
        del tensors[name]
    if what == "nan":
        tensors[name][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    if what == "cut":
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[:-10])
    return {
        "no choices": "an object with the adapter's choices",
        "unknown choice": "choices that are not known here",
        "rank": "rank must be at least 1",
        "other rank": "must be of shape",
        "missing": "is missing in",
        "nan": "finite numbers",
        "cut": "is damaged",
    }[what]


@pytest.mark.parametrize(
    "what",
    ["no JSON", "a list", "no choices", "unknown choice", "rank", "other rank", "missing", "nan", "cut"],
)
def test_a_damaged_folder_changes_nothing(what, tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    said = broken(tmp_path / "a", what)
    model = small()
    with pytest.raises(ValueError, match=said):
        load_adapter(model, tmp_path / "a")
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "none")
    with pytest.raises(ValueError, match="name must be one of default"):
        save_adapter(adapted(), tmp_path / "b", name="other")


# --- PEFT

FAMILIES = {
    "gpt2": ({"qkv_bias": True}, {"fused": ("qkv",), "all": ("all-linear",), "down": ("down",)}),
    "llama": (
        {**LLAMA, "n_kv_heads": 2},
        {
            "parts": ("query", "value"),
            "fused": ("qkv",),
            "all": ("all-linear",),
            "one": ("blocks.1.attention.key",),
        },
    ),
    "qwen3": (
        {**LLAMA, "qk_norm": True, "n_kv_heads": 1, "head_dim": 10},
        {"parts": ("query", "key", "output")},
    ),
    "helium": ({**LLAMA, "rope_interleaved": True, "rope_base": 500.0}, {"all": ("query", "key", "gate")}),
}
CASES = [(family, targets) for family, (_, several) in FAMILIES.items() for targets in several]


def pair(family: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A random small model of ours, and the same in transformers."""
    model = build(**FAMILIES[family][0]).eval()
    export_to_hugging_face(model, folder)
    return model, AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_peft_loads_ours_and_computes_the_same(family, targets, kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, reference = pair(family, tmp_path / "base")
    x = torch.randint(0, model.config.vocab_size, (2, 9))
    before = model(x)
    attach_lora(model, FAMILIES[family][1][targets], rank=3, alpha=5.0, **KINDS[kind])
    shake(model)
    save_peft_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    with torch.no_grad():
        assert not torch.allclose(model(x), before, atol=1e-3)
        torch.testing.assert_close(theirs(x).logits, model(x), atol=1e-4, rtol=1e-4)
        # And back.
        ours = build(**FAMILIES[family][0]).eval()
        load_peft_adapter(ours, tmp_path / "adapter")
        torch.testing.assert_close(ours(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ours_loads_what_peft_saved(family, kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, reference = pair(family, tmp_path / "base")
    x = torch.randint(0, model.config.vocab_size, (2, 9))
    names = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}[family]
    options = {"use_rslora": kind == "rslora", "use_dora": kind == "dora", "fan_in_fan_out": family == "gpt2"}
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=names, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(reference, config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    values = load_peft_adapter(model, tmp_path / "adapter", name="theirs")
    assert values["r"] == 3 and adapter_names(model) == ["theirs"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
        merge_lora(model)
        torch.testing.assert_close(model(x), theirs.merge_and_unload()(x).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_dropout_are_those_of_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, reference = pair("gpt2", tmp_path / "base")
    x = torch.randint(0, model.config.vocab_size, (2, 9))
    attach_lora(model, "up", rank=3, dropout=0.4, **KINDS[kind])
    shake(model)
    save_peft_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    for part in (model, theirs):  # the adapter's dropout only
        part.train()
        for module in part.modules():
            if isinstance(module, nn.Dropout) and module.p != 0.4:
                module.p = 0.0
    torch.manual_seed(7)
    model(x).square().mean().backward()
    torch.manual_seed(7)
    logits = theirs(x).logits
    logits.square().mean().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    theirs_of = {"A": "lora_A", "B": "lora_B", "magnitude": "magnitude"}
    for key, parameter in adapter_tensors(model, "default").items():
        block, kind_of = f"h.{key.split('.')[1]}.", theirs_of[key.rpartition(".")[2]]
        (found,) = (gradient for n, gradient in gradients.items() if block in n and kind_of in n)
        torch.testing.assert_close(parameter.grad, found, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be one of 'LORA'"),
        ({"bias": "all"}, "bias must be one of 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": None}, "rank must be an int|no complete"),
        ({"r": 5}, "must be of shape"),
        ({"lora_alpha": 0}, "alpha must be above 0"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message, tmp_path):
    model = build(**FAMILIES["llama"][0])
    attach_lora(model, rank=2)
    save_peft_adapter(model, tmp_path / "a")
    detach_lora(model)
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, tmp_path / "a")
    assert not lora_layers(model)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    model = build(**FAMILIES["llama"][0])
    attach_lora(model, rank=2)
    save_peft_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="linear maps that the model has"):
        load_peft_adapter(build(), tmp_path / "a")
    with pytest.raises(FileExistsError):
        save_peft_adapter(model, tmp_path / "a")
    # GPT-2 has no projection of queries alone.
    model = build()
    attach_lora(model, "query", rank=2)
    with pytest.raises(ValueError, match="maps that gpt2 has"):
        save_peft_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_either_kind_of_folder_is_found(tmp_path):
    model, x = build(**FAMILIES["llama"][0]).eval(), torch.arange(6)[None]
    attach_lora(model, rank=2)
    shake(model)
    save_adapter(model, tmp_path / "ours")
    save_peft_adapter(model, tmp_path / "peft")
    for name in ("ours", "peft"):
        other = build(**FAMILIES["llama"][0]).eval()
        load_any_adapter(other, tmp_path / name)
        torch.testing.assert_close(other(x), model(x), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"folder must hold adapter.json or adapter_config.json"):
        load_any_adapter(model, tmp_path)


# --- export


def test_export_to_hugging_face_wants_the_adapter_merged(tmp_path):
    model, x = adapted("gpt2", ("all-linear",)), tokens()
    with pytest.raises(ValueError, match=r"no counterpart of .*base"):  # never silently without the adapter
        export_to_hugging_face(model, tmp_path / "a")
    expected = model(x)
    detach_lora(model, merge=True)
    export_to_hugging_face(model, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_tied_head_trained_apart_survives_saving(tmp_path):
    model, x = adapted("gpt2", ("output_head",)), tokens()
    expected = model(x)
    detach_lora(model, merge=True)
    export_to_hugging_face(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = load_pretrained(tmp_path / "a")
    torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(loaded.output_head.weight, loaded.token_embedding.weight)


@pytest.mark.parametrize("merged", [False, True])
def test_onnx_computes_with_the_adapter(merged, tmp_path):
    onnx_runtime = pytest.importorskip("shared.serving.onnx_runtime")
    session = pytest.importorskip("onnxruntime").InferenceSession
    model = adapted("llama", ("query", "value"))
    if merged:
        merge_lora(model)
    export_to_onnx(model, tmp_path / "a.onnx")
    assert onnx_runtime is not None
    graph = session(str(tmp_path / "a.onnx"))
    x = tokens(2, 6)
    inputs = {graph.get_inputs()[0].name: x.numpy()}
    for given in graph.get_inputs()[1:]:
        shape = [{"batch": 2, "tokens": 6, "past": 0, "past + tokens": 6}.get(n, n) for n in given.shape]
        value = torch.arange(6).expand(2, 6) if "position" in given.name else torch.zeros(shape)
        if "mask" in given.name:
            value = torch.ones(shape)
        kinds = {"tensor(int64)": torch.int64, "tensor(float)": torch.float32, "tensor(bool)": torch.bool}
        inputs[given.name] = value.to(kinds[given.type]).numpy()
    logits = torch.from_numpy(graph.run(None, inputs)[0])
    torch.testing.assert_close(logits, model(x).detach(), atol=1e-4, rtol=1e-4)


@needs_smollm2
def test_smollm2_with_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = load_pretrained("smollm2-135m-instruct", dtype=torch.float32)
    export_to_hugging_face(model, tmp_path / "base")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    attach_lora(model, ("query", "value"), rank=4, dora=True)
    with torch.no_grad():
        for parameter in adapter_tensors(model, "default").values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_peft_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    x = torch.randint(0, 49_152, (1, 12))
    with torch.no_grad():
        found = model(x)
        torch.testing.assert_close(theirs(x).logits, found, atol=2e-3, rtol=1e-3)
        use_adapter(model, None)
        assert not torch.allclose(model(x), found, atol=0.1)
    theirs.save_pretrained(tmp_path / "back")
    detach_lora(model)
    load_peft_adapter(model, tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(model(x), found, atol=1e-3, rtol=1e-3)


def test_stored_in_half_the_room(tmp_path):
    model = load_pretrained("tales-tiny")
    attach_lora(model, "all-linear", rank=2)
    with torch.no_grad():
        for parameter in adapter_tensors(model, "default").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for dtype in (torch.float32, torch.bfloat16):
        save_adapter(model, tmp_path / str(dtype), dtype=dtype)
    sizes = [
        (tmp_path / str(dtype) / "model.safetensors").stat().st_size
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert sizes[1] < 0.7 * sizes[0]
    again = load_pretrained("tales-tiny")
    load_adapter(again, tmp_path / "torch.bfloat16")
    for key, value in adapter_tensors(again, "default").items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, adapter_tensors(model, "default")[key], rtol=1e-2, atol=1e-3)


def test_peft_writes_the_same_tokens_for_a_pair_padded_on_the_left(tmp_path):
    peft = pytest.importorskip("peft")
    model = load_pretrained("tales-tiny", dtype=torch.float32)
    export_to_hugging_face(model, tmp_path / "base")
    attach_lora(model, "all-linear", rank=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_tensors(model, "default").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_peft_adapter(model, tmp_path / "peft", base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    # The shorter prompt stands behind padding.
    prompts = [[5, 9, 40], [7, 8, 60, 61, 300, 12, 90]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    written = theirs.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **settings)[:, width:]
    again = load_pretrained("tales-tiny", dtype=torch.float32)
    load_peft_adapter(again, tmp_path / "peft")
    for ours in (model, again):
        assert generate(ours.eval(), prompts, 20) == written.tolist()
