"""How a model writes the calls of tools, read from its chat template."""

from typing import Literal

from export.tokenizer import TextSide
from runtime.bundle import DEFAULT_TEMPLATE, ToolFormat
from runtime.template import ChatTemplate

_NOT_JSON = ("<function=", "<arg_key>", "<parameter")
"""What is in the calls of those that write them otherwise, such as Functionary, GLM and Qwen3-Coder."""


def detect(side: TextSide) -> ToolFormat | None:
    """The format that the model was made for; None where its template takes no tools, or has it write calls in another way.

    Of several templates, the one for conversations with tools is looked at, as transformers takes it for them.
    """
    template = side.templates.get("tool_use") or side.templates.get(DEFAULT_TEMPLATE) or ""
    if not template or ChatTemplate(template, most=0).shape.tools is None:
        return None
    if any(mark in template for mark in _NOT_JSON):
        return None
    tokens = side.tokenizer.get_vocab()
    if "[TOOL_CALLS]" in template or ("[AVAILABLE_TOOLS]" in template and "[TOOL_CALLS]" in tokens):
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if any(mark in template for mark in ("<|tool_call|>", "functools")) or (
        "<|tool|>" in template and "<|tool_call|>" in tokens
    ):
        return "phi"
    if "parameters" in template and ("<|python_tag|>" in template or "ipython" in template):
        return "llama3"
    return None


def named(format: ToolFormat | Literal["none"]) -> ToolFormat | None:
    """The format that a recipe names."""
    return None if format == "none" else format
