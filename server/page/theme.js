// Light or dark: as the system has it, until somebody says otherwise.

import { say } from "./announce.js";
import { byId } from "./dom.js";

const STORED = "engineshed.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

/** The theme that is shown. */
function shown() {
  return document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
}

/** Show the other theme; one that is the system's own follows the system from then on. */
export function toggleTheme() {
  const wanted = shown() === "dark" ? "light" : "dark";
  if (wanted === (system.matches ? "dark" : "light")) {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(STORED);
  } else {
    document.documentElement.dataset.theme = wanted;
    localStorage.setItem(STORED, wanted);
  }
  label();
  say(`${wanted} theme`);
}

function label() {
  const other = shown() === "dark" ? "Light" : "Dark";
  byId("theme-button").setAttribute("aria-label", `${other} theme`);
  byId("theme-button").title = `${other} theme`;
}

/** Connect the theme's button. */
export function connectTheme() {
  byId("theme-button").addEventListener("click", toggleTheme);
  system.addEventListener("change", label);
  label();
}
