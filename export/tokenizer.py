"""The text side of a bundle: a model's tokenizer and chat template, in the form that the runtime reads without transformers.

From a Hugging Face folder or hub id the tokenizer is taken as it is. From a GGUF with a byte-level vocabulary it is built here,
because transformers' conversion keeps only some of the pre-tokenizers (splits.py): SmolLM2's, for one, it replaces by GPT-2's.
The other GGUF vocabularies come through transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import read_gguf_metadata

from export.errors import ExportError
from export.library_messages import in_few_words
from export.splits import SPLITS
from runtime.bundle import TEMPLATE, TOKENIZER
from runtime.template import ChatTemplate

_TOKENS = "tokenizer.ggml.tokens"
_MERGES = "tokenizer.ggml.merges"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Of `tokenizer.ggml.token_type` (`llama_token_type` in llama.cpp); the others are text."""
_ENDS = ("eos", "eot", "eom")
"""The tokens that end an answer, by their names in a GGUF: end of sequence, of turn, of message."""


@dataclass(frozen=True)
class TextSide:
    """What a bundle needs to turn text into tokens and back."""

    tokenizer: Tokenizer
    template: str | None
    """The chat template, in jinja2."""
    bos_id: int | None
    """The BOS token that a chat template may name; whether a text begins with it is the tokenizer's own matter."""
    stop_ids: tuple[int, ...]
    """The tokens that end an answer: the tokenizer's EOS, if it has one, then the others."""


def read_text(
    path: str | Path,
    gguf_file: str | None = None,
    *,
    revision: str | None = None,
    generation_config: GenerationConfig | None = None,
    trust_remote_code: bool = False,
) -> TextSide:
    """The text side of the model at `path`: a folder, a hub id at `revision`, or the file `gguf_file` in a folder.

    The EOS tokens of `generation_config` are stop ids too. Raises ExportError.
    """
    if gguf_file is None:
        side = _of_transformers(path, revision=revision, trust_remote_code=trust_remote_code)
    else:
        side = _of_gguf(Path(path) / gguf_file)
    more = generation_config.eos_token_id if generation_config is not None else None
    stop_ids = (*side.stop_ids, *(more if isinstance(more, list | tuple) else [more]))
    return TextSide(side.tokenizer, _checked(side.template, path), side.bos_id, _distinct(stop_ids))


def for_embeddings(side: TextSide, *, lower: bool) -> TextSide:
    """`side` of a model that answers nothing: without a chat template; with `lower`, texts are made lower case first."""
    if lower:
        steps = [normalizers.Lowercase(), *([] if side.tokenizer.normalizer is None else [side.tokenizer.normalizer])]
        side.tokenizer.normalizer = normalizers.Sequence(steps)
    return replace(side, template=None)


def write_text(side: TextSide, folder: Path) -> tuple[str, ...]:
    """Write `side` into the bundle folder; the paths of its files, relative to it."""
    # Not `Tokenizer.save`, whose errors are no OSErrors and do not say that a disk is full.
    (folder / TOKENIZER).write_text(side.tokenizer.to_str(pretty=True), encoding="utf-8")
    if side.template is None:
        return (TOKENIZER,)
    (folder / TEMPLATE).write_text(side.template, encoding="utf-8")
    return (TOKENIZER, TEMPLATE)


def _of_transformers(path: str | Path, **options: Any) -> TextSide:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # transformers raises whatever the file's reader did.
        raise ExportError(f"{path} has no tokenizer that transformers can load: {in_few_words(str(error))}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ExportError(
            f"the tokenizer of {path} ({type(tokenizer).__name__}) runs only in Python, and a bundle holds a tokenizer.json;"
            " convert it to a fast tokenizer first"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return TextSide(
        backend, _main_template(tokenizer.chat_template), tokenizer.bos_token_id, _distinct([tokenizer.eos_token_id])
    )


def _of_gguf(path: Path) -> TextSide:
    try:
        metadata, _ = read_gguf_metadata(str(path), (_TOKENS, _MERGES))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as a GGUF file: {error}") from error
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        tokenizer = _byte_level(metadata, path)
        side = TextSide(tokenizer, metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.bos_token_id"), ())
    else:
        side = _of_transformers(path.parent, gguf_file=path.name, trust_remote_code=False)
    ends = _distinct([*(metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS), *side.stop_ids])
    return TextSide(side.tokenizer, side.template, side.bos_id, ends)


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


def _main_template(template: str | Mapping[str, str] | None) -> str | None:
    """The template called `default` where a model has several by name."""
    if isinstance(template, Mapping):
        return template.get("default", next(iter(template.values()), None))
    return template


def _checked(template: str | None, path: str | Path) -> str | None:
    if template is not None:
        try:
            ChatTemplate(template, most=0)
        except jinja2.TemplateSyntaxError as error:
            raise ExportError(
                f"the chat template of {path} is no jinja2 (line {error.lineno}: {error}); correct it there"
            ) from error
    return template


def _distinct(ids: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(id for id in ids if id is not None))
