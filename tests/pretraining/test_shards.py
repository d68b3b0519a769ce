"""`shared.pretraining.shards`: the tokens of the whole texts, however they are cut, interrupted and shared out."""

import json
import os
import tracemalloc
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.pretraining import shards as text_shards
from shared.pretraining import stretches
from shared.pretraining.shards import load_encoding, tokenize, tokenize_tales
from shared.tales.encoding import TALE_TOKENIZER_FILE, tale_encoding
from shared.tales.generator import TaleGenerator
from shared.text.dataset import open_token_file

ENCODING = tale_encoding()
END = ENCODING.eot_token


def tokens(paths: list[Path]) -> list[int]:
    return np.concatenate([open_token_file(path) for path in paths]).tolist() if paths else []


def expected(documents: list[str]) -> list[int]:
    return [token for text in documents for token in (*ENCODING.encode_ordinary(text), END)]


@pytest.fixture
def texts(tmp_path) -> Path:
    """Return a folder of three files of stories with a blank line between them."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("b.txt", "a.txt", "deep/c.txt")):
        (folder / name).write_text(TaleGenerator(number).text(9_000), encoding="utf-8")
    (folder / "notes.md").write_text("not read")
    return folder


def stories_of(folder: Path) -> list[str]:
    names = ("a.txt", "b.txt", "deep/c.txt")
    texts = [(folder / name).read_text(encoding="utf-8") for name in names]
    return [story for text in texts for story in text.split("\n\n")[:-1]]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6)
small_texts = st.lists(
    st.lists(words | st.sampled_from(["a", "it's", "1999", "  ", "\n"]), min_size=1), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=60)
@given(parts=small_texts, separated=st.booleans(), job_bytes=st.sampled_from([7, 40, 10_000]))
def test_pieces_have_the_tokens_of_the_whole(parts, separated, job_bytes, tmp_path_factory):
    documents = [
        " ".join(part).replace("#", "").replace("\r", "") for part in parts
    ]  # line ends: test_stretches.py
    folder = tmp_path_factory.mktemp("texts")
    if separated:
        (folder / "all.txt").write_bytes("##".join(documents).encode())
    else:
        for number, document in enumerate(documents):
            (folder / f"{number}.txt").write_bytes(document.encode())
    kept = [text for text in documents if text and not text.isspace()]
    if not any(documents):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretches, "PIECE_BYTES", 24)
        # Only a text without a space may be cut anywhere; here no piece may.
        patch.setattr(stretches, "_last_safe_cut", cut_or_wait)
        found = tokenize(
            [folder], folder / "shards", "tales", separator="##" if separated else None, job_bytes=job_bytes
        )
    assert tokens(found.train) == expected(kept) and found.validation == []
    assert found.counts["train"] == {"tokens": len(expected(kept)), "documents": len(kept)}


real_cut = stretches._last_safe_cut


def cut_or_wait(buffer: bytes, limit: int) -> int:
    """Cut as the module does, but never where it would cut a text without spaces anywhere."""
    stretches.PIECE_BYTES = max(24, len(buffer))
    return real_cut(buffer, limit)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_are_divided_by_their_content_and_processes_change_nothing(workers, texts, tmp_path):
    options = {"validation_fraction": 0.2, "separator": "\n\n", "job_bytes": 4_000}
    found = tokenize([texts], tmp_path / "shards", "tales", workers=workers, **options)
    stories = stories_of(texts)
    both = tokens(found.train), tokens(found.validation)
    assert len(found.train) > 5 and both[0].count(END) + both[1].count(END) == len(stories)
    decoded = [ENCODING.decode(side).split("<|endoftext|>")[:-1] for side in both]
    assert sorted(decoded[0] + decoded[1]) == sorted(stories) and not set(decoded[0]) & set(decoded[1])
    assert 0.05 < len(decoded[1]) / len(stories) < 0.4
    one_job = tokenize([texts], tmp_path / "other", "tales", **{**options, "job_bytes": 10**6})
    assert tokens(one_job.train) == both[0] and tokens(one_job.validation) == both[1]
    assert found.counts == one_job.counts


def test_of_a_few_files_the_end_of_each_is_for_validation(tmp_path):
    contents = [TaleGenerator(number).text(9_000) for number in range(3)]
    contents.append(contents[0])  # a copy under another name must not be learned and judged by
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_text(content)
    for paths in ([tmp_path / "0.txt"], [tmp_path]):
        options = {"validation_fraction": 0.1, "job_bytes": 4_000}
        found = tokenize(paths, tmp_path / "shards", "tales", **options)
        n_files = 4 if paths == [tmp_path] else 1
        assert found.by_position and found.files == n_files
        train, held_out = (
            ENCODING.decode(tokens(side)).split("<|endoftext|>")[:-1]
            for side in (found.train, found.validation)
        )
        assert [a + b for a, b in zip(train, held_out, strict=True)] == contents[:n_files]
        for part, whole in zip(held_out, contents, strict=False):
            assert 0.08 < len(part) / len(whole) <= 0.1
        assert found.counts["validation"]["documents"] == n_files
        assert not set(train) & set(held_out)
        one_job = tokenize(paths, tmp_path / "other", "tales", validation_fraction=0.1)
        assert tokens(one_job.train) == tokens(found.train)
        assert tokens(one_job.validation) == tokens(found.validation)


def test_documents_that_all_land_on_one_side_are_divided_by_position(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(story.text for story in TaleGenerator(1).stories(6)))
    found = tokenize(
        [tmp_path / "a.txt"], tmp_path / "shards", "tales", separator="\n\n", validation_fraction=0.02
    )
    assert found.by_position and found.train and found.validation
    text = "".join(ENCODING.decode(tokens(side)) for side in (found.train, found.validation))
    parts = text.split("<|endoftext|>")[:-1]
    assert len(parts) == 7 and [*parts[:5], parts[5] + parts[6]] == [
        story.text for story in TaleGenerator(1).stories(6)
    ]


def test_many_files_stay_whole(tmp_path):
    stories = [story.text for story in TaleGenerator(1).stories(60)]
    for number, story in enumerate(stories):
        (tmp_path / f"{number:02d}.txt").write_text(story)
    found = tokenize([tmp_path], tmp_path / "shards", "tales", validation_fraction=0.1)
    sides = [
        ENCODING.decode(tokens(side)).split("<|endoftext|>")[:-1] for side in (found.train, found.validation)
    ]
    assert (
        not found.by_position and sorted(sides[0] + sides[1]) == sorted(stories) and 1 <= len(sides[1]) <= 15
    )


def test_a_text_on_which_the_tokenizer_fails_is_named(tmp_path, monkeypatch):
    class Failing:
        def __getattr__(self, name):
            return getattr(ENCODING, name)

        def encode_ordinary(self, text):
            if "bad" in text:
                raise ValueError("no such byte")
            return ENCODING.encode_ordinary(text)

    monkeypatch.setattr(text_shards, "load_encoding", lambda _: Failing())
    (tmp_path / "a.txt").write_text("Once upon a time.")
    (tmp_path / "b.txt").write_text("a bad text")
    with pytest.raises(ValueError, match=r"b\.txt cannot be tokenized: no such byte"):
        tokenize([tmp_path], tmp_path / "shards", "tales")
    assert tokens(tokenize([tmp_path / "a.txt"], tmp_path / "shards", "tales").train) == expected(
        ["Once upon a time."]
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_million_spaces_have_their_tokens(workers, tmp_path):
    text = "x" + " " * 1_000_000 + "y"
    (tmp_path / "a.txt").write_text("Once upon a time.")
    (tmp_path / "b.txt").write_text(text)
    found = tokenize([tmp_path], tmp_path / "shards", "tales", workers=workers, job_bytes=1_000_000)
    assert ENCODING.decode(tokens(found.train)) == f"Once upon a time.<|endoftext|>{text}<|endoftext|>"


def test_other_ends_of_a_worker_are_one_line(texts, tmp_path, monkeypatch):
    def ended(*_):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(text_shards, "as_completed", ended)
    with pytest.raises(OSError, match="a process that tokenizes was ended from outside"):
        tokenize([texts], tmp_path / "shards", "tales", workers=2, job_bytes=4_000)


def test_as_many_workers_as_cpus_may_be_used_and_windows_can_wait_for(texts, tmp_path, monkeypatch):
    asked = []

    def work(job, open_jobs, workers):
        asked.append(workers)
        for number, stretches_of_job in open_jobs:
            job(number, stretches_of_job)

    monkeypatch.setattr(text_shards, "_work_in_processes", work)
    # One CPU of 16: no process is started.
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    tokenize([texts], tmp_path / "one", "tales", workers=None, job_bytes=1_000)
    assert asked == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 7})
    tokenize([texts], tmp_path / "three", "tales", workers=None, job_bytes=1_000)
    monkeypatch.delattr(os, "sched_getaffinity")
    tokenize([texts], tmp_path / "all", "tales", workers=None, job_bytes=1_000)
    # No more than there are jobs, or than the system allows.
    tokenize([texts], tmp_path / "jobs", "tales", workers=64, job_bytes=8_000)
    monkeypatch.setattr(text_shards, "MOST_WORKERS", 2)
    tokenize([texts], tmp_path / "windows", "tales", workers=64, job_bytes=1_000)
    assert asked == [3, 16, 6, 2]


def test_finished_jobs_are_not_done_again(texts, tmp_path, monkeypatch):
    options = {"separator": "\n\n", "job_bytes": 4_000}
    expected_tokens = tokens(tokenize([texts], tmp_path / "unbroken", "tales", **options).train)
    real, done = text_shards._run_job, []

    def interrupted(*arguments):
        if len(done) == 3:
            (arguments[0] / "train-00003.npy.1.part").write_bytes(b"half")  # what a kill leaves behind
            raise KeyboardInterrupt
        done.append(arguments[-2])
        real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text_shards, "_run_job", interrupted)
        tokenize([texts], tmp_path / "shards", "tales", **options)
    again = []
    monkeypatch.setattr(text_shards, "_run_job", lambda *a: (again.append(a[-2]), real(*a)))
    found = tokenize([texts], tmp_path / "shards", "tales", **options)
    assert done == [0, 1, 2] and again == list(range(3, len(found.train)))
    assert tokens(found.train) == expected_tokens and not list(found.folder.glob("*.part"))
    again.clear()
    assert tokenize([texts], tmp_path / "shards", "tales", **options) == found and again == []


def test_changed_texts_or_settings_get_another_folder(texts, tmp_path):
    first = tokenize([texts], tmp_path / "shards", "tales")
    assert tokenize([texts], tmp_path / "shards", "tales", separator="\n\n").folder != first.folder
    (texts / "a.txt").write_text("Once upon a time.")
    second = tokenize([texts], tmp_path / "shards", "tales")
    assert second.folder != first.folder and second.sha256 != first.sha256


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for size in (3_000_000, 12_000_000):
        path = tmp_path / f"{size}.txt"
        path.write_bytes(b"the quick brown fox jumps over " * (size // 31))
        tracemalloc.start()
        tokenize([path], tmp_path / "shards", "tales", job_bytes=1 << 30)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 60e6


def test_a_text_without_spaces_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(stretches, "PIECE_BYTES", 16)
    text = "猫在垫子上" * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = tokenize([tmp_path / "a.txt"], tmp_path / "shards", "tales", job_bytes=100)
    assert ENCODING.decode(tokens(found.train)[:-1]) == text


def test_tales_are_written_with_their_floor(tmp_path):
    found = tokenize_tales(tmp_path, 20, 5, 7, 6)
    train, held_out = list(TaleGenerator(5).stories(20)), list(TaleGenerator(6).stories(7))
    assert tokens(found.train) == expected([story.text for story in train])
    assert tokens(found.validation) == expected([story.text for story in held_out])
    assert found.floor == pytest.approx(-sum(story.log_probability for story in held_out) / 7)
    assert found.counts["train"]["documents"] == 20
    written = os.stat(found.train[0]).st_mtime_ns
    assert tokenize_tales(tmp_path, 20, 5, 7, 6) == found and os.stat(found.train[0]).st_mtime_ns == written
    assert tokenize_tales(tmp_path, 21, 5, 7, 6).folder != found.folder
    with pytest.raises(ValueError, match="seed and validation_seed are both 5"):
        tokenize_tales(tmp_path, 20, 5, 7, 5)
    with pytest.raises(ValueError, match="n_stories must be at least 1, got 0"):
        tokenize_tales(tmp_path, 0, 5, 7, 6)


def test_the_tokenizers(tmp_path):
    assert load_encoding(str(TALE_TOKENIZER_FILE)).encode_ordinary("Once upon") == ENCODING.encode_ordinary(
        "Once upon"
    )
    with pytest.raises(ValueError, match="tokenizer is 'bert'; allowed: tales, gpt2, a path"):
        load_encoding("bert")
    with pytest.raises(ValueError, match=r"none\.tiktoken cannot be read: No such file"):
        load_encoding(str(tmp_path / "none.tiktoken"))


def test_unreadable_input_is_named_and_finished_jobs_stay(texts, tmp_path):
    (tmp_path / "wide.txt").write_text("Once upon a time.", encoding="utf-16")
    with pytest.raises(
        ValueError, match=r"wide\.txt is not UTF-8 text \(it begins like UTF-16: save it as UTF-8\)"
    ):
        tokenize([tmp_path / "wide.txt"], tmp_path / "shards-16", "tales")
    (texts / "z.txt").write_bytes(b"fine until \xff here")
    with pytest.raises(ValueError, match=r"z\.txt is not UTF-8 text \(invalid start byte: 0xff\)"):
        tokenize([texts], tmp_path / "shards", "tales", job_bytes=4_000)
    [folder] = (tmp_path / "shards").iterdir()
    assert len(list(folder.glob("job-*.json"))) > 2 and not list(folder.glob("*.part"))
    assert json.loads((folder / "job-00000.json").read_text())["train"]["tokens"] > 0
    (tmp_path / "nothing.txt").write_text("")
    with pytest.raises(ValueError, match="the text files are empty"):
        tokenize([tmp_path / "nothing.txt"], tmp_path / "shards", "tales")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.5}, "validation_fraction must be between 0 and 1, got 1.5"),
        ({"separator": ""}, "separator is empty"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"job_bytes": 0}, "job_bytes must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options, message, texts, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenize([texts], tmp_path / "shards", "tales", **options)
