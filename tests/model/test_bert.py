"""The encoder and its heads against transformers, with copied weights; padding, segments, bad input."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertModel

from shared.model.bert import BERTConfig, BERTForPreTraining, BERTModel
from shared.weights.bert import bert_config_to_hf, bert_views

SMALL = {"vocab_size": 99, "context_length": 24, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "dropout": 0.0}


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 99, (3, 17))
    segments = (torch.arange(17) > torch.tensor([5, 9, 3])[:, None]).long()
    return tokens, segments, torch.arange(17) < torch.tensor([17, 12, 9])[:, None]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_equal_to_transformers_with_copied_weights(activation: str, batch: tuple) -> None:
    tokens, segments, mask = batch
    config = BERTConfig(**SMALL, feed_forward_dim=50, activation=activation)
    torch.manual_seed(1)
    ours = BERTForPreTraining(config).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = BertForPreTraining(BertConfig(**bert_config_to_hf(config))).eval()
    missing, unexpected = theirs.load_state_dict(bert_views(ours), strict=False)
    assert not unexpected
    assert all("decoder" in name or "position_ids" in name for name in missing)
    theirs.tie_weights()
    with torch.no_grad():
        logits, follows = ours(tokens, segments, mask)
        found = theirs(input_ids=tokens, token_type_ids=segments, attention_mask=mask.long())
        hidden = theirs.bert(input_ids=tokens, token_type_ids=segments, attention_mask=mask.long())
        torch.testing.assert_close(
            ours.bert(tokens, segments, mask)[mask], hidden[0][mask], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            ours.bert.pool(ours.bert(tokens, segments, mask)), hidden[1], atol=1e-5, rtol=0
        )
    torch.testing.assert_close(logits[mask], found.prediction_logits[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(follows, found.seq_relationship_logits, atol=1e-5, rtol=0)


def test_gradients_are_transformers_gradients(batch: tuple) -> None:
    tokens, segments, mask = batch
    config = BERTConfig(**SMALL)
    ours = BERTForPreTraining(config)
    theirs = BertForPreTraining(BertConfig(**bert_config_to_hf(config)))
    theirs.load_state_dict(bert_views(ours), strict=False)
    theirs.tie_weights()
    labels = torch.where(torch.rand(tokens.shape) < 0.3, tokens, -100)
    follows = torch.tensor([0, 1, 1])
    logits, pair = ours(tokens, segments, mask)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (loss + torch.nn.functional.cross_entropy(pair, follows)).backward()
    theirs(
        input_ids=tokens,
        token_type_ids=segments,
        attention_mask=mask.long(),
        labels=labels,
        next_sentence_label=follows,
    ).loss.backward()
    torch.testing.assert_close(
        ours.bert.token_embedding.weight.grad,
        theirs.bert.embeddings.word_embeddings.weight.grad,
        atol=1e-6,
        rtol=1e-4,
    )


def test_the_base_size_has_transformers_shapes() -> None:
    with torch.device("meta"):
        ours = bert_views(BERTForPreTraining(BERTConfig()))
        theirs = BertForPreTraining(BertConfig()).state_dict()
    shapes = {name: tensor.shape for name, tensor in theirs.items() if "decoder" not in name}
    assert {name: view.shape for name, view in ours.items()} == {
        name: shape for name, shape in shapes.items() if "position_ids" not in name
    }
    assert sum(view.numel() for view in ours.values()) == 110_106_428
    with torch.device("meta"):
        assert BERTModel(BERTConfig()).n_parameters == BertModel(BertConfig()).num_parameters() == 109_482_240


def test_a_row_is_the_same_alone_and_beside_a_longer_one(batch: tuple) -> None:
    tokens, segments, mask = batch
    model = BERTForPreTraining(BERTConfig(**SMALL)).eval()
    with torch.no_grad():
        together, follows = model(tokens, segments, mask)
        for i, n in enumerate(mask.sum(1).tolist()):
            alone, alone_follows = model(tokens[i : i + 1, :n], segments[i : i + 1, :n])
            torch.testing.assert_close(together[i, :n], alone[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(follows[i], alone_follows[0], atol=1e-5, rtol=1e-5)


def test_both_directions_are_seen_and_segments_matter(batch: tuple) -> None:
    tokens, segments, _ = batch
    model = BERTModel(BERTConfig(**SMALL)).eval()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 99
    with torch.no_grad():
        one, other = model(tokens, segments), model(changed, segments)
        assert ((one - other)[:, 0].abs().amax(-1) > 1e-6).all()
        assert ((one - model(tokens)).abs().amax(-1) > 1e-6).all()
        torch.testing.assert_close(model(tokens), model(tokens, torch.zeros_like(tokens)))


def test_places_give_the_same_logits(batch: tuple) -> None:
    tokens, segments, mask = batch
    model = BERTForPreTraining(BERTConfig(**SMALL)).eval()
    places = torch.tensor([0, 5, 20])
    with torch.no_grad():
        some, _ = model(tokens, segments, mask, places)
        everything, _ = model(tokens, segments, mask)
    torch.testing.assert_close(some, everything.flatten(0, 1)[places])


def test_the_output_matrix_is_the_token_embedding_also_in_a_copy() -> None:
    model = copy.deepcopy(BERTForPreTraining(BERTConfig(**SMALL))).double()
    with torch.no_grad():
        model.bert.token_embedding.weight.zero_()
        logits, _ = model(torch.ones(1, 3, dtype=torch.int64))
    assert logits.dtype == torch.float64
    assert not logits.any()
    assert model.n_parameters == sum(view.numel() for view in bert_views(model).values())


def test_bad_input(batch: tuple) -> None:
    tokens, segments, mask = batch
    model = BERTModel(BERTConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match="segments must be from 0 to 1, got 0 to 2"):
        model(tokens, segments * 2)
    with pytest.raises(ValueError, match="tokens must be from 0 to 98, got"):
        model(tokens + 99)
    with pytest.raises(ValueError, match="tokens must be at most context_length=24 long, got 25"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"tokens must be \(batch, tokens\), at least one of each, got \(0, 5\)"
    ):
        model(torch.zeros(0, 5, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"tokens must be \(batch, tokens\), at least one of each, got \(2, 0\)"
    ):
        model(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask must have a real token in each row, got a row of zeros"):
        model(tokens, segments, mask & (torch.arange(3) > 0)[:, None])
    with pytest.raises(TypeError, match="mask must be bool"):
        model(tokens, segments, mask.long())
    with pytest.raises(TypeError, match="tokens must be integers"):
        model(tokens.float())
    with pytest.raises(TypeError, match="segments must be integers"):
        model(tokens, segments.bool())
    with pytest.raises(ValueError, match=r"segments must be \(3, 17\) as tokens, got \(3, 16\)"):
        model(tokens, segments[:, 1:])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_heads", 5, "emb_dim must be a multiple of n_heads=5"),
        ("n_layers", 0, "n_layers must be at least 1"),
        ("activation", "swish", "activation must be one of"),
        ("dropout", 1.0, r"dropout must be in \[0, 1\)"),
        ("norm_eps", 0.0, "norm_eps must be between 0 and 1"),
    ],
)
def test_bad_configurations(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BERTConfig(**{**SMALL, field: value})
    with pytest.raises(ValueError, match="name must be one of bert-base"):
        BERTConfig.preset("bert-huge")
