"""The practice server: answers by a function, makes the trouble that was ordered, and notes what arrived."""

import httpx

from shared.notebook.practice_server import PracticeServer


def test_it_answers_and_makes_trouble():
    server = PracticeServer(str.upper)
    try:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi ö"}]}
        ask = lambda: httpx.post(f"{server.url}/chat/completions", json=body, trust_env=False)
        server.trouble.append((429, {"Retry-After": "7"}, "slow down"))
        first, second = ask(), ask()
        assert (first.status_code, first.headers["Retry-After"], first.text) == (429, "7", "slow down")
        assert second.json()["choices"][0]["message"] == {"role": "assistant", "content": "HI Ö"}
        assert server.requests == [body, body] and server.url.startswith("http://127.0.0.1:")
    finally:
        server.close()
