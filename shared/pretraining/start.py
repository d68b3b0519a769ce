"""What a training run of `ch05_pretraining/pretrain.py` begins with: its data as rows, and its model.

A model begins with drawn weights, with drawn weights whose attention already looks for like tokens, or with trained
weights, to which layers may be added.

Left out: the cutting of texts into shards (`shared.pretraining.shards`) and of shards into rows
(`shared.pretraining.rows`).
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tiktoken
import torch
from torch import nn

from shared.model.attention import MultiHeadAttention
from shared.model.gpt import GPTConfig, GPTModel
from shared.pretraining.files import find_text_files
from shared.pretraining.options import Options
from shared.pretraining.rows import DocumentRows, WindowRows
from shared.pretraining.shards import TextShards, tokenize, tokenize_tales
from shared.training.checkpoint import load_model_state, model_state
from shared.weights.pretrained import load_pretrained


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        shards: The token files of the training, and counts of them.
        train_rows: Rows in batches of the run's size.
        validation_rows: Rows of the held-out documents.
        floor: The lowest loss that any model can have on the validation rows, in nats per document, where it is
            known: for tales as documents.
    """

    shards: TextShards
    train_rows: DocumentRows | WindowRows
    validation_rows: DocumentRows | WindowRows
    floor: float | None


def check_batch_size(options: Options, world_size: int) -> None:
    """Raise ValueError if a batch cannot be cut into equal parts for all processes."""
    parts = world_size * options.accumulation
    if options.batch_size % parts:
        raise ValueError(
            f"batch_size is {options.batch_size}; processes x accumulation need a multiple of {parts}"
        )


def model_config(options: Options, encoding: tiktoken.Encoding) -> GPTConfig:
    """Return the shape of the model, with the tokenizer's vocabulary unless the options name a larger one.

    Raises:
        ValueError: The vocabulary is smaller than the tokenizer's, or another number is not allowed.
        TypeError: A number where a word is needed, for one.
    """
    known = [each.name for each in fields(GPTConfig)]
    if unknown := sorted(options.model.keys() - known):
        raise ValueError(f"model has no option {unknown[0]!r}; allowed: {', '.join(known)}")
    changes = {"vocab_size": encoding.n_vocab} | options.model
    config = GPTConfig.preset(options.preset, **changes)
    if config.vocab_size < encoding.n_vocab:
        raise ValueError(f"vocab_size is {config.vocab_size}; the tokenizer has {encoding.n_vocab} tokens")
    return config


def prepare_data(options: Options) -> tuple[TextShards, list[Path]]:
    """Return the training shards and the paths of the validation shards; what is done already is not done again.

    Raises:
        ValueError: A text cannot be read, or no document is left for one of the two sides.
    """
    folder = Path(options.shards or Path(options.out) / "shards")

    # Tales are written by their generator, each side from a seed of its own.
    if options.is_tales:
        shards = tokenize_tales(
            folder,
            options.tales_stories,
            options.tales_seed,
            options.tales_validation,
            options.tales_validation_seed,
        )
        return shards, shards.validation

    # Texts are read from files. Those for validation are a share of them, or files of their own.
    def tokenized(paths: list[str], validation_fraction: float) -> TextShards:
        return tokenize(
            paths,
            folder,
            options.tokenizer,
            validation_fraction=validation_fraction,
            separator=options.separator,
            pattern=options.pattern,
            seed=options.seed,
            workers=options.workers or None,
        )

    _check_held_out(options)
    shards = tokenized(options.data, 0.0 if options.validation_data else options.validation_fraction)
    held_out = shards.validation
    if options.validation_data:
        held_out = tokenized(options.validation_data, 1.0).validation

    # Nothing but white space has no tokens, and a text of one character cannot be divided.
    if not (shards.train or held_out):
        raise ValueError("the text files are empty")
    for side, paths in (("training", shards.train), ("validation", held_out)):
        if not paths:
            raise ValueError(f"no text is left for {side}: see --validation-fraction and --validation-data")
    return shards, held_out


def _check_held_out(options: Options) -> None:
    """Raise ValueError if a file is for training and for validation."""
    train, held_out = (
        {path.resolve() for path in find_text_files(paths, options.pattern)}
        for paths in (options.data, options.validation_data)
    )
    if both := sorted(train & held_out):
        raise ValueError(
            f"{both[0]} is in data and in validation_data; a model is judged by text that it has not seen"
        )


def load_data(options: Options, config: GPTConfig, encoding: tiktoken.Encoding) -> RunData:
    """Return the data of a run, prepared if they are not yet.

    Raises:
        ValueError: As `prepare_data`, or a row that must be whole is longer than the context.
    """
    shards, validation = prepare_data(options)

    # Both sides are cut into rows in the same way, only that every token that is held out counts.
    def rows_of(paths: list[Path], batch_size: int) -> DocumentRows | WindowRows:
        if options.rows == "windows":
            is_judged = paths is validation
            return WindowRows(paths, config.context_length, batch_size, options.seed, partial=is_judged)
        return DocumentRows(
            paths,
            config.context_length,
            batch_size,
            encoding.eot_token,
            options.seed,
            options.length_pool,
        )

    train_rows = rows_of(shards.train, options.batch_size)
    validation_rows = rows_of(validation, 1)
    floor = shards.floor if options.rows == "documents" else None

    # The floor holds for whole stories, and exact targets follow a story from its first token to its last.
    whole_rows = [validation_rows] if floor else []
    if options.exact_targets:
        whole_rows.append(train_rows)
    for rows in whole_rows:
        if isinstance(rows, DocumentRows) and rows.lengths.max() > config.context_length:
            raise ValueError(f"context_length is {config.context_length}: shorter than the longest tale")
    return RunData(shards, train_rows, validation_rows, floor)


def build_model(options: Options, config: GPTConfig, device: torch.device, is_new: bool) -> GPTModel:
    """Return the model of a run on its device, with the weights that it begins with.

    Args:
        options: Of the run.
        config: Shape of the model.
        device: Where it computes.
        is_new: Whether the run has no checkpoint yet. Trained weights are needed, and read, by a new run only.

    Raises:
        ValueError: The shape does not fit the first weights that the options ask for.
    """
    torch.manual_seed(options.seed)
    model = GPTModel(config).to(device)
    if options.mimetic:
        initialize_mimetically(model)
    if options.start_from and is_new:
        begin_from(model, options.start_from)
    if options.compile:
        model.compile()
    return model


@torch.no_grad()
def initialize_mimetically(model: GPTModel) -> None:
    """Let attention begin as a search for like tokens that copies what it finds (Trockman and Kolter, 2023).

    Half of each key map becomes that of its queries, so that vectors score high with their like, and the output map
    undoes the value map. A small model then learns early to repeat what stands far back in the text.
    Raises ValueError if there are fewer key heads than query heads.
    """
    for block in model.blocks:
        attention = _attention(block)
        if attention.n_kv_heads != attention.n_heads:
            raise ValueError(f"mimetic needs n_kv_heads={attention.n_heads}, got {attention.n_kv_heads}")
        query, key, value = attention.qkv.weight.chunk(3)
        key.lerp_(query, 0.5)
        attention.output.weight.copy_(value.T)


@torch.no_grad()
def begin_from(model: GPTModel, name: str) -> None:
    """Copy trained weights of the same shape, but for layers that `model` has more; those go on top.

    A new layer begins with attention that looks for tokens like the one predicted and speaks against them, as copy
    suppression does in GPT-2 (McDougall et al., 2023, "Copy Suppression: Comprehensively Understanding an Attention
    Head"), and with a feed-forward part that adds nothing. With fewer key heads than query heads its attention adds
    nothing either.

    Raises:
        ValueError: The models differ in more than that, or new layers would have experts.
    """
    source = load_pretrained(name, dtype=torch.float32)

    # Only what shapes no weight may differ, and the number of layers where ours has more.
    ours, theirs = asdict(model.config), asdict(source.config)
    free = {"dropout", "init_std"}
    if ours["n_layers"] > theirs["n_layers"]:
        free.add("n_layers")
    wrong = [
        f"{key}={theirs[key]}, not {ours[key]}" for key in ours.keys() - free if ours[key] != theirs[key]
    ]
    if wrong:
        raise ValueError(f"start_from is {name}; its model has {'; '.join(sorted(wrong))}")
    if len(model.blocks) > len(source.blocks) and model.config.feed_forward == "moe":
        raise ValueError(f"start_from is {name}; layers with experts cannot be added")

    # The weights that both have.
    load_model_state(model, {**model_state(model), **model_state(source)})

    # The layers on top: attention that speaks against copies, and no feed-forward part.
    for block in model.blocks[len(source.blocks) :]:
        attention = _attention(block)
        if attention.n_kv_heads == attention.n_heads:
            query, key, value = attention.qkv.weight.chunk(3)
            key.lerp_(query, 0.5)
            # Without the factor the new layer would hardly be heard: its output joins the sum of all layers below.
            attention.output.weight.copy_(-4 * value.T)
        else:
            attention.output.weight.zero_()
        block.get_parameter("feed_forward.down.weight").zero_()


def _attention(block: nn.Module) -> MultiHeadAttention:
    """Return the attention of a block as what it is, which torch's lists of modules do not say."""
    attention = block.get_submodule("attention")
    if not isinstance(attention, MultiHeadAttention):
        raise ValueError(f"blocks must have MultiHeadAttention, got {type(attention).__name__}")
    return attention
