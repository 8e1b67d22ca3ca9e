"""Tools that a model may call: what it is told of them, how it writes its calls, and how they are read as they come.

Everything here is text to text. A chat with tools goes

    format = format_of(bundle.tools, text.special_id)
    messages, described = prepare(body.messages, body.tools, format, text.shape)      # -> Text.chat
    constraint = format.grammar(tools, name=None, parallel=True)                      # where a call is required
    parser = format.parser()                                                          # <- the answer's text, piece by piece
    stream = text.stream(stops, keep=format.special)
"""

from runtime.bundle import ToolFormat
from server.tools.calls import Arguments, Call, CallEnded, CallStarted, Content, ConversationError, Event, Tool
from server.tools.conversation import prepare
from server.tools.format import Format, TokenId
from server.tools.hermes import Hermes
from server.tools.llama3 import Llama3
from server.tools.mistral import Mistral
from server.tools.phi import Phi
from server.tools.reading import Parser

__all__ = [
    "Arguments",
    "Call",
    "CallEnded",
    "CallStarted",
    "Content",
    "ConversationError",
    "Event",
    "Format",
    "Parser",
    "Tool",
    "format_of",
    "prepare",
]

_FORMATS: dict[ToolFormat, type[Format]] = {"hermes": Hermes, "llama3": Llama3, "mistral": Mistral, "phi": Phi}


def format_of(name: ToolFormat | None, token_id: TokenId = lambda _: None) -> Format:
    """The format of a bundle (`Bundle.tools`) whose tokenizer's special tokens `token_id` finds (`Text.special_id`).

    A model that was made for none is told to write Hermes'.
    """
    return Hermes(token_id, native=False) if name is None else _FORMATS[name](token_id, native=True)
