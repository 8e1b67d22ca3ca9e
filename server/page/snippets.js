// A request as somebody would make it elsewhere: with curl, or with OpenAI's Python client.

import { key } from "./key.js";

const VARIABLE = "ENGINESHED_API_KEY";
/** What OpenAI's client has no parameter for. */
const EXTRA = new Set(["top_k", "min_p", "repetition_penalty"]);

/** The request as a command for a shell. The key is named, not told. */
export function curl(body) {
  const lines = [`curl -N ${location.origin}/v1/chat/completions`, "-H 'Content-Type: application/json'"];
  if (key.value) lines.push(`-H "Authorization: Bearer $${VARIABLE}"`);
  lines.push(`-d '${JSON.stringify(body, null, 2).replaceAll("'", String.raw`'\''`)}'`);
  return `${lines.join(" \\\n  ")}\n`;
}

/** The request as a Python program that prints the answer. */
export function python(body) {
  const plain = Object.entries(body).filter(([name]) => !EXTRA.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => EXTRA.has(name)));
  const keywords = plain.map(([name, value]) => `    ${name}=${literal(value, 4)},\n`);
  if (Object.keys(extra).length) keywords.push(`    extra_body=${literal(extra, 4)},\n`);
  const secret = key.value ? `os.environ[${JSON.stringify(VARIABLE)}]` : '"unused"';
  return [
    ...(key.value ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${secret})`,
    `stream = client.chat.completions.create(\n${keywords.join("")})`,
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
    "print()",
    "",
  ].join("\n");
}

/** A JSON value in Python, whose strings are written as JSON writes them. */
function literal(value, indent) {
  const pad = " ".repeat(indent);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) {
    if (value.every((each) => typeof each !== "object")) return `[${value.map((each) => literal(each, 0)).join(", ")}]`;
    return `[\n${value.map((each) => `${pad}    ${literal(each, 0)},\n`).join("")}${pad}]`;
  }
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, 0)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
