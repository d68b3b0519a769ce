"""Load and ill treatment for `llm serve`: what it does to a server, measured from outside.

    python -m deployment.serve_load streams                 32 streams at once, one at a time, --llama 3: llama.cpp
    python -m deployment.serve_load cancels                 2,000 requests of which many are broken off
    python -m deployment.serve_load malformed               500 requests that are none
    python -m deployment.serve_load steady --minutes 10     load, and the memory it leaves
    python -m deployment.serve_load drain                   SIGTERM under load; then SIGKILL, and how soon it is back

Each starts a server of its own on a free port and ends it, prints one line of JSON for each figure, and exits with 1 if
something that must hold does not. Short forms of all but `streams` are tests (`tests/serving`).
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from deployment.serve_client import (
    BEGINNINGS,
    ENDINGS,
    SMOLLM2,
    TALES,
    Answer,
    Served,
    ask,
    metrics,
    prompts,
    together,
)
from deployment.serve_malformed import malformed

# --- many streams at once


def throughput(
    url: str, model: str, texts: Sequence[str], n_tokens: int, n_at_once: int
) -> tuple[float, list[Answer]]:
    """Return tokens per second over all streams, and the answers."""
    tasks = [lambda text=text: ask(url, text, n_tokens, model=model) for text in texts]
    started = time.perf_counter()
    answers = asyncio.run(together(n_at_once, tasks))
    seconds = time.perf_counter() - started
    return sum(answer.n_tokens for answer in answers) / seconds, answers


def streams(model: str, n: int, n_tokens: int, threads: int, rounds: int, n_alone: int) -> bool:
    """Compare n streams at once with one at a time, and with llama.cpp's server; return whether all is as it must be.

    Ours and theirs take turns, so that what else the machine does hits both; the ratio is taken within a round. Each
    round has prompts of its own, so that no server knows their beginnings.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Served(model, "--threads", str(threads)))
        others = {"ours": (server.url, server.model, server.process.pid)}
        if rounds:
            others["llama.cpp"] = stack.enter_context(llama_server(n, threads))
        speeds: dict[str, list[float]] = {name: [] for name in others}
        cpu_ms: dict[str, list[float]] = {name: [] for name in others}
        for number in range(max(1, rounds)):
            texts = [f"{text}, {number}" if number else text for text in prompts(n)]
            for name, (url, known_as, pid) in others.items():
                if not number:
                    throughput(url, known_as, ["Once"], 4, 1)
                before = cpu_seconds(pid)
                speed, answers = throughput(url, known_as, texts, n_tokens, n)
                speeds[name].append(round(speed, 1))
                n_written = sum(answer.n_tokens for answer in answers)
                cpu_ms[name].append(round(1000 * (cpu_seconds(pid) - before) / n_written, 2))
                if not number and name == "ours":
                    at_once = answers
        one, answers = throughput(server.url, server.model, prompts(n)[:n_alone], n_tokens, 1)
    n_equal = sum(a.text == b.text for a, b in zip(at_once, answers, strict=False))
    gaps = sorted(b - a for answer in at_once for a, b in zip(answer.times, answer.times[1:], strict=False))
    ours = statistics.median(speeds["ours"])
    report(
        "streams",
        model=model,
        at_once=n,
        tokens=n_tokens,
        threads=threads,
        tokens_per_s=speeds["ours"],
        cpu_ms_per_token=cpu_ms["ours"],
        one_at_a_time=round(one, 1),
        ratio=round(ours / one, 2),
        equal_texts=f"{n_equal} of {n_alone}",
        first_token_s=round(statistics.median(answer.times[0] for answer in at_once), 3),
        between_tokens_s=round(statistics.median(gaps), 4),
        between_tokens_s_99=round(gaps[int(0.99 * len(gaps))], 4),
    )
    if rounds:
        ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
        report(
            "llama.cpp",
            tokens_per_s=speeds["llama.cpp"],
            cpu_ms_per_token=cpu_ms["llama.cpp"],
            ours_to_theirs=round(statistics.median(ratios), 2),
        )
    return n_equal == n_alone and all(answer.complete for answer in at_once + answers)


def cpu_seconds(pid: int) -> float:
    """Return how long a process has computed, all threads together: what else the machine does hardly changes it."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


@contextlib.contextmanager
def llama_server(n: int, threads: int) -> Iterator[tuple[str, str, int]]:
    """Run llama.cpp's server with the same file, a slot for each stream; yield its address, its model, its process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deployment.serve_load", "llama-server", str(n), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = next(line.split()[1] for line in process.stdout if line.startswith("ADDRESS "))
        yield url, "m", process.pid
    finally:
        process.kill()
        process.wait()


def run_llama_server(n: int, threads: int) -> None:
    """Be llama.cpp's server until standard input ends."""
    import xllamacpp

    from shared.data.models import model_file

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.warmup = str(model_file(SMOLLM2)), True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_parallel, parameters.n_ctx, parameters.cache_ram_mib = n, n * 256, 0
    server = xllamacpp.Server(parameters)
    print("ADDRESS", server.listening_address, flush=True)
    sys.stdin.read()


# --- requests that are broken off


def cancels(server: Served, n: int, n_at_once: int, seed: int = 0, n_tokens: int = 24) -> dict[str, Any]:
    """Send n requests of which about half are broken off at a random place; return what came of them.

    A reply must be the text that its prompt gives alone, a part of a reply the beginning of it.
    """
    chance, texts = random.Random(seed), prompts(48)
    expected = {t: asyncio.run(ask(server.url, t, n_tokens, model=server.model)).text for t in texts}
    # Some load first, so that what is allocated once is allocated.
    asyncio.run(
        together(n_at_once, [lambda t=t: ask(server.url, t, n_tokens, model=server.model) for t in texts * 2])
    )
    before, outcomes, wrong = metrics(server.url), Counter[str](), 0
    plan = [(chance.choice(texts), chance.choice([None, None, None, 0, 1, 2, 5, 12])) for _ in range(n)]

    async def one(text: str, break_after: int | None) -> Answer:
        while True:
            answer = await ask(server.url, text, n_tokens, model=server.model, break_after=break_after)
            if answer.status != 429:
                return answer
            outcomes["waited"] += 1
            await asyncio.sleep(0.2)

    tasks = [lambda t=text, b=break_after: one(t, b) for text, break_after in plan]
    started = time.perf_counter()
    for (text, _), answer in zip(plan, asyncio.run(together(n_at_once, tasks)), strict=True):
        whole = answer.complete and answer.text == expected[text]
        part = answer.broken and expected[text].startswith(answer.text)
        wrong += answer.text != expected[text][: len(answer.text)]
        lost = not whole and not part
        outcomes["lost" if lost else "complete" if whole else "broken off"] += 1
    seconds = time.perf_counter() - started
    # What was broken off must be over soon.
    free_after = time.perf_counter()
    while (now := metrics(server.url))["llm_running"] + now[
        "llm_waiting"
    ] and time.perf_counter() < free_after + 10:
        time.sleep(0.05)
    return {
        "requests": n,
        "seconds": round(seconds, 1),
        **outcomes,
        "mixed_up": wrong,
        "free_after_s": round(time.perf_counter() - free_after, 2),
        "running": now["llm_running"],
        "waiting": now["llm_waiting"],
        "cache_tokens": now["llm_cache_tokens"],
        "memory_before_mb": round(before["process_resident_memory_bytes"] / 1e6, 1),
        "memory_after_mb": round(now["process_resident_memory_bytes"] / 1e6, 1),
        "open_files": now["process_open_fds"],
    }


def cancels_ok(found: dict[str, Any], slack_mb: float = 8.0) -> bool:
    """Return whether nothing was lost, nothing mixed up, and all is as it was."""
    left = (
        found.get("lost", 0) + found["mixed_up"] + found["running"] + found["waiting"] + found["cache_tokens"]
    )
    return not left and found["memory_after_mb"] <= found["memory_before_mb"] + slack_mb


# --- load for a long time


def steady(server: Served, minutes: float, n_at_once: int, n_tokens: int = 32) -> dict[str, Any]:
    """Keep a server busy with whole and broken requests; return its memory over time."""
    end, chance, n_done = time.monotonic() + 60 * minutes, random.Random(0), 0
    memory: list[float] = []

    async def load() -> None:
        nonlocal n_done
        while time.monotonic() < end:
            text = (
                f"{chance.choice(BEGINNINGS)} {chance.random()} {chance.choice(ENDINGS)} "
                * chance.randrange(1, 4)
            )
            cut = chance.choice([None, None, 3])
            await ask(server.url, text, n_tokens, model=server.model, break_after=cut)
            n_done += 1

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(minutes * 60 / 60)
            now = await asyncio.to_thread(metrics, server.url)
            memory.append(now["process_resident_memory_bytes"] / 1e6)

    async def both() -> None:
        await asyncio.gather(watch(), *(load() for _ in range(n_at_once)))

    asyncio.run(both())
    third = max(1, len(memory) // 3)
    early, late = statistics.median(memory[third : 2 * third]), statistics.median(memory[-third:])
    return {
        "minutes": minutes,
        "requests": n_done,
        "memory_first_mb": round(memory[0], 1),
        "memory_middle_mb": round(early, 1),
        "memory_last_mb": round(late, 1),
        "growth_mb": round(late - early, 1),
        "cache_tokens": metrics(server.url)["llm_cache_tokens"],
    }


# --- how it ends


def drain(server: Served, n_at_once: int, seconds: float, n_tokens: int = 48) -> dict[str, Any]:
    """Send SIGTERM to a server that is busy; return what became of the requests."""
    outcomes, stop = Counter[str](), threading.Event()

    async def load() -> None:
        for number in range(10**9):
            answer = await ask(server.url, f"{BEGINNINGS[number % 8]}", n_tokens, model=server.model)
            if answer.status == 200:
                outcomes["complete" if answer.complete else "DROPPED"] += 1
            else:
                outcomes[{503: "refused by 503", 0: "not let in"}.get(answer.status, str(answer.status))] += 1
                if answer.status == 0:
                    return

    def shoot() -> None:
        time.sleep(seconds)
        server.process.send_signal(signal.SIGTERM)

    async def run() -> None:
        await asyncio.gather(*(load() for _ in range(n_at_once)))

    threading.Thread(target=shoot, daemon=True).start()
    asyncio.run(run())
    started = time.monotonic()
    status = server.process.wait(120)
    stop.set()
    return dict(outcomes) | {"exit_status": status, "seconds_after": round(time.monotonic() - started, 2)}


def report(name: str, **figures: object) -> None:
    """Print a line of figures."""
    print(json.dumps({"figure": name} | figures), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; return 1 if something that must hold does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=("streams", "cancels", "malformed", "steady", "drain", "llama-server")
    )
    parser.add_argument("numbers", nargs="*", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=f"default: {SMOLLM2} for streams and drain, {TALES} for the others")
    parser.add_argument("--requests", type=int, help="how many; 2000 for cancels, 500 for malformed")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--alone", type=int, help="how many prompts also one at a time; all if not given")
    parser.add_argument("--llama", type=int, default=0, help="rounds beside llama.cpp's server")
    options = parser.parse_args(arguments)
    if arguments is None:  # whoever ends us ends our servers, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if options.what == "llama-server":
        run_llama_server(*options.numbers)
        return 0
    if options.what == "streams":
        model = options.model or SMOLLM2
        n_alone = min(options.at_once, options.alone or options.at_once)
        sizes = (options.at_once, options.tokens, options.threads, options.llama, n_alone)
        return int(not streams(model, *sizes))
    big = options.what == "drain"
    with Served(options.model or (SMOLLM2 if big else TALES), "--threads", str(options.threads)) as server:
        if options.what == "cancels":
            found = cancels(server, options.requests or 2000, options.at_once)
            ok = cancels_ok(found)
        elif options.what == "malformed":
            found = malformed(server.port, server.model, options.requests or 500)
            ok = not found["not_as_it_must_be"] and found["slowest_good_s"] < 1
        elif options.what == "steady":
            found = steady(server, options.minutes, options.at_once)
            ok = found["growth_mb"] < 8
        else:
            found = drain(server, options.at_once, 4.0)
            ok = found["exit_status"] == 0 and not found.get("DROPPED")
            # And back after the hardest end.
            with Served(options.model or SMOLLM2) as again:
                again.process.kill()
                again.process.wait()
            with Served(options.model or SMOLLM2) as back:
                found["ready_after_kill_s"] = round(back.seconds, 2)
                ok = ok and back.seconds < 10
        report(options.what, **found)
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
