/*
 * The agent's side of the inbox: REST and the agent WebSocket (docs/inbox.md), and what is known of queues and
 * conversations. Owns the session and what waits to be sent; knows nothing of the DOM.
 *
 * Promises: a reply or a note is sent until it is acknowledged, always under the same id, also over a reload; after
 * a cut each open conversation goes on from the last event seen.
 */

import { Connection, newId, plainList } from "./client.js";
import { applyFrame, emptyTranscript } from "./frames.js";

const ACK_WITHIN_MS = 15_000;
const ACTION_WITHIN_MS = 15_000;
const TYPING_EVERY_MS = 3_000;
const TYPING_FOR_MS = 9_000;
const SIGNED_OUT = 4401;
const BAD_FRAMES = 1008;
const KEPT = "zhanggui inbox unsent";

/** A request that was refused: `code` is the server's, or "offline". */
export class Refused extends Error {
  constructor(code, more = {}) {
    super(code);
    Object.assign(this, { code, ...more });
  }
}

/**
 * Events: "change" after anything changed, "event" for each new event of an open conversation (detail {conversation,
 * frame, isNews}), "card" for a new or changed card (detail {card, before}), "signedout".
 */
export class Desk extends EventTarget {
  agent = null;
  agents = [];
  cards = new Map(); // id -> card
  left = new Map(); // id -> message that was left
  drafts = new Map(); // id -> FAQ draft
  canned = [];
  store = null;
  hours = null;
  limits = {};
  hasEngine = false;
  /** id -> {transcript, summary, typing, replayUpTo} of the conversations that are followed */
  open = new Map();
  /** Replies and notes that are not stored yet: {id, type, conversation, text, at, failed?} */
  pending = [];

  #csrf = "";
  #link;
  #asked = new Map(); // id -> {resolve, reject, timer} of an action
  #typing = { conversation: null, at: 0 };

  constructor({ url = new URL("ws/agent", document.baseURI).href.replace(/^http/, "ws") } = {}) {
    super();
    try {
      this.pending = JSON.parse(sessionStorage.getItem(KEPT)) ?? [];
    } catch {
      // blocked, or nothing kept
    }
    this.#link = new Connection({
      makeSocket: () => new WebSocket(url, "zhanggui.agent.v1"),
      onopen: () => this.#link.send({ type: "hello", protocol: 1 }),
      onframe: (frame) => this.#receive(frame),
      onchange: () => this.#changed(),
      isFinal: (code) => {
        if (code === SIGNED_OUT) this.#signedOut();
        return code === SIGNED_OUT || code === BAD_FRAMES;
      },
    });
  }

  get connection() {
    return this.#link.state;
  }

  get restarting() {
    return this.#link.restarting;
  }

  get isMerchant() {
    return this.agent?.role === "merchant";
  }

  // ------------------------------------------------------------------ session

  /** Return whether somebody is signed in here; then the socket opens. */
  async resume() {
    try {
      this.#signedIn(await this.api("GET", "session"));
      return true;
    } catch (error) {
      if (error.code === "unauthorized") return false;
      throw error;
    }
  }

  async signIn(login, password) {
    this.#signedIn(await this.api("POST", "session", { login, password }));
  }

  async signOut() {
    await this.api("DELETE", "session");
    this.#signedOut();
  }

  #signedIn({ agent, csrf }) {
    this.agent = agent;
    this.#csrf = csrf;
    this.#link.start();
    this.reload();
  }

  #signedOut() {
    if (!this.agent) return;
    this.agent = null;
    this.pending = []; // the next one to sign in here is somebody else
    this.#keep();
    this.#link.stop();
    this.cards.clear();
    this.open.clear();
    this.left.clear();
    this.drafts.clear();
    this.dispatchEvent(new CustomEvent("signedout"));
  }

  /**
   * One request to /api/PATH. Returns the parsed answer, null where it has none.
   *
   * @throws {Refused} with the server's code; "offline" where there was no answer
   */
  async api(method, path, body = method === "POST" || method === "PUT" ? {} : undefined) {
    let response;
    try {
      response = await fetch(new URL(`api/${path}`, document.baseURI), {
        method,
        credentials: "same-origin",
        headers: { ...(body ? { "Content-Type": "application/json" } : {}), ...(method === "GET" ? {} : { "X-CSRF-Token": this.#csrf }) },
        body: body && JSON.stringify(body),
      });
    } catch {
      throw new Refused("offline");
    }
    const said = await response.json().catch(() => null);
    if (response.ok) return said;
    const code = said?.error?.code ?? "internal";
    if (code === "unauthorized" && path !== "session") this.#signedOut();
    throw new Refused(code, { field: said?.error?.field, retryAfter: Number(response.headers.get("Retry-After")) || 0 });
  }

  /** Read again what comes by REST only: canned replies and drafts. */
  async reload() {
    const [canned, drafts] = await Promise.allSettled([this.api("GET", "canned"), this.api("GET", "drafts?status=pending")]);
    if (canned.value) this.canned = canned.value.canned;
    if (drafts.value) this.drafts = new Map(drafts.value.drafts.map((draft) => [draft.id, draft]));
    this.#changed();
  }

  // ------------------------------------------------------------------ conversations

  /** Follow a conversation: its events come until `leave`. */
  follow(id) {
    if (this.open.has(id)) return;
    this.open.set(id, { transcript: emptyTranscript(), summary: null, typing: false, replayUpTo: null });
    this.#openOn(id);
  }

  leave(id) {
    if (!this.open.delete(id)) return;
    if (this.#link.ready) this.#link.send({ type: "leave", conversation: id });
  }

  #openOn(id) {
    const { transcript } = this.open.get(id);
    if (this.#link.ready) this.#link.send({ type: "open", conversation: id, ...(transcript.lastSeq ? { after: transcript.lastSeq } : {}) });
  }

  /** Send a reply ("say") or a note; it is shown as unsent until it is stored. */
  write(type, conversation, text) {
    const entry = { id: newId(), type, conversation, text, at: new Date().toISOString() };
    this.pending.push(entry);
    this.#keep();
    this.#typing.conversation = null;
    this.#sendEntry(entry);
  }

  retry(id) {
    const entry = this.pending.find((each) => each.id === id);
    if (!entry) return;
    delete entry.failed;
    this.#sendEntry(entry);
    this.#keep();
  }

  discard(id) {
    this.pending = this.pending.filter((entry) => entry.id !== id);
    this.#keep();
  }

  #sendEntry({ id, type, conversation, text }) {
    if (!this.#link.ready) return;
    this.#link.send({ type, id, conversation, text });
    this.#link.afterFirst("ack", ACK_WITHIN_MS, () => this.#link.lost());
  }

  #keep() {
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(plainList(this.pending)));
    } catch {
      // blocked or full: this page has them
    }
    this.#changed();
  }

  /** Tell the visitor that somebody writes; again every few seconds, since it wears off. */
  typing(conversation, on) {
    const now = Date.now();
    const same = this.#typing.conversation === conversation;
    if (!this.#link.ready || (on ? same && now - this.#typing.at < TYPING_EVERY_MS : !same)) return;
    this.#typing = { conversation: on ? conversation : null, at: now };
    this.#link.send({ type: "typing", conversation, on });
  }

  presence(status) {
    this.#link.send({ type: "presence", status });
  }

  /**
   * accept, take_over, transfer, return, close, suggest, summarize; resolves with the frame that answers.
   *
   * @throws {Refused}
   */
  act(type, conversation, more = {}) {
    if (!this.#link.ready) return Promise.reject(new Refused("offline"));
    const id = newId();
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => this.#settle(id, (asked) => asked.reject(new Refused("offline"))), ACTION_WITHIN_MS * (type === "suggest" || type === "summarize" ? 4 : 1));
      this.#asked.set(id, { resolve, reject, timer });
      this.#link.send({ type, conversation, id, ...more });
    });
  }

  #settle(id, how) {
    const asked = this.#asked.get(id);
    if (!asked) return false;
    clearTimeout(asked.timer);
    this.#asked.delete(id);
    how(asked);
    return true;
  }

  // ------------------------------------------------------------------ frames

  #receive(frame) {
    const view = this.open.get(typeof frame.conversation === "string" ? frame.conversation : frame.conversation?.id);
    switch (frame.type) {
      case "welcome":
        this.#welcome(frame);
        break;
      case "card":
        this.#card(frame.conversation);
        break;
      case "agents":
        this.agents = frame.agents;
        break;
      case "left":
        this.left.set(frame.message.id, frame.message);
        break;
      case "draft":
        this.drafts.set(frame.draft.id, frame.draft);
        break;
      case "opened":
        this.#card(frame.conversation);
        if (!view) break;
        view.replayUpTo ??= frame.seq; // what was there before is no news
        view.summary = frame.summary ?? view.summary;
        if (frame.seq < view.transcript.lastSeq) {
          view.transcript = emptyTranscript(); // the server knows less than we do: read what it has
          this.#openOn(frame.conversation.id);
        }
        break;
      case "event":
        this.#settleEntry(frame.client_id);
        if (!view) break;
        this.#event(view, frame);
        return;
      case "status":
      case "delta":
      case "partial":
        if (view) view.transcript = applyFrame(view.transcript, frame);
        break;
      case "typing":
        if (view && frame.role === "visitor") this.#visitorTypes(view, frame);
        break;
      case "ack":
        this.#settleEntry(frame.id);
        break;
      case "done":
      case "suggestion":
        this.#settle(frame.id, (asked) => asked.resolve(frame));
        break;
      case "summary":
        if (view) view.summary = frame.summary;
        this.#settle(frame.id, (asked) => asked.resolve(frame));
        break;
      case "failed":
        this.#failed(frame, view);
        break;
      default:
        return; // pong, and what a newer server says
    }
    this.#changed();
  }

  #welcome(frame) {
    this.agent = { ...this.agent, ...frame.agent };
    this.agents = frame.agents;
    this.store = frame.store;
    this.hours = frame.hours;
    this.limits = frame.limits;
    this.hasEngine = Boolean(frame.has_engine);
    this.cards = new Map(frame.conversations.map((card) => [card.id, card]));
    this.left = new Map(frame.left.map((message) => [message.id, message]));
    this.#link.welcomed();
    for (const id of this.open.keys()) this.#openOn(id);
    for (const entry of this.pending) if (!entry.failed) this.#sendEntry(entry);
  }

  #card(card) {
    const before = this.cards.get(card.id);
    this.cards.set(card.id, card);
    const view = this.open.get(card.id);
    if (view) view.transcript = { ...view.transcript, state: card.state };
    this.dispatchEvent(new CustomEvent("card", { detail: { card, before } }));
  }

  #event(view, frame) {
    if (frame.kind === "message" && frame.role === "visitor") view.typing = false;
    const next = applyFrame(view.transcript, frame);
    if (next === view.transcript) return;
    view.transcript = next;
    this.dispatchEvent(new CustomEvent("event", { detail: { conversation: frame.conversation, frame, isNews: frame.seq > (view.replayUpTo ?? 0) } }));
    this.#changed();
  }

  #visitorTypes(view, frame) {
    view.typing = Boolean(frame.on);
    const name = `typing ${frame.conversation}`;
    this.#link.cancel(name);
    if (!frame.on) return;
    this.#link.after(name, TYPING_FOR_MS, () => {
      view.typing = false;
      this.#changed();
    });
  }

  /** A reply or a note is stored. */
  #settleEntry(id) {
    if (!id || !this.pending.some((entry) => entry.id === id)) return;
    this.pending = this.pending.filter((entry) => entry.id !== id);
    if (!this.pending.some((entry) => !entry.failed)) this.#link.cancel("ack");
    this.#keep();
  }

  #failed(frame, view) {
    const entry = this.pending.find((each) => each.id === frame.id);
    if (entry) {
      if (frame.code === "restarting") return; // the next welcome sends it
      entry.failed = frame.code;
      this.#keep();
    } else if (!this.#settle(frame.id, (asked) => asked.reject(new Refused(frame.code, { owner: frame.owner })))) {
      if (frame.retry_after_s) this.#link.hold(frame.retry_after_s * 1000);
      if (view && frame.turn) view.transcript = applyFrame(view.transcript, frame);
      else if (view && frame.code === "unknown_conversation") this.open.delete(frame.conversation);
    }
  }

  #changed() {
    this.dispatchEvent(new CustomEvent("change"));
  }
}
