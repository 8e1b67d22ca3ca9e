import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from runtime.bundle import FORMAT, Bundle, BundleError, File, Source
from runtime.template import ChatTemplate
from runtime.text import Text, TextError

CORPUS = [
    "the quick brown fox jumps over the lazy dog, isn't it? 12345",
    "def f(x):\n    return x ** 2  # naïve café",
    "你好，世界！ здравствуй мир 👩‍🚀 and so on and so forth",
] * 5
TRAINING: dict[str, Any] = {"vocab_size": 420, "show_progress": False, "special_tokens": ["<unk>", "<s>", "</s>"]}


@cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it; with added tokens that are text, in and outside of the byte alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, **TRAINING))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("｜ tool ｜", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: SentencePiece with a token for each byte."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(**TRAINING))
    document = json.loads(trained.to_str())
    vocabulary = document["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    document["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """SentencePiece as T5 and the Unigram models have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(**TRAINING))
    return tokenizer


@cache
def wordpiece() -> Tokenizer:
    """As BERT has it, with the decoder that closes the gaps before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(**TRAINING))
    return tokenizer


@cache
def words() -> Tokenizer:
    """Without a decoder: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(**TRAINING))
    return tokenizer


KINDS: list[Callable[[], Tokenizer]] = [byte_level, byte_fallback, metaspace, wordpiece, words]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    id = tokenizer.token_to_id(token)
    assert id is not None
    return id


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[int]:
    """Any token; also ids behind the last one, which a model with padded embeddings can produce."""
    return st.integers(0, tokenizer.get_vocab_size() + 3)


def whole_bytes(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens, of which the byte tokens make whole characters: `ByteFallback` decodes a damaged run in its own way."""
    byte_tokens = {id_of(tokenizer, f"<0x{byte:02X}>"): byte for byte in range(256)}
    one = ids_of(tokenizer).filter(lambda id: id not in byte_tokens).map(lambda id: [id])
    spelled = st.characters(codec="utf-8").map(lambda char: [id_of(tokenizer, f"<0x{byte:02X}>") for byte in char.encode()])
    return st.lists(st.one_of(one, spelled)).map(lambda groups: [id for group in groups for id in group])


def chunks(ids: list[int], sizes: Iterator[int]) -> Iterator[list[int]]:
    while ids:
        size = next(sizes)
        yield ids[:size]
        ids = ids[size:]


def streamed(text: Text, ids: list[int], data: st.DataObject, stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    """What a stream makes of `ids`, pushed a few at a time."""
    stream = text.stream(stop)
    sizes = iter(lambda: data.draw(st.integers(1, 4)), 0)
    out = "".join(stream.push(chunk) for chunk in chunks(ids, sizes)) + stream.finish()
    return out, stream.stopped


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_says_what_decoding_at_once_says(kind: Callable[[], Tokenizer], data: st.DataObject) -> None:
    tokenizer = kind()
    ids = data.draw(whole_bytes(tokenizer) if kind is byte_fallback else st.lists(ids_of(tokenizer)))
    assert streamed(Text(tokenizer), ids, data)[0] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@given(data=st.data())
def test_text_comes_back_and_no_character_is_sent_in_halves(kind: Callable[[], Tokenizer], data: st.DataObject) -> None:
    original = data.draw(st.text(st.characters(codec="utf-8", exclude_characters="▁\ufffd")))
    text = Text(kind())
    stream = text.stream()
    sent = ""
    for id in text.encode(original, special=False):
        sent += stream.push([id])
        assert original.startswith(sent)
    assert sent + stream.finish() == original


def test_half_a_character_waits_and_comes_out_as_a_replacement_at_the_end() -> None:
    text = Text(byte_level())
    ids = text.encode("\U00010348", special=False)
    assert len(ids) == 4
    stream = text.stream()
    assert stream.push(ids[:3]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_replacement_character_that_the_model_means_is_sent_at_once() -> None:
    text = Text(byte_level())
    assert text.stream().push(text.encode("\ufffd", special=False)) == "\ufffd"


def test_damaged_byte_tokens_do_not_damage_the_characters_around_them() -> None:
    tokenizer = byte_fallback()
    damaged = [id_of(tokenizer, token) for token in ("<0xC3>", "<0xA9>", "<0xFF>", "<0xE2>", "<0x82>", "t")]
    stream = Text(tokenizer).stream()
    assert [stream.push([id]) for id in damaged] == ["", "é", "\ufffd", "", "", "\ufffdt"]


@pytest.mark.parametrize(("kind", "first", "second"), [(byte_level, "", ""), (byte_fallback, "", " "), (metaspace, "", " ")])
def test_the_first_token_loses_its_space_and_the_second_keeps_it(
    kind: Callable[[], Tokenizer], first: str, second: str
) -> None:
    tokenizer = kind()
    the = tokenizer.encode("the", add_special_tokens=False).ids
    special = id_of(tokenizer, "</s>")
    stream = Text(tokenizer).stream()
    assert stream.push([special]) == ""
    assert stream.push(the) == first + "the"
    assert stream.push([special, *the]) == second + "the"


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """`text` up to the stop string that is complete first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        if complete := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(data=st.data())
def test_a_stream_ends_before_the_first_stop_string(data: st.DataObject) -> None:
    text = Text(byte_level())
    original = data.draw(st.text("abé", max_size=30))
    stop = tuple(data.draw(st.lists(st.text("abé", min_size=1, max_size=6), max_size=4)))
    ids = text.encode(original, special=False)
    assert streamed(text, ids, data, stop) == cut(original, stop)


@given(data=st.data())
def test_what_was_sent_never_belongs_to_a_stop_string(data: st.DataObject) -> None:
    text = Text(byte_level())
    original = data.draw(st.text("ab", max_size=30))
    stop = tuple(data.draw(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3)))
    stream = text.stream(stop)
    sent = ""
    for length, id in enumerate(text.encode(original, special=False), 1):
        sent += stream.push([id])
        so_far = byte_level().decode(text.encode(original, special=False)[:length])
        expected, stopped = cut(so_far, stop)
        assert stream.stopped == stopped
        if not stopped:
            held = max(n for s in stop for n in range(len(s)) if so_far.endswith(s[:n]))
            expected = so_far[: len(so_far) - held]
        assert sent == expected


def test_nothing_comes_after_a_stop_string() -> None:
    text = Text(byte_level())
    stream = text.stream(["END"])
    assert stream.push(text.encode("so far ENDLESS and", special=False)) == "so far "
    assert stream.stopped
    assert stream.push(text.encode(" on", special=False)) == ""
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(TextError, match="stop string is empty"):
        Text(byte_level()).stream(["x", ""])


def test_encoding_adds_what_the_model_expects_unless_told_otherwise() -> None:
    text = Text(byte_level())
    assert text.encode("the") == [1, *text.encode("the", special=False)]


def test_special_tokens_in_a_text_are_tokens_and_nul_is_a_character() -> None:
    text = Text(byte_level())
    assert text.encode("</s>", special=False) == [2]
    assert b"".join(map(text.token_bytes, text.encode("a\0b", special=False))) == b"a\0b"


@pytest.mark.parametrize("damaged", ["\ud800", "fine \udfff", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_refused(damaged: str) -> None:
    with pytest.raises(TextError, match=r"half of a surrogate pair \(U\+D"):
        Text(byte_level()).encode(damaged)


def test_a_text_is_never_cut_or_padded() -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    assert Text(tokenizer).encode("the quick brown fox") == Text(byte_level()).encode("the quick brown fox")


def test_a_single_token_is_told_in_text_and_bytes() -> None:
    text = Text(byte_level())
    half = text.encode("\U00010348", special=False)[0]
    assert (text.token_text(half), text.token_bytes(half)) == ("\ufffd", b"\xf0")
    assert text.token_text(2) == "</s>"
    assert (text.token_text(10_000), text.token_bytes(10_000)) == ("", b"")
    spaced = Text(byte_fallback())
    assert spaced.token_text(spaced.encode("the")[0]) == " the"
    assert spaced.token_bytes(id_of(byte_fallback(), "<0xE2>")) == b"\xe2"


TEMPLATE_FILE = (File("chat_template.jinja", "", 0),)


def bundle(**changes: Any) -> Bundle:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    fields: dict[str, Any] = {"vocab_size": 500, "max_length": 64, "stop_ids": (2,), "special_tokens": tokens}
    fields |= {"files": (), "variants": ()}
    return Bundle(FORMAT, "tiny", Source("folder", "tiny"), "llama", **(fields | {"created": 0} | changes))


def test_a_bundle_is_loaded_with_its_template_and_its_special_tokens(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    text = Text.load(tmp_path, bundle(files=TEMPLATE_FILE))
    assert text.templates == ("default",)
    assert text.chat([{"role": "user", "content": "the"}]) == [1, *text.encode("the", special=False), 2]


def test_a_conversation_that_no_prompt_can_hold_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    text = Text.load(tmp_path, bundle(max_length=4, files=TEMPLATE_FILE))
    with pytest.raises(TextError, match="more than a prompt of this model can hold"):
        text.chat([{"role": "user", "content": "x" * 1000}])


def test_a_template_that_is_no_utf8_is_told_as_a_damaged_bundle(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BundleError, match=r"no UTF-8 text.*export the model again"):
        Text.load(tmp_path, bundle(files=TEMPLATE_FILE))


def test_a_model_without_a_template_does_not_chat(tmp_path: Path) -> None:
    """A file that the manifest does not list is none of the bundle's: nobody has its hash."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    text = Text.load(tmp_path, bundle())
    assert not text.templates
    with pytest.raises(TextError, match="has no chat template"):
        text.chat([{"role": "user", "content": "the"}])


def test_half_a_surrogate_pair_in_a_message_is_refused() -> None:
    text = Text(byte_level(), {"default": ChatTemplate("{{ messages | tojson }}", most=1000)})
    with pytest.raises(TextError, match="surrogate"):
        text.chat([{"role": "user", "content": "\ud800"}])


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{"), ("tokenizer.json", None), ("chat_template.jinja", "{% if %}")]
)
def test_a_damaged_text_side_is_named(tmp_path: Path, file: str, content: str | None) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(BundleError, match=rf"{file} cannot be read .*export the model again"):
        Text.load(tmp_path, bundle(files=TEMPLATE_FILE))
