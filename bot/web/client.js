/*
 * The visitor's side of WebSocket protocol 1, documented in docs/protocol.md. Knows no DOM. A question is sent until it
 * is acknowledged, under one id; after a cut the conversation goes on from the last event seen.
 */

import { applyFrame, emptyTranscript, unansweredTurn } from "./frames.js";

export const PROTOCOL = 1;
export const SUBPROTOCOL = "zhanggui.v1";

const ACK_WITHIN_MS = 15_000;
const REPLY_AFTER_RESUME_MS = 10_000; // no partial, event or failure by then: the reply was lost
const TYPING_EVERY_MS = 4_000;
const TYPING_FOR_MS = 9_000; // an agent who vanishes while typing must not type for ever
const STORED_ASKS = 5;
const PING_EVERY_MS = 25_000;
const PONG_WITHIN_MS = 8_000;
const WELCOME_WITHIN_MS = 12_000;
const BACKOFF_FIRST_MS = 500;
const BACKOFF_MOST_MS = 30_000;
const RESTART_TRIES = 4; // a restart that takes more is an outage

/** Delay before try `attempt` (0, 1, 2 …): doubles up to half a minute, half of it random. */
export function backoffMs(attempt, random = Math.random) {
  const most = Math.min(BACKOFF_MOST_MS, BACKOFF_FIRST_MS * 2 ** Math.min(attempt, 10));
  return Math.round(most / 2 + (random() * most) / 2);
}

export class Connection {
  state = "idle"; // "connecting" | "online" | "offline"
  restarting = false; // the server said so, and is not back yet
  attempt = 0;

  #o;
  #socket = null;
  #welcomed = false;
  #wanted = false;
  #holdMs = null; // the server asked to wait this long
  #timers = new Map();
  #unhook = () => {};

  /** The owner's onframe(frame) calls `welcomed`; onchange() is of `state` and `restarting`; isFinal(close code): stay away. */
  constructor({ random = Math.random, isFinal = () => false, ...owner }) {
    this.#o = { random, isFinal, ...owner };
  }

  get ready() {
    return this.#welcomed;
  }

  start() {
    if (this.#wanted) return;
    this.#wanted = true;
    this.#hook();
    this.reopen();
  }

  stop() {
    this.#wanted = false;
    this.#unhook();
    this.#drop();
    this.#timers.forEach((id) => clearTimeout(id));
    this.#timers.clear();
    this.#become("idle");
  }

  reopen() {
    this.#drop();
    this.#become(this.attempt > 1 ? "offline" : "connecting");
    let socket;
    try {
      socket = this.#o.makeSocket();
    } catch {
      this.later(); // a page whose CSP forbids the address throws here
      return;
    }
    this.#socket = socket;
    this.after("welcome", WELCOME_WITHIN_MS, () => this.#lost(socket));
    socket.onopen = () => this.#o.onopen();
    socket.onmessage = (message) => {
      if (socket === this.#socket) this.#receive(message.data);
    };
    socket.onclose = (event) => this.#lost(socket, event?.code);
    socket.onerror = () => {}; // `close` follows
  }

  welcomed() {
    this.cancel("welcome");
    this.attempt = 0;
    this.#welcomed = true;
    const restarted = this.restarting;
    this.restarting = false;
    this.#become("online", restarted);
    this.after("ping", PING_EVERY_MS, () => this.#ping());
  }

  /** Take the connection for dead. */
  lost() {
    if (this.#socket) this.#lost(this.#socket);
  }

  later() {
    this.#drop();
    const delay = this.#holdMs ?? backoffMs(this.attempt, this.#o.random);
    this.#holdMs = null;
    this.attempt += 1;
    if (this.attempt > RESTART_TRIES) this.restarting = false;
    const cut = this.attempt > 1 && !this.restarting;
    this.#become(cut || globalThis.navigator?.onLine === false ? "offline" : "connecting");
    this.after("reconnect", delay, () => this.reopen());
  }

  hold(ms) {
    this.#holdMs = Math.max(ms, backoffMs(this.attempt, this.#o.random));
  }

  send(frame) {
    try {
      this.#socket.send(JSON.stringify(frame));
    } catch {
      // closed in between: what must not be lost is sent again
    }
  }

  /** Run `action` in `ms`, unless `name` is cancelled or set again before. */
  after(name, ms, action) {
    this.cancel(name);
    this.#timers.set(
      name,
      setTimeout(() => {
        this.#timers.delete(name);
        action();
      }, ms),
    );
  }

  afterFirst(name, ms, action) {
    if (!this.#timers.has(name)) this.after(name, ms, action);
  }

  cancel(name) {
    clearTimeout(this.#timers.get(name));
    this.#timers.delete(name);
  }

  #receive(text) {
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return; // not ours
    }
    if (frame === null || typeof frame !== "object") return;
    this.cancel("pong"); // any frame shows that the connection lives
    if (frame.type === "reconnect") {
      this.#holdMs = Number(frame.after_ms) || 0;
      this.restarting = true;
      this.#o.onchange();
    }
    this.#o.onframe(frame);
  }

  #lost(socket, code) {
    if (socket !== this.#socket) return;
    this.#drop();
    if (!this.#wanted) return;
    if (this.#o.isFinal(code)) this.stop();
    else this.later();
  }

  #drop() {
    const socket = this.#socket;
    this.#socket = null;
    this.#welcomed = false;
    for (const name of ["welcome", "ping", "pong", "ack", "reply", "reconnect"]) this.cancel(name);
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = socket.onerror = null;
    try {
      socket.close(1000);
    } catch {
      // not open yet
    }
  }

  /** The network or the person is back: try now, or find out whether the socket lives. */
  #wake() {
    if (!this.#socket) {
      this.attempt = 0;
      this.reopen();
    } else if (this.#welcomed) this.#ping();
  }

  #ping() {
    const socket = this.#socket;
    this.send({ type: "ping" });
    this.afterFirst("pong", PONG_WITHIN_MS, () => this.#lost(socket));
    this.after("ping", PING_EVERY_MS, () => this.#ping());
  }

  #hook() {
    const page = globalThis.document;
    const wake = () => this.#wake();
    const visible = () => {
      if (page.visibilityState === "visible") this.#wake();
    };
    const offline = () => {
      if (this.#welcomed) this.#ping(); // a laptop with two networks may still be connected
    };
    const hooks = [
      [globalThis, "online", wake],
      [globalThis, "pageshow", (event) => event.persisted && wake()],
      [globalThis, "offline", offline],
      [page, "visibilitychange", visible],
    ];
    for (const [target, name, listener] of hooks) target?.addEventListener?.(name, listener);
    this.#unhook = () => {
      for (const [target, name, listener] of hooks) target?.removeEventListener?.(name, listener);
    };
  }

  #become(state, always = false) {
    if (state === this.state && !always) return;
    this.state = state;
    this.#o.onchange();
  }
}

export function newId() {
  // randomUUID is missing on pages without TLS.
  if (globalThis.crypto?.randomUUID) return globalThis.crypto.randomUUID();
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** `values` for JSON.stringify on pages that give Array.prototype a toJSON. */
export function plainList(values) {
  return Object.defineProperty([...values], "toJSON", { value: undefined });
}

/** localStorage where the browser allows it, else this page's memory. */
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
        // memory has it
      }
    },
  };
}

/** Events: "transcript", "connection" (of `restarting` too), "frame" and "problem", a failure of no message (detail: the frame). */
export class ChatClient extends EventTarget {
  transcript = emptyTranscript();

  #url;
  #locale;
  #identity;
  #now;
  #store;
  #saved;
  #link;
  #outbox = []; // frames other than `ask` that wait for a connection
  #typing = { on: false, at: 0 };

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
    this.#now = now;
    this.#link = new Connection({
      random,
      makeSocket: () => makeSocket(url),
      onopen: () => this.#hello(),
      onframe: (frame) => this.#receive(frame),
      onchange: () => this.dispatchEvent(new CustomEvent("connection")),
    });
    this.#saved = store.load();
    for (const ask of this.#saved.asks ?? []) this.#apply({ type: "local.ask", ...ask });
  }

  get connection() {
    return this.#link.state;
  }

  get restarting() {
    return this.#link.restarting;
  }

  get seen() {
    return this.#saved.seen ?? 0;
  }

  markSeen() {
    if (this.transcript.lastSeq > this.seen) this.#save({ seen: this.transcript.lastSeq });
  }

  connect() {
    this.#link.start();
  }

  disconnect() {
    this.#link.stop();
  }

  /** Greeting and quick replies come in the locale of the hello: an untouched conversation says it again. */
  set locale(value) {
    if (value === this.#locale) return;
    this.#locale = value;
    if (this.#link.ready && this.transcript.items.length === 0 && this.transcript.pending.length === 0) this.#link.reopen();
  }

  /** Send a question; returns its id at once. `attachments` are what `attach` gave. */
  ask(text, { attachments } = {}) {
    return this.#ask({ id: newId(), text, at: this.#now().toISOString(), ...(attachments?.length ? { attachments } : {}) });
  }

  leaveMessage(email, text) {
    return this.#ask({ id: newId(), text, email, at: this.#now().toISOString() });
  }

  /** Send a failed question again: same id, unless the server has that id for another text. */
  retry(id) {
    const ask = this.transcript.pending.find((p) => p.id === id);
    if (!ask) return;
    const { failed, ...kept } = ask;
    this.#apply({ type: "local.drop", id });
    this.#ask({ ...kept, id: failed?.code === "conflict" ? newId() : id });
  }

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
    const now = this.#now().getTime();
    const fresh = now - this.#typing.at < TYPING_EVERY_MS;
    if (!this.#link.ready || (on === this.#typing.on && (fresh || !on))) return;
    this.#typing = { on, at: now };
    this.#link.send({ type: "typing", on });
  }

  /**
   * Upload a File for `ask`. `onprogress` gets 0 to 1. Resolves with {id, kind, mime, name, size_bytes, …}; an Error has `code` and `retryable`.
   */
  async attach(file, { onprogress, signal } = {}) {
    this.connect();
    await this.#untilReady(signal);
    const address = `${this.#attachments}?name=${encodeURIComponent(file.name ?? "file")}`;
    const { status, text } = await upload(address, this.#headers, file, onprogress, signal);
    let said = {};
    try {
      said = JSON.parse(text);
    } catch {
      // a proxy's own page
    }
    if (status === 201) return said;
    const code = said.error?.code ?? (status === 413 ? "too_long" : "internal");
    throw Object.assign(new Error(said.error?.message ?? `status ${status}`), {
      code,
      retryable: said.error?.retryable ?? (status === 0 || status >= 500),
    });
  }

  async attachmentBlob(id) {
    await this.#untilReady();
    const address = `${this.#attachments}/${encodeURIComponent(id)}`;
    const response = await fetch(address, { headers: this.#headers, credentials: "omit" });
    if (!response.ok) throw new Error(`attachment ${id}: status ${response.status}`);
    return response.blob();
  }

  startOver() {
    this.#forget();
    if (this.#link.state === "idle") this.connect();
    else this.#link.reopen();
  }

  #hello() {
    const { conversation, token } = this.#saved;
    this.#link.send({
      type: "hello",
      protocol: PROTOCOL,
      // No transcript outlives the page, so a new page asks for all of it (`after: 0`).
      ...(conversation ? { conversation, token, after: this.transcript.lastSeq } : {}),
      ...(this.#locale ? { locale: this.#locale } : {}),
      ...(this.#identity ? { identity: this.#identity } : {}),
    });
  }

  #receive(frame) {
    if (frame.type === "welcome") {
      this.#welcome(frame);
      return;
    }
    if (frame.type === "failed" && !frame.id && !frame.turn) {
      this.#problem(frame);
      return;
    }
    if (frame.type === "failed" && frame.code === "restarting") {
      this.#link.cancel("ack"); // not stored: it stays unsent, and the next welcome sends it
      return;
    }
    if (frame.turn || frame.type === "event") this.#link.cancel("reply");
    this.#apply(frame);
    if (frame.type === "ack" || frame.type === "event" || (frame.type === "failed" && frame.id)) this.#saveAsks();
    if (frame.type === "ack" && !this.#unacked().length) this.#link.cancel("ack");
    if (frame.type === "typing" && frame.on) {
      this.#link.after("typing", TYPING_FOR_MS, () => this.#apply({ type: "typing", role: "agent", on: false }));
    }
    this.dispatchEvent(new CustomEvent("frame", { detail: frame }));
  }

  #welcome(frame) {
    if (frame.conversation === this.transcript.conversation && frame.seq < this.transcript.lastSeq) {
      // The server knows less than we do: begin again with what it has.
      this.transcript = unsentOf(this.transcript);
      this.#link.reopen();
      return;
    }
    this.#apply(frame);
    this.#save({
      conversation: frame.conversation,
      token: frame.token ?? this.#saved.token,
      seen: frame.conversation === this.#saved.conversation ? this.seen : 0,
    });
    this.#link.welcomed();
    for (const ask of this.#unacked()) this.#sendAsk(ask);
    for (const queued of this.#outbox.splice(0)) this.#link.send(queued);
    this.#watchReply();
    this.dispatchEvent(new CustomEvent("frame", { detail: frame }));
  }

  #problem(frame) {
    if (frame.retry_after_s) this.#link.hold(frame.retry_after_s * 1000);
    if (frame.code === "bad_identity") this.#identity = undefined; // it goes on unsigned
    if (frame.code === "unknown_conversation" && !this.#link.ready) {
      // Forgotten by the server, or the secret is wrong: begin anew, keep unsent questions.
      this.#forget();
      if (this.#link.attempt > 2) this.#link.later();
      else {
        this.#link.attempt += 1;
        this.#link.reopen();
      }
      return;
    }
    this.dispatchEvent(new CustomEvent("problem", { detail: frame }));
  }

  /** After a resume, a reply that neither goes on nor ends was lost with the server. */
  #watchReply() {
    this.#link.after("reply", REPLY_AFTER_RESUME_MS, () => {
      const lost = Object.values(this.transcript.live).filter((reply) => !reply.failed).map((reply) => reply.turn);
      const unanswered = unansweredTurn(this.transcript);
      if (unanswered) lost.push(unanswered);
      for (const turn of lost) this.#apply({ type: "failed", turn, code: "interrupted", retryable: true });
    });
  }

  #ask(ask) {
    this.#typing.on = false; // the server takes a question for the end of typing
    this.#apply({ type: "local.ask", ...ask });
    this.#saveAsks();
    this.connect();
    this.#sendAsk(ask);
    return ask.id;
  }

  #sendAsk({ id, text, email, attachments }) {
    if (!this.#link.ready) return; // `welcome` sends whatever is not acknowledged
    if (email) this.#link.send({ type: "leave_message", id, email, text });
    else {
      const ids = attachments?.length ? { attachments: plainList(attachments.map((attachment) => attachment.id)) } : {};
      this.#link.send({ type: "ask", id, text, ...ids });
    }
    this.#link.afterFirst("ack", ACK_WITHIN_MS, () => this.#link.lost());
  }

  #send(frame) {
    if (this.#link.ready) this.#link.send(frame);
    else this.#outbox.push(frame);
  }

  get #headers() {
    const identity = this.#identity;
    return { Authorization: `Bearer ${this.#saved.token}`, ...(identity ? { "X-Zhanggui-Identity": identity } : {}) };
  }

  get #attachments() {
    const base = new URL(".", this.#url).href.replace(/^ws/, "http");
    return `${base}v1/conversations/${encodeURIComponent(this.#saved.conversation)}/attachments`;
  }

  #untilReady(signal) {
    return new Promise((resolve, reject) => {
      const look = () => {
        if (!this.#link.ready && !signal?.aborted) return;
        this.removeEventListener("connection", look);
        if (signal?.aborted) reject(signal.reason);
        else resolve();
      };
      this.addEventListener("connection", look);
      signal?.addEventListener("abort", look);
      look();
    });
  }

  #unacked() {
    return this.transcript.pending.filter((p) => p.seq === undefined && !p.failed);
  }

  #apply(frame) {
    const next = applyFrame(this.transcript, frame);
    if (next === this.transcript) return;
    this.transcript = next;
    this.dispatchEvent(new CustomEvent("transcript"));
  }

  #save(change) {
    this.#saved = { ...this.#saved, ...change };
    this.#store.save(this.#saved);
  }

  #saveAsks() {
    const asks = this.#unacked().slice(-STORED_ASKS).map(({ id, text, at, email, attachments }) => ({
      id,
      text,
      at,
      ...(email ? { email } : {}),
      ...(attachments ? { attachments: plainList(attachments) } : {}),
    }));
    if (asks.length || this.#saved.asks?.length) this.#save({ asks: plainList(asks) });
  }

  #forget() {
    this.#saved = {};
    this.#store.save(this.#saved);
    this.#outbox = [];
    this.transcript = unsentOf(this.transcript);
    this.dispatchEvent(new CustomEvent("transcript"));
  }
}

/** What was not stored, without its files: they belong to the conversation that is gone. */
function unsentOf(transcript) {
  const pending = transcript.pending.filter((p) => p.seq === undefined);
  return { ...emptyTranscript(), pending: pending.map(({ attachments: _gone, ...ask }) => ask).filter((ask) => ask.text) };
}

/** POST `file`, resolve with {status, text}. fetch cannot tell how much was sent. */
function upload(address, who, file, onprogress, signal) {
  const headers = { ...who, "Content-Type": "application/octet-stream" };
  if (!globalThis.XMLHttpRequest) {
    const options = { method: "POST", headers, body: file, credentials: "omit", signal };
    return fetch(address, options).then(async (response) => ({ status: response.status, text: await response.text() }));
  }
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onprogress?.(event.loaded / event.total);
    request.onload = () => resolve({ status: request.status, text: request.responseText });
    request.onerror = () => resolve({ status: 0, text: "" });
    request.onabort = () => reject(signal.reason);
    signal?.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}
