"""A model without torch: what the file must hold, what is refused, and that torch stays out."""

import json
import subprocess
import sys

import onnx
import pytest

from shared.generation.engine import generate
from shared.generation.streaming import generate_text
from shared.serving.exporting import export_onnx
from shared.serving.models import open_model
from shared.serving.onnx_runtime import OnnxModel
from shared.tales.encoding import tale_encoding


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tales.onnx"
    list(export_onnx(open_model("tales-tiny", dtype="float32"), path))
    return path


def test_the_same_text_as_our_engine(path):
    found, model = OnnxModel(path, threads=1), open_model("tales-tiny", dtype="float32").model
    assert found.stop_tokens == [2047]
    for prompt in ("", "In the week when", "12 <|endoftext|> é"):
        assert found.encode(prompt) == tale_encoding().encode_ordinary(prompt)
        theirs = generate_text(model, tale_encoding(), prompt, 40, temperature=0.0)
        assert "".join(found.stream_text(prompt, 40)) == theirs
    prompts = [[2047], [5, 6, 7]]
    stop = generate(model, [[5, 6, 7]], 10)[0][4]
    assert found.generate(prompts, 10, [stop]) == generate(model, prompts, 10, stop_tokens=[stop])


def test_bad_input_is_named(path, tmp_path):
    found = OnnxModel(path)
    with pytest.raises(
        ValueError, match="a prompt of 250 ids and max_new_tokens=20 exceed context_length=256"
    ):
        found.generate([[1] * 250], 20)
    for prompt in ([], [2048], [-1]):
        with pytest.raises(ValueError, match=r"prompts\[0\] must hold at least one id, all from 0 to 2047"):
            found.generate([prompt], 5)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "half.onnx").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is damaged or no ONNX file"):
        OnnxModel(tmp_path / "half.onnx")
    # Somebody else's graph, and one of ours without a tokenizer.
    whole = onnx.load(path)
    del whole.metadata_props[:]
    onnx.save(whole, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="has no 'config' in its metadata"):
        OnnxModel(tmp_path / "foreign.onnx")
    onnx.helper.set_model_props(whole, {"config": json.dumps(found.config)})
    onnx.save(whole, tmp_path / "bare.onnx")
    with pytest.raises(ValueError, match="the file has no tokenizer"):
        next(OnnxModel(tmp_path / "bare.onnx").stream_text("a", 3))


def test_torch_stays_out_and_the_memory_small(path):
    program = (
        "import sys, pathlib\n"
        "from shared.serving.cli import main\n"
        "status = main(['generate', sys.argv[1], 'In the week when', '--max-tokens', '20'])\n"
        "told = pathlib.Path('/proc/self/status')\n"
        "peak = told.read_text().split('VmHWM:')[1].split()[0] if told.exists() else 0\n"
        "print(status, 'torch' in sys.modules, peak)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    status, has_torch, peak = done.stdout.split("\n")[-2].split()
    assert (status, has_torch) == ("0", "False"), done.stderr
    assert int(peak) < 200_000  # kB; about 100 MB, where torch alone needs more than 200
