// The API key: kept for as long as this browser tab lives, and asked for when the server wants one.

import { byId } from "./dom.js";

const STORED = "engineshed.key";

class Key extends EventTarget {
  #value = sessionStorage.getItem(STORED) ?? "";
  /** Whether the server has refused a request for want of a known key since this one was given: asking by itself is no use. */
  refused = false;

  /** The key, or an empty string. */
  get value() {
    return this.#value;
  }

  set(value) {
    this.#value = value.trim();
    this.refused = false;
    if (this.#value) sessionStorage.setItem(STORED, this.#value);
    else sessionStorage.removeItem(STORED);
    this.dispatchEvent(new Event("change"));
  }

  /** The server said no, and why. */
  refuse(message) {
    this.refused = true;
    this.dispatchEvent(new CustomEvent("refused", { detail: message }));
  }
}

export const key = new Key();

/** Connect the key's dialog: it opens by its button, and by itself when the server refuses a request. */
export function connectKey() {
  const dialog = byId("key-dialog");
  const field = byId("key-field");
  const reason = byId("key-reason");
  const button = byId("key-button");

  const show = (message) => {
    reason.textContent = message;
    if (dialog.open) return;
    field.value = key.value;
    dialog.showModal();
    field.focus();
  };
  const mark = () => button.classList.toggle("set", Boolean(key.value));

  button.addEventListener("click", () => show("Needed where the server runs with keys. It is kept until this tab is closed."));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
    key.set(field.value);
  });
  byId("key-forget").addEventListener("click", () => {
    dialog.close();
    key.set("");
  });
  key.addEventListener("refused", (event) => show(event.detail));
  key.addEventListener("change", mark);
  mark();
}
