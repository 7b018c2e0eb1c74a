"""Foreign texts as they may be shown: without power over a terminal, without secrets."""

import re

_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SYMBOLS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
    | {code: f"\\u{code:04x}" for code in [*_BIDI, *range(0xD800, 0xE000)]}
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`]+")
_USER = re.compile(r"(?<=://)[^/?#]*@")
_VALUE = re.compile(r"([?&;#])([^=&;#]*=)?[^&;#]+")


def visible(text: str) -> str:
    """Return a text in which what would command a terminal, or turn its writing around, is shown as
    symbols; tabs and ends of lines stay.
    """
    return text.translate(_SYMBOLS)


def without_credentials(text: str) -> str:
    """Return a text in whose URLs user names, passwords and the values of queries are `***`.

    Which values are secrets (tokens, signatures) only the server knows, so none is shown.
    """
    return _URL.sub(lambda match: _hidden(match[0]), text)


def _hidden(url: str) -> str:
    return _VALUE.sub(r"\1\2***", _USER.sub("***@", url, count=1))
