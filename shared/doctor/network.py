"""Do the package index and the model hub answer? Nothing but a request for a header is sent, without any password.

Only the standard library is used, which reads the same proxy settings as pip. Left out: downloads
(`shared.data.download`).
"""

from __future__ import annotations

import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Mapping  # noqa: UP035 (an old Python has to get past here)

from shared.doctor.findings import Finding

SECONDS = 3.0  # for all servers together


def servers() -> dict[str, str]:
    """Return the addresses of the package index and the model hub, mirrors included."""
    index = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple/"
    return {"package index": index, "model hub": os.environ.get("HF_ENDPOINT") or "https://huggingface.co"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Go to no other server."""


def answer_of(url: str, seconds: float) -> str:
    """Return "" if a server answers a HEAD request, whatever it says, else why not in a few words."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return "its address is no http address"
        # A password in the address is not sent.
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "llm-in-notebooks"})
        urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return ""
    except Exception as error:
        reason = getattr(error, "reason", error)
        if "CERTIFICATE" in str(reason):
            return "its certificate is not trusted"
        slow = isinstance(reason, TimeoutError) or "timed out" in str(reason)
        return "no answer" if slow else "cannot be reached"
    return ""


def check_network(addresses: Mapping[str, str] | None = None, seconds: float = SECONDS) -> Finding:
    """Say which servers answer, asked all at once; without a network the course runs, too."""
    addresses, answers = servers() if addresses is None else addresses, {}  # type: ignore[var-annotated]

    def ask(name: str, url: str) -> None:
        answers[name] = answer_of(url, seconds)

    # Looking up a name has no time limit of its own: such a thread is left behind.
    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in addresses.items()]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    wrong = {name: answers.get(name, "no answer") for name in addresses if answers.get(name, "no answer")}
    if not wrong:
        return Finding("network", "ok", " and ".join(addresses) + " answer")
    proxies = [
        name for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY") if name in map(str.upper, os.environ)
    ]
    mirror = f"look at {', '.join(proxies)}" if proxies else "PIP_INDEX_URL and HF_ENDPOINT can name mirrors"
    found = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
    return Finding("network", "note", found, f"the course runs, without downloads; {mirror}")
