"""`llm serve` as a process: ill treatment, cancels, signals, and what it refuses before it starts."""

import asyncio
import os
import signal
import socket
import sys
import time

import pytest

from deployment import serve_load
from deployment.serve_client import Served, ask
from deployment.serve_malformed import malformed
from shared.serving.cli import main
from shared.serving.security import hash_of, read_keys
from tests.serving.running import running

pytestmark = pytest.mark.service


def test_malformed_requests(small):
    """The short form of `serve_load.py malformed`."""
    with running(small, hosts=["localhost", "127.0.0.1"]) as served:
        found = malformed(served.port, "small", 150, seed=int(os.environ.get("SEED", "0")))
        assert found["not_as_it_must_be"] == [] and found["good_between"] == 15, found
        # On a machine that does much else, a request takes as long as it takes there without ill treatment.
        assert found["slowest_good_s"] < max(1.0, 10 * found["slowest_alone_s"])
        assert {"400", "408", "413", "415"} <= set(found["ended"])


@pytest.fixture(scope="module")
def process():
    with Served("tales-tiny", "--threads", "1") as found:
        yield found


def test_cancels(process):
    """The short form of `serve_load.py cancels`."""
    found = serve_load.cancels(process, 150, 24, n_tokens=12)
    assert serve_load.cancels_ok(found), found
    assert found["complete"] > 30 and found["broken off"] > 30


def test_memory_under_load(process):
    """The short form of `serve_load.py steady`."""
    found = serve_load.steady(process, 4 / 60, 16, n_tokens=12)
    assert found["growth_mb"] < 8 and found["cache_tokens"] == 0 and found["requests"] > 50, found


@pytest.mark.posix
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_drops_nothing_and_sigkill_leaves_nothing_behind(process):
    """The short form of `serve_load.py drain`; it ends the process, so it comes last."""
    found = serve_load.drain(process, 16, 1.0)
    assert found["exit_status"] == 0 and "DROPPED" not in found and found["complete"] > 0, found
    assert any('"event": "stopped"' in line for line in process.log)
    with Served("tales-tiny", "--threads", "1", "--port", str(process.port)) as again:
        assert again.port == process.port
        os.kill(again.process.pid, signal.SIGKILL)
        again.process.wait()
        with Served("tales-tiny", "--threads", "1", "--port", str(process.port)) as back:
            # On a machine that does much else, a start takes as long as it always takes there.
            assert back.port == process.port and back.seconds < max(10.0, 2 * again.seconds)
            # A second signal ends it at once, whatever is open.
            with socket.create_connection(("127.0.0.1", back.port)) as connection:
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 80\r\n\r\n{"
                )
                time.sleep(0.2)
                back.process.send_signal(signal.SIGINT)
                time.sleep(0.2)
                back.process.send_signal(signal.SIGINT)
                assert back.process.wait(5) == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted as Linux shows them")
def test_only_one_thread_has_helpers():
    """A second team of helpers waits beside the first, and torch's library then puts both to sleep at each product."""
    n_tasks = []
    for threads in (1, 4):
        with Served("tales-3m", "--threads", str(threads)) as found:
            answer = asyncio.run(ask(found.url, "Once upon a time", 8, model=found.model))
            assert answer.complete
            n_tasks.append(len(os.listdir(f"/proc/{found.process.pid}/task")))
    assert n_tasks[1] - n_tasks[0] == 3


# --- before it starts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tales-tiny", "--host", "0.0.0.0"), "other machines can call: give --api-keys FILE, or --no-keys"),
        (("tales-tiny", "--api-keys", "none.txt"), "none.txt"),
        (("tales-tiny", "--log-level", "loud"), "--log-level must be"),
        (("tales-tiny", "--log-texts", "all"), "--log-texts must be"),
        (("nothing", "--port", "0"), "tales-1m"),
        (("tales-tiny", "--port", "0", "--classifier", "nothing"), "spam"),
        (("tales-tiny", "--port", "0", "--image-classifier", "nothing"), "one of digits-vit, or a folder"),
        (("tales-tiny", "--port", "0", "--request-timeout", "inf"), "request_s must be"),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *arguments]) == 1
    written = capsys.readouterr()
    assert written.out == "" and said in written.err and written.err.startswith("llm: ")
    assert written.err.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "tales-tiny", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_the_command_for_keys(capsys, tmp_path):
    path = tmp_path / "keys.txt"
    assert main(["key", str(path), "phone"]) == 0
    key = capsys.readouterr().out.strip()
    assert read_keys(path) == {"phone": hash_of(key)} and key not in path.read_text()
    assert main(["key", str(path), "phone"]) == 1 and "already" in capsys.readouterr().err
