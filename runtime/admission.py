"""Which requests an engine can answer at all, whatever else it does."""

from runtime.engine import MOST_NAMED, Engine
from runtime.messages import MOST_ALTERNATIVES, PRIORITIES, Generate, Refused
from runtime.penalties import BAN


def refusal(request: Generate, engine: Engine, *, constrains: bool) -> Refused | None:
    """Why `engine` cannot answer `request`; None where it can. `constrains`: answers can be kept to constraints."""
    length, context = len(request.prompt), engine.context
    if length >= context:
        message = f"the prompt has {length} tokens; the context holds {context}, prompt and answer together"
        return Refused(request.id, "prompt too long", message)
    message = _flaw(request, engine, constrains)
    return Refused(request.id, "bad request", message) if message else None


def _flaw(request: Generate, engine: Engine, constrains: bool) -> str:
    """What is wrong with the request, in a sentence; empty where nothing is."""
    if not request.prompt or request.max_tokens < 1:
        return "a request needs a prompt and max_tokens of at least 1"
    if not all(0 <= token < engine.vocab_size for token in request.prompt):
        return f"the prompt has a token outside the vocabulary of {engine.vocab_size}"
    if len(request.prediction) > engine.context:
        return f"the prediction has {len(request.prediction)} tokens; the context holds {engine.context}"
    if request.priority not in PRIORITIES:
        return f"priority is {request.priority}; it goes from {PRIORITIES[0]} to {PRIORITIES[-1]}"
    if not (request.queue_seconds >= 0 and request.total_seconds >= 0):  # of NaN neither is true
        return "queue_seconds and total_seconds are 0, for no limit, or more"
    if request.constraint is not None and not constrains:
        return "this engine takes no constraints"
    return _unsound(request, engine.vocab_size) or ""


def _unsound(request: Generate, vocab_size: int) -> str | None:
    """What of a request's sampling is no number that the engine can compute with, in a sentence; None where all is well."""
    sampling = request.sampling
    numbers = {
        name: getattr(sampling, name)
        for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    }
    for name, value in numbers.items():
        if not abs(value) <= BAN:  # of NaN this is not true either
            return f"{name} is {value}; it is a number of at most {BAN:g}"
    if not sampling.repetition_penalty >= 1 / BAN:
        return f"repetition_penalty is {sampling.repetition_penalty}; it is more than 0"
    named = len(sampling.logit_bias) + len(request.stop_ids)
    if named > MOST_NAMED:
        return f"logit_bias and stop_ids name {named} tokens together; they name at most {MOST_NAMED}"
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocab_size:
            return f"logit_bias names token {token}, which is outside the vocabulary of {vocab_size}"
        if not abs(bias) <= BAN:
            return f"logit_bias of token {token} is {bias}; it is a number of at most {BAN:g}"
    if not 0 <= request.top_logprobs <= MOST_ALTERNATIVES:
        return f"top_logprobs is {request.top_logprobs}; it goes from 0 to {MOST_ALTERNATIVES}"
    if not 0 <= request.min_tokens <= request.max_tokens:
        return f"min_tokens is {request.min_tokens}; it goes from 0 to max_tokens, {request.max_tokens}"
    return None
