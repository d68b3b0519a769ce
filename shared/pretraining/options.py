"""The options of `ch05_pretraining/pretrain.py`: one data class, filled by a TOML recipe and the command line.

Left out: the loop itself. The options of a run are stored in its checkpoints, and those that are not marked `free`
must be the same when it is continued.
"""

import argparse
import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from shared.checks import check_path

# Written out here, and compared by a test with what they name: torch takes seconds to import, --help and a wrong
# option should take none.
PRESETS = (
    "gpt2-small",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "bytes-tiny",
    "tales-tiny",
    "tales-1m",
    "tales-3m",
)
OPTIMIZERS = ("sgd", "adam", "adamw", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine", "step", "restarts", "wsd")

AT_LEAST_1 = (
    "steps",
    "batch_size",
    "accumulation",
    "log_every",
    "evaluate_every",
    "keep_last",
    "evaluation_rows",
    "checkpoint_every",
    "tales_stories",
    "tales_validation",
    "length_pool",
)
AT_LEAST_0 = (
    "workers",
    "warmup_steps",
    "max_grad_norm",
    "spike_factor",
    "seed",
    "max_rollbacks",
    "threads",
    "repeat_weight",
    "balance_weight",
    "outside_weight",
)


def option(
    default: object, help: str, *, choices: tuple[str, ...] = (), free: bool = False, group: str | None = None
) -> Any:
    """Return a field of `Options`; a `free` one may change when a run is continued, `group` begins one of --help."""
    kind = str if default is None else type(default)
    metadata = {"help": help, "choices": choices, "free": free, "kind": kind, "group": group}
    if isinstance(default, list | dict):
        return field(default_factory=kind, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Everything that a run depends on; stored in every checkpoint."""

    # fmt: off
    # ruff: noqa: RUF009
    out: str = option("", "folder of the run; the same command continues the run that it holds", free=True)
    data: list[str] = option([], "text files and folders, or the word tales: generated stories")
    tokenizer: str = option("tales", "tales, gpt2 or a path ending in .tiktoken")
    preset: str = option("tales-1m", "shape of the model", choices=PRESETS)
    steps: int = option(1000, "updates; more of them may be asked for later, until the learning rate begins to fall")
    batch_size: int = option(16, "rows of an update, all processes together")
    learning_rate: float = option(0.003, "peak; with muon that of everything but the matrices")
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: what LLM_DEVICE names, else a GPU if there is one")
    export: str | None = option(None, "folder for the finished model, in the format of shared/checkpoints", free=True)

    rows: str = option("auto", "a row is a window of the stream, or a document from its beginning, cut to the context; "
                               "auto: windows for text, documents for tales",
                       choices=("auto", "windows", "documents"), group="text files")
    separator: str | None = option(None, "what stands between two documents of a file (\\n is a line break); "
                                         "none: a file is one document")
    pattern: str = option("*.txt", "which files of a folder are read; names that begin with a dot never are")
    validation_fraction: float = option(0.01, "share of the documents held out for validation; of a few files, the end "
                                              "of each")
    validation_data: list[str] = option([], "text files and folders for validation, in place of a held-out share")
    workers: int = option(0, "processes that tokenize; 0: one for each CPU that may be used", free=True)
    shards: str | None = option(None, "folder for token shards; none: OUT/shards", free=True)
    length_pool: int = option(8, "batches of documents that are sorted by length together; 1: none")

    tales_stories: int = option(100_000, "tales for training", group="tales")
    tales_seed: int = option(1, "seed of the training tales")
    tales_validation: int = option(400, "tales for validation")
    tales_validation_seed: int = option(0, "seed of the validation tales")

    model: dict[str, object] = option({}, "changes to the preset, as NAME=VALUE ...: n_layers=2 qk_norm=true",
                                      group="model")
    mimetic: bool = option(False, "first weights of attention that look for and copy tokens: keys are half queries, "
                                  "outputs undo values")
    start_from: str | None = option(None, "trained weights to begin with, a name or folder for load_pretrained; "
                                          "layers that they lack are added on top")

    optimizer: str = option("muon", "what turns gradients into updates", choices=OPTIMIZERS, group="updates")
    matrix_learning_rate: float = option(0.02, "peak for the matrices, muon only")
    weight_decay: float = option(0.01, "decoupled, on matrices")
    beta1: float = option(0.9, "AdamW's average of gradients")
    beta2: float = option(0.95, "AdamW's average of squares")
    schedule: str = option("wsd", "learning rate over the steps", choices=SCHEDULES)
    warmup_steps: int = option(0, "steps of linear warm-up")
    decay: float = option(0.5, "share of the steps in which wsd falls to 0")
    max_grad_norm: float = option(1.0, "longer gradients are shortened to it; 0: never")
    accumulation: int = option(1, "parts in which a process computes its rows of an update")
    seed: int = option(0, "of weights, order of the data and dropout")

    repeat_weight: float = option(0.0, "extra weight in the loss of rare targets that stand earlier in their row, with "
                                       "documents as rows: teaches early to look back", group="loss")
    repeat_share: float = option(0.004, "a token is rare if at most this share of the training tokens is the same")
    repeat_from: int = option(0, "first step with the extra weight, counted from 0")
    repeat_until: int = option(0, "first step without it again")
    exact_targets: bool = option(False, "tales as documents: the loss is its expected value over all tokens that the "
                                        "grammar allows in a place, not that of the one that was drawn")
    outside_weight: float = option(0.0, "with exact targets: extra weight of the part of the loss that comes from "
                                        "probability for tokens that cannot stand there")
    balance_weight: float = option(0.01, "mixtures of experts: factor of the loss that keeps all experts busy")

    precision: str = option("float32", "of the matrix products", choices=("float32", "bf16"), group="machine")
    compile: bool = option(False, "torch.compile: needs a C++ compiler, pays off in long runs")
    parallel: str = option("ddp", "several processes: each with the whole model, or with a part",
                           choices=("ddp", "fsdp"))
    threads: int = option(0, "CPU threads of a process; 0: torch decides")

    log_every: int = option(10, "steps between two checks of the losses", free=True, group="logs and checkpoints")
    evaluate_every: int = option(200, "steps between two evaluations", free=True)
    evaluation_rows: int = option(400, "most rows of an evaluation", free=True)
    checkpoint_every: int = option(200, "steps between two checkpoints", free=True)
    keep_last: int = option(2, "checkpoints kept", free=True)
    tensorboard: bool = option(True, "write logs for TensorBoard", free=True)

    spike_factor: float = option(3.0, "a loss above this many times the median of the last 100 is an explosion; "
                                      "0: only one that is not finite", free=True, group="divergence")
    on_divergence: str = option("stop", "stop, or go back to the last checkpoint and skip the batches since",
                                choices=("stop", "rollback"), free=True)
    max_rollbacks: int = option(3, "after so many rollbacks, stop", free=True)
    # fmt: on

    def __post_init__(self) -> None:
        # The kind of each value, and the words that are allowed.
        for each in fields(self):
            kind, allowed = each.metadata["kind"], each.metadata["choices"]
            value = getattr(self, each.name)
            is_missing = value is None and each.default is None
            is_of_kind = isinstance(value, int | float if kind is float else kind)
            if not (is_of_kind or is_missing) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{each.name} is {value!r}; {kind.__name__} is needed")
            if allowed and value not in allowed:
                raise ValueError(f"{each.name} is {value!r}; allowed: {', '.join(allowed)}")
            if kind in (str, list):
                _check_paths(each.name, [value] if kind is str else value)

        # The range of the numbers.
        for each in fields(self):
            if isinstance(getattr(self, each.name), float) and math.isnan(getattr(self, each.name)):
                raise ValueError(f"{each.name} is nan; a number is needed")
        for smallest, names in ((1, AT_LEAST_1), (0, AT_LEAST_0)):
            for name in names:
                if getattr(self, name) < smallest:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")

        # What must be given, and what needs something else.
        if not self.out or not self.data:
            raise ValueError(f"{'data' if self.out else 'out'} is missing")
        if "tales" in self.data and not self.is_tales:
            raise ValueError(
                "data names tales and files; tales are learned alone (a folder of that name is ./tales)"
            )
        if self.rows == "auto":
            object.__setattr__(self, "rows", "documents" if self.is_tales else "windows")
        if not (self.is_tales or self.validation_data or 0 < self.validation_fraction < 1):
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; without validation_data it must be above 0 and "
                "below 1"
            )
        if self.repeat_weight and self.rows != "documents":
            raise ValueError(f"repeat_weight is {self.repeat_weight}; it needs rows=documents")
        if self.exact_targets and not (self.is_tales and self.rows == "documents"):
            raise ValueError(
                "exact_targets needs data=tales and rows=documents: no other source is known exactly"
            )
        if self.outside_weight and not self.exact_targets:
            raise ValueError(f"outside_weight is {self.outside_weight}; it needs exact_targets")
        if self.start_from and self.mimetic:
            raise ValueError(
                f"start_from is {self.start_from}; mimetic is for a model that begins without weights"
            )
        if self.is_tales and self.tokenizer != "tales":
            raise ValueError(f"tokenizer is {self.tokenizer!r}; tales have their own")

    @property
    def is_tales(self) -> bool:
        """Whether the data are generated."""
        return self.data == ["tales"]


def read_options(usage: str, arguments: list[str] | None = None) -> Options:
    """Return the options: those of the command line over those of the recipe over the defaults.

    Args:
        usage: What `--help` shows; its first paragraph stands before the options.
        arguments: Of the command line; None: those of this process.

    Raises:
        ValueError: A recipe that cannot be read, an unknown option or a value that is not allowed.
    """
    parser = _parser(usage)
    given = vars(parser.parse_args(arguments))

    # A recipe, in which the command line may change single fields of the model.
    recipe = given.pop("recipe", None)
    values: dict[str, Any] = {}
    try:
        if recipe is not None:
            values = tomllib.loads(Path(recipe).read_text(encoding="utf-8"))
        if "model" in given:
            given["model"] = values.get("model", {}) | dict(map(_assignment, given["model"]))
    except OSError as error:
        raise ValueError(f"recipe {recipe} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{f'recipe {recipe}' if recipe else '--model'} cannot be read: {error}") from error
    if unknown := sorted(values.keys() - {each.name for each in fields(Options)}):
        raise ValueError(f"recipe {recipe} has unknown options: {', '.join(unknown)}")

    # A shell passes on no line break.
    if "separator" in given:
        given["separator"] = given["separator"].replace("\\n", "\n")
    return Options(**{**values, **given})


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors: the usual ones print the whole usage first and end the program."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message of the wrong argument."""
        raise ValueError(f"{message}; --help names all options")


def _parser(usage: str) -> argparse.ArgumentParser:
    """Return a parser with an argument for each option; what is not given is left out of its result."""
    summary, _, rest = usage.partition("\n\n")
    parser = _OneLineParser(
        prog="pretrain.py",
        usage="pretrain.py [--recipe FILE] --data PATH ... --out FOLDER [options]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("basics")
    group.add_argument(
        "--recipe", metavar="FILE", help="TOML file of options, which the command line overrides"
    )
    for each in fields(Options):
        if each.metadata["group"]:
            group = parser.add_argument_group(each.metadata["group"])
        kind, text = each.metadata["kind"], each.metadata["help"].replace("%", "%%")
        default = "" if kind in (list, dict) or each.default in ("", None) else f" (default: {each.default})"
        keywords: dict[str, Any] = {"help": text + default, "default": argparse.SUPPRESS}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif kind in (list, dict):
            keywords |= {"nargs": "+", "metavar": "PATH" if kind is list else "NAME=VALUE"}
        else:
            keywords["type"] = kind
            keywords["choices"] = each.metadata["choices"] or None
        group.add_argument("--" + each.name.replace("_", "-"), **keywords)
    return parser


def _check_paths(name: str, values: list[object] | list[None]) -> None:
    """Refuse what is no text, or no path that a checkpoint could store; None is allowed."""
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} holds {value!r}; str is needed")
        check_path(name, value)


def _assignment(text: str) -> tuple[str, object]:
    """Return name and value of NAME=VALUE, the value as in TOML; a word needs no quotes."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is not NAME=VALUE")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value
