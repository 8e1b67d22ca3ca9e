// JSON Schemas of the description, as somebody reads them: names, types, limits, and what is inside, to be opened.

import { element } from "./dom.js";

/** Reads the schemas of a document, which refer to each other by name. */
export class Schemas {
  #document;

  constructor(document) {
    this.#document = document;
  }

  /** What a schema refers to. */
  resolve(schema) {
    if (!schema?.$ref) return schema ?? {};
    const { $ref, ...own } = schema;
    const found = $ref
      .slice(2)
      .split("/")
      .reduce((place, name) => place[name.replaceAll("~1", "/").replaceAll("~0", "~")], this.#document);
    return { ...this.resolve(found), ...own };
  }

  /** The name that the document has for a schema, or an empty string. */
  name(schema) {
    return schema?.$ref?.split("/").at(-1) ?? "";
  }

  /** The schemas that a value may be of, less null; and whether it may be null. */
  choices(schema) {
    const options = schema.anyOf ?? schema.oneOf ?? [schema];
    const isNull = (each) => each.type === "null";
    return { options: options.filter((each) => !isNull(each)), nullable: options.some(isNull) };
  }

  /** The type in a few words. */
  type(schema) {
    const { options } = this.choices(schema);
    return [...new Set(options.map((each) => this.#word(each)))].join(" or ");
  }

  /** The limits of a value in a few words. */
  limits(schema) {
    return this.choices(schema)
      .options.map((each) => limits(this.resolve(each)))
      .filter(Boolean)
      .join("; ");
  }

  /** The properties of an object, or of the objects in a list, that is among the choices. */
  inside(schema, depth = 0) {
    for (const option of this.choices(schema).options) {
      const whole = this.resolve(option);
      if (whole.properties) return whole;
      const within = whole.items ?? (typeof whole.additionalProperties === "object" ? whole.additionalProperties : null);
      const found = within && depth < 3 ? this.inside(within, depth + 1) : null;
      if (found) return found;
    }
    return null;
  }

  /** A value that the schema takes. */
  example(schema, name = "", depth = 0) {
    const whole = this.resolve(this.choices(schema).options[0] ?? {});
    if (whole.const !== undefined) return whole.const;
    if (whole.enum) return whole.enum.includes("user") ? "user" : whole.enum[0];
    if (whole.anyOf) return this.example(whole, name, depth);
    if (whole.properties) {
      const required = new Set(whole.required);
      const entries = Object.entries(whole.properties)
        .filter(([each]) => required.has(each) || SAID.has(each))
        .map(([each, inner]) => [each, this.example(inner, each, depth + 1)])
        .filter(([each, value]) => required.has(each) || typeof value === "string" || Array.isArray(value));
      return Object.fromEntries(entries);
    }
    if (whole.type === "array") return depth < 4 ? [this.example(whole.items ?? {}, name, depth + 1)] : [];
    return { integer: Math.max(1, whole.minimum ?? 1), number: 1, boolean: true, string: SAMPLES[name] ?? "text" }[whole.type] ?? {};
  }

  #word(schema) {
    const named = this.name(schema);
    const whole = this.resolve(schema);
    if (whole.const !== undefined) return JSON.stringify(whole.const);
    if (whole.enum) return whole.enum.map((each) => JSON.stringify(each)).join(" | ");
    if (whole.type === "array") return `list of ${whole.items ? this.type(whole.items) : "anything"}`;
    if (whole.type === "object" && !named) {
      return typeof whole.additionalProperties === "object" ? `object of ${this.type(whole.additionalProperties)}` : "object";
    }
    return named || (whole.anyOf ? this.type(whole) : (whole.type ?? "anything"));
  }
}

const SAMPLES = {
  content: "Why is the sky blue?",
  input: "Why is the sky blue?",
  prompt: "The capital of France is",
  text: "Why is the sky blue?",
};

/** What an example says also where the schema alone does not require it. */
const SAID = new Set(["content", "contents", "prompt", "text"]);

/** The fields of an object, each to be opened where there is more inside. */
export function fields(schemas, schema, seen = []) {
  const whole = schemas.inside(schema);
  if (!whole) return element("p", { class: "type" }, schemas.type(schema));
  const required = new Set(whole.required);
  const rows = Object.entries(whole.properties).map(([name, property]) => field(schemas, name, property, required.has(name), seen));
  return element("div", { class: "fields" }, ...rows);
}

function field(schemas, name, property, required, seen) {
  const whole = schemas.resolve(property);
  const inner = schemas.inside(property);
  const notes = [
    schemas.limits(property),
    whole.default !== undefined && whole.default !== null ? `default ${JSON.stringify(whole.default)}` : "",
  ];
  const head = [
    element("code", { class: "name" }, name),
    element("span", { class: "type" }, schemas.type(property)),
    required ? element("span", { class: "required" }, "required") : null,
    element("span", { class: "limits" }, notes.filter(Boolean).join(" · ")),
  ];
  const about = whole.description ? element("p", { class: "about" }, whole.description) : null;
  if (!inner || seen.includes(inner.title ?? inner)) return element("div", { class: "of" }, element("div", { class: "head" }, ...head), about);
  const opened = element("details", { class: "of" }, element("summary", { class: "head" }, ...head), about);
  opened.addEventListener(
    "toggle",
    () => opened.append(fields(schemas, property, [...seen, inner.title ?? inner])),
    { once: true },
  );
  return opened;
}

function limits(schema) {
  const found = [];
  const { minimum, maximum, exclusiveMinimum, exclusiveMaximum, minLength, maxLength, minItems, maxItems } = schema;
  const range = (low, high, unit) => {
    const [plain, huge] = [(value) => value.toLocaleString("en"), (value) => Math.abs(value) > 2 ** 53];
    if (low !== undefined && high !== undefined && !huge(low) && !huge(high)) found.push(`${plain(low)} to ${plain(high)}${unit}`);
    else if (low !== undefined && !huge(low)) found.push(`at least ${plain(low)}${unit}`);
    else if (high !== undefined && !huge(high)) found.push(`at most ${plain(high)}${unit}`);
  };
  range(minimum, maximum, "");
  if (exclusiveMinimum !== undefined) found.push(`over ${exclusiveMinimum}`);
  if (exclusiveMaximum !== undefined) found.push(`under ${exclusiveMaximum}`);
  range(minLength, maxLength, " characters");
  range(minItems, maxItems, " items");
  if (schema.items) {
    const inner = limits(schema.items);
    if (inner) found.push(`each ${inner}`);
  }
  return found.join(", ");
}
