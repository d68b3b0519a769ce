"""What `deployment/measure_serving.py` compares, on a tiny model: no package of a model is needed."""

import importlib.util
from pathlib import Path

from shared.generation.engine import generate
from shared.weights.pretrained import load_tokenizer
from tests.generation.decoders import random_gpt

PATH = Path(__file__).resolve().parents[2] / "deployment" / "measure_serving.py"
SPEC = importlib.util.spec_from_file_location("measure_serving", PATH)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


def test_the_prompts_are_different():
    texts = script.prompts(load_tokenizer("tales-3m"), 40)
    assert len(texts) == 40 and len({tuple(ids) for ids in texts}) == 40


def test_all_sides_write_the_same_texts():
    model = random_gpt(30, seed=1)
    texts = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9]]
    speed, written = script.tokens_per_second(lambda: script.batched(model, texts, 7, context_length=20))
    assert written == generate(model, texts, 7) and speed > 0


def test_a_line_of_the_table_shows_median_and_extremes(capsys):
    assert script.show("ours", [3.0, 1.0, 2.0]) == 2.0
    assert capsys.readouterr().out.split() == ["ours", "2.0", "tokens/s", "(1.0", "to", "3.0)"]
