"""Ids are the template's own, and the mask is where an independent account of each family's text
says that the answers are.
"""

import numpy as np
import pytest

from jaxtune.data.chat.tokenize import ConversationTokenizer, prompt_ids
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.sources.row import RowError
from tests.support import tools
from tests.support.chat_families import FAMILIES, MARKED, Family, tokenizer


def talk(*contents, system=None, **last):
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [
        {"role": roles[number % 2], "content": content} for number, content in enumerate(contents)
    ]
    messages[-1] |= last
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


TALKS = {
    "one turn": talk("What is the capital?", "Paris."),
    "three turns": talk("1+1?", "2", "and 2+2?", "4", "sure?", "yes"),
    "a system": talk("hello", "Grüße 🙂", system="Be brief."),
    "a system and three turns": talk(
        "hello", "hi", "again", "hi again", "bye", "bye", system="Be brief."
    ),
    "white space": talk("  padded \n", " padded too \n"),
    "answers that are words of the template": talk(
        "say it", "assistant", "again", "model", "and", "user"
    ),
    "answers within the end of turn": talk("say it", "end", "again", "im_end", "and", "<"),
    "answers within an empty thought": talk("say it", "think", "again", "h", "and", "\n"),
    "the same words all over": talk("a", "a", "a", "a", "a", "a"),
    "empty": talk("say nothing", ""),
    "signs of several bytes": talk("こんにちは", "Привет, мир 🙂🙂"),
    "ends with a question": talk("1+1?", "2", "and 2+2?"),
}


def masked(words, pieces):
    """Ids of a text in pieces, and which of them overlap a piece that is an answer; by the
    tokenizer's offsets alone.
    """
    text = "".join(piece for piece, _ in pieces)
    encoded = words(text, add_special_tokens=False, return_offsets_mapping=True)
    answer = np.repeat(
        [supervised for _, supervised in pieces], [len(piece) for piece, _ in pieces]
    )
    return encoded["input_ids"], [
        bool(answer[begin:end].any()) for begin, end in encoded["offset_mapping"]
    ]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_mask_of_every_family(name, kind):
    family = FAMILIES[name]
    words = tokenizer(family, kind)
    for title, messages in TALKS.items():
        if messages[0]["role"] == "system" and not family.system:
            (error,) = ConversationTokenizer(words, "responses")([Conversation("row", messages)])
            assert isinstance(error, RowError)
            assert "System role not supported" in str(error)
            continue
        wholly = family.account(messages)
        assert words.apply_chat_template(messages, tokenize=False) == "".join(
            piece for piece, _ in wholly
        ), title
        (documents,) = ConversationTokenizer(words, "responses")([Conversation("row", messages)])
        answers = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        through = [number + 1 for number in answers] if documents[0].rewritten else [len(messages)]
        assert documents[0].rewritten == rewrites(name, messages), title
        assert len(documents) == len(through)
        for document, end in zip(documents, through, strict=True):
            example = document.example()
            pieces = family.account(messages[:end])
            if documents[0].rewritten:  # only its own answer
                last = max(number for number, (_, answer) in enumerate(pieces) if answer)
                pieces = [
                    (piece, answer and number == last)
                    for number, (piece, answer) in enumerate(pieces)
                ]
            ids, mask = masked(words, pieces)
            assert (
                example.ids.tolist()
                == words.apply_chat_template(messages[:end])["input_ids"]
                == ids
            ), title
            assert example.supervised.tolist() == mask, title
        for number in answers:
            expected = words.apply_chat_template(messages[:number], add_generation_prompt=True)[
                "input_ids"
            ]
            assert prompt_ids(words, Conversation("row", messages[: number + 1])) == expected, title


def rewrites(name, messages):
    """Which families change earlier turns, and when."""
    turns = sum(message["role"] == "assistant" for message in messages)
    followed = messages[-1]["role"] != "assistant"
    if name == "mistral":
        return messages[0]["role"] == "system" and turns > 1
    return name == "qwen3" and turns + followed > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_many_rows_at_once_are_the_same_as_each_alone(name):
    """Rows like one that was seen before take a short way; it must lead to the same."""
    words = tokenizer(FAMILIES[name], "bytes")
    rows = [Conversation(title, messages) for title, messages in TALKS.items()]
    rows += [
        Conversation(f"{number}", talk(f"what is {number}?", f"{'it is' * (number % 3)} {number} "))
        for number in range(20)
    ]
    together = ConversationTokenizer(words, "responses")
    for _ in range(2):
        for row, documents in zip(rows, together(rows), strict=True):
            (alone,) = ConversationTokenizer(words, "responses")([row])
            assert isinstance(documents, RowError) == isinstance(alone, RowError)
            if not isinstance(documents, RowError):
                assert [(part.ids.tolist(), part.spans) for part in documents] == [
                    (part.ids.tolist(), part.spans) for part in alone
                ], row


@pytest.mark.parametrize("title", MARKED)
def test_marks_of_the_template_are_transformers_assistant_mask(title):
    words = tokenizer(Family(MARKED[title], None, "<|im_end|>", None), "bytes")
    for messages in TALKS.values():
        (documents,) = ConversationTokenizer(words, "responses")([Conversation("row", messages)])
        if documents[0].rewritten:
            continue
        encoded = words.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert documents[0].ids.tolist() == encoded["input_ids"]
        ours, theirs = documents[0].example().supervised, np.array(encoded["assistant_masks"], bool)
        # Of a last character that is several tokens transformers marks the first only; the others
        # complete it.
        extra = np.flatnonzero(ours & ~theirs)
        assert not (theirs & ~ours).any()
        assert all(
            "\ufffd" in words.decode(encoded["input_ids"][index]) and ours[index - 1]
            for index in extra
        )
        assert len(extra) == 0 or title != "chatml"
    messages = talk("1", "2", "3", "4", "5", "6")
    messages[3]["weight"] = 0.5
    messages[1]["weight"] = 0
    if title == "chatml":
        (documents,) = ConversationTokenizer(words, "responses")([Conversation("row", messages)])
        assert [
            (words.decode(documents[0].ids[span.begin : span.end]), span.weight)
            for span in documents[0].spans
        ] == [
            ("4<|im_end|>", 0.5),
            ("6<|im_end|>", 1.0),
        ]


def answers(words, messages, train_on="responses", **options):
    """The supervised texts and their weights."""
    (documents,) = ConversationTokenizer(words, train_on)(
        [Conversation("row", messages, options=options)]
    )
    assert not isinstance(documents, RowError), documents
    return [
        (words.decode(part.ids[span.begin : span.end]), span.weight)
        for part in documents
        for span in part.spans
    ]


def test_weights_of_messages_and_the_last_answer():
    words = tokenizer(FAMILIES["chatml"], "bytes")
    messages = talk("1", "2", "3", "4", "5", "6")
    messages[1]["weight"], messages[3]["weight"] = 0.25, 0
    assert answers(words, messages) == [("2<|im_end|>", 0.25), ("6<|im_end|>", 1.0)]
    assert answers(words, messages, "last") == [("6<|im_end|>", 1.0)]
    messages[5]["weight"] = 0
    assert answers(words, messages, "last") == []
    (error,) = ConversationTokenizer(words, "all")([Conversation("row", messages)])
    assert "needs data.train_on=responses" in str(error)
    example = tools.tokenize(words, Conversation("row", talk("1", "2")), "all")
    assert example.supervised.all()


def test_thoughts_are_what_the_assistant_says():
    words = tokenizer(FAMILIES["qwen3"], "bytes")
    messages = talk("1+1?", "2", reasoning_content="one and one")
    assert answers(words, messages) == [("<think>\none and one\n</think>\n\n2<|im_end|>", 1.0)]
    two = [*messages, *talk("sure?", "yes", reasoning_content="it is")]
    assert [text for text, _ in answers(words, two)] == [
        "<think>\none and one\n</think>\n\n2<|im_end|>",
        "<think>\nit is\n</think>\n\nyes<|im_end|>",
    ]
    (error,) = ConversationTokenizer(words, "responses")(
        [Conversation("row", talk("1+1?", "<think>\nhm\n</think>\n\n2"))]
    )
    assert "changes the text of messages[1]" in str(error)


def test_calls_of_tools_are_what_the_assistant_says_and_tools_reach_the_template():
    template = (
        "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif "
        "%}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + "
        "'</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    words = tokenizer(Family(template, None, "<|im_end|>", None), "bytes")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *talk("1+1?", "", tool_calls=[call]),
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    tools_ = [
        {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    ]
    assert [text for text, _ in answers(words, messages, tools=tools_)] == [
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
        "It is 2.<|im_end|>",
    ]
    (documents,) = ConversationTokenizer(words, "responses")(
        [Conversation("row", messages, options={"tools": tools_})]
    )
    assert (
        documents[0].ids.tolist() == words.apply_chat_template(messages, tools=tools_)["input_ids"]
    )


def test_a_template_that_prints_the_date_prints_the_day_of_the_run():
    from datetime import date

    template = (
        "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
        + tools.CHATML
    )
    words = tools.byte_tokenizer(template)
    row = Conversation("row", talk("1", "2"))
    ((then,),), ((today,),) = (
        ConversationTokenizer(words, "responses", day)([row]) for day in (date(2024, 2, 9), None)
    )
    assert "Today is 09 Feb 2024" in words.decode(then.ids)
    assert today.ids.tolist() == words.apply_chat_template(row.messages)["input_ids"]


def test_base_models_have_one_plain_format_in_training_and_generation():
    words = tools.byte_tokenizer(None, "</s>", add_bos=True)
    row = Conversation("row", talk("1", "2", "3", "4", system="Add."))
    example = tools.tokenize(words, row, "responses")
    whole = (
        "<s>### System:\nAdd.\n\n### User:\n1\n\n### Assistant:\n2</s>\n\n"
        "### User:\n3\n\n### Assistant:\n4</s>\n\n"
    )
    assert words.decode(example.ids) == whole
    assert words.decode(example.ids[example.supervised]) == "2</s>4</s>"
    prompt = prompt_ids(words, row)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert words.decode(prompt).endswith("### Assistant:\n")
