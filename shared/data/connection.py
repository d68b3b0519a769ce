"""Why an address cannot be reached: no network, or a setting of this machine that stands in the way.

Settings are named, and their values not shown: the address of a proxy may hold a password. All errors that `requests`
raises for an address that cannot be, its own or that of a proxy, are ValueErrors.
"""

import os
from urllib.parse import urlsplit

import requests


class DownloadError(OSError):
    """A file cannot be had. The message is one line: what, the reason, the detail.

    Attributes:
        reason: The cause in a few words that name no path and no machine, such as "no network".
    """

    def __init__(self, what: str, reason: str, detail: str) -> None:
        super().__init__(f"{what}: {reason} ({detail})")
        self.what, self.reason, self.detail = what, reason, detail

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.reason, self.detail)


def diagnosis(what: str, url: str, error: Exception) -> DownloadError:
    """Return the DownloadError for an error of `requests`: no network, or which setting stands in the way.

    Settings are named, and their values not shown: the address of a proxy may hold a password.
    """
    kinds = requests.exceptions
    host = url.partition("://")[2].partition("/")[0]
    proxy, certificates = _proxy_setting(url), first_set("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

    # What the connection itself has met.
    if isinstance(error, kinds.SSLError):
        trusted = f", by the certificates of {certificates}" if certificates else ""
        return DownloadError(what, "no trusted TLS connection", f"to {host}{trusted}")
    if isinstance(error, kinds.ConnectionError | kinds.Timeout):
        if proxy or isinstance(error, kinds.ProxyError):
            by = f", by {proxy}" if proxy else ""
            return DownloadError(what, "no network through the proxy", f"cannot reach {host}{by}")
        if error.args and type(error.args[0]).__name__ == "ProtocolError":
            return DownloadError(what, "connection broken", f"{host} ended it without an answer")
        return DownloadError(what, "no network", f"cannot reach {host}")

    # What came before any connection: `requests` gives no class of its own to certificates that are not there.
    if type(error) is OSError and certificates and not os.path.exists(os.environ[certificates]):
        return DownloadError(what, f"{certificates} names no file", "of trusted certificates")
    if isinstance(error, ValueError) and not _is_address(url):
        endpoint = os.environ.get("HF_ENDPOINT")
        setting = ", from HF_ENDPOINT" if endpoint and url.startswith(endpoint.rstrip("/")) else ""
        return DownloadError(what, "malformed address", f"{url}{setting}")
    if isinstance(error, ValueError) and proxy:
        if "Missing dependencies for SOCKS" in str(error):
            return DownloadError(what, f"{proxy} needs the package PySocks", "pip install PySocks")
        return DownloadError(what, f"{proxy} cannot be used", "it is no address of a proxy")
    reason = "" if proxy else ": " + str(error).partition("\n")[0]
    return DownloadError(what, "request failed", f"{type(error).__name__}{reason}")


def first_set(*names: str) -> str | None:
    """Return the first of the environment variables that is set."""
    return next((name for name in names if os.environ.get(name)), None)


def _is_address(url: str) -> bool:
    """Return whether `requests` could ask for a URL, if nothing else stood in the way."""
    try:
        prepared = requests.Request("HEAD", url).prepare().url
        return prepared is not None and urlsplit(prepared).scheme in ("http", "https")
    except ValueError:
        return False


def _proxy_setting(url: str) -> str | None:
    """Return the variable that names the proxy for a URL, in the order in which `requests` looks."""
    scheme = url.partition(":")[0]
    names = [spelled for name in (f"{scheme}_proxy", "all_proxy") for spelled in (name, name.upper())]
    if not _is_address(url) or requests.utils.should_bypass_proxies(url, no_proxy=None):
        return None
    return first_set(*names)
