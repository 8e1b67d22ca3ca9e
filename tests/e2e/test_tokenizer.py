"""The default model's tokenizer, as exported from its GGUF, against two that share no code with it."""

import heapq
import itertools
import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped]
from gguf import GGUFReader
from tokenizers import Tokenizer

from export.tokenizer import TextSide, read_text, write_text

LLAMA_CPP = Path(__file__).parent.parent / "data" / "llama_cpp_tokens.json"
CASES: list[tuple[str, list[int]]] = [(case["text"], case["ids"]) for case in json.loads(LLAMA_CPP.read_text())["cases"]]

# Of llama.cpp's rule for `smollm`: first every digit alone, then GPT-2's words.
DIGIT = regex.compile(r"\p{N}")
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# Bytes that are no token of this vocabulary, so that both tokenizers drop them.
MISSING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@dataclass(frozen=True)
class Reference:
    """llama.cpp's byte-level BPE, written from its description, over a GGUF's own metadata."""

    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]
    special: regex.Pattern[str]
    spelling: dict[int, str]

    @classmethod
    def of(cls, path: Path) -> "Reference":
        fields = GGUFReader(path).fields
        assert fields["tokenizer.ggml.pre"].contents() == "smollm"
        tokens = fields["tokenizer.ggml.tokens"].contents()
        control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True) if kind == 3]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
        visible = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
        hidden = [byte for byte in range(256) if byte not in visible]
        return cls(
            ids={token: id for id, token in enumerate(tokens)},
            ranks={pair: rank for rank, pair in enumerate(merges)},
            special=regex.compile("(" + "|".join(regex.escape(t) for t in sorted(control, key=len, reverse=True)) + ")"),
            spelling={byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)},
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self.special.split(text)):
            if index % 2:
                ids.append(self.ids[part])
            else:
                for word in self._words(part):
                    ids += self._merged([self.spelling[byte] for byte in word.encode()])
        return ids

    def _words(self, text: str) -> Iterator[str]:
        for piece in regex.splititer(f"({DIGIT.pattern})", text):
            yield from WORD.findall(piece)

    def _merged(self, symbols: list[str]) -> list[int]:
        while pairs := [(self.ranks[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in self.ranks]:
            _, at = heapq.nsmallest(1, pairs)[0]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self.ids[symbol] for symbol in symbols if symbol in self.ids]


@pytest.fixture(scope="session")
def side(default_gguf: Path) -> TextSide:
    return read_text(default_gguf.parent, default_gguf.name)


@pytest.fixture(scope="session")
def exported(side: TextSide, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bundle")
    assert write_text(side, folder) == ("tokenizer.json", "chat_template.jinja")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def reference(default_gguf: Path) -> Reference:
    return Reference.of(default_gguf)


def lacks_bytes(text: str) -> bool:
    return not MISSING.isdisjoint(text.encode())


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("text", "ids"), CASES, ids=lambda value: ascii(value)[:40])
def test_tokens_are_those_of_llama_cpp(exported: Tokenizer, reference: Reference, text: str, ids: list[int]) -> None:
    assert reference.encode(text) == ids
    if not lacks_bytes(text):
        assert encode(exported, text) == ids


def test_random_texts_have_the_tokens_of_the_reference(exported: Tokenizer, reference: Reference) -> None:
    chance = random.Random(7)
    # Characters that Python's Unicode knows: what later versions added, every tokenizer classes by its own version.
    ranges = [
        [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
        for codes in (range(0x80), range(0x3000), range(0xD800), range(0xE000, 0x32000))
    ]
    fragments = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "0", "42", "e\u0301", "<|im_end|>", "the", "👩‍🚀", "\u0000"]
    texts = [
        "".join(
            chance.choice(fragments if chance.random() < 0.4 else chance.choice(ranges)) for _ in range(chance.randrange(1, 60))
        )
        for _ in range(1500)
    ]
    compared = [text for text in texts if not lacks_bytes(text)]
    assert len(compared) > 500
    for text in compared:
        assert encode(exported, text) == reference.encode(text), ascii(text)


def test_a_byte_that_is_no_token_lets_its_neighbours_merge(exported: Tokenizer, reference: Reference) -> None:
    # The original tokenizer drops such a byte before the merges, llama.cpp after them: here the original is followed.
    assert encode(exported, "!\u0004!") == encode(exported, "!!")
    assert reference.encode("!\u0004!") == [*reference.encode("!"), *reference.encode("!")]


def test_texts_come_back_whole(exported: Tokenizer) -> None:
    for text, _ in CASES:
        if not lacks_bytes(text):
            assert exported.decode(encode(exported, text), skip_special_tokens=False) == text


def test_what_the_manifest_needs_comes_from_the_file(side: TextSide, exported: Tokenizer) -> None:
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    assert side.special_tokens == named
    assert [exported.id_to_token(id) for id in side.stop_ids] == ["<|im_end|>", "<|endoftext|>"], "as in llama.cpp"
    assert set(side.templates) == {"default"}
    assert "<|im_start|>" in side.templates["default"]
    assert exported.encode("Hello").ids == encode(exported, "Hello"), "the file says that no BOS is added"
    assert exported.get_vocab_size() == 49152
