"""Calls of tools, in the tokens of the default model."""

from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from export.tokenizer import read_text
from export.tools import detect
from runtime.text import Text
from server.tools import format_of
from tests.unit.test_tools import INVALID, TOOLS, VALID, events_of, read_events


def test_the_default_models_tokenizer_can_write_calls(default_gguf: Path) -> None:
    side = read_text(default_gguf.parent, default_gguf.name)
    constraint = LLTokenizer(side.tokenizer.to_str(), eos_token=side.stop_ids[0])
    format, text = format_of(detect(side), Text(side.tokenizer).special_id), Text(side.tokenizer)
    assert not format.native
    for calls, expected in (*(([call], True) for call in VALID), (INVALID[:1], False), (VALID, False)):
        tokens = text.encode(format.render(calls), special=False)
        matcher = LLMatcher(constraint, format.grammar(TOOLS))
        assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == expected
        stream = text.stream(keep=format.special)
        assert read_events(format, [*(stream.push([token]) for token in tokens), stream.finish()]) == events_of(calls)
