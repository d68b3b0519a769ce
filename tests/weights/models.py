"""Small models of transformers and of ours that the tests of this room share."""

import copy
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shared.model.gpt import GPTConfig, GPTModel
from tests.configurations import LLAMA

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
    "yarn, factor": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4,
        "attention_factor": 1.7,
    },
    "llama3": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, **LLAMA3},
}
SIZES = {"vocab_size": 2048, "context_length": 64, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.0}
LONGER = {"rope_factor": 4.0, "rope_original_length": 16}
# Name -> (class of transformers, options).
EXPORTED = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2, untied, other width": ("GPT2LMHeadModel", {"tie_weights": False, "feed_forward_dim": 40}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, biased": (
        "LlamaForCausalLM",
        {**LLAMA, "bias": True, "qkv_bias": True, "tie_weights": False, "n_kv_heads": 2, "head_dim": 8},
    ),
    "linear": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "linear", **LONGER}),
    "ntk": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "ntk", **LONGER}),
    "yarn": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "yarn", **LONGER}),
    "llama3": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": "llama3", **LONGER, "rope_base": 500.0}),
    "mistral": ("MistralForCausalLM", {**LLAMA, "window": 5, "norm_eps": 1e-3}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "qk_norm": True, "n_kv_heads": 1, "head_dim": 10}),
    "qwen3, window": ("Qwen3ForCausalLM", {**LLAMA, "qk_norm": True, "window": 5, "tie_weights": False}),
    "gpt2, exact gelu": ("GPT2LMHeadModel", {"activation": "gelu"}),
    "gpt2, relu": ("GPT2LMHeadModel", {"activation": "relu"}),
    "gpt2, silu": ("GPT2LMHeadModel", {"activation": "silu"}),
    "yarn, factor": (
        "LlamaForCausalLM",
        {**LLAMA, "rope_scaling": "yarn", **LONGER, "rope_attention_factor": 1.7},
    ),
    "helium": ("HeliumForCausalLM", {**LLAMA, "rope_interleaved": True, "rope_base": 500.0, "n_kv_heads": 2}),
    "helium, yarn": (
        "HeliumForCausalLM",
        {**LLAMA, "rope_interleaved": True, "rope_scaling": "yarn", **LONGER},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**LLAMA, "qk_norm": True, "feed_forward": "moe", "n_experts": 4, "n_kv_heads": 2, "head_dim": 10},
    ),
    "qwen3_moe, window": (
        "Qwen3MoeForCausalLM",
        {**LLAMA, "qk_norm": True, "feed_forward": "moe", "n_experts": 3, "n_active_experts": 1, "window": 5},
    ),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "feed_forward": "moe", "n_experts": 4}),
    "mixtral, window": (
        "MixtralForCausalLM",
        {**LLAMA, "feed_forward": "moe", "n_experts": 3, "n_active_experts": 1, "window": 5, "n_kv_heads": 2},
    ),
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
    elif name in ("gpt2, gelu", "gpt2, relu"):
        sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_head": 4, "n_layer": 2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, activation_function=name[6:], **NO_TOKENS))
    elif name in ("helium", "helium, yarn"):
        options = {"head_dim": 6, "rope_parameters": ROPES["yarn" if "yarn" in name else "default"]}
        model = HeliumForCausalLM(HeliumConfig(**COMMON, **options))
    elif name in ("qwen3_moe", "qwen3_moe, window"):
        options = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 10}
        window = {"use_sliding_window": True, "sliding_window": 5} if "window" in name else {}
        config = Qwen3MoeConfig(**COMMON, **options, **window, norm_topk_prob=True)
        config._experts_implementation = "eager"
        model = Qwen3MoeForCausalLM(config)
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


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def config_of_transformers(config: GPTConfig) -> GPT2Config:
    sizes = {"n_embd": config.emb_dim, "n_head": config.n_heads, "n_layer": config.n_layers}
    return GPT2Config(vocab_size=config.vocab_size, n_positions=config.context_length, **sizes)


def build(seed: int = 0, **options) -> GPTModel:
    """A small model in evaluation mode, every parameter away from zero and one."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def random_ids(vocab_size: int = 2048, tokens: int = 48) -> torch.Tensor:
    return torch.randint(vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids)
    return getattr(found, "logits", found)


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


def compiled_blocks(model: nn.Module) -> nn.Module:
    """The same model with each block compiled by itself and one kept in memory as its input alone."""
    model = copy.copy(model)
    model._modules = dict(model._modules)
    model.blocks = nn.ModuleList(torch.compile(block) for block in model.blocks)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


# What a training run puts around a model; nothing is compiled before the first call. DDP needs a process group.
WRAPPED = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "DDP": lambda model: DistributedDataParallel(model),
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(torch.compile(model))),
    "average": AveragedModel,
    "compiled blocks": compiled_blocks,
}


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone. Give it to tests as a fixture: wrappers hold it, and must be gone at its end.

    A wrapper that is collected later would end the group's threads while it holds the interpreter's lock, for which
    these threads may be waiting.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


def same_parameters(one: GPTModel, other: GPTModel) -> bool:
    names = [name for name, _ in one.named_parameters()]
    assert names == [name for name, _ in other.named_parameters()]
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
