"""What libraries say while they work: kept from the terminal; what concerns a model is told, a line each."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from transformers.utils.logging import set_tqdm_hook

MAX_LENGTH = 300
"""Characters of a message that are worth reading."""
_LIBRARY = "transformers"
_ADVICE = re.compile(
    r"^(please|if you|you (can|may|should|are|have|must|might)|make sure|see |check |consider|feel free|alternatively"
    r"|to (remove|silence|fix|avoid|get|use|load|disable)|we (suggest|recommend|strongly)|for (more|details)|note that you"
    r"|this (warning|is) |set `|pass |use `|try )",
    re.IGNORECASE,
)
"""Begins a sentence that tells whoever calls the library what to write; none of it can be written here."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CHATTER = (
    "LOAD REPORT",  # its contents are checked by name in source.py
    "is deprecated",
    "will be removed in",
    "`torch_dtype`",
    "dequantiz",  # which is what is wanted
    "`loss_type=",
    "generation flags",
    "Generate config",
    "The fast path",
    "fast path is not available",
    "kernels",
    "attn_implementation",
    "`use_cache=True`",
    "has generative capabilities",
    "You passed `quantization_config`",
    "field, to be used together with",  # as Phi-3's authors wrote it, and as it is computed
)
"""Found in warnings that change nothing about the model that is loaded."""


@contextmanager
def listening(heard: list[str]) -> Iterator[None]:
    """While this lasts, transformers warns nobody; into `heard` goes, in few words, what concerns the model."""
    logger = logging.getLogger(_LIBRARY)
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    listener = _Listener()
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    once: Any = getattr(logging.Logger, "warning_once", None)
    if once is not None and hasattr(once, "cache_clear"):
        once.cache_clear()  # so that a second model with the same fault is told of it, too
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"transformers\.")
            try:
                yield
            finally:
                heard += concerning([*listener.messages, *(str(warning.message) for warning in caught)])
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextmanager
def counting_weights(share: Callable[[float], None]) -> Iterator[None]:
    """While this lasts, `share` is told how many of a model's weights transformers has loaded, from 0 to 1."""

    def counted(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != "Loading weights" or not args:
            return factory(*args, **kwargs)
        return _counted(list(args[0]), share)

    before = set_tqdm_hook(counted)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _counted(items: list[Any], share: Callable[[float], None]) -> Iterator[Any]:
    for number, item in enumerate(items):
        share(number / len(items))
        yield item


@contextmanager
def silence() -> Iterator[None]:
    """While this lasts, nothing that a library prints or warns of reaches the terminal: torch prints whole graphs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _not_converted(messages: list[str]) -> list[str]:
    """The weights that a report on a model's loading says it could not make of those that are stored."""
    rows = [row for message in messages if "LOAD REPORT" in message for row in _ANSI.sub("", message).splitlines()]
    return [f"{row.split('|')[0].strip()} could not be made of them" for row in rows if "| CONVERSION |" in row]


def concerning(messages: list[str]) -> list[str]:
    """Those of `messages` that say something of a model's weights or configuration, each once and without advice."""
    told = [in_few_words(message) for message in messages if not any(part in message for part in _CHATTER)]
    return list(dict.fromkeys([*filter(None, told), *_not_converted(messages)]))


def in_few_words(message: str) -> str:
    """`message` on one line, without the sentences that advise whoever calls the library."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`\"'])", " ".join(message.split()))
    kept = [sentence for sentence in sentences if not _ADVICE.match(sentence)]
    text = " ".join(kept) or sentences[0]
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 3].rstrip() + "..."


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
