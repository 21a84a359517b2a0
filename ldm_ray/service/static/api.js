"use strict";
// Talking to the service, and small helpers that both other files use.

const $ = (id) => document.getElementById(id);

class ServiceError extends Error {}

async function failure(response) {
  let message = `the server answered ${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status says it */ }
  return new ServiceError(message);
}

// Addresses begin with the origin, since fetch refuses those of a page whose own address carries a password, and with
// the prefix under which the service is.
const BASE = location.origin + location.pathname.replace(/\/[^/]*$/, "");

async function post(path, body, options = {}) {
  const ask = () => fetch(BASE + path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...(options.accept ? { Accept: options.accept } : {}) },
    body: JSON.stringify(body),
    signal: options.signal,
  });
  let response = await ask();
  // A 500 that is not the service's own is from the proxy, of a replica that died: another one answers.
  if (response.status === 500 && !response.headers.get("content-type")?.includes("json")) response = await ask();
  if (!response.ok) throw await failure(response);
  return response;
}

async function getJSON(path) {
  const response = await fetch(BASE + path);
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Server-sent events of a POST, one parsed object at a time.
async function* events(path, body, signal) {
  const reader = (await post(path, body, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const line = block.split("\n").find((each) => each.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

const asURL = (b64) => `data:image/png;base64,${b64}`;

function draw(canvas, url) {
  const picture = new Image();
  picture.onload = () => {
    canvas.width = picture.width;
    canvas.height = picture.height;
    canvas.getContext("2d").drawImage(picture, 0, 0);
  };
  picture.src = url;
}

function say(message, bad = false) {
  $("status").textContent = message;
  $("status").classList.toggle("bad", bad);
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} copied.`);
  } catch {
    window.prompt(`${what}:`, text);
  }
}
