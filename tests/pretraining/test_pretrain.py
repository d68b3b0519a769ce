"""`ch05_pretraining/pretrain.py`: killed and continued to the last digit, stopped, diverged, out of disk; its figures.

Runs that are killed are real processes. They come from a fork server that has imported torch once; two processes meet
over gloo as under `torchrun`, which one test uses itself.
"""

import csv
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shared.training.checkpoint
from ch05_pretraining import pretrain
from shared.model.gpt import GPTConfig, GPTModel
from shared.pretraining.options import Options, read_options
from shared.pretraining.processes import Processes
from shared.pretraining.run import Run
from shared.pretraining.shards import load_encoding
from shared.tales.distribution import expected_loss, next_tokens
from shared.tales.encoding import TALE_TOKENIZER_FILE, tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.batches import document_row
from shared.training.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from shared.training.losses import loss_per_document
from tests.tools.architecture import ROOT

SCRIPT = ROOT / "ch05_pretraining" / "pretrain.py"
STEPS = 40
SHAPE = ["n_layers=2", "emb_dim=32", "n_heads=2", "qk_norm=true"]
OPTIONS = {
    "--data": "tales",
    "--tales-stories": "300",
    "--tales-validation": "12",
    "--threads": "1",
    "--steps": str(STEPS),
    "--batch-size": "4",
    "--warmup-steps": "3",
    "--evaluate-every": "15",
    "--device": "cpu",
    "--log-every": "4",
    "--checkpoint-every": "1",
}
SMALL = ["--no-tensorboard", "--model", *SHAPE, "dropout=0.1"]
for name, value in OPTIONS.items():
    SMALL += [name, value]


def arguments(out: Path, *more: str, shards: Path | None = None) -> list[str]:
    return [*SMALL, "--out", str(out), "--shards", str(shards or out.parent / "shards"), *more]


def new_run(*given: str) -> Run:
    options = read_options(pretrain.__doc__, list(given))
    run = Run(options, Processes(options.device, options.threads))
    run.restore()
    run.open_log()
    return run


def main_in_process(monkeypatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        pretrain.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a log without what depends on the clock."""
    with path.open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in csv.DictReader(file)]


def outcome(out: Path) -> tuple:
    """Return all that two equal runs must have in common, to the last digit."""
    weights = (latest_checkpoint(out / "checkpoints") / "model.safetensors").read_bytes()
    return rows_of(out / "log.csv"), rows_of(out / "evaluation.csv"), weights


# ---- killed and continued


def child(given: list[str], environment: dict[str, str], stage: tuple[str, int] | None, output: str) -> None:
    """Run the script in this process; with a stage, die by SIGKILL in that call of a part of `save_checkpoint`."""
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.argv = ["pretrain.py", *given]
    if stage is not None:
        name, left = stage
        owner = os if name == "rename" else shared.training.checkpoint
        real = getattr(owner, name)

        def dying(*values):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*values)

        setattr(owner, name, dying)
    pretrain.main()


@pytest.fixture(scope="module")
def server():
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ch05_pretraining.pretrain", "shared.pretraining.run"])
    return context


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(server, given: list[str], world: int, output: Path, stage: tuple[str, int] | None = None) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        own = stage if rank == 0 else None
        processes.append(
            server.Process(target=child, args=(given, environment, own, str(output)), daemon=True)
        )
        processes[-1].start()
    return processes


def finish(processes: list, timeout: float = 300) -> list[int | None]:
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def kill(processes: list) -> None:
    for process in processes:
        process.kill()
    finish(processes)


def wait_for_step(out: Path, step: int, processes: list) -> None:
    """Wait until a checkpoint of at least `step` is there, or the processes have ended."""
    while all(process.is_alive() for process in processes):
        newest = latest_checkpoint(out / "checkpoints")
        if newest is not None and int(newest.name[5:]) >= step:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def unbroken(server, folder):
    """Return a function from the number of processes to the outcome of a run that nothing disturbs."""
    known = {}

    def outcome_of(world: int) -> tuple:
        if world not in known:
            out = folder / f"unbroken-{world}"
            output = folder / f"unbroken-{world}.txt"
            assert finish(start(server, arguments(out), world, output)) == [0] * world, output.read_text()
            known[world] = outcome(out)
        return known[world]

    return outcome_of


@pytest.mark.posix
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_moment_and_continued_the_losses_are_equal_to_the_last_digit(
    world, server, folder, unbroken
):
    out, output = folder / f"killed-{world}", folder / f"killed-{world}.txt"
    given, chance = arguments(out), random.Random(world)
    killed_at = []
    # Twice at a random moment, then in the middle of writing a checkpoint: before a file, in an fsync, before the name.
    stages = [None, None, ("save_file", 8), ("_to_disk", 15), ("rename", 3)]
    for stage in stages[:: 1 if world == 1 else 2]:
        newest = latest_checkpoint(out / "checkpoints")
        done = int(newest.name[5:]) if newest else 0
        processes = start(server, given, world, output, stage)
        if stage is None:
            wait_for_step(out, done + 2, processes)
            time.sleep(chance.uniform(0, 0.1))
        else:
            processes[0].join(300)
        kill(processes)
        assert processes[0].exitcode == -signal.SIGKILL, output.read_text()
        newest = latest_checkpoint(out / "checkpoints")
        killed_at.append(int(newest.name[5:]))
        load_checkpoint(newest)
    assert killed_at == sorted(killed_at) and killed_at[-1] < STEPS
    assert finish(start(server, given, world, output)) == [0] * world, output.read_text()
    assert outcome(out) == unbroken(world)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.posix
def test_sigterm_to_one_of_two_processes_saves_and_stops_both(server, folder, unbroken):
    out, output = folder / "stopped", folder / "stopped.txt"
    given = arguments(out, "--checkpoint-every", "3")
    processes = start(server, given, 2, output)
    wait_for_step(out, 3, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [0, 0], output.read_text()
    stopped = int(latest_checkpoint(out / "checkpoints").name[5:])
    assert 3 <= stopped < STEPS and f"stopped by a signal after step {stopped}" in output.read_text()
    assert len(rows_of(out / "log.csv")) == stopped
    assert finish(start(server, given, 2, output)) == [0, 0], output.read_text()
    assert outcome(out) == unbroken(2)


@pytest.mark.posix
def test_torchrun_with_a_sharded_model_gives_the_losses_of_one_process(folder, unbroken):
    out = folder / "sharded"
    given = arguments(out, "--parallel", "fsdp", "--accumulation", "2", "--steps", "6")
    given += ["--checkpoint-every", "3", "--export", str(out / "export"), "--model", *SHAPE]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    alone = new_run(*[a if a != str(out) else str(folder / "alone") for a in given])
    alone.advance()
    losses = [[float(row["loss"]) for row in rows_of(path / "log.csv")] for path in (out, folder / "alone")]
    assert len(losses[0]) == 6 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    sharded, whole = (
        load_checkpoint(latest_checkpoint(path / "checkpoints")) for path in (out, folder / "alone")
    )
    for name, tensor in whole.model.items():
        torch.testing.assert_close(sharded.model[name], tensor, atol=1e-4, rtol=0)
    exported = load_file(out / "export" / "model.safetensors")
    assert exported.keys() == sharded.model.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in sharded.model.items())


@pytest.mark.parametrize(("world", "printed"), [("1", "before after late"), ("2", "before")])
def test_a_process_among_several_ends_at_once(world, printed):
    code = "import atexit; from shared.pretraining.processes import end_this_process; "
    code += "atexit.register(print, 'late', end=''); "
    code += "print('before', end=' '); end_this_process(); print('after', end=' ')"
    environment = {**os.environ, "WORLD_SIZE": world, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr


# ---- what it computes


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """Return the folder of a model exported by a short run."""
    out = folder / "finished"
    run = new_run(*arguments(out, "--checkpoint-every", "100"))
    run.advance()
    run.export(out / "export")
    return out


def test_the_exported_model_has_the_recorded_losses(finished):
    config = json.loads((finished / "export" / "config.json").read_text())
    model = GPTModel(GPTConfig(**config["model"]))
    weights = load_file(finished / "export" / "model.safetensors")
    assert "output_head.weight" not in weights
    shared.training.checkpoint.load_model_state(model, weights)
    stories = list(TaleGenerator(0).stories(12))
    rows = [document_row(story.text, tale_encoding()) for story in stories]
    results, nats = config["results"], loss_per_document(model, rows)
    floor = sum(-story.log_probability for story in stories) / 12
    assert results["floor_per_document"] == pytest.approx(floor, rel=1e-12)
    assert results["loss_per_document"] == pytest.approx(nats, rel=1e-5)
    assert results["percent_above_floor"] == pytest.approx(100 * (nats / floor - 1), rel=1e-5)
    assert results["loss"] == pytest.approx(nats * 12 / sum(len(row) - 1 for row in rows), rel=1e-5)
    n_bytes = sum(len(story.text.encode()) for story in stories)
    assert results["bits_per_byte"] == pytest.approx(nats * 12 / math.log(2) / n_bytes, rel=1e-5)
    assert results["parameters"] == model.n_parameters and config["recipe"]["steps"] == STEPS
    assert config["cpu_seconds"] > 0 and "torch" in config["hardware"]
    losses = [float(row["loss"]) for row in rows_of(finished / "log.csv")]
    assert losses[-1] < losses[0] - 1.5


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(folder, finished, monkeypatch):
    out, target = folder / "again", folder / "exported"
    shutil.copytree(finished, out)
    given = arguments(out, "--checkpoint-every", "100", "--export", str(target))
    for _ in range(2):
        main_in_process(monkeypatch, *given)
        config = json.loads((target / "config.json").read_text())
        assert list(config) == ["model", "recipe", "results", "hardware", "cpu_seconds"]
        weights = [path / "model.safetensors" for path in (target, finished / "export")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(
        SystemExit, match=r"pretrain: folder must be new or hold nothing but config\.json, .*exported"
    ):
        main_in_process(monkeypatch, *given)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


@pytest.mark.parametrize("exact", [[], ["--exact-targets", "--outside-weight", "5"]], ids=["drawn", "exact"])
def test_parts_of_a_batch_add_up_to_the_whole(exact, folder):
    losses = {}
    for parts in ("1", "4"):
        out = folder / f"parts-{len(exact)}-{parts}"
        given = ["--steps", "5", "--model", *SHAPE, "--accumulation", parts, *exact]
        run = new_run(*arguments(out, *given))
        run.advance()
        losses[parts] = [float(row["loss"]) for row in rows_of(out / "log.csv")]
    assert losses["1"] == pytest.approx(losses["4"], abs=1e-5) and losses["1"] != losses["4"]


def test_exact_targets_are_the_mean_of_drawn_ones_and_the_weight_keeps_the_model_inside(folder):
    mass = {}
    for weight in ("0", "20"):
        given = ["--model", "n_layers=2", "emb_dim=64", "n_heads=4", "--start-from", "tales-tiny"]
        given += ["--optimizer", "adamw", "--learning-rate", "0.0003", "--steps", "12"]
        given += ["--exact-targets", "--outside-weight", weight]
        run = new_run(*arguments(folder / f"exact-{weight}", *given))
        rows = run.train_rows.batch(0)
        inputs, targets = run.train_rows.tensors(rows)
        stories = [tale_encoding().decode(row[row >= 0][:-1].tolist()) for row in targets]
        with torch.no_grad():
            wanted = expected_loss(run.model(inputs), map(next_tokens, stories))[0].sum().item()
        loss, n_targets = run.gradients()
        # The weight is no part of what is logged.
        assert loss.item() == pytest.approx(wanted / n_targets, rel=1e-5)
        run.model.zero_grad()
        run.advance()
        run.model.eval()
        with torch.no_grad():
            mass[weight] = expected_loss(run.model(inputs), map(next_tokens, stories))[1].sum().item()
    assert mass["20"] < mass["0"]


def test_a_run_begins_from_trained_weights_and_may_add_layers(folder, finished):
    trained = finished / "export"
    before = json.loads((trained / "config.json").read_text())["results"]["loss_per_document"]
    for layers, tolerance in (("2", 1e-4), ("3", 2.0)):
        out, source = folder / f"begun-{layers}", folder / f"source-{layers}"
        shutil.copytree(trained, source)
        model = ["--model", f"n_layers={layers}", *SHAPE[1:], "dropout=0"]
        given = arguments(out, *model, "--start-from", str(source))
        run = new_run(*given)
        assert run.evaluate()["loss_per_document"] == pytest.approx(before, abs=tolerance)
        weights = load_file(trained / "model.safetensors")
        assert all(torch.equal(run.model.state_dict()[name], weight) for name, weight in weights.items())
        for block in run.model.blocks[2:]:
            value = block.attention.qkv.weight.chunk(3)[2]
            assert torch.equal(block.attention.output.weight, -4 * value.T)
            assert not block.feed_forward.down.weight.any()
        run.train_step()
        run.check_losses()
        run.save()
        run.close()
        shutil.rmtree(source)  # needed at the beginning only
        run = new_run(*given)
        assert run.step == 1
        run.close()


def test_experts_are_kept_busy_by_the_balance_loss(folder):
    loads = {}
    experts = ["feed_forward=moe", "n_experts=4", "n_active_experts=1"]
    for weight in ("0", "1"):
        out = folder / f"experts-{weight}"
        options = ["--steps", "30", "--optimizer", "adamw", "--balance-weight", weight]
        run = new_run(*arguments(out, "--model", *SHAPE, *experts), *options)
        run.advance()
        loads[weight] = max(block.feed_forward.load.max().item() for block in run.model.blocks)
    assert 0.25 <= loads["1"] < loads["0"] - 0.05


def test_bf16_is_close_to_float32_and_another_optimizer_and_schedule_work(folder):
    options = ["--steps", "5", "--optimizer", "adamw", "--schedule", "cosine", "--warmup-steps", "0"]
    losses = {}
    for precision in ("float32", "bf16"):
        out = folder / f"precision-{precision}"
        run = new_run(*arguments(out, *options, "--precision", precision))
        run.advance()
        run.model.eval()
        rows = [document_row(story.text, tale_encoding()) for story in TaleGenerator(0).stories(12)]
        nats = loss_per_document(run.model, rows)
        # Evaluations are not rounded: they are those of the exported weights.
        assert run.evaluation["loss_per_document"] == pytest.approx(nats, rel=1e-5)
        losses[precision] = [float(row["loss"]) for row in rows_of(out / "log.csv")]
    assert (
        losses["bf16"] == pytest.approx(losses["float32"], abs=0.05) and losses["bf16"] != losses["float32"]
    )
    rates = [float(row["learning_rate"]) for row in rows_of(folder / "precision-bf16" / "log.csv")]
    assert rates == [0.003 * (0.5 + 0.5 * math.cos(math.pi * step / 5)) for step in range(5)]


def test_text_files_with_a_tokenizer_file_and_windows(folder, capsys):
    books = folder / "books"
    books.mkdir()
    for number in range(3):
        (books / f"{number}.txt").write_text(TaleGenerator(number).text(20_000), encoding="utf-8")
    (books / "cover.png").write_bytes(b"\x89PNG\xff")
    out = folder / "windows"
    given = ["--data", str(books), "--separator", "\\n\\n", "--tokenizer", str(TALE_TOKENIZER_FILE)]
    given += ["--rows", "windows", "--workers", "1", "--validation-fraction", "0.1"]
    given += ["--model", "context_length=32", *SHAPE]
    run = new_run(*arguments(out, "--steps", "3", "--warmup-steps", "0", *given))
    run.advance()
    [row] = rows_of(out / "evaluation.csv")
    assert row["loss_per_document"] == "" and 6 < float(row["loss"]) < 8
    rows = run.validation_rows
    assert run.held_out.chosen == list(range(len(rows)))
    targets = torch.cat([rows.tensors([i])[1][0] for i in range(len(rows))])
    n_bytes = len(
        tale_encoding().decode_bytes([t for t in targets.tolist() if t != tale_encoding().eot_token])
    )
    expected = float(row["loss"]) * len(targets) / math.log(2) / n_bytes
    assert float(row["bits_per_byte"]) == pytest.approx(expected, rel=1e-6)
    assert run.floor is None and run.shards.counts["train"]["documents"] > 50


@pytest.fixture(scope="module")
def long_texts(folder) -> Path:
    """Return 24 files, each much longer than the context."""
    texts = folder / "long"
    texts.mkdir()
    for number in range(24):
        (texts / f"{number}.txt").write_text(TaleGenerator(number).text(5_000), encoding="utf-8")
    return texts


TWO_STEPS = ["--steps", "2", "--warmup-steps", "0"]


def test_the_plain_command_uses_the_texts_and_says_how_much_of_them(folder, long_texts, monkeypatch, capsys):
    out = folder / "plain"
    # Its batches of 16 are larger than those of the other tests; nothing else that shapes rows is given.
    given = arguments(out, *TWO_STEPS, "--data", str(long_texts), "--batch-size", "16")
    main_in_process(monkeypatch, *given)
    printed = capsys.readouterr().out
    ids = [load_encoding("tales").encode_ordinary(path.read_text()) for path in long_texts.iterdir()]
    n_tokens = sum(map(len, ids))
    said = json.loads((out / "data.json").read_text())
    train, held_out = said["training"], said["validation"]
    # Two end tokens for each file: it is divided in two.
    assert train["tokens"] + held_out["tokens"] == n_tokens + 2 * 24
    assert train["used"] > 0.9 * train["tokens"] and held_out["used"] == held_out["tokens"] - 1
    for side in (train, held_out):
        assert side["used"] + sum(side["lost"].values()) == side["tokens"]
        assert f"{side['used']:,} of {side['tokens']:,} tokens are used" in printed
    assert train["used"] == 16 * 256 * (train["tokens"] // 256 // 16)
    assert "24 files" in printed and "the end of each file is for validation" in printed
    assert "WARNING" not in printed


def test_where_most_of_the_text_is_cut_a_warning_says_so(folder, long_texts, monkeypatch, capsys):
    given = arguments(folder / "heads", *TWO_STEPS, "--data", str(long_texts), "--rows", "documents")
    main_in_process(monkeypatch, *given, "--model", *SHAPE, "context_length=32")
    printed = capsys.readouterr().out
    assert "WARNING: most of the text for training is not used. --rows windows uses all of it" in printed
    said = json.loads((folder / "heads" / "data.json").read_text())["training"]
    assert said["used"] == 24 * 32 and "behind the first 32 tokens of 24 documents" in said["lost"]


def test_a_single_file_is_divided_by_position(folder, long_texts, monkeypatch, capsys):
    out, path = folder / "single", long_texts / "3.txt"
    given = arguments(out, *TWO_STEPS, "--data", str(path), "--validation-fraction", "0.2")
    main_in_process(monkeypatch, *given, "--model", *SHAPE, "context_length=64")
    [row] = rows_of(out / "evaluation.csv")
    assert float(row["loss"]) > 0
    encoding, run = load_encoding("tales"), new_run(*given, "--model", *SHAPE, "context_length=64")
    text = path.read_text()
    parts = [encoding.decode(run.train_rows.shards[0][:-1].tolist())]
    parts.append(encoding.decode(run.validation_rows.shards[0][:-1].tolist()))
    assert "".join(parts) == text and len(parts[1]) == pytest.approx(0.2 * len(text), rel=0.1)
    run.close()


def test_text_for_validation_may_not_be_text_for_training(folder, long_texts, monkeypatch):
    given = arguments(
        folder / "both", "--data", str(long_texts), "--validation-data", str(long_texts / "7.txt")
    )
    with pytest.raises(SystemExit, match=r"pretrain: \S+7\.txt is in data and in validation_data"):
        main_in_process(monkeypatch, *given)


def test_an_evaluation_leaves_each_module_in_its_own_mode(folder):
    run = new_run(*arguments(folder / "modes"))
    run.model.blocks[0].eval()
    before = [module.training for module in run.model.modules()]
    run.evaluate()
    assert [module.training for module in run.model.modules()] == before and len(set(before)) == 2
    run.close()


def test_tensorboard_holds_the_losses(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = folder / "board"
    run = new_run(*arguments(out, "--steps", "3", "--warmup-steps", "0", "--tensorboard"))
    run.advance()
    run.log.close()
    events = accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    losses = [float(row["loss"]) for row in rows_of(out / "log.csv")]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("validation/bits_per_byte")] == [3]


# ---- what goes wrong


def poison(monkeypatch, batch: int, loss: float) -> None:
    """Give the batch of that number a loss of this size."""
    real = Run.train_step

    def poisoned(run):
        number = run.step + run.skipped
        real(run)
        if number == batch:
            step, _, *rest = run.pending[-1]
            run.pending[-1] = (step, torch.tensor(loss), *rest)

    monkeypatch.setattr(Run, "train_step", poisoned)


@pytest.mark.parametrize(("loss", "message"), [(math.nan, "loss nan"), (99.0, r"loss 99\.0000: exploded")])
def test_divergence_stops_with_the_step_and_the_value(loss, message, folder, monkeypatch):
    out = folder / f"diverged-{loss}"
    poison(monkeypatch, 26, loss)
    with pytest.raises(SystemExit, match=f"pretrain: step 27: {message}"):
        main_in_process(monkeypatch, *arguments(out, "--checkpoint-every", "10"))
    assert latest_checkpoint(out / "checkpoints").name == "step-00000020"


def test_a_rate_that_is_far_too_high_is_noticed(folder, monkeypatch):
    out = folder / "too-high"
    given = arguments(out, "--optimizer", "sgd", "--learning-rate", "1e30", "--warmup-steps", "0")
    with pytest.raises(SystemExit, match=r"pretrain: step \d: loss \S+, gradient norm \S+: not finite"):
        main_in_process(monkeypatch, *given)


def test_rollback_skips_the_batches_and_gives_up_after_a_while(folder, monkeypatch, capsys):
    out = folder / "rolled-back"
    poison(monkeypatch, 26, math.nan)
    given = arguments(out, "--checkpoint-every", "10", "--on-divergence", "rollback")
    main_in_process(monkeypatch, *given)
    assert "step 27: loss nan" in capsys.readouterr().out
    saved = load_checkpoint(latest_checkpoint(out / "checkpoints"))
    assert (saved.step, saved.extra["skipped"], saved.extra["rollbacks"]) == (STEPS, 7, 1)
    rows = rows_of(out / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    with pytest.raises(SystemExit, match="step 27: loss nan"):
        main_in_process(
            monkeypatch, *given[:-1], "rollback", "--max-rollbacks", "0", "--out", str(folder / "gives-up")
        )


def test_a_full_disk_stops_with_a_message_and_loses_nothing(folder, finished, monkeypatch):
    out, real, calls = folder / "full", shared.training.checkpoint._to_disk, []

    def full(path):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    given = arguments(out, "--checkpoint-every", "10")
    with monkeypatch.context() as patch:
        patch.setattr(shared.training.checkpoint, "_to_disk", full)
        with pytest.raises(SystemExit, match=r"pretrain: \S+step-00000020 was not written: .*No space left"):
            main_in_process(patch, *given)
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000010"]
    main_in_process(monkeypatch, *given)
    assert outcome(out) == outcome(finished)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "{}/none"], r"none cannot be read: No such file"),
        (["--data", "{}/empty"], r"empty holds no file that fits '\*\.txt'"),
        (["--data", "{}/latin.txt"], r"latin\.txt is not UTF-8 text"),
        (["--data", "{}/fine.txt"], "context_length is 256, but the longest shard of .* only 6 tokens"),
        (
            ["--data", "{}/fine.txt", "--tokenizer", "words"],
            "tokenizer is 'words'; allowed: tales, gpt2, a path",
        ),
        (["--batch-size", "6", "--accumulation", "4"], "batch_size is 6; .* a multiple of 4"),
        (["--batch-size", "400"], "batch_size is 400, but the data have only 300 rows"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--decay", "3"], "decay must leave 1 to 37 of 40 steps"),
        (["--model", "n_heads"], "'n_heads' is not NAME=VALUE"),
        (["--model", "n_heads=5"], "emb_dim must be a multiple of n_heads=5"),
        (["--model", "n_layer=2"], "model has no option 'n_layer'; allowed: vocab_size, .*n_layers"),
        (["--model", "n_layers=two"], "n_layers must be int, got 'two'"),
        (["--preset", "gpt5"], "argument --preset: invalid choice: 'gpt5'"),
        (["--device", "gpu"], "device must be auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:99"], "device must be a device of this machine .* got 'cuda:99'"),
        (
            ["--out", "{}/fine.txt"],
            r"out must be a folder that can be written, got \S+fine\.txt \(File exists\)",
        ),
        (["--data", "{}/blank"], "the text files are empty"),
        (["--model", "vocab_size=100"], "vocab_size is 100; the tokenizer has 2048 tokens"),
        (["--model", "context_length=50"], "context_length is 50: shorter than the longest tale"),
        (
            ["--exact-targets", "--model", "context_length=210"],
            "context_length is 210: shorter than the longest",
        ),
        (["--start-from", "{}/none"], r"name_or_path must be one of gpt2-small, .* got '\S+none'"),
        (
            ["--start-from", "tales-tiny"],
            "start_from is tales-tiny; its model has emb_dim=64, not 32; n_heads",
        ),
        (["--recipe", "{}/none.toml"], r"recipe .*none\.toml cannot be read: No such file"),
        (["--recipe", "{}/bad.toml"], r"recipe .*bad\.toml cannot be read: "),
        (["--recipe", "{}/unknown.toml"], "has unknown options: spets"),
        (["--recipe", "{}/kind.toml"], "keep_last is 'many'; int is needed"),
    ],
)
def test_bad_input_is_one_clear_line(given, message, folder, tmp_path, monkeypatch):
    for name in ("empty", "blank"):
        (tmp_path / name).mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n \n")
    (tmp_path / "fine.txt").write_text("Once upon a time.")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "bad.toml").write_text("steps = = 3")
    (tmp_path / "unknown.toml").write_text("spets = 3")
    (tmp_path / "kind.toml").write_text('keep_last = "many"')
    given = [text.replace("{}", str(tmp_path)) for text in given]
    with pytest.raises(SystemExit, match=f"^pretrain: .*{message}.*$"):
        main_in_process(monkeypatch, *arguments(tmp_path / "run", *given, shards=folder / "shards"))


def test_a_run_is_continued_only_with_the_options_that_it_began_with(finished, monkeypatch, capsys):
    given = arguments(finished, "--checkpoint-every", "100")
    with pytest.raises(SystemExit, match=r"is of another run \(seed 0, now 1\): choose another --out"):
        main_in_process(monkeypatch, *given, "--seed", "1")
    before = outcome(finished)
    main_in_process(monkeypatch, *given, "--evaluate-every", "5")  # free to change, and nothing is left to do
    assert outcome(finished) == before
    state = latest_checkpoint(finished / "checkpoints") / "state.json"
    text = state.read_text()
    state.write_text(text.replace('"step": 40', '"step": '))
    with pytest.raises(SystemExit, match=r"step-00000040 cannot be read"):
        main_in_process(monkeypatch, *given)
    state.write_text(text)


LONGER = ["--threads", "1", "--checkpoint-every", "3", "--decay", "0.25"]


def test_a_run_may_become_longer_while_its_rate_has_not_begun_to_fall(folder, monkeypatch):
    short, long = folder / "lengthened", folder / "long-from-the-start"

    def run(out, steps, *more):
        main_in_process(monkeypatch, *arguments(out, *LONGER, "--steps", str(steps), *more))

    def stop_at(step):
        """Send the signal that stops a run after this step."""
        real = Run.train_step

        def stopping(self):
            real(self)
            self.signalled = self.step == step

        return real, stopping

    # Of 8 steps the last 2 have a falling rate; the run is stopped before them and made longer.
    real, stopping = stop_at(6)
    monkeypatch.setattr(Run, "train_step", stopping)
    run(short, 8)
    monkeypatch.setattr(Run, "train_step", real)
    run(short, 16)
    run(long, 16)
    assert outcome(short)[::2] == outcome(long)[::2]
    rates = [float(row["learning_rate"]) for row in rows_of(short / "log.csv")]
    assert rates[3:13] == [0.003] * 10 and rates[-1] == 0.003 / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps", "16"], "steps 8, now 16; the 8 steps done would have had other learning rates"),
        (["--decay", "0.5"], "decay 0.25, now 0.5; the 8 steps done would have had other"),
        (["--steps", "7"], "steps 8, now 7; 8 steps are done"),
    ],
)
def test_a_run_whose_rate_has_fallen_is_not_made_longer(changes, message, folder, monkeypatch):
    given = arguments(folder / "fallen", *LONGER, "--steps", "8")
    main_in_process(monkeypatch, *given)
    with pytest.raises(SystemExit, match=rf"step-00000008 is of another run \({message}.*\): choose another"):
        main_in_process(monkeypatch, *given, *changes)


def test_a_checkpoint_of_something_else_is_refused(folder, monkeypatch):
    out = folder / "foreign"
    save_checkpoint(out / "checkpoints", 3, {"weight": torch.zeros(2)})
    with pytest.raises(
        SystemExit, match=r"step-00000003 was not written by pretrain.py: choose another --out"
    ):
        main_in_process(monkeypatch, *arguments(out))


def test_too_little_memory_and_a_stop_before_the_first_step_are_one_line(folder, monkeypatch):
    def raising(error):
        def fail(*_):
            raise error

        return fail

    monkeypatch.setattr(Run, "advance", raising(torch.OutOfMemoryError("CUDA out of memory. Tried ...")))
    with pytest.raises(
        SystemExit, match=r"^pretrain: the device has too little memory: a smaller --batch-size"
    ):
        main_in_process(monkeypatch, *arguments(folder / "memory"))
    monkeypatch.setattr(Run, "restore", raising(KeyboardInterrupt()))
    with pytest.raises(
        SystemExit, match=r"^pretrain: stopped before the first step; the same command goes on$"
    ):
        main_in_process(monkeypatch, *arguments(folder / "memory"))


@pytest.mark.posix
def test_a_folder_in_use_is_refused_until_its_run_ends(folder, monkeypatch):
    given = arguments(folder / "locked", "--steps", "4", "--warmup-steps", "0")
    run = new_run(*given)
    with pytest.raises(SystemExit, match=r"pretrain: \S+locked is in use by another run"):
        main_in_process(monkeypatch, *given)
    run.close()
    main_in_process(monkeypatch, *given)
    assert len(rows_of(folder / "locked" / "log.csv")) == 4


# ---- options


def test_options_come_from_defaults_recipe_and_command_line(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'data = ["tales"]\nsteps = 7\nmodel = { n_layers = 3, qk_norm = true }\ncompile = true\n'
    )
    given = ["--recipe", str(recipe), "--out", "x", "--model", "n_layers=1", "norm=layernorm", "--no-compile"]
    options = read_options("usage", given)
    assert options.model == {"n_layers": 1, "qk_norm": True, "norm": "layernorm"}
    assert (options.steps, options.compile, options.batch_size) == (7, False, 16)
    assert read_options("usage", [*given, "--separator", "\\n--\\n"]).separator == "\n--\n"
    with pytest.raises(ValueError, match="out is missing"):
        Options(data=["tales"])
    with pytest.raises(ValueError, match="data is missing"):
        Options(out="x")
    with pytest.raises(ValueError, match="tokenizer is 'gpt2'; tales have their own"):
        Options(out="x", data=["tales"], tokenizer="gpt2")
    with pytest.raises(ValueError, match="rows is 'lines'; allowed: auto, windows, documents"):
        Options(out="x", data=["tales"], rows="lines")
    with pytest.raises(ValueError, match="exact_targets needs data=tales and rows=documents"):
        Options(out="x", data=["book.txt"], exact_targets=True)
    with pytest.raises(ValueError, match=r"outside_weight is 2\.0; it needs exact_targets"):
        Options(out="x", data=["tales"], outside_weight=2.0)
    with pytest.raises(
        ValueError, match="start_from is y; mimetic is for a model that begins without weights"
    ):
        Options(out="x", data=["tales"], start_from="y", mimetic=True)
    with pytest.raises(ValueError, match="compile is 1; bool is needed"):
        Options(out="x", data=["tales"], compile=1)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        read_options(pretrain.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert "torchrun --nproc-per-node" in text
    names = vars(Options(out="x", data=["tales"]))
    assert [name for name in names if f"--{name.replace('_', '-')}" not in text] == []


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "ch05_pretraining" / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_committed_recipes_are_valid(recipe):
    options = read_options("usage", ["--recipe", str(recipe), "--out", "x"])
    assert GPTConfig.preset(options.preset, **options.model).context_length >= 216
