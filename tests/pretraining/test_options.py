"""`shared.pretraining.options`: what a command line may say, and how quickly and plainly it is answered."""

import dataclasses
import os
import subprocess
import sys

import pytest

from ch05_pretraining import pretrain
from shared.model.gpt import PRESETS
from shared.pretraining import options as module
from shared.pretraining.options import Options, read_options
from shared.training.optimizers import OPTIMIZERS
from shared.training.schedules import SCHEDULES
from tests.tools.architecture import ROOT

SCRIPT = ROOT / "ch05_pretraining" / "pretrain.py"


def test_the_names_that_are_written_out_are_those_that_there_are():
    assert tuple(PRESETS) == module.PRESETS
    assert tuple(OPTIMIZERS) == module.OPTIMIZERS
    assert tuple(SCHEDULES) == module.SCHEDULES


def run_script(*given: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a Python in which torch cannot be imported."""
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), *given]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_help_does_without_torch_and_begins_with_the_basics():
    done = run_script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    groups = [line[:-1] for line in done.stdout.splitlines() if line.endswith(":") and line[0] != " "]
    assert groups[:4] == ["options", "basics", "text files", "tales"]
    basics = done.stdout.split("basics:")[1].split("text files:")[0]
    for name in ("recipe", "out", "data", "tokenizer", "preset", "steps", "batch-size", "device", "export"):
        assert f"--{name} " in basics
    assert len(done.stdout.split("basics:")[0].splitlines()) < 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--preset", "gpt5"], "argument --preset: invalid choice: 'gpt5' .*gpt2-small"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--stps", "3"], "unrecognized arguments: --stps 3"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--learning-rate", "nan"], "learning_rate is nan; a number is needed"),
        (
            ["--validation-fraction", "0"],
            "validation_fraction is 0.0; without validation_data it must be above 0",
        ),
        (["--data", "tales", "books"], "data names tales and files"),
    ],
)
def test_a_wrong_option_is_one_line_and_needs_no_torch(given, message):
    done = run_script("--data", "books", "--out", "run", *given)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    with pytest.raises(ValueError, match=f"^{message}"):
        read_options(pretrain.__doc__, ["--data", "books", "--out", "run", *given])


def test_text_is_cut_into_windows_and_tales_are_read_from_their_beginning():
    assert Options(out="x", data=["books"]).rows == "windows"
    assert Options(out="x", data=["tales"]).rows == "documents"
    assert Options(out="x", data=["books"], rows="documents").rows == "documents"
    assert Options(out="x", data=["tales"], rows="windows").rows == "windows"
    # What a checkpoint stores is what was done.
    assert dataclasses.asdict(Options(out="x", data=["books"]))["rows"] == "windows"


@pytest.mark.parametrize(
    "name", ["out", "data", "validation_data", "shards", "export", "start_from", "tokenizer"]
)
def test_a_path_whose_bytes_are_not_utf8_is_refused(name):
    path = os.fsdecode(b"caf\xe9")
    if "\udce9" not in path:
        pytest.skip("this system decodes names in another way")
    value = [path] if name in ("data", "validation_data") else path
    with pytest.raises(
        ValueError, match=f"^{name}: this path cannot be used, as its bytes are not UTF-8: 'caf"
    ):
        Options(**{"out": "x", "data": ["books"], name: value})
    assert Options(**{"out": "x", "data": ["books"], name: ["café"] if isinstance(value, list) else "café"})


def test_a_recipe_is_checked_like_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('data = [3]\nout = "x"\n')
    with pytest.raises(ValueError, match="data holds 3; str is needed"):
        read_options("usage", ["--recipe", str(recipe)])
