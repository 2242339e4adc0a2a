/*
 * The visitor's side of WebSocket protocol 1. Owns the socket, the timers and what is stored in the browser;
 * knows nothing of the DOM. What frames mean is in frames.js.
 *
 * Promises: a question is sent until it is acknowledged, always under the same id (the server de-duplicates);
 * after a cut the conversation goes on from the last event seen; nothing is shown twice.
 */

import { applyFrame, emptyTranscript, unansweredTurn } from "./frames.js";

export const PROTOCOL = 1;
export const SUBPROTOCOL = "zhanggui.v1";

const PING_EVERY_MS = 25_000;
const PONG_WITHIN_MS = 8_000;
const WELCOME_WITHIN_MS = 12_000;
const ACK_WITHIN_MS = 15_000;
const REPLY_AFTER_RESUME_MS = 10_000; // no partial, event or failure by then: the reply was lost
const BACKOFF_FIRST_MS = 500;
const BACKOFF_MOST_MS = 30_000;
const STORED_ASKS = 5;

/** Delay before try `attempt` (0, 1, 2 …): doubles up to half a minute, half of it random (no thundering herd). */
export function backoffMs(attempt, random = Math.random) {
  const most = Math.min(BACKOFF_MOST_MS, BACKOFF_FIRST_MS * 2 ** Math.min(attempt, 10));
  return Math.round(most / 2 + (random() * most) / 2);
}

/** localStorage where the browser allows it, else this page's memory (private windows, blocked cookies). */
export function browserStore(key) {
  let memory = null;
  return {
    load() {
      try {
        return JSON.parse(globalThis.localStorage.getItem(key)) ?? memory ?? {};
      } catch {
        return memory ?? {};
      }
    },
    save(value) {
      memory = value;
      try {
        globalThis.localStorage.setItem(key, JSON.stringify(value));
      } catch {
        // full or forbidden: memory has it
      }
    },
  };
}

/**
 * Events: "transcript" after every change, "connection" when `connection` changes, "frame" for every frame
 * (detail is the frame), "problem" for a failure that belongs to no message.
 */
export class ChatClient extends EventTarget {
  transcript = emptyTranscript();
  /** "idle" | "connecting" | "online" | "offline" */
  connection = "idle";

  #url;
  #locale;
  #identity;
  #make;
  #random;
  #now;
  #store;
  #saved;
  #socket = null;
  #welcomed = false;
  #wanted = false;
  #attempt = 0;
  #holdMs = 0; // the server asked to wait this long
  #timers = new Map();
  #outbox = []; // frames other than `ask` that wait for a connection
  #unhook = () => {};
  #lastTyping = false;

  constructor({
    url,
    locale,
    identity,
    store = browserStore(`zhanggui ${url}`),
    makeSocket = (address) => new WebSocket(address, SUBPROTOCOL),
    random = Math.random,
    now = () => new Date(),
  }) {
    super();
    this.#url = url;
    this.#locale = locale;
    this.#identity = identity;
    this.#store = store;
    this.#make = makeSocket;
    this.#random = random;
    this.#now = now;
    this.#saved = store.load();
    for (const ask of this.#saved.asks ?? []) this.#apply({ type: "local.ask", ...ask });
  }

  /** Whether this browser has talked to this server before. */
  get known() {
    return Boolean(this.#saved.conversation);
  }

  /** Last `seq` the visitor has read, for the unread badge. */
  get seen() {
    return this.#saved.seen ?? 0;
  }

  markSeen() {
    if (this.transcript.lastSeq > this.seen) this.#save({ seen: this.transcript.lastSeq });
  }

  connect() {
    if (this.#wanted) return;
    this.#wanted = true;
    this.#hook();
    this.#open();
  }

  disconnect() {
    this.#wanted = false;
    this.#unhook();
    this.#drop();
    this.#timers.forEach((id) => clearTimeout(id));
    this.#timers.clear();
    this.#become("idle");
  }

  /** Greeting and quick replies come in the locale of the hello, so an untouched conversation says hello again. */
  set locale(value) {
    if (value === this.#locale) return;
    this.#locale = value;
    if (this.#welcomed && this.transcript.items.length === 0 && this.transcript.pending.length === 0) {
      this.#drop();
      this.#open();
    }
  }

  /** Send a question; returns its id at once. It stays in the transcript as unsent until it is acknowledged. */
  ask(text) {
    const ask = { id: newId(), text, at: this.#now().toISOString() };
    this.#lastTyping = false;
    this.#apply({ type: "local.ask", ...ask });
    this.#saveAsks();
    this.connect();
    this.#sendAsk(ask);
    return ask.id;
  }

  /** Send a failed question again: same id, unless the server has that id for another text. */
  retry(id) {
    const ask = this.transcript.pending.find((p) => p.id === id);
    if (!ask) return;
    this.#apply({ type: "local.drop", id });
    const again = { id: ask.failed?.code === "conflict" ? newId() : id, text: ask.text, at: ask.at };
    this.#apply({ type: "local.ask", ...again });
    this.#saveAsks();
    this.#sendAsk(again);
  }

  /** Forget a question that was not stored. */
  discard(id) {
    this.#apply({ type: "local.drop", id });
    this.#saveAsks();
  }

  stop(turn) {
    this.#apply({ type: "local.stop", turn });
    this.#send({ type: "stop", turn });
  }

  regenerate(turn) {
    this.#apply({ type: "local.regenerate", turn });
    this.#send({ type: "regenerate", turn });
    this.#watchReply();
  }

  rate(seq, value, comment) {
    this.#apply({ type: "local.rate", seq, value });
    this.#send({ type: "rate", seq, value, ...(comment ? { comment } : {}) });
  }

  handoff(reason) {
    this.connect();
    this.#send({ type: "handoff", ...(reason ? { reason } : {}) });
  }

  close(score, comment) {
    this.#send({ type: "close", ...(score ? { score } : {}), ...(comment ? { comment } : {}) });
  }

  /** Tell an agent that the visitor types. Never queued: stale news. */
  typing(on) {
    if (!this.#welcomed || on === this.#lastTyping) return;
    this.#lastTyping = on;
    this.#write({ type: "typing", on });
  }

  /** Leave this conversation and begin a new one. */
  startOver() {
    this.#forget();
    this.#drop();
    if (this.#wanted) this.#open();
    else this.connect();
  }

  // ------------------------------------------------------------------ socket

  #open() {
    this.#cancel("reconnect");
    this.#become(this.#attempt > 1 ? "offline" : "connecting");
    let socket;
    try {
      socket = this.#make(this.#url);
    } catch {
      this.#retryLater(); // a host page whose CSP forbids the address throws here
      return;
    }
    this.#socket = socket;
    this.#welcomed = false;
    this.#after("welcome", WELCOME_WITHIN_MS, () => this.#lost(socket));
    socket.onopen = () => this.#hello();
    socket.onmessage = (message) => {
      if (socket === this.#socket) this.#receive(message.data);
    };
    socket.onclose = () => this.#lost(socket);
    socket.onerror = () => {}; // `close` follows
  }

  #hello() {
    const { conversation, token } = this.#saved;
    this.#write({
      type: "hello",
      protocol: PROTOCOL,
      // No transcript outlives the page, so a new page asks for all of it (`after: 0`).
      ...(conversation ? { conversation, token, after: this.transcript.lastSeq } : {}),
      ...(this.#locale ? { locale: this.#locale } : {}),
      ...(this.#identity ? { identity: this.#identity } : {}),
    });
  }

  #lost(socket) {
    if (socket !== this.#socket) return;
    this.#drop();
    if (this.#wanted) this.#retryLater();
  }

  #drop() {
    const socket = this.#socket;
    this.#socket = null;
    this.#welcomed = false;
    for (const name of ["welcome", "ping", "pong", "ack", "reply", "reconnect"]) this.#cancel(name);
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = socket.onerror = null;
    try {
      socket.close(1000);
    } catch {
      // not open yet
    }
  }

  #retryLater() {
    const delay = Math.max(this.#holdMs, backoffMs(this.#attempt, this.#random));
    this.#holdMs = 0;
    this.#attempt += 1;
    this.#become(this.#attempt > 1 || globalThis.navigator?.onLine === false ? "offline" : "connecting");
    this.#after("reconnect", delay, () => this.#open());
  }

  /** The network is back, or the visitor is: try now, or find out whether the open socket still lives. */
  #wake() {
    if (!this.#wanted) return;
    if (!this.#socket) {
      this.#attempt = 0;
      this.#open();
    } else if (this.#welcomed) this.#ping();
  }

  #ping() {
    const socket = this.#socket;
    this.#write({ type: "ping" });
    if (!this.#timers.has("pong")) this.#after("pong", PONG_WITHIN_MS, () => this.#lost(socket));
    this.#after("ping", PING_EVERY_MS, () => this.#ping());
  }

  #hook() {
    const wake = () => this.#wake();
    const visible = () => {
      if (globalThis.document.visibilityState === "visible") this.#wake();
    };
    const offline = () => {
      if (this.#socket) this.#ping(); // a laptop with two networks may still be connected
    };
    globalThis.addEventListener?.("online", wake);
    globalThis.addEventListener?.("offline", offline);
    globalThis.document?.addEventListener("visibilitychange", visible);
    this.#unhook = () => {
      globalThis.removeEventListener?.("online", wake);
      globalThis.removeEventListener?.("offline", offline);
      globalThis.document?.removeEventListener("visibilitychange", visible);
    };
  }

  // ------------------------------------------------------------------ frames

  #receive(text) {
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return; // not ours to understand
    }
    if (frame === null || typeof frame !== "object") return;
    this.#cancel("pong"); // any frame shows that the connection lives

    if (frame.type === "welcome") {
      this.#welcome(frame);
      return;
    }
    if (frame.type === "failed" && !frame.id && !frame.turn) {
      this.#problem(frame);
      return;
    }
    if (frame.turn || frame.type === "event") this.#cancel("reply");
    this.#apply(frame);
    if (frame.type === "ack" || frame.type === "event" || (frame.type === "failed" && frame.id)) this.#saveAsks();
    if (frame.type === "ack" && !this.#unacked().length) this.#cancel("ack");
    this.dispatchEvent(new CustomEvent("frame", { detail: frame }));
  }

  #welcome(frame) {
    this.#cancel("welcome");
    if (frame.conversation === this.transcript.conversation && frame.seq < this.transcript.lastSeq) {
      // The server knows less than we do. Show what it has: say hello again, from the start.
      this.transcript = { ...emptyTranscript(), pending: this.transcript.pending.filter((p) => p.seq === undefined) };
      this.#drop();
      this.#open();
      return;
    }
    this.#apply(frame);
    this.#save({
      conversation: frame.conversation,
      token: frame.token ?? this.#saved.token,
      seen: frame.conversation === this.#saved.conversation ? this.seen : 0,
    });
    this.#attempt = 0;
    this.#welcomed = true;
    this.#become("online");
    this.#after("ping", PING_EVERY_MS, () => this.#ping());
    for (const ask of this.#unacked()) this.#sendAsk(ask);
    for (const queued of this.#outbox.splice(0)) this.#write(queued);
    this.#watchReply();
    this.dispatchEvent(new CustomEvent("frame", { detail: frame }));
  }

  /** A failure that belongs to no message. */
  #problem(frame) {
    if (frame.retry_after_s) this.#holdMs = frame.retry_after_s * 1000;
    if (frame.code === "unknown_conversation" && !this.#welcomed) {
      // The server does not know us any more (or the secret is wrong): begin anew, keep unsent questions.
      this.#forget();
      this.#drop();
      if (this.#attempt > 2) this.#retryLater();
      else {
        this.#attempt += 1;
        this.#open();
      }
      return;
    }
    this.dispatchEvent(new CustomEvent("problem", { detail: frame }));
  }

  /** After a resume: a reply that neither goes on nor ends was lost with the server; say so and offer another try. */
  #watchReply() {
    this.#after("reply", REPLY_AFTER_RESUME_MS, () => {
      const lost = Object.values(this.transcript.live).filter((reply) => !reply.failed).map((reply) => reply.turn);
      const unanswered = unansweredTurn(this.transcript);
      if (unanswered) lost.push(unanswered);
      for (const turn of lost) this.#apply({ type: "failed", turn, code: "interrupted", retryable: true });
    });
  }

  #sendAsk({ id, text }) {
    if (!this.#welcomed) return; // `welcome` sends whatever is not acknowledged
    this.#write({ type: "ask", id, text });
    const socket = this.#socket;
    if (!this.#timers.has("ack")) this.#after("ack", ACK_WITHIN_MS, () => this.#lost(socket));
  }

  #send(frame) {
    if (this.#welcomed) this.#write(frame);
    else this.#outbox.push(frame);
  }

  #write(frame) {
    try {
      this.#socket.send(JSON.stringify(frame));
    } catch {
      // closed in between: `close` follows, and what must not be lost is sent again
    }
  }

  // ------------------------------------------------------------------ state

  #unacked() {
    return this.transcript.pending.filter((p) => p.seq === undefined && !p.failed);
  }

  #apply(frame) {
    const next = applyFrame(this.transcript, frame);
    if (next === this.transcript) return;
    this.transcript = next;
    this.dispatchEvent(new CustomEvent("transcript"));
  }

  #become(connection) {
    if (connection === this.connection) return;
    this.connection = connection;
    this.dispatchEvent(new CustomEvent("connection"));
  }

  #save(change) {
    this.#saved = { ...this.#saved, ...change };
    this.#store.save(this.#saved);
  }

  #saveAsks() {
    const asks = this.#unacked().slice(-STORED_ASKS).map(({ id, text, at }) => ({ id, text, at }));
    if (asks.length || this.#saved.asks?.length) this.#save({ asks });
  }

  #forget() {
    this.#saved = {};
    this.#store.save(this.#saved);
    this.#outbox = [];
    this.transcript = { ...emptyTranscript(), pending: this.transcript.pending.filter((p) => p.seq === undefined) };
    this.dispatchEvent(new CustomEvent("transcript"));
  }

  #after(name, ms, action) {
    this.#cancel(name);
    this.#timers.set(
      name,
      setTimeout(() => {
        this.#timers.delete(name);
        action();
      }, ms),
    );
  }

  #cancel(name) {
    clearTimeout(this.#timers.get(name));
    this.#timers.delete(name);
  }
}

function newId() {
  // randomUUID is missing on pages without TLS.
  if (globalThis.crypto?.randomUUID) return globalThis.crypto.randomUUID();
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
