"""The program `llm`: what it prints, its exit statuses, errors of one line, and nothing half-written."""

import errno
import io
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from typer import Exit

from shared.generation.engine import generate
from shared.generation.streaming import generate_text
from shared.serving import cli, terminal
from shared.serving.cli import main
from shared.serving.exporting import ollama_modelfile
from shared.serving.models import find_tokenizer, open_model
from shared.tales.encoding import tale_encoding
from shared.text.chat_format import ChatFormat
from shared.weights import files
from shared.weights.pretrained import load_pretrained

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "In the week when the grass"


@pytest.fixture
def llm(capsys, monkeypatch):
    """Run a command line in this process: (status, standard output, standard error)."""

    def run(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
        status = main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def program(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run it as a process of its own."""
    command = [sys.executable, "-m", "shared.serving.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, **options)


def tales(prompt: str, n: int = 20) -> str:
    model = load_pretrained("tales-tiny")
    return generate_text(model, tale_encoding(), prompt, n, temperature=0.0)


def one_line(text: str) -> bool:
    return text.startswith("llm: ") and text.count("\n") == 1 and "Traceback" not in text


def test_generate_continues_a_text(llm):
    expected = tales(PROMPT) + "\n"
    assert llm("generate", "tales-tiny", PROMPT, "--max-tokens", 20) == (0, expected, "")
    assert llm("generate", "tales-tiny", "--max-tokens", 20, stdin=f"{PROMPT}\n".encode()) == (
        0,
        expected,
        "",
    )
    # Without a limit, what the context has room for.
    long = "the " * 230
    n = len(tale_encoding().encode_ordinary(long))
    assert llm("generate", "tales-tiny", long)[:2] == (0, tales(long, 257 - n) + "\n")


def test_generate_reads_and_writes_lines_of_json(llm):
    lines = [json.dumps(PROMPT), "", json.dumps({"prompt": "Ä", "id": 7})]
    status, written, said = llm(
        "generate", "tales-tiny", "--json", "--max-tokens", 20, stdin="\n".join(lines).encode()
    )
    assert (status, said) == (0, "")
    first, second = map(json.loads, written.splitlines())
    assert first == {"prompt": PROMPT, "text": tales(PROMPT)}
    assert second == {"prompt": "Ä", "id": 7, "text": tales("Ä")}


def test_options_of_generate(llm):
    hot = (
        "generate",
        "tales-tiny",
        PROMPT,
        "--temperature",
        1,
        "--top-k",
        5,
        "--top-p",
        0.9,
        "--max-tokens",
        20,
    )
    assert llm(*hot, "--seed", 1) == llm(*hot, "--seed", 1) != llm(*hot, "--seed", 2)
    full = tales(PROMPT)
    stop = full[8:11]
    assert (
        llm("generate", "tales-tiny", PROMPT, "--max-tokens", 20, "--stop", stop)[1]
        == full.partition(stop)[0] + "\n"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("generate", "nothing", "x"), 1, "tales-1m"),  # the names are listed
        (("generate", "none.gguf", "x"), 1, "none.gguf"),
        (("generate", "none.onnx", "x"), 1, "none.onnx does not exist"),
        (("generate", "tales-tiny", "a \udcff"), 1, "PROMPT must be UTF-8"),
        (("generate", "tales-tiny", "the " * 300), 1, "context_length=256"),
        (("generate", "tales-tiny", "x", "--repetition-penalty", "0"), 1, "repetition_penalty must be"),
        (("generate", "x.onnx", "x", "--temperature", "1"), 1, "an .onnx file takes"),
        (("generate", "tales-tiny", "x", "--tokenizer", "nothing"), 1, "nothing has no tokenizer.json"),
        (("chat", "tales-tiny"), 1, "was taught no chat format"),
        (("embed", "tales-tiny", "the " * 300), 1, "a text must have 1 to 256 tokens"),
        (("embed", "tales-tiny", ""), 1, "a text must have 1 to 256 tokens, got 0"),
        (("export", "tales-tiny", "x", "--to", "onnx", "--modelfile"), 1, "--modelfile belongs to --to gguf"),
        (("generate",), 2, "Missing argument"),
        (("dance",), 2, "No such command 'dance'"),
        (("generate", "tales-tiny", "--max-tokens", "0"), 2, "--max-tokens"),
        (("generate", "tales-tiny", "--dtype", "int4"), 2, "--dtype"),
        (("export", "tales-tiny", "x"), 2, "--to"),
        (("export", "tales-tiny", "x", "--to", "pickle"), 2, "pickle"),
    ],
)
def test_bad_input_is_one_line_and_a_status(llm, tmp_path, monkeypatch, arguments, status, said):
    monkeypatch.chdir(tmp_path)
    found, out, error = llm(*arguments)
    assert (found, out) == (status, "") and said in error and one_line(error), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stdin", "options", "said"),
    [
        (b"abc\xff", (), "standard input must be UTF-8, got byte 0xff at place 3"),
        (
            b'{"prompt": "a"}\n{"prompt": \xff}\n',
            ("--json",),
            "line 2 must be UTF-8, got byte 0xff at place 11",
        ),
        (b'{"prompt": \n', ("--json",), "line 1 is no JSON"),
        (b'{"text": "a"}\n', ("--json",), 'line 1 must be a text or an object with "prompt"'),
        (b"3\n", ("--json",), "line 1 must be a text or an object"),
    ],
)
def test_bad_standard_input(llm, stdin, options, said):
    status, _, error = llm("generate", "tales-tiny", "--max-tokens", 2, *options, stdin=stdin)
    assert status == 1 and said in error and one_line(error)


def test_embed_is_the_mean_of_the_last_hidden_states(llm):
    status, written, _ = llm("embed", "tales-tiny", stdin=f"{PROMPT}\nthe crow\n".encode())
    entries = [json.loads(line) for line in written.splitlines()]
    assert status == 0 and [entry["text"] for entry in entries] == [PROMPT, "the crow"]
    model = load_pretrained("tales-tiny").float()
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor([tale_encoding().encode_ordinary(PROMPT)]))
    torch.testing.assert_close(
        torch.tensor(entries[0]["embedding"]), hidden[0].mean(dim=0), atol=1e-2, rtol=1e-2
    )


class Stand:
    """A stand-in for a classifier, with its interface."""

    labels = ("ham", "spam")

    def predict_proba(self, texts):
        return torch.tensor([[0.1, 0.9] if "prize" in text else [0.75, 0.25] for text in texts])


def test_classify(llm, monkeypatch):
    monkeypatch.setattr("shared.finetuning.lora_classifier.open_classifier", lambda name: Stand())
    assert llm("classify", "filter", "Win a prize") == (0, "spam\t0.900\tWin a prize\n", "")
    status, written, _ = llm("classify", "filter", "--json", stdin=b'{"text": "Hello", "id": 1}\n"a prize"\n')
    first, second = map(json.loads, written.splitlines())
    assert (status, first["label"], first["id"], second["label"]) == (0, "ham", 1, "spam")
    assert first["probabilities"] == {"ham": 0.75, "spam": 0.25}


def test_info(llm, tmp_path):
    status, written, _ = llm("info")
    assert status == 0 and {"tales-tiny", "smollm2-135m-instruct", "gpt2-small"} <= set(written.split())
    status, written, _ = llm("info", "tales-tiny", "--json")
    said = json.loads(written)
    assert status == 0 and said["parameters"] == load_pretrained("tales-tiny").n_parameters
    assert "parameters" in llm("info", "tales-tiny")[1]
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(10))
    status, _, error = llm("info", damaged)
    assert status == 1 and one_line(error) and "damaged.gguf" in error


def test_every_export_is_the_same_model(llm, tmp_path):
    """20 greedy tokens, a left-padded pair included, of what `llm export` has written."""
    from shared.serving.onnx_runtime import OnnxModel

    prompts = [[2047], [2047, *tale_encoding().encode_ordinary(PROMPT)]]
    model = load_pretrained("tales-tiny", dtype=torch.float32)
    expected = generate(model, prompts, 20)
    for to, name in (("gguf", "tales.gguf"), ("hf", "tales"), ("onnx", "tales.onnx")):
        path = tmp_path / name
        options = ("--type", "F32") if to == "gguf" else ()
        status, out, said = llm("export", "tales-tiny", path, "--to", to, *options)
        assert (status, out) == (0, "") and name in said
        found = OnnxModel(path) if to == "onnx" else open_model(str(path), dtype="float32").model
        assert (found.generate(prompts, 20) if to == "onnx" else generate(found, prompts, 20)) == expected
        assert llm("generate", path, PROMPT, "--max-tokens", 20)[1] == tales(PROMPT) + "\n"
        # A second time nothing is touched.
        status, _, error = llm("export", "tales-tiny", path, "--to", to)
        assert status == 1 and "must be new" in error and one_line(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tales", "tales.gguf", "tales.onnx"]


def test_a_full_disk_leaves_nothing(llm, tmp_path, monkeypatch):
    def full(place):
        raise OSError(errno.ENOSPC, "No space left on device", str(place))

    monkeypatch.setattr(files, "to_disk", full)
    status, _, error = llm("export", "tales-tiny", tmp_path / "tales.gguf", "--to", "gguf")
    assert status == 1 and error.startswith("llm: no space left on the device") and one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("model cannot be written: I/O error: No space left on device (os error 28)"),  # safetensors
        OSError("39168 requested and 15936 written"),  # numpy
    ],
)
def test_a_full_disk_is_recognised(error):
    assert terminal.message_of(error) == "no space left on the device"
    assert terminal.message_of(OSError(errno.EACCES, "Permission denied")) == "[Errno 13] Permission denied"


@pytest.mark.posix
def test_a_real_disk_that_is_full(tmp_path):
    """A file system of 1 MB, where the machine lets us make one."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        for to in ("gguf", "hf"):
            done = program("export", "tales-3m", tmp_path / f"tales.{to}", "--to", to, text=True)
            assert done.returncode == 1 and done.stderr == "llm: no space left on the device\n"
            assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_rows_that_stay_f16_are_said(llm, tmp_path):
    status, _, said = llm("export", "tales-1m", tmp_path / "tales.gguf", "--to", "gguf", "--type", "Q4_0")
    assert status == 0 and "4 matrices have rows that are no multiple of 32 and stay F16" in said


def test_the_modelfile_names_the_file_and_writes_what_the_format_writes(llm, tmp_path):
    status, _, _ = llm("export", "tales-tiny", tmp_path / "tales.gguf", "--to", "gguf", "--modelfile")
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert status == 0 and lines[0] == "FROM ./tales.gguf" and (tmp_path / lines[0].split(" ./")[1]).is_file()
    chat = ChatFormat("You are brief.")
    text = ollama_modelfile("small.gguf", chat)
    assert text.startswith("FROM ./small.gguf\n") and f'SYSTEM """{chat.default_system}"""' in text
    # The template in Go's language, worked out by hand for a conversation.
    template = text.partition('TEMPLATE """')[2].partition('"""')[0]
    before, loop, after = template.partition("{{- range .Messages }}")[::2][1].partition("{{ end }}")
    messages = chat.complete([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}])
    turns = [
        before.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages
    ]
    assert loop and "".join(turns) + after == chat.render(messages)
    status, _, error = llm("export", "tales-tiny", tmp_path / "new.gguf", "--to", "gguf", "--modelfile")
    assert status == 1 and "Modelfile" in error and not (tmp_path / "new.gguf").exists()


def test_help_is_quick_and_has_examples():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        shown = program("--help")
        seconds.append(time.perf_counter() - start)
        assert shown.returncode == 0 and b"generate" in shown.stdout
    assert min(seconds) < 3  # 0.2 s on a quiet machine: torch is not imported
    for command in ("generate", "chat", "classify", "embed", "export", "info"):
        text = program(command, "--help").stdout.decode()
        assert f"llm {command} " in text and "Traceback" not in text


def test_without_an_argument_help_is_shown(llm):
    status, out, error = llm()
    assert status == 2 and "Commands:" in out + error


@pytest.mark.posix
def test_a_pipe_that_closes_early_is_one_line():
    command = f"{sys.executable} -m shared.serving.cli generate tales-tiny '{PROMPT}' | head -c 3"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and done.stdout == tales(PROMPT)[:3] and one_line(done.stderr), done.stderr


@pytest.mark.posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_below_the_output_is_one_line():
    command = [sys.executable, "-m", "shared.serving.cli", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1 and "no space left" in done.stderr and one_line(done.stderr), done.stderr


def test_output_is_utf8_in_every_locale():
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    entry = json.dumps({"prompt": "Ä"}).encode()
    shown = program("generate", "tales-tiny", "--json", "--max-tokens", 1, input=entry, env=environment)
    assert json.loads(shown.stdout.decode("utf-8"))["prompt"] == "Ä"


def test_errors_that_nobody_foresaw_are_one_line_too(llm, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(cli, "opened", broken)
    status, _, error = llm("embed", "tales-tiny", "x")
    assert status == 1 and "not enough memory" in error and one_line(error)
    monkeypatch.setattr(cli, "opened", lambda *_: 1 / 0)
    status, _, error = llm("embed", "tales-tiny", "x")
    assert (status, error) == (1, "llm: ZeroDivisionError: division by zero\n")
    monkeypatch.setenv("LLM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        llm("embed", "tales-tiny", "x")


def test_a_terminal_as_input_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    with pytest.raises(terminal.Failure, match="give a text as an argument"):
        next(terminal.input_bytes())
    with pytest.raises(Exit):
        terminal.leave(1)


def test_the_tokenizer_of_a_name_is_the_tokenizer_of_the_course():
    assert find_tokenizer("tales-3m") is tale_encoding()
