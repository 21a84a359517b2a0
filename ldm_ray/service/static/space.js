"use strict";
// The latent space: between two images, and the map.

const morph = { from: null, frames: [] };
const map = { told: null, at: [0, 0], bounds: null, busy: false, wanted: null };
const COLOURS = ["#e6194b", "#f58231", "#b8960c", "#3cb44b", "#18a0a0", "#4363d8", "#911eb4", "#d63ec6", "#8a6d3b", "#6b7280"];

async function morphBetween(from, to) {
  if (from === to || !state.images[from]?.final || !state.images[to]?.final) return;
  morph.from = state.images[from];
  select(to);
  await morphTo();
}

async function morphTo() {
  const image = state.images[state.chosen];
  const end = (each) => ({ seed: each.seed, class_label: each.label });
  const { model, sampler, num_inference_steps, guidance_scale } = state.request;
  const body = { model, sampler, num_inference_steps, guidance_scale, start: end(morph.from), end: end(image), n: 32 };
  const told = await (await post("/v1/images/interpolations", body)).json();
  morph.frames = told.data.filter((item) => item.b64_json).map((item) => asURL(item.b64_json));
  $("mix").max = morph.frames.length - 1;
  $("mix").value = Math.floor(morph.frames.length / 2);
  $("ends").textContent = `Seed ${morph.from.seed} (${className(morph.from.label)}) to seed ${image.seed} (${className(image.label)})`;
  $("morph").hidden = false;
  mixed();
}

function mixed() {
  const url = morph.frames[Number($("mix").value)];
  if (url) draw($("between"), url);
}

async function loadMap() {
  $("load-map").disabled = true;
  try {
    map.told = await getJSON(`/v1/latents/map?n=250&model=${encodeURIComponent(model().id)}`);
  } finally {
    $("load-map").disabled = false;
  }
  // A few images may lie far out: the map shows where nearly all are.
  const reach = map.told.points.map((point) => Math.max(Math.abs(point.x), Math.abs(point.y))).sort((a, b) => a - b);
  map.bounds = 1.15 * reach[Math.floor(0.97 * (reach.length - 1))];
  $("map-box").hidden = false;
  $("load-map").textContent = "Draw it again";
  goTo([0, 0]);
}

const toPixel = (v) => (v / map.bounds + 1) / 2 * $("map").width;
const toPlane = (p) => (p / $("map").width * 2 - 1) * map.bounds;

function paint() {
  const context = $("map").getContext("2d");
  context.clearRect(0, 0, $("map").width, $("map").height);
  context.font = "600 17px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (const point of map.told.points) {
    context.fillStyle = COLOURS[(point.label ?? 0) % 10];
    context.fillText(point.label ?? "•", toPixel(point.x), toPixel(point.y));
  }
  const [x, y] = map.at.map(toPixel);
  context.strokeStyle = getComputedStyle(document.body).color;
  context.lineWidth = 2;
  context.beginPath();
  context.arc(x, y, 11, 0, 7);
  context.moveTo(x - 18, y); context.lineTo(x + 18, y);
  context.moveTo(x, y - 18); context.lineTo(x, y + 18);
  context.stroke();
}

function goTo(at) {
  map.at = at.map((v) => Math.max(-map.bounds, Math.min(map.bounds, v)));
  paint();
  $("point-at").textContent = map.at.map((v) => v.toFixed(2)).join(", ");
  decodePoint();
}

// One request at a time; the newest point is asked for when the one before it is there.
async function decodePoint() {
  map.wanted = map.at;
  if (map.busy) return;
  map.busy = true;
  try {
    while (map.wanted) {
      const [x, y] = map.wanted;
      map.wanted = null;
      const latent = map.told.origin.map((o, i) => o + x * map.told.axes[0][i] + y * map.told.axes[1][i]);
      const told = await (await post("/v1/latents/decode", { model: map.told.model, latents: [latent] })).json();
      draw($("point"), asURL(told.data[0].b64_json));
    }
  } catch (error) {
    say(error.message, true);
  } finally {
    map.busy = false;
  }
}

function pointed(event) {
  if (event.type === "pointermove" && !event.buttons) return;
  const box = $("map").getBoundingClientRect();
  const scale = $("map").width / box.width;
  goTo([toPlane((event.clientX - box.left) * scale), toPlane((event.clientY - box.top) * scale)]);
}

$("from").addEventListener("click", () => {
  morph.from = state.images[state.chosen];
  $("to").disabled = false;
  say("Now choose another image and press Morph to here.");
});
$("to").addEventListener("click", guarded(morphTo));
$("mix").addEventListener("input", mixed);
$("load-map").addEventListener("click", guarded(loadMap));
$("map").addEventListener("pointerdown", pointed);
$("map").addEventListener("pointermove", pointed);
$("map").addEventListener("keydown", (event) => {
  const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
  if (!step) return;
  event.preventDefault();
  goTo(map.at.map((v, i) => v + step[i] * map.bounds / 40));
});
