"""The tokenizer that a GGUF's metadata describes, with the ids that llama.cpp gives.

There are three kinds of vocabularies (`tokenizer.ggml.model`). A byte-level one (`gpt2`) is built here altogether, because
transformers' conversion keeps only some of the pre-tokenizers (splits.py): SmolLM2's, for one, it replaces by GPT-2's. Of
SentencePiece's (`llama`) and gemma4's transformers recovers the merges; what stands around them is set here as the file says.
What becomes of each key is in export/gguf_metadata.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from export import gguf_file
from export.errors import ExportError
from export.gguf_file import TEXT, Value
from export.gguf_metadata import check_text
from export.library_messages import in_few_words
from export.recipe import TokenizerChoice
from export.splits import SPLITS
from runtime.bundle import DEFAULT_TEMPLATE

_TEMPLATE = f"{TEXT}chat_template"
_BYTE_LEVEL, _SENTENCEPIECE, _GEMMA4 = "gpt2", "llama", "gemma4"
_DEFAULT_IDS = {_SENTENCEPIECE: {"bos": 1, "eos": 2, "unknown": 0}}
"""The tokens of a kind of vocabulary whose file does not name them (`llama_vocab::impl::load` in llama.cpp)."""
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Of `tokenizer.ggml.token_type` (`llama_token_type` in llama.cpp); the others are text."""
_ENDS = ("eos", "eot", "eom")
"""The tokens that end an answer, by their names in a GGUF: end of sequence, of turn, of message."""
_ENDING = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
    *("<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
"""The tokens that end an answer, by their texts: files of many models do not name them (`llama_vocab::impl::load`)."""
_NOT_ENDING = (
    (
        "<|end|>",
        ({"<|return|>", "<|call|>"}, {"<|return|>", "<|calls|>"}, {"<|call|>", "<|flush|>"}, {"<|calls|>", "<|flush|>"}),
    ),
    ("</s>", ({"<|tool_response>"},)),
)
"""Of these, what ends no answer in a vocabulary that has one of the sets of others beside it."""
_PHI3 = re.compile(r"phi[- ]?3")
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's tokens behind which blanks and line breaks count; behind the others its authors' tokenizer drops them."""
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
_BLANK = "▁"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@dataclass(frozen=True)
class GgufText:
    """What a GGUF says of text."""

    tokenizer: Tokenizer
    templates: Mapping[str, Any]
    """Chat templates by their names, as the file has them."""
    special_tokens: Mapping[str, str]
    """Those that a chat template may name."""
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...]


def read(path: Path, choice: TokenizerChoice = "file") -> GgufText:
    """The text side of the GGUF `path`; with the choice `transformers`, as that splits text. Raises ExportError."""
    keys = gguf_file.keys(path)
    notes = check_text(keys, path)
    said = _Said(keys, path)
    if not said.tokens or said.kind is None:
        raise ExportError(
            f"{path} has no tokenizer: tokenizer.ggml.model and tokenizer.ggml.tokens were looked for in its metadata; convert "
            "the model again with its vocabulary"
        )
    if said.kind not in (_BYTE_LEVEL, _SENTENCEPIECE, _GEMMA4):
        raise ExportError(
            f"{path} has a vocabulary of the kind {said.kind!r} (tokenizer.ggml.model), which is not read here; export the "
            "original model's folder instead"
        )
    if len(set(said.tokens)) != len(said.tokens):
        raise ExportError(f"{path} names a token twice in tokenizer.ggml.tokens; the file is damaged, convert the model again")
    tokenizer = _byte_level(said) if said.kind == _BYTE_LEVEL and choice == "file" else _converted(said, choice)
    _add_tokens(tokenizer, said)
    _surround(tokenizer, said)
    named = {called: said.tokens[id] for name, called in _NAMED.items() if (id := said.id(name)) is not None}
    return GgufText(tokenizer, _templates(keys), named, said.ends, notes)


class _Said:
    """The keys `tokenizer.ggml.*` of a file, each as what it has to be; ExportError where it is not."""

    def __init__(self, keys: Mapping[str, Value], path: Path) -> None:
        self.path = path
        self.architecture = str(keys["general.architecture"])
        self._keys = keys
        self.tokens = self._texts("tokens")
        self.kind = self._text("model")
        self.pre = self._text("pre")

    @property
    def merges(self) -> list[str]:
        return self._texts("merges") or self._missing("merges")

    @property
    def scores(self) -> list[float]:
        scores = self._numbers("scores")
        return scores if len(scores) >= len(self.tokens) else self._missing("scores")

    @property
    def types(self) -> list[float]:
        """Of each token; all are text where the file says nothing."""
        types = self._numbers("token_type") or [1.0] * len(self.tokens)
        return types if len(types) >= len(self.tokens) else self._missing("token_type")

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        more = self._numbers("eos_token_ids")
        if not all(type(id) is int and 0 <= id < len(self.tokens) for id in more):
            raise self._wrong("eos_token_ids", "ids of its tokens")
        named = [id for id in (*map(self.id, _ENDS), *map(int, more)) if id is not None]
        found = {token: id for id, token in enumerate(self.tokens) if token in _ENDING}
        for token, others in _NOT_ENDING:
            if any(beside <= found.keys() for beside in others):
                found.pop(token, None)
        return tuple(dict.fromkeys((*named, *found.values())))

    @property
    def strips_behind_tokens(self) -> bool:
        """White space behind a special token is dropped: what Phi-3's authors do, and no file says but by its name."""
        name = str(self._keys.get("general.name", "")).lower()
        return self.kind == _SENTENCEPIECE and self.architecture == "phi3" and _PHI3.search(name) is not None

    @property
    def adds_bos(self) -> bool:
        """A text begins with BOS. llama.cpp begins each of gemma4's with it, whatever the file says."""
        default = self.kind == _SENTENCEPIECE or (self.pre in SPLITS and SPLITS[self.pre].adds_bos)
        return self.flag("add_bos_token", default) or self.kind == _GEMMA4

    def id(self, name: str) -> int | None:
        """The token under `NAME_token_id`, or the one that such a vocabulary has where it is not said."""
        default = _DEFAULT_IDS.get(self.kind or "", {}).get(name)
        id = gguf_file.token_id(self._keys, name, self.path)
        return default if id is None and default is not None and default < len(self.tokens) else id

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return default if value is None else value

    def _text(self, name: str) -> str | None:
        value = self._value(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def _texts(self, name: str) -> list[str]:
        value = self._value(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._wrong(name, "a list of texts")
        return [str(each) for each in value]

    def _numbers(self, name: str) -> list[float]:
        value = self._value(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(name, "a list of numbers")
        return [each for each in value if isinstance(each, int | float)]

    def _value(self, name: str) -> Value | None:
        return self._keys.get(f"{TEXT}ggml.{name}")

    def _wrong(self, name: str, what: str) -> ExportError:
        said = repr(self._value(name))
        said = said if len(said) <= 60 else f"{said[:57]}..."
        return ExportError(
            f"{self.path} has tokenizer.ggml.{name} = {said}, where it has to be {what}; convert the model again"
        )

    def _missing(self, name: str) -> Any:
        raise ExportError(
            f"{self.path} has no tokenizer.ggml.{name}, or less of it than its {len(self.tokens)} tokens need, and without it "
            "text becomes other tokens; convert the model again"
        )


def _byte_level(said: _Said) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF's metadata describes."""
    if said.pre not in SPLITS:
        raise ExportError(
            f"{said.path} splits text by the rule {said.pre!r} (tokenizer.ggml.pre), which is not known here; export the "
            "original model's folder instead, or add the rule to export/splits.py"
        )
    splits = SPLITS[said.pre]
    vocabulary = {token: id for id, token in enumerate(said.tokens)}
    try:
        model = models.BPE(vocabulary, [_pair(merge) for merge in said.merges], ignore_merges=splits.ignore_merges)
    except ExportError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific.
        raise ExportError(f"the merges of {said.path} do not fit its vocabulary ({error}); convert the model again") from error
    tokenizer = Tokenizer(model)
    if splits.normalizer is not None:
        tokenizer.normalizer = splits.normalizer
    tokenizer.pre_tokenizer = splits.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """The two tokens of a merge: the first may begin with a space, in an old file."""
    middle = merge.index(" ", 1)
    return merge[:middle], merge[middle + 1 :]


def _converted(said: _Said, choice: TokenizerChoice) -> Tokenizer:
    """The tokenizer with the merges that transformers makes of the file; blanks as llama.cpp has them, save by choice."""
    described: dict[str, Any] = {"tokenizer_type": said.kind, "tokens": said.tokens, "pre_tokenizer_type": said.pre}
    described |= {"scores": said.scores} if said.kind == _SENTENCEPIECE else {"merges": said.merges}
    try:
        made, _ = convert_gguf_tokenizer(said.architecture, described)
    except Exception as error:  # whatever a vocabulary can be wrong in
        raise ExportError(
            f"transformers makes no tokenizer of {said.path} ({in_few_words(str(error) or type(error).__name__)}); export the "
            "original model's folder instead"
        ) from error
    # Its model alone: a class adds special tokens of its own, as `<mask>`, with ids that the vocabulary has not.
    tokenizer = Tokenizer(made.model)
    if choice == "transformers":
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(made, part) is not None:
                setattr(tokenizer, part, getattr(made, part))
    else:
        _mark_blanks(tokenizer, prefix=said.kind == _SENTENCEPIECE and said.flag("add_space_prefix", True))
    _check_vocabulary(tokenizer, said.tokens, said.path)
    return tokenizer


def _mark_blanks(tokenizer: Tokenizer, *, prefix: bool) -> None:
    """Have blanks written as SentencePiece does; with `prefix`, one in front of a text and behind each special token.

    The normalizer sees what lies between special tokens, a piece at a time. A blank that a text begins with does not count as
    the one in front of it: llama.cpp and SentencePiece put a second one there, and `pre_tokenizers.Metaspace` does not.
    """
    marked = normalizers.Replace(" ", _BLANK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), marked]) if prefix else marked
    steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1)] if prefix else steps)


def _check_vocabulary(tokenizer: Tokenizer, tokens: Sequence[str], path: Path) -> None:
    """Raise ExportError where `tokenizer` has another token at an id than the GGUF `path`, whose tokens are `tokens`.

    transformers writes some in another way: blanks as SentencePiece does, bytes as GPT-2 does.
    """
    for id, token in enumerate(tokens):
        made = tokenizer.id_to_token(id)
        if made in (None, token, token.replace(" ", _BLANK)):
            continue
        if made != "".join(piece for piece, _ in _BYTES.pre_tokenize_str(token)):
            raise ExportError(
                f"transformers makes another tokenizer of {path}: token {id} is {made!r} there and {token!r} in the file; "
                "export the original model's folder instead"
            )


def _add_tokens(tokenizer: Tokenizer, said: _Said) -> None:
    """Have the tokens that are no text found whole, before anything is split."""
    named = {said.id("bos"), *said.ends}
    found = []
    for id, (token, kind) in enumerate(zip(said.tokens, said.types, strict=False)):  # there may be more types
        special = kind in (_UNKNOWN, _CONTROL) or id in named
        if not token or not (special or kind == _USER_DEFINED):
            continue
        if tokenizer.token_to_id(token) == id:
            rstrip = said.strips_behind_tokens and token not in _PHI3_KEEPS
            found.append(AddedToken(token, normalized=False, special=special, rstrip=rstrip))
        elif special:  # else it comes of the merges, as gemma's runs of blanks, which transformers spells in another way
            raise ExportError(
                f"transformers makes other text of the special token {token!r} of {said.path}; leave --tokenizer transformers "
                "out"
            )
    tokenizer.add_tokens(found)


def _surround(tokenizer: Tokenizer, said: _Said) -> None:
    """Put BOS and EOS around a text, where the file says so."""
    adds = {"bos": said.adds_bos, "eos": said.flag("add_eos_token", False)}
    ids = {name: id for name in adds if adds[name] and (id := said.id(name)) is not None}
    for name in adds.keys() - ids.keys():
        if said.flag(f"add_{name}_token", False):
            raise ExportError(
                f"{said.path} adds {name.upper()} to a text (tokenizer.ggml.add_{name}_token) and does not say which token that"
                " is; convert the model again"
            )
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[name for name in ("bos", "$A", "eos") if name in ("$A", *ids)],
            special_tokens=[{"id": name, "ids": [id], "tokens": [said.tokens[id]]} for name, id in ids.items()],
        )


def _templates(keys: Mapping[str, Value]) -> dict[str, Any]:
    """The chat templates: `tokenizer.chat_template`, and `tokenizer.chat_template.NAME`."""
    named = {key.removeprefix(f"{_TEMPLATE}."): text for key, text in keys.items() if key.startswith(f"{_TEMPLATE}.")}
    default = {DEFAULT_TEMPLATE: keys[_TEMPLATE]} if keys.get(_TEMPLATE) else {}
    return {**named, **default}
