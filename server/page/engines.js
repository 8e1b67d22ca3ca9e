// The engines tab: what the server does now, from /metrics and, for those with an admin's key, /admin/status.

import { say, tell } from "./announce.js";
import { Failure, ask, askJson } from "./api.js";
import { Chart } from "./charts.js";
import { byId, element } from "./dom.js";
import { key } from "./key.js";
import { models, stateWords } from "./models.js";
import { Reading, quantile, rate } from "./prometheus.js";

const EVERY_MS = 1000;
/** Readings over which quantiles are taken: half a minute. */
const WINDOW = 30;
/** Readings between two looks at /admin/status, each of which the server logs. */
const STATUS_EVERY = 3;
const MOST_SQUARES = 32;

/** The tab. */
export class Engines {
  #panel = byId("engines-panel");
  #readings = [];
  #charts = charts();
  #status = null;
  #statusRefused = false;
  /** Counts the times that looking began or ended: who looks for an earlier one stops. */
  #watching = 0;

  constructor() {
    byId("charts").replaceChildren(...this.#charts.map(({ chart }) => chart.element));
    this.#panel.addEventListener("shown", (event) => this.#watch(event.detail));
    addEventListener("visibilitychange", () => this.#watch(document.visibilityState === "visible" && !this.#panel.hidden));
    key.addEventListener("change", () => {
      this.#status = null;
      this.#statusRefused = false;
      this.#watch(!this.#panel.hidden);
    });
    models.addEventListener("change", () => !this.#panel.hidden && this.#showModels());
  }

  /** Look every second from now on, or no longer. */
  async #watch(on) {
    const watch = (this.#watching += 1);
    if (!on) return;
    models.refresh();
    for (let count = 0; watch === this.#watching; count += 1) {
      try {
        await this.#look(count % STATUS_EVERY === 0);
        this.#fault("");
      } catch (error) {
        if (!(error instanceof Failure)) throw error;
        this.#fault(error.message);
        if (error.status === 401) return; // Until there is a key.
      }
      await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
    }
  }

  async #look(closely) {
    const text = await (await ask("/metrics")).text();
    if (closely) await this.#lookCloser();
    this.#take(new Reading(text, performance.now() / 1000));
  }

  async #lookCloser() {
    if (!key.value || this.#statusRefused) return;
    try {
      this.#status = await askJson("/admin/status");
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      this.#status = null;
      this.#statusRefused = error.status === 403 || error.status === 401;
    }
  }

  #take(reading) {
    const before = this.#readings.at(-1);
    this.#readings.push(reading);
    if (this.#readings.length > WINDOW + 1) this.#readings.shift();
    if (before && reading.time - before.time < 3 * (EVERY_MS / 1000)) {
      for (const { chart, values } of this.#charts) chart.add(...values(before, reading, this.#readings[0]));
    } else if (before) {
      this.#readings = [reading]; // Nobody looked meanwhile: what was counted then is not of now.
    }
    this.#panel.removeAttribute("aria-busy");
    this.#showSummary(reading);
    this.#showEngines(reading, before);
    this.#showModels();
    this.#showProcesses(reading);
    this.#showMemory(reading);
  }

  #fault(message) {
    const place = byId("engines-fault");
    if (place.textContent === message) return;
    place.textContent = message;
    place.hidden = !message;
  }

  #showSummary(reading) {
    const started = reading.sum("engineshed_start_time_seconds");
    const engines = reading.samples("engineshed_slots").length;
    const parts = [
      `up ${duration(Date.now() / 1000 - started)}`,
      plural(engines, "engine"),
      plural(reading.sum("engineshed_slots"), "slot"),
      `${plural(reading.sum("engineshed_requests_total", { route: "/v1/chat/completions" }), "chat request")} so far`,
    ];
    byId("summary").textContent = parts.join(" · ");
    byId("admin-note").hidden = this.#status !== null;
    byId("admin-note").textContent =
      this.#statusRefused
        ? "The key is no admin's: variants, contexts and process ids are not shown."
        : "With an admin's key, variants, contexts and process ids are shown, and models can be loaded and unloaded.";
  }

  #showEngines(reading, before) {
    const told = new Map(this.#status?.engines.map((engine) => [`${engine.model}@${engine.device}`, engine]));
    const found = reading.samples("engineshed_slots").map(({ labels, value: slots }) => {
      const of = (name) => reading.sum(`engineshed_${name}`, labels);
      const engine = told.get(`${labels.model}@${labels.device}`);
      const running = of("requests_running");
      const speed = before ? rate("engineshed_engine_generated_tokens_total", before, reading, labels) : 0;
      const state = engine?.state ?? (of("ready") ? "ready" : "not ready");
      return [
        labels.model,
        engine ? `${labels.device} · ${engine.variant}` : labels.device,
        badge(state),
        squares(running, slots),
        `${of("requests_waiting")} of ${of("queue_limit")}`,
        count(of("kv_tokens")) + (engine?.context ? ` of ${count(engine.context * slots)}` : ""),
        count(Math.round(speed)),
        String(of("worker_restarts_total")),
      ];
    });
    const heads = ["Model", "Device", "State", "Slots", "Waiting", "KV tokens", "Tokens/s", "Restarts"];
    fill("engines-table", heads, found, "No engine is loaded. A model's engine is started when the model is asked for.");
  }

  #showModels() {
    const found = (models.list ?? []).map((model) => [
      model.id,
      badge(model.state),
      `${count(model.max_model_len)} tokens`,
      model.reason ?? (model.state === "ready" ? "takes requests" : stateWords(model.state)),
      ...(this.#status ? [this.#commands(model)] : []),
    ]);
    const heads = ["Model", "State", "Context", "About", ...(this.#status ? ["Do"] : [])];
    fill("models-table", heads, found, models.failure?.message ?? "There is no model. Build one with: engineshed export");
  }

  #commands(model) {
    const button = (action) =>
      element("button", { type: "button", class: "small", on: { click: () => this.#command(action, model.id) } }, action);
    const actions = model.state === "ready" ? ["reload", "unload"] : ["load"];
    return element("span", { class: "row" }, ...actions.map(button));
  }

  async #command(action, name) {
    say(`${action} ${name}`);
    try {
      const { state } = await askJson(`/admin/models/${encodeURIComponent(name)}/${action}`, { method: "POST" });
      tell(`${name}: ${state}`);
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      tell(error.message);
    }
    models.refresh();
  }

  #showProcesses(reading) {
    const pids = new Map(this.#status?.processes.map(({ name, pid }) => [name, pid]));
    const found = reading.samples("engineshed_process_resident_bytes").map(({ labels, value }) => [
      labels.process,
      ...(this.#status ? [String(pids.get(labels.process) ?? "")] : []),
      bytes(value),
      String(reading.sum("engineshed_process_restarts_total", labels)),
    ]);
    fill("processes-table", ["Process", ...(this.#status ? ["Id"] : []), "Memory", "Restarts"], found, "None.");
  }

  #showMemory(reading) {
    const found = reading.samples("engineshed_memory_budget_bytes").map(({ labels, value: budget }) => {
      const reserved = reading.sum("engineshed_memory_reserved_bytes", labels);
      return [labels.device, meter(reserved, budget), `${bytes(reserved)} of ${bytes(budget)}`];
    });
    fill("memory-table", ["Device", "Reserved", ""], found, "No device is known.");
  }
}

/** The charts, each with what it shows of the last two readings, and of the last one and the first of the window. */
function charts() {
  const perSecond = (name) => (before, now) => [rate(name, before, now)];
  const gauges = (...names) => (_, now) => names.map((name) => now.sum(name));
  const quantiles = (name) => (_, now, first) => [quantile(0.5, name, first, now), quantile(0.95, name, first, now)];
  const whole = (value) => count(Math.round(value));
  const made = (title, lines, format, values) => ({ chart: new Chart(title, lines, format), values });
  return [
    made("Tokens a second", [""], whole, perSecond("engineshed_generated_tokens_total")),
    made("Requests", ["running", "waiting"], whole, gauges("engineshed_requests_running", "engineshed_requests_waiting")),
    made("KV tokens in use", [""], whole, gauges("engineshed_kv_tokens")),
    made("Time to first token", ["p50", "p95"], time, quantiles("engineshed_time_to_first_token_seconds")),
    made("Between tokens", ["p50", "p95"], time, quantiles("engineshed_inter_token_seconds")),
    made("Prompt tokens a second", [""], whole, perSecond("engineshed_prompt_tokens_total")),
  ];
}

/** Write a table: its cells are texts or elements. Their roles are spelt out, as a narrow page lays them out otherwise. */
function fill(id, heads, rows, empty) {
  const table = byId(id);
  const cell = (content, place) =>
    place
      ? element("td", { role: "cell", data: { label: heads[place] } }, content)
      : element("th", { role: "rowheader", scope: "row" }, content);
  const wanted = rows.length
    ? rows.map((row) => element("tr", { role: "row" }, ...row.map(cell)))
    : [element("tr", { role: "row" }, element("td", { role: "cell", class: "empty", colSpan: heads.length }, empty))];
  const head = element("tr", {}, ...heads.map((name) => (name ? element("th", { scope: "col" }, name) : element("td"))));
  if (table.tHead.rows[0]?.textContent !== head.textContent || table.tHead.rows[0].cells.length !== heads.length) {
    table.tHead.replaceChildren(head);
  }
  if (!sameRows(table.tBodies[0], wanted)) table.tBodies[0].replaceChildren(...wanted);
}

/** Whether nothing has changed, so that what has the focus can keep it. */
function sameRows(body, wanted) {
  return body.rows.length === wanted.length && wanted.every((row, place) => row.isEqualNode(body.rows[place]));
}

function badge(state) {
  return element("span", { class: "badge", data: { state } }, state);
}

function squares(running, slots) {
  const label = `${running} of ${slots}`;
  if (slots > MOST_SQUARES) return label;
  const each = Array.from({ length: slots }, (_, place) => element("i", { class: place < running ? "full" : "" }));
  return element("span", { class: "slots" }, element("span", { class: "squares", "aria-hidden": "true" }, ...each), label);
}

function meter(value, most) {
  const bar = element("span", { class: "meter", "aria-hidden": "true" });
  bar.style.setProperty("--share", most ? Math.min(1, value / most).toFixed(3) : "0");
  return bar;
}

function count(value) {
  return value.toLocaleString("en");
}

function plural(value, name) {
  return `${count(value)} ${name}${value === 1 ? "" : "s"}`;
}

function bytes(value) {
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(1)} GiB` : `${Math.round(value / 2 ** 20)} MiB`;
}

function time(seconds) {
  const ms = seconds * 1000;
  return ms >= 1000 ? `${seconds.toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

function duration(seconds) {
  const [days, hours, minutes] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.max(0, Math.floor(seconds))} s`;
}
