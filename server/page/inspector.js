// What a token's probability was, and what else might have been chosen: by pointing at it, or with the arrow keys.

import { byId, element } from "./dom.js";
import { say } from "./announce.js";

/** A share as a person reads it. */
export function percent(share) {
  if (share >= 0.9995) return "100%";
  return share >= 0.0995 ? `${(share * 100).toFixed(1)}%` : `${(share * 100).toPrecision(2)}%`;
}

/** A token with its blanks made visible. */
function visible(text) {
  return text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(nothing)";
}

/** Shows tokens of any answer in one panel; `find` gives the answer that an element belongs to. */
export class Inspector {
  #panel = byId("token-panel");
  #find;
  #current = null;

  constructor(container, find) {
    this.#find = find;
    container.addEventListener("pointerover", (event) => this.#point(event.target));
    container.addEventListener("click", (event) => this.#point(event.target));
    container.addEventListener("pointerleave", () => this.hide());
    container.addEventListener("keydown", (event) => this.#step(event));
    container.addEventListener("focusout", () => this.hide());
    addEventListener("scroll", () => this.hide(), { capture: true, passive: true });
  }

  /** Show nothing. */
  hide() {
    this.#current?.classList.remove("current");
    this.#current = null;
    this.#panel.hidden = true;
  }

  /** Whether a token is shown. */
  get shown() {
    return this.#current !== null;
  }

  #point(target) {
    if (target.classList?.contains("token")) this.#show(target);
    else this.hide();
  }

  #step(event) {
    const prose = event.target;
    if (!prose.classList.contains("prose") || event.ctrlKey || event.metaKey || event.altKey) return;
    const tokens = [...prose.querySelectorAll(".token")];
    const at = tokens.indexOf(this.#current);
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? tokens.length - 1 : at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || !tokens.length) return;
    event.preventDefault();
    const token = tokens[Math.max(0, Math.min(tokens.length - 1, to))];
    token.scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => say(this.#show(token)));
  }

  /** Show a token; gives what there is to say of it. */
  #show(target) {
    const answer = this.#find(target);
    const span = answer?.spans[target.dataset.span];
    if (!span) return "";
    this.hide();
    this.#current = target;
    target.classList.add("current");
    const chosen = span.tokens.map((place) => answer.tokens[place]);
    this.#panel.replaceChildren(...chosen.map(table));
    this.#panel.hidden = false;
    this.#place(target);
    return chosen.map(sentence).join("; ");
  }

  #place(target) {
    const [box] = target.getClientRects();
    const { offsetWidth: width, offsetHeight: height } = this.#panel;
    const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
    const above = box.bottom + height + 10 > innerHeight && box.top - height - 6 > 0;
    this.#panel.style.left = `${left}px`;
    this.#panel.style.top = `${above ? box.top - height - 6 : box.bottom + 6}px`;
  }
}

function rows({ text, logprob, top }) {
  const others = top.map((each) => ({ text: each.token, logprob: each.logprob }));
  const found = others.findIndex((each) => each.text === text && Math.abs(each.logprob - logprob) < 1e-3);
  const all = found < 0 ? [...others, { text, logprob, chosen: true }] : others;
  if (found >= 0) all[found].chosen = true;
  return all.sort((one, other) => other.logprob - one.logprob);
}

function table(token) {
  const line = ({ text, logprob, chosen }) => {
    const share = Math.exp(logprob);
    const bar = element("i", { class: "share" });
    bar.style.setProperty("--share", share.toFixed(4));
    return element(
      "tr",
      { class: chosen ? "chosen" : "" },
      element("td", {}, element("code", {}, visible(text))),
      element("td", { class: "number" }, percent(share), bar),
      element("td", { class: "number quiet" }, logprob.toFixed(3)),
    );
  };
  const head = ["token", "probability", "log"].map((name) => element("th", {}, name));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows(token).map(line)));
}

function sentence(token) {
  const others = rows(token).filter((each) => !each.chosen);
  const named = others.map((each) => `${each.text} ${percent(Math.exp(each.logprob))}`).join(", ");
  return `${token.text} ${percent(Math.exp(token.logprob))}${named ? `, instead of ${named}` : ""}`;
}
