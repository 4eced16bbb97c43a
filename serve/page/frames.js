// The one or two pictures on the page: their elements, showing, naming and saving them.
import { $ } from "./controls.js";

export function newFrame(slot) {
  const figure = $(`frame-${slot}`);
  return { figure, image: figure.querySelector("img"), empty: figure.querySelector(".empty"), bar: figure.querySelector("i"), caption: figure.querySelector("figcaption") };
}

// picture: an image that is decoded already, so that nothing flickers. done: the share of its steps, from 0 to 1.
// file: what Save gives, {blob, prompt, seed}; a preview has none
export function put(frame, picture, { done, alt, caption, file = null }) {
  frame.image.alt = alt;
  frame.caption.textContent = caption;
  frame.caption.classList.remove("fault");
  frame.file = file;
  frame.url = frame.image.src = picture.src;
  frame.image.hidden = false;
  frame.empty.hidden = true;
  frame.figure.classList.add("drawn");
  frame.figure.style.setProperty("--picture", `url("${picture.src}")`);
  frame.figure.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
  frame.bar.style.width = `${(100 * done).toFixed()}%`;
}

// What is finished and seen.
export function files(frames) {
  return frames.filter((frame) => frame.file && !frame.figure.hidden).map((frame) => frame.file);
}

export function download(frames) {
  for (const { blob, prompt, seed } of files(frames)) {
    const link = document.createElement("a");
    const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
    link.href = URL.createObjectURL(blob);
    link.download = `${words || "picture"}-${seed}.jpg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
}
