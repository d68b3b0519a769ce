"""`shared.weights.configs`: configurations of transformers, there and back; what must be refused."""

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

from shared.model.gpt import PRESETS, GPTConfig
from shared.weights.configs import CONFIG_FIELDS, config_from_hf, config_to_hf, family_of
from shared.weights.names import FAMILIES
from tests.weights.models import COMMON, EXPORTED, ROPES, SIZES


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
        (
            {"activation_function": "tanh"},
            "activation_function must be one of gelu_new, gelu_pytorch_tanh, gelu, relu, silu, got 'tanh'",
        ),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True"),
        ({"attn_pdrop": 0.2}, "attn_pdrop must be 0.1, got 0.2"),
    ],
)
def test_a_gpt2_configuration_without_counterpart_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**GPT2Config().to_dict(), **changes})


@pytest.mark.parametrize(("name", "options"), EXPORTED.values(), ids=EXPORTED)
def test_a_configuration_means_the_same_after_the_way_there_and_back(name, options):
    config = GPTConfig(**{**SIZES, **options})
    back = config_from_hf(config_to_hf(config))
    assert config_to_hf(back) == config_to_hf(config)
    assert config_from_hf(config_to_hf(back)) == back
    assert family_of(back) == family_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob must be True, got False"),
        ({"norm_topk_prob": "drop"}, "norm_topk_prob must be True, got False"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step must be 1, got 2"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers must be \[\] or None, got \[1\]"),
        (
            {"moe_intermediate_size": "drop"},
            "moe_intermediate_size is missing in the configuration of a qwen3_moe",
        ),
    ],
)
def test_a_mixture_of_qwen_without_counterpart_is_refused(changes, message):
    config = Qwen3MoeConfig(**COMMON, num_experts=3, num_experts_per_tok=2, norm_topk_prob=True).to_dict()
    assert config_from_hf(config).n_experts == 3
    assert config_from_hf(config | {"num_experts": 5}).n_experts == 5  # the name in published files
    with pytest.raises(ValueError, match=message):
        config_from_hf({key: value for key, value in (config | changes).items() if value != "drop"})


def test_options_of_another_rotary_scaling_are_passed_over_as_in_transformers():
    rope = {**ROPES["default"], "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.7}
    config = config_from_hf(llama_config(rope_parameters=rope))
    assert (config.rope_factor, config.rope_original_length, config.rope_attention_factor) == (
        1.0,
        None,
        None,
    )
    linear = config_from_hf(llama_config(rope_parameters=rope | {"rope_type": "linear"}))
    assert (linear.rope_factor, linear.rope_attention_factor) == (4.0, None)


def test_the_configuration_of_gpt2_is_the_published_one():
    published = GPT2Config(architectures=["GPT2LMHeadModel"]).to_dict()
    assert config_to_hf(GPTConfig()).items() <= published.items()
    assert config_from_hf(config_to_hf(GPTConfig())) == GPTConfig()


def test_all_presets_have_a_counterpart():
    assert {family_of(GPTConfig.preset(name)) for name in PRESETS} == {"gpt2", "llama"}
