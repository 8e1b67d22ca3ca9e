// Requests to this server, and what it says when it cannot serve one.

import { key } from "./key.js";

/** What went wrong, in words for whoever reads the page. */
export class Failure extends Error {
  constructor(message, { status = 0, param = null, code = null, id = null } = {}) {
    super(message);
    this.status = status;
    /** The field of the request that is at fault. */
    this.param = param;
    this.code = code;
    /** The request's id in the server's log. */
    this.id = id;
  }
}

/** The answer to a request, once its head is there; throws Failure unless the status is 200. */
export async function ask(path, init = {}) {
  const headers = new Headers(init.headers);
  if (key.value) headers.set("Authorization", `Bearer ${key.value}`);
  let response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer: it is stopped, or cannot be reached from here.");
  }
  if (response.ok) return response;
  const failure = await told(response);
  if (response.status === 401) key.refuse(failure.message);
  throw failure;
}

/** The JSON that `path` answers with. */
export async function askJson(path, init) {
  return (await ask(path, init)).json();
}

async function told(response) {
  const id = response.headers.get("X-Request-Id");
  let text = "";
  try {
    text = await response.text();
    return failure(JSON.parse(text), response.status, id);
  } catch {
    return new Failure(text.trim().slice(0, 500) || `The server answered with status ${response.status}.`, {
      status: response.status,
      id,
    });
  }
}

/** The failure that an error body tells of. */
export function failure(body, status, id) {
  const { message, param, code } = body.error;
  return new Failure(message, { status, param, code, id });
}
