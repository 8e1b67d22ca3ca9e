// An answer's text in paragraphs and blocks of code, its tokens in elements of their own; it grows without being made anew.

import { element } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const SHADES = 10;

/** The blocks of a text: `{kind: "text" | "code", language, start, end}`, which leave out blank lines and fences. */
export function blocks(text) {
  const found = [];
  let fence = null;
  let open = null;
  for (let start = 0; start < text.length; ) {
    const newline = text.indexOf("\n", start);
    const end = newline < 0 ? text.length : newline;
    const line = text.slice(start, end);
    const next = newline < 0 ? text.length : newline + 1;
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && mark[1].startsWith(fence) && !mark[2]) {
        fence = open = null;
      } else {
        open.end = end;
      }
    } else if (mark) {
      fence = mark[1];
      open = { kind: "code", language: mark[2], start: next, end: next };
      found.push(open);
    } else if (!line.trim()) {
      open = null;
    } else if (open) {
      open.end = end;
    } else {
      open = { kind: "text", language: "", start, end };
      found.push(open);
    }
    start = next;
  }
  return found;
}

/** The text of an answer, within `container`. */
export class Prose {
  #container;
  #answer;
  #shown = [];
  /** The first span that the block being written may touch. */
  #span = 0;

  constructor(container, answer) {
    this.#container = container;
    this.#answer = answer;
  }

  /** Show what has come since. */
  update() {
    const wanted = blocks(this.#answer.text);
    const shown = this.#shown;
    let same = 0;
    while (same < shown.length && same < wanted.length && continues(shown[same], wanted[same])) same += 1;
    for (const gone of shown.splice(same)) gone.element.remove();
    wanted.forEach((block, place) => {
      if (!shown[place]) shown.push(this.#begin(block));
      this.#extend(shown[place], block.end);
    });
  }

  #begin({ kind, language, start }) {
    const text = element(kind === "code" ? "code" : "p");
    const whole = kind === "code" ? element("pre", { data: { language } }, text) : text;
    this.#container.append(whole);
    return { kind, language, start, end: start, text, element: whole };
  }

  #extend(block, end) {
    if (end === block.end) return;
    const { text, spans, tokens } = this.#answer;
    let at = block.end;
    if (this.#span > 0 && (spans[this.#span - 1]?.end ?? 0) > at) this.#span = 0;
    while (this.#span < spans.length && spans[this.#span].end <= at) this.#span += 1;
    for (let place = this.#span; at < end && place < spans.length && spans[place].start < end; place += 1) {
      const span = spans[place];
      if (span.start > at) at = append(block.text, text, at, span.start);
      const until = Math.min(span.end, end);
      const blank = /^\s+(?=\S)/.exec(text.slice(at, until))?.[0].length ?? 0; // Stays outside, as a line may end with it.
      if (blank) at = append(block.text, text, at, at + blank);
      const piece = element("span", { class: "token", data: { span: String(place), shade: shade(span, tokens) } });
      at = append(piece, text, at, until);
      block.text.append(piece);
    }
    if (at < end) append(block.text, text, at, end);
    block.end = end;
  }
}

function continues(shown, wanted) {
  return (
    shown.kind === wanted.kind && shown.start === wanted.start && shown.language === wanted.language && shown.end <= wanted.end
  );
}

function append(parent, text, start, end) {
  parent.append(text.slice(start, end));
  return end;
}

/** The probability of a span, which is that of all its tokens, in tenths. */
function shade(span, tokens) {
  const logprob = span.tokens.reduce((sum, place) => sum + tokens[place].logprob, 0);
  return String(Math.min(SHADES - 1, Math.floor(Math.exp(logprob) * SHADES)));
}
