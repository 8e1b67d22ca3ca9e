import datetime
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from runtime.template import ChatTemplate, Shape, TemplateError

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
    return ChatTemplate(source, most=most, tokens=tokens).render(messages or [], **options)


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


@pytest.mark.parametrize("source", ["{{ " + "(" * 3000 + ")" * 3000 + " }}", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30])
def test_a_template_that_is_nested_too_deeply_is_no_template(source: str) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError, match="it cannot be compiled: "):
        ChatTemplate(source, most=10)


def expected_continuation(source: str, messages: list[dict[str, Any]]) -> str:
    rendered: Any = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    (expected,), _ = rendered
    return str(expected)


TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
MANY_PARTS = """{% for message in messages %}{{ message.role }}:{% for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}{% if add_generation_prompt %}>>{% endif %}"""


@pytest.mark.parametrize("source", [CHATML, TRIMMED])
@pytest.mark.parametrize("content", ["Sure, it", "Sure, it ", " It\n\n", "x<|im_end|>", ""])
def test_the_final_message_is_continued_as_in_transformers(source: str, content: str) -> None:
    messages = [*CONVERSATION[:2], {"role": "assistant", "content": content}]
    rendered = render(source, messages, continue_final_message=True)
    assert rendered == expected_continuation(source, messages)
    assert rendered.endswith(content if source == CHATML else content.strip() or "assistant")
    assert messages[-1]["content"] == content


def test_the_last_text_part_is_continued() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts[:1]}, {"role": "assistant", "content": parts}]
    assert render(MANY_PARTS, messages, continue_final_message=True) == "user:one ;assistant:one two"
    assert render(MANY_PARTS, messages, continue_final_message=True) == expected_continuation(MANY_PARTS, messages)


@pytest.mark.parametrize(
    ("source", "messages", "match"),
    [
        (CHATML, [], "no text"),
        (CHATML, [{"role": "assistant", "content": None}], "no text"),
        (MANY_PARTS, [{"role": "assistant", "content": [{"type": "image"}]}], "no text"),
        ("{{ messages[0].role }}", [{"role": "assistant", "content": "x"}], "leaves out"),
    ],
)
def test_what_cannot_be_continued_is_refused(source: str, messages: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(TemplateError, match=match):
        render(source, messages, continue_final_message=True)


def test_a_template_gets_options_and_documents() -> None:
    source = "{{ enable_thinking }}{{ self_made | default('-') }}{{ documents[0].title }}"
    options = {"enable_thinking": False, "self": 1}
    assert render(source, documents=[{"title": "T"}], options=options) == "False-T"
    assert render("{{ eos_token }}", options={"eos_token": "<end>"}) == "<end>"


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt"])
def test_options_do_not_replace_the_conversation(name: str) -> None:
    with pytest.raises(TemplateError, match=f"'{name}' cannot be set"):
        render(CHATML, CONVERSATION[:2], options={name: []})


def test_options_reach_pythons_internals_no_more_than_messages_do() -> None:
    for source in ("{{ x.__class__.__mro__ }}", "{{ x.append(1) }}", "{{ x.__len__() }}"):
        with pytest.raises(TemplateError):
            render(source, options={"x": [1]})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, Shape(results=True)),
        (TOOLS, Shape(tools="variable", calls=True, results=True)),
        (MANY_PARTS, Shape(results=True, parts=True)),
        (
            "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' else m.content }}{% endfor %}",
            Shape(system=False, results=True),
        ),
        ("{% for m in messages if m.role != 'tool' %}{{ m['content'] }}{% endfor %}", Shape(results=True)),
        ("{% for m in messages if m.role in ['system', 'user'] %}{{ m['content'] }}{% endfor %}", Shape()),
        ("{{ messages[0]['tools'] }}", Shape(tools="system message", system=False)),
        ("{% if tools is defined %}{% endif %}", Shape(tools="variable", system=False)),
        ("{% set tools = 1 %}", Shape(system=False)),
        # Contents as parts.
        ("{% if m.content is string %}{% else %}{% for part in m.content %}{% endfor %}{% endif %}", Shape(system=False)),
        ("{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{% endfor %}", Shape(system=False, parts=True)),
        ("{% set inner = m.content %}{% for part in inner %}{% endfor %}", Shape(system=False, parts=True)),
        ("{% set inner = m.content %}{% for part in inner %}{% endfor %}{{ inner is not string }}", Shape(system=False)),
        ("{% for line in m.content.split() %}{% endfor %}", Shape(system=False)),
        # A call's arguments.
        ("{{ '{' + call.arguments + '}' }}", Shape(system=False, arguments="text")),
        ("{{ call['function']['arguments'] }}", Shape(system=False, arguments="text")),
        ("{{ call.name ~ call.arguments }}", Shape(system=False, arguments="text")),
        (
            "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}",
            Shape(system=False),
        ),
        ("{% for name, value in call.arguments | items %}{% endfor %}", Shape(system=False)),
        ("{{ call.function | tojson }}", Shape(system=False)),
        ("{{ call.arguments | tojson }}", Shape(system=False)),
    ],
)
def test_what_a_template_takes_is_read_from_its_text(source: str, expected: Shape) -> None:
    assert ChatTemplate(source, most=10_000, tokens={"bos_token": "<s>", "eos_token": "</s>"}).shape == expected
