"""What crosses a process boundary: msgpack over ZeroMQ, one frame a message.

A worker binds a ROUTER socket; each front end connects a DEALER to it. A front end sends `Attach` and gets `Ready`; from
then on it sends `Generate`, `Cancel` and `HeartbeatRequest`, and gets `Refused`, `Progress` and heartbeats. Every `Generate`
ends in exactly one `Refused` or one `Row` with a `finish`. Request ids are the front end's own; two of them may use the same.
"""

from collections.abc import Callable
from typing import Literal

import msgspec

PROTOCOL = 5
HEARTBEAT_SECONDS = 1.0
"""A worker sends a `Heartbeat` to each attached front end at least this often, also while it is idle."""

PRIORITIES = range(-100, 101)
"""What `Generate.priority` may be."""

Finish = Literal["stop", "length", "cancelled", "error", "timeout", "unmet"]
"""Why an answer ended; "unmet": it cannot keep to its constraint."""

MOST_ALTERNATIVES = 20
"""What `Generate.top_logprobs` may be at most."""
MOST_INPUTS = 2048
"""Texts of one `Embed`, at most."""


class Sampling(msgspec.Struct, frozen=True):
    """How a row's next token is chosen, in this order: constraint, bias, penalties, temperature, top-k, top-p, min-p."""

    temperature: float = 0.0
    """0 takes the most likely token (greedy); the others then have no effect."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    seed: int = 0
    """The same seed and prompt give the same tokens, as far as the engine's numbers do not depend on who shares the batch.
    Below 2**63."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these tokens."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once for each time that the answer has it already."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the answer has already."""
    repetition_penalty: float = 1.0
    """Divides the logit of each token that prompt or answer have already, or multiplies it where it is negative (Keskar et al.,
    "CTRL", 2019); above 0, and 1 changes nothing."""


class Constraint(msgspec.Struct, frozen=True):
    """What an answer must be: only tokens are chosen with which it still can become that, and it ends once it is."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    """The schema as JSON, the regular expression (Rust's, matched as a whole), or the grammar in llguidance's Lark."""


# Front end -> worker -----------------------------------------------------------------------------------------------


class Attach(msgspec.Struct, frozen=True, tag=True):
    """A front end is there and wants `Ready` and heartbeats."""

    protocol: int = PROTOCOL


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Continue `prompt`."""

    id: str
    prompt: list[int]
    max_tokens: int
    """At least 1."""
    sampling: Sampling = Sampling()
    stop_ids: list[int] = []
    """Tokens that end the answer; the one that does is not part of it."""
    min_tokens: int = 0
    """Until the answer has this many tokens, none of `stop_ids` is chosen."""
    top_logprobs: int = 0
    """How many of the most likely tokens are told with each one, up to `MOST_ALTERNATIVES`."""
    prompt_logprobs: bool = False
    """Score the prompt's tokens, too; no prompt token is then taken from a slot instead of being computed."""
    constraint: Constraint | None = None
    speculation: bool = True
    """Guess tokens and verify several in one step where that is faster."""
    prediction: list[int] = []
    """What the answer is expected to be, for the guesses' sake."""
    client: str = ""
    """Who asks: any name, the same for all requests of one API key. Clients share the slots; see `runtime.queue`."""
    priority: int = 0
    """One of `PRIORITIES`: while a request of a smaller one waits, none of a greater one gets a slot."""
    queue_seconds: float = 0.0
    """How long it may wait for a slot, from its arrival at the worker; 0: without limit. Ends with finish "timeout"."""
    total_seconds: float = 0.0
    """How long it may take from its arrival to its last token; 0: without limit. Ends with finish "timeout"."""


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Give the embedding of each of `inputs`."""

    id: str
    inputs: list[list[int]]
    """The tokens of 1 to `MOST_INPUTS` texts, special tokens included; none is empty."""
    client: str = ""
    """As in `Generate`: clients take turns."""
    priority: int = 0
    """One of `PRIORITIES`, the smallest first."""
    queue_seconds: float = 0.0
    """How long it may wait until the first of its texts is computed; 0: without limit. Ends with finish "timeout"."""
    total_seconds: float = 0.0
    """How long it may take from its arrival to its last text; 0: without limit. Ends with finish "timeout"."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Forget request `id`; its slot is free within one step. Answered by a `Row` with finish "cancelled"."""

    id: str


class HeartbeatRequest(msgspec.Struct, frozen=True, tag=True):
    """A `Heartbeat` is wanted as soon as the worker can send one: between two of its steps. Answered by a `HeartbeatAnswer`."""

    number: int
    """The front end's own."""


Request = Attach | Generate | Embed | Cancel | HeartbeatRequest

# Worker -> front end -----------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded and takes requests."""

    model: str
    """The bundle's name."""
    variant: str
    slots: int
    """Requests that decode at the same time."""
    context: int
    """Tokens a slot holds: prompt and answer together."""
    queue: int
    """Requests that may wait for a slot; one more is refused."""
    vocab_size: int
    pid: int
    kernels: str = ""
    """What computes, as `runtime.kernels` describes it."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Request `id` was not taken; nothing of it ran."""

    id: str
    reason: Literal["queue full", "prompt too long", "bad request"]
    message: str


class Row(msgspec.Struct, frozen=True, array_like=True):
    """News of one request: its new tokens and, once, how it ended."""

    id: str
    tokens: list[int]
    logprobs: list[float]
    """Natural log-probability of each token under the model's unscaled distribution."""
    finish: Finish | None = None
    cached: int = 0
    """Prompt tokens whose keys and values were reused instead of computed."""
    message: str = ""
    """With finish "error" or "unmet": what happened; with "timeout": which limit was reached, and how long it waited."""
    tops: list[list[tuple[int, float]]] = []
    """For each of `tokens` the `top_logprobs` most likely tokens and their log-probabilities, likeliest first; `[]` where none
    are wanted."""
    prompt: list["Scored"] = []
    """With `prompt_logprobs`, in a request's first row: the prompt's tokens from the second on."""


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """A prompt's token under the model's unscaled distribution."""

    logprob: float
    tops: list[tuple[int, float]]
    """The `top_logprobs` most likely tokens in its place, likeliest first."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What one scheduler iteration gave a front end's requests."""

    rows: list[Row]


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """The embeddings that request `id` asked for."""

    id: str
    vectors: bytes
    """[inputs, dimensions] float32, little-endian, row after row in the order of the inputs."""
    dimensions: int


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The worker lives, and what it holds."""

    running: int
    waiting: int
    kv_tokens: int
    """Tokens in the running requests' slots."""
    steps: int
    """Steps since the start, prefill chunks and decode batches together."""
    prompt_tokens: int
    """Prompt tokens computed since the start."""
    cached_tokens: int
    """Prompt tokens that were found in a slot instead."""
    generated_tokens: int
    guessed_tokens: int
    """Tokens that were guessed and verified since the start."""
    accepted_tokens: int
    """Of these, the right ones."""
    step_seconds: float
    """Time spent inside the engine since the start."""
    decode_steps: int = 0
    """Of the steps, those that gave every row its next token; `rows` / `decode_steps` is the mean batch."""
    rows: int = 0
    """Rows of the decode steps since the start."""
    waiting_tokens: int = 0
    """Of the waiting requests: prompts and the longest answers that they may get, together."""
    queue_seconds: float = 0.0
    """Time that requests waited for a slot since the start, whether they got one or not; without those that still wait."""
    timeouts: int = 0
    """Requests that ran out of time since the start."""
    finished: int = 0
    """Requests that ended with finish "stop" or "length" since the start."""
    queue_counts: list[int] = []
    """Requests by the time that they waited for a slot: how many for each of `tally.QUEUE_SECONDS`, and for more; `[]` for
    none. `queue_seconds` is the sum of these times."""
    step_counts: list[int] = []
    """Steps by the time that each took, as `tally.STEP_SECONDS`; `step_seconds` is the sum."""
    batch_counts: list[int] = []
    """Decode steps by their rows, as `tally.BATCH_ROWS`; `rows` is the sum."""


class HeartbeatAnswer(msgspec.Struct, frozen=True, tag=True):
    """The heartbeat that the `HeartbeatRequest` of that number asked for."""

    number: int
    heartbeat: Heartbeat


Reply = Ready | Refused | Progress | Embedded | Heartbeat | HeartbeatAnswer

encode: Callable[[Request | Reply], bytes] = msgspec.msgpack.Encoder().encode
decode_request: Callable[[bytes], Request] = msgspec.msgpack.Decoder(Request).decode
decode_reply: Callable[[bytes], Reply] = msgspec.msgpack.Decoder(Reply).decode
