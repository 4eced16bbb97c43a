// The controls as they stand: what a model offers goes into them, what is asked for is read from them.

import { remember } from "./memory.js";

export const $ = (id) => document.getElementById(id);
const SIZES = [64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048];

export function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
}

// Whether the control takes that value.
export function choose(id, value) {
  const before = $(id).value;
  $(id).value = value;
  if ($(id).value === value) return true;
  $(id).value = before;
  return false;
}

// What a model can do. fresh: all as the model has it; otherwise what was chosen stays, where the model can do that.
export function offer(p, fresh) {
  range("steps", p.num_inference_steps, fresh);
  range("guidance", p.guidance_scale, fresh);
  $("guidance-field").hidden = $("negative-field").hidden = (p.guidance_scale.maximum ?? 0) <= 1;
  const before = $("size").value;
  options($("size"), sizes(p));
  if (fresh || !choose("size", before)) $("size").value = `${p.img_width.default}x${p.img_height.default}`;
}

function range(id, schema, fresh) {
  $(id).min = schema.minimum ?? 1;
  $(id).max = schema.maximum ?? 100;
  if (fresh) $(id).value = schema.default;
}

function sizes(p) {
  const { minimum: low = 64, maximum: high = 2048 } = p.img_width;
  const d = p.img_width.default;
  const pairs = SIZES.filter((s) => s >= low && s <= high).map((s) => [s, s]);
  if (d * 1.5 <= high) pairs.push([d * 1.5, d], [d, d * 1.5]);
  return pairs.map(([w, h]) => [`${w}x${h}`, `${w} × ${h}`]);
}

function seedOf(id) {
  const digits = $(id).value.replace(/\D/g, "").slice(0, 15);
  return digits === "" ? 0 : Number(digits);
}

export function asked(slot) {
  const [width, height] = $("size").value.split("x").map(Number);
  const request = {
    model: $("model").value, prompt: $("prompt").value, seed: seedOf("seed"), num_inference_steps: Number($("steps").value),
    img_width: width, img_height: height, guidance_scale: Number($("guidance").value),
  };
  if ($("scheduler").value) request.scheduler = $("scheduler").value;
  if ($("negative").value && request.guidance_scale > 1) request.negative_prompt = $("negative").value;
  if (slot === "b" && $("compare").value === "seed") request.seed = seedOf("compare-seed");
  if (slot === "b" && $("compare").value === "scheduler") request.scheduler = $("compare-scheduler").value || undefined;
  return request;
}

export function milliseconds(ms) {
  return ms < 1000 ? `${ms.toFixed()} ms` : `${(ms / 1000).toFixed(1)} s`;
}

export function theme(name) {
  remember("theme", name);
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-label", `Theme: ${name === "auto" ? "as the system" : name}`);
}
