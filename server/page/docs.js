// The documentation: every operation of /openapi.json, with what it takes and answers, and a command that makes it.

import { Failure, askJson } from "./api.js";
import { copy } from "./clipboard.js";
import { byId, element } from "./dom.js";
import { connectKey, key } from "./key.js";
import { Schemas, fields } from "./schema.js";
import { connectTheme } from "./theme.js";

const GROUPS = [
  ["OpenAI's API", (path) => /^\/v1\/(chat|completions|responses|embeddings)/.test(path)],
  ["Anthropic's API", (path) => path.startsWith("/v1/messages")],
  ["Google's API", (path) => path.startsWith("/v1beta/")],
  ["Plain text and tokens", (path) => ["/v1/generate", "/tokenize", "/detokenize"].includes(path)],
  ["Models", (path) => path.startsWith("/v1/models")],
  ["Operate", (path) => path.startsWith("/admin") || ["/healthz", "/readyz", "/metrics"].includes(path)],
  ["Pages", () => true],
];
const METHODS = ["get", "post", "put", "patch", "delete"];
/** How an example's answer is kept short, by the first of these fields that its body has. */
const LIMITS = [
  ["max_output_tokens", 64],
  ["generationConfig", { maxOutputTokens: 64 }],
  ["max_tokens", 64],
];

connectTheme();
connectKey();
for (const button of document.querySelectorAll("dialog [data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
foldContents();
key.addEventListener("change", read);
read();

async function read() {
  const fault = byId("docs-fault");
  try {
    const description = await askJson("/openapi.json");
    const { data: models } = await askJson("/v1/models");
    show(description, models);
    fault.hidden = true;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    fault.textContent = error.message;
    fault.hidden = false;
    byId("lead").textContent = "The description could not be read.";
  } finally {
    byId("content").removeAttribute("aria-busy");
  }
}

function show(description, models) {
  const schemas = new Schemas(description);
  const operations = Object.entries(description.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => ({ path, method, ...item[method] })),
  );
  const groups = GROUPS.map(([name]) => ({ name, operations: [] }));
  for (const operation of operations) groups[GROUPS.findIndex(([, has]) => has(operation.path))].operations.push(operation);
  const filled = groups.filter((group) => group.operations.length);

  byId("lead").replaceChildren(
    ...["Bodies are JSON. Errors have OpenAI's shape, and ", element("code", {}, "param"), " names the field at fault. "],
    ...["Where the server runs with keys, send ", element("code", {}, "Authorization: Bearer KEY"), ". For programs: "],
    ...[element("a", { href: "/openapi.json" }, "/openapi.json"), ` (OpenAPI ${description.openapi}).`],
  );
  byId("contents").replaceChildren(...filled.map(contents));
  byId("operations").replaceChildren(
    ...filled.map((group) =>
      element("section", {}, element("h2", {}, group.name), ...group.operations.map((each) => section(schemas, each, models))),
    ),
  );
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

function contents({ name, operations }) {
  const links = operations.map(({ operationId, method, path }) =>
    element("li", {}, element("a", { href: `#op-${operationId}` }, verb(method), element("span", {}, path))),
  );
  return element("div", {}, element("h2", {}, name), element("ul", {}, ...links));
}

function section(schemas, operation, models) {
  const { operationId, method, path, summary, parameters = [], requestBody, responses } = operation;
  const body = requestBody && Object.values(requestBody.content)[0].schema;
  const command = curl(schemas, operation, body, modelFor(path, models));
  const title = `op-${operationId}-title`;
  const needsKey = operation.security ? null : element("span", { class: "open" }, "no key needed");
  return element(
    "section",
    { class: "operation", id: `op-${operationId}`, "aria-labelledby": title },
    element("h3", { id: title }, verb(method), element("a", { href: `#op-${operationId}` }, path)),
    element("p", { class: "lead" }, summary, " ", needsKey),
    element(
      "div",
      { class: "example" },
      element("pre", { tabIndex: 0, "aria-label": `curl for ${path}` }, element("code", {}, command)),
      element("button", { type: "button", class: "small", "aria-label": `Copy the curl command for ${path}`, on: { click: () => copy(command, "The command") } }, "Copy"),
    ),
    ...(parameters.length ? [element("h4", {}, "Address"), element("div", { class: "fields" }, ...parameters.map((each) => parameter(schemas, each)))] : []),
    ...(body ? [element("h4", {}, "Body ", element("code", {}, schemas.name(body))), fields(schemas, body)] : []),
    element("h4", {}, "Answers"),
    element("div", { class: "answers" }, ...Object.entries(responses).map(([status, each]) => answer(schemas, status, each))),
  );
}

function parameter(schemas, { name, description, schema, required }) {
  const head = [
    element("code", { class: "name" }, name),
    element("span", { class: "type" }, schemas.type(schema)),
    required ? element("span", { class: "required" }, "required") : null,
  ].filter(Boolean);
  return element("div", { class: "of" }, element("div", { class: "head" }, ...head), element("p", { class: "about" }, description ?? ""));
}

function answer(schemas, status, response) {
  const { description, content = {} } = schemas.resolve(response);
  const opened = element(
    "details",
    { class: "answer" },
    element("summary", {}, element("b", { class: `status of-${status[0]}` }, status), element("span", {}, description)),
  );
  const fill = () => {
    for (const [media, { schema, "x-item-schema": items }] of Object.entries(content)) {
      const each = items ? schemas.choices(items).options : [schema];
      opened.append(
        element("p", { class: "media" }, element("code", {}, media), items ? " – a piece is one of:" : ` ${schemas.name(schema)}`),
        items && schema.description ? element("p", { class: "about" }, schema.description) : "",
        ...each.map((one) => (items ? named(schemas, one) : fields(schemas, one))),
      );
    }
  };
  opened.addEventListener("toggle", fill, { once: true });
  return opened;
}

function named(schemas, schema) {
  return element("div", { class: "piece" }, element("p", { class: "type" }, schemas.name(schema)), fields(schemas, schema));
}

function verb(method) {
  return element("span", { class: `verb ${method}` }, method.toUpperCase());
}

/** On a narrow page the list of operations is folded, and folds again once one is chosen. */
function foldContents() {
  const fold = byId("contents-fold");
  const narrow = matchMedia("(max-width: 60rem)");
  const settle = () => (fold.open = !narrow.matches);
  narrow.addEventListener("change", settle);
  byId("contents").addEventListener("click", (event) => event.target.closest("a") && settle());
  settle();
}

/** A model that the route can be asked with, or a word in its place. */
function modelFor(path, models) {
  const task = path === "/v1/embeddings" ? "feature-extraction" : "text-generation";
  return models.find((model) => (model.task ?? "text-generation") === task)?.id ?? "MODEL";
}

/** A command that makes the request. */
function curl(schemas, { method, path, security }, body, model) {
  const at = path.replace("{file}", "base.css").replace(/\{\w+\}/, path.includes("models/") ? model : "ID");
  const lines = [`curl ${method === "post" ? (body ? "-N " : "-X POST ") : ""}${location.origin}${at}`];
  if (security && key.value) lines.push('-H "Authorization: Bearer $ENGINESHED_API_KEY"');
  if (body) {
    const properties = schemas.inside(body)?.properties ?? {};
    const example = { ...("model" in properties ? { model } : {}), ...schemas.example(body) };
    if (example.model) example.model = model;
    const limit = LIMITS.find(([name]) => name in properties);
    if (limit) example[limit[0]] = limit[1];
    if (properties.stream) example.stream = true;
    lines.push("-H 'Content-Type: application/json'", `-d '${JSON.stringify(example, null, 2)}'`);
  }
  return lines.join(" \\\n  ");
}
