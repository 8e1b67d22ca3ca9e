// One turn of the conversation on the page: who speaks, the text, what went wrong, how fast it was, what can be done with it.

import { speed } from "./answer.js";
import { element } from "./dom.js";
import { percent } from "./inspector.js";
import { Prose } from "./prose.js";

/**
 * Shows `turn`: `{role, answer, state, failure, model}`, whose text is the answer's also where a person wrote it; `state` is
 * "waiting", "streaming", "done", "stopped" or "failed". `acts` has what its buttons do, by name.
 */
export class TurnView {
  #turn;
  #acts;
  #prose;
  #text;
  #stats = element("p", { class: "stats" });
  #failure = element("div", { class: "failure", role: "alert" });
  #actions = element("div", { class: "actions" });
  #shown = "";

  constructor(turn, acts) {
    this.#turn = turn;
    this.#acts = acts;
    const mine = turn.role === "user";
    const who = mine ? "You" : (turn.model ?? "assistant");
    this.#text = mine
      ? element("div", { class: "prose" })
      : element("div", { class: "prose", tabIndex: 0, role: "group", "aria-label": "Answer. Left and right arrow keys go through its tokens." });
    this.#prose = new Prose(this.#text, turn.answer);
    this.element = element(
      "article",
      { class: `turn ${turn.role}`, "aria-label": mine ? "You said" : `${who} answered` },
      element("header", {}, element("span", { class: "who" }, who), this.#actions),
      this.#text,
      this.#failure,
      this.#stats,
    );
    this.element.turn = turn;
    this.update();
  }

  /** Show what has come since. */
  update() {
    const { state, answer } = this.#turn;
    this.#prose.update();
    this.element.dataset.state = state;
    this.#stats.replaceChildren(...figures(this.#turn).map(([text, title]) => element("span", { title }, text)));
    this.#text.hidden = !answer.text;
    if (state === this.#shown) return;
    this.#shown = state;
    this.#showFailure();
    this.#showActions();
  }

  /** Have the text written anew; `done` gets the new one, and `again`, whether an answer to it is wanted. */
  edit(done) {
    const { role, answer } = this.#turn;
    const field = element("textarea", { class: "editor", value: answer.text, "aria-label": "Text of this turn", rows: 3 });
    const finish = (text, again) => {
      form.replaceWith(this.#text);
      this.#actions.hidden = false;
      if (text !== null) done(text, again);
    };
    const save = element("button", { type: "submit", class: "primary" }, role === "user" ? "Save and ask again" : "Save");
    const cancel = element("button", { type: "button", on: { click: () => finish(null) } }, "Cancel");
    const form = element("form", { class: "editing" }, field, element("div", { class: "row" }, save, cancel));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) finish(field.value, role === "user");
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") finish(null);
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === field) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.#text.replaceWith(form);
    this.#actions.hidden = true;
    field.style.height = `${Math.min(field.scrollHeight + 2, 400)}px`;
    field.focus();
  }

  #showFailure() {
    const { state, failure } = this.#turn;
    if (state !== "failed") {
      this.#failure.replaceChildren();
      return;
    }
    const about = [
      failure.status ? `status ${failure.status}` : null,
      failure.code,
      failure.param ? `field ${failure.param}` : null,
      failure.id ? `request ${failure.id}` : null,
    ];
    this.#failure.replaceChildren(
      element("p", {}, failure.message),
      element("p", { class: "about" }, about.filter(Boolean).join(" · ")),
      element("button", { type: "button", on: { click: this.#acts.regenerate } }, "Try again"),
    );
  }

  #showActions() {
    const { role, state } = this.#turn;
    const running = state === "waiting" || state === "streaming";
    const names = running ? [] : role === "user" ? ["edit", "copy", "delete"] : ["regenerate", "edit", "copy", "delete"];
    const button = (name) =>
      element("button", { type: "button", data: { act: name }, on: { click: () => this.#acts[name]() } }, name[0].toUpperCase() + name.slice(1));
    this.#actions.replaceChildren(...names.map(button));
  }
}

/** What there is to say in figures of an answer, each with what it means. */
function figures({ role, state, answer, since, loading }) {
  if (role === "user") return [];
  if (state === "waiting") {
    const seconds = ((performance.now() - since) / 1000).toFixed(1);
    return [[loading ? `the model is being loaded · ${seconds} s` : `waiting for the first token · ${seconds} s`, ""]];
  }
  const { usage, toFirst, finish, tokens } = answer;
  if (toFirst === null) return state === "stopped" ? [["stopped before the first token", ""]] : [];
  const count = usage?.completion_tokens ?? tokens.length;
  const found = [[`${count} ${count === 1 ? "token" : "tokens"}`, "Tokens of the answer"]];
  const rate = speed(answer);
  if (rate !== null) found.push([`${rate.toFixed(rate < 100 ? 1 : 0)} tok/s`, "Tokens a second after the first one, as they came here"]);
  found.push([`first after ${milliseconds(toFirst)}`, "Time to first token, from the request as it was sent here"]);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    found.push([`prompt ${usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}`, "Tokens of the prompt; of these, taken from a slot"]);
  }
  if (tokens.length) {
    const mean = tokens.reduce((sum, token) => sum + token.logprob, 0) / tokens.length;
    found.push([`mean p ${percent(Math.exp(mean))}`, "Geometric mean of the tokens' probabilities"]);
  }
  if (state === "stopped") found.push(["stopped", "You stopped it"]);
  else if (finish) found.push([finish === "length" ? "cut at the limit" : "complete", `finish_reason: ${finish}`]);
  return found;
}

function milliseconds(value) {
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(2)} s`;
}
