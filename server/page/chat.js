// The conversation: what was said, the answer that is coming, and what is done with both.

import { say, tell } from "./announce.js";
import { emptyAnswer, receive } from "./answer.js";
import { Failure } from "./api.js";
import { copy } from "./clipboard.js";
import { byId } from "./dom.js";
import { Inspector } from "./inspector.js";
import { models } from "./models.js";
import { curl, python } from "./snippets.js";
import { TurnView } from "./turn.js";

const STORED = "engineshed.chat";
const NEAR_PX = 60;

/** The chat tab. */
export class Chat {
  #settings;
  #turns = [];
  #views = new Map();
  #running = null;
  #log = byId("conversation");
  #scroller = byId("conversation-scroller");
  #draft = byId("draft");
  #inspector;

  constructor(settings) {
    this.#settings = settings;
    this.#inspector = new Inspector(this.#log, (target) => target.closest(".turn")?.turn.answer);
    this.#connect();
    this.#restore();
    this.#render();
  }

  /** Stop the answer that is coming; gives whether there was one. */
  stop() {
    this.#running?.abort();
    return this.#running !== null;
  }

  /** Forget the conversation. */
  clear() {
    if (!this.#turns.length) return this.#draft.focus();
    this.stop();
    const before = this.#turns;
    this.#replace([]);
    tell("New chat", { label: "Bring the old one back", act: () => this.#replace([...before, ...this.#turns]) });
    this.#draft.focus();
  }

  /** Answer the last turn of the person's anew. */
  regenerate() {
    const last = this.#turns.at(-1);
    if (this.#running || !last) return;
    this.#answer(last.role === "assistant" ? this.#turns.slice(0, -1) : this.#turns);
  }

  /** Edit the last turn of the person's. */
  editLast() {
    const last = this.#turns.findLast((turn) => turn.role === "user");
    if (last && !this.#running) this.#edit(last);
  }

  /** Put the focus where messages are written. */
  focus() {
    this.#draft.focus();
  }

  /** Close what lies over the conversation; gives whether something did. */
  dismiss() {
    const shown = this.#inspector.shown;
    this.#inspector.hide();
    return shown;
  }

  #connect() {
    const form = byId("composer");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#draft.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    this.#draft.addEventListener("input", () => this.#fit());
    byId("stop-button").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.clear());
    byId("copy-curl").addEventListener("click", () => this.#copyRequest(curl, "The request as curl"));
    byId("copy-python").addEventListener("click", () => this.#copyRequest(python, "The request as Python"));
    for (const button of document.querySelectorAll("[data-suggestion]")) {
      button.addEventListener("click", () => {
        this.#draft.value = button.dataset.suggestion;
        this.#send();
      });
    }
    models.addEventListener("change", () => {
      byId("empty-model").textContent = models.current?.id ?? "a model";
    });
  }

  #send() {
    const text = this.#draft.value;
    if (this.#running || !text.trim()) return;
    this.#draft.value = "";
    this.#fit();
    this.#answer([...this.#turns, { role: "user", answer: written(text), state: "done" }]);
  }

  /** The request that answers `turns`. */
  #request(turns) {
    const { system, fields } = this.#settings;
    const messages = turns
      .filter((turn) => turn.answer.text)
      .map((turn) => ({ role: turn.role, content: turn.answer.text }));
    if (system) messages.unshift({ role: "system", content: system });
    return { model: models.chosen ?? undefined, messages, ...fields, stream: true };
  }

  async #answer(turns) {
    const model = models.current;
    const turn = {
      role: "assistant",
      model: models.chosen,
      answer: emptyAnswer(),
      state: "waiting",
      since: performance.now(),
      loading: model && model.state !== "ready",
    };
    const body = this.#request(turns);
    this.#settings.forgive();
    this.#replace([...turns, turn]);
    this.#toEnd();
    const running = (this.#running = new AbortController());
    this.#showRunning();
    const view = this.#views.get(turn);
    const redraw = onceAFrame(() => this.#follow(() => view.update()));
    const waiting = setInterval(redraw, 100);
    try {
      await receive(
        body,
        turn.answer,
        () => {
          if (turn.state === "waiting") turn.state = "streaming";
          redraw();
        },
        running.signal,
      );
      turn.state = "done";
      say(`The answer is complete, ${turn.answer.usage?.completion_tokens ?? ""} tokens.`);
    } catch (error) {
      this.#end(turn, error);
    } finally {
      clearInterval(waiting);
      if (this.#running === running) this.#running = null;
      this.#showRunning();
      this.#follow(() => view.update());
      this.#keep();
      if (turn.loading) models.refresh();
    }
  }

  #end(turn, error) {
    if (error.name === "AbortError") {
      turn.state = "stopped";
      say("Stopped.");
      return;
    }
    turn.state = "failed";
    turn.failure = error instanceof Failure ? error : new Failure(`The page failed on this answer: ${error.message}`);
    if (error.param && this.#settings.blame(error.param, error.message)) say(error.message);
    if (!(error instanceof Failure)) throw error;
  }

  #acts(turn) {
    const place = () => this.#turns.indexOf(turn);
    return {
      edit: () => this.#edit(turn),
      copy: () => copy(turn.answer.text, turn.role === "user" ? "The message" : "The answer"),
      regenerate: () => !this.#running && this.#answer(this.#turns.slice(0, place())),
      delete: () => {
        const at = place();
        this.#replace(this.#turns.filter((each) => each !== turn));
        tell("Turn deleted", { label: "Undo", act: () => this.#replace(this.#turns.toSpliced(at, 0, turn)) });
      },
    };
  }

  #edit(turn) {
    if (this.#running) return;
    this.#views.get(turn).edit((text, again) => {
      const place = this.#turns.indexOf(turn);
      const changed = { ...turn, answer: written(text), state: "done", failure: undefined };
      if (again) this.#answer([...this.#turns.slice(0, place), changed]);
      else this.#replace(this.#turns.with(place, changed));
    });
  }

  #copyRequest(form, what) {
    const draft = this.#draft.value.trim();
    const last = this.#turns.findLastIndex((turn) => turn.role === "user");
    const turns = draft
      ? [...this.#turns, { role: "user", answer: written(this.#draft.value) }]
      : this.#turns.slice(0, last + 1);
    if (!turns.length) {
      tell("There is no request yet: write a message first.");
      return;
    }
    copy(form(this.#request(turns)), what);
  }

  #replace(turns) {
    this.#turns = turns;
    this.#render();
    this.#keep();
  }

  #render() {
    const views = new Map();
    for (const turn of this.#turns) views.set(turn, this.#views.get(turn) ?? new TurnView(turn, this.#acts(turn)));
    for (const [turn, view] of this.#views) if (!views.has(turn)) view.element.remove();
    this.#views = views;
    this.#turns.forEach((turn, place) => {
      const { element } = views.get(turn);
      if (this.#log.children[place] !== element) this.#log.insertBefore(element, this.#log.children[place] ?? null);
    });
    byId("empty").hidden = this.#turns.length > 0;
  }

  #showRunning() {
    const running = this.#running !== null;
    byId("stop-button").hidden = !running;
    byId("send-button").hidden = running;
    this.#log.setAttribute("aria-busy", String(running));
    document.body.classList.toggle("running", running);
  }

  /** Do something that makes the conversation longer, and stay at its end if that is what is looked at. */
  #follow(change) {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    const atEnd = scrollHeight - scrollTop - clientHeight < NEAR_PX;
    change();
    if (atEnd) this.#toEnd();
  }

  #toEnd() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #fit() {
    this.#draft.style.height = "auto";
    this.#draft.style.height = `${this.#draft.scrollHeight + 2}px`;
  }

  #keep() {
    const turns = this.#turns.map(({ role, model, answer, state, failure }) => ({
      role,
      model,
      answer,
      state: state === "waiting" || state === "streaming" ? "stopped" : state,
      failure: failure && { ...failure, message: failure.message },
    }));
    try {
      sessionStorage.setItem(STORED, JSON.stringify(turns));
    } catch {
      sessionStorage.removeItem(STORED); // Too long to be kept over a reload; it is still on the page.
    }
  }

  #restore() {
    try {
      this.#turns = JSON.parse(sessionStorage.getItem(STORED)) ?? [];
    } catch {
      this.#turns = [];
    }
  }
}

/** A text that a person wrote, as an answer without tokens. */
function written(text) {
  return { ...emptyAnswer(), text };
}

/** `act`, at most once for each frame that is painted. */
function onceAFrame(act) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      act();
    });
  };
}
