"""`shared.pretraining.files`: which files count, and how often."""

import os

import pytest

from shared.pretraining.files import find_text_files


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(found, folder):
    return [path.relative_to(folder).as_posix() for path in found]


def test_names_that_begin_with_a_dot_are_passed_over_unless_they_are_named(books):
    for hidden in (".ipynb_checkpoints/a-checkpoint.txt", "._a.txt", "deep/.cache/d.txt", ".hidden.txt"):
        (books / hidden).parent.mkdir(parents=True, exist_ok=True)
        (books / hidden).write_text("copy")
    assert names(find_text_files([books]), books) == ["a.txt", "b.txt", "deep/c.txt"]
    assert names(find_text_files([books / ".hidden.txt"]), books) == [".hidden.txt"]
    assert names(find_text_files([books, books / "notes.md"]), books)[-1] == "notes.md"
    # What is above the folder that is named does not count.
    assert len(find_text_files([books / "deep" / ".cache"])) == 1


def test_a_file_that_is_found_twice_counts_once(books):
    expected = ["a.txt", "b.txt", "deep/c.txt"]
    assert names(find_text_files([books, books]), books) == expected
    assert names(find_text_files([books, books / "deep", books / "b.txt"]), books) == expected
    assert names(find_text_files([books / "b.txt", books / "deep" / ".." / "b.txt"]), books) == ["b.txt"]


@pytest.mark.posix
def test_a_link_to_a_file_is_that_file(books):
    (books / "link.txt").symlink_to(books / "a.txt")
    (books / "broken.txt").symlink_to(books / "gone.txt")
    assert names(find_text_files([books]), books) == ["a.txt", "b.txt", "deep/c.txt"]


def test_capitals_count_as_small_letters(books):
    (books / "LOUD.TXT").write_text("from Windows")
    assert names(find_text_files([books]), books) == ["LOUD.TXT", "a.txt", "b.txt", "deep/c.txt"]
    assert names(find_text_files([books], "*.MD"), books) == ["notes.md"]
    assert names(find_text_files([books], "deep/*.txt"), books) == ["deep/c.txt"]


def test_what_cannot_be_read_is_named(books, monkeypatch):
    with pytest.raises(
        ValueError, match=r"books holds no file that fits '\*\.csv' \(it holds 3 \.txt, 1 \.md\)"
    ):
        find_text_files([books], "*.csv")
    (books / "empty.csv").mkdir()
    with pytest.raises(ValueError, match=r"empty\.csv holds no file .* \(it holds nothing else\)"):
        find_text_files([books / "empty.csv"])
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read: No such file"):
        find_text_files([books / "gone.txt"])

    # A folder below, which would otherwise be left out without a word. Permissions do not stop root.
    def refused(path, real=os.scandir):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match=r"deep cannot be read: Permission denied"):
        find_text_files([books])


@pytest.mark.posix
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a text file nor a folder"):
        find_text_files([tmp_path / "pipe"])
