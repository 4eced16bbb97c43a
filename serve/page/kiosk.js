// Kiosk: full screen at the first touch; left alone, it types and draws by itself.
import { $ } from "./controls.js";

const FIRST_MS = 3000; // after it was opened, before a kiosk begins to draw by itself
const IDLE_MS = 20000; // after it was touched
const PICTURE_MS = 120000; // how long it waits for a picture before it types the next text
const PAUSE_MS = 4000; // to look at it

// page: {live, draw(), dice(), busy()}
export function runKiosk({ live, draw, dice, busy }) {
  const root = document.documentElement;
  let lastActive = -IDLE_MS;
  const alone = () => performance.now() - lastActive > IDLE_MS;
  root.classList.add("kiosk");
  // Browsers grant full screen to a mouse that is pressed and to a finger that is lifted. Its button does it by itself.
  for (const what of ["pointerdown", "pointerup", "keydown"]) addEventListener(what, (event) => {
    lastActive = performance.now();
    if (!document.fullscreenElement && !event.target.closest?.("#kiosk")) root.requestFullscreen?.().catch(() => {});
  });
  // A browser lets the screen sleep again as soon as the page is hidden, and does not ask when it is back.
  const stayAwake = () => document.visibilityState === "visible" && navigator.wakeLock?.request("screen").catch(() => {});
  document.addEventListener("visibilitychange", stayAwake);
  stayAwake();
  let next = 0;
  const loop = async () => {
    const texts = [...$("chips").children].map((chip) => chip.textContent);
    if (texts.length && live.open) {
      const text = texts[next++ % texts.length];
      for (let i = 1; i <= text.length && alone(); i++) {
        $("prompt").value = text.slice(0, i);
        await new Promise((done) => setTimeout(done, 45));
        if (text[i] === " ") draw();
      }
      if (alone()) dice();
      const since = performance.now();
      while (busy() && performance.now() - since < PICTURE_MS) await new Promise((done) => setTimeout(done, 200));
    }
    setTimeout(loop, PAUSE_MS);
  };
  setTimeout(loop, FIRST_MS);
}
