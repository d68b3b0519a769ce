"""Every shipped checkpoint: it loads, has the loss that config.json records, and transformers computes the same."""

import hashlib
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from shared.model.gpt import GPTModel
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator, derivations
from shared.training.batches import document_row
from shared.training.losses import loss_per_document
from shared.weights.huggingface import export_to_hugging_face
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, shipped_checkpoints
from tests.benchmarks.sampled_stories import sample_stories

NAMES = shipped_checkpoints()

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request) -> tuple[str, GPTModel]:
    return request.param, load_pretrained(request.param, dtype=torch.float32)


def test_there_are_checkpoints_and_they_are_small():
    assert {"tales-1m", "tales-3m", "tales-tiny"} <= set(NAMES)
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64_000_000
    allowed = (".safetensors", ".json", ".md")
    assert all(path.suffix in allowed or path.name == "vocab.txt" for path in files)


@pytest.mark.parametrize(("name", "percent", "whole"), [("tales-1m", 5, 0), ("tales-3m", 3, 980)])
def test_the_records_reach_the_aims_of_the_course(name, percent, whole):
    # That the records are true is what the next two tests hold.
    results = json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))["results"]
    assert 0 < results["percent_above_floor"] <= percent
    assert results["sampled_stories"] == 1000 and results["whole_stories"] >= whole


def test_recorded_loss(checkpoint):
    name, model = checkpoint
    config = json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))
    recipe, results = config["recipe"], config["results"]
    stories = list(TaleGenerator(recipe["tales_validation_seed"]).stories(recipe["tales_validation"]))
    loss = loss_per_document(model, [document_row(story.text, tale_encoding()) for story in stories])
    floor = -sum(story.log_probability for story in stories) / len(stories)
    assert floor == pytest.approx(results["floor_per_document"], abs=1e-6)
    assert loss == pytest.approx(results["loss_per_document"], abs=2e-3)
    assert loss > floor  # below it, the stories or the loss would be wrong


def test_recorded_share_of_whole_stories(checkpoint):
    name, model = checkpoint
    results = json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))["results"]
    n, share = 100, results["whole_stories"] / results["sampled_stories"]
    found = sum(bool(derivations(text.strip())) for text in sample_stories(model, n, seed=777))
    spread = math.sqrt(n * share * (1 - share) * (1 + n / results["sampled_stories"]))
    assert abs(found - n * share) <= 4 * spread + 1


@torch.no_grad()
def test_transformers_computes_and_writes_the_same(checkpoint, tmp_path):
    # In float64: the grammar has many equally good words, and rounding must not choose between them.
    name, _ = checkpoint
    model, encoding, folder = (
        load_pretrained(name, dtype=torch.float64),
        tale_encoding(),
        tmp_path / "exported",
    )
    export_to_hugging_face(model, folder, encoding)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.dtype == torch.float64
    for story in TaleGenerator(11).stories(2):
        assert tokenizer(story.text)["input_ids"] == encoding.encode(story.text)
        ids = torch.tensor([[encoding.eot_token, *encoding.encode(story.text)]])
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        start = ids[:, :6]
        written = start
        while written.shape[1] < 100 and (written.shape[1] == 6 or written[0, -1] != encoding.eot_token):
            written = torch.cat([written, model(written)[:, -1:].argmax(dim=-1)], dim=1)
        output = theirs.generate(
            start, attention_mask=torch.ones_like(start), do_sample=False, max_length=100
        )
        assert output[0].tolist() == written[0].tolist()


def test_the_readme_has_the_checksum_of_every_file_of_weights():
    text = (CHECKPOINTS / "README.md").read_text(encoding="utf-8")
    for path in CHECKPOINTS.rglob("*.safetensors"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"{digest}  {path.relative_to(CHECKPOINTS).as_posix()}\n" in text
