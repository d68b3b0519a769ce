"""Conversations over one cache: equal to starting anew, stopped at any place, and never longer than allowed."""

import pytest
import torch

from shared.generation.conversation import Conversation
from shared.generation.engine import generate
from shared.generation.options import GenerationOptions
from shared.model.gpt import GPTConfig, GPTModel
from shared.text.chat_format import ChatFormat
from shared.text.tokenizer import BPETokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENIZER = BPETokenizer.train("user\nassistant\nsystem\nWhat is the capital of France? " * 9, 290, SPECIAL)


def small_model(dtype: torch.dtype = torch.float64) -> GPTModel:
    torch.manual_seed(0)
    config = GPTConfig.preset("tales-tiny", vocab_size=320, context_length=512, init_std=0.3)
    return GPTModel(config).to(dtype).eval()


MODEL = small_model()


def conversation(**options: object) -> Conversation:
    options = {"options": GenerationOptions(temperature=0, max_new_tokens=12), **options}
    return Conversation(MODEL, TOKENIZER, ChatFormat("Be kind."), **options)


def say(talk: Conversation, text: str) -> str:
    return "".join(talk.reply(text))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_reply_equals_that_of_a_conversation_which_starts_anew(temperature):
    options = GenerationOptions(temperature=temperature, top_k=20, max_new_tokens=12, seed=5)
    lasting = conversation(options=options)
    for number, text in enumerate(("What is it?", "And of Italy?", "Why?", "")):
        anew = conversation(options=options)
        anew.messages = list(lasting.messages)
        assert say(anew, text) == say(lasting, text)
        assert anew.messages == lasting.messages
        assert anew.n_kept == 0 and (lasting.n_kept > 0) == (number > 0)
        assert anew.n_read == lasting.n_read + lasting.n_kept
    assert [message["role"] for message in lasting.messages] == ["user", "assistant"] * 4


def test_a_reply_is_what_the_engine_writes():
    talk, stops = conversation(), list(TOKENIZER.special_ids.values())
    ids = talk.prompt([{"role": "user", "content": "What is it?"}])
    expected = generate(MODEL, [ids], 12, stop_tokens=stops)[0]
    assert say(talk, "What is it?") == TOKENIZER.decode(expected)
    assert ids == ChatFormat("Be kind.").encode(TOKENIZER, talk.messages[:1])


def test_a_changed_past_is_read_anew():
    talk = conversation()
    say(talk, "What is it?")
    say(talk, "And then?")
    talk.messages[0] = {"role": "user", "content": "Who is it?"}
    anew = conversation()
    anew.messages = list(talk.messages)
    assert say(talk, "Why?") == say(anew, "Why?")
    assert talk.n_kept < talk.n_read


def test_a_stopped_reply_is_remembered_as_far_as_it_went():
    talk = conversation()
    say(talk, "What is it?")
    pieces = talk.reply("And then?")
    said = next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    anew = conversation()
    anew.messages = list(talk.messages)
    assert say(talk, "Why?") == say(anew, "Why?")


def test_a_broken_pass_leaves_a_conversation_that_goes_on():
    talk = conversation()
    say(talk, "What is it?")
    hook = MODEL.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        say(talk, "And then?")
    hook.remove()
    anew = conversation()
    anew.messages = list(talk.messages)
    assert say(talk, "Why?") == say(anew, "Why?")


def test_the_oldest_turns_are_forgotten_and_the_system_message_is_not():
    talk = conversation(max_length=120)
    for number in range(8):
        say(talk, f"Question {number}?")
        anew = conversation(max_length=120)
        anew.messages = list(talk.messages[:-2])
        assert say(anew, f"Question {number}?") == talk.messages[-1]["content"]
    ids = talk.prompt(talk.messages)
    text = TOKENIZER.decode(ids)
    assert len(ids) + 12 <= 121 and text.startswith("<|im_start|>system\nBe kind.")
    assert "Question 0?" not in text and "Question 7?" in text
    assert text.split("<|im_start|>")[2].startswith("user")  # whole turns only
    assert len(talk.messages) == 16


def test_a_message_that_is_too_long_is_refused_and_nothing_is_said():
    talk = conversation(max_length=60)
    with pytest.raises(ValueError, match="the message has too many tokens"):
        talk.reply("x" * 100)
    assert talk.messages == []


def test_no_special_token_stands_in_a_reply():
    options = GenerationOptions(temperature=5.0, max_new_tokens=200, seed=1)
    talk = conversation(options=options)
    for _ in range(3):
        reply = say(talk, "Go on")
        assert not any(name in reply for name in SPECIAL)


def test_the_mode_of_the_model_between_pieces_is_its_own():
    model = small_model()
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    talk = Conversation(
        model, TOKENIZER, ChatFormat(), options=GenerationOptions(temperature=0, max_new_tokens=4)
    )
    for _ in talk.reply("What is it?"):
        assert [module.training for module in model.modules()] == modes
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 513}, "max_length must be"),
        ({"max_length": 12}, "max_length must be above max_new_tokens=12"),
        ({"options": GenerationOptions(stop_strings=["."])}, "stop_strings"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        conversation(**options)


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match="content must be a str"):
        conversation().reply(7)
