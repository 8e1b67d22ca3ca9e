"""The text side of a bundle: a model's tokenizer and chat templates, in the form that the runtime reads without transformers.

A folder's tokenizer.json is taken as its authors published it, with the tokens that tokenizer_config.json adds. transformers'
AutoTokenizer may rebuild it by its class instead (`LlamaTokenizer` puts SentencePiece's way of splitting in the place of the
file's): the two are compared, and where they differ a note says so. Whether a text begins with BOS or ends with EOS is the
file's matter, as it is in transformers, which passes over `add_bos_token` and `add_eos_token` where there is a tokenizer.json.
What a chat template may name, and which template is taken, is what AutoTokenizer says. A folder with only vocabulary files goes
through AutoTokenizer altogether.

From a GGUF with a byte-level vocabulary the tokenizer is built here, because transformers' conversion keeps only some of the
pre-tokenizers (splits.py): SmolLM2's, for one, it replaces by GPT-2's. The other GGUF vocabularies come through transformers,
which is shown the file alone: of a folder it would take the tokenizer.json, whichever model that belongs to.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import read_gguf_metadata

from export import corpus
from export.errors import ExportError
from export.library_messages import in_few_words
from export.recipe import TokenizerChoice
from export.splits import SPLITS
from runtime.bundle import DEFAULT_TEMPLATE, MORE_TEMPLATES, TEMPLATE, TOKENIZER
from runtime.template import ChatTemplate, TemplateError

FILES = "tokenizer.json, a *.model such as tokenizer.model, vocab.json with merges.txt, vocab.txt, tekken.json and *.tiktoken"
_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
_TOKENS = "tokenizer.ggml.tokens"
_MERGES = "tokenizer.ggml.merges"
_TEMPLATE = "tokenizer.chat_template"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Of `tokenizer.ggml.token_type` (`llama_token_type` in llama.cpp); the others are text."""
_ENDS = ("eos", "eot", "eom")
"""The tokens that end an answer, by their names in a GGUF: end of sequence, of turn, of message."""
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}
"""What templates call the tokens that a GGUF names `tokenizer.ggml.NAME_token_id` (with llama.cpp's spelling)."""
_T5_UNUSED = re.compile(r"\[PAD\d+\]")
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MAX_CHARACTERS = 1_000_000
"""Of a trial conversation, as a template renders it."""
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
    stop_ids = _distinct((*side.stop_ids, *(more if isinstance(more, list | tuple) else [more])))
    if not all(isinstance(id, int) for id in stop_ids):
        raise ExportError(
            f"generation_config.json of {folder} has eos_token_id {more!r}, which is not a token's id; correct it"
        )
    if template is not None:
        return replace(side, templates={DEFAULT_TEMPLATE: template}, stop_ids=stop_ids)
    for name, source in side.templates.items():
        _check_template(name, source, folder / (gguf_file or ""))
    return replace(side, stop_ids=stop_ids)


def read_template(path: Path) -> str:
    """The chat template in the file `path`. Raises ExportError where it is none."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"the chat template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"the chat template {path} is not UTF-8 text: {error}") from error
    _check_template(DEFAULT_TEMPLATE, source, path)
    return source


def for_embeddings(side: TextSide, *, lower: bool) -> TextSide:
    """`side` of a model that answers nothing: without chat templates; with `lower`, texts are made lower case first."""
    if lower:
        steps = [normalizers.Lowercase(), *([] if side.tokenizer.normalizer is None else [side.tokenizer.normalizer])]
        side.tokenizer.normalizer = normalizers.Sequence(steps)
    return replace(side, templates={})


def checked(side: TextSide, rows: int, where: str | Path) -> TextSide:
    """`side` of the model at `where`, which has `rows` embeddings, without stop ids that it never gives.

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
    return replace(side, stop_ids=tuple(id for id in side.stop_ids if 0 <= id < rows))


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
    if not (folder / "tokenizer.json").is_file():
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
            f"tokenizer_config.json in {folder} does not fit tokenizer.json ({error}); fetch both again"
        ) from error
    return loaded


def _by_class(
    folder: Path, where: Path | None = None, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """What AutoTokenizer makes of the folder's files, which errors call `where`; raises ExportError.

    Code in the folder runs only with `trust_remote_code`; where it is needed CodeNotRunError is raised.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # transformers raises whatever the file's reader did.
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CodeNotRunError(
                f"the tokenizer of {where or folder} is made by Python code of the model's own, which is run only with "
                "--trust-remote-code"
            ) from error
        said = in_few_words(str(error) or type(error).__name__)
        raise ExportError(f"{where or folder} has no tokenizer that transformers can load: {said}") from error
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
    return TextSide(
        tokenizer,
        {DEFAULT_TEMPLATE: templates} if isinstance(templates, str) else dict(templates),
        named,
        _distinct([tokenizer.token_to_id(named.get("eos_token", ""))]),
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
    try:
        metadata, _ = read_gguf_metadata(str(path), (_TOKENS, _MERGES))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as a GGUF file: {error}") from error
    tokens: list[str] = metadata.get(_TOKENS) or []
    if not tokens or "tokenizer.ggml.model" not in metadata:
        raise ExportError(
            f"{path} has no tokenizer: tokenizer.ggml.model and {_TOKENS} were looked for in its metadata; convert the model "
            "again with its vocabulary"
        )
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in (*_NAMED, *_ENDS)}
    for name, id in ids.items():
        if id is not None and id >= len(tokens):
            raise ExportError(f"{path} names token {id} as its {name}, of {len(tokens)} tokens; convert the model again")
    named = {_NAMED[name]: tokens[id] for name, id in ids.items() if name in _NAMED and id is not None}
    if metadata["tokenizer.ggml.model"] == "gpt2" and choice == "file":
        side = TextSide(_byte_level(metadata, path), {}, {}, ())
    else:
        side = _side(_fast(_by_conversion(path), path))
        _check_vocabulary(side.tokenizer, tokens, path)
    ends = _distinct([*(ids[end] for end in _ENDS), *side.stop_ids])
    return TextSide(side.tokenizer, _gguf_templates(metadata), {**side.special_tokens, **named}, ends)


def _by_conversion(path: Path) -> PreTrainedTokenizerBase:
    """What transformers makes of the GGUF `path` and of nothing that lies beside it; raises ExportError."""
    with TemporaryDirectory(prefix="engineshed-") as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        return _by_class(Path(alone), path, gguf_file=path.name)


def _check_vocabulary(tokenizer: Tokenizer, tokens: Sequence[str], path: Path) -> None:
    """Raise ExportError where `tokenizer` has another token at an id than the GGUF `path`, whose tokens are `tokens`.

    transformers writes some in another way: blanks as SentencePiece does, bytes as GPT-2 does, T5's unused ones by their names.
    """
    for id, token in enumerate(tokens):
        made = tokenizer.id_to_token(id)
        if made in (None, token, token.replace(" ", "▁")) or _T5_UNUSED.fullmatch(token):
            continue
        if made != "".join(piece for piece, _ in _BYTE_LEVEL.pre_tokenize_str(token)):
            raise ExportError(
                f"transformers makes another tokenizer of {path}: token {id} is {made!r} there and {token!r} in the file; "
                "export the original model's folder instead"
            )


def _gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates in a GGUF's metadata: `tokenizer.chat_template`, and `tokenizer.chat_template.NAME`."""
    named = {key.removeprefix(f"{_TEMPLATE}."): text for key, text in metadata.items() if key.startswith(f"{_TEMPLATE}.")}
    default = {DEFAULT_TEMPLATE: metadata[_TEMPLATE]} if metadata.get(_TEMPLATE) else {}
    return {**named, **default}


def _byte_level(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF's metadata describes."""
    name = metadata.get("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise ExportError(
            f"{path} splits text by the rule {name!r} (tokenizer.ggml.pre), which is not known here; export the original"
            " model's folder instead, or add the rule to export/splits.py"
        )
    splits = SPLITS[name]
    tokens: list[str] = metadata[_TOKENS]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ExportError(f"{path} names a token twice in {_TOKENS}; the file is damaged, convert the model again")
    try:
        model = models.BPE(
            vocabulary, [_pair(merge) for merge in metadata.get(_MERGES, ())], ignore_merges=splits.ignore_merges
        )
    except Exception as error:  # tokenizers raises nothing more specific.
        raise ExportError(f"the merges of {path} do not fit its vocabulary ({error}); convert the model again") from error
    tokenizer = Tokenizer(model)
    if splits.normalizer is not None:
        tokenizer.normalizer = splits.normalizer
    tokenizer.pre_tokenizer = splits.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, metadata)
    _surround(tokenizer, tokens, metadata, adds_bos=splits.adds_bos)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """The two tokens of a merge: the first may begin with a space, in an old file."""
    middle = merge.index(" ", 1)
    return merge[:middle], merge[middle + 1 :]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    """Have the tokens that are no text found whole, before anything is split."""
    named = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", *_ENDS)}
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        special = kind in (_UNKNOWN, _CONTROL) or id in named
        if token and (special or kind == _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])


def _surround(tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any], *, adds_bos: bool) -> None:
    """Put BOS and EOS around a text, where the file says so."""
    adds = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {name: id for name in adds if adds[name] and (id := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None}
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[name for name in ("bos", "$A", "eos") if name in ("$A", *ids)],
            special_tokens=[{"id": name, "ids": [id], "tokens": [tokens[id]]} for name, id in ids.items()],
        )


def _check_template(name: str, source: object, where: Path) -> None:
    if not isinstance(source, str) or not _TEMPLATE_NAME.fullmatch(name):
        raise ExportError(
            f"{where} has a chat template {name!r} that cannot be kept: a template is a text, and its name has letters, "
            "digits, underscores, hyphens and dots; correct tokenizer_config.json, or give another with --chat-template"
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


def _distinct(ids: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(id for id in ids if id is not None))
