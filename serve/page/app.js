// The page: what is typed is asked for, what comes is shown. The connection is in live.js, the strip in history.js,
// reading and filling the controls in controls.js, the pictures in frames.js.
import { $, asked, choose, milliseconds, offer, options, theme } from "./controls.js";
import { download, files, newFrame, put } from "./frames.js";
import { History } from "./history.js";
import { runKiosk } from "./kiosk.js";
import { Live } from "./live.js";
import { recall, remember } from "./memory.js";

const root = document.documentElement;
const address = new URLSearchParams(location.search);
const kiosk = address.has("kiosk");
const SEND_EVERY_MS = 50; // at most, however fast somebody types or drags
const SETTLED_MS = 700; // a picture that stays for so long goes into the history
const IDEAS = {
  demo: ["a big red star on a blue background", "a yellow moon in the night sky", "a pink heart at sunset", "a green tree in a meadow", "a white house by the sea", "a purple diamond on stripes", "an orange circle above a blue square"],
  other: ["a lighthouse in a storm, oil painting", "portrait of a red panda, studio light", "a tiny house in a teapot, macro photo", "misty mountains at sunrise, watercolour"],
};

let models = [];
let frames = { a: newFrame("a"), b: newFrame("b") };
let pending = {}; // what is being drawn, by id
let typedAt = performance.now();
let shownAt = [];
let settle;
let sentAt = -Infinity;
let untaken = ""; // what of the address could not be taken; said until something is chosen by hand
let later; // the next time to draw, where that is not at once

const history = new History($("history"), restore);
const live = new Live({
  state,
  ready: (message) => { state("ready", "Ready"); setUp(message); draw(); },
  picture: (head, blob) => show(head, blob, true),
  preview: (head, blob) => show(head, blob, false),
  waiting: (head) => pending[head.id] && state("drawing", head.ahead ? `Busy: ${head.ahead} before you` : "Busy: others are drawing"),
  started: (head) => pending[head.id] && state("drawing", "Drawing…"),
  fault: (message) => fault(message),
  key: (text) => { state("fault", "A key is needed"); $("key-fault").textContent = text || ""; askForKey(); },
});

function state(name, text) {
  $("status").dataset.state = name;
  if ($("status").textContent !== text) $("status").textContent = text;
  if (name === "lost" || name === "fault" || text.startsWith("Busy")) say(text);
}

// For screen readers: only what somebody who can't see the picture needs to hear.
function say(text) {
  $("said").textContent = text;
}

function askForKey() {
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// Controls

function setUp(message) {
  models = message.models;
  const shown = $("model").value; // empty after a reload, as all settings are
  const before = shown || modelOf(address.get("model")) || recall("model");
  options($("model"), models.map((m) => [m.name, `${m.name} – ${m.title}`]));
  if (models.some((m) => m.name === before)) $("model").value = before;
  for (const list of ["scheduler", "compare-scheduler"]) {
    const chosen = $(list).value;
    options($(list), [["", "the model's own"], ...message.schedulers.map((s) => [s, s])]);
    $(list).value = message.schedulers.includes(chosen) ? chosen : list === "scheduler" ? "" : message.schedulers[0];
  }
  if (!models.length) return state("fault", "No model has a bundle here");
  useModel($("model").value !== shown);
  if (!shown) settingsOfAddress();
}

// A model's own name, also for the other names that it has on this server.
function modelOf(name) {
  return models.find((m) => m.name === name || m.slugs?.includes(name))?.name ?? name;
}

function settingsOfAddress() {
  const wanted = (id) => (id === "model" ? modelOf(address.get(id)) : address.get(id));
  const unknown = ["model", "size", "steps", "scheduler"].filter((id) => address.has(id) && !choose(id, wanted(id)));
  readouts();
  untaken = unknown.map((id) => `${id} in the address can't be ${address.get(id)}`).join("; ");
  if (untaken) state("fault", untaken);
}

function useModel(fresh) {
  const model = models.find((m) => m.name === $("model").value);
  if (!model) return;
  offer(model.parameters, fresh);
  ideas(model.name.startsWith("demo-") ? IDEAS.demo : IDEAS.other);
  readouts();
}

function ideas(texts) {
  $("chips").replaceChildren(...texts.slice(0, kiosk ? 6 : 4).map((text) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = text;
    chip.onclick = () => { type(text); draw(); };
    return chip;
  }));
}

function readouts() {
  $("steps-out").value = $("steps").value;
  $("guidance-out").value = $("guidance").value;
  $("negative").disabled = $("guidance").value <= 1;
  const other = $("compare").value;
  $("compare-seed-field").hidden = other !== "seed";
  $("compare-scheduler-field").hidden = other !== "scheduler";
  frames.b.figure.hidden = !other;
  root.classList.toggle("comparing", !!other);
  offerSave();
}

function offerSave() {
  $("download").disabled = !files(Object.values(frames)).length;
}

function type(text) {
  $("prompt").value = text;
  typedAt = performance.now();
}

// Drawing

function draw() {
  readouts();
  clearTimeout(settle);
  clearTimeout(later);
  sentAt = performance.now();
  if (!$("prompt").value.trim() || !$("size").value) return stop("Ready");
  if (!$("compare").value) stopSlot("b");
  say("");
  pending = {};
  for (const slot of $("compare").value ? ["a", "b"] : ["a"]) {
    const request = asked(slot);
    const id = live.draw({ ...request, slot, previews: $("previews").value });
    if (!id) return; // drawn when the connection is back
    pending[id] = { request, slot, since: typedAt };
    frames[slot].figure.classList.add("busy");
    frames[slot].bar.style.width = "0";
  }
  state("drawing", "Drawing…");
}

function drawSoon() {
  clearTimeout(later);
  later = setTimeout(draw, Math.max(0, sentAt + SEND_EVERY_MS - performance.now()));
}

function stopSlot(slot) {
  const ids = Object.keys(pending).filter((id) => pending[id].slot === slot);
  if (ids.length) live.stop(slot);
  for (const id of ids) delete pending[id];
  frames[slot].figure.classList.remove("busy");
}

function stop(text) {
  const stopped = Object.keys(pending).length;
  for (const slot of ["a", "b"]) stopSlot(slot);
  if (stopped) state("ready", untaken || text);
}

async function show(head, blob, final) {
  const job = pending[head.id];
  if (!job) return;
  const frame = frames[head.slot];
  const url = URL.createObjectURL(blob);
  const next = new Image();
  next.src = url;
  await next.decode();
  if (!pending[head.id] || (job.done && !final)) return URL.revokeObjectURL(url);
  job.done = final;
  const old = frame.url;
  put(frame, next, final ? pictureOf(head, job, blob) : previewOf(head, job));
  offerSave();
  requestAnimationFrame(() => {
    if (old && !frame.kept) URL.revokeObjectURL(old);
    frame.kept = false;
    if (final) finished(head, job, frame);
  });
}

function pictureOf(head, { request: { prompt } }, blob) {
  const caption = [head.scheduler, `${head.steps} steps`, `seed ${head.seed}`, `${head.width} × ${head.height}`, ...(head.adjusted ?? [])].join(", ");
  return { done: 1, alt: prompt, caption, file: { blob, prompt, seed: head.seed } };
}

function previewOf({ index, total }, { request }) {
  const caption = `Preview after step ${index}${total ? ` of ${total}` : ""}`;
  return { done: index / (total || index + 1), alt: `Preview: ${request.prompt}`, caption };
}

function finished(head, job, frame) {
  if (pending[head.id] !== job) return; // another one was asked for meanwhile
  delete pending[head.id];
  frame.figure.classList.remove("busy");
  const now = performance.now();
  shownAt.push(now);
  $("latency").textContent = milliseconds(now - job.since);
  $("device").textContent = milliseconds(1000 * head.seconds.draw);
  if (!Object.keys(pending).length) state("ready", untaken || "Ready");
  root.dataset.shown = head.id; // for those who watch from outside
  if (head.slot === "a") settle = setTimeout(() => { frame.kept = history.add(frame.url, job.request, `${job.request.prompt}, seed ${head.seed}`); say(["Picture drawn", ...(head.adjusted ?? [])].join(", ")); }, SETTLED_MS);
}

function fault(message) {
  if (!pending[message.id]) return message.id ? undefined : state("fault", message.error); // a stale one is of no interest
  const frame = frames[message.slot];
  frame.figure.classList.remove("busy");
  delete pending[message.id];
  frame.caption.classList.add("fault");
  frame.caption.textContent = message.error;
  state("fault", "Not drawn");
  say(`Not drawn: ${message.error}`);
  if (!message.retry_s) return;
  clearTimeout(later);
  later = setTimeout(draw, 1000 * message.retry_s);
}

function restore(request) {
  type(request.prompt);
  $("model").value = request.model;
  useModel(false);
  $("seed").value = request.seed;
  $("steps").value = request.num_inference_steps;
  $("guidance").value = request.guidance_scale;
  $("size").value = `${request.img_width}x${request.img_height}`;
  $("scheduler").value = request.scheduler || "";
  $("negative").value = request.negative_prompt || "";
  draw();
}

function dice() {
  $("seed").value = Math.floor(Math.random() * 2 ** 32);
  typedAt = performance.now();
  draw();
}

// What the user does

$("form").addEventListener("submit", (event) => event.preventDefault());
$("form").addEventListener("input", (event) => {
  typedAt = performance.now();
  if (event.target.id !== "prompt") untaken = "";
  if (event.target.id === "model") { remember("model", event.target.value); useModel(true); }
  drawSoon();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop("Stopped");
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if ($("lock").getAttribute("aria-pressed") === "true") { typedAt = performance.now(); draw(); } else dice();
});
$("dice").onclick = dice;
$("download").onclick = () => download(Object.values(frames));
$("lock").onclick = () => $("lock").setAttribute("aria-pressed", $("lock").getAttribute("aria-pressed") !== "true");
$("kiosk").hidden = !root.requestFullscreen; // as on a phone of Apple's
$("kiosk").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : root.requestFullscreen()).catch(() => {});
$("key-form").addEventListener("submit", () => live.useKey($("key").value.trim()));
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault()); // there is nothing without a key
$("key-dialog").addEventListener("close", () => live.needsKey && askForKey());
$("theme").onclick = () => theme({ auto: "dark", dark: "light", light: "auto" }[recall("theme") || "auto"]);

theme(recall("theme") || "auto");

setInterval(() => {
  const now = performance.now();
  shownAt = shownAt.filter((at) => now - at < 5000);
  $("rate").textContent = shownAt.length ? (shownAt.length / 5).toFixed(1) : "–";
}, 500);

if (matchMedia("(max-width: 60rem)").matches) $("panel").open = false;

if (kiosk) runKiosk({ live, draw, dice, busy: () => Object.keys(pending).length > 0 });
