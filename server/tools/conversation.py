"""A chat in OpenAI's form becomes the messages that a model's chat template takes."""

import hashlib
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runtime.template import Shape
from server.tools.calls import Call, ConversationError, Tool
from server.tools.format import Format
from server.tools.mistral import Mistral

Message = dict[str, Any]


def prepare(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], format: Format, shape: Shape
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """What `Text.chat` takes as messages and as `tools`, for a chat template of `shape`.

    `messages` have OpenAI's fields: role, content (text, text parts or null), name, tool_calls, tool_call_id, and the
    assistant's reasoning. Where the template does not know tools, their calls or their results, these are written into the
    text of the turns, as `format` has them: so a conversation with tools works with any template. Raises ConversationError.
    """
    turns = [_turn(message) for message in messages]
    _name_results(turns)
    if format.single:
        turns = _one_call_each(turns)
    if not (shape.calls and format.native):
        turns = [_with_calls_in_text(turn, format) for turn in turns]
    if not (shape.results and format.native):
        turns = _with_results_in_text(turns, format)
    described: list[dict[str, Any]] | None = [tool.described for tool in tools] or None
    if described and not (shape.tools and format.native):
        turns, described = _told(turns, format.describe(tools), shape), None
    elif described and shape.tools == "system message":
        turns, described = _listed(turns, described), None
    return [_finished(turn, shape, format) for turn in turns], described


def _turn(message: Mapping[str, Any]) -> Message:
    """A message whose content is a text, without the fields that are null: templates ask whether a field is there."""
    turn = {key: value for key, value in message.items() if value is not None and key != "content"}
    if turn["role"] == "developer":
        turn["role"] = "system"
    if not turn.get("tool_calls"):
        turn.pop("tool_calls", None)
    content = message.get("content")
    turn["content"] = content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())
    return turn


def _name_results(turns: Iterable[Message]) -> None:
    """Give every result the name of its tool, which OpenAI leaves to its call's id."""
    names: dict[str, str] = {}
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            names[call.get("id", "")] = call["function"]["name"]
        if turn["role"] == "tool" and "name" not in turn and (name := names.get(turn.get("tool_call_id", ""))):
            turn["name"] = name


def _one_call_each(turns: Sequence[Message]) -> list[Message]:
    """Turns with several calls as several turns, each with its result behind it: the first of its id that no other call has
    taken, or without ids the first without one. Results that are nobody's come last.
    """
    apart: list[Message] = []
    left = deque(turns)
    while left:
        turn = left.popleft()
        calls = turn.get("tool_calls", ())
        if len(calls) < 2:
            apart.append(turn)
            continue
        results: dict[str | None, deque[Message]] = defaultdict(deque)
        while left and left[0]["role"] == "tool":
            result = left.popleft()
            results[result.get("tool_call_id")].append(result)
        for index, call in enumerate(calls):
            apart.append(turn | {"tool_calls": [call], "content": "" if index else turn["content"]})
            if own := results[call.get("id")]:
                apart.append(own.popleft())
        apart += [result for rest in results.values() for result in rest]
    return apart


def _with_calls_in_text(turn: Message, format: Format) -> Message:
    if "tool_calls" not in turn:
        return turn
    calls = [Call(call["function"]["name"], call["function"].get("arguments") or "{}") for call in turn["tool_calls"]]
    content = "\n".join(filter(None, [turn["content"], format.render(calls)]))
    return {key: value for key, value in turn.items() if key != "tool_calls"} | {"content": content}


def _with_results_in_text(turns: Iterable[Message], format: Format) -> list[Message]:
    """Results as turns of the user. What would then be two of them in a row is one: many templates want them to alternate."""
    written: list[tuple[Message, list[str]]] = []
    """Each turn, and its content line by line."""
    after_result = False
    for turn in turns:
        is_result = turn["role"] == "tool"
        if is_result:
            turn = {"role": "user", "content": format.render_result(turn.get("name"), turn["content"])}
        if after_result and turn["role"] == "user":
            written[-1][1].append(turn["content"])
        else:
            written.append((turn, [turn["content"]]))
        after_result = is_result or (after_result and turn["role"] == "user")
    return [turn | {"content": "\n".join(lines)} for turn, lines in written]


def _told(turns: Sequence[Message], words: str, shape: Shape) -> list[Message]:
    """The turns with `words` in the system message or, where the template knows none, at the first turn's beginning."""
    if turns and (turns[0]["role"] == "system" or not shape.system):
        first = turns[0]
        told = [first["content"], words] if first["role"] == "system" else [words, first["content"]]
        return [first | {"content": "\n\n".join(filter(None, told))}, *turns[1:]]
    return [{"role": "system", "content": words}, *turns]


def _listed(turns: Sequence[Message], described: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The turns with the tools in the system message's field `tools`, as Phi-4-mini has them."""
    try:
        listed = json.dumps([tool["function"] for tool in described], ensure_ascii=False)
    except RecursionError:
        raise ConversationError("the parameters of a tool are nested too deeply") from None
    if turns and turns[0]["role"] == "system":
        return [turns[0] | {"tools": listed}, *turns[1:]]
    return [{"role": "system", "content": "You are a helpful assistant with some tools.", "tools": listed}, *turns]


def _finished(turn: Message, shape: Shape, format: Format) -> Message:
    """The turn in the form that the template takes."""
    if shape.parts:
        turn = turn | {"content": [{"type": "text", "text": turn["content"]}] if turn["content"] else []}
    if "tool_calls" in turn:
        turn = turn | {"tool_calls": [_call(call, shape, format) for call in turn["tool_calls"]]}
    if isinstance(format, Mistral) and "tool_call_id" in turn:
        turn = turn | {"tool_call_id": _mistral_id(turn["tool_call_id"])}
    return turn


def _call(call: Mapping[str, Any], shape: Shape, format: Format) -> Message:
    function = call["function"]
    arguments: Any = function.get("arguments") or "{}"
    if shape.arguments == "object":
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ConversationError(
                f"the arguments of the call of {function['name']!r} are no JSON object; send them as the model did"
            )
    finished = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        finished["id"] = _mistral_id(call["id"]) if isinstance(format, Mistral) else call["id"]
    return finished


def _mistral_id(id: str) -> str:
    """`id` itself or one made from it: Mistral's templates take nine letters or digits and refuse everything else."""
    return id if re.fullmatch("[a-zA-Z0-9]{9}", id) else hashlib.sha256(id.encode()).hexdigest()[:9]
