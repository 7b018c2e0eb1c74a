"""A conversation: the model's own template, commands, and Ctrl-C in a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from io import StringIO

import pytest
from rich.console import Console

from jaxtune.inference.chat import Chat, ChatModel
from jaxtune.inference.sampling import Sampling
from jaxtune.weights.load import load_model
from jaxtune.weights.loaded import LoadedModel
from jaxtune.weights.source import resolve
from tests.support import tools

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def loaded(chat_model, one_device):
    source = resolve(str(chat_model))
    return LoadedModel(
        load_model(source, one_device), source.tokenizer(), source.stop_ids(), source
    )


class Typed:
    """Lines that a user writes; an exception is raised in their place."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def talk(loaded, *lines, base=None, system=None, sampling=None):
    out = StringIO()
    model = ChatModel(loaded, sampling or Sampling(), 8)
    chat = Chat(
        model,
        base and (lambda: ChatModel(base, Sampling(), 8)),
        system,
        Console(file=out, width=100),
        Typed(*lines),
    )
    chat.run()
    return chat, out.getvalue()


def roles(chat):
    return [message["role"] for message in chat.messages]


def test_a_conversation_is_read_through_the_models_own_template(loaded):
    chat, out = talk(loaded, "hello", "and \\", "more", system="be brief")
    assert roles(chat) == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[3]["content"] == "and \nmore"
    for length in (2, 4):
        expected = loaded.tokenizer.apply_chat_template(
            chat.messages[:length], add_generation_prompt=True
        )["input_ids"]
        assert chat.model.prompt(chat.messages[:length]) == expected
        answer = chat.model.engine.answers([expected], 8)[0].tokens
        text = loaded.tokenizer.decode(answer, skip_special_tokens=True)
        assert chat.messages[length]["content"] == text
        assert text in out


def test_commands(loaded):
    chat, out = talk(
        loaded,
        "/help",
        "/nothing",
        "/retry",
        "/base",
        "hello",
        "/base",
        "/system be kind",
        "again",
        "",
        "/quit",
        "unread",
    )
    for text in (
        "/system [TEXT]",
        "There is no /nothing",
        "There is no answer yet",
        "no model before training",
    ):
        assert text in out
    assert [message["content"] for message in chat.messages[:2]] == ["be kind", "again"]
    assert talk(loaded, "hello", "/new")[0].messages == []


def test_another_answer_is_another_draw(loaded):
    chat, _ = talk(loaded, "hello", sampling=Sampling(temperature=1.5))
    again, _ = talk(loaded, "hello", "/retry", sampling=Sampling(temperature=1.5))
    assert roles(again) == ["user", "assistant"]
    assert again.messages != chat.messages


def test_the_untuned_model_answers_the_same_question_beside(loaded, one_device, tmp_path):
    path = tools.save_model(tmp_path, tools.tiny_config(), tools.byte_tokenizer(), seed=9)
    source = resolve(str(path))
    other = LoadedModel(
        load_model(source, one_device), source.tokenizer(), source.stop_ids(), source
    )
    chat, out = talk(loaded, "hello", "/base", base=other)
    expected, _ = talk(other, "hello")
    assert "before training" in out
    beside = "".join(
        line.split("│")[2].strip() for line in out.splitlines() if line.startswith("│")
    )
    assert re.sub(r"\s", "", beside) == re.sub(r"\s", "", expected.messages[1]["content"])
    assert roles(chat) == ["user", "assistant"]


def test_ctrl_c_between_answers_begins_a_new_conversation(loaded):
    chat, out = talk(loaded, "hello", KeyboardInterrupt(), "again")
    assert "a new conversation" in out
    assert [message["content"] for message in chat.messages[:1]] == ["again"]


def test_a_conversation_longer_than_the_model_says_so(loaded):
    chat, out = talk(loaded, "x" * 600)
    assert "begin a new one: /new" in out.lower()
    assert chat.messages == []


def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(chat_model):
    """The real program on a pseudo-terminal: the answer of up to 400 tokens comes in pieces, and
    is cut off.
    """
    parent_end, child_end = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "jaxtune",
        "chat",
        str(chat_model),
        "--max-new-tokens",
        "400",
        "--temperature",
        "1.5",
    ]
    process = subprocess.Popen(
        command,
        stdin=child_end,
        stdout=child_end,
        stderr=child_end,
        env=tools.child_environment() | {"TERM": "dumb"},
        start_new_session=True,
    )
    os.close(child_end)
    seen = b""

    def wait_for(is_shown, seconds=200):
        nonlocal seen
        end = time.monotonic() + seconds
        while not is_shown(seen):
            assert time.monotonic() < end, seen.decode(errors="replace")
            if select.select([parent_end], [], [], 0.2)[0]:
                seen += os.read(parent_end, 4096)

    try:
        wait_for(lambda text: b"> " in text)
        os.write(parent_end, b"hello\n")
        start = len(seen)
        wait_for(lambda text: len(text) > start + 60)
        process.send_signal(signal.SIGINT)  # as a terminal does on Ctrl-C
        wait_for(lambda text: text.count(b"> ") >= 2 and b" ..." in text)
        assert process.poll() is None
        os.write(parent_end, b"/new\n/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(parent_end)
