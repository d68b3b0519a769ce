"""Models and tokenizers from GGUF files: the same logits as transformers reading the same file, and what is refused."""

import time

import gguf
import numpy as np
import psutil
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from shared.data.models import has_model, model_file
from shared.model.gpt import GPTConfig
from shared.weights.gguf import read_gguf
from shared.weights.gguf_model import (
    PATTERNS,
    config_from_gguf,
    gguf_rows,
    load_gguf,
    tokenizer_from_gguf,
    tokenizer_from_json,
)
from shared.weights.pretrained import HUB_REPOSITORIES, load_pretrained, load_tokenizer
from tests.weights.gguf_files import permuted, randomize, write_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

needs_smollm2 = pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VALUES = {
    "vocab_size": 96,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.head_count": 4,
}


def family(name: str, **changes: object) -> tuple[transformers.PreTrainedModel, str, dict[str, object]]:
    """Return a small random model of transformers, its architecture in GGUF and the values of the file."""
    eps = {"attention.layer_norm_rms_epsilon": 1e-5}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_positions=1024, n_embd=64, n_layer=2, n_head=4)
        values = VALUES | {
            "attention.layer_norm_epsilon": 1e-5,
            "feed_forward_length": 256,
            "context_length": 1024,
        }
        return transformers.GPT2LMHeadModel(config), "gpt2", values
    if name == "qwen3":
        config = transformers.Qwen3Config(
            **SIZES, num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-5, tie_word_embeddings=True
        )
        values = VALUES | eps | {"attention.head_count_kv": 2, "attention.key_length": 128}
        values |= {"attention.value_length": 128, "rope.freq_base": config.rope_parameters["rope_theta"]}
        return transformers.Qwen3ForCausalLM(config), "qwen3", values
    rope = changes.pop("rope", {"rope_type": "default"})
    config = transformers.LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500.0, **rope},
        **changes,
    )
    values = (
        VALUES | eps | {"attention.head_count_kv": 2, "rope.freq_base": 500.0, "rope.dimension_count": 16}
    )
    return transformers.LlamaForCausalLM(config), "llama", values


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2"])
def test_logits_equal_those_of_transformers_reading_the_same_file(tmp_path, name, kind):
    tied = {"tie_word_embeddings": True} if name == "llama-tied" else {}
    model, architecture, values = family(name.partition("-")[0], **tied)
    write_model(tmp_path / "trial.gguf", randomize(model), architecture, values, kind)
    ours = load_gguf(tmp_path / "trial.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="trial.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        if kind == "F32":
            torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not ours.training
    assert (ours.output_head.weight is ours.token_embedding.weight) == (name != "llama")


def test_rows_are_moved_back_from_where_the_converter_put_them():
    rows = np.arange(48)
    assert np.array_equal(permuted(rows, 3), rows[gguf_rows(48, 16).numpy()])
    restored = np.empty_like(rows)
    restored[gguf_rows(48, 16).numpy()] = permuted(rows, 3)
    assert np.array_equal(restored, rows)


@pytest.mark.parametrize("factor", [4.0, 8.0, 32.0])
def test_the_rotary_scaling_of_llama_3_beyond_the_original_context(tmp_path, factor):
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model, architecture, values = family("llama", rope=rope | {"rope_theta": 500_000.0})
    values |= {"rope.freq_base": 500_000.0, "context_length": 20_000}
    write_model(tmp_path / "trial.gguf", randomize(model), architecture, values)
    base = 1 / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = base / model.model.rotary_emb.inv_freq
    add_tensor(tmp_path / "trial.gguf", "rope_freqs.weight", divisors.numpy())
    ours = load_gguf(tmp_path / "trial.gguf")
    assert (ours.config.rope_scaling, ours.config.rope_factor) == ("llama3", factor)
    ids, positions = torch.randint(96, (1, 12)), torch.arange(19_000, 19_012)
    with torch.no_grad():
        theirs = model(ids, position_ids=positions[None]).logits
        torch.testing.assert_close(ours(ids, positions=positions), theirs, atol=2e-3, rtol=1e-3)


def test_another_rule_for_the_frequencies_is_refused(tmp_path):
    model, architecture, values = family("llama")
    write_model(tmp_path / "trial.gguf", randomize(model), architecture, values)
    add_tensor(tmp_path / "trial.gguf", "rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32))
    with pytest.raises(ValueError, match="another rule than Llama 3's"):
        load_gguf(tmp_path / "trial.gguf")


def add_tensor(path, name: str, data: np.ndarray) -> None:
    """Write a file anew with one tensor more."""
    rewrite(path, extra={name: data.astype(np.float32)})


def rewrite(path, *, change=None, extra=None, without=()) -> None:
    """Write a file of F32 tensors anew with other values, further tensors, or without some."""
    file = read_gguf(path)
    tensors = {name: file.read(name).numpy() for name in file.tensors} | (extra or {})
    values = {**file.metadata, **(change or {})}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for name, content in values.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if content is not None:
            add[type(content)](name, content)
    for name, data in tensors.items():
        if name not in without:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"change": {"general.architecture": "mamba"}},
            "general.architecture must be one of gpt2, llama, qwen3",
        ),
        ({"change": {"llama.block_count": None}}, "num_hidden_layers is missing"),
        ({"change": {"llama.block_count": 3}}, "blk.2.attn_k.weight is missing in the file"),
        ({"change": {"llama.feed_forward_length": 32}}, "must have shape"),
        ({"change": {"llama.attention.head_count": 5}}, "must be"),
        (
            {"change": {"llama.attention.head_count_kv": [2, 1]}},
            "num_key_value_heads must be the same in all layers",
        ),
        ({"change": {"llama.rope.dimension_count": 8}}, "partial_rotary_factor"),
        ({"change": {"llama.rope.scaling.type": "longrope"}}, "rope_type"),
        ({"without": ["token_embd.weight"]}, "has no tensor token_embd.weight"),
        ({"without": ["blk.1.attn_v.weight"]}, "blk.1.attn_v.weight is missing in the file"),
        ({"extra": {"blk.0.extra.weight": np.ones(4, np.float32)}}, "blk.0.extra.weight has no place"),
        ({"change": {"tokenizer.ggml.tokens": ["x"] * 97}}, "97 tokens, but token_embd.weight has 96 rows"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, options, message):
    model, architecture, values = family("llama")
    write_model(tmp_path / "trial.gguf", randomize(model), architecture, values)
    rewrite(tmp_path / "trial.gguf", **options)
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(tmp_path / "trial.gguf")
    assert "trial.gguf" in str(caught.value) or "general.architecture" in str(caught.value)


def test_a_mixture_of_experts_is_read_from_stacked_tensors(tmp_path):
    # transformers' own reader of such files knows no Mixtral, so the model itself is the reference.
    config = transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5,
        sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = randomize(transformers.MixtralForCausalLM(config))
    path = tmp_path / "trial.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = VALUES | {"attention.head_count_kv": 2, "expert_count": 4, "expert_used_count": 2}
    for name, number in values.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500.0)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for block in range(2):
        prefix, ours = f"model.layers.{block}.", f"blk.{block}."
        for name, n_heads in (("attn_q", 4), ("attn_k", 2), ("attn_v", 0), ("attn_output", 0)):
            data = state[f"{prefix}self_attn.{name[5]}_proj.weight"]
            writer.add_tensor(f"{ours}{name}.weight", permuted(data, n_heads) if n_heads else data)
        writer.add_tensor(f"{ours}attn_norm.weight", state[f"{prefix}input_layernorm.weight"])
        writer.add_tensor(f"{ours}ffn_norm.weight", state[f"{prefix}post_attention_layernorm.weight"])
        writer.add_tensor(f"{ours}ffn_gate_inp.weight", state[f"{prefix}mlp.gate.weight"])
        gate, up = np.split(state[f"{prefix}mlp.experts.gate_up_proj"], 2, axis=1)
        writer.add_tensor(f"{ours}ffn_gate_exps.weight", np.ascontiguousarray(gate))
        writer.add_tensor(f"{ours}ffn_up_exps.weight", np.ascontiguousarray(up))
        writer.add_tensor(f"{ours}ffn_down_exps.weight", state[f"{prefix}mlp.experts.down_proj"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_gguf(path)
    assert ours.config.feed_forward == "moe"
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_window_makes_a_mistral_of_a_llama(tmp_path):
    model, architecture, values = family("llama")
    write_model(
        tmp_path / "trial.gguf", randomize(model), architecture, values | {"attention.sliding_window": 9}
    )
    assert config_from_gguf(read_gguf(tmp_path / "trial.gguf")).window == 9


def test_every_pattern_takes_every_character():
    import regex

    for pattern in PATTERNS.values():
        sample = "a  b\n\n 12 ½x'S \t\r\n!?—日本 \u00a0"
        assert "".join(regex.findall(pattern, sample)) == sample


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "unheard-of"}, "tokenizer.ggml.pre must be one of gpt-2, smollm, qwen2"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model must be one of gpt2"),
        ({"tokenizer.ggml.token_type": [1]}, "equally long"),
        ({"tokenizer.ggml.merges": None}, "must be lists"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "merge"),
    ],
)
def test_a_vocabulary_that_cannot_be_read_is_refused(tmp_path, change, message):
    model, architecture, values = family("llama")
    write_model(tmp_path / "trial.gguf", randomize(model), architecture, values)
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
    }
    rewrite(tmp_path / "trial.gguf", change=vocabulary)
    tokenizer = tokenizer_from_gguf(read_gguf(tmp_path / "trial.gguf"))
    assert tokenizer.encode("abba", disallowed_special=()) == [3, 2, 1]
    assert tokenizer.eot_token == 0
    rewrite(tmp_path / "trial.gguf", change=change)
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(read_gguf(tmp_path / "trial.gguf"))


@needs_smollm2
def test_the_real_file_loads_quickly_into_the_memory_of_its_weights():
    load_gguf(model_file("smollm2-135m-instruct"))  # the file into the system's cache
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        before = psutil.Process().memory_info().rss
        started = time.process_time()
        model = load_pretrained("smollm2-135m-instruct", dtype=dtype)
        assert time.process_time() - started < 5
        assert psutil.Process().memory_info().rss - before < 1.2 * size * 134_515_008
        assert model.n_parameters == 134_515_008
        assert model.output_head.weight is model.token_embedding.weight
        assert model.token_embedding.weight.dtype == dtype
        del model


@needs_smollm2
def test_the_real_model_has_the_shape_that_its_authors_published():
    config = config_from_gguf(read_gguf(model_file("smollm2-135m-instruct")))
    expected = GPTConfig(
        vocab_size=49152, context_length=8192, emb_dim=576, n_heads=9, n_kv_heads=3, n_layers=30, dropout=0.0,
        qkv_bias=False, bias=False, norm="rmsnorm", norm_eps=config.norm_eps, feed_forward="swiglu",
        feed_forward_dim=1536, positions="rotary", rope_base=100_000.0,
    )  # fmt: skip
    assert config == expected
    assert config.norm_eps == pytest.approx(1e-5)


@needs_smollm2
def test_its_tokenizer_by_name_is_that_of_the_file():
    by_name = load_tokenizer("smollm2-135m-instruct")
    assert by_name.encode("The capital of France is 12.") == [504, 3575, 282, 4649, 314, 216, 33, 34, 30]
    assert by_name.n_vocab == 49152
    fast = by_name.to_tiktoken()
    for sample in ("in  1998 2 cats", "Grüße, 日本! 🙂", "def f(x):\n    return 2 * x\n"):
        assert fast.encode_ordinary(sample) == by_name.encode_ordinary(sample)
        assert by_name.decode(by_name.encode_ordinary(sample)) == sample


def test_a_name_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="name_or_path must be one of smollm2-135m-instruct, got 'nobody'"):
        load_tokenizer("nobody")
    assert set(HUB_REPOSITORIES) == {"smollm2-135m-instruct"}


def test_tokenizer_json_of_the_hub_gives_the_same_tokenizer(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models

    built = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "Ġ": 3}, merges=[("a", "b")]))
    built.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    tokenizer = tokenizer_from_json(path, PATTERNS["smollm"])
    ids = [0, 2, tokenizer.special_ids["<|im_end|>"]]
    assert tokenizer.encode("aab<|im_end|>", allowed_special="all") == ids
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json of a byte pair encoding"):
        tokenizer_from_json(path, PATTERNS["smollm"])


def test_where_the_package_is_missing_weights_and_tokenizer_come_from_the_hub(tmp_path, monkeypatch):
    from shared.model.gpt import GPTModel
    from shared.text.tokenizer import BPETokenizer
    from shared.weights import pretrained
    from shared.weights.huggingface import export_to_hugging_face

    tokenizer = BPETokenizer.train("the cat sat on the mat", 262, ("<|endoftext|>", "<|im_end|>"))
    config = GPTConfig.preset("tales-tiny", vocab_size=tokenizer.n_vocab, context_length=32, n_kv_heads=2)
    torch.manual_seed(0)
    original = GPTModel(config).eval()
    export_to_hugging_face(original.bfloat16(), tmp_path / "hub", tokenizer)
    asked = []

    def fetch(repository, name, commit):
        asked.append((repository, name, commit))
        return tmp_path / "hub" / name

    monkeypatch.setattr(pretrained, "has_model", lambda name: False)
    monkeypatch.setattr(pretrained, "fetch_model_file", fetch)
    model = load_pretrained("smollm2-135m-instruct")
    assert model.token_embedding.weight.dtype == torch.bfloat16
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), original(ids))
    assert load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct").encode("the mat") == tokenizer.encode(
        "the mat"
    )
    assert {(repository, commit) for repository, _, commit in asked} == set(HUB_REPOSITORIES.values())
    assert [name for _, name, _ in asked] == ["config.json", "model.safetensors", "tokenizer.json"]
