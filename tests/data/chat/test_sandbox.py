"""A chat template that takes too much is refused in a line, in seconds and little memory; every
other renders as in transformers.
"""

import resource
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtune.core.errors import UserError
from jaxtune.data.chat import sandbox
from jaxtune.data.chat.template import ChatTemplate
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.sources.row import RowLocation
from tests.support import tools

MESSAGES = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
]
NINE = "".join(f"{{% for i{n} in range(100000) %}}" for n in range(9))
HOSTILE = {
    "nested loops": NINE + "x" + "{% endfor %}" * 9,
    "nested loops of nothing": NINE + "{% endfor %}" * 9,
    "a long text": "{{ 'a' * 10**10 }}",
    "a long text of constants": "{{ 'a' * 100000 * 100000 }}",
    "a long list": "{{ ([1] * 10**9)|length }}",
    "a power": "{{ 10 ** 99999999 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='ab') %}"
    "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='ab') %}"
    "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}"
    "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by a block": "{% set x = 'ab' %}"
    + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40
    + "{{ x }}",
    "doubling by a macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}x"
    "{% endmacro %}{{ m(60) }}",
    "replace": "{{ ('a' * 9999)|replace('a', 'b' * 9999999) }}",
    "replace, the method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace again": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "join": "{{ (['a' * 9999999] * 9999)|join }}",
    "join, the method": "{{ ('a' * 9999999).join(['x'] * 9999) }}",
    "a width": "{{ 'a'|center(10000000000) }}",
    "a width, the method": "{{ 'a'.ljust(10000000000) }}",
    "a format": "{{ '%09999999999d' % 5 }}",
    "a format, the filter": "{{ '%9999999999s'|format(5) }}",
    "a format, the method": "{{ '{:>9999999999}'.format(5) }}",
    "a format with a width of its own": "{{ '{:>{}}'.format(5, 9999999999) }}",
    "an indent": "{{ ('x\\n' * 99999)|indent(99999) }}",
    "JSON": "{{ [[[1]]]|tojson(indent=9999999999) }}",
    "bytes": "{{ (5).to_bytes(9999999999, 'big') }}",
    "slices": "{{ 'abc'|slice(9999999999)|list }}",
    "batches": "{{ 'abc'|batch(9999999999, 'x')|list }}",
    "lorem ipsum": "{{ lipsum(999999) }}",
    "kept slices": "{% set n = namespace(x=[]) %}{% set s = 'a' * 99999999 %}"
    "{% for i in range(9999) %}{% set n.x = n.x + [s[1:]] %}{% endfor %}",
    "kept capitals": "{% set n = namespace(x=[]) %}{% set s = 'a' * 99999999 %}"
    "{% for i in range(9999) %}{% set n.x = n.x + [s.upper()] %}{% endfor %}",
    "output": "{% set s = 'a' * 9999999 %}{% for i in range(9999) %}{{ s }}{% endfor %}",
    "a mapped filter": "{{ (range(99999)|map('center', 99999)|list)|length }}",
    "a recursive loop": "{% for a in [[1] * 30] * 30 recursive %}"
    "{{ loop([[1] * 30] * 30) }}{% endfor %}",
    "only for some rows": "{% if 'question' in messages[0].content %}"
    + NINE
    + "{% endfor %}" * 9
    + "{% endif %}",
    "a long source": "{# " + "x" * (2 << 20) + " #}",
}


def render(template, messages=MESSAGES):
    words = tools.byte_tokenizer(None, "</s>")
    conversation = Conversation(RowLocation("rows.jsonl", 3), messages)
    return ChatTemplate(words, template).render([(conversation, False)])[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_much_is_refused_in_a_line(name, monkeypatch):
    monkeypatch.setattr(sandbox, "_SECONDS", 1.0)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = render(HOSTILE[name])
    except UserError as error:
        result = error
    assert isinstance(result, UserError)  # of the row, where Jinja itself refuses
    assert str(result).startswith("rows.jsonl:3: the chat template ")
    assert "\n" not in str(result)
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
        "{{ m.role ~ ':' ~ m['content'] }}"
        "{% if not loop.last %}{{ loop.nextitem.role }}{% endif %}{% endfor %}",
        "{{ '-' * 20 }}{{ messages|tojson(indent=2) }}"
        "{{ messages[::-1]|map(attribute='role')|join(', ') }}",
        "{{ '%s=%5.2f' % ('x', 2) }}{{ '{:>8}|{}'.format('a', 2) }}"
        "{{ 2 ** 10 }}{{ 7 % 3 }}{{ [1] + [2] }}",
        "{% macro m(x) %}<{{ x|upper }}>{% endmacro %}"
        "{% for m_ in messages %}{{ m(m_.role) }}{% endfor %}",
        "{% set n = namespace(s='') %}{% for m in messages %}{% set n.s = n.s + m.content[2:] %}"
        "{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}"
        "{{ n.s }}{{ nothing ~ 1 }}",
        "{% for k, v in messages[0].items() recursive %}{{ k }}{% endfor %}"
        "{{ missing|default(99999999) }}",
        "{{ 'a\\tb\\nc'|indent(4) }}{{ 'abc'.replace('b', 'xx')"
        ".split('x')|length }}{{ 1700000000|string }}",
    ],
)
def test_what_takes_little_renders_as_in_transformers(template):
    expected = render_jinja_template([MESSAGES], chat_template=template)[0][0]
    assert render(template) == expected
