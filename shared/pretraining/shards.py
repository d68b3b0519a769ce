"""Text files to token shards on disk: tokenized once, in parallel, in bounded memory, and continued after a stop.

A file has the tokens of its text with \\n as line end, whatever its own are, and without a byte-order mark. The files
are cut into jobs of about equal size. Each job writes `train-*.npy` and `validation-*.npy` (files of
`shared.text.dataset.write_token_file`, every document followed by the end token) and then a small `job-*.json`, which
says that the job is done. A killed run leaves the finished jobs; the next run does the others. The folder's name
holds a checksum of everything that the result depends on, so changed texts or settings get a new folder.

Left out: cleaning and removal of duplicates (`shared.text.cleaning`), files that are compressed or not UTF-8, two runs
that write into one folder at the same time.
"""

import codecs
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import tiktoken

from shared.checks import check_between, check_sizes
from shared.data.download import gpt2_encoding
from shared.pretraining.files import find_text_files
from shared.pretraining.stretches import (
    HEAD_BYTES,
    Part,
    Stretch,
    head_of,
    pieces,
    plan_jobs,
    split_by_position,
    with_unix_line_ends,
)
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.text.dataset import encode_documents, write_token_file
from shared.text.tokenizer import BPETokenizer

SIDES = ("train", "validation")
READER = 2  # another way to read files gets another number, so that it does not find shards of the old one
MOST_WORKERS = 61 if sys.platform == "win32" else 1024  # Windows cannot wait for more


@dataclass(frozen=True)
class TextShards:
    """The result of `tokenize` and `tokenize_tales`: files in order, and counts of all of them together.

    Attributes:
        folder: Where they are; its name stands for the texts and the settings.
        train, validation: Paths of the token files.
        counts: For each side "tokens" (end tokens included) and "documents".
        sha256: Checksum of the training tokens.
        floor: For tales the mean of -log p of the validation stories in nats, otherwise None.
        files: Text files that were read.
        by_position: Whether the end of each file is for validation, because there are too few documents.
    """

    folder: Path
    train: list[Path]
    validation: list[Path]
    counts: dict[str, dict[str, int]]
    sha256: str
    floor: float | None = None
    files: int = 0
    by_position: bool = False


def load_encoding(tokenizer: str) -> tiktoken.Encoding:
    """Return the tokenizer "tales", "gpt2" or one in a `.tiktoken` file (split by GPT-2's pattern).

    Raises:
        ValueError: Another name, or a file that cannot be read.
    """
    if tokenizer == "tales":
        return tale_encoding()
    if tokenizer == "gpt2":
        return gpt2_encoding()
    if not tokenizer.endswith(".tiktoken"):
        raise ValueError(f"tokenizer is {tokenizer!r}; allowed: tales, gpt2, a path ending in .tiktoken")
    try:
        return BPETokenizer.load(tokenizer).to_tiktoken(Path(tokenizer).stem)
    except OSError as error:
        raise ValueError(f"tokenizer {tokenizer} cannot be read: {error.strerror}") from error


def usable_cpus() -> int:
    """Return how many CPUs this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tokenize(
    paths: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    tokenizer: str,
    *,
    validation_fraction: float = 0.0,
    separator: str | None = None,
    pattern: str = "*.txt",
    seed: int = 0,
    workers: int | None = 1,
    job_bytes: int = 1 << 26,
) -> TextShards:
    """Tokenize text files into shards below `folder`; what an earlier call has done is not done again.

    Args:
        paths: Text files (UTF-8) and folders.
        folder: The shards get a folder of their own in it.
        tokenizer: As for `load_encoding`.
        validation_fraction: Share of the documents for validation, chosen by a checksum of their first 4,096 bytes:
            equal documents land on the same side. Where that is less than one file, or leaves nothing on one side, it
            is the last share of each file.
        separator: What stands between two documents of a file; None: a file is one document.
        pattern: Which files of a folder are read.
        seed: Another seed chooses other documents for validation.
        workers: Processes. Each holds a few MB of text. None: one for each CPU that this process may use.
        job_bytes: Text of one job and of one shard.

    Raises:
        ValueError: A bad argument, or a file that cannot be read, tokenized or is not UTF-8. Finished jobs are kept.
        OSError: A process that tokenizes was ended from outside.
    """
    check_between("validation_fraction", validation_fraction, 0, 1)
    if separator == "":
        raise ValueError("separator is empty; leave it out where a file is one document")
    if separator is not None:
        separator = with_unix_line_ends(separator.encode()).decode()
    workers = usable_cpus() if workers is None else workers
    check_sizes(workers=workers, job_bytes=job_bytes)
    files = find_text_files(paths, pattern)

    def divided(by_position: bool) -> TextShards:
        settings = (tokenizer, validation_fraction, separator, seed)
        return _tokenize_files(files, folder, settings, by_position, workers, job_bytes)

    # A few large files are divided each; many small ones stay whole.
    is_divided = 0 < validation_fraction < 1
    if is_divided and separator is None and validation_fraction * len(files) < 1:
        return divided(by_position=True)
    shards = divided(by_position=False)
    if is_divided and not (shards.train and shards.validation):
        return divided(by_position=True)
    return shards


def _tokenize_files(
    files: list[Path],
    folder: str | os.PathLike,
    settings: tuple[str, float, str | None, int],
    by_position: bool,
    workers: int,
    job_bytes: int,
) -> TextShards:
    """Do what `tokenize` says with one way to divide the text; `settings` are tokenizer, fraction, separator, seed."""
    # The folder's name stands for all that the result depends on: the settings, and the files as they are now.
    tokenizer, fraction, *others = settings
    stats = [(str(file.resolve()), file.stat()) for file in files]
    found = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    result = [READER, _fingerprint(load_encoding(tokenizer)), fraction, *others, by_position, job_bytes]
    target = _folder_for(folder, [result, found])

    # What an earlier call has left to do.
    parts = []
    for path, size, _ in found:
        if by_position:
            middle = split_by_position(path, size, fraction)
            parts += [Part(path, 0, middle, "train"), Part(path, middle, size, "validation")]
        else:
            parts.append(Part(path, 0, size))
    jobs = plan_jobs(parts, job_bytes)
    work = partial(_run_job, target, *settings)
    open_jobs = [(n, job) for n, job in enumerate(jobs) if not (target / f"job-{n:05d}.json").exists()]

    # In this process, or in several that are started for it.
    workers = min(workers, len(open_jobs), MOST_WORKERS)
    if workers < 2:
        for number, job in open_jobs:
            work(number, job)
    else:
        _work_in_processes(work, open_jobs, workers)
    return _collect(target, len(jobs), len(files), by_position)


def _work_in_processes(work: partial[None], open_jobs: list[tuple[int, list[Stretch]]], workers: int) -> None:
    """Do all jobs in processes of their own."""
    # "spawn" because a fork would copy the threads of torch in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(work, number, job) for number, job in open_jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that tokenizes was ended from outside (too little memory for so many workers?); "
                "finished jobs are kept"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def tokenize_tales(
    folder: str | os.PathLike, n_stories: int, seed: int, n_validation: int, validation_seed: int
) -> TextShards:
    """Write tales as shards below `folder`: `n_stories` for training, `n_validation` of another seed."""
    check_sizes(n_stories=n_stories, n_validation=n_validation)
    if seed == validation_seed:
        raise ValueError(f"seed and validation_seed are both {seed}; validation needs other stories")
    encoding = tale_encoding()
    settings = ["tales", _fingerprint(encoding), n_stories, seed, n_validation, validation_seed]
    # One story of the grammar as it is now: another grammar must not find the shards of the old one.
    target = _folder_for(folder, [*settings, TaleGenerator(seed).sample().text])
    if not (target / "job-00000.json").exists():
        counts, floor = {}, 0.0
        for side, n, source in (("train", n_stories, seed), ("validation", n_validation, validation_seed)):

            def texts(side: str = side, n: int = n, source: int = source) -> Iterator[str]:
                nonlocal floor
                for story in TaleGenerator(source).stories(n):
                    floor -= story.log_probability / n if side == "validation" else 0.0
                    yield story.text

            chunks = encode_documents(texts(), encoding.encode_ordinary, encoding.eot_token)
            n_tokens = write_token_file(target / f"{side}-00000.npy", chunks, encoding.n_vocab)
            counts[side] = {"tokens": n_tokens, "documents": n}
        _write_job(target, 0, {**counts, "floor": floor})
    return _collect(target, 1)


def _folder_for(folder: str | os.PathLike, settings: list) -> Path:
    text = json.dumps(settings, sort_keys=True)
    target = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    return target


def _fingerprint(encoding: tiktoken.Encoding) -> str:
    tokens = sorted(encoding.token_byte_values(), key=encoding.encode_single_token)
    return hashlib.sha256(repr((tokens, encoding.eot_token)).encode()).hexdigest()


def _run_job(
    target: Path,
    tokenizer: str,
    fraction: float,
    separator: str | None,
    seed: int,
    number: int,
    job: list[Stretch],
) -> None:
    """Write the shards of one job, and its `job-*.json` last."""
    encoding = load_encoding(tokenizer)
    for litter in target.glob(f"*-{number:05d}.npy.*.part"):  # of a run that was killed in this job
        litter.unlink(missing_ok=True)
    counts = {}
    for side in SIDES:
        counts[side] = {"tokens": 0, "documents": 0}
        chunks = _encode_job(job, encoding, fraction, separator, seed, side, counts[side])
        first = next(chunks, None)
        if first is not None:
            write_token_file(target / f"{side}-{number:05d}.npy", chain([first], chunks), encoding.n_vocab)
    _write_job(target, number, counts)


def _encode_job(
    job: list[Stretch],
    encoding: tiktoken.Encoding,
    fraction: float,
    separator: str | None,
    seed: int,
    side: str,
    counts: dict[str, int],
) -> Iterator[list[int]]:
    """Yield the token ids of the documents of one side, piece by piece, and count them."""
    for stretch in job:
        part = stretch.part
        if part.side not in (None, side):
            continue
        # A stretch in the middle of a file goes on with a document that has text already.
        goes_on = separator is None and stretch.start > part.first
        wanted, is_first, has_text = True, True, goes_on
        for piece, ends in pieces(stretch, separator):
            # The beginning of a document decides the side of all of it, in each stretch of a file alike.
            if is_first:
                wanted = part.side == side
                if part.side is None:
                    head = piece[:HEAD_BYTES] if separator is not None else head_of(part.path)
                    digest = hashlib.sha256(f"{seed}\0".encode() + head).digest()
                    held_out = int.from_bytes(digest[:8], "big") < fraction * 2**64
                    wanted = held_out == (side == "validation")
                has_text = goes_on
            is_first = ends
            if not wanted:
                continue

            # Its tokens, and an end token behind those of its last piece. Empty documents are left out.
            text = _decode(piece, part.path)
            has_text |= not text.isspace() and text != ""
            ids = _encode(encoding, text, part.path) if has_text else []
            if ends and has_text:
                ids.append(encoding.eot_token)
                counts["documents"] += 1
            counts["tokens"] += len(ids)
            if ids:
                yield ids


def _decode(piece: bytes, path: str) -> str:
    """Return the text of a piece; ValueError that names the file if it is not UTF-8."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"{error.reason}: {error.object[error.start]:#x}"
    if head_of(path).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        reason = "it begins like UTF-16: save it as UTF-8"
    raise ValueError(f"{path} is not UTF-8 text ({reason})")


def _encode(encoding: tiktoken.Encoding, text: str, path: str) -> list[int]:
    """Return the token ids of a text; ValueError that names the file if the tokenizer lacks one of its bytes."""
    try:
        return encoding.encode_ordinary(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be tokenized: {error}") from None


def _write_job(target: Path, number: int, content: dict) -> None:
    """Write the file that says that a job is done."""
    train = target / f"train-{number:05d}.npy"
    digest = None
    if train.exists():
        with train.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = target / f"job-{number:05d}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**content, "sha256": digest}), encoding="utf-8")
    os.replace(part, path)


def _collect(target: Path, n_jobs: int, n_files: int = 0, by_position: bool = False) -> TextShards:
    counts = {side: {"tokens": 0, "documents": 0} for side in SIDES}
    floor, checksum = None, hashlib.sha256()
    for number in range(n_jobs):
        done = json.loads((target / f"job-{number:05d}.json").read_text(encoding="utf-8"))
        floor = done.get("floor")
        checksum.update(str(done["sha256"]).encode())
        for side in SIDES:
            for key in counts[side]:
                counts[side][key] += done[side][key]
    train, validation = (sorted(target.glob(f"{side}-*.npy")) for side in SIDES)
    return TextShards(target, train, validation, counts, checksum.hexdigest(), floor, n_files, by_position)


def _end_with_parent() -> None:
    """Let a worker end when the main process is killed, and without a word when the user stops both.

    Without this it would wait for work for ever.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:  # every worker has one
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
