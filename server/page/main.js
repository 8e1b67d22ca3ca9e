// The page: its two tabs, and what is on both.

import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { Engines } from "./engines.js";
import { connectKey } from "./key.js";
import { connectModels } from "./models.js";
import { Settings } from "./settings.js";
import { connectShortcuts } from "./shortcuts.js";
import { connectTabs, select } from "./tabs.js";
import { connectTheme, toggleTheme } from "./theme.js";

const PROBABILITIES = "engineshed.probabilities";
const OPEN = "engineshed.settings-open";

connectTheme();
connectKey();
const chat = new Chat(new Settings());
new Engines();
connectTabs();
connectModels();
connectProbabilities();
const settings = connectSettings();
connectShortcuts(
  [
    { key: "/", label: "Write a message", act: () => inChat(() => chat.focus()) },
    { key: "n", label: "New chat", act: () => inChat(() => chat.clear()) },
    { key: "r", label: "Answer anew", act: () => inChat(() => chat.regenerate()) },
    { key: "e", label: "Edit the last message", act: () => inChat(() => chat.editLast()) },
    { key: "p", label: "Show probabilities", act: () => byId("probabilities").click() },
    { key: "s", label: "Settings", act: () => inChat(() => settings.toggle()) },
    { key: "1", label: "Chat", act: () => select("chat", { focus: true }) },
    { key: "2", label: "Engines", act: () => select("engines", { focus: true }) },
    { key: "t", label: "Light or dark", act: toggleTheme },
    { key: "?", label: "This list", act: () => byId("help-dialog").showModal() },
  ],
  [
    ["Enter", "Send the message"],
    ["Shift Enter", "New line"],
    ["Esc", "Stop the answer; close what is open"],
    ["← →", "Within an answer: token by token"],
  ],
);
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (chat.dismiss() || settings.dismiss() || chat.stop()) event.preventDefault();
});
for (const button of document.querySelectorAll("dialog [data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}

function inChat(act) {
  select("chat");
  act();
}

function connectProbabilities() {
  const button = byId("probabilities");
  const show = (on) => {
    button.setAttribute("aria-pressed", String(on));
    byId("conversation").classList.toggle("tinted", on);
  };
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    localStorage.setItem(PROBABILITIES, on ? "on" : "off");
    show(on);
  });
  show(localStorage.getItem(PROBABILITIES) === "on");
}

/** The settings beside the conversation; on a narrow page they lie over it, and are closed at first. */
function connectSettings() {
  const panel = byId("settings");
  const button = byId("settings-button");
  const narrow = matchMedia("(max-width: 60rem)");
  const show = (on) => {
    panel.hidden = !on;
    button.setAttribute("aria-expanded", String(on));
  };
  const toggle = () => {
    const on = panel.hidden;
    show(on);
    if (!narrow.matches) localStorage.setItem(OPEN, on ? "yes" : "no");
    if (on) byId("system").focus({ preventScroll: true });
    else button.focus();
  };
  const initial = () => show(!narrow.matches && localStorage.getItem(OPEN) !== "no");
  button.addEventListener("click", toggle);
  byId("settings-close").addEventListener("click", toggle);
  narrow.addEventListener("change", initial);
  initial();
  return {
    toggle,
    dismiss: () => {
      if (!narrow.matches || panel.hidden) return false;
      toggle();
      return true;
    },
  };
}
