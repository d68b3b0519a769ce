"""Every checkpoint that ships: it loads, has the loss that is recorded for it, and transformers reads it too.

`config.json` of a checkpoint holds under "results": `validation_seed` and `n_validation_stories`, which say what the
loss was measured on, and `validation_nats_per_story`.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.export import export_to_hugging_face
from shared.gpt import GPTModel
from shared.tale_tokenizer import tale_encoding
from shared.tales import Story, TaleGenerator
from shared.weights import CHECKPOINTS, load_pretrained, shipped_checkpoints

NAMES = shipped_checkpoints()
BATCH = 32

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def results(name: str) -> dict:
    return json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))["results"]


def validation_stories(name: str) -> list[Story]:
    found = results(name)
    return list(TaleGenerator(found["validation_seed"]).stories(found["n_validation_stories"]))


@torch.no_grad()
def nats_per_story(model: GPTModel, stories: list[Story]) -> float:
    """Mean over stories of -log p, each read from its first token on, the end token included."""
    encoding, total = tale_encoding(), 0.0
    end = encoding.eot_token
    rows = sorted(([end, *encoding.encode_ordinary(story.text), end] for story in stories), key=len)
    for start in range(0, len(rows), BATCH):  # of about equal length, so that little is padded
        batch = rows[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([row + [end] * (width - len(row)) for row in batch])
        targets = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in batch])
        logits = model(ids[:, :-1]).flatten(0, 1)
        total += F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum").item()
    return total / len(rows)


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request) -> tuple[str, GPTModel]:
    return request.param, load_pretrained(request.param)


def test_the_loss_is_the_recorded_one(checkpoint):
    name, model = checkpoint
    recorded = results(name)["validation_nats_per_story"]
    assert nats_per_story(model, validation_stories(name)) == pytest.approx(recorded, abs=0.01)


def test_no_model_is_below_the_floor(checkpoint):
    # A loss below the mean of -log p of the same stories would mean that the stories or the loss are wrong.
    name, _ = checkpoint
    stories = validation_stories(name)
    floor = sum(-story.log_probability for story in stories) / len(stories)
    assert results(name)["validation_nats_per_story"] > floor


@torch.no_grad()
def test_transformers_computes_and_writes_the_same(checkpoint, tmp_path):
    _, model = checkpoint
    encoding, folder = tale_encoding(), tmp_path / "exported"
    export_to_hugging_face(model, folder, encoding)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for story in TaleGenerator(11).stories(2):
        assert tokenizer(story.text)["input_ids"] == encoding.encode(story.text)
        ids = torch.tensor([[encoding.eot_token, *encoding.encode(story.text)]])
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        start = ids[:, :6]
        written = start
        while written.shape[1] < 200 and (written.shape[1] == 6 or written[0, -1] != encoding.eot_token):
            written = torch.cat([written, model(written)[:, -1:].argmax(dim=-1)], dim=1)
        output = theirs.generate(
            start, attention_mask=torch.ones_like(start), do_sample=False, max_length=200
        )
        assert tokenizer.decode(output[0]) == encoding.decode(written[0].tolist())


def test_the_files_are_small_enough_to_ship():
    files = [path for path in Path(CHECKPOINTS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert all(path.suffix in (".safetensors", ".json", ".md", ".csv") for path in files)
