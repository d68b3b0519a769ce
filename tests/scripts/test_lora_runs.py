"""What the scripts of the appendix on LoRA compare is compared fairly, and their records are what they say."""

import pytest
import torch

from appendix_lora import adapt_smollm2, domain_smollm2, lora_instructions, lora_runs
from appendix_lora.lora_runs import spam_runs
from shared.data.corpus import LabeledText, load_sms
from shared.data.models import has_model
from shared.notebook.records import read_rows
from shared.weights.pretrained import load_pretrained


@pytest.fixture(scope="module")
def messages() -> spam_runs.Texts:
    return spam_runs.Texts("bundled", load_sms())


def test_a_run_trains_the_adapter_and_the_head_only(monkeypatch):
    rows = [
        LabeledText(f"{word} {i}", label, "plain", "train")
        for i in range(20)
        for word, label in (("Buy it now", "spam"), ("See you at home", "ham"))
    ]
    data = spam_runs.Texts("made", rows)
    monkeypatch.setattr(lora_runs, "tales_loss", lambda model: 0.5)
    row = lora_runs.run(data, "LoRA, rank 4", "folds", 3e-3, 0, 1, n_epochs=1)
    assert row.keys() == set(lora_runs.COLUMNS) and row["n"] == len(row["right"]) == 8
    assert row["trained"] == 65_280 + 386 and row["correct"] == row["right"].count("1")
    full = lora_runs.run(data, "full", "folds", 3e-4, 0, 1, n_epochs=1)
    assert full["trained"] == 2_607_554 and full["n"] == 8


def test_the_plan_runs_everything_once():
    methods = list(lora_runs.METHODS)
    planned = lora_runs.jobs(methods, [0, 1], [0, 1, 2])
    assert len(planned) == len(set(planned)) == 2 * 3 * len(methods)
    choices = lora_runs.choices(methods, [0, 1])
    assert {seed for _, _, _, seed, _ in choices} == {lora_runs.CHOICE_SEED}
    assert lora_runs.CHOICE_SEED not in lora_runs.SEEDS
    # The rate is the one with the most right answers on record.
    for method, _, rate, _, _ in planned:
        assert rate in lora_runs.METHODS[method][2]
    assert lora_runs.chosen_rate("LoRA, rank 4") == 3e-3 and lora_runs.chosen_rate("head") == 3e-4


def test_the_loss_on_stories_is_near_the_floor():
    loss = lora_runs.tales_loss(load_pretrained("tales-3m"), 8)
    assert 0.25 < loss < 0.4 and loss + 0.01 < lora_runs.tales_loss(load_pretrained("tales-tiny"), 8)


def test_the_record_is_consistent(messages):
    rows = read_rows(lora_runs.RESULTS)
    assert len({tuple(row[name] for name in lora_runs.KEY) for row in rows}) == len(rows) > 0
    cut = {seed: spam_runs.folds(messages, seed) for seed in (*lora_runs.SEEDS, lora_runs.CHOICE_SEED)}
    for row in rows:
        judged = cut[int(row["seed"])][int(row["fold"])][1]
        assert int(row["n"]) == len(judged) and row["method"] in lora_runs.METHODS
        assert int(row["seed"]) in ((lora_runs.CHOICE_SEED,) if row["role"] == "choice" else lora_runs.SEEDS)
        if row["role"] == "folds":  # of the choices only the numbers are kept
            assert len(row["right"]) == len(judged) and int(row["correct"]) == row["right"].count("1")
    found = lora_runs.recorded(messages)
    assert found.keys() == lora_runs.METHODS.keys()
    assert all(one == other for one, other in found["full"].values()) and len(found["full"]) == 3 * 1039
    # The number of trained numbers is a formula: each linear map has rank * (rows + columns).
    model = load_pretrained("tales-3m")
    linear = [
        m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "output_head"
    ]
    sides = sum(sum(module.weight.shape) for module in linear)
    for row in rows:
        if row["method"] in ("LoRA, rank 1", "LoRA, rank 4", "LoRA, rank 16"):
            assert int(row["trained"]) == int(row["method"].split()[-1]) * sides + 386


def test_the_instructions_are_those_of_chapter_7():
    rows = read_rows(lora_instructions.RESULTS)
    runs = {lora_instructions.key(row) for row in rows}
    families = (*lora_instructions.chapter_7.FAMILIES, lora_instructions.chapter_7.HELD_OUT, "stories")
    assert len(rows) == len(runs) * len(families) > 0
    assert {row["family"] for row in rows} == set(families)
    assert lora_instructions.TEST_SEED not in (*lora_instructions.SEEDS, lora_instructions.CHOICE_SEED, 1)
    assert lora_instructions.chosen_rate("full") == 3e-3
    tested = {(row["method"], int(row["seed"])) for row in rows if row["role"] == "test"}
    assert tested == {
        (method, seed) for method in lora_instructions.METHODS for seed in lora_instructions.SEEDS
    }


def test_a_short_run_on_instructions():
    rows = lora_instructions.run("LoRA, rank 4", "choice", 3e-3, 9, n_steps=1, n_test=1)
    assert rows[0]["trained"] == 65_280 + 2 * 192 and rows[0]["steps"] == 1
    assert [row["family"] for row in rows][-1] == "stories" and len(rows) == 8


@pytest.mark.parametrize(
    ("part", "learns"),
    [
        ("all", {"blocks.0.", "blocks.4.", "final_norm."}),
        ("last block", {"blocks.4.", "final_norm."}),
        ("head", {"output_head."}),
    ],
)
def test_only_the_named_part_learns(part, learns):
    model = load_pretrained("tales-3m")
    lora_instructions.choose_trained(model, part)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "token_embedding.weight" in trained
    others = ("blocks.0.", "blocks.3.", "blocks.4.", "final_norm.", "output_head.")
    for start in others:
        found = [name for name, _ in model.named_parameters() if name.startswith(start)]
        is_wanted = start in learns or (part == "all" and start != "output_head.")
        assert all((name in trained) == is_wanted for name in found), (start, found)


def test_the_texts_of_smollm2_fall_into_parts_without_repeats():
    for task in adapt_smollm2.TEXTS:
        data = adapt_smollm2.Labeled(task)
        judged = []
        for fold in range(adapt_smollm2.N_FOLDS):
            learned, watched, places = data.parts(0, str(fold))
            assert not {*learned} & {*watched} and not {*learned, *watched} & {*places}
            assert not {data.rows[i].text for i in (*learned, *watched)} & {data.rows[i].text for i in places}
            judged += places
        test = data.parts(0, "test")
        assert sorted([*judged, *test[2]]) == list(range(len(data.rows)))
        assert {data.splits[i] for i in test[0]} == {"train"} and {data.splits[i] for i in test[2]} == {
            "test"
        }


def test_the_records_of_smollm2_are_consistent():
    rows = read_rows(adapt_smollm2.RESULTS)
    assert len({tuple(row[name] for name in adapt_smollm2.KEY) for row in rows}) == len(rows) > 0
    labeled = {task: adapt_smollm2.Labeled(task) for task in adapt_smollm2.TEXTS}
    for row in rows:
        if row["role"] == "choice":  # only the numbers are kept
            assert int(row["seed"]) == adapt_smollm2.CHOICE_SEED and row["right"] == ""
            continue
        judged = labeled[row["task"]].parts(int(row["seed"]), row["part"])[2]
        assert len(judged) == int(row["n"]) == len(row["right"])
        assert int(row["correct"]) == row["right"].count("1")
        assert row["method"] != "asked" or row["trained"] == "0"
        assert float(row["minutes"]) < 60
    jobs = adapt_smollm2.classify_jobs()
    assert len(jobs) == len(set(jobs)) and {job[4] for job in jobs} == set(adapt_smollm2.SEEDS)


@pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")
def test_the_stages_of_the_domain_case_are_of_other_stories():
    new = {task.messages[0]["content"] for task in domain_smollm2.tasks_of(33_000, 20)}
    taught = {task.messages[0]["content"] for task in domain_smollm2.tasks_of(31_000, 200)}
    assert not new & taught
    n_steps, batches = domain_smollm2.stage("questions", 0)
    inputs, targets = next(iter(batches))
    assert n_steps == domain_smollm2.N_TASK_STEPS and inputs.shape == targets.shape
    assert len(inputs) == domain_smollm2.BATCH_SIZE


def test_the_notebook_tells_the_record_of_the_domain():
    rows = {row["method"]: row for row in read_rows(domain_smollm2.RESULTS)}
    text = (domain_smollm2.HERE / "01_lora.ipynb").read_text(encoding="utf-8")
    for method in ("questions", "stories, then questions"):
        row = rows[method]
        assert row["correct"] == str(row["right"].count("1")) and int(row["n"]) == domain_smollm2.N_TASKS
        losses = [f"{float(row[name]):.2f}" for name in ("tales", "reviews")]
        assert f"| {method} | {row['correct']} | {losses[0]} | {losses[1]} | {row['knowledge']} |" in text
    assert f"| before | 0 (the name in {rows['before']['named']}) |" in text
