"""The text side of a bundle: a model's tokenizer and chat templates, in the form that the runtime reads without transformers.

A folder's tokenizer.json is taken as its authors published it, with the tokens that tokenizer_config.json adds. transformers'
AutoTokenizer may rebuild it by its class instead (`LlamaTokenizer` puts SentencePiece's way of splitting in the place of the
file's): the two are compared, and where they differ a note says so. Whether a text begins with BOS or ends with EOS is the
file's matter, as it is in transformers, which passes over `add_bos_token` and `add_eos_token` where there is a tokenizer.json.
What a chat template may name, and which template is taken, is what AutoTokenizer says. A folder with only vocabulary files goes
through AutoTokenizer altogether.

A GGUF's tokenizer is built from its metadata (gguf_tokenizer.py), whatever lies beside the file.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from export import corpus, gguf_tokenizer
from export.errors import ExportError
from export.library_messages import in_few_words
from export.recipe import TokenizerChoice
from runtime.bundle import DEFAULT_TEMPLATE, MORE_TEMPLATES, TEMPLATE, TOKENIZER
from runtime.template import ChatTemplate, TemplateError

FILES = "tokenizer.json, a *.model such as tokenizer.model, vocab.json with merges.txt, vocab.txt, tekken.json and *.tiktoken"
_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer that hold a JSON object each, where they are there."""
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MAX_CHARACTERS = 1_000_000
"""Of a trial conversation, as a template renders it."""
_NO_END = (
    "neither its tokenizer nor its generation_config.json names one of its tokens for that, so an answer goes on to the "
    "longest that it may have, unless a request has a stop string"
)
MAX_TEXT = 100
"""Characters of a text that an error repeats."""


class CodeNotRunError(ExportError):
    """A tokenizer is made by code in the model's folder, which was not to be run."""


@dataclass(frozen=True)
class TextSide:
    """What a bundle needs to turn text into tokens and back."""

    tokenizer: Tokenizer
    templates: Mapping[str, str]
    """The chat templates in jinja2, by their names: one alone is called `default`."""
    special_tokens: Mapping[str, str]
    """Those that a chat template may name, as `bos_token`, by their names; all are in the vocabulary. Whether a text begins
    with BOS is the tokenizer's own matter."""
    stop_ids: tuple[int, ...]
    """The tokens that end an answer: the tokenizer's EOS, if it has one, then the others."""
    notes: tuple[str, ...] = ()
    """What whoever exports should know."""


def read_text(
    folder: str | Path,
    gguf_file: str | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    choice: TokenizerChoice = "file",
    template: str | None = None,
    trust_remote_code: bool = False,
) -> TextSide:
    """The text side of the model in `folder`, or of the file `gguf_file` in it.

    The EOS tokens of `generation_config` are stop ids too. The chat template `template`, from `read_template`, takes the place
    of all that the model has. Raises ExportError.
    """
    folder = Path(folder)
    side = _of_folder(folder, choice, trust_remote_code) if gguf_file is None else _of_gguf(folder / gguf_file, choice)
    more = generation_config.eos_token_id if generation_config is not None else None
    stop_ids = tuple(dict.fromkeys((*side.stop_ids, *_ids(more, folder))))
    if template is not None:
        return replace(side, templates={DEFAULT_TEMPLATE: template}, stop_ids=stop_ids)
    for name, source in side.templates.items():
        _check_template(name, source, folder / (gguf_file or ""))
    return replace(side, stop_ids=stop_ids)


def _ids(said: object, folder: Path) -> list[int]:
    """The tokens that the `eos_token_id` of generation_config.json names; raises ExportError."""
    ids = said if isinstance(said, list | tuple) else [] if said is None else [said]
    if not all(type(id) is int for id in ids):
        raise ExportError(
            f"generation_config.json of {folder} has eos_token_id {said!r}, which is not a token's id; correct it"
        )
    return list(ids)


def read_template(path: Path) -> str:
    """The chat template in the file `path`. Raises ExportError where it is none."""
    source = _template_text(path)
    _check_template(DEFAULT_TEMPLATE, source, path)
    return source


def _template_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"the chat template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"the chat template {path} is not UTF-8 text: {error}") from error


def for_embeddings(side: TextSide, *, lower: bool) -> TextSide:
    """`side` of a model that answers nothing: without chat templates; with `lower`, texts are made lower case first."""
    if lower:
        steps = [normalizers.Lowercase(), *([] if side.tokenizer.normalizer is None else [side.tokenizer.normalizer])]
        side.tokenizer.normalizer = normalizers.Sequence(steps)
    return replace(side, templates={})


def checked(side: TextSide, rows: int, where: str | Path) -> TextSide:
    """`side` of the model at `where`, which has `rows` embeddings, without stop ids that it never gives; a note where none is
    left.

    Raises ExportError where the tokenizer fails at ordinary text or makes nothing of it, or tokens that the model has not.
    """
    unknown = side.tokenizer.token_to_id(side.special_tokens.get("unk_token", ""))
    encoded = {text: _encoded(side.tokenizer, text, where, special=False) for text in corpus.ORDINARY}
    if all(set(ids) <= {unknown} for ids in encoded.values()):
        raise ExportError(
            f"the tokenizer of {where} turns ordinary text ({corpus.ORDINARY[0]!r}) into nothing but unknown tokens; its files "
            f"are not all there, or not this model's: {FILES} were looked for"
        )
    surrounded = {text: _encoded(side.tokenizer, text, where) for text in encoded}
    for text, ids in (surrounded | _conversations(side, where)).items():
        if ids and max(ids) >= rows:
            raise ExportError(
                f"the tokenizer of {where} is not this model's: it turns {text!r} into the token {max(ids)} "
                f"({side.tokenizer.id_to_token(max(ids))!r}), and the model has {rows}; fetch both from one place"
            )
    stop_ids = tuple(id for id in side.stop_ids if 0 <= id < rows)
    notes = side.notes if stop_ids else (*side.notes, f"no token ends an answer of {where}: {_NO_END}")
    return replace(side, stop_ids=stop_ids, notes=notes)


def _encoded(tokenizer: Tokenizer, text: str, where: str | Path, *, special: bool = True) -> list[int]:
    """The tokens of `text`; raises ExportError where there are none because the tokenizer of `where` does not work."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    except Exception as error:  # tokenizers raises nothing more specific.
        raise ExportError(
            f"the tokenizer of {where} fails at the text {text[:MAX_TEXT]!r} ({error}); its files are not all there, or "
            "transformers makes a wrong tokenizer of them; a tokenizer.json, if there is one, is taken with --tokenizer file"
        ) from error
    return ids


def write_text(side: TextSide, folder: Path) -> tuple[str, ...]:
    """Write `side` into the bundle folder; the paths of its files, relative to it."""
    # Not `Tokenizer.save`, whose errors are no OSErrors and do not say that a disk is full.
    (folder / TOKENIZER).write_text(side.tokenizer.to_str(pretty=True), encoding="utf-8")
    written = [TOKENIZER]
    for name, source in sorted(side.templates.items(), key=lambda template: (template[0] != DEFAULT_TEMPLATE, template[0])):
        path = TEMPLATE if name == DEFAULT_TEMPLATE else f"{MORE_TEMPLATES}/{name}.jinja"
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(source, encoding="utf-8")
        written.append(path)
    return tuple(written)


def _of_folder(folder: Path, choice: TokenizerChoice, trust_remote_code: bool) -> TextSide:
    if not any(next(folder.glob(pattern), None) for pattern in _FILES):
        raise ExportError(
            f"{folder} has no tokenizer: {FILES} were looked for; copy the tokenizer's files of the original model there"
        )
    _check_files(folder)
    if not os.path.lexists(folder / "tokenizer.json"):
        return _side(_fast(_by_class(folder, trust_remote_code=trust_remote_code), folder))
    published = _published(folder)
    if choice == "transformers":
        rebuilt = _fast(_by_class(folder, trust_remote_code=trust_remote_code), folder)
        return replace(_side(rebuilt), notes=_compared(published, rebuilt, choice))
    try:
        by_class = _by_class(folder, trust_remote_code=trust_remote_code)
    except ExportError as error:
        why = str(error)
        if isinstance(error, CodeNotRunError):
            why = "the tokenizer's class is Python code of the model's own, which was not run"
        return replace(_side(published), notes=(f"tokenizer.json is taken as it is: {why}",))
    if not isinstance(by_class, PreTrainedTokenizerFast):
        return _side(published)
    return replace(_side(by_class, published.backend_tokenizer), notes=_compared(published, by_class, choice))


def _check_files(folder: Path) -> None:
    """Refuse files beside a vocabulary that cannot be read, by their names, and a vocabulary that is to come from elsewhere."""
    for path in (folder / name for name in _OBJECTS):
        if os.path.lexists(path):
            _check_configuration(path, _object(path))
    for path in (folder / TEMPLATE, *(folder / MORE_TEMPLATES).glob("*.jinja")):
        if os.path.lexists(path):
            _template_text(path)


def _object(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(read, dict):
        raise ExportError(f"{path} is not a JSON object; fetch it again")
    return read


def _check_configuration(path: Path, values: Mapping[str, Any]) -> None:
    if "fast_tokenizer_files" in values:
        raise ExportError(
            f"{path} has the entry fast_tokenizer_files, by which transformers takes other files in the place of "
            "tokenizer.json; put the file that is meant there, and remove the entry"
        )
    listed = values.get("chat_template")
    if isinstance(listed, list) and not all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in listed):
        raise ExportError(
            f"{path} has a list as its chat_template, and an entry of that has no name or no template; correct it, or put the "
            f"template into {TEMPLATE}"
        )


def _published(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer.json as it is, with the tokens that tokenizer_config.json adds; raises ExportError."""
    file = folder / "tokenizer.json"
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ExportError(f"{file} cannot be read ({error}); fetch it again") from error
    try:
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a configuration can be wrong in
        raise ExportError(
            f"tokenizer_config.json in {folder} does not fit tokenizer.json "
            f"({in_few_words(str(error) or type(error).__name__)}); fetch both again"
        ) from error
    return loaded


def _by_class(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """What AutoTokenizer makes of the folder's files; raises ExportError.

    Code in the folder runs only with `trust_remote_code`; where it is needed CodeNotRunError is raised.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises whatever the file's reader did.
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CodeNotRunError(
                f"the tokenizer of {folder} is made by Python code of the model's own, which is run only with "
                "--trust-remote-code"
            ) from error
        said = in_few_words(str(error) or type(error).__name__)
        raise ExportError(f"{folder} has no tokenizer that transformers can load: {said}") from error
    return loaded


def _fast(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ExportError(
            f"the tokenizer of {folder} ({type(tokenizer).__name__}) runs only in Python, and a bundle holds a tokenizer.json;"
            " convert it to a fast tokenizer first"
        )
    return tokenizer


def _side(loaded: PreTrainedTokenizerFast, backend: Tokenizer | None = None) -> TextSide:
    """The templates and named tokens of `loaded`, with the tokenizer `backend` where it is not to be its own."""
    tokenizer = loaded.backend_tokenizer if backend is None else backend
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A class names tokens by default that a vocabulary may not have, as `<s>`; transformers makes up ids for them.
    named = {name: token for name, token in loaded.special_tokens_map.items() if tokenizer.token_to_id(token) is not None}
    templates = loaded.chat_template or {}
    eos = tokenizer.token_to_id(named.get("eos_token", ""))
    return TextSide(
        tokenizer,
        dict(templates) if isinstance(templates, Mapping) else {DEFAULT_TEMPLATE: templates},
        named,
        () if eos is None else (eos,),
    )


def _compared(published: PreTrainedTokenizerFast, rebuilt: PreTrainedTokenizerFast, choice: TokenizerChoice) -> tuple[str, ...]:
    """What there is to say of a tokenizer.json and what transformers' class makes of it: nothing where they are alike."""
    file, by_class = published.backend_tokenizer, rebuilt.backend_tokenizer
    for each in (file, by_class):
        each.no_truncation()
        each.no_padding()
    tried = corpus.texts(file)
    found = corpus.differences(file, by_class, tried)
    if not found:
        return ()
    taken, other = "tokenizer.json, which the authors publish,", "--tokenizer transformers takes the other"
    if choice == "transformers":
        taken, other = f"that of {type(rebuilt).__name__}", "--tokenizer file takes the authors' tokenizer.json"
    return (
        f"tokenizer.json and transformers' {type(rebuilt).__name__} differ in {len(found)} of {len(tried)} texts "
        f"({found[0]!r}, for one); {taken} is taken ({other})",
    )


def _of_gguf(path: Path, choice: TokenizerChoice) -> TextSide:
    said = gguf_tokenizer.read(path, choice)
    return TextSide(said.tokenizer, said.templates, said.special_tokens, said.stop_ids, said.notes)


def _check_template(name: object, source: object, where: Path) -> None:
    if not isinstance(source, str) or not isinstance(name, str) or not _TEMPLATE_NAME.fullmatch(name):
        raise ExportError(
            f"{where} has a chat template {name!r} that cannot be kept: a template is a text, and its name has letters, "
            "digits, underscores, hyphens and dots; correct it there, or give another with --chat-template"
        )
    try:
        ChatTemplate(source, most=0)
    except jinja2.TemplateSyntaxError as error:
        raise ExportError(
            f"the chat template of {where} is not valid jinja2 (line {error.lineno}: {error.message}); correct it there, or "
            "give another with --chat-template"
        ) from error


def _conversations(side: TextSide, where: str | Path) -> dict[str, list[int]]:
    """The tokens of a trial conversation in each chat template that takes it, by what the template is called here.

    Raises ExportError where the tokenizer fails at one.
    """
    found = {}
    for name, source in side.templates.items():
        template = ChatTemplate(source, most=_MAX_CHARACTERS, tokens=side.special_tokens)
        try:
            prompt = template.render([{"role": "user", "content": "Hello"}])
        except TemplateError:  # it wants other turns
            continue
        found[f"a conversation in the chat template {name}"] = _encoded(side.tokenizer, prompt, where, special=False)
    return found
