"""Keys: what is kept of them, what is compared, and what a file of them may hold."""

import hmac
import stat
import sys

import pytest

from shared.serving.security import KeyRing, add_key, hash_of, host_of, read_keys


def test_a_file_of_keys_holds_hashes_only(tmp_path):
    path = tmp_path / "keys.txt"
    first, second = add_key(path, "phone"), add_key(path, "laptop")
    assert first != second and len(first) > 40
    assert first not in path.read_text() and second not in path.read_text()
    assert read_keys(path) == {"phone": hash_of(first), "laptop": hash_of(second)}
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="already"):
        add_key(path, "phone")
    with pytest.raises(ValueError, match="name must be"):
        add_key(path, "a b")


@pytest.mark.parametrize("line", ["phone", "phone sk-secret", "phone sha256:xyz", "a b sha256:" + "0" * 64])
def test_a_line_that_is_none_is_named_and_not_shown(tmp_path, line):
    path = tmp_path / "keys.txt"
    path.write_text(f"# mine\n\n{line}\n")
    with pytest.raises(ValueError, match=r"keys\.txt, line 3") as caught:
        read_keys(path)
    assert "secret" not in str(caught.value)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="at least one key"):
        read_keys(path)


def test_owners(monkeypatch):
    keys = KeyRing({"phone": hash_of("sk-1"), "laptop": hash_of("sk-2")})
    assert keys.owner("Bearer sk-1") == "phone" and keys.owner("bearer  sk-2 ") == "laptop"
    for wrong in (
        "",
        "sk-1",
        "Basic sk-1",
        "Bearer",
        "Bearer sk-3",
        "Bearer \udcff",
        f"Bearer {hash_of('sk-1')}",
    ):
        assert keys.owner(wrong) is None
    assert not keys.is_open and KeyRing(None).is_open and KeyRing(None).owner("Bearer x") is None
    # Every kept hash is compared, in constant time, whichever one fits.
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    for key in ("sk-1", "sk-2", "sk-3"):
        keys.owner(f"Bearer {key}")
    assert len(compared) == 6


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost:80", "localhost"),
        ("LocalHost", "localhost"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("", ""),
    ],
)
def test_hosts(header, host):
    assert host_of(header) == host
