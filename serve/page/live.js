// The connection: says hello, sends what to draw, takes pictures apart, and comes back by itself when it was lost.

import { recall, remember } from "./memory.js";

const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5000;
const PING_MS = 10000;
const SILENCE_MS = 20000; // after a ping; then the connection is taken for lost
const NEEDS_KEY = 4401;

export class Live {
  // on: {state(name, text), ready(message), picture(head, blob), preview(head, blob), waiting(head), started(head), fault(message), key(text)}
  constructor(on) {
    this.on = on;
    this.retryMs = FIRST_RETRY_MS;
    this.nextId = 0;
    this.key = recall("key", "sessionStorage") || "";
    addEventListener("online", () => this.connect());
    addEventListener("offline", () => this.drop());
    setInterval(() => this.watch(), PING_MS);
    this.connect();
  }

  connect() {
    if (this.socket && this.socket.readyState < WebSocket.CLOSING) return;
    const address = new URL("live", location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = (this.socket = new WebSocket(address));
    this.pingedAt = performance.now();
    socket.binaryType = "arraybuffer";
    socket.onopen = () => socket.send(JSON.stringify({ type: "hello", key: this.key }));
    socket.onmessage = (event) => (this.pingedAt = 0, typeof event.data === "string" ? this.text(JSON.parse(event.data)) : this.binary(event.data));
    socket.onclose = (event) => this.closed(event);
  }

  // A connection that broke without a word is not closed for minutes otherwise.
  watch() {
    if (this.pingedAt && performance.now() - this.pingedAt >= SILENCE_MS) return this.drop();
    if (this.pingedAt || !this.open) return;
    this.pingedAt = performance.now();
    this.socket.send(JSON.stringify({ type: "ping" }));
  }

  drop() {
    if (this.socket.readyState > WebSocket.OPEN) return;
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close();
    this.closed({ code: 1006 });
  }

  useKey(key) {
    this.key = key;
    this.needsKey = false;
    remember("key", key, "sessionStorage");
    this.connect();
  }

  get open() {
    return this.ready && this.socket.readyState === WebSocket.OPEN;
  }

  // Gives the request its id, or 0 where there is no connection; it is asked for again when there is one.
  draw(request) {
    if (!this.open) return 0;
    const id = ++this.nextId;
    this.socket.send(JSON.stringify({ type: "draw", id, ...request }));
    return id;
  }

  stop(slot) {
    if (this.open) this.socket.send(JSON.stringify({ type: "stop", slot }));
  }

  text(message) {
    if (message.type === "ready") {
      this.ready = true;
      this.retryMs = FIRST_RETRY_MS;
      this.on.ready(message);
    } else if (message.type === "waiting" || message.type === "started") this.on[message.type](message);
    else if (message.type === "error") {
      this.lastFault = message.error;
      this.on.fault(message);
    }
  }

  binary(data) {
    const length = new DataView(data).getUint32(0);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    const blob = new Blob([new Uint8Array(data, 4 + length)], { type: head.media || "image/jpeg" });
    this.on[head.type](head, blob);
  }

  closed(event) {
    this.ready = false;
    if (event.code === NEEDS_KEY) {
      this.needsKey = true;
      this.on.key(this.key ? this.lastFault : "");
      return;
    }
    const full = event.code === 1013;
    this.on.state("lost", full ? `${this.lastFault}. Trying again…` : "Connection lost. Trying again…");
    setTimeout(() => this.connect(), this.retryMs);
    this.retryMs = Math.min(this.retryMs * 1.6, LAST_RETRY_MS);
  }
}
