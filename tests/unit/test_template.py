import datetime
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from runtime.template import ChatTemplate, TemplateError

CHATML = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TOOLS = """{{- bos_token }}
{%- set ns = namespace(system='', tools=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {%- set ns.tools = ns.tools + 1 %}
    {%- endfor %}
{%- endif %}
{{- ns.system ~ ns.tools }}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message.tool_calls %}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{%- set inner = 1 %}{{- message.content }}{{- eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message.content }}{{ inner is defined }}
    {%- endif %}
    {%- if loop.index > 50 %}{%- break %}{%- endif %}
{%- endfor %}
{%- if undefined_name %}never{% endif %}{{ undefined_name }}{{ documents is none }}
{%- if add_generation_prompt %}{{- '>>' }}{%- endif %}"""

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": " Be <brief> & 'kind'.\n"},
    {"role": "user", "content": "Wie geht’s? 你好 {{ not.code }} {% raw %}"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"ü": "<b>"}}}]},
    {"role": "assistant", "content": "Gut."},
    {"role": "user", "content": "\ttrailing space \n\n"},
]
TOOL_LIST: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"a": 1.5, "b": [None, True]}}}]


def render(source: str, messages: list[dict[str, Any]] | None = None, most: int = 100_000, **options: Any) -> str:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, most=most, **tokens).render(messages or [], **options)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOL_LIST])
@pytest.mark.parametrize(
    ("source", "messages"), [(CHATML, CONVERSATION[:2]), (TOOLS, CONVERSATION), (TOOLS, CONVERSATION[1:2])]
)
def test_conversations_look_as_in_transformers(
    source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> None:
    rendered: Any = render_jinja_template(
        [messages],
        tools=list(tools) if tools else None,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    (expected,), _ = rendered
    assert render(source, messages, tools=tools, add_generation_prompt=add_generation_prompt) == expected
    assert expected


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.datetime.now().year + later) for later in (-1, 0)}


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(TemplateError, match="refuses"):
        render("{% set _ = messages.append(1) %}", messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_what_a_template_says_in_refusal_reaches_the_client() -> None:
    with pytest.raises(TemplateError, match="refuses the conversation: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("source", "content"),
    [("{{ messages[0].content + 'x' }}", ["parts"]), ("{{ 1 / 0 }}", ""), ("{{ messages[0]['content']['deep'].er }}", "x")],
)
def test_a_conversation_that_the_template_was_not_made_for_is_refused(source: str, content: object) -> None:
    with pytest.raises(TemplateError, match=r"chat template (cannot render|refuses) the conversation"):
        render(source, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''['__class__']['__base__'].__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(**{'__class__': 1}) }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% for _ in range(1000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_pythons_internals_are_out_of_reach(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_a_runaway_template_is_stopped() -> None:
    with pytest.raises(TemplateError, match="more than 1000 characters"):
        render("{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxxx{% endfor %}{% endfor %}", most=1000)


def test_a_template_may_fill_what_it_may() -> None:
    assert render("{{ 'x' * 1000 }}", most=1000) == "x" * 1000


def test_a_damaged_template_is_found_before_it_is_used() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        ChatTemplate("{% for %}", most=10)
