"""Text becomes tokens and tokens become text, a few at a time: the bundle's tokenizer and chat template.

Decoding reproduces `Tokenizer.decode(ids, skip_special_tokens=True)` without decoding anything twice. Every decoder of today's
models lets a token contribute the same bytes wherever it stands, save for the first, which may lose its space; so a table of
bytes and one incremental UTF-8 decoder suffice. One difference is meant: where a run of byte tokens (`<0xE2>`) is damaged,
`decode` gives up all of it, while here the whole characters in it live.

`tokenizers.decoders.DecodeStream` decodes its window twice a token, holds the text back as long as it ends in U+FFFD, even
where the model means that character, and raises where a prefix changes.
"""

import codecs
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from runtime.bundle import DEFAULT_TEMPLATE, TOKENIZER, Bundle, BundleError
from runtime.template import ChatTemplate, Shape, TemplateError

_FOR_TOOLS = "tool_use"
"""What the template for conversations with tools is called among several."""
MAX_ECHO = 80
"""Characters of a client's text that an error repeats."""


class TextError(Exception):
    """A text or a conversation cannot become a prompt; the message is a sentence for the client."""


class Text:
    """The text side of one bundle. It holds no state of a request: one serves any number of them."""

    def __init__(
        self, tokenizer: Tokenizer, templates: Mapping[str, ChatTemplate] | None = None, folder: Path = Path()
    ) -> None:
        """`templates` are the chat templates by their names; `folder` is the bundle's."""
        self.folder = folder
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._templates = dict(templates or {})
        self._pieces = _Pieces(tokenizer)

    @classmethod
    def load(cls, folder: Path, bundle: Bundle) -> "Text":
        """The text side of the bundle in `folder`; raises BundleError."""
        path = folder / TOKENIZER
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific.
            raise BundleError(f"{path} cannot be read ({error}); export the model again") from error
        # A longer text has more tokens than the model has positions, whatever it says.
        most = bundle.max_length * max(map(len, tokenizer.get_vocab()))
        templates = {name: _template(folder / file, most, bundle.special_tokens) for name, file in bundle.templates.items()}
        return cls(tokenizer, templates, folder)

    @property
    def templates(self) -> tuple[str, ...]:
        """The names of the chat templates; without any `chat` cannot work."""
        return tuple(self._templates)

    def choose(self, wanted: str | None = None, *, tools: bool = False) -> str:
        """The name of the chat template that is meant: the one that is `wanted`, with tools `tool_use`, else `default`.

        That is what transformers' `apply_chat_template` takes. Raises TextError where there is none.
        """
        if not self._templates:
            raise TextError("this model has no chat template; send its prompt to /v1/completions instead")
        there = ", ".join(sorted(self._templates))
        if wanted is not None:
            if wanted not in self._templates:
                raise TextError(
                    f"this model has no chat template called {_short(wanted)!r}; it has {there}. Templates are the model's "
                    "own: export it with --chat-template to give it another"
                )
            return wanted
        if tools and _FOR_TOOLS in self._templates:
            return _FOR_TOOLS
        if DEFAULT_TEMPLATE not in self._templates:
            raise TextError(f"this model has several chat templates and none of them is the default; name one of {there}")
        return DEFAULT_TEMPLATE

    def shape(self, template: str | None = None) -> Shape:
        """What the chat template of that name takes; of None, a template that takes nothing but turns."""
        return Shape() if template is None else self._templates[template].shape

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of `text`; with `special`, also those that the model expects around a text, such as BOS.

        A special token that is spelled out in `text` becomes that token, as in transformers. Raises TextError where `text` has
        half of a surrogate pair, which has no UTF-8.
        """
        _check_characters(text)
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids

    @property
    def special_tokens(self) -> int:
        """How many tokens `encode` puts around a text."""
        return self._tokenizer.num_special_tokens_to_add(False)

    def encode_within(self, text: str, most: int) -> list[int]:
        """`encode` cut to `most` tokens: of the text itself the end goes, the special tokens around it stay.

        `most` is more than `special_tokens`. Raises TextError as `encode` does.
        """
        _check_characters(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        encoding.truncate(most - self.special_tokens)
        ids: list[int] = self._tokenizer.post_process(encoding, None, True).ids
        return ids

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> list[int]:
        """The tokens of a conversation, laid out by the chat template of that name, or the one that `choose` gives.

        Raises TextError.

        The template spells out every special token itself, so none is added. Those that a message spells out become tokens
        too, as transformers does by default: a client can end its own turn early and write the next one. The rest is
        `ChatTemplate.render`'s.
        """
        name = self.choose(tools=tools is not None) if template is None else template
        try:
            prompt = self._templates[name].render(
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                options=options,
            )
        except TemplateError as error:
            raise TextError(str(error)) from error
        return self.encode(prompt, special=False)

    def stream(self, stop: Sequence[str] = (), keep: Collection[str] = ()) -> "TextStream":
        """A detokenizer for one answer, which ends before the first of the strings in `stop`; raises TextError.

        Special tokens are no text, save for those in `keep`.
        """
        if not all(stop):
            raise TextError("a stop string is empty; leave it out")
        return TextStream(self._pieces, stop, frozenset(id for token in keep if (id := self.special_id(token)) is not None))

    def special_id(self, token: str) -> int | None:
        """The id of the special token that is spelled `token`; None where there is none, or where it is text."""
        id = self._tokenizer.token_to_id(token)
        return id if id in self._pieces.special else None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, as the tokenizer itself has it; special tokens spelled out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_text(self, id: int) -> str:
        """What the token adds to a text; special tokens spelled out, bytes that are no whole character as U+FFFD."""
        return self.token_bytes(id).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 that the token adds to a text, perhaps part of a character; nothing for an id that is no token."""
        return self._pieces.spelled(id)


class TextStream:
    """The text of one answer, as its tokens come."""

    stop: str | None
    """The stop string that is complete: the text before it has been returned and there will be no more."""

    def __init__(self, pieces: "_Pieces", stop: Sequence[str], keep: frozenset[int] = frozenset()) -> None:
        self.stop = None
        self._pieces = pieces
        self._keep = keep
        self._first = True
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_Stop(text) for text in stop]
        self._held = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.stop is not None

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` made certain: whole characters, none of which can belong to a stop string."""
        return self._until_stop(self._characters.decode(b"".join(map(self._piece, tokens))))

    def take(self, tokens: Sequence[int]) -> tuple[str, int]:
        """What `push` gives, and how many of `tokens` that took: the ones behind a stop string are not looked at."""
        if not self._stops:
            return self.push(tokens), len(tokens)
        text, taken = "", 0
        while taken < len(tokens) and not self.stopped:
            text += self.push(tokens[taken : taken + 1])
            taken += 1
        return text, taken

    def finish(self) -> str:
        """The text that was held back, to be called when generation has ended; half a character comes out as U+FFFD."""
        text = self._until_stop(self._characters.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _piece(self, id: int) -> bytes:
        if id in self._keep:
            self._first = False
            return self._pieces.spelled(id)
        if not self._first:
            return self._pieces.later(id)
        piece = self._pieces.first(id)
        self._first = piece is None
        return piece or b""

    def _until_stop(self, new: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        completed = [(end, -len(stop.text), stop.text) for stop in self._stops if (end := stop.advance(new)) is not None]
        if completed:
            end, negative_length, self.stop = min(completed)
            certain = len(self._held) + end + negative_length
            self._held = ""
        else:
            certain = len(text) - max(stop.matched for stop in self._stops)
            self._held = text[certain:]
        return text[:certain]


class _Stop:
    """How much of one stop string the text's end matches (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0]  # By matched characters less one: the next shorter beginning of `text` that also ends there.
        for character in text[1:]:
            length = self._shorter[-1]
            while length and character != text[length]:
                length = self._shorter[length - 1]
            self._shorter.append(length + (character == text[length]))

    def advance(self, new: str) -> int | None:
        """Read on through `new`; the offset behind the stop string where it is complete."""
        at = 0
        while at < len(new):
            if not self.matched and (at := new.find(self.text[0], at)) < 0:
                return None
            while self.matched and new[at] != self.text[self.matched]:
                self.matched = self._shorter[self.matched - 1]
            self.matched += new[at] == self.text[self.matched]
            at += 1
            if self.matched == len(self.text):
                return at
        return None


class _Pieces:
    """What every token adds to a text, in UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        self._decode: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode
        # The decoder is asked rather than its configuration, in which a sequence may nest it anywhere.
        self._byte_level = self._decode(["Ã", "©"]) == "é"
        self._byte_fallback = self._decode(["<0xC3>", "<0xA9>"]) == "é"
        self.special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._later: dict[int, bytes] = {}

    def later(self, id: int) -> bytes:
        """What the token adds behind others: nothing if it is special or unknown."""
        piece = self._later.get(id)
        if piece is None:
            piece = self._later[id] = b"" if id in self.special else self.spelled(id)
        return piece

    def first(self, id: int) -> bytes | None:
        """What the token adds as the first of a text; None if it adds nothing anywhere, so that the next is the first."""
        token = self._tokenizer.id_to_token(id)
        if token is None or id in self.special:
            return None
        alone = self._decode([token])
        return (self._raw(token) or alone.encode()) if alone else b""

    def spelled(self, id: int) -> bytes:
        """What the token adds behind others, the special ones too."""
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        raw = self._raw(token)
        return self._decode(["a", token])[1:].encode() if raw is None else raw

    def _raw(self, token: str) -> bytes | None:
        """The bytes that `token` stands for, where it stands for bytes, which may be no text."""
        if self._byte_level:
            known = [_BYTES[character] for character in token if character in _BYTES]
            # As the decoder does: a token with any other character stands for itself.
            return bytes(known) if len(known) == len(token) else token.encode()
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return None


def _short(text: str) -> str:
    """`text` as an error repeats it, which need not be long: a client may have sent a whole template as a name."""
    return text if len(text) <= MAX_ECHO else f"{text[: MAX_ECHO - 3]}..."


def _check_characters(text: str) -> None:
    """Raise TextError where `text` has half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X}); send whole characters"
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (`bytes_to_unicode` of GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _template(path: Path, most: int, tokens: Mapping[str, str]) -> ChatTemplate:
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); export the model again") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is no UTF-8 text ({error}); export the model again") from error
    try:
        return ChatTemplate(source, most=most, tokens=tokens)
    except jinja2.TemplateSyntaxError as error:
        raise BundleError(f"{path} cannot be read (line {error.lineno}: {error.message}); export the model again") from error
