// What is said to those who listen to the page, and shown for a moment to those who look at it.

import { byId, element } from "./dom.js";

const SHOWN_MS = 6000;
let timer;

/** Say it to a screen reader. */
export function say(text) {
  byId("said").textContent = text;
}

/** Show it for a moment, and say it; `undo` is `{label, act}`, a button beside it. */
export function tell(text, undo) {
  const place = byId("told");
  const button =
    undo &&
    element("button", { type: "button", class: "link", on: { click: () => { place.replaceChildren(); undo.act(); } } }, undo.label);
  place.replaceChildren(element("div", { class: "toast" }, element("span", {}, text), button));
  clearTimeout(timer);
  timer = setTimeout(() => place.replaceChildren(), SHOWN_MS);
}
