"""The judge: strict verdicts, counted failures, both orders of a pair; and a local judge by likelihood."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.finetuning.judge import (
    GRADE_SCHEMA,
    MAX_VERDICT_CHARS,
    PAIR_SCHEMA,
    RUBRIC,
    InvalidVerdict,
    Judge,
    Submission,
    grading_messages,
    pair_messages,
    parse_verdict,
)
from shared.finetuning.judge_client import ChatClient, Endpoint, Limits
from shared.finetuning.judge_replies import JudgeError, ReplyCache
from shared.finetuning.local_judge import LocalJudge
from shared.model.gpt import GPTConfig, GPTModel
from shared.text.chat_format import ChatFormat
from tests.finetuning.judge_server import Handler, judge_server, says, sends

GOOD = '{"reason": "right", "grade": 5}'


# --- the parser


@pytest.mark.parametrize(
    "reply", [GOOD, f" \n{GOOD}\t", '{"grade":5,"reason":"right"}', GOOD.replace("5", "5.0")]
)
def test_verdicts(reply):
    assert parse_verdict(reply, GRADE_SCHEMA) == {"reason": "right", "grade": 5}


@pytest.mark.parametrize(
    "reply, kind",
    [
        ("", "not one JSON object"),
        ("4", "not one JSON object"),
        ("I give it a 4.", "not one JSON object"),
        (f"Sure! {GOOD}", "not one JSON object"),
        (f"{GOOD} I hope this helps.", "not one JSON object"),
        (GOOD + GOOD, "not one JSON object"),
        (f"```json\n{GOOD}\n```", "not one JSON object"),
        (f"[{GOOD}]", "not one JSON object"),
        ("null", "not one JSON object"),
        ("\ufeff" + GOOD, "not one JSON object"),
        (GOOD.replace('"', "'"), "not one JSON object"),
        (GOOD.replace("5", "1" * 5000), "not one JSON object"),
        (GOOD.replace("5", "[" * 15_000), "not one JSON object"),
        (GOOD.replace("5", "[" * 700 + "]" * 700), "does not fit the schema"),
        (GOOD.replace("5", "6"), "does not fit the schema"),
        (GOOD.replace("5", "0"), "does not fit the schema"),
        (GOOD.replace("5", "-5"), "does not fit the schema"),
        (GOOD.replace("5", "4.5"), "does not fit the schema"),
        (GOOD.replace("5", "1e400"), "does not fit the schema"),
        (GOOD.replace("5", '"5"'), "does not fit the schema"),
        (GOOD.replace("5", "true"), "does not fit the schema"),
        (GOOD.replace("5", "null"), "does not fit the schema"),
        (GOOD.replace("grade", "Grade"), "does not fit the schema"),
        ('{"grade": 5}', "does not fit the schema"),
        (GOOD.replace("}", ', "confidence": 1}'), "does not fit the schema"),
        (GOOD.replace("5", "NaN"), "no number of JSON"),
        (GOOD.replace("5", "-Infinity"), "no number of JSON"),
        (GOOD.replace("}", ', "grade": 1}'), "a key stands twice"),
        (GOOD.replace('"right"', '{"a": 1, "a": 2}'), "a key stands twice"),
        ("x" * (MAX_VERDICT_CHARS + 1), "longer than 20,000 characters"),
    ],
)
def test_what_is_no_verdict_is_invalid_and_never_guessed(reply, kind):
    with pytest.raises(InvalidVerdict) as caught:
        parse_verdict(reply, GRADE_SCHEMA)
    assert caught.value.kind == kind and len(str(caught.value)) < 300


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["reason", "grade", "winner", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.text(max_size=60) | VALUES.map(json.dumps) | VALUES.map(lambda x: GOOD.replace("5", json.dumps(x))))
def test_any_reply_is_a_grade_in_range_or_invalid(reply):
    try:
        verdict = parse_verdict(reply, GRADE_SCHEMA)
    except InvalidVerdict:
        return
    assert set(verdict) == {"reason", "grade"} and verdict["grade"] in (1, 2, 3, 4, 5)
    assert not isinstance(verdict["grade"], bool) and json.loads(reply) == verdict


def test_a_verdict_on_a_pair():
    assert parse_verdict('{"reason": "", "winner": "tie"}', PAIR_SCHEMA)["winner"] == "tie"
    for winner in ('"C"', '"a"', "1", '["A"]'):
        with pytest.raises(InvalidVerdict, match="does not fit the schema"):
            parse_verdict(f'{{"reason": "", "winner": {winner}}}', PAIR_SCHEMA)
    with pytest.raises(TypeError, match="reply must be a str"):
        parse_verdict(None, PAIR_SCHEMA)


# --- what is asked


@given(st.text(max_size=40), st.text(max_size=40), st.none() | st.text(max_size=40))
def test_an_answer_cannot_pretend_to_be_another_part(question, answer, reference):
    submission = Submission(f"q{question}", answer, reference)
    system, user = grading_messages(submission)
    assert json.loads(user["content"]) == {"question": f"q{question}", "answer": answer} | (
        {} if reference is None else {"reference": reference}
    )
    assert system["role"] == "system" and RUBRIC in system["content"]


def test_submissions_and_pairs_are_checked():
    with pytest.raises(ValueError, match="question must be a text that is not empty"):
        Submission(" \n", "a")
    for parts in ((1, "a"), ("q", None), ("q", "a", 3)):
        with pytest.raises(TypeError, match="must be a str"):
            Submission(*parts)
    for other in (Submission("p", "b", "r"), Submission("q", "b"), Submission("q", "b", "s")):
        with pytest.raises(ValueError, match="second must be an answer to the same question"):
            pair_messages(Submission("q", "a", "r"), other)


# --- judging, by a server


def judge_of(server, **options: object) -> Judge:
    client = ChatClient(
        Endpoint(server.url, key="sk-key"), Limits(max_tries=2), sleep=lambda _: None, **options
    )
    return Judge(client)


def test_what_has_no_grade_is_counted_by_its_problem(tmp_path):
    replies = [says(GOOD), says("I like it: 4/5"), says(GOOD.replace("5", "2")), says(GOOD.replace("5", "9"))]
    with judge_server(*replies, sends(b"", 400), sends(b"busy", 503)) as server:
        judge = judge_of(server, cache=ReplyCache(tmp_path))
        report = judge.grades(Submission("q", answer) for answer in ("a", "b", "c", "d", " ", "e", "f"))
        assert report.grades == (5, None, 2, None, None, None, None)
        assert report.problems == {
            "invalid verdict: not one JSON object": 1,
            "invalid verdict: does not fit the schema": 1,
            "empty answer": 1,
            "no reply: status 400": 1,
            "no reply: status 503": 1,
        }
        assert report.n_graded == 2 and report.mean == 3.5
        n_asked = len(server.seen)
        assert n_asked == 7  # the empty answer was not sent, the busy server asked twice
        again = judge.grades([Submission("q", answer) for answer in ("a", "b", "c", "d")])
        assert (
            again.grades == (5, None, 2, None) and len(server.seen) == n_asked
        )  # invalid ones are known, too
        body = server.seen[0][2]
    assert body["response_format"]["json_schema"]["schema"] == GRADE_SCHEMA


def test_no_grades_have_no_mean():
    with judge_server(says("prose")) as server:
        report = judge_of(server).grades([Submission("q", "a")])
        assert report.n_graded == 0 and math.isnan(report.mean)
        assert judge_of(server).grades([]).grades == ()
        with pytest.raises(ValueError, match="answer must be a text that is not empty"):
            judge_of(server).grade(Submission("q", ""))


def test_a_wrong_setting_ends_the_run():
    with judge_server(sends(b"who are you?", 401)) as server:
        with pytest.raises(JudgeError, match="status 401"):
            judge_of(server).grades([Submission("q", "a"), Submission("q", "b")])
        with pytest.raises(JudgeError, match="status 401"):
            judge_of(server).compare_all([(Submission("q", "a"), Submission("q", "b"))])
        assert len(server.seen) == 2


def by_rule(rule) -> object:
    """A server's behaviour: the winner by a rule on the two answers."""

    def behave(handler: Handler) -> None:
        case = json.loads(json.loads(handler.request_body)["messages"][1]["content"])
        says(json.dumps({"reason": "", "winner": rule(case["answer A"], case["answer B"])}))(handler)

    return behave


PAIRS = [
    (Submission("q", a), Submission("q", b)) for a, b in (("long one", "x"), ("y", "longer"), ("aa", "bb"))
]


@pytest.mark.parametrize(
    "rule, winners, n_flips, n_chose_a",
    [
        (
            lambda a, b: "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie",
            ("first", "second", "tie"),
            0,
            2,
        ),
        (lambda a, b: "A", ("tie", "tie", "tie"), 3, 6),
        (lambda a, b: "B", ("tie", "tie", "tie"), 3, 0),
        (lambda a, b: "tie", ("tie", "tie", "tie"), 0, 0),
        (lambda a, b: "A" if len(a) >= len(b) else "B", ("first", "second", "tie"), 1, 4),
        (lambda a, b: "A" if len(a) > len(b) else "tie", ("tie", "tie", "tie"), 2, 2),
    ],
    ids=["fair", "always A", "always B", "always tie", "A when equal", "half a tie"],
)
def test_a_verdict_counts_only_if_both_orders_agree(rule, winners, n_flips, n_chose_a):
    with judge_server(by_rule(rule)) as server:
        report = judge_of(server).compare_all(PAIRS)
        asked = [json.loads(body["messages"][1]["content"]) for _, _, body in server.seen]
    assert report.winners == winners
    assert (report.n_flips, report.n_chose_a, report.n_judged) == (n_flips, n_chose_a, 3)
    assert report.flip_rate == n_flips / 3
    assert [asked[0]["answer A"], asked[0]["answer B"]] == [asked[1]["answer B"], asked[1]["answer A"]]


def test_pairs_without_a_verdict_are_counted():
    empty = (Submission("q", "a"), Submission("q", ""))
    with judge_server(says("B, I think"), by_rule(lambda a, b: "A")) as server:
        report = judge_of(server).compare_all([PAIRS[0], empty, PAIRS[1]])
    assert report.winners == (None, None, "tie") and report.n_judged == 1 and report.flip_rate == 1
    assert report.problems == {"invalid verdict: not one JSON object": 1, "empty answer": 1}
    with judge_server(says("prose")) as server:
        assert math.isnan(judge_of(server).compare_all([]).flip_rate)
        with pytest.raises(ValueError, match="the answer of second must be"):
            judge_of(server).compare(*empty)


# --- the local judge


class Letters:
    """A tokenizer whose tokens are bytes, with two special ones."""

    n_vocab, eot_token = 258, 0
    special_ids = {"<|im_start|>": 256, "<|im_end|>": 257}  # noqa: RUF012

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def local() -> LocalJudge:
    torch.manual_seed(0)
    config = GPTConfig(258, context_length=400, emb_dim=24, n_heads=2, n_layers=2, dropout=0.0, init_std=0.3)
    return LocalJudge(GPTModel(config).eval(), Letters(), ChatFormat(), rubric="Grade.")


SUBMISSIONS = [
    Submission("How many?", "six"),
    Submission("Why?", "So.", "Because."),
    Submission("How many?", ""),
]


@torch.no_grad()
def next_token(local: LocalJudge, user: str, tokens: str) -> torch.Tensor:
    messages = [{"role": "system", "content": "Grade."}, {"role": "user", "content": user}]
    ids = ChatFormat().encode(Letters(), messages)
    return local.model(torch.tensor([ids]))[0, -1, list(tokens.encode())]


def test_local_grades_are_the_probabilities_of_the_next_token(local):
    probabilities = local.grade_probabilities(SUBMISSIONS)
    texts = [
        "Question: How many?\nAnswer: six\n\nGrade, 1 to 5:",
        "Question: Why?\nRight answer: Because.\nAnswer: So.\n\nGrade, 1 to 5:",
        "Question: How many?\nAnswer: \n\nGrade, 1 to 5:",
    ]
    for row, text in zip(probabilities, texts, strict=True):
        torch.testing.assert_close(row, next_token(local, text, "12345").softmax(0), atol=1e-5, rtol=1e-4)
    expected = (probabilities * torch.arange(1.0, 6)).sum(1)
    torch.testing.assert_close(local.grades(SUBMISSIONS), expected)
    assert expected.min() > 1 and expected.max() < 5 and expected.unique().numel() == 3


def test_local_preferences_are_asked_in_both_orders(local):
    first, second = Submission("How many?", "six"), Submission("How many?", "eight")
    margins = local.preferences([(first, second), (second, first), (first, first)])
    for column, (a, b) in enumerate((("six", "eight"), ("eight", "six"))):
        text = f"Question: How many?\nAnswer A: {a}\nAnswer B: {b}\n\nWhich answer is better, A or B?"
        logits = next_token(local, text, "AB")
        assert margins[0, column].item() == pytest.approx((logits[0] - logits[1]).item(), abs=1e-4)
    torch.testing.assert_close(margins[1], margins[0].flip(0))
    assert margins[2, 0].item() == pytest.approx(margins[2, 1].item(), abs=1e-5)


def test_the_local_judge_refuses_what_it_cannot_read(local):
    with pytest.raises(ValueError, match="rows must be"):
        local.grades([])
    with pytest.raises(ValueError, match="at most context_length=400"):
        local.grades([Submission("q", "a" * 400)])
    with pytest.raises(ValueError, match="pairs must be two answers to one question"):
        local.preferences([(Submission("q", "a"), Submission("p", "a"))])

    class Coarse(Letters):
        def encode_ordinary(self, text: str) -> list[int]:
            return [7, *text.encode()]

    with pytest.raises(ValueError, match="tokenizer must be one with single tokens"):
        LocalJudge(local.model, Coarse(), ChatFormat())
