// The clipboard, also where the page came over plain HTTP from another machine and the browser's own way to it is closed.

import { tell } from "./announce.js";
import { byId } from "./dom.js";

/** Put `text` on the clipboard and say that `what` was copied; where that is impossible, show it, selected. */
export async function copy(text, what) {
  if (await written(text)) {
    tell(`${what} copied`);
    return;
  }
  const dialog = byId("copy-dialog");
  byId("copy-text").value = text;
  dialog.showModal();
  byId("copy-text").select();
}

async function written(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return writtenBySelection(text);
  }
}

function writtenBySelection(text) {
  const before = document.activeElement;
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "offscreen";
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}
