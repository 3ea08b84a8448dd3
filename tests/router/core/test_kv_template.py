"""Chat templates rendered by the router's compiler, and by plain Jinja with transformers' settings: the same text, or both refuse."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache, partial
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvfleet_router.core.kvevents.codec import Unusable
from kvfleet_router.core.kvevents.template import ChatTemplate
from kvfleet_sim.chat import CHAT_TEMPLATE

TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "llama": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|h|>system\\n\\n' + date_string + system }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|e|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
    {%- else %}
        {{- '<|h|>ipython' }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|h|>assistant\\n\\n' }}{%- endif %}""",
    "strict turns": """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}""",
    "namespace and loops in loops": """{% set ns = namespace(last=-1, calls=0) %}
{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for message in messages %}
{{ loop.index }}/{{ loop.length }}{% if loop.index0 > ns.last %} new{% endif %}{% if loop.previtem is defined %} after{% endif %}
{% for call in message.tool_calls or [] %}{% set ns.calls = ns.calls + 1 %}[{{ loop.first }} {{ loop.last }} {{ call['function']['name'] }}]
{% for name in call.function.arguments %}{{ name }}:{{ loop.revindex }} {% endfor %}{% endfor %}{{ loop.cycle('a', 'b') }}
{% endfor %}{{ ns.calls }}{{ ns.none }}""",
    "filtered, else, recursive": """{% for message in messages if message.role != 'system' %}
{{ loop.index }}{{ message.content }}{% else %}nobody{% endfor %}
{% for message in messages recursive %}{{ message.role }}{% if message.tool_calls %}{{ loop(message.tool_calls) }}{% endif %}{% endfor %}
{% for message in messages %}{% if message.role == 'tool' %}{% continue %}{% endif %}{{ message.name }}{% break %}{% endfor %}""",
    "names that dictionaries have": """{% for message in messages %}{{ message.items is defined }}{{ message['keys'] is callable }}
{% for key, value in message.items() %}{{ key }}={{ value }};{% endfor %}{{ message.get('name', 'nobody') }}{{ message.pop is defined }}
{{ message.values or 'none' }}{{ message.missing or message['gone'] or 'neither' }}{% endfor %}""",
    "undefined": """{% for message in messages %}{{ message.missing }}{{ message.missing is defined }}{{ message['missing'] is none }}
{{ message.content.missing or 'x' }}{{ (message.tool_calls | default([])) | length }}{{ nothing.at.all if nothing else '' }}
{{ (message.missing or {}).deeper or 'y' }}{% endfor %}""",
    "macros": """{% macro turn(message, mark='#') %}{{ mark }}{{ message.role }}{{ caller() if caller }}{{ message.name or mark }}{% endmacro %}
{% for message in messages %}{{ turn(message) }}{% call turn(message, mark=message.role) %}{{ message.content }}{{ loop.index }}
{% endcall %}{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}""",
    "assignments in loops": """{% set seen = 'none' %}{% set loop_like = messages %}
{% for message in messages %}{% set seen = message.role %}{{ seen }}{% for part in [] %}{{ loop.index }}{% set seen = part %}{% endfor %}
{{ seen }}{% for a, b in [(message.role, message.content)] %}{{ a }}{{ b }}{% endfor %}{% endfor %}{{ seen }}{{ message is defined }}""",
    "what the sandbox forbids": "{{ messages[0].__class__ }}{{ messages[0]['__class__'] or 'no' }}{{ messages.__init__ or 'no' }}",
    "writes": "{{ messages[0].update({'role': 'x'}) }}",
    "of what is not there": "{{ messages[0].nothing.deeper or 'y' }}",
    "text as parts": """{% for message in messages %}{% for part in message.content %}{{ part.text or part }}{{ loop.index }}{% endfor %}
{% endfor %}""",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime(2026, 11, 22)


class Transparent(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def plain(source: str) -> jinja2.Template:
    """As transformers sets Jinja up."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Transparent, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: NOW.strftime(form)
    return environment.from_string(source, globals=SPECIAL)


@cache
def ours(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, now=lambda: NOW)


def outcome(render: Any) -> str | type:
    try:
        return str(render())
    except Exception as error:  # templates may raise anything
        return type(error)


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
CALL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": TEXT, "arguments": st.dictionaries(TEXT, st.integers())}),
    }
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT},
    optional={
        "tool_calls": st.lists(CALL, max_size=3),
        "name": TEXT,
        "items": TEXT,
        "missing": st.none() | TEXT,
        "get": TEXT,
    },
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None)
@given(messages=st.lists(MESSAGE, max_size=4), generation=st.booleans(), tools=st.none() | st.lists(CALL, max_size=2))
def test_the_same_text_as_plain_jinja(name: str, messages: list[Any], generation: bool, tools: list[Any]) -> None:
    source = TEMPLATES[name]
    variables = {"messages": messages, "tools": tools, "add_generation_prompt": generation}
    expected = outcome(lambda: plain(source).render(variables))
    assert outcome(lambda: ours(source).render(**variables)) == expected


def test_templates_are_not_all_refused() -> None:
    """The comparison above compares texts, not two refusals."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    variables = {"messages": turns, "tools": None}
    outcomes = {name: outcome(partial(plain(source).render, variables)) for name, source in TEMPLATES.items()}
    refused = {name for name, text in outcomes.items() if not isinstance(text, str)}
    assert refused <= {"what the sandbox forbids", "writes", "of what is not there"}


def test_a_template_that_assigns_to_loop_is_refused() -> None:
    with pytest.raises(Unusable):
        ChatTemplate("{% for loop in messages %}{{ loop }}{% endfor %}", {}, now=lambda: NOW)
