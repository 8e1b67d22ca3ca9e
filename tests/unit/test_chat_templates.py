"""Chat templates from a model's folder to a prompt, beside transformers' own `apply_chat_template` on that folder."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf import GGUFWriter
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from export.errors import ExportError
from export.tokenizer import TextSide, checked, read_template, read_text, write_text
from export.tools import detect
from runtime import bundle
from runtime.bundle import FORMAT, Bundle, Source
from runtime.text import Text, TextError
from tests import tiny

NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "<sep>",
    "pad_token": "<pad>",
    "cls_token": "<cls>",
    "mask_token": "<mask>",
}
EXTRA = {"image_token": "<image>", "tool_token": "<tool>"}
EVERY = "".join("{{ " + name + " }}" for name in (*NAMED, *EXTRA))
DEFAULT = (
    EVERY + "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TOOL_USE = (
    "{{ tool_token }}{% for t in tools %}{{ t | tojson }}{{ sep_token }}{% endfor %}{{ pad_token }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
)
RAG = "{% for d in documents %}{{ d.title }} = {{ d.text }}{{ sep_token }}{% endfor %}{{ messages[-1].content }}{{ cls_token }}"
TEMPLATES = {"default": DEFAULT, "tool_use": TOOL_USE, "rag": RAG}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie heißt du? 123", "name": None},
    {"role": "assistant", "content": "Ada", "reasoning": "a name"},
    {"role": "user", "content": "And <sep> then?"},
]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
DOCUMENTS = [{"title": "Ulm", "text": "a town"}, {"title": "Rom", "text": "another"}]


def save(folder: Path, templates: Any, *, apart: bool = False) -> Path:
    """A model's folder with these templates: in tokenizer_config.json, or as files of their own."""
    folder.mkdir(exist_ok=True)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*NAMED.values(), *EXTRA.values())])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMED).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"extra_special_tokens": EXTRA}
    if apart:
        (folder / "additional_chat_templates").mkdir()
        for name, source in templates.items():
            where = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (folder / where).write_text(source)
    elif templates is not None:
        config["chat_template"] = templates
    path.write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def listed(templates: dict[str, str]) -> list[dict[str, str]]:
    """As tokenizer_config.json has several."""
    return [{"name": name, "template": source} for name, source in templates.items()]


def bundled(side: TextSide, folder: Path) -> Text:
    """The text side as the runtime has it, from a bundle's folder."""
    folder.mkdir()
    files = tuple(bundle.describe(folder, path) for path in write_text(side, folder))
    tokens = dict(side.special_tokens)
    return Text.load(folder, Bundle(FORMAT, "t", Source("folder", "t"), "llama", 600, 4096, (), tokens, files, (), 0))


def expected(folder: Path, messages: Any = CHAT, **options: Any) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer.apply_chat_template(
        messages, **({"add_generation_prompt": True, "return_dict": False} | options)
    )
    return ids


@pytest.mark.parametrize("apart", [False, True], ids=["in the configuration", "files of their own"])
def test_every_template_gives_the_tokens_of_transformers(tmp_path: Path, apart: bool) -> None:
    folder = save(tmp_path / "model", TEMPLATES if apart else listed(TEMPLATES), apart=apart)
    text = bundled(read_text(folder), tmp_path / "bundle")
    assert set(text.templates) == set(TEMPLATES)
    assert text.chat(CHAT) == expected(folder)
    assert text.chat(CHAT, tools=[WEATHER]) == expected(folder, tools=[WEATHER]) != text.chat(CHAT)
    asked = text.chat(CHAT, documents=DOCUMENTS, template=text.choose("rag"))
    assert asked == expected(folder, documents=DOCUMENTS, chat_template="rag")
    assert text.chat(CHAT, add_generation_prompt=False) == expected(folder, add_generation_prompt=False)
    left = expected(folder, continue_final_message=True, add_generation_prompt=False)
    assert text.chat(CHAT, continue_final_message=True) == left
    for tokens in (text.chat(CHAT), text.chat(CHAT, tools=[WEATHER]), asked):
        assert {text.special_id(token) for token in NAMED.values()} & set(tokens), "special tokens are tokens"


def test_all_special_tokens_are_there_for_a_template(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", EVERY)
    side = read_text(folder)
    assert side.special_tokens == NAMED | EXTRA
    text = bundled(side, tmp_path / "bundle")
    assert text.decode(text.chat(CHAT)) == "".join([*NAMED.values(), *EXTRA.values()])
    assert text.chat(CHAT) == expected(folder)


def test_a_variable_of_the_request_takes_a_tokens_place_as_in_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", EVERY)
    text = bundled(read_text(folder), tmp_path / "bundle")
    assert text.chat(CHAT, options={"pad_token": "P"}) == expected(folder, pad_token="P") != text.chat(CHAT)


def test_reasoning_is_there_by_the_names_that_templates_know(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ 'name' in m }};{% endfor %}"
    folder = save(tmp_path / "model", source)
    text = bundled(read_text(folder), tmp_path / "bundle")
    assert text.chat(CHAT) == expected(folder)
    assert "a name|a name|False;" in text.decode(text.chat(CHAT))


def test_without_a_default_one_must_be_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", listed({"tool_use": TOOL_USE, "rag": RAG}))
    text = bundled(read_text(folder), tmp_path / "bundle")
    assert text.chat(CHAT, tools=[WEATHER]) == expected(folder, tools=[WEATHER])
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        expected(folder)
    with pytest.raises(TextError, match="none of them is the default; name one of rag, tool_use"):
        text.chat(CHAT)
    with pytest.raises(TextError, match="has no chat template called 'default'; it has rag, tool_use"):
        text.choose("default")


def test_the_calls_of_tools_are_looked_for_in_the_template_for_them(tmp_path: Path) -> None:
    assert detect(read_text(save(tmp_path / "both", listed(TEMPLATES)))) == "hermes"
    assert detect(read_text(save(tmp_path / "one", DEFAULT))) is None


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "a b", None, 7])
def test_a_name_that_is_no_files_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "model", listed({"default": DEFAULT, name: RAG}))
    with pytest.raises(ExportError, match="that cannot be kept"):
        read_text(folder)


@pytest.mark.parametrize(
    ("templates", "sentence"),
    [
        ([{"name": "default", "template": 7}], "has a chat template 'default' that cannot be kept"),
        (5, "has a chat template 'default' that cannot be kept"),
        ([{"template": "x"}], r"tokenizer_config\.json has a list as its chat_template, and an entry of that has no name"),
        (["x"], r"tokenizer_config\.json has a list as its chat_template, and an entry of that has no name"),
    ],
)
def test_a_template_that_is_no_text_is_refused(tmp_path: Path, templates: Any, sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        read_text(save(tmp_path / "model", templates))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_templates_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "model", TEMPLATES, apart=True) / name
    path.write_bytes(b"{{ '\xff' }}")
    with pytest.raises(ExportError, match=rf"^the chat template {path} is not UTF-8 text"):
        read_text(tmp_path / "model")
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ExportError, match=rf"^the chat template {path} cannot be read: No such file or directory"):
        read_text(tmp_path / "model")


TOO_DEEP = {
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "conditions": "{% if 1 %}" * 400 + "{% endif %}" * 400,
    "loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "a number": "{{ " + "9" * 5000 + " }}",
}


@pytest.mark.parametrize("kind", TOO_DEEP)
def test_a_template_that_cannot_be_compiled_is_refused(tmp_path: Path, kind: str) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(TOO_DEEP[kind])
    for read in (lambda: read_text(save(tmp_path / "model", TOO_DEEP[kind])), lambda: read_template(own)):
        with pytest.raises(ExportError) as refused:
            read()
        assert "is not valid jinja2 (line 1: it cannot be compiled: " in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_special_token_may_have_any_name(tmp_path: Path) -> None:
    tokens = {"most": "<image>", "source": "<tool>", "self": "<sep>", "tokens": "<pad>"}
    folder = save(tmp_path / "model", "{{ most }}{{ source }}{{ tokens }}{{ messages[-1].content }}")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": tokens}))
    side = checked(read_text(folder), 10_000, folder)
    assert tokens.items() <= side.special_tokens.items()
    text = bundled(side, tmp_path / "bundle")
    assert text.decode(text.chat(CHAT)).startswith("<image><tool><pad>")


def test_a_template_of_ones_own_takes_the_place_of_all(tmp_path: Path) -> None:
    folder, own = save(tmp_path / "model", listed(TEMPLATES)), tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}{{ messages[0].content }}")
    side = read_text(folder, template=read_template(own))
    assert side.templates == {"default": own.read_text()}
    assert bundled(side, tmp_path / "bundle").chat(CHAT, tools=[WEATHER]) == expected(
        folder, chat_template=own.read_text(), tools=[WEATHER]
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the chat template .*own.jinja cannot be read: No such file"),
        (b"\xff", "the chat template .*own.jinja is not UTF-8 text"),
        (b"{% if %}", r"the chat template of .*own.jinja is not valid jinja2 \(line 1: .*\); correct it there"),
    ],
)
def test_a_template_of_ones_own_that_is_none_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    own = tmp_path / "own.jinja"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(ExportError, match=sentence):
        read_template(own)


def test_a_template_of_ones_own_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(tiny.recipe(tmp_path), chat_template=str(tmp_path / "own.jinja"))
    progress = tiny.Silent()
    with pytest.raises(ExportError, match=r"own\.jinja cannot be read"):
        tiny.exporting(tmp_path / "engines", progress=progress).run(recipe)
    assert progress.begun == []


def test_a_gguf_has_its_templates_and_its_tokens_by_the_same_names(tmp_path: Path) -> None:
    tokens = [*(chr(code) for code in range(33, 127)), "ab", *NAMED.values()]
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - len(NAMED)) + [3] * len(NAMED))
    writer.add_token_merges(["a b"])
    for kind, token in zip(("bos", "eos", "unknown", "seperator", "padding", "cls", "mask"), NAMED.values(), strict=True):
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", tokens.index(token))
    writer.add_chat_template(listed(TEMPLATES))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    side = read_text(tmp_path, "tiny.gguf")
    assert side.special_tokens == NAMED
    assert side.templates == TEMPLATES


def test_a_gguf_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ExportError, match=r"has no tokenizer: tokenizer.ggml.model and tokenizer.ggml.tokens were looked for"):
        read_text(tmp_path, "tiny.gguf")
