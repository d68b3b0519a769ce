"""`shared.data.download` against a server on loopback: no test here needs a network."""

import hashlib
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import tiktoken
from huggingface_hub import constants as hub_constants
from tiktoken import load as tiktoken_load
from tiktoken import registry as tiktoken_registry

from shared.data import download
from shared.data.download import (
    DownloadError,
    RemoteFile,
    fetch,
    fetch_model_file,
    fetch_or_none,
    gpt2_encoding,
)

REAL_DATA = download.REPOSITORY_ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="../shared/data, the folder with the real files, is not here"
)
CONTENT = b"A line of text.\n" * 5000
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LIMIT = 5.0  # seconds within which everything gives up without a network


class LoopbackServer(ThreadingHTTPServer):
    """Answers from `routes`, path to content or to a function of the handler, and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[str, bytes | Callable[[Handler], None]] = {}
        self.headers: dict[str, str] = {}
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    server: LoopbackServer

    def answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        route = self.server.routes.get(self.path)
        if callable(route):
            route(self)
        elif route is None:
            self.send_error(404)
        else:
            self.send(route)

    do_GET = do_HEAD = answer

    def send(self, content: bytes, announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("LLM_DATA_DIR", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tiktoken_registry, "ENCODINGS", {})


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts a file with the given content and address into the registry."""

    def put(name: str, content: bytes, url: str, member: str | None = None) -> None:
        file = RemoteFile(name, url, hashlib.sha256(content).hexdigest(), member)
        monkeypatch.setitem(download.FILES, name, file)

    return put


def kept(folder: Path) -> list[str]:
    """Return every file below a folder, partial and hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def message_of(call: Callable[[], object]) -> str:
    """Return the message of the DownloadError that a call raises, and assert that it is one line."""
    with pytest.raises(DownloadError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# Where a file comes from


def test_second_fetch_makes_no_request(server, register, tmp_path):
    server.routes["/a.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    path = fetch("a.txt")
    assert path == tmp_path / "cache" / "a.txt"
    assert path.read_bytes() == CONTENT
    assert server.requests == ["HEAD /a.txt", "GET /a.txt"]
    assert fetch("a.txt") == path
    assert len(server.requests) == 2
    assert kept(tmp_path / "cache") == ["a.txt"]


def test_changed_file_in_the_cache_is_downloaded_again(server, register, tmp_path):
    server.routes["/a.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    fetch("a.txt").write_bytes(b"changed")
    assert fetch("a.txt").read_bytes() == CONTENT


def test_unknown_name_says_what_is_allowed():
    for call in (lambda: fetch("verdict"), lambda: fetch_or_none("verdict", "nothing")):
        with pytest.raises(ValueError, match=r"'verdict'.*the-verdict\.txt.*encoder\.json"):
            call()


@pytest.mark.parametrize("relative", [False, True])
def test_data_folder_comes_first(relative, server, register, tmp_path, monkeypatch):
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_bytes(CONTENT)
    # Counted from the repository root wherever the process stands.
    monkeypatch.chdir(tmp_path)
    value = os.path.relpath(folder, download.REPOSITORY_ROOT) if relative else str(folder)
    monkeypatch.setenv("LLM_DATA_DIR", value)
    assert download.data_dir() == folder.resolve()
    assert fetch("a.txt") == folder.resolve() / "a.txt"
    assert server.requests == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("folder", ["", "no-such-folder"])
def test_without_the_file_in_the_data_folder_the_network_is_used(
    folder, server, register, tmp_path, monkeypatch
):
    server.routes["/a.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    monkeypatch.setenv("LLM_DATA_DIR", folder)
    assert fetch("a.txt") == tmp_path / "cache" / "a.txt"


def test_wrong_checksum_in_the_data_folder(server, register, tmp_path, monkeypatch, capsys):
    server.routes["/a.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    (tmp_path / "a.txt").write_bytes(b"something else")
    monkeypatch.setenv("LLM_DATA_DIR", str(tmp_path))
    message = message_of(lambda: fetch("a.txt"))
    for part in ("a.txt", hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(b"something else").hexdigest()):
        assert part in message
    assert fetch_or_none("a.txt", "stories.txt") is None
    line = "a.txt: not available (wrong checksum in LLM_DATA_DIR); using stories.txt instead.\n"
    assert capsys.readouterr().out == line
    assert (tmp_path / "a.txt").read_bytes() == b"something else"
    assert server.requests == []


def test_unreadable_file_in_the_data_folder(register, tmp_path, monkeypatch):
    register("a.txt", CONTENT, closed_port())
    (tmp_path / "a.txt").mkdir()
    monkeypatch.setenv("LLM_DATA_DIR", str(tmp_path))
    assert "cannot be read" in message_of(lambda: fetch("a.txt"))


def test_default_folders(monkeypatch):
    monkeypatch.delenv("LLM_CACHE_DIR")
    assert "llm-course" in str(download.cache_dir())
    assert download.data_dir() is None
    monkeypatch.setenv("LLM_CACHE_DIR", "build/cache")
    assert download.cache_dir() == download.REPOSITORY_ROOT / "build" / "cache"


@needs_real_data
@pytest.mark.parametrize("name", list(download.FILES))
def test_real_files_have_the_pinned_checksums(name, monkeypatch):
    monkeypatch.setenv("LLM_DATA_DIR", "../shared/data")
    monkeypatch.setattr(download, "_probe", lambda *_: pytest.fail("asked the network"))
    assert fetch(name).is_relative_to(REAL_DATA.resolve())


# Downloads that go wrong: nothing is kept, and the next try succeeds


def cut_half_way(handler: Handler) -> None:
    handler.send(CONTENT[: len(CONTENT) // 2], announced=len(CONTENT))
    handler.close_connection = True


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"another text", "wrong checksum"),
        (b"", "wrong checksum"),
        (cut_half_way, "download interrupted"),
        (lambda handler: handler.send_error(404), "HTTP 404"),
        (lambda handler: handler.send_error(503), "HTTP 503"),
    ],
)
def test_broken_download_keeps_nothing(broken, reason, server, register, tmp_path, capsys):
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    server.routes["/a.txt"] = broken
    assert message_of(lambda: fetch("a.txt")).startswith(f"a.txt: {reason} (")
    assert fetch_or_none("a.txt", "stories.txt") is None
    assert capsys.readouterr().out == f"a.txt: not available ({reason}); using stories.txt instead.\n"
    assert kept(tmp_path) == []
    server.routes["/a.txt"] = CONTENT
    assert fetch("a.txt").read_bytes() == CONTENT


def test_wrong_checksum_names_both(server, register):
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    server.routes["/a.txt"] = b"another text"
    message = message_of(lambda: fetch("a.txt"))
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert hashlib.sha256(b"another text").hexdigest() in message


def test_partial_file_is_never_visible(server, register, tmp_path):
    half_sent, go_on = threading.Event(), threading.Event()

    def slowly(handler: Handler) -> None:
        handler.send(CONTENT[:100], announced=len(CONTENT))
        if handler.command == "GET":
            handler.wfile.flush()
            half_sent.set()
            go_on.wait(10)
            handler.wfile.write(CONTENT[100:])

    server.routes["/a.txt"] = slowly
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    loading = threading.Thread(target=fetch, args=("a.txt",))
    loading.start()
    assert half_sent.wait(10)
    assert not (tmp_path / "cache" / "a.txt").exists()
    # On the same file system as the final name, where a move is atomic.
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".part-")]
    go_on.set()
    loading.join(10)
    assert kept(tmp_path / "cache") == ["a.txt"]


def test_cache_folder_that_cannot_be_created(server, register, tmp_path, monkeypatch, capsys):
    # Below a file, because permissions do not stop root.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    server.routes["/a.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    message = message_of(lambda: fetch("a.txt"))
    assert "cannot write to the cache folder" in message
    assert "LLM_CACHE_DIR" in message
    assert fetch_or_none("a.txt", "stories.txt") is None
    line = "a.txt: not available (cannot write to the cache folder); using stories.txt instead.\n"
    assert capsys.readouterr().out == line


def test_read_only_cache_still_serves_what_it_holds(server, register, monkeypatch):
    server.routes["/a.txt"] = server.routes["/b.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    register("b.txt", CONTENT, f"{server.address}/b.txt")
    path = fetch("a.txt")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(download.tempfile, "TemporaryDirectory", refuse)
    assert fetch("a.txt") == path
    assert "Read-only file system" in message_of(lambda: fetch("b.txt"))


def test_replacing_a_file_that_another_process_reads(server, register, monkeypatch, tmp_path):
    # As on Windows: the move is refused, but the other process has completed the same file.
    server.routes["/a.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")

    def refuse(_part: Path, target: Path) -> None:
        target.write_bytes(other)
        raise PermissionError(13, "in use")

    monkeypatch.setattr(download.os, "replace", refuse)
    other = CONTENT
    assert fetch("a.txt").read_bytes() == CONTENT
    (tmp_path / "cache" / "a.txt").unlink()
    other = b"something else"
    assert "in use" in message_of(lambda: fetch("a.txt"))


# Archives


def test_one_member_is_extracted(server, register, tmp_path):
    register("messages", CONTENT, f"{server.address}/data.zip", member="folder/messages")
    server.routes["/data.zip"] = zip_of({"readme": b"read me", "folder/messages": CONTENT})
    assert fetch("messages").read_bytes() == CONTENT
    assert kept(tmp_path) == [os.path.join("cache", "messages")]


def encrypted(archive: bytes) -> bytes:
    """Set the flag that says "encrypted" in the directory and at the member itself."""
    changed = bytearray(archive)
    changed[6] |= 1
    changed[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def damaged(archive: bytes) -> bytes:
    """Overwrite bytes in the middle of the compressed content."""
    middle = archive.index(b"PK\x01\x02") // 2
    return archive[:middle] + bytes(8) + archive[middle + 8 :]


GOOD_ARCHIVE = zip_of({"messages": CONTENT})


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (zip_of({"messages": b"other messages"}), "wrong checksum"),
        (zip_of({"readme": b"read me"}), "not in the archive"),
        (b"<html>Log in to this network</html>", "archive cannot be read"),
        (GOOD_ARCHIVE[:-30], "archive cannot be read"),
        (damaged(GOOD_ARCHIVE), "archive cannot be read"),
        (encrypted(GOOD_ARCHIVE), "archive cannot be read"),
        (b"", "archive cannot be read"),
    ],
    ids=["wrong member", "no member", "no zip", "cut", "damaged", "encrypted", "empty"],
)
def test_broken_archive_keeps_nothing(archive, reason, server, register, tmp_path):
    register("messages", CONTENT, f"{server.address}/data.zip", member="messages")
    server.routes["/data.zip"] = archive
    assert message_of(lambda: fetch("messages")).startswith(f"messages: {reason} (")
    assert kept(tmp_path) == []
    # Packed anew, with the same member: the archive itself is not pinned.
    server.routes["/data.zip"] = zip_of({"messages": CONTENT, "more": b"more"})
    assert fetch("messages").read_bytes() == CONTENT


# No network


def unresolvable() -> str:
    return "http://no-such-host.invalid"


@pytest.mark.parametrize("address", [closed_port, unresolvable])
def test_no_network(address, register, tmp_path, capsys):
    register("a.txt", CONTENT, f"{address()}/a.txt")
    with within(LIMIT):
        assert message_of(lambda: fetch("a.txt")).startswith("a.txt: no network (cannot reach ")
    with within(LIMIT):
        assert fetch_or_none("a.txt", "shared/data/stories.txt") is None
    line = "a.txt: not available (no network); using shared/data/stories.txt instead.\n"
    assert capsys.readouterr() == (line, "")
    assert kept(tmp_path) == []


def test_hanging_name_lookup(register, monkeypatch):
    release = threading.Event()

    def hang(*_: object, **__: object) -> None:
        release.wait(20)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    register("a.txt", CONTENT, "http://hangs.invalid/a.txt")
    with within(LIMIT):
        assert "no network (cannot reach hangs.invalid)" in message_of(lambda: fetch("a.txt"))
    release.set()


def test_silent_server(register, monkeypatch):
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, within(LIMIT):
        register("a.txt", CONTENT, f"http://127.0.0.1:{silent.getsockname()[1]}/a.txt")
        assert "no network" in message_of(lambda: fetch("a.txt"))


def test_plain_server_on_a_tls_address(server, register):
    register("a.txt", CONTENT, f"{server.address.replace('http:', 'https:')}/a.txt")
    assert "no trusted TLS connection" in message_of(lambda: fetch("a.txt"))


def test_new_process_without_a_network_prints_one_line(tmp_path):
    program = (
        "from dataclasses import replace\n"
        "from shared.data import download\n"
        "name = 'tinyshakespeare.txt'\n"
        f"download.FILES[name] = replace(download.FILES[name], url='{closed_port()}/input.txt')\n"
        "print(download.fetch_or_none(name, 'shared/data/stories.txt'))\n"
    )
    with within(LIMIT):
        done = run_python(program, tmp_path)
    line = "tinyshakespeare.txt: not available (no network); using shared/data/stories.txt instead."
    assert done.stdout.splitlines() == [line, "None"]
    assert done.stderr == ""


def run_python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(download.REPOSITORY_ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def fetching_program(server: LoopbackServer) -> str:
    """Return a program that fetches `CONTENT` as a.txt and prints True if it is complete."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return (
        "from shared.data import download\n"
        f"file = download.RemoteFile('a.txt', '{server.address}/a.txt', '{sha256}')\n"
        "download.FILES['a.txt'] = file\n"
        f"print(len(download.fetch('a.txt').read_bytes()) == {len(CONTENT)})\n"
    )


def test_proxy_is_used(server, register, monkeypatch):
    server.routes["http://behind-the-proxy.invalid/a.txt"] = CONTENT
    monkeypatch.setenv("HTTP_PROXY", server.address)
    register("a.txt", CONTENT, "http://behind-the-proxy.invalid/a.txt")
    assert fetch("a.txt").read_bytes() == CONTENT


def test_dead_proxy(register, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", closed_port())
    register("a.txt", CONTENT, "http://behind-the-proxy.invalid/a.txt")
    with within(LIMIT):
        assert "no network through the proxy" in message_of(lambda: fetch("a.txt"))


BEHIND = "http://behind-the-proxy.invalid/a.txt"


def without_socks(*_: object, **__: object) -> None:
    """Do what `requests` does where PySocks is not installed."""
    raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("ALL_PROXY", "socks5h://me:secret@127.0.0.1:9", "ALL_PROXY needs the package PySocks"),
        ("all_proxy", "socks5h://me:secret@127.0.0.1:9", "all_proxy needs the package PySocks"),
        ("HTTP_PROXY", "socks5://me:secret@127.0.0.1:9", "HTTP_PROXY needs the package PySocks"),
        ("HTTP_PROXY", "secret://127.0.0.1:9", "HTTP_PROXY cannot be used"),
        ("http_proxy", "http://", "http_proxy cannot be used"),
        ("ALL_PROXY", "http://me:secret@127.0.0.1:port", "ALL_PROXY cannot be used"),
        ("HTTP_PROXY", "http://me:secret@127.0.0.1:1", "no network through the proxy"),
    ],
)
def test_the_proxy_that_stands_in_the_way_is_named(setting, value, reason, register, monkeypatch, capsys):
    monkeypatch.setenv(setting, value)
    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", without_socks)
    register("a.txt", CONTENT, BEHIND)
    with within(LIMIT):
        message = message_of(lambda: fetch("a.txt"))
    assert message.startswith(f"a.txt: {reason} (") and setting in message and "secret" not in message
    assert fetch_or_none("a.txt", "stories.txt") is None
    assert capsys.readouterr().out == f"a.txt: not available ({reason}); using stories.txt instead.\n"


def test_a_proxy_that_is_passed_by_is_not_blamed(register, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "secret://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    register("a.txt", CONTENT, f"{closed_port()}/a.txt")
    assert message_of(lambda: fetch("a.txt")).startswith("a.txt: no network (cannot reach 127.0.0.1")


@pytest.mark.parametrize("setting", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_that_cannot_be_used_are_named(setting, server, register, monkeypatch, tmp_path):
    monkeypatch.setenv(setting, str(tmp_path / "gone.pem"))
    register("a.txt", CONTENT, server.address.replace("http:", "https:"))
    assert message_of(lambda: fetch("a.txt")).startswith(f"a.txt: {setting} names no file (")
    (tmp_path / "gone.pem").write_text("no certificate")
    message = message_of(lambda: fetch("a.txt"))
    assert (
        message.startswith("a.txt: no trusted TLS connection (") and f"certificates of {setting}" in message
    )


def test_certificates_that_are_needed_only_on_the_way_are_named(server, register, monkeypatch, tmp_path):
    # The address itself needs none, the one that it leads to does.
    def lead_on(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", server.address.replace("http:", "https:") + "/b.txt")
        handler.end_headers()

    server.routes["/a.txt"] = lead_on
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "gone.pem"))
    assert message_of(lambda: fetch("a.txt")).startswith("a.txt: REQUESTS_CA_BUNDLE names no file (")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert message_of(lambda: fetch("a.txt")).startswith("a.txt: no trusted TLS connection (")
    assert kept(tmp_path / "cache") == []


def test_a_server_that_hangs_up_and_errors_that_nobody_knows_are_not_called_no_network(
    server, register, monkeypatch
):
    def hang_up(handler: Handler) -> None:
        handler.close_connection = True

    server.routes["/a.txt"] = hang_up
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    assert message_of(lambda: fetch("a.txt")).startswith("a.txt: connection broken (127.0.0.1")

    def fail(*_: object, **__: object) -> None:
        raise KeyError("something new\nin two lines")

    monkeypatch.setattr(download.requests, "head", fail)
    assert message_of(lambda: fetch("a.txt")).startswith("a.txt: request failed (KeyError: ")


@pytest.mark.parametrize("disabled", ["", "1"])
def test_progress_bar(disabled, server, tmp_path, monkeypatch):
    # In a new process, because tqdm reads the variable on import.
    server.routes["/a.txt"] = CONTENT
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    done = run_python(fetching_program(server), tmp_path)
    assert done.stdout == "True\n"
    assert ("100%" in done.stderr) == (not disabled)
    assert bool(done.stderr) == (not disabled)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(DownloadError("a.txt", "no network", "cannot reach x")))
    assert (str(error), error.reason) == ("a.txt: no network (cannot reach x)", "no network")
    assert isinstance(error, OSError)


# Several at once


def test_threads_fetch_the_same_file(server, register, tmp_path):
    server.routes["/a.txt"] = CONTENT
    register("a.txt", CONTENT, f"{server.address}/a.txt")
    start, found = threading.Barrier(8), []

    def load() -> None:
        start.wait()
        found.append(fetch("a.txt").read_bytes() == CONTENT)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [True] * 8
    assert kept(tmp_path) == [os.path.join("cache", "a.txt")]


def test_processes_fetch_the_same_file(server, tmp_path):
    both_asked = threading.Barrier(2)

    def wait_for_both(handler: Handler) -> None:
        if handler.command == "GET":
            both_asked.wait(30)
        handler.send(CONTENT)

    server.routes["/a.txt"] = wait_for_both
    program = fetching_program(server)
    outputs: list[str] = []
    threads = [
        threading.Thread(target=lambda: outputs.append(run_python(program, tmp_path).stdout.strip()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outputs == ["True", "True"]
    assert server.requests.count("GET /a.txt") == 2
    assert kept(tmp_path) == [os.path.join("cache", "a.txt")]


# GPT-2's tokenizer


@pytest.fixture
def no_tiktoken_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken_load, "read_file", lambda path: pytest.fail(f"tiktoken asked for {path}"))


def serve_gpt2(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vocab.bpe", "encoder.json"):
        file = download.FILES[name]
        server.routes[f"/{name}"] = file.below(REAL_DATA).read_bytes()
        monkeypatch.setitem(download.FILES, name, replace(file, url=f"{server.address}/{name}"))


def assert_is_gpt2(encoding: tiktoken.Encoding) -> None:
    assert encoding.encode("Hello, world!") == [15496, 11, 995, 0]
    assert encoding.n_vocab == 50257


@needs_real_data
def test_gpt2_encoding_from_the_data_folder(no_tiktoken_request, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_DATA_DIR", str(REAL_DATA))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "the reader's own")
    assert_is_gpt2(gpt2_encoding())
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "the reader's own"
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    assert_is_gpt2(gpt2_encoding())
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert kept(tmp_path) == []
    assert download.gpt2_merges_file().read_text(encoding="utf-8").startswith("#version")
    assert download.gpt2_vocab_file().read_text(encoding="utf-8").startswith("{")


@needs_real_data
@pytest.mark.parametrize("half", [False, True])
def test_gpt2_encoding_from_the_network(half, server, no_tiktoken_request, monkeypatch, tmp_path):
    serve_gpt2(server, monkeypatch)
    if half:  # of the two files, the data folder holds one
        merges = download.FILES["vocab.bpe"].below(tmp_path / "data")
        merges.parent.mkdir(parents=True)
        merges.write_bytes(server.routes["/vocab.bpe"])
        monkeypatch.setenv("LLM_DATA_DIR", str(tmp_path / "data"))
    assert_is_gpt2(gpt2_encoding())
    assert len(kept(tmp_path / "cache" / "tiktoken_cache")) == 2
    asked = len(server.requests)
    monkeypatch.setattr(tiktoken_registry, "ENCODINGS", {})
    assert_is_gpt2(gpt2_encoding())
    assert len(server.requests) == asked


def test_stored_names_are_those_of_tiktoken():
    for name in ("vocab.bpe", "encoder.json"):
        file = download.FILES[name]
        assert file.stored_as == f"tiktoken_cache/{hashlib.sha1(file.url.encode()).hexdigest()}"


def test_gpt2_encoding_without_a_network(no_tiktoken_request, monkeypatch, capsys):
    for name in ("vocab.bpe", "encoder.json"):
        monkeypatch.setitem(
            download.FILES, name, replace(download.FILES[name], url=f"{closed_port()}/{name}")
        )
    with within(LIMIT):
        assert "no network" in message_of(gpt2_encoding)
    assert download.or_none(gpt2_encoding, "GPT-2's tokenizer", "ours") is None
    assert capsys.readouterr().out == "GPT-2's tokenizer: not available (no network); using ours instead.\n"


# The Hugging Face Hub

MODEL_FILE = b'{"n_layer": 1}'
MODEL_PATH = "/course/tiny/resolve/main/config.json"


@pytest.fixture
def hub(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> LoopbackServer:
    """Return a server that gives the answers of the Hub's download address."""
    server.headers["X-Repo-Commit"] = COMMIT
    server.headers["ETag"] = f'"{hashlib.sha1(MODEL_FILE).hexdigest()}"'
    server.routes[MODEL_PATH] = MODEL_FILE
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    return server


def test_model_file_is_downloaded_once(hub):
    path = fetch_model_file("course/tiny", "config.json", "main", hashlib.sha256(MODEL_FILE).hexdigest())
    assert path.read_bytes() == MODEL_FILE
    assert set(hub.requests) == {f"HEAD {MODEL_PATH}", f"GET {MODEL_PATH}"}
    asked = len(hub.requests)
    assert fetch_model_file("course/tiny", "config.json", "main") == path
    assert fetch_model_file("course/tiny", "config.json", COMMIT) == path
    assert len(hub.requests) == asked


def test_no_access_token_is_sent(hub, monkeypatch):
    seen: list[str | None] = []

    def note(handler: Handler) -> None:
        seen.append(handler.headers["Authorization"])
        handler.send(MODEL_FILE)

    hub.routes[MODEL_PATH] = note
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    fetch_model_file("course/tiny", "config.json", "main")
    assert seen and set(seen) == {None}


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_model_file_that_the_hub_does_not_give(status, hub, tmp_path):
    hub.routes[MODEL_PATH] = lambda handler: handler.send_error(status)
    with within(LIMIT):
        message = message_of(lambda: fetch_model_file("course/tiny", "config.json", "main"))
    assert message.startswith(f"course/tiny/config.json: HTTP {status} (")
    assert kept(tmp_path) == []


def test_model_file_with_a_wrong_checksum(hub, tmp_path):
    def load() -> Path:
        return fetch_model_file("course/tiny", "config.json", "main", hashlib.sha256(MODEL_FILE).hexdigest())

    hub.routes[MODEL_PATH] = MODEL_FILE.replace(b"1", b"2")
    assert "wrong checksum" in message_of(load)
    assert not any(path.name == "config.json" for path in tmp_path.rglob("*"))
    assert not list(tmp_path.rglob("blobs/*"))
    hub.routes[MODEL_PATH] = MODEL_FILE
    assert load().read_bytes() == MODEL_FILE


def test_answer_that_is_not_the_hubs(hub):
    del hub.headers["X-Repo-Commit"]
    message = message_of(lambda: fetch_model_file("course/tiny", "config.json", "main"))
    assert message.startswith("course/tiny/config.json: download failed (")


@pytest.mark.parametrize("address", [closed_port, unresolvable])
def test_model_file_without_a_network(address, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", address())
    with within(LIMIT):
        message = message_of(lambda: fetch_model_file("course/tiny", "model.safetensors", "main"))
    assert message.startswith("course/tiny/model.safetensors: no network (cannot reach ")


@pytest.mark.parametrize("endpoint", ["huggingface.co", "http://[::1", "ftp://huggingface.co", "https://"])
def test_a_malformed_endpoint_is_named(endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = message_of(lambda: fetch_model_file("course/tiny", "config.json", "main"))
    assert (
        message.startswith("course/tiny/config.json: malformed address (") and "from HF_ENDPOINT" in message
    )


def test_certificates_that_the_hub_cannot_find_are_named(hub, monkeypatch, tmp_path):
    program = (
        "from shared.data.download import fetch_model_file\n"
        "try:\n"
        "    fetch_model_file('course/tiny', 'config.json', 'main')\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "gone.pem"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    # In a new process, because the library keeps its connections.
    done = run_python(program, tmp_path)
    assert done.stdout.startswith("course/tiny/config.json: SSL_CERT_FILE names no file ("), done.stderr


def test_model_file_in_offline_mode(hub, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    message = message_of(lambda: fetch_model_file("course/tiny", "config.json", "main"))
    assert "HF_HUB_OFFLINE is set" in message
    assert hub.requests == []


@pytest.mark.parametrize(
    "filename", ["pytorch_model.bin", "model.pkl", "model.pt", "model.safetensors.bin", ""]
)
def test_other_kinds_of_model_files_are_refused(filename, hub):
    with pytest.raises(ValueError, match="safetensors"):
        fetch_model_file("course/tiny", filename, "main")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "filename"), [("a/b/c", "config.json"), ("course/tiny", "../config.json")]
)
def test_malformed_model_names(repo_id, filename, hub):
    with pytest.raises(ValueError):
        fetch_model_file(repo_id, filename, "main")
    assert hub.requests == []
