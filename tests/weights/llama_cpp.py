"""llama.cpp in a process of its own, asked for tokens: `xllamacpp` is part of the extra "test"."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs-xllamacpp")

PROGRAM = """
import json, sys, urllib.request, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = sys.argv[1], 512, 1, False
server = xllamacpp.Server(parameters)

def ask(path, **body):
    with urllib.request.urlopen(server.listening_address + path, json.dumps(body).encode()) as answer:
        return json.load(answer)

greedy = {"n_predict": int(sys.argv[4]), "temperature": 0, "samplers": ["temperature"], "cache_prompt": False}
prompts = [ask("/completion", prompt=p, return_tokens=True, **greedy)["tokens"] for p in json.loads(sys.argv[2])]
texts = [ask("/tokenize", content=t, add_special=True, parse_special=False)["tokens"] for t in json.loads(sys.argv[3])]
print("ANSWER" + json.dumps([prompts, texts]))
"""


def ask_llama_cpp(
    path: Path, prompts: Sequence[Sequence[int]], texts: Sequence[str] = (), n_new: int = 20
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the most probable continuation of each prompt, and the ids of each text, begin token and all."""
    arguments = [str(path), json.dumps(prompts), json.dumps(texts), str(n_new)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(json.loads(done.stdout.split("ANSWER")[1]))


def check_choices(
    model: torch.nn.Module, prompts: list[list[int]], theirs: list[list[int]], room: float
) -> None:
    """Assert that each token of theirs is our most probable one, or within `room` of its logit.

    Our model reads what they wrote, so one near tie does not hide all that follows.
    """
    for prompt, new in zip(prompts, theirs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]  # (new tokens, vocab_size)
        chosen = logits[torch.arange(len(new)), torch.tensor(new)]
        assert new and (logits.max(dim=-1).values - chosen).max() <= room
