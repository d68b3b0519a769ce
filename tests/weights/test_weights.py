"""`shared.weights.pretrained`: files that transformers saves, read and written by name map; what must be refused."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.pretrained import (
    CONFIG_FIELDS,
    FAMILIES,
    config_from_hf,
    huggingface_views,
    load_safetensors,
)

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {
    **SHAPE,
    **NO_TOKENS,
    "max_position_embeddings": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4,
    },
    "llama3": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, **LLAMA3},
}


def theirs(name: str) -> nn.Module:
    """A random tiny model of transformers, every parameter away from zero and one."""
    torch.manual_seed(1)
    if name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_head=4, n_layer=2, **NO_TOKENS)
        )
    elif name == "gpt2, inner width":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_head=4, n_layer=1, n_inner=30, **NO_TOKENS)
        )
    elif name in ROPES:
        model = LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=ROPES[name]))
    elif name == "llama, tied":
        model = LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True))
    elif name == "llama, biases":
        model = LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=10, tie_word_embeddings=True))
    elif name == "qwen3, window":
        kinds = ["sliding_attention"] * 2
        model = Qwen3ForCausalLM(
            Qwen3Config(**COMMON, head_dim=10, use_sliding_window=True, sliding_window=5, layer_types=kinds)
        )
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**COMMON, sliding_window=5))
    else:
        config = MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2)
        config._experts_implementation = "eager"
        model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


MODELS = ("gpt2", "gpt2, inner width", *ROPES, "llama, tied", "llama, biases", "qwen3", "qwen3, window")
MODELS += ("mistral", "mixtral")


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def loaded(folder) -> GPTModel:
    config = config_of(folder)
    model = GPTModel(config_from_hf(config)).eval()
    load_safetensors(model, folder / "model.safetensors", config["model_type"])
    return model


@pytest.fixture(scope="module", params=MODELS)
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


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 2, 10]),
    tied=st.booleans(),
    family=st.sampled_from(["llama", "qwen3", "mixtral"]),
)
def test_any_shape_goes_through_a_file_and_back(kv_heads, head_dim, tied, family, tmp_path):
    options = {
        "norm": "rmsnorm",
        "positions": "rotary",
        "bias": False,
        "qkv_bias": False,
        "n_kv_heads": kv_heads,
        "feed_forward": "moe" if family == "mixtral" else "swiglu",
        "qk_norm": family == "qwen3",
        "vocab_size": 9,
        "context_length": 4,
        "emb_dim": 16,
        "n_heads": 4,
        "n_layers": 2,
    }
    config = GPTConfig(**options, head_dim=head_dim, tie_weights=tied, n_experts=3)
    model, other = GPTModel(config), GPTModel(config)
    views = huggingface_views(model, family)
    assert sum(view.numel() for view in views.values()) == model.n_parameters
    save_file({name: view.contiguous() for name, view in views.items()}, tmp_path / "one.safetensors")
    load_safetensors(other, tmp_path / "one.safetensors", family)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# --- files as others write them


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


def test_models_and_families_that_do_not_fit_are_refused(tmp_path):
    model = GPTModel(GPTConfig.preset("bytes-tiny"))
    with pytest.raises(ValueError, match=r"family must be one of gpt2, llama, .*got 'bert'"):
        huggingface_views(model, "bert")
    with pytest.raises(ValueError, match=r"llama has no counterpart of position_embedding.weight"):
        huggingface_views(model, "llama")
    with pytest.raises(FileNotFoundError):
        load_safetensors(model, tmp_path / "nothing.safetensors", "gpt2")
    with torch.device("meta"):
        empty = GPTModel(model.config)
    with pytest.raises(ValueError, match="meta device"):
        load_safetensors(empty, tmp_path / "nothing.safetensors", "gpt2")


# --- configurations


def llama_config(**changes) -> dict:
    config = {**LlamaConfig(**COMMON).to_dict(), **changes}
    return {key: value for key, value in config.items() if value != "drop"}


def test_configurations_of_transformers_4_are_read():
    old = llama_config(
        rope_parameters="drop", rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}
    )
    config = config_from_hf(old)
    assert (config.rope_base, config.rope_scaling, config.rope_factor) == (500.0, "linear", 2.0)
    plain = config_from_hf(llama_config(rope_parameters="drop", rope_theta=500.0, rope_scaling=None))
    assert (plain.rope_base, plain.rope_scaling) == (500.0, "none")


def test_the_published_gpt2_configuration_is_our_default():
    assert config_from_hf(GPT2Config().to_dict()) == GPTConfig()
    assert CONFIG_FIELDS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type must be one of gpt2, llama, .*got 'bert'"),
        ({"model_type": "drop"}, "model_type must be one of"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0, got 0.1"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type must be one of default, linear",
        ),
        ({"rope_parameters": {**ROPES["llama3"], "low_freq_factor": 2.0}}, "low_freq_factor must be 1.0"),
        ({"rope_parameters": {**ROPES["yarn"], "beta_fast": 16.0}}, "beta_fast must be 32.0"),
        (
            {"rope_parameters": {**ROPES["default"], "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be",
        ),
        ({"hidden_size": "drop"}, "hidden_size is missing in the configuration of a llama"),
        ({"hidden_size": 25, "head_dim": None}, "emb_dim must be a multiple of n_heads=4"),
        (
            {"model_type": "qwen3", "head_dim": 6, "use_sliding_window": True, "sliding_window": 5},
            "use_sliding_window needs layer_types",
        ),
        (
            {
                "model_type": "mistral",
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types must be sliding_attention in all layers, got full_attention",
        ),
        ({"layer_types": ["linear_attention"]}, "layer_types must be full_attention in all layers"),
    ],
)
def test_a_configuration_without_counterpart_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(llama_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True"),
        ({"attn_pdrop": 0.2}, "attn_pdrop must be 0.1, got 0.2"),
    ],
)
def test_a_gpt2_configuration_without_counterpart_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**GPT2Config().to_dict(), **changes})
