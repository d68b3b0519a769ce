"""LoRA's layers: numbers by hand, attached and taken off without a trace, switched, merged, and one adapter a row."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.finetuning.features import weights_hash
from shared.finetuning.lora import (
    adapter_for_each_row,
    adapter_names,
    attach_lora,
    choose_targets,
    detach_lora,
    lora_groups,
    lora_layers,
    merge_lora,
    possible_targets,
    unmerge_lora,
    use_adapter,
    without_lora,
)
from shared.finetuning.lora_layer import LoRAConfig, LoRALayer, LowRankUpdate
from shared.finetuning.tuning import GPTClassifier
from shared.generation.decode_step import decode_step
from shared.generation.engine import generate
from shared.model.gpt import GPTConfig, GPTModel
from tests.configurations import LLAMA

SMALL = {"vocab_size": 60, "context_length": 32, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.0}
KINDS = {"lora": {}, "rslora": {"rank_stabilized": True}, "dora": {"dora": True}}
TARGETS = {
    "parts": ("query", "value"),
    "fused": ("qkv",),
    "all": ("all-linear",),
    "output": ("attention.output", "down"),
}
MODELS = {"gpt2": {}, "llama": {**LLAMA, "n_kv_heads": 2}, "untied": {**LLAMA, "tie_weights": False}}


def small(kind: str = "llama") -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**SMALL | MODELS[kind])).eval()
    with torch.no_grad():  # biases away from zero
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def shake(model: nn.Module, seed: int = 1) -> None:
    """Give the active adapters random numbers, as if trained."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LowRankUpdate) and module.A.requires_grad:
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def tokens(rows: int = 3, n: int = 7) -> torch.Tensor:
    return torch.randint(0, 60, (rows, n), generator=torch.Generator().manual_seed(2))


# --- numbers by hand


def test_alpha_is_divided_by_the_rank():
    """Rank 2, alpha 4, A and B ones, W = 0, x = 1: two ones in the middle, times 4 / 2."""
    update = LowRankUpdate(torch.zeros(1, 1), LoRAConfig(rank=2, alpha=4.0))
    nn.init.ones_(update.A), nn.init.ones_(update.B)
    assert update(torch.ones(1), torch.zeros(1), torch.zeros(1, 1)).item() == 4.0
    assert LoRAConfig(rank=4, alpha=8.0).scaling == 2.0
    assert LoRAConfig(rank=4, alpha=8.0, rank_stabilized=True).scaling == 4.0


def test_dora_measures_rows():
    weight = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    update = LowRankUpdate(weight, LoRAConfig(rank=1, dora=True))
    assert update.magnitude.tolist() == [5.0, 5.0]
    assert update.row_scales(weight).tolist() == [1.0, 1.0]
    # A row of length 10 whose trained length is 5 is halved; the other stays.
    with torch.no_grad():
        update.A.copy_(torch.tensor([[3.0, 4.0]]))
        update.B.copy_(torch.tensor([[1.0], [0.0]]) / update.scaling)
    x = torch.tensor([1.0, 1.0])
    y = F.linear(x, weight)
    torch.testing.assert_close(y + update(x, y, weight), torch.tensor([7.0, 5.0]))


def test_dora_takes_no_gradient_through_the_length():
    torch.manual_seed(0)
    weight, x = torch.randn(5, 4), torch.randn(3, 4)
    update = LowRankUpdate(weight, LoRAConfig(rank=2, dora=True))
    shake(nn.ModuleList([update]))
    y = F.linear(x, weight)
    (y + update(x, y, weight)).square().sum().backward()
    # The same with the length as a constant, written out.
    a, b, m = (p.detach().clone().requires_grad_() for p in (update.A, update.B, update.magnitude))
    changed = weight + update.scaling * b @ a
    scaled = (m / changed.norm(dim=1).detach())[:, None] * changed
    F.linear(x, scaled).square().sum().backward()
    for ours, theirs in ((update.A, a), (update.B, b), (update.magnitude, m)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    # And it is not the gradient through it.
    a2 = update.A.detach().clone().requires_grad_()
    changed = weight + update.scaling * update.B.detach() @ a2
    F.linear(x, (m.detach() / changed.norm(dim=1))[:, None] * changed).square().sum().backward()
    assert not torch.allclose(a2.grad, update.A.grad, rtol=1e-2)


def test_a_row_of_zeros_stays_finite_with_dora():
    update = LowRankUpdate(torch.zeros(3, 4), LoRAConfig(rank=2, dora=True))
    assert update.row_scales(torch.zeros(3, 4)).tolist() == [0.0, 0.0, 0.0]


def test_first_weights():
    torch.manual_seed(0)
    kaiming = LowRankUpdate(torch.zeros(64, 400), LoRAConfig(rank=16))
    gaussian = LowRankUpdate(torch.zeros(64, 400), LoRAConfig(rank=16, initialization="gaussian"))
    assert not kaiming.B.any() and not gaussian.B.any()
    assert kaiming.A.abs().max() <= 1 / math.sqrt(400)
    assert abs(kaiming.A.std().item() * math.sqrt(3 * 400) - 1) < 0.05
    assert abs(gaussian.A.std().item() * 16 - 1) < 0.05


def test_dropout_acts_on_both_terms_of_dora_and_only_in_training():
    torch.manual_seed(0)
    layer = LoRALayer(nn.Linear(6, 5))
    layer.add("a", LoRAConfig(rank=2, dropout=0.5, dora=True), {"all": (0, 5)})
    shake(layer)
    x, update = torch.randn(4, 6), layer.adapters["a"]["all"]
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    scales, weight = update.row_scales(layer.base.weight), layer.base.weight
    change = (scales - 1) * F.linear(dropped, weight) + scales * update.scaling * (
        dropped @ update.A.T @ update.B.T
    )
    torch.testing.assert_close(found, layer.base(x) + change)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


# --- attaching and detaching


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_changes_nothing_and_goes_without_a_trace(name, targets, kind):
    model, x = small(name), tokens()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    expected = model(x)
    counts = attach_lora(model, TARGETS[targets], rank=2, **KINDS[kind])
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert counts.frozen == sum(v.numel() for v in dict(model.named_parameters()).values()) - counts.trained
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.layers == len(lora_layers(model)) and 0 < counts.share < 1
    # A step of training moves the adapter only; then it is taken off.
    shake(model)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    optimizer = torch.optim.SGD(lora_groups(model, 0.1))
    model.train()(x).square().mean().backward()
    optimizer.step()
    model.eval()
    detach_lora(model)
    assert dict(model.named_modules()) == modules  # the same objects
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert torch.equal(model(x), expected)


def test_what_was_frozen_before_is_frozen_afterwards():
    model = small()
    model.token_embedding.requires_grad_(False)
    attach_lora(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    attach_lora(model, name="second")
    detach_lora(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["token_embedding.weight"]


def test_targets_by_name_and_by_part():
    model = small()  # 4 query heads, 2 key and value heads of 6
    possible = possible_targets(model)
    assert possible["blocks.1.attention.key"].rows == (24, 36)
    assert possible["blocks.1.attention.value"].rows == (36, 48)
    assert [t.path for t in choose_targets(model, ["blocks.1.attention.output"])] == [
        "blocks.1.attention.output"
    ]
    assert len(choose_targets(model, ["up"])) == 2 and len(choose_targets(model, ["all-linear"])) == 2 * 5
    assert len(choose_targets(model, ["output", "attention.output"])) == 2  # the same twice is once
    # The end of a word is not the end of a name.
    with pytest.raises(ValueError, match="targets must be names such as"):
        choose_targets(model, ["put"])
    attach_lora(model, "query")
    assert possible_targets(model) == possible  # the same through a wrapper


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "q_proj"}, "targets must be names such as .*query.*got 'q_proj'"),
        ({"targets": ""}, "targets"),
        ({"targets": ()}, "targets must be at least one name"),
        ({"targets": ("qkv", "query")}, "either blocks.0.attention.qkv or its part"),
        ({"targets": "token_embedding"}, "targets"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": -3}, "rank must be at least 1"),
        ({"rank": 25}, "rank must be at most 24 for blocks.0.attention.qkv, got 25"),
        ({"targets": "key", "rank": 13}, "rank must be at most 12 for blocks.0.attention.qkv"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alpha": math.nan}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"initialization": "zeros"}, "initialization must be one of"),
        ({"name": "two words"}, "name must be a word"),
        ({"name": "keys"}, "name must be a word"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(options, message):
    model = small()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        attach_lora(model, **{"targets": ("query",), **options})
    assert dict(model.named_modules()) == modules and all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError):
        attach_lora(model, rank=2.0)


def test_an_adapter_is_attached_once():
    model = small()
    attach_lora(model, rank=2)
    shake(model)
    before = model(tokens())
    with pytest.raises(ValueError, match="already"):
        attach_lora(model, "output", rank=2)
    assert torch.equal(model(tokens()), before) and adapter_names(model) == ["default"]
    detach_lora(model)
    with pytest.raises(ValueError, match="with adapters"):
        detach_lora(model)
    with pytest.raises(ValueError, match="with adapters"):
        merge_lora(model)


def test_a_classifier_keeps_its_head_trained():
    classifier = GPTClassifier(small(), 2)
    counts = attach_lora(classifier.body, "all-linear", rank=2)
    trained = {n for n, p in classifier.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained and all(
        ".adapters." in n for n in trained if "head" not in n
    )
    a, b, head = lora_groups(classifier, 1e-3, b_ratio=16, other_learning_rate=1e-2)
    assert (a["lr"], b["lr"], head["lr"]) == (1e-3, 1.6e-2, 1e-2)
    assert len(a["params"]) == len(b["params"]) == counts.layers and len(head["params"]) == 2
    with pytest.raises(ValueError, match="b_ratio must be above 0"):
        lora_groups(classifier, 1e-3, b_ratio=0)
    with pytest.raises(ValueError, match="with a trained adapter"):
        lora_groups(GPTClassifier(small(), 2), 1e-3)


# --- merging


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", TARGETS)
def test_merged_equals_unmerged_and_comes_back_bit_for_bit(targets, kind):
    model, x = small("gpt2"), tokens()
    base = {n: p.clone() for n, p in model.named_parameters()}
    attach_lora(model, TARGETS[targets], rank=3, **KINDS[kind])
    shake(model)
    apart = model(x)
    merge_lora(model)
    merge_lora(model)  # twice adds nothing twice
    torch.testing.assert_close(model(x), apart, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="unmerged first"):
        use_adapter(model, None)
    with pytest.raises(ValueError, match="unmerged first"):
        attach_lora(model, "query", name="other")
    unmerge_lora(model)
    assert torch.equal(model(x), apart)
    detach_lora(model, merge=True)
    torch.testing.assert_close(model(x), apart, atol=1e-4, rtol=1e-4)
    assert dict(model.named_parameters()).keys() == base.keys()
    assert any(not torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_merging_in_bfloat16_stays_within_a_stated_tolerance():
    model, x = small("gpt2").bfloat16(), tokens(8, 20)
    attach_lora(model, "all-linear", rank=4)
    shake(model)
    assert {layer.adapters["default"]["all"].A.dtype for layer in lora_layers(model).values()} == {
        torch.float32
    }

    def loss() -> float:
        return F.cross_entropy(model(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten()).item()

    with torch.no_grad():
        apart = loss()
        merge_lora(model)
        assert abs(loss() - apart) < 0.02  # bfloat16 keeps 8 bits: each weight is rounded by up to 0.4 %
        unmerge_lora(model)
        assert loss() == apart


@pytest.mark.parametrize("merge", [False, True])
def test_a_tied_head_with_an_adapter(merge):
    model, x = small("llama"), tokens()
    embedding = model.token_embedding.weight.clone()
    attach_lora(model, "output_head", rank=2)
    shake(model)
    apart = model(x)
    model.to(torch.float32)
    assert torch.equal(model(x), apart)
    detach_lora(model, merge=merge)
    assert torch.equal(model.token_embedding.weight, embedding)  # the embedding is not the head's to change
    tied = model.output_head.weight is model.token_embedding.weight
    assert tied == model.config.tie_weights == (not merge)
    if merge:
        torch.testing.assert_close(model(x), apart, atol=1e-4, rtol=1e-4)
        model.load_state_dict(copy.deepcopy(model).state_dict())
        assert not torch.equal(model.output_head.weight, model.token_embedding.weight)


# --- several adapters


def several() -> GPTModel:
    """A model with three adapters of different rank, targets and kind."""
    model = small("gpt2")
    for i, (name, options) in enumerate(
        {
            "one": {"targets": ("query", "value"), "rank": 2},
            "two": {"targets": ("all-linear",), "rank": 5, "dora": True},
            "three": {"targets": ("qkv", "down"), "rank": 1, "rank_stabilized": True},
        }.items()
    ):
        attach_lora(model, name=name, **options)
        shake(model, seed=i)
    return model


def test_switching_by_name():
    model, x = several(), tokens()
    outputs = {}
    for name in (None, "one", "two", "three"):
        use_adapter(model, name)
        outputs[name] = model(x)
        learning = {
            n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad
        }
        assert learning == ({name} if name else set())
    values = list(outputs.values())
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(outputs[None], small("gpt2")(x))
    use_adapter(model, "one")
    assert torch.equal(model(x), outputs["one"])
    with pytest.raises(ValueError, match="name must be one of one, two, three, or None, got 'four'"):
        use_adapter(model, "four")


@torch.no_grad()
def test_each_row_with_its_own_adapter_equals_each_alone():
    model, names = several(), ["two", None, "one", "three", "two", "one"]
    x = tokens(len(names))
    alone = []
    for name, row in zip(names, x, strict=True):
        use_adapter(model, name)
        alone.append(model(row[None]))
    with adapter_for_each_row(model, names):
        together = model(x)
        step, caches = decode_step(model), model.new_caches()
        pieces = torch.cat([step(x[:, i : i + 1], None, None, caches) for i in range(x.shape[1])], dim=1)
        with pytest.raises(ValueError, match="x must be"):
            model(x[:2])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pieces, together, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(x[-1:]), alone[-1])  # and afterwards the active one again
    with pytest.raises(ValueError, match="for inference"), adapter_for_each_row(model.train(), names):
        pass
    with pytest.raises(ValueError, match="name must be one of"), adapter_for_each_row(model.eval(), ["four"]):
        pass


# --- with the rest of the course


@pytest.mark.parametrize("kind", KINDS)
def test_caches_and_the_fast_step_know_the_adapter(kind):
    model, x = small(), tokens()
    attach_lora(model, "all-linear", rank=2, **KINDS[kind])
    shake(model)
    with torch.no_grad():
        whole, caches = model(x), model.new_caches()
        cached = torch.cat([model(x[:, :3], caches=caches), model(x[:, 3:], caches=caches)], dim=1)
        step, caches = decode_step(model), model.new_caches()
        fast = torch.cat([step(x[:, i : i + 1], None, None, caches) for i in range(x.shape[1])], dim=1)
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fast, whole, atol=1e-4, rtol=1e-4)
        # A step that was made before sees what is merged, and what is switched off.
        merge_lora(model)
        caches = model.new_caches()
        merged = torch.cat([step(x[:, i : i + 1], None, None, caches) for i in range(x.shape[1])], dim=1)
        torch.testing.assert_close(merged, whole, atol=1e-4, rtol=1e-4)
        unmerge_lora(model)
        use_adapter(model, None)
        caches = model.new_caches()
        off = torch.cat([step(x[:, i : i + 1], None, None, caches) for i in range(x.shape[1])], dim=1)
        torch.testing.assert_close(off, model(x), atol=1e-4, rtol=1e-4)


def test_generated_text_is_that_of_the_merged_model():
    model = small()
    attach_lora(model, "all-linear", rank=4)
    shake(model)
    found = generate(model, tokens(2, 4), 10, temperature=0.0)
    detach_lora(model, merge=True)
    assert found == generate(model, tokens(2, 4), 10, temperature=0.0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    model, x = small(), tokens()
    attach_lora(model, ("query", "value"), rank=2)
    attach_lora(model, "all-linear", rank=2, dora=True, name="second")
    shake(model)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    # By way of the wrapper: switched, trained, taken off.
    use_adapter(compiled, "default")
    shake(model)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    compiled(x).square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, atol=1e-6, rtol=1e-4)
    assert found
    detach_lora(compiled)
    torch.testing.assert_close(compiled(x), small()(x), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_inside_the_context_the_model_is_the_base():
    model, x = small(), tokens()
    expected, before = model(x), weights_hash(model)
    attach_lora(model, rank=2)
    shake(model)
    with without_lora(model) as plain:
        assert torch.equal(plain(x), expected) and weights_hash(plain) == before
    assert not torch.allclose(model(x), expected, atol=1e-3)


def test_copies_and_state_dicts():
    model, x = small(), tokens()
    attach_lora(model, rank=2, dora=True)
    shake(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    detach_lora(other)
    assert all(p.requires_grad for p in other.parameters()) and lora_layers(model)
    third = small()
    attach_lora(third, rank=2, dora=True)
    third.load_state_dict(model.state_dict())
    assert torch.equal(third(x), model(x))


def test_only_the_adapter_gets_gradients_and_b_moves_first():
    model, x = small(), tokens()
    attach_lora(model, "all-linear", rank=2)
    model.train()(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name)
        if name.endswith(".A"):
            assert not parameter.grad.any()  # B is zero, so A has no effect yet
        if name.endswith(".B"):
            assert parameter.grad.any()
