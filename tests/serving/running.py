"""A server in a thread of the tests, on a free port of this machine; it ends with its context."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from shared.serving.api import create_app
from shared.serving.limits import Limits
from shared.serving.models import OpenedModel
from shared.serving.security import KeyRing
from shared.serving.server import Server, listen, url_of
from shared.serving.service import Service

QUICK = {
    "context_length": 256,
    "head_s": 0.6,
    "body_s": 0.6,
    "write_s": 0.6,
    "notice_s": 0.05,
    "drain_s": 5.0,
}


@dataclass
class Running:
    """A server that runs, and a client for it."""

    url: str
    service: Service
    server: Server
    client: httpx.Client

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, headers: Mapping[str, str] | None = None, **body: object) -> httpx.Response:
        return self.client.post(path, json={"model": self.service.name} | body, headers=headers)

    def complete(self, prompt: object = "the old mill", **body: object) -> httpx.Response:
        return self.post("/v1/completions", prompt=prompt, **{"temperature": 0} | body)

    def chat(self, text: str = "the crow", **body: object) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", **{"temperature": 0, "messages": messages} | body)

    def number(self, name: str) -> float:
        """Return a number of the metrics that has no labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def is_idle(self, seconds: float = 20.0) -> bool:
        """Wait until nothing is written and nothing waits; return whether that came in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (
                self.service.worker.n_open
                == self.service.engine.n_running
                == self.service.engine.n_waiting
                == 0
            ):
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(
    opened: OpenedModel,
    keys: Mapping[str, str] | None = None,
    classifier: Any = None,
    pictures: Any = None,
    content_filter: Any = None,
    **options: Any,
):
    """Serve a model; options are those of `Limits`, and `hosts`, `origins` and `log_texts` of `create_app`."""
    more = {name: options.pop(name) for name in ("hosts", "origins", "log_texts") if name in options}
    service = Service(
        opened, Limits(**QUICK | options), classifier, pictures=pictures, content_filter=content_filter
    )
    bound, started = listen("127.0.0.1", 0), threading.Event()
    server = Server(create_app(service, KeyRing(keys), **more), service, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert started.wait(20)
    with httpx.Client(base_url=url_of(bound), timeout=30, trust_env=False) as client:
        try:
            yield Running(url_of(bound), service, server, client)
        finally:
            server.should_exit = True
            thread.join(20)
            bound.close()
    assert not thread.is_alive() and not service.worker.is_alive


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the objects of a reply of server-sent events, which must end as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        assert line.startswith("data: ") and "\n" not in line
        yield json.loads(line.removeprefix("data: "))
