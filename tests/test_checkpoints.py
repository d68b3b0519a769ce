"""Every shipped checkpoint reaches the loss that its config.json records, and no model goes below the floor."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import shared
from shared.gpt import GPTConfig, GPTModel
from shared.tale_tokenizer import tale_encoding
from shared.tales import TaleGenerator

FOLDER = Path(shared.__file__).parent / "checkpoints"
CHECKPOINTS = sorted(path.parent for path in FOLDER.glob("*/config.json"))


def test_there_are_checkpoints_and_they_are_small():
    assert {"tales-1m", "tales-tiny"} <= {path.name for path in CHECKPOINTS}
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 16_000_000


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_recorded_loss(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = GPTModel(GPTConfig(**config["model"])).eval()
    missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert missing.missing_keys == ["output_head.weight"] and not missing.unexpected_keys
    recipe, results, encoding = config["recipe"], config["results"], tale_encoding()
    stories = list(TaleGenerator(recipe["tales_validation_seed"]).stories(recipe["tales_validation"]))
    end, nats = encoding.eot_token, 0.0
    with torch.no_grad():
        for story in stories:
            ids = torch.tensor([end, *encoding.encode_ordinary(story.text), end])
            nats += F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    floor = -sum(story.log_probability for story in stories) / len(stories)
    assert floor == pytest.approx(results["floor_per_document"], abs=1e-6)
    assert nats / len(stories) == pytest.approx(results["loss_per_document"], abs=1e-3)
    assert nats / len(stories) > floor


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_the_readme_has_the_checksum(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"{digest}  {folder.name}/model.safetensors" in (FOLDER / "README.md").read_text(encoding="utf-8")
