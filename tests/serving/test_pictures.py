"""Pictures to labels: the classifier itself, `llm classify --image`, and pictures in requests."""

import base64
import io
import json
import random
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.data.images import load_digit, load_digit_images, load_image, open_image
from shared.model.vit import ViTClassifier, ViTConfig, ViTModel
from shared.serving import pictures
from shared.serving.pictures import open_picture_classifier, picture_bytes
from shared.weights.vit import load_vit, save_vit
from tests.serving.running import running
from tests.serving.test_cli import llm, one_line  # noqa: F401

DIGITS = load_digit_images("test")


def digit_picture(place: int, side: int = 80) -> Image.Image:
    """Return a digit of the test split as somebody would photograph it: dark ink on white, some paper around."""
    ink = (DIGITS.images[place, 0].numpy() + 1) / 2
    digit = Image.fromarray((255 * (1 - ink)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    page = Image.new("L", (2 * side, 2 * side), 255)
    page.paste(digit, (side // 2, side // 2))
    return page


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png_that_claims(width: int, height: int) -> bytes:
    """Return a small file that is, by its head, a picture of so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory) -> Path:
    """Return a folder with a ViT for colors, in transformers' form; two labels have the same name."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=[8, 16], patch_size=4, emb_dim=16, n_heads=2, n_layers=1, init_std=0.5)
    model = ViTClassifier(ViTModel(config), 3)
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("vit") / "birds"
    save_vit(model, folder, id2label={"0": "crane", "1": "owl", "2": "crane"})
    return folder


# --- the classifier


def test_the_shipped_classifier_is_the_model_called_directly():
    found, model = open_picture_classifier(), load_vit("digits-vit", classifier=True)
    assert found.labels == tuple("0123456789")
    right = 0
    for place in range(40):
        data = encoded(digit_picture(place))
        with torch.inference_mode():
            expected = model(load_digit(data))[0].softmax(dim=0)
        shares = found.shares(found.read(data))
        assert list(shares.values()) == pytest.approx(expected.tolist(), abs=1e-6)
        right += max(shares, key=shares.__getitem__) == str(int(DIGITS.labels[place]))
    assert right >= 34  # drawings stretched to another size are not what it was taught


def test_a_folder_says_its_labels_and_its_normalization(small_vit, tmp_path):
    found = open_picture_classifier(small_vit)
    assert found.labels == ("crane (0)", "owl", "crane (2)")
    picture = encoded(Image.effect_noise((30, 20), 90).convert("RGB"))
    plain = load_image(picture, (8, 16), 3)
    assert torch.equal(found.read(picture), plain)
    settings = small_vit / "preprocessor_config.json"
    try:
        settings.write_text(
            json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})
        )
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = ((plain + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
        torch.testing.assert_close(open_picture_classifier(small_vit).read(picture), expected)
        settings.write_text(json.dumps({"do_normalize": False}))
        torch.testing.assert_close(open_picture_classifier(small_vit).read(picture), (plain + 1) / 2)
        for bad in (
            {"do_center_crop": True},
            {"do_rescale": False},
            {"image_std": 0},
            {"image_mean": [1, 2]},
            {"image_mean": "x"},
        ):
            settings.write_text(json.dumps(bad))
            with pytest.raises(ValueError, match=r"preprocessor_config.json must be"):
                open_picture_classifier(small_vit)
    finally:
        settings.unlink()


@pytest.mark.parametrize("named", [{"1": "a", "2": "b", "3": "c"}, ["a", "b", "c"], {}])
def test_labels_that_are_not_numbered_from_0(small_vit, tmp_path, named):
    config = json.loads((small_vit / "config.json").read_text()) | {"id2label": named}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="id2label must name the labels"):
        open_picture_classifier(tmp_path)


# --- a stranger's bytes


def test_base64_with_and_without_a_url():
    data = bytes(range(256))
    text = base64_of(data)
    broken = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for given in (text, broken, f"data:image/png;base64,{text}", f"DATA:image/svg+xml;base64,{broken}\n"):
        assert picture_bytes(given) == data
    for bad in (
        text[:-1],
        "ä",
        "\ud800",
        "https://example.org/a.png",
        "data:text/plain;base64,QUJD",
        "data:image/png,QUJD",
    ):
        with pytest.raises(ValueError, match="must be base64"):
            picture_bytes(bad)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_a_value_error_or_a_picture(kind):
    whole, rng = encoded(digit_picture(3, 20), kind), random.Random(5)
    assert open_image(whole).size == (40, 40)
    n_refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            open_image(bytes(data[: rng.randint(len(data) // 2, 2 * len(data))]))
        except ValueError as error:
            assert "0x" not in str(error)
            n_refused += 1
    assert n_refused > 0


def test_formats_that_do_more_than_hold_a_picture_are_not_for_strangers(tmp_path):
    for kind in ("EPS", "TIFF", "GIF", "PDF"):
        with pytest.raises(ValueError, match=r"must be a whole file of PNG, JPEG, WEBP"):
            open_image(encoded(digit_picture(0), kind))
    path = tmp_path / "own.gif"
    path.write_bytes(encoded(digit_picture(0), "GIF"))
    assert open_image(path).size == (160, 160)


def test_bombs_cost_nothing(tmp_path):
    start = time.perf_counter()
    for side, said in ((10_000, "pixels must be at most 40000000"), (60_000, "must be a whole file")):
        with pytest.raises(ValueError, match=said):
            open_image(png_that_claims(side, side))
    # A JPEG file that repeats its picture a thousand times may have a hundredth of the pixels.
    whole = encoded(Image.new("L", (2000, 500), 9), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    many = whole[:-2] + 20_000 * scan[:12] + whole[-2:]
    with pytest.raises(ValueError, match="pixels must be at most 19"):
        open_image(many)
    assert open_image(whole).size == (2000, 500)
    # Notes of a camera in very many parts.
    part = b"\xff\xe1" + struct.pack(">H", 18) + b"Exif\0\0" + bytes(10)
    assert open_image(whole[:2] + 40_000 * part + whole[2:]).size == (2000, 500)
    assert time.perf_counter() - start < 5


def test_a_photo_is_turned_as_the_camera_says():
    notes = Image.Exif()
    notes[0x0112] = 6
    assert open_image(encoded(Image.new("L", (30, 20)), "JPEG", exif=notes)).size == (20, 30)


# --- in the terminal


def test_classify_pictures(llm, tmp_path):  # noqa: F811
    paths, found = [], open_picture_classifier()
    for place in range(3):
        paths.append(tmp_path / f"{place}.png")
        digit_picture(place).save(paths[-1])
    lines = []
    for path in paths:
        shares = found.shares(found.read(path))
        label = max(shares, key=shares.__getitem__)
        lines.append(f"{label}\t{shares[label]:.3f}\t{path}\n")
    assert llm("classify", "digits-vit", "--image", paths[0]) == (0, lines[0], "")
    several = [part for path in paths for part in ("--image", path)]
    assert llm("classify", *several) == (0, "".join(lines), "")
    status, written, _ = llm("classify", *several[:2], "--json")
    said = json.loads(written)
    assert (
        status == 0 and set(said) == {"image", "label", "probabilities"} and len(said["probabilities"]) == 10
    )
    assert said["label"] == lines[0][0] and said["image"] == str(paths[0])


def test_classify_with_a_folder(llm, small_vit, tmp_path):  # noqa: F811
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.jpg")
    status, written, error = llm("classify", small_vit, "--image", tmp_path / "a.jpg")
    assert (status, error) == (0, "") and written.split("\t")[0] in ("crane (0)", "owl", "crane (2)")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("digits-vit", "a text", "--image", "good.png"), 1, "texts or --image, not both"),
        (("--image", "none.png"), 2, "'none.png' does not exist"),
        (("--image", "."), 2, "'.' is a directory"),
        (("--image", "text.png"), 1, "text.png must be an image"),
        (("--image", "blank.png"), 1, "contrast must be above"),
        (("--image", "bomb.png"), 1, "pixels must be at most"),
        (("tales-tiny", "--image", "good.png"), 1, "must be one of digits-vit, or a folder"),
        (("gpt", "--image", "good.png"), 1, "model_type must be 'vit', got 'gpt2'"),
        (("empty", "--image", "good.png"), 1, "config.json"),
        ((), 2, "'MODEL'"),
    ],
)
def test_what_cannot_be_classified(llm, tmp_path, monkeypatch, arguments, status, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    digit_picture(0).save("good.png")
    Image.new("L", (9, 9), 9).save("blank.png")
    Path("text.png").write_text("no picture")
    Path("bomb.png").write_bytes(png_that_claims(10_000, 10_000))
    for name, config in (("gpt", '{"model_type": "gpt2"}'), ("empty", None)):
        Path(name).mkdir()
        if config:
            Path(name, "config.json").write_text(config)
    found, out, error = llm("classify", *arguments)
    assert (found, out) == (status, "") and said in error and one_line(error), error


# --- in requests


@pytest.mark.service
def test_a_request_with_pictures(served):
    places = range(12)
    files = [
        encoded(digit_picture(place), kind)
        for place, kind in zip(places, 4 * ("PNG", "JPEG", "WEBP"), strict=True)
    ]
    found = open_picture_classifier()
    expected = [found.shares(found.read(data)) for data in files]
    body = served.post("/v1/classify", model=None, image=[base64_of(data) for data in files]).json()
    assert body["object"] == "list" and body["model"] == "digits-vit"
    for row, entry in enumerate(body["data"]):
        assert entry["index"] == row and entry["probabilities"] == pytest.approx(expected[row], abs=1e-5)
        assert entry["label"] == max(expected[row], key=expected[row].__getitem__)
    right = sum(entry["label"] == str(int(DIGITS.labels[row])) for row, entry in enumerate(body["data"]))
    assert right >= 10
    # One alone, as a URL, with the model's name.
    url = f"data:image/png;base64,{base64_of(files[0])}"
    one = served.post("/v1/classify", model="digits-vit", image=url).json()
    assert one["data"][0]["probabilities"] == pytest.approx(body["data"][0]["probabilities"], abs=1e-5)
    # Texts are as before, also where the other field is null.
    assert served.post("/v1/classify", model=None, input="the lamp", image=None).json()["model"] == "filter"


GOOD = base64_of(encoded(digit_picture(0)))
REFUSED = [
    ({"image": base64_of(png_that_claims(10_000, 10_000))}, "image", "invalid_image"),
    ({"image": base64_of(png_that_claims(60_000, 60_000))}, "image", "invalid_image"),
    ({"image": base64_of(png_that_claims(5_000, 4_000))}, "image", "invalid_image"),
    ({"image": base64_of(b"no picture")}, "image", "invalid_image"),
    ({"image": base64_of(encoded(digit_picture(0))[:-200])}, "image", "invalid_image"),
    ({"image": base64_of(encoded(digit_picture(0), "GIF"))}, "image", "invalid_image"),
    ({"image": base64_of(encoded(Image.new("L", (9, 9))))}, "image", "invalid_image"),
    ({"image": [GOOD, "?"]}, "image", "invalid_image"),
    ({"image": ""}, "image", "invalid_image"),
    ({"image": "https://example.org/four.png"}, "image", "invalid_image"),
    ({"image": "=" * 900_000}, "image", "invalid_image"),
    ({"image": " " * 900_000}, "image", "invalid_image"),
    ({"image": 17 * [GOOD]}, "image", None),
    ({"image": []}, "image", None),
    ({"image": 3}, "image", None),
    ({"image": [3]}, "image", None),
    ({"image": GOOD, "input": "x"}, "image", None),
    ({"image": None, "input": None}, "input", None),
    ({}, "input", None),
]


@pytest.mark.service
@pytest.mark.parametrize(("body", "param", "code"), REFUSED)
def test_requests_that_are_refused(served, body, param, code):
    response = served.post("/v1/classify", model=None, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code) and error["type"] == "invalid_request_error"
    assert error["message"] and GOOD[:20] not in error["message"] and "0x" not in error["message"]


@pytest.mark.service
def test_another_model_and_too_large_a_body(served):
    for model in ("filter", "small", "other"):
        response = served.post("/v1/classify", model=model, image=GOOD)
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert served.post("/v1/classify", model=None, image="A" * 1_100_000).status_code == 413


@pytest.mark.service
def test_the_folder_of_the_server_and_a_load_that_failed(small, small_vit):
    tries = iter([ValueError("the disk was away"), None])

    def load():
        error = next(tries)
        if error is not None:
            raise error
        return open_picture_classifier(small_vit)

    with running(small, pictures=("birds", load)) as server:
        assert server.post("/v1/classify", model=None, image=GOOD).status_code == 500
        body = server.post("/v1/classify", model="birds", image=GOOD).json()
        assert body["model"] == "birds" and set(body["data"][0]["probabilities"]) == {
            "crane (0)",
            "owl",
            "crane (2)",
        }
        assert server.post("/v1/classify", model=None, input="x").status_code == 404  # there is none of texts


@pytest.mark.service
def test_what_nobody_foresaw_and_too_many_at_a_time(small, monkeypatch):
    class Slow:
        def read(self, source, max_pixels):
            time.sleep(0.3)
            raise TypeError("a library's own")

    with running(small, pictures=("slow", Slow)) as server:
        response = server.post("/v1/classify", model=None, image=GOOD)
        assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_image"
        monkeypatch.setattr(pictures, "MOST_CALLS", 1)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(server.post, "/v1/classify", model=None, image=GOOD) for _ in range(3)]
            # Texts are written meanwhile.
            assert server.complete(max_tokens=2).status_code == 200
        statuses = [one.result().status_code for one in asked]
        assert sorted(statuses) == [400, 429, 429]
