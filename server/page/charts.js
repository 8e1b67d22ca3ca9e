// Small charts of the last minutes: one or two lines over time, and the newest values in figures.

import { drawing, element } from "./dom.js";

/** Values that a chart shows. */
export const POINTS = 120;
const WIDTH = 240;
const HEIGHT = 56;
const TOP = 4;

/** A chart of `lines`, names of which the first is the main one; `format` gives a value as text with its unit. */
export class Chart {
  #lines;
  #format;
  #values;
  #figures;
  #paths;
  #area = drawing("path", { class: "area" });
  #cursor = drawing("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  #picture;
  #range = element("span", { class: "range" });
  #title;
  #at = null;

  constructor(title, lines, format) {
    this.#title = title;
    this.#lines = lines;
    this.#format = format;
    this.#values = lines.map(() => []);
    this.#figures = lines.map((_, place) => element("b", { class: `figure line-${place}` }, "–"));
    this.#paths = lines.map((_, place) => drawing("path", { class: `line line-${place}` }));
    this.#picture = drawing(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
      drawing("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }),
      this.#area,
      ...this.#paths.toReversed(),
      this.#cursor,
    );
    const names = lines.map((name, place) =>
      element("span", { class: "of" }, this.#figures[place], name ? element("small", { class: `name line-${place}` }, name) : null),
    );
    this.element = element(
      "figure",
      { class: "chart" },
      element("figcaption", {}, element("span", { class: "title" }, title), this.#range),
      element("div", { class: "figures" }, ...names),
      this.#picture,
    );
    this.#picture.addEventListener("pointermove", (event) => this.#point(event));
    this.#picture.addEventListener("pointerleave", () => this.#point(null));
  }

  /** Add a value for each line, null for none. */
  add(...values) {
    values.forEach((value, place) => {
      this.#values[place].push(value);
      if (this.#values[place].length > POINTS) this.#values[place].shift();
    });
    this.#draw();
  }

  #draw() {
    const known = this.#values.flat().filter((value) => value !== null);
    const most = Math.max(...known, 0);
    const top = most || 1;
    const y = (value) => HEIGHT - 1 - (value / top) * (HEIGHT - TOP - 1);
    this.#values.forEach((values, place) => this.#paths[place].setAttribute("d", path(values, y)));
    this.#area.setAttribute("d", area(this.#values[0], y));
    this.#range.textContent = known.length ? `max ${this.#format(most)}` : "";
    const newest = this.#values.map((values) => values.at(-1) ?? null);
    const said = newest.map((value, place) => `${this.#lines[place]} ${value === null ? "none" : this.#format(value)}`.trim());
    this.#picture.setAttribute("aria-label", `${this.#title}: ${said.join(", ")}; at most ${this.#format(most)}`);
    this.#write();
  }

  #point(event) {
    if (event) {
      const box = this.#picture.getBoundingClientRect();
      const place = Math.round(((event.clientX - box.left) / box.width) * (POINTS - 1)) - (POINTS - this.#values[0].length);
      this.#at = Math.max(0, Math.min(this.#values[0].length - 1, place));
    } else {
      this.#at = null;
    }
    this.#write();
  }

  #write() {
    const count = this.#values[0].length;
    const place = this.#at ?? count - 1;
    this.#figures.forEach((figure, line) => {
      const value = this.#values[line][place] ?? null;
      figure.textContent = value === null ? "–" : this.#format(value);
    });
    const x = across(place, count);
    this.#cursor.setAttribute("visibility", this.#at === null ? "hidden" : "visible");
    this.#cursor.setAttribute("x1", x);
    this.#cursor.setAttribute("x2", x);
  }
}

function across(place, count) {
  return ((POINTS - count + place) / (POINTS - 1)) * WIDTH;
}

/** A line through the values, with a gap where there is none and a dash where one stands alone. */
function path(values, y) {
  let drawn = "";
  values.forEach((value, place) => {
    if (value === null) return;
    const [x, height] = [across(place, values.length), y(value).toFixed(2)];
    const begins = place === 0 || values[place - 1] === null;
    drawn += begins ? `M${x.toFixed(2)} ${height}h.01` : `L${x.toFixed(2)} ${height}`;
  });
  return drawn;
}

function area(values, y) {
  let drawn = "";
  values.forEach((value, place) => {
    if (value === null) return;
    const x = across(place, values.length).toFixed(2);
    if (place === 0 || values[place - 1] === null) drawn += `M${x} ${HEIGHT}`;
    drawn += `L${x} ${y(value).toFixed(2)}`;
    if (place === values.length - 1 || values[place + 1] === null) drawn += `L${x} ${HEIGHT}Z`;
  });
  return drawn;
}
