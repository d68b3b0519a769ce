"""`ch05_pretraining/calibrate.py`: it finds a factor that is known, and the checkpoint stays whole."""

import json

import pytest
import torch

from ch05_pretraining import calibrate
from shared.generation.engine import generate
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.generator import TaleGenerator
from shared.training.batches import document_row
from shared.training.losses import loss_per_document
from shared.weights.files import save_checkpoint_folder
from shared.weights.pretrained import load_pretrained


def model_of(**options: object) -> GPTModel:
    torch.manual_seed(0)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "init_std": 0.4}
    return GPTModel(GPTConfig.preset("tales-1m", **shape | options)).eval()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_the_factor_undoes_a_known_temperature(temperature):
    model = model_of()
    start = torch.randint(0, 2048, (64, 1), generator=torch.Generator().manual_seed(1)).tolist()
    written = generate(model, start, 60, temperature=temperature, seed=2)
    rows = [first + rest for first, rest in zip(start, written, strict=True)]
    assert calibrate.best_factor(model, rows) == pytest.approx(1 / temperature, rel=0.05)


@pytest.mark.parametrize("options", [{}, {"norm": "layernorm", "bias": True}, {"tie_weights": False}])
def test_scaling_multiplies_the_logits(options):
    model, ids = model_of(**options), torch.arange(40)[None]
    before = model(ids)
    calibrate.scale_logits(model, 1.7)
    torch.testing.assert_close(model(ids), 1.7 * before)


def test_a_checkpoint_is_calibrated_and_its_figures_are_measured_again(tmp_path, monkeypatch, capsys):
    recipe = {"tales_seed": 1, "tales_validation_seed": 0, "tales_validation": 6}
    results = {"loss_per_document": 1.0, "parameters": 7}
    save_checkpoint_folder(model_of(), tmp_path / "old", recipe=recipe, results=results)
    arguments = ["calibrate.py", str(tmp_path / "old"), "--out", str(tmp_path / "new"), "--stories", "6"]
    monkeypatch.setattr("sys.argv", arguments)
    calibrate.main()
    config = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    model, encoding = load_pretrained(tmp_path / "new"), calibrate.tale_encoding()
    rows = [document_row(story.text, encoding) for story in TaleGenerator(0).stories(6)]
    old_loss = loss_per_document(load_pretrained(tmp_path / "old"), rows)
    assert config["results"]["loss_per_document"] == pytest.approx(loss_per_document(model, rows), rel=1e-6)
    assert config["results"]["loss_per_document"] < old_loss  # random weights are far too sure
    assert config["calibration"]["factor"] < 1 and config["results"]["parameters"] == 7
    monkeypatch.setattr("sys.argv", [*arguments[:-2], "--seed", "1"])
    with pytest.raises(SystemExit):
        calibrate.main()
    assert "--seed 1 made the training or the validation stories" in capsys.readouterr().err
