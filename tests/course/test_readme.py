"""README's figures are the stored ones, its table names every notebook, and the Chinese README agrees with it."""

import calendar
import json
import re

import nbformat
import pytest

from shared.weights.pretrained import CHECKPOINTS
from tests.course.reading_time import minutes
from tests.tools.architecture import ROOT, notebooks
from tests.tools.run_notebooks import chosen, recorded

ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")

# The recorded result behind each row of "What came out", in order; the last row is no notebook's.
RECORDED = (
    "mojibake repaired exactly",
    "compression of unseen stories, 4,096 tokens",
    "exact match, 6 dates, attention",
    "recall at 4 times the trained length, rotary",
    "GPT-2 small against transformers",
    "generation: cache, batch and stream against none",
    "tokens per pass, speculative decoding",
    "tales-1m, loss per story",
    "DDP and FSDP2, two processes",
    "memory to load GPT-2 small",
    "replies equal to transformers'",
    "bits per byte, an unseen story",
    "knowledge, 200 questions",
    "spam: frozen SmolLM2 against counting",
)
SCALES = {"million": 10**6, "billion": 10**9, "千": 10**3, "万": 10**4, "百万": 10**6, "亿": 10**8}
MONTHS = list(calendar.month_name)[1:]


def sections(text: str) -> list[str]:
    """Return a text cut before each heading that stands in no fence."""
    parts, fenced = [""], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if re.match(r"#+ ", line) and not fenced:
            parts.append("")
        parts[-1] += line + "\n"
    return parts[1:]


def section(heading: str) -> str:
    return next(part for part in sections(ENGLISH) if part.startswith(f"## {heading}\n"))


def rows(text: str) -> list[list[str]]:
    """Return the cells of a text's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def test_every_result_is_the_stored_one():
    table = rows(section("What came out"))
    assert len(table) == len(RECORDED) + 1
    for name, (_, result, baseline, command) in zip(RECORDED, table, strict=False):
        place = re.fullmatch(r"`make run CH=(ch\d\d/\d\d)`", command)[1]
        (path,) = chosen(notebooks(), place)  # the command runs one notebook
        (entry,) = (entry for entry in recorded(nbformat.read(path, as_version=4)) if entry["name"] == name)
        assert result == f"{shown(entry['value'])} {entry['unit']}".strip()
        assert baseline == entry["baseline"]


def test_the_last_result_is_that_of_the_checkpoints():
    _, result, baseline, command = rows(section("What came out"))[-1]
    names = ("tales-3m", "tales-1m", "tales-tiny")
    assert command == f"`python -m tests.benchmarks.sampled_stories {' '.join(names)}`"
    whole = {}
    for name in names:
        results = json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))["results"]
        assert results["sampled_stories"] == 1000
        whole[name] = results["whole_stories"]
    assert result == str(whole.pop("tales-3m"))
    assert baseline == ", ".join(f"{name} {count}" for name, count in whole.items())


def test_the_conversation_is_the_one_of_the_notebook():
    talk = re.search(r"^```\n(You: .*?)\n```", ENGLISH, re.M | re.S)[1]
    (path,) = chosen(notebooks(), "ch05/07")
    cells = nbformat.read(path, as_version=4).cells
    outputs = [o.text for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream"]
    said = [re.sub(r"^ +\(.*\)\n", "", text, flags=re.M) for text in outputs]  # without the counts of tokens
    assert any(" ".join(talk.split()) in " ".join(text.split()) for text in said)


def test_the_table_names_every_notebook_and_no_other():
    there = [path.relative_to(ROOT).as_posix() for path in notebooks()]
    for text in (ENGLISH, CHINESE):
        listed = re.findall(r"^\| \[([\w/]+)\]\(([\w/]+\.ipynb)\)", text, re.M)
        assert [target for _, target in listed] == there
        assert all(f"{name}.ipynb" == target for name, target in listed)


def test_hours_of_the_routes():
    for _, _, listed, hours in rows(section("Three routes")):
        links = re.findall(r"\[(\d)\.(\d)\]\((ch0(\d)_\w+/0(\d)_\w+\.ipynb)\)", listed)
        assert len(links) > 5 and all(link[:2] == link[3:] for link in links)
        paths = [ROOT / link[2] for link in links]
        counted = list(map(minutes, paths))
        assert sum(counted) / 60 == pytest.approx(int(hours), rel=0.1)


def test_readme_is_short():
    assert len(ENGLISH.splitlines()) <= 250


# The Chinese README.


def numbers(text: str) -> list[float]:
    """Return the numbers of a text in order of size, with words such as million worked in, and months as numbers."""
    for number, month in enumerate(MONTHS, 1):
        text = re.sub(rf"\b{month}\b", str(number), text)
    found = re.findall(
        rf"(?<![A-Za-z0-9_.-])(\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(?: ?({'|'.join(sorted(SCALES, key=len)[::-1])}))?",
        text,
    )
    return sorted(float(digits.replace(",", "")) * SCALES.get(scale, 1) for digits, scale in found)


def fences(text: str) -> list[str]:
    return re.findall(r"^```\n.*?^```$", text, re.M | re.S)


def without_fences(text: str) -> str:
    return re.sub(r"^```\n.*?^```$", "", text, flags=re.M | re.S)


def targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", without_fences(text))


PAIRS = list(zip(sections(ENGLISH), sections(CHINESE), strict=True))


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=[part[0].splitlines()[0] for part in PAIRS])
def test_the_chinese_readme_agrees(english, chinese):
    assert fences(chinese) == fences(english)
    here, there = ([t for t in targets(part) if not t.startswith("#")] for part in (english, chinese))
    assert there == [{"README.zh-CN.md": "README.md"}.get(target, target) for target in here]
    codes = [sorted(re.findall(r"`([^`\n]+)`", without_fences(part))) for part in (english, chinese)]
    assert codes[1] == codes[0]
    plain = [re.sub(r"`[^`\n]+`|\]\([^)]+\)", " ", without_fences(part)) for part in (english, chinese)]
    assert numbers(plain[1]) == numbers(plain[0])
    lines = [
        [line.count("|") for line in part.splitlines() if line.startswith("|")] for part in (english, chinese)
    ]
    assert lines[1] == lines[0]


def test_headings_of_the_chinese_readme_have_the_same_depth():
    assert all(part[0].split()[0] == part[1].split()[0] for part in PAIRS)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("135 million in 2.2 GB", "1.35 亿,2.2 GB"),
        ("1,000 on 29 November 2026, GPT-2 and Qwen3", "2026 年 11 月 29 日,GPT-2 和 Qwen3,1,000"),
        ("1 million", "100 万"),
    ],
)
def test_numbers_in_both_languages(english, chinese):
    assert numbers(english) == numbers(chinese) != []
    assert numbers(english) != numbers(chinese + " 7")
