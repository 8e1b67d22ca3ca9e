// One answer as it comes: its text, the tokens that the text is made of, and how fast they came.

import { Failure, ask, failure } from "./api.js";
import { events } from "./stream.js";

/** Alternatives that are asked for with each token. */
export const ALTERNATIVES = 5;

/**
 * What is known of an answer. `spans` are the parts of `text` that tokens stand for: `{start, end, tokens}`, in UTF-16 units,
 * with the places of these tokens in `tokens`; a character that several tokens make has them all.
 */
export function emptyAnswer() {
  return {
    text: "",
    tokens: [],
    spans: [],
    finish: null,
    usage: null,
    /** Milliseconds from the request to the first token, and from that to the last one. */
    toFirst: null,
    generating: 0,
  };
}

/** Have the server answer `body`, and write what comes into `answer`; `changed` is called after each piece. */
export async function receive(body, answer, changed, signal) {
  const begun = performance.now();
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  const id = response.headers.get("X-Request-Id");
  const aligner = new Aligner(answer);
  let ended = false;
  for await (const { event, data } of events(response)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (event === "error") throw failure(chunk, 0, id);
    if (chunk.usage) answer.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    if (choice.finish_reason) answer.finish = choice.finish_reason;
    const text = choice.delta.content ?? "";
    const tokens = choice.logprobs?.content ?? [];
    if (text || tokens.length) {
      const now = performance.now();
      answer.toFirst ??= now - begun;
      answer.generating = now - begun - answer.toFirst;
      aligner.take(text, tokens);
      changed();
    }
  }
  if (!ended) throw new Failure("The connection broke off before the answer was complete.", { id });
}

/** Tokens a second after the first one, or null where there are too few to tell. */
export function speed(answer) {
  const tokens = answer.usage?.completion_tokens ?? answer.tokens.length;
  return tokens > 1 && answer.generating > 0 ? ((tokens - 1) * 1000) / answer.generating : null;
}

/** Finds out which part of the text each token is. */
class Aligner {
  #answer;
  #decoder = new TextDecoder();
  /** Tokens without a character yet, by their places. */
  #incomplete = [];
  /** Tokens whose text has not come yet: `{text, tokens}`. */
  #waiting = [];

  constructor(answer) {
    this.#answer = answer;
  }

  /** Add text, and the tokens that came with it, whose text may be held back in part. */
  take(text, tokens) {
    for (const token of tokens) this.#queue(token);
    const answer = this.#answer;
    let start = answer.text.length;
    answer.text += text;
    if (!this.#waiting.length) return;
    let left = text;
    while (left && this.#waiting.length) {
      const next = this.#waiting[0];
      if (!left.startsWith(next.text) && !next.text.startsWith(left)) next.text = next.text.trimStart(); // A tokenizer's own.
      if (left.startsWith(next.text)) {
        this.#waiting.shift();
        if (next.text) answer.spans.push({ start, end: start + next.text.length, tokens: next.tokens });
        left = left.slice(next.text.length);
        start += next.text.length;
      } else if (next.text.startsWith(left)) {
        answer.spans.push({ start, end: start + left.length, tokens: next.tokens });
        next.text = next.text.slice(left.length);
        left = "";
      } else {
        this.#waiting = []; // Not the text of these tokens; what follows finds its own again.
      }
    }
  }

  #queue(token) {
    const place = this.#answer.tokens.push({ text: token.token, logprob: token.logprob, top: token.top_logprobs ?? [] }) - 1;
    this.#incomplete.push(place);
    const text = this.#decoder.decode(Uint8Array.from(token.bytes ?? []), { stream: true });
    if (text) this.#waiting.push({ text, tokens: this.#incomplete.splice(0) });
  }
}
