"""Real data and weights from the network: fetched once, checked, and kept in a cache folder.

A file of `FILES` is looked for in this order, and its SHA-256 is checked every time:

1. the folder that the environment variable `LLM_DATA_DIR` names;
2. the cache folder: `LLM_CACHE_DIR`, or else the operating system's cache folder for `llm-course`;
3. the network, by `HTTP_PROXY` and `HTTPS_PROXY` where set, with a progress bar unless `TQDM_DISABLE=1`.

Relative paths in both variables are counted from the repository root. Model files come from the Hugging Face
Hub and live in its own cache, which other programs share.

Without a network every function gives up within 5 seconds with a `DownloadError` of one line: a bounded probe
comes first, as the libraries alone wait and retry for much longer. A setting that stands in the way (a proxy,
certificates) is named. A file appears under its final name only when it is complete and its checksum is
right. A cache folder that cannot be written is an error; no other folder replaces it.

Left out: resuming, mirrors, retries. The transfer itself is `pooch`'s or `huggingface_hub`'s.
"""

import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pooch
import requests
import tiktoken
from tqdm.auto import tqdm

from shared.data.connection import DownloadError, diagnosis, first_set
from shared.data.encoding import SafeEncoding

T = TypeVar("T")

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
PROBE_SECONDS = 3.0  # name lookup, connection and answer together
READ_SECONDS = 15.0  # the longest silence during a download
# Loading these runs no code; loading pickled weights can.
MODEL_SUFFIXES = (".safetensors", ".json", ".txt")


@dataclass(frozen=True)
class RemoteFile:
    """A file on the network and the checksum it must have.

    Attributes:
        name: What `fetch` calls it.
        url: Where it is downloaded from.
        sha256: The hexadecimal SHA-256 of the file; of the member where `member` is given.
        member: Its name inside the zip file at `url`, where `url` is not the file itself.
        stored_as: Its path below the data or the cache folder, where that is not its name.
    """

    name: str
    url: str
    sha256: str
    member: str | None = None
    stored_as: str | None = None

    def below(self, folder: Path) -> Path:
        """Return the file's path below the data or the cache folder."""
        return folder / (self.stored_as or self.name)


_RASBT = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main"
_KARPATHY = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
_UCI = "https://archive.ics.uci.edu/static/public"
_OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"

# UCI's member is pinned, not the archive, which may be packed again. GPT-2's two files are stored under the
# names that tiktoken looks for: the SHA-1 of their addresses.
# fmt: off
_FILES = [
    RemoteFile("the-verdict.txt", f"{_RASBT}/ch02/01_main-chapter-code/the-verdict.txt",
               "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"),
    RemoteFile("tinyshakespeare.txt", f"{_KARPATHY}/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    RemoteFile("SMSSpamCollection", f"{_UCI}/228/sms+spam+collection.zip",
               "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
               member="SMSSpamCollection"),
    RemoteFile("instruction-data.json", f"{_RASBT}/ch07/01_main-chapter-code/instruction-data.json",
               "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
    RemoteFile("vocab.bpe", f"{_OPENAI}/vocab.bpe",
               "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
               stored_as="tiktoken_cache/6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
    RemoteFile("encoder.json", f"{_OPENAI}/encoder.json",
               "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
               stored_as="tiktoken_cache/6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
]
# fmt: on
FILES: dict[str, RemoteFile] = {file.name: file for file in _FILES}

_tiktoken_lock = threading.Lock()


def data_dir() -> Path | None:
    """Return the folder that `LLM_DATA_DIR` names, or None where that is not set. It need not exist."""
    return _folder_from("LLM_DATA_DIR")


def cache_dir() -> Path:
    """Return the folder that downloads are kept in. The first download creates it."""
    return _folder_from("LLM_CACHE_DIR") or pooch.os_cache("llm-course")


def fetch(name: str) -> Path:
    """Return the path of the file called `name` in `FILES`, downloading it where it is not there yet.

    A file in the cache with a wrong checksum is downloaded again; one in the data folder is only reported.

    Raises:
        ValueError: `name` is not in `FILES`.
        DownloadError: No network, an HTTP error, an interrupted download, a wrong checksum, an archive
            without the file, or a folder that cannot be read or written.
    """
    if name not in FILES:
        raise ValueError(f"unknown file {name!r}; allowed: {', '.join(FILES)}")
    file, folder = FILES[name], data_dir()
    if folder is not None and (found := _checksum(file.below(folder))) is not None:
        _require(found, file.sha256, str(file.below(folder)), "wrong checksum in LLM_DATA_DIR")
        return file.below(folder)
    return _from_cache_or_network(file)


def fetch_or_none(name: str, instead: str) -> Path | None:
    """Return `fetch(name)`; where the file cannot be had, print one line and return None.

    `instead` is what the caller then uses, such as "shared/data/stories.txt".

    Raises:
        ValueError: `name` is not in `FILES`.
    """
    return or_none(lambda: fetch(name), name, instead)


def or_none(load: Callable[[], T], what: str, instead: str) -> T | None:
    """Return `load()`; on a `DownloadError` print one line with its reason and return None.

    The line says what is missing and what is used instead, and nothing that differs from machine to machine.
    """
    try:
        return load()
    except DownloadError as error:
        print(f"{what}: not available ({error.reason}); using {instead} instead.")
        return None


def gpt2_merges_file() -> Path:
    """Return the path of GPT-2's merges, `vocab.bpe`: a header, then a merge a line. Raises as `fetch`."""
    return fetch("vocab.bpe")


def gpt2_vocab_file() -> Path:
    """Return the path of GPT-2's vocabulary, `encoder.json`: token string to token id. Raises as `fetch`."""
    return fetch("encoder.json")


def gpt2_encoding() -> SafeEncoding:
    """Return tiktoken's own GPT-2 encoding, read from the two files that `fetch` finds. Raises as `fetch`."""
    merges, vocab = gpt2_merges_file(), gpt2_vocab_file()
    if merges.parent != vocab.parent:
        # The data folder holds only one of the two, and tiktoken reads both from one folder.
        merges, vocab = (_from_cache_or_network(FILES[name]) for name in ("vocab.bpe", "encoder.json"))
    with _tiktoken_lock:
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(merges.parent)
        try:
            return SafeEncoding.of(tiktoken.get_encoding("gpt2"))
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def fetch_model_file(repo_id: str, filename: str, revision: str, sha256: str | None = None) -> Path:
    """Return the path of one file of a public model on the Hugging Face Hub, downloading it where needed.

    The Hub's cache is looked in first, without a request: give a commit hash, as a branch name means what it
    meant when the file was downloaded. No access token is sent. `HF_ENDPOINT` is read at each call.

    Args:
        repo_id: Such as "openai-community/gpt2".
        filename: Its path in the repository, ending in .safetensors, .json or .txt.
        revision: A commit hash, tag or branch.
        sha256: The hexadecimal checksum it must have; None trusts the Hub.

    Raises:
        ValueError: Another kind of file, or a malformed `repo_id` or `filename`.
        DownloadError: No network, no such file or model, a failed download, a cache that cannot be written,
            or a wrong checksum, after which the file is removed from the cache.
    """
    if not filename.endswith(MODEL_SUFFIXES):
        raise ValueError(f"{filename!r} is not allowed: only files ending in {', '.join(MODEL_SUFFIXES)}")
    # Imported here because it is slow to import and only models need it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        path = None
    path = path or _download_from_hub(repo_id, filename, revision)
    if sha256 is not None and (found := _checksum(path)) != sha256:
        # In the Hub's cache `path` is a link to the content, and that must go too.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        _require(found, sha256, f"{repo_id}/{filename}", "wrong checksum")
    return path


def _folder_from(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return (REPOSITORY_ROOT / Path(value).expanduser()).resolve() if value else None


def _checksum(path: Path) -> str | None:
    """Return the SHA-256 of a file, or None where there is none; raise DownloadError if unreadable."""
    try:
        return pooch.file_hash(str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DownloadError(str(path), "file cannot be read", error.strerror or str(error)) from error


def _require(found: str | None, expected: str, what: str, reason: str) -> None:
    if found != expected:
        raise DownloadError(what, reason, f"expected SHA-256 {expected}, found {found}")


def _probe(what: str, url: str) -> int:
    """Return the HTTP status of a HEAD request for `url`, or raise DownloadError within `PROBE_SECONDS`."""
    answers: list[int | Exception] = []

    def ask() -> None:
        try:
            answers.append(requests.head(url, timeout=PROBE_SECONDS).status_code)
        except Exception as error:  # judged below, whatever it is
            answers.append(error)

    # No timeout of a socket bounds the lookup of a name, so a thread asks, and is left behind where it is too slow.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    answer = answers[0] if answers else requests.ConnectTimeout()
    if isinstance(answer, int):
        return answer
    raise diagnosis(what, url, answer) from answer


def _from_cache_or_network(file: RemoteFile) -> Path:
    target = file.below(cache_dir())
    if _checksum(target) != file.sha256:
        _probe(file.name, file.url)
        try:
            _download(file, target)
        except DownloadError:
            raise
        except OSError as error:
            detail = f"{target.parent}: {error.strerror}; LLM_CACHE_DIR can name another"
            raise DownloadError(file.name, "cannot write to the cache folder", detail) from error
    return target


def _download(file: RemoteFile, target: Path) -> None:
    """Put `file` at `target` in one step. Raises DownloadError for the source, OSError for the folder.

    `pooch.retrieve` is not used: it logs paths, checks archives but not their members, and on Windows copies
    over an existing file, so that a second process could read half of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Below the target's folder, hence on its file system, where os.replace is atomic.
    with tempfile.TemporaryDirectory(
        prefix=".part-", dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        part = Path(folder) / "download"
        _transfer(file, part)
        if file.member is not None:
            part = _extract(file, file.member, part)
        _require(_checksum(part), file.sha256, file.name, "wrong checksum")
        try:
            os.replace(part, target)
        except PermissionError:
            # Windows refuses while another process reads the target: no harm where that is complete.
            if _checksum(target) != file.sha256:
                raise


def _transfer(file: RemoteFile, part: Path) -> None:
    # Uncompressed, so that the announced length is the file's and the bar ends at 100 %.
    download = pooch.HTTPDownloader(
        progressbar=True,
        chunk_size=1 << 16,
        timeout=(PROBE_SECONDS, READ_SECONDS),
        headers={"Accept-Encoding": "identity"},
    )
    try:
        download(file.url, str(part), None)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "error"
        raise DownloadError(file.name, f"HTTP {status}", file.url) from error
    except (requests.exceptions.SSLError, requests.exceptions.ProxyError, ValueError) as error:
        # The address leads to another one, which the probe has not asked for.
        raise diagnosis(file.name, file.url, error) from error
    except requests.RequestException as error:
        raise DownloadError(file.name, "download interrupted", f"{file.url}; nothing kept") from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise diagnosis(file.name, file.url, error) from error


def _extract(file: RemoteFile, member: str, archive: Path) -> Path:
    part = archive.with_name("member")
    try:
        with zipfile.ZipFile(archive) as zipped, zipped.open(member) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except KeyError as error:
        raise DownloadError(file.name, "not in the archive", f"{file.url} has no {member!r}") from error
    # RuntimeError stands for encryption and unknown compression methods.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DownloadError(file.name, "archive cannot be read", file.url) from error
    return part


def _download_from_hub(repo_id: str, filename: str, revision: str) -> Path:
    from huggingface_hub import constants, hf_hub_download, hf_hub_url

    what = f"{repo_id}/{filename}"
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(what, "HF_HUB_OFFLINE is set", "not in the cache")
    # huggingface_hub itself reads the variable once, on import.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    url = hf_hub_url(repo_id, filename, revision=revision, endpoint=endpoint)
    # The library's first request is the same, but it repeats it for 23 s on most errors.
    if (status := _probe(what, url)) >= 400:
        raise DownloadError(what, f"HTTP {status}", url)
    try:
        path = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            endpoint=endpoint,
            token=False,
            tqdm_class=tqdm,
        )
        return Path(path)
    # The library's network, storage and file errors have no base class in common.
    except Exception as error:
        setting = first_set("SSL_CERT_FILE", "SSL_CERT_DIR")
        if isinstance(error, FileNotFoundError) and setting and not os.path.exists(os.environ[setting]):
            raise DownloadError(what, f"{setting} names no file", "of trusted certificates") from error
        raise DownloadError(what, "download failed", str(error).partition("\n")[0]) from error
