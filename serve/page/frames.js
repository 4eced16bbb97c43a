// The one or two pictures on the page: their elements, and saving them.
import { $ } from "./controls.js";

export function newFrame(slot) {
  const figure = $(`frame-${slot}`);
  return { figure, image: figure.querySelector("img"), empty: figure.querySelector(".empty"), bar: figure.querySelector("i"), caption: figure.querySelector("figcaption"), canvas: figure.querySelector(".canvas") };
}

export function download(frames) {
  for (const frame of frames) {
    if (!frame.blob || frame.figure.hidden) continue;
    const link = document.createElement("a");
    const words = frame.image.alt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
    link.href = URL.createObjectURL(frame.blob);
    link.download = `${words || "picture"}-${frame.head.seed}.jpg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
}
