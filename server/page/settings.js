// The system prompt and how tokens are sampled: what is set goes into the request, what is empty is left to the server.

import { ALTERNATIVES } from "./answer.js";
import { byId, element } from "./dom.js";
import { models } from "./models.js";

const STORED = "engineshed.settings.2";
const DROPPED = "engineshed.settings"; // in which the page's own temperature of then stands as if a person had set it
const INITIAL = { max_tokens: "512", logprobs: true };

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, unset: 1, slider: true, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, unset: 1, slider: true, hint: "the likeliest tokens up to this share" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, unset: 0, slider: true, hint: "of the likeliest token's share" },
  { name: "top_k", label: "Top k", min: 0, step: 1, placeholder: "all", hint: "the k likeliest tokens" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, placeholder: "no limit", hint: "empty: to the context's end" },
  { name: "seed", label: "Seed", step: 1, placeholder: "random", hint: "same seed, same text" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, placeholder: "0", hint: "for each use of a token" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, placeholder: "0", hint: "once a token was used" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, step: 0.05, placeholder: "1", hint: "over 1 avoids repeating" },
];

/** The form of settings. */
export class Settings {
  #inputs = new Map();
  #system = byId("system");
  #stop = byId("stop");
  #logprobs = byId("logprobs");

  constructor() {
    byId("sampling").replaceChildren(...FIELDS.map((field) => this.#row(field)));
    this.#fill(this.#read());
    models.addEventListener("change", () => this.#showDefaults(models.current?.sampling));
    byId("settings-form").addEventListener("input", () => this.#keep());
    byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
    byId("settings-reset").addEventListener("click", () => {
      this.#fill(INITIAL);
      this.#keep();
    });
  }

  /** The system prompt; empty for none. */
  get system() {
    return this.#system.value.trim();
  }

  /** The request's fields. */
  get fields() {
    const found = {};
    for (const { name } of FIELDS) {
      const value = this.#inputs.get(name).value.trim();
      if (value !== "") found[name] = Number(value);
    }
    const stops = this.#stop.value.split("\n").filter(Boolean).map(unescape);
    if (stops.length) found.stop = stops.length === 1 ? stops[0] : stops;
    if (this.#logprobs.checked) Object.assign(found, { logprobs: true, top_logprobs: ALTERNATIVES });
    return found;
  }

  /** Mark the field that the server found at fault; gives whether there is one here. */
  blame(param, message) {
    const name = param === "max_completion_tokens" ? "max_tokens" : param;
    const input = name === "stop" ? this.#stop : this.#inputs.get(name);
    if (!input) return false;
    input.setAttribute("aria-invalid", "true");
    byId(`${input.id}-fault`).textContent = message;
    return true;
  }

  /** Take the marks away. */
  forgive() {
    for (const input of [...this.#inputs.values(), this.#stop]) {
      input.removeAttribute("aria-invalid");
      byId(`${input.id}-fault`).textContent = "";
    }
  }

  #row({ name, label, min, max, step, unset, placeholder, slider, hint }) {
    const id = `field-${name}`;
    const input = element("input", { id, type: "number", inputMode: "decimal", min, max, step: "any", placeholder: placeholder ?? String(unset) });
    input.unset = unset;
    input.setAttribute("aria-describedby", `${id}-hint ${id}-fault`);
    this.#inputs.set(name, input);
    let range = null;
    if (slider) {
      range = element("input", { type: "range", min, max, step, "aria-label": `${label}, as a slider` });
      range.addEventListener("input", () => (input.value = range.value));
      input.showOnSlider = () => (range.value = input.value === "" ? input.unset : input.value);
      input.addEventListener("input", input.showOnSlider);
    } else {
      input.step = step;
    }
    return element(
      "div",
      { class: slider ? "field sliding" : "field" },
      element("label", { for: id }, label),
      range,
      input,
      element("small", { id: `${id}-hint`, class: "hint" }, hint),
      element("small", { id: `${id}-fault`, class: "fault" }),
    );
  }

  /** Show what holds where a field is empty: `sampling` is the model's own, as /v1/models has it. */
  #showDefaults(sampling) {
    for (const { name, unset, placeholder } of FIELDS) {
      const input = this.#inputs.get(name);
      const own = sampling?.[name];
      input.unset = own ?? unset;
      input.placeholder = name === "top_k" && own === 0 ? placeholder : String(own ?? placeholder ?? unset);
      input.showOnSlider?.();
    }
  }

  #fill(values) {
    for (const [name, input] of this.#inputs) {
      input.value = values[name] ?? "";
      input.showOnSlider?.();
    }
    this.#system.value = values.system ?? "";
    this.#stop.value = values.stop ?? "";
    this.#logprobs.checked = values.logprobs ?? true;
    this.forgive();
  }

  #keep() {
    const values = Object.fromEntries([...this.#inputs].map(([name, input]) => [name, input.value]));
    const rest = { system: this.#system.value, stop: this.#stop.value, logprobs: this.#logprobs.checked };
    localStorage.setItem(STORED, JSON.stringify({ ...values, ...rest }));
    this.forgive();
  }

  #read() {
    try {
      localStorage.removeItem(DROPPED);
      return JSON.parse(localStorage.getItem(STORED)) ?? INITIAL;
    } catch {
      return INITIAL;
    }
  }
}

/** What a line of the stop strings stands for. */
function unescape(line) {
  return line.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
}
