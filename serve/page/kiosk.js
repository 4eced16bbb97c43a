// Kiosk: full screen at the first touch; left alone, it types and draws by itself.
import { $ } from "./controls.js";

const IDLE_MS = 20000; // before a kiosk begins to draw by itself
const PICTURE_MS = 120000; // how long it waits for a picture before it types the next text
const PAUSE_MS = 4000; // to look at it

// page: {live, draw(), dice(), type(text), busy()}
export function runKiosk({ live, draw, dice, type, busy }) {
  const root = document.documentElement;
  let lastActive = -IDLE_MS + 3000; // begins by itself, three seconds after it was opened
  root.classList.add("kiosk");
  // Browsers grant full screen to a mouse that is pressed and to a finger that is lifted. Its button does it by itself.
  for (const what of ["pointerdown", "pointerup", "keydown"]) addEventListener(what, (event) => {
    lastActive = performance.now();
    if (!document.fullscreenElement && !event.target.closest?.("#kiosk")) root.requestFullscreen?.().catch(() => {});
  });
  navigator.wakeLock?.request("screen").catch(() => {});
  let next = 0;
  const loop = async () => {
    const texts = [...$("chips").children].map((chip) => chip.textContent);
    if (performance.now() - lastActive > IDLE_MS && texts.length && live.open) {
      const text = texts[next++ % texts.length];
      for (let i = 1; i <= text.length && performance.now() - lastActive > IDLE_MS; i++) {
        $("prompt").value = text.slice(0, i);
        await new Promise((done) => setTimeout(done, 45));
        if (text[i] === " ") { type($("prompt").value); draw(); }
      }
      if (performance.now() - lastActive > IDLE_MS) { type(text); dice(); }
      const since = performance.now();
      while (busy() && performance.now() - since < PICTURE_MS) await new Promise((done) => setTimeout(done, 200));
    }
    setTimeout(loop, PAUSE_MS);
  };
  setTimeout(loop, 500);
}
