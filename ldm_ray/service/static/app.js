"use strict";
// The form, the grid that arrives while it is denoised, and the chosen image.

const state = { digit: 7, models: [], images: [], chosen: -1, stop: null, request: null };
const PARTIAL = 12;

// A button for each class of the model, each in turn, and none.
function classButtons(told) {
  const box = $("digits");
  const names = told.class_names;
  const choices = told.only_digit === null ? [...names.keys(), "each", "any"] : [told.only_digit];
  const numbers = names.every((name) => /^\d$/.test(name));
  $("kind").textContent = numbers ? "Digit" : "Class";
  box.setAttribute("aria-label", $("kind").textContent);
  box.classList.toggle("named", !numbers);
  const choose = (choice) => {
    state.digit = choice;
    [...box.children].forEach((button, i) => {
      button.setAttribute("aria-checked", String(choices[i] === choice));
      button.tabIndex = choices[i] === choice ? 0 : -1;
    });
  };
  box.replaceChildren(...choices.map((choice) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = names[choice] ?? choice;
    button.title = { each: "each class in turn", any: "unconditional: whatever comes" }[choice] ?? names[choice];
    button.setAttribute("role", "radio");
    button.addEventListener("click", () => choose(choice));
    return button;
  }));
  box.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (choices.indexOf(state.digit) + step + choices.length) % choices.length;
    choose(choices[next]);
    box.children[next].focus();
  };
  choose(choices.includes(state.digit) ? state.digit : choices[0]);
}

const className = (label) => (label === null ? "any" : model().class_names[label] ?? String(label));

const model = () => state.models.find((each) => each.id === $("model").value) ?? state.models[0];

async function loadModels() {
  state.models = (await getJSON("/v1/models")).data;
  $("model").replaceChildren(...state.models.map((each) => new Option(each.id, each.id)));
  await modelChanged();
}

async function modelChanged() {
  let told = model();
  if (!told.loaded) {
    say(`Loading ${told.id} …`);
    told = await getJSON(`/v1/models/${encodeURIComponent(told.id)}`);
    Object.assign(model(), told);
    say("Ready.");
  }
  const before = $("sampler").value;
  $("sampler").replaceChildren(...told.limits.samplers.map((name) => new Option(name, name)));
  $("sampler").value = told.limits.samplers.includes(before) ? before : told.defaults.sampler;
  if (!before) showGuidance(told.defaults.guidance_scale);
  $("n").max = told.limits.n;
  $("steps").max = told.limits.num_inference_steps;
  classButtons(told);
  samplerChanged();
}

function showGuidance(scale) {
  $("guidance").value = scale;
  $("guidance-value").textContent = $("guidance").value;
}

function samplerChanged() {
  $("steps").value = model().defaults.num_inference_steps[$("sampler").value];
}

function settings() {
  return {
    model: model().id,
    sampler: $("sampler").value,
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
  };
}

function request() {
  const n = Number($("n").value);
  const label = state.digit === "any" ? null : state.digit === "each"
    ? [...Array(n).keys()].map((i) => i % model().classes) : state.digit;
  return { ...settings(), class_label: label, n, seed: Number($("seed").value) };
}

// Every row one class, every column one seed.
function sheetRequest() {
  const first = Number($("seed").value);
  const rows = Math.min(model().classes, 25);
  const cells = [...Array(10 * rows).keys()];
  return {
    ...settings(),
    n: cells.length,
    class_label: cells.map((i) => model().only_digit ?? Math.floor(i / 10)),
    seeds: cells.map((i) => Math.min(first, 4294967286) + (i % 10)),
  };
}

async function generate(body, columns) {
  state.stop?.abort();
  const stop = (state.stop = new AbortController());
  state.request = body;
  state.images = Array.from({ length: body.n }, () => ({ frames: [], final: null }));
  select(-1);
  const grid = $("grid");
  grid.style.setProperty("--columns", columns ?? Math.min(8, Math.ceil(Math.sqrt(body.n))));
  grid.replaceChildren(...state.images.map((_, i) => {
    const picture = document.createElement("img");
    picture.alt = `image ${i + 1}`;
    picture.setAttribute("role", "option");
    picture.addEventListener("click", () => select(i));
    picture.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/plain", String(i)));
    picture.addEventListener("dragover", (event) => event.preventDefault());
    picture.addEventListener("drop", guarded((event) => morphBetween(Number(event.dataTransfer.getData("text/plain")), i)));
    return picture;
  }));
  $("scrub").disabled = true;
  $("stop").disabled = false;
  say("Denoising …");
  const started = performance.now();
  let done = 0;
  try {
    for await (const told of events("/v1/images/generations", { ...body, stream: true, partial_images: PARTIAL }, stop.signal)) {
      if (told.error && told.index === undefined) throw new ServiceError(told.error.message);
      const image = state.images[told.index];
      if (told.type.endsWith("partial_image")) {
        image.frames.push({ url: asURL(told.b64_json), step: told.step, steps: told.steps });
        grid.children[told.index].src = image.frames.at(-1).url;
      } else if (told.b64_json) {
        Object.assign(image, { final: asURL(told.b64_json), seed: told.seed, label: told.label, sha256: told.sha256 });
        grid.children[told.index].src = image.final;
        grid.children[told.index].alt = `image ${told.index + 1}, seed ${told.seed}`;
        done += 1;
      }
    }
    say(`${done} images in ${((performance.now() - started) / 1000).toFixed(2)} s.`);
    const frames = Math.max(...state.images.map((image) => image.frames.length));
    Object.assign($("scrub"), { max: frames, value: frames, disabled: frames === 0 });
    scrub();
    select(0);
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    if (state.stop === stop) $("stop").disabled = true;
  }
}

function scrub() {
  const at = Number($("scrub").value);
  let told = "final";
  state.images.forEach((image, i) => {
    const frame = image.frames[at];
    if (frame) told = `step ${frame.step}/${frame.steps}`;
    const url = frame?.url ?? image.final;
    if (url) $("grid").children[i].src = url;
  });
  $("scrub-value").textContent = told;
}

function permalink(image) {
  const told = state.request;
  const query = new URLSearchParams({
    steps: told.num_inference_steps, guidance: told.guidance_scale, sampler: told.sampler,
  });
  return `${BASE}/v1/images/${encodeURIComponent(told.model)}/${image.label ?? "none"}/${image.seed}.png?${query}`;
}

function select(i) {
  state.chosen = i;
  const image = state.images[i];
  $("chosen").hidden = !image?.final;
  [...$("grid").children].forEach((picture, k) => {
    picture.classList.toggle("chosen", k === i);
    picture.setAttribute("aria-selected", String(k === i));
  });
  if (!image?.final) return;
  draw($("large"), image.final);
  $("about").textContent = `Seed ${image.seed}, ${image.label === null ? "no label" : `${$("kind").textContent.toLowerCase()} ${className(image.label)}`}, `
    + `SHA-256 ${image.sha256.slice(0, 16)}…`;
  $("permalink").href = permalink(image);
}

function moveSelection(event) {
  const columns = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (!step || !state.images.length) return;
  event.preventDefault();
  select(Math.min(state.images.length - 1, Math.max(0, state.chosen + step)));
}

async function saveGIF() {
  const image = state.images[state.chosen];
  const body = { ...state.request, n: 1, class_label: image.label, seed: image.seed, size: "224x224" };
  delete body.seeds;
  const response = await post("/v1/images/generations", body, { accept: "image/gif" });
  save(await response.blob(), `image-${image.label ?? "any"}-${image.seed}.gif`);
}

function dice() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

const locked = () => $("lock").getAttribute("aria-pressed") === "true";
const guarded = (work) => async (event) => {
  event?.preventDefault?.();
  try { await work(event); } catch (error) { say(error.message, true); }
};

$("model").addEventListener("change", guarded(modelChanged));
$("sampler").addEventListener("change", samplerChanged);
$("guidance").addEventListener("input", () => showGuidance($("guidance").value));
$("dice").addEventListener("click", dice);
$("lock").addEventListener("click", () => $("lock").setAttribute("aria-pressed", String(!locked())));
$("form").addEventListener("submit", guarded(() => { if (!locked()) dice(); return generate(request()); }));
$("sheet").addEventListener("click", guarded(() => { if (!locked()) dice(); return generate(sheetRequest(), 10); }));
$("stop").addEventListener("click", () => state.stop?.abort());
$("scrub").addEventListener("input", scrub);
$("grid").addEventListener("keydown", moveSelection);
$("gif").addEventListener("click", guarded(saveGIF));
$("copy-link").addEventListener("click", () => copy(new URL($("permalink").href).href, "Link"));
$("curl").addEventListener("click", () => {
  const body = JSON.stringify(request()).replaceAll("'", "'\\''");
  copy(`curl ${BASE}/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png' `
    + `-o digits.png -d '${body}'`, "Command");
});
guarded(async () => {
  await loadModels();
  await generate(request());
})();
