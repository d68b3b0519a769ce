"""The Transformer: equal to PyTorch's in values and gradients, safe to decode with, strict about its input."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from shared.model.attention import KeyValueCache
from shared.model.seq2seq import beam_decode, greedy_decode
from shared.model.transformer import (
    BlockConfig,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    Residual,
    StateCache,
    Transformer,
)
from shared.notebook.proof import compare

WIDTH, SOURCE, TARGET, BATCH, VOCABULARY = 16, 7, 5, 3, 11
CONFIG = BlockConfig(WIDTH, n_heads=4, feed_forward_dim=24, dropout=0.0, attention_bias=True)
START, END = 1, 2

NAMES = {
    "self_attn.in_proj_": "self_attention.qkv.",
    "self_attn.out_proj": "self_attention.output",
    "multihead_attn.out_proj": "cross_attention.output",
    "linear1": "feed_forward.expand",
    "linear2": "feed_forward.contract",
    "norm1": "residuals.0.norm",
    "norm2": "residuals.1.norm",
    "norm3": "residuals.2.norm",
}


def renamed(tensors):
    result = {}
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "multihead_attn.in_proj_" in name:
            stem, kind = name.split("multihead_attn.in_proj_")
            result[f"{stem}cross_attention.query.{kind}"] = tensor[:WIDTH]
            result[f"{stem}cross_attention.key_value.{kind}"] = tensor[WIDTH:]
        else:
            result[name] = tensor
    return result


def torch_stacks(config, n_layers=2):
    wanted = config.norm_first if config.final_norm is None else config.final_norm
    sizes = (WIDTH, config.n_heads, config.feed_forward_dim, 0.0, config.activation)
    options = {"batch_first": True, "norm_first": config.norm_first}
    last = lambda: nn.LayerNorm(WIDTH) if wanted else None
    layer = nn.TransformerEncoderLayer(*sizes, **options)
    encoder = nn.TransformerEncoder(layer, n_layers, last(), enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, **options), n_layers, last())
    theirs = nn.Transformer(WIDTH, 4, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    return theirs


def our_stacks(config, theirs, n_layers=2):
    ours = nn.ModuleDict({"encoder": Encoder(config, n_layers), "decoder": Decoder(config, n_layers)})
    ours.load_state_dict(renamed(theirs.state_dict()))
    return ours


def inputs():
    generator = torch.Generator().manual_seed(1)
    lengths = lambda *n: torch.tensor(n)[:, None]
    free = lambda q, k: (torch.rand(q, k, generator=generator) < 0.7) | (torch.arange(k) == 0)
    return {
        "source": torch.randn(BATCH, SOURCE, WIDTH, generator=generator),
        "target": torch.randn(BATCH, TARGET, WIDTH, generator=generator),
        "source_real": torch.arange(SOURCE) < lengths(7, 3, 5),
        "target_real": torch.arange(TARGET) < lengths(5, 5, 2),
        "source_mask": free(SOURCE, SOURCE),
        "target_mask": free(TARGET, TARGET),
        "cross_mask": free(TARGET, SOURCE),
    }


def transformer(n_layers=2, **options):
    torch.manual_seed(0)
    config = options.pop("config", replace(CONFIG, attention_bias=False))
    layers = {"n_encoder_layers": n_layers, "n_decoder_layers": n_layers, "context_length": 20}
    return Transformer(config, VOCABULARY, **(layers | options)).eval()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    source_ids = torch.randint(3, VOCABULARY, (BATCH, SOURCE), generator=generator)
    source_mask = torch.arange(SOURCE) < torch.tensor([[7], [3], [5]])
    target_ids = torch.randint(3, VOCABULARY, (BATCH, TARGET), generator=generator)
    target_ids[:, 0] = START
    return source_ids.masked_fill(~source_mask, 0), source_mask, target_ids


def close(ours, reference, tolerance=1e-5):
    compare("", ours, reference, tolerance)


@pytest.mark.parametrize("masked", [False, True], ids=["causal mask only", "all masks"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_stacks_equal_nn_transformer_in_values_and_gradients(norm_first, final_norm, activation, masked):
    config = replace(CONFIG, norm_first=norm_first, final_norm=final_norm, activation=activation)
    torch.manual_seed(0)
    theirs = torch_stacks(config)
    ours, given_ = our_stacks(config, theirs), inputs()
    source = given_["source"].clone().requires_grad_()
    target = given_["target"].clone().requires_grad_()
    their_source, their_target = (x.detach().clone().requires_grad_() for x in (source, target))
    encoder_masks, decoder_masks, hidden = {}, {}, {}
    causal = torch.ones(TARGET, TARGET).tril().bool()
    if masked:
        encoder_masks = {"key_padding_mask": given_["source_real"], "attention_mask": given_["source_mask"]}
        decoder_masks = {
            "key_padding_mask": given_["target_real"],
            "attention_mask": given_["target_mask"],
            "memory_padding_mask": given_["source_real"],
            "memory_attention_mask": given_["cross_mask"],
        }
        hidden = {
            "src_mask": ~given_["source_mask"],
            "memory_mask": ~given_["cross_mask"],
            "src_key_padding_mask": ~given_["source_real"],
            "tgt_key_padding_mask": ~given_["target_real"],
            "memory_key_padding_mask": ~given_["source_real"],
        }
        causal = causal & given_["target_mask"]
    output = ours["decoder"](target, ours["encoder"](source, **encoder_masks), **decoder_masks)
    expected = theirs(their_source, their_target, tgt_mask=~causal, **hidden)
    close(output, expected, 1e-4)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    wanted = renamed({name: parameter.grad for name, parameter in theirs.named_parameters()})
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    wanted["source"], wanted["target"] = their_source.grad, their_target.grad
    found["source"], found["target"] = source.grad, target.grad
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].abs().max()
        close(found[name] / scale, wanted[name] / scale, 1e-4)


def test_without_attention_bias_there_is_none_and_the_values_are_those_of_zero_biases():
    torch.manual_seed(0)
    bare = EncoderLayer(replace(CONFIG, attention_bias=False))
    biased = EncoderLayer(CONFIG)
    extra = set(biased.state_dict()) - set(bare.state_dict())
    assert extra == {"self_attention.qkv.bias", "self_attention.output.bias"}
    biased.load_state_dict(
        bare.state_dict() | {name: torch.zeros_like(biased.state_dict()[name]) for name in extra}
    )
    close(bare(inputs()["source"]), biased(inputs()["source"]))


@pytest.mark.parametrize(
    ("final_norm", "norm_first", "has"),
    [(None, False, 0), (None, True, 1), (True, False, 1), (False, True, 0)],
)
def test_the_last_normalisation_follows_the_order_unless_told_otherwise(final_norm, norm_first, has):
    config = replace(CONFIG, final_norm=final_norm, norm_first=norm_first)
    for stack in (Encoder(config, 1), Decoder(config, 1)):
        assert len(list(stack.norm.parameters())) == 2 * has


def test_residual_by_hand():
    x = torch.tensor([1.0, 3.0])
    config = BlockConfig(2, n_heads=1, feed_forward_dim=2, dropout=0.0)
    close(Residual(config)(x, lambda x: 2 * x), [-1.0, 1.0], 1e-4)
    close(Residual(replace(config, norm_first=True))(x, lambda x: 2 * x), [-1.0, 5.0], 1e-4)


def test_residual_drops_only_the_sub_layer_and_only_in_training():
    torch.manual_seed(0)
    config = BlockConfig(2, n_heads=1, feed_forward_dim=2, dropout=0.5, norm_first=True)
    residual, x, ones = Residual(config), torch.zeros(1000, 2), lambda x: torch.ones_like(x)
    assert set(residual(x, ones).flatten().tolist()) == {0.0, 2.0}
    assert set(residual.eval()(x, ones).flatten().tolist()) == {1.0}


def test_feed_forward_is_the_papers_formula():
    torch.manual_seed(0)
    layer, x = FeedForward(CONFIG), torch.randn(2, 3, WIDTH)
    hidden = (x @ layer.expand.weight.T + layer.expand.bias).clamp(min=0)
    close(layer(x), hidden @ layer.contract.weight.T + layer.contract.bias)


@torch.no_grad()
def test_a_causal_encoder_equals_pytorchs_with_a_causal_mask_and_itself_with_caches():
    torch.manual_seed(0)
    config = replace(CONFIG, norm_first=True)
    theirs, x = torch_stacks(config), inputs()["source"]
    stack = Encoder(config, 2, causal=True)
    stack.load_state_dict(
        {
            n.removeprefix("encoder."): t
            for n, t in renamed(theirs.state_dict()).items()
            if n.startswith("encoder.")
        }
    )
    mask = nn.Transformer.generate_square_subsequent_mask(SOURCE)
    close(stack(x), theirs.encoder(x, mask=mask))
    caches = [KeyValueCache(SOURCE) for _ in range(2)]
    steps = [stack(part, caches=caches) for part in x.split((3, 1, 1, 2), dim=1)]
    close(torch.cat(steps, dim=1), stack(x))


@torch.no_grad()
def test_a_decoder_with_key_value_caches_equals_one_pass():
    torch.manual_seed(0)
    decoder, given_ = Decoder(CONFIG, 2), inputs()
    memory, real, x = given_["source"], given_["source_real"], given_["target"]
    caches = [(KeyValueCache(TARGET), KeyValueCache(SOURCE)) for _ in range(2)]
    first, *others = x.split(2, dim=1)
    steps = [decoder(first, memory, caches=caches, memory_padding_mask=real)]
    steps += [decoder(part, None, caches=caches, memory_padding_mask=real) for part in others]
    close(torch.cat(steps, dim=1), decoder(x, memory, memory_padding_mask=real))
    # Another memory of the same size would be passed over without a word.
    with pytest.raises(ValueError, match="context must be None"):
        decoder(first[:, :1], memory + 1, caches=[(KeyValueCache(1), cross) for _, cross in caches])


@torch.no_grad()
def test_state_cache_appends_and_leaves_what_it_was_given():
    given_ = torch.randn(2, 2, 4, 3, 5)
    cache, before = StateCache(given_), given_.clone()
    keys, values = torch.randn(2, 4, 1, 5), torch.randn(2, 4, 1, 5)
    all_keys, all_values = cache.append(keys, values)
    assert cache.length == 4 and given_.equal(before)
    assert all_keys.equal(torch.cat((before[:, 0], keys), 2)) and all_values.equal(
        torch.cat((before[:, 1], values), 2)
    )


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@torch.no_grad()
def test_steps_with_caches_equal_one_pass_in_a_padded_batch(norm_first):
    model = transformer(config=replace(CONFIG, norm_first=norm_first))
    source_ids, source_mask, target_ids = batch()
    state, steps = model.encode(source_ids, source_mask), []
    for previous in target_ids.unbind(1):
        logits, state = model.decode_step(previous, state)
        steps.append(logits)
    close(torch.stack(steps, dim=1), model(source_ids, source_mask, target_ids))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), extra=st.integers(1, 4))
def test_padding_never_changes_a_result(seed, extra):
    model = transformer()
    source_ids, source_mask, target_ids = batch(seed)
    with torch.no_grad():
        expected = model(source_ids, source_mask, target_ids)
        garbage = torch.randint(VOCABULARY, (BATCH, extra))
        longer = torch.cat((source_ids, garbage), dim=1), F.pad(source_mask, (0, extra))
        close(model(*longer, target_ids), expected)
        row = seed % BATCH
        length = int(source_mask[row].sum())
        alone = model(
            source_ids[row : row + 1, :length], source_mask[row : row + 1, :length], target_ids[row : row + 1]
        )
        close(alone[0], expected[row])


@settings(max_examples=10, deadline=None)
@given(position=st.integers(1, TARGET - 1), token=st.integers(3, VOCABULARY - 1))
def test_a_later_target_token_changes_no_earlier_logit(position, token):
    model = transformer()
    source_ids, source_mask, target_ids = batch()
    changed = target_ids.clone()
    changed[:, position] = token
    with torch.no_grad():
        before, after = (model(source_ids, source_mask, ids) for ids in (target_ids, changed))
    close(after[:, :position], before[:, :position])


@torch.no_grad()
def test_target_mask_hides_padding_that_stands_in_front():
    model = transformer()
    source_ids, source_mask, target_ids = batch()
    target_mask = torch.ones(BATCH, TARGET, dtype=torch.bool)
    target_mask[0, :2] = False
    changed = target_ids.clone()
    changed[0, :2] = 7
    first = model(source_ids, source_mask, target_ids, target_mask)
    second = model(source_ids, source_mask, changed, target_mask)
    close(first[0, 2:], second[0, 2:])
    assert (
        model(source_ids, source_mask, target_ids) - model(source_ids, source_mask, changed)
    ).abs().max() > 1e-3


@torch.no_grad()
def test_greedy_decoding_equals_running_everything_again():
    model = transformer()
    source_ids, source_mask, _ = batch()
    written = greedy_decode(model, source_ids, source_mask, START, END, 8)
    for row in range(BATCH):
        length, ids = int(source_mask[row].sum()), [START]
        source = source_ids[row : row + 1, :length], source_mask[row : row + 1, :length]
        while len(ids) < 9 and ids[-1] != END:
            ids.append(int(model(*source, torch.tensor([ids]))[0, -1].argmax()))
        assert written[row] == [i for i in ids[1:] if i != END]


@torch.no_grad()
def test_beam_search_reports_the_probabilities_of_one_pass():
    model = transformer()
    source_ids, source_mask, _ = batch()
    found = beam_decode(model, source_ids[:1], source_mask[:1], START, END, 6, beam_size=5)
    assert len({hypothesis.ids for hypothesis in found}) == 5
    for hypothesis in found:
        wanted = [*hypothesis.ids, END] if hypothesis.finished else list(hypothesis.ids)
        logits = model(source_ids[:1], source_mask[:1], torch.tensor([[START, *wanted[:-1]]]))
        scores = logits[0].double().log_softmax(1)[torch.arange(len(wanted)), torch.tensor(wanted)]
        close(hypothesis.log_probability, scores.sum(), 1e-4)


@torch.no_grad()
def test_states_that_share_a_beginning_are_independent():
    model = transformer()
    source_ids, source_mask, _ = batch()
    start = torch.full((BATCH,), START)
    _, shared = model.decode_step(start, model.encode(source_ids, source_mask))
    kept = {name: tensor.clone() for name, tensor in shared.items()}
    one, _ = model.decode_step(start + 3, shared)
    model.decode_step(start + 5, shared)
    again, _ = model.decode_step(start + 3, shared)
    assert one.equal(again) and all(shared[name].equal(tensor) for name, tensor in kept.items())


def test_one_matrix_for_three_uses_or_two_for_two_vocabularies():
    shared, separate = transformer(), transformer(target_vocab_size=6)
    assert shared.source_embedding.weight is shared.target_embedding.weight
    source_ids, source_mask, target_ids = batch()
    assert shared(source_ids, source_mask, target_ids).shape == (BATCH, TARGET, VOCABULARY)
    assert separate(source_ids, source_mask, target_ids % 6).shape == (BATCH, TARGET, 6)
    assert separate.source_embedding.weight.shape == (VOCABULARY, WIDTH)


@pytest.mark.parametrize(
    "move",
    [
        lambda model, state: model.bfloat16().float().load_state_dict(state),
        lambda model, state: model.to("meta").to_empty(device="cpu").load_state_dict(state),
        lambda model, state: model.load_state_dict(state, assign=True),
        lambda model, state: model.to("meta").load_state_dict(state, assign=True),
    ],
)
@torch.no_grad()
def test_a_moved_transformer_computes_the_same_and_keeps_its_one_matrix(move):
    model = transformer()
    expected, other = model(*batch()), copy.deepcopy(model)
    move(model, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    for moved in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(other)):
        assert torch.equal(moved(*batch()), expected)
        assert moved.source_embedding.weight is moved.target_embedding.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_a_transformer_computes_in_every_type(dtype):
    model = transformer()
    expected = model(*batch())
    logits = model.to(dtype)(*batch())
    assert logits.dtype == dtype and model.positions.table.dtype == torch.float32
    torch.testing.assert_close(logits.float(), expected, atol=0.2, rtol=0.05)


def test_base_and_big_have_the_papers_number_of_weights():
    count = lambda model: sum(parameter.numel() for parameter in model.parameters()) / 1e6
    with torch.device("meta"):
        assert abs(count(Transformer(BlockConfig(), 37_000)) - 65) < 3
        assert abs(count(Transformer(BlockConfig(1024, 16, 4096), 37_000)) - 213) < 3


def test_it_learns_to_reverse():
    model = transformer(config=replace(CONFIG, feed_forward_dim=64))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    for _ in range(300):
        source_ids = torch.randint(3, 6, (32, 4))
        target_ids = F.pad(source_ids.flip(1), (1, 0), value=START)
        logits = model(source_ids, source_ids > 0, target_ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # All 32 are right from step 200 on, whatever the order of sums.
    written = greedy_decode(model, source_ids, source_ids > 0, START, END, 4)
    assert sum(row == ids for row, ids in zip(written, source_ids.flip(1).tolist(), strict=True)) >= 30


def test_state_dict_round_trip():
    one, other = transformer(), transformer(config=replace(CONFIG, attention_bias=False))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(one.state_dict())
    close(other(*batch()), one(*batch()), 0.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"emb_dim": 0}, ValueError, "emb_dim"),
        ({"n_heads": 0}, ValueError, "n_heads"),
        ({"feed_forward_dim": -1}, ValueError, "feed_forward_dim"),
        ({"emb_dim": 16.0}, TypeError, "emb_dim"),
        ({"n_heads": True}, TypeError, "n_heads"),
        ({"n_heads": 3}, ValueError, "divisible"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": float("nan")}, ValueError, "dropout"),
        ({"activation": "tanh"}, ValueError, "relu, gelu"),
    ],
)
def test_configuration_refuses(options, error, message):
    with pytest.raises(error, match=message):
        replace(CONFIG, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size"),
        ({"target_vocab_size": 0}, ValueError, "target_vocab_size"),
        ({"n_encoder_layers": 0}, ValueError, "n_layers"),
        ({"n_decoder_layers": 1.5}, TypeError, "n_layers"),
        ({"context_length": 0}, ValueError, "context_length"),
        ({"config": replace(CONFIG, emb_dim=15, n_heads=3)}, ValueError, "even"),
    ],
)
def test_construction_refuses(options, error, message):
    with pytest.raises(error, match=message):
        Transformer(**({"config": CONFIG, "vocab_size": VOCABULARY} | options))


SOURCE_IDS, SOURCE_MASK, TARGET_IDS = batch()


@pytest.mark.parametrize(
    ("source_ids", "source_mask", "target_ids", "error", "message"),
    [
        (SOURCE_IDS[0], SOURCE_MASK, TARGET_IDS, ValueError, "source_ids must be"),
        (SOURCE_IDS.float(), SOURCE_MASK, TARGET_IDS, TypeError, "source_ids must be int64"),
        (SOURCE_IDS + VOCABULARY, SOURCE_MASK, TARGET_IDS, ValueError, "source_ids must be ids"),
        (SOURCE_IDS - 1, SOURCE_MASK, TARGET_IDS, ValueError, "source_ids must be ids .* got -1"),
        (SOURCE_IDS.repeat(1, 3), SOURCE_MASK.repeat(1, 3), TARGET_IDS, ValueError, "context_length is 20"),
        (SOURCE_IDS, SOURCE_MASK[:, :4], TARGET_IDS, ValueError, "source_mask must be"),
        (SOURCE_IDS, SOURCE_MASK.long(), TARGET_IDS, TypeError, "source_mask must be bool"),
        (SOURCE_IDS, SOURCE_MASK & False, TARGET_IDS, ValueError, "empty"),
        (SOURCE_IDS, SOURCE_MASK, TARGET_IDS[:, :0], ValueError, "target_ids must be"),
        (SOURCE_IDS, SOURCE_MASK, TARGET_IDS[:2], ValueError, "target_ids have 2 rows for 3"),
        (SOURCE_IDS, SOURCE_MASK, TARGET_IDS.repeat(1, 5), ValueError, "target_ids reach 25"),
        (SOURCE_IDS, SOURCE_MASK, TARGET_IDS + VOCABULARY, ValueError, "target_ids must be ids"),
    ],
)
def test_forward_refuses(source_ids, source_mask, target_ids, error, message):
    with pytest.raises(error, match=message):
        transformer()(source_ids, source_mask, target_ids)


def test_a_target_mask_of_another_shape_or_type_is_refused():
    with pytest.raises(ValueError, match="target_mask must be"):
        transformer()(SOURCE_IDS, SOURCE_MASK, TARGET_IDS, SOURCE_MASK)
    with pytest.raises(TypeError, match="bool"):
        transformer()(SOURCE_IDS, SOURCE_MASK, TARGET_IDS, TARGET_IDS)


@torch.no_grad()
def test_decode_step_refuses():
    model = transformer(context_length=SOURCE)
    state = model.encode(SOURCE_IDS, SOURCE_MASK)
    start = torch.full((BATCH,), START)
    for wrong, error, message in (
        (start[:2], ValueError, "previous_ids must be"),
        (start[:, None], ValueError, "previous_ids must be"),
        (start + VOCABULARY, ValueError, "previous_ids must be ids"),
        (start.float(), TypeError, "int64"),
    ):
        with pytest.raises(error, match=message):
            model.decode_step(wrong, state)
    for _ in range(SOURCE):
        _, state = model.decode_step(start, state)
    with pytest.raises(ValueError, match="context_length is 7"):
        model.decode_step(start, state)


def test_layers_and_stacks_refuse():
    x, memory = torch.zeros(2, 3, WIDTH), torch.zeros(2, 4, WIDTH)
    with pytest.raises(ValueError, match="x must be"):
        EncoderLayer(CONFIG)(x[..., :5])
    with pytest.raises(ValueError, match="key_padding_mask"):
        EncoderLayer(CONFIG)(x, key_padding_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="causal"):
        EncoderLayer(CONFIG)(x, cache=KeyValueCache(3))
    with pytest.raises(ValueError, match="context must be"):
        DecoderLayer(CONFIG)(x, memory[:1])
    with pytest.raises(ValueError, match="key_padding_mask"):
        DecoderLayer(CONFIG)(x, memory, memory_padding_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="one entry for each of 2 layers, got 1"):
        Encoder(CONFIG, 2, causal=True)(x, caches=[KeyValueCache(3)])
    with pytest.raises(ValueError, match="one entry for each of 1 layers, got 2"):
        Decoder(CONFIG, 1)(x, memory, caches=[None, None])
    for stack in (Encoder, Decoder):
        with pytest.raises(ValueError, match="n_layers must be at least 1"):
            stack(CONFIG, 0)
