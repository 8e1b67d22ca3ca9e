// Prometheus' text format, and what two readings of it say.
// https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** What `/metrics` said at one moment. */
export class Reading {
  #samples = new Map();

  /** `time` is in seconds. */
  constructor(text, time) {
    this.time = time;
    for (const line of text.split("\n")) {
      const found = SAMPLE.exec(line);
      if (!found) continue;
      const [, name, labels = "", value] = found;
      if (!this.#samples.has(name)) this.#samples.set(name, []);
      this.#samples.get(name).push({ labels: parseLabels(labels), value: number(value) });
    }
  }

  /** The samples of a metric that have these labels, each with its `labels` and `value`. */
  samples(name, wanted = {}) {
    const has = ({ labels }) => Object.entries(wanted).every(([label, value]) => labels[label] === value);
    return (this.#samples.get(name) ?? []).filter(has);
  }

  /** The sum of these. */
  sum(name, wanted) {
    return this.samples(name, wanted).reduce((sum, { value }) => sum + value, 0);
  }

  /** A histogram's cumulative counts by upper bound, summed over all its labels. */
  buckets(name, wanted) {
    const counts = new Map();
    for (const { labels, value } of this.samples(`${name}_bucket`, wanted)) {
      const bound = number(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return [...counts].sort(([one], [other]) => one - other);
  }
}

/** A counter's increase a second between two readings; one that was set back began again at 0. */
export function rate(name, before, now, wanted) {
  const [was, is] = [before.sum(name, wanted), now.sum(name, wanted)];
  return (is >= was ? is - was : is) / (now.time - before.time);
}

/**
 * A quantile of what a histogram counted between two readings, or null where that is nothing: by a straight line within its
 * bucket, as histogram_quantile() does.
 */
export function quantile(share, name, before, now) {
  const was = new Map(before.buckets(name));
  const counted = now.buckets(name).map(([bound, count]) => [bound, Math.max(0, count - (was.get(bound) ?? 0))]);
  const all = counted.at(-1)?.[1] ?? 0;
  if (!all) return null;
  const rank = share * all;
  let [lower, below] = [0, 0];
  for (const [bound, count] of counted) {
    if (count >= rank) return bound === Infinity ? lower : lower + ((bound - lower) * (rank - below)) / (count - below || 1);
    [lower, below] = [bound, count];
  }
  return lower;
}

function parseLabels(text) {
  const found = {};
  for (const [, name, value] of text.matchAll(LABEL)) {
    found[name] = value.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
  }
  return found;
}

function number(text) {
  return text === "+Inf" ? Infinity : Number(text);
}
