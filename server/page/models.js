// The models that can be asked for, and which of them is chosen.

import { askJson } from "./api.js";
import { byId, element } from "./dom.js";
import { key } from "./key.js";

const STORED = "engineshed.model";
const EVERY_MS = 10_000;
const WORDS = {
  cold: "loaded when it is asked for",
  waiting: "waiting for room",
  loading: "loading",
  ready: "ready",
  quarantined: "given up: it crashed too often",
  refused: "cannot be served",
};

class Models extends EventTarget {
  /** As /v1/models has them; null until it has answered. */
  list = null;
  /** Why there is no list. */
  failure = null;
  chosen = localStorage.getItem(STORED);

  /** The one that is chosen, or undefined. */
  get current() {
    return this.list?.find((model) => model.id === this.chosen);
  }

  choose(id) {
    this.chosen = id;
    localStorage.setItem(STORED, id);
    this.dispatchEvent(new Event("change"));
  }

  async refresh() {
    try {
      const { data } = await askJson("/v1/models");
      this.list = data.filter((model) => !model.task || model.task === "text-generation");
      this.failure = null;
      if (!this.current) this.chosen = this.list[0]?.id ?? null;
    } catch (error) {
      this.failure = error;
    }
    this.dispatchEvent(new Event("change"));
  }
}

export const models = new Models();

/** What a state means. */
export function stateWords(state) {
  return WORDS[state] ?? state;
}

/** Connect the choice of a model, and keep it up to date while somebody looks. */
export function connectModels() {
  const field = byId("model");
  const note = byId("model-note");
  const dot = byId("model-dot");

  field.addEventListener("change", () => models.choose(field.value));
  models.addEventListener("change", () => {
    const { list, current, failure } = models;
    const options = (list ?? []).map((model) =>
      element("option", { value: model.id, selected: model === current }, model.state === "ready" ? model.id : `${model.id} (${model.state})`),
    );
    if (!same(field, options)) field.replaceChildren(...options);
    field.value = current?.id ?? "";
    field.disabled = !options.length;
    dot.dataset.state = failure ? "failed" : (current?.state ?? "unknown");
    note.replaceChildren(noteOf(list, current, failure));
  });

  const look = () => document.visibilityState === "visible" && !key.refused && models.refresh();
  setInterval(look, EVERY_MS);
  addEventListener("visibilitychange", look);
  key.addEventListener("change", () => models.refresh());
  return models.refresh();
}

function noteOf(list, current, failure) {
  if (failure) return failure.message;
  if (!list) return "Looking for models…";
  if (!current) return "There is no model here yet: build one with engineshed export.";
  const context = `${current.max_model_len.toLocaleString("en")} tokens`;
  return `${stateWords(current.state)} · ${context}${current.reason ? ` · ${current.reason}` : ""}`;
}

function same(field, options) {
  return (
    field.options.length === options.length &&
    options.every((option, place) => option.value === field.options[place].value && option.text === field.options[place].text)
  );
}
