// Keys that do something wherever the focus is, unless it takes text; they can be turned off (WCAG 2.1.4).

import { byId, element, takesText } from "./dom.js";

const STORED = "engineshed.shortcuts";

/** Connect `shortcuts`, a list of `{key, label, act}`, and the dialog that lists them. */
export function connectShortcuts(shortcuts, fixed) {
  const dialog = byId("help-dialog");
  const on = byId("shortcuts-on");
  const row = (name, label) =>
    element("div", {}, element("dt", {}, ...name.split(" ").map((each) => element("kbd", {}, each))), element("dd", {}, label));
  byId("shortcuts-list").replaceChildren(...shortcuts.map(({ key, label }) => row(key, label)));
  byId("fixed-list").replaceChildren(...fixed.map(([name, label]) => row(name, label)));

  on.checked = localStorage.getItem(STORED) !== "off";
  on.addEventListener("change", () => localStorage.setItem(STORED, on.checked ? "on" : "off"));
  byId("help-button").addEventListener("click", () => dialog.showModal());

  addEventListener("keydown", (event) => {
    if (!on.checked || event.ctrlKey || event.metaKey || event.altKey || takesText(event.target)) return;
    if (document.querySelector("dialog[open]")) return;
    const shortcut = shortcuts.find(({ key }) => key === event.key);
    if (!shortcut) return;
    event.preventDefault();
    shortcut.act();
  });
}
