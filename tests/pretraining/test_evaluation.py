"""`shared.pretraining.evaluation`: what a model is judged by, and the state in which it is left."""

import math

import pytest
import torch

from shared.model.gpt import GPTConfig, GPTModel
from shared.pretraining.evaluation import HeldOut, token_byte_lengths
from shared.pretraining.options import Options
from shared.pretraining.processes import Processes
from shared.pretraining.rows import DocumentRows, WindowRows
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.text.dataset import encode_documents, open_token_file, write_token_file
from shared.training.losses import bits_per_byte, next_token_loss

ENCODING = tale_encoding()


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "a.npy"
    texts = [story.text for story in TaleGenerator(4).stories(9)]
    write_token_file(path, encode_documents(texts, ENCODING.encode_ordinary, ENCODING.eot_token), 2048)
    return path


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"n_layers": 2, "emb_dim": 16, "n_heads": 2, "dropout": 0.5}
    return GPTModel(GPTConfig.preset("tales-tiny", **shape))


def held_out(rows, **options) -> HeldOut:
    byte_lengths = token_byte_lengths(ENCODING, 2048)
    return HeldOut(Options(out="x", data=["tales"], batch_size=4, **options), rows, byte_lengths, None)


def test_every_module_keeps_its_own_mode(shard, model):
    judged = held_out(WindowRows([shard], 32, 1, partial=True))
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    judged.losses(model, Processes("cpu"))
    assert [module.training for module in model.modules()] == before and True in before and False in before

    # Also where the evaluation fails.
    def fail(*_):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("no memory")

    handle = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        judged.losses(model, Processes("cpu"))
    handle.remove()
    assert [module.training for module in model.modules()] == before


def test_the_losses_are_those_of_all_tokens_in_windows_that_may_be_short(shard, model):
    rows = WindowRows([shard], 32, 1, partial=True)
    result = held_out(rows).losses(model, Processes("cpu"))
    ids = torch.from_numpy(open_token_file(shard).astype("int64"))
    model.eval()
    with torch.no_grad():
        nats = sum(
            next_token_loss(
                model(ids[None, i : i + 32][:, : len(ids) - 1 - i]),
                ids[None, i + 1 : i + 33],
                reduction="sum",
            )
            for i in range(0, len(ids) - 1, 32)
        ).item()
    assert result["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    n_bytes = len(ENCODING.decode_bytes([i for i in ids[1:].tolist() if i != ENCODING.eot_token]))
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte(nats, n_bytes), rel=1e-5)
    assert held_out(rows).usage().used == len(ids) - 1


def test_rows_above_the_limit_are_counted_and_taken_from_everywhere(shard):
    rows = WindowRows([shard], 32, 1, partial=True)
    judged = held_out(rows, evaluation_rows=5)
    assert judged.chosen == [i * len(rows) // 5 for i in range(5)]
    usage = judged.usage()
    assert usage.used == 5 * 32 and usage.lost[f"in {len(rows) - 5} rows above evaluation_rows"] > 0


def test_the_beginnings_of_documents_are_not_called_documents(shard, model):
    lengths = DocumentRows([shard], 256, 1, ENCODING.eot_token).lengths
    for context, whole in ((int(lengths.max()), True), (int(lengths.max()) - 1, False)):
        judged = held_out(DocumentRows([shard], context, 1, ENCODING.eot_token))
        assert ("loss_per_document" in judged.losses(model, Processes("cpu"))) == whole
        assert bool(judged.usage().lost) != whole


def test_a_text_without_a_byte_to_predict_has_no_bits_per_byte(tmp_path, model):
    path = tmp_path / "a.npy"
    write_token_file(path, [[7, ENCODING.eot_token]], 2048)
    result = held_out(WindowRows([path], 32, 1, partial=True)).losses(model, Processes("cpu"))
    assert result["loss"] > 0 and math.isnan(result["bits_per_byte"])
