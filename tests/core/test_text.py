"""Foreign texts have no power over a terminal."""

import pytest

from jaxtune.core.text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 🙂\tx\ny", "plain é 🙂\tx\ny"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("safe\revil\x08\x00\x7f", "safe␍evil␈␀␡"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202eb\u2066c\u200f", "a\\u202eb\\u2066c\\u200f"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_what_commands_a_terminal_is_shown_as_symbols(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown
    shown.encode()
