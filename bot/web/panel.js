/*
 * The open chat: header, transcript, composer. Loaded at the first click. Owns the DOM inside the shadow root;
 * the conversation is client.js's, what to show is `rowsOf` of frames.js, and text becomes nodes in dom.js.
 *
 * Rows are keyed and kept: while a reply streams only its last block is made anew, so a selection, a focused
 * button or an open quote elsewhere stays. Screen readers hear a finished reply once, through a live region of
 * its own; the transcript itself is silent.
 */

import { ChatClient } from "./client.js";
import { blockNode, h, icon, setText } from "./dom.js";
import { rowsOf, writingTurn } from "./frames.js";
import { inLanguage, TAGS } from "./language.js";
import { linkTo, parseMarkdown, plainText } from "./markdown.js";
import { readiness } from "./readiness.js";
import { STRINGS } from "./strings.js";
import { panelSheet } from "./styles.js";

const TEXT_CHARS = 2000; // until `welcome` says otherwise
const COUNT_FROM = 200; // the counter shows when this few are left
const SMALL = "(max-width: 560px), (max-height: 460px)";
const STARTING_EVERY_MS = 4000;
const PROBLEM_FOR_MS = 8000;

export class ChatPanel {
  client;
  #o; // what widget.js gave
  #s; // strings of the language
  #language;
  #views = new Map(); // row key -> {node, …}
  #el = {};
  #frame = 0; // requested animation frame
  #engine = null; // what /readyz said last
  #engineTimer = 0;
  #replayUpTo = 0;
  #problem = null;
  #stick = true;
  #composing = false;
  #humanAsked = false;
  #clock = 0;
  #small = matchMedia(SMALL);

  constructor(options) {
    this.#o = options;
    this.#language = options.language;
    this.#s = STRINGS[options.language];
    this.client = new ChatClient({ url: options.socketUrl, locale: TAGS[options.language], identity: options.identity });
    this.#build();
    this.client.addEventListener("transcript", () => this.#changed());
    this.client.addEventListener("connection", () => {
      if (this.client.connection === "online") this.#askReadiness();
      this.#changed();
    });
    this.client.addEventListener("frame", ({ detail }) => this.#heard(detail));
    this.client.addEventListener("problem", ({ detail }) => this.#showProblem(detail));
    document.addEventListener("visibilitychange", () => this.#read());
    this.#small.addEventListener("change", () => this.#fit());
    globalThis.visualViewport?.addEventListener("resize", () => this.#fit());
    globalThis.visualViewport?.addEventListener("scroll", () => this.#fit());
  }

  show({ focus }) {
    this.#el.panel.hidden = false;
    this.client.connect();
    this.#askReadiness();
    this.#fit();
    this.#render();
    this.#toEnd();
    this.#read();
    if (!focus) return;
    // On touch screens the keyboard would cover the greeting.
    if (matchMedia("(pointer: coarse)").matches) this.#el.panel.focus();
    else this.#el.input.focus();
  }

  hide() {
    this.#el.panel.hidden = true;
    this.#closeSheet();
    this.#fit();
    clearTimeout(this.#engineTimer);
    this.client.typing(false);
  }

  ask(text) {
    if (!text.trim()) return;
    this.#stick = true;
    this.client.ask(text);
    this.#render();
    this.#toEnd();
  }

  setLanguage(language) {
    if (language === this.#language) return;
    this.#language = language;
    this.#s = STRINGS[language];
    this.client.locale = TAGS[language];
    for (const view of this.#views.values()) view.node.remove();
    this.#views.clear();
    this.#label();
    this.#render();
  }

  get #open() {
    return !this.#el.panel.hidden;
  }

  /** Until a human has come, the bot goes on answering. */
  get #botAnswers() {
    const { state } = this.client.transcript;
    return state === "bot" || state === "waiting";
  }

  // ------------------------------------------------------------------ building

  #build() {
    const el = this.#el;
    const button = (name, symbol, onclick) => (el[name] = h("button", { type: "button", onclick }, symbol && icon(symbol)));
    el.title = h("h2", { id: "title" });
    el.status = h("p.status", { role: "status" });
    button("end", "end", () => this.#openSheet());
    button("switch", null, () => this.#o.onlanguage(this.#language === "zh" ? "en" : "zh"));
    button("minimise", "close", () => this.#o.onclose());

    el.rows = h("div.rows");
    el.scroll = h("div.scroll", { role: "log", "aria-live": "off", tabindex: "0" }, el.rows);
    el.jump = h("button.pill.jump", { type: "button", hidden: true, onclick: () => this.#toEnd() });
    el.live = h("div.sr", { "aria-live": "polite", "aria-atomic": "true" });
    el.middle = h("div.middle", {}, el.scroll, el.jump);

    el.input = h("textarea", {
      rows: 1,
      enterkeyhint: "send",
      autocomplete: "off",
      "aria-describedby": "note",
      oninput: () => this.#typed(),
      onkeydown: (event) => this.#key(event),
      oncompositionstart: () => (this.#composing = true),
      oncompositionend: () => (this.#composing = false),
      onblur: () => this.client.typing(false),
    });
    el.send = h("button.send", { type: "button", onclick: () => this.#press() });
    el.human = h("button.pill", { type: "button", onclick: () => this.#wantHuman() });
    el.note = h("p.note", { id: "note" });
    el.box = h("div.box", {}, el.input, el.send);
    el.again = h("div.again", { hidden: true }, (el.fresh = h("button.pill.primary", { type: "button", onclick: () => this.#startOver() })));
    el.composer = h("div.composer", {}, el.again, el.box, h("div.under", {}, el.human, el.note));
    el.panel = h(
      "section.panel",
      {
        role: "dialog",
        "aria-labelledby": "title",
        tabindex: "-1",
        hidden: true,
        onkeydown: (event) => this.#panelKey(event),
      },
      h(
        "header",
        {},
        h("span.face", {}, icon("leaf")),
        h("div.who", {}, el.title, el.status),
        h("div.buttons", {}, el.switch, el.end, el.minimise),
      ),
      el.middle,
      el.composer,
      el.live,
    );
    el.scroll.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    const root = this.#o.host.shadowRoot;
    root.adoptedStyleSheets = [...root.adoptedStyleSheets, panelSheet()];
    root.prepend(el.panel); // before the launcher: Tab goes through the panel first
    this.#label();
  }

  /** Everything that depends on the language but not on the conversation. */
  #label() {
    const s = this.#s;
    const el = this.#el;
    el.panel.lang = TAGS[this.#language];
    const name = (node, text) => {
      node.setAttribute("aria-label", text);
      node.title = text;
    };
    name(el.end, s.end);
    name(el.minimise, s.close);
    name(el.switch, s.switch_language);
    el.switch.lang = TAGS[this.#language === "zh" ? "en" : "zh"];
    setText(el.switch, s.switch_label);
    el.scroll.setAttribute("aria-label", s.transcript);
    el.input.setAttribute("aria-label", s.placeholder);
    el.jump.replaceChildren(icon("down"), s.new_messages);
    setText(el.fresh, s.new_conversation);
    this.#closeSheet();
    this.#typed();
  }

  // ------------------------------------------------------------------ what happens

  #changed() {
    this.#countUnread();
    if (this.#frame || !this.#open) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#render();
    });
  }

  #heard(frame) {
    if (frame.type === "welcome") {
      // What was stored before this page is history; what came while we were cut off is news.
      if (!this.client.transcript.lastSeq) this.#replayUpTo = frame.seq ?? 0;
      this.#humanAsked = false;
      return;
    }
    if (frame.type === "failed") this.#say(this.#failure(frame));
    if (frame.type !== "event") return;
    if (frame.kind === "state") this.#humanAsked = false;
    if (this.#open && frame.seq > this.#replayUpTo) {
      if (frame.kind === "message" && frame.role !== "visitor") {
        const who = { agent: `${this.#s.agent}: `, bot: `${this.#s.assistant}: ` }[frame.role] ?? "";
        this.#say(who + plainText(frame.text ?? ""));
      } else if (frame.kind === "state" && rowsOf(this.client.transcript).at(-1)?.seq === frame.seq) this.#say(this.#s[`state_${frame.state}`] ?? "");
    }
    this.#read();
  }

  #say(text) {
    // Emptied first: the same sentence twice is still two announcements.
    this.#el.live.textContent = "";
    setTimeout(() => (this.#el.live.textContent = text), 60);
  }

  #read() {
    if (this.#open && document.visibilityState === "visible") this.client.markSeen();
    this.#countUnread();
  }

  #countUnread() {
    const { items } = this.client.transcript;
    const seen = this.client.seen;
    let n = 0;
    for (let i = items.length - 1; i >= 0 && items[i].seq > seen; i -= 1) {
      if (items[i].kind === "message" && (items[i].role === "bot" || items[i].role === "agent")) n += 1;
    }
    this.#o.onunread(n);
  }

  #showProblem(frame) {
    this.#problem = frame;
    this.#humanAsked = false;
    this.#say(this.#failure(frame));
    this.#changed();
    setTimeout(() => {
      if (this.#problem !== frame) return;
      this.#problem = null;
      this.#changed();
    }, PROBLEM_FOR_MS);
  }

  #failure(failed) {
    return this.#s.failed[failed.code] ?? (failed.message || this.#s.failed.internal);
  }

  async #askReadiness() {
    clearTimeout(this.#engineTimer);
    if (!this.#open) return;
    const said = await readiness(this.#o.server);
    this.#engine = said?.engine ?? null;
    this.#renderStatus();
    clearTimeout(this.#engineTimer);
    if (this.#open && this.#isStarting) this.#engineTimer = setTimeout(() => this.#askReadiness(), STARTING_EVERY_MS);
  }

  get #isStarting() {
    return this.#engine !== null && !this.#engine.ready && (this.#engine.phase === "starting" || this.#engine.phase === "restarting");
  }

  // ------------------------------------------------------------------ composer

  get #limit() {
    return this.client.transcript.limits?.text_chars ?? TEXT_CHARS;
  }

  /** Characters as the server counts them: code points, not UTF-16 units. */
  get #left() {
    return this.#limit - [...this.#el.input.value].length;
  }

  #typed() {
    const { input } = this.#el;
    input.style.height = "auto";
    const height = Math.min(140, input.scrollHeight);
    if (height) input.style.height = `${height}px`;
    input.style.overflowY = input.scrollHeight > 140 ? "auto" : "hidden";
    const { state } = this.client.transcript;
    if (state === "human" || state === "waiting") this.client.typing(Boolean(input.value.trim()));
    this.#renderComposer();
  }

  #key(event) {
    // 229: Safari ends the composition before the Enter that ended it arrives.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || this.#composing || event.keyCode === 229) return;
    event.preventDefault();
    if (this.#el.input.value.trim()) this.#press();
  }

  #press() {
    const { input } = this.#el;
    const text = input.value.trim();
    const turn = writingTurn(this.client.transcript);
    if (!text && turn) {
      this.client.stop(turn);
      return;
    }
    if (!text || this.#left < 0 || this.client.transcript.state === "closed") return;
    input.value = "";
    this.ask(text);
    this.#typed();
    input.focus();
  }

  #wantHuman() {
    this.#humanAsked = true;
    this.client.handoff();
    this.#renderComposer();
  }

  #startOver() {
    this.client.startOver();
    this.#render();
    this.#el.input.focus();
  }

  #panelKey(event) {
    if (event.key === "Escape" && !event.isComposing && !this.#composing) {
      event.stopPropagation();
      if (this.#el.sheet) this.#closeSheet(true);
      else this.#o.onclose();
      return;
    }
    // Full-screen the page behind is out of sight, so Tab stays inside; beside the page it may leave.
    if (event.key !== "Tab" || !(this.#small.matches || this.#el.sheet)) return;
    const within = this.#el.sheet ?? this.#el.panel;
    const stops = [...within.querySelectorAll("button, textarea, a[href], [tabindex='0']")].filter(
      (node) => !node.disabled && node.offsetParent !== null,
    );
    const active = this.#o.host.shadowRoot.activeElement;
    const end = event.shiftKey ? stops[0] : stops[stops.length - 1];
    if (stops.length && (active === end || active === this.#el.panel)) {
      event.preventDefault();
      (event.shiftKey ? stops[stops.length - 1] : stops[0]).focus();
    }
  }

  // ------------------------------------------------------------------ ending

  #openSheet() {
    if (this.#el.sheet) return;
    const s = this.#s;
    let score = 0;
    const stars = [1, 2, 3, 4, 5].map((n) =>
      h("button", { type: "button", role: "radio", "aria-checked": "false", "aria-label": s.stars(n), onclick: () => choose(n) }, icon("star")),
    );
    const choose = (n) => {
      score = score === n ? 0 : n;
      stars.forEach((star, i) => {
        star.classList.toggle("on", i < score);
        star.setAttribute("aria-checked", String(i + 1 === score));
      });
    };
    const comment = h("textarea", { "aria-label": s.comment, placeholder: s.comment, maxlength: 2000 });
    const done = () => {
      this.client.close(score || undefined, comment.value.trim() || undefined);
      this.#closeSheet(true);
    };
    this.#el.sheet = h(
      "div.over-sheet",
      { onclick: (event) => event.target === this.#el.sheet && this.#closeSheet(true) },
      h(
        "div.sheet",
        { role: "dialog", "aria-modal": "true", "aria-labelledby": "end-title" },
        h("h3", { id: "end-title" }, s.end_title),
        h("p", {}, s.end_text),
        h("div.stars", { role: "radiogroup", "aria-label": s.end_text }, ...stars),
        comment,
        h(
          "div.choices",
          {},
          h("button.pill", { type: "button", onclick: () => this.#closeSheet(true) }, s.end_no),
          h("button.pill.primary", { type: "button", onclick: done }, s.end_yes),
        ),
      ),
    );
    this.#el.middle.append(this.#el.sheet);
    stars[4].focus();
  }

  #closeSheet(focus = false) {
    this.#el.sheet?.remove();
    this.#el.sheet = null;
    if (focus) (this.#el.box.hidden ? this.#el.fresh : this.#el.input).focus();
  }

  // ------------------------------------------------------------------ drawing

  #render() {
    const { transcript } = this.client;
    const rows = rowsOf(transcript);
    const nodes = [];
    const used = new Set();
    const put = (key, make, change) => {
      used.add(key);
      let view = this.#views.get(key);
      if (!view) this.#views.set(key, (view = make()));
      change?.(view);
      nodes.push(view.node);
    };

    const greeting = inLanguage(transcript.greeting, this.#language);
    if (greeting) put("greeting", () => this.#makeReply(), (view) => this.#fillGreeting(view, greeting));

    let day = new Date().toDateString();
    const last = rows.findLast((row) => row.kind === "message" || row.kind === "live");
    for (const row of rows) {
      if (row.at && new Date(row.at).toDateString() !== day) {
        day = new Date(row.at).toDateString();
        put(`day ${day}`, () => ({ node: h("div.line") }), (view) => setText(view.node, this.#day(row.at)));
      }
      if (row.kind === "state") {
        const text = this.#s[`state_${row.state}`];
        if (text) put(row.key, () => ({ node: h("div.line.state", {}, text) }));
      } else if (row.kind === "failed") {
        put(row.key, () => this.#makeTrouble(row), (view) => view.tick());
      } else if (row.role === "visitor") {
        put(row.key, () => ({ node: h("div.row.visitor"), sign: null }), (view) => this.#fillOwn(view, row));
      } else if (row.role === "bot" || row.role === "agent") {
        put(row.key, () => this.#makeReply(row.role), (view) => this.#fillReply(view, row, row === last));
      } else put(row.key, () => ({ node: h("div.line.state", {}, row.text ?? "") }));
    }
    if (transcript.agentTyping) {
      put("agent typing", () => ({ node: h("div.row.agent", {}, h("div.bubble.wait", {}, dots(), this.#s.agent_typing)) }));
    }
    if (this.#problem) {
      const key = `problem ${this.#problem.code}`;
      put(key, () => ({ node: h("div.trouble", {}, this.#failure(this.#problem)) }));
    }
    const quick = this.#quickReplies(rows, last);
    if (quick.length) {
      put(`quick ${quick.join("\n")}`, () => ({
        node: h(
          "div.quick",
          { role: "group", "aria-label": this.#s.quick },
          ...quick.map((text) => h("button.pill", { type: "button", onclick: () => this.#quick(text) }, text)),
        ),
      }));
    }

    for (const [key, view] of this.#views) {
      if (used.has(key)) continue;
      view.node.remove();
      this.#views.delete(key);
    }
    // Moves only what is out of place: moving a node would drop its focus and restart its animation.
    let at = this.#el.rows.firstChild;
    for (const node of nodes) {
      if (node === at) at = at.nextSibling;
      else this.#el.rows.insertBefore(node, at);
    }

    const name = inLanguage(transcript.store?.names ?? transcript.store?.name ?? transcript.store, this.#language);
    setText(this.#el.title, name || this.#s.title);
    this.#el.end.hidden = transcript.items.length === 0 || transcript.state === "closed";
    this.#renderStatus();
    this.#renderComposer();
    const reply = last && last.role !== "visitor" ? this.#views.get(last.key)?.node : null;
    if (this.#stick) this.#follow(reply);
    else if (this.#below > 48) this.#el.jump.hidden = false;
  }

  #renderStatus() {
    const { connection } = this.client;
    const { state } = this.client.transcript;
    let is = connection === "idle" ? "connecting" : connection;
    let text = this.#s[is];
    if (is === "offline" && navigator.onLine === false) text = this.#s.no_network;
    if (is === "online" && state !== "bot") text = this.#s[`online_${state}`] ?? text;
    else if (is === "online" && this.#isStarting) {
      is = "starting";
      text = this.#s.starting;
    }
    this.#el.status.dataset.is = is;
    setText(this.#el.status, text);
  }

  #renderComposer() {
    const el = this.#el;
    const s = this.#s;
    const { transcript } = this.client;
    const closed = transcript.state === "closed";
    const writing = writingTurn(transcript);
    const empty = !el.input.value.trim();
    const stopping = writing && transcript.live[writing].stopping;
    const stops = Boolean(writing) && empty;
    const left = this.#left;

    el.again.hidden = !closed;
    el.box.hidden = closed;
    el.human.hidden = closed;
    el.send.disabled = stops ? Boolean(stopping) : empty || left < 0;
    el.send.classList.toggle("stop", stops);
    const label = stops ? (stopping ? s.stopping : s.stop) : s.send;
    if (el.send.getAttribute("aria-label") !== label) {
      el.send.setAttribute("aria-label", label);
      el.send.title = label;
      el.send.replaceChildren(icon(stops ? "stop" : "send", stops));
    }
    const human = transcript.state === "human" || transcript.state === "waiting" || this.#humanAsked;
    el.human.disabled = human;
    const words = human ? s.human_asked : s.human;
    if (el.human.textContent !== words) el.human.replaceChildren(icon("person"), words);
    el.input.placeholder = transcript.state === "human" ? s.placeholder_human : s.placeholder;
    el.note.classList.toggle("over", left < 0);
    setText(el.note, left <= COUNT_FROM ? s.left(left) : s.disclosure);
  }

  #quickReplies(rows, last) {
    const { transcript } = this.client;
    if (!this.#botAnswers) return [];
    if (rows.length === 0) return transcript.conversation ? [inLanguage(transcript.quickReplies, this.#language) || []].flat() : [];
    return last?.kind === "message" && last.role === "bot" && rows.at(-1) === last ? (last.quick_replies ?? []) : [];
  }

  #quick(text) {
    this.ask(text);
    if (!matchMedia("(pointer: coarse)").matches) this.#el.input.focus();
  }

  #fillGreeting(view, text) {
    this.#fillBubble(view, text, []);
    view.bubble.hidden = false;
  }

  /** The visitor's own message: plain text, never markdown. */
  #fillOwn(view, row) {
    const sign = [row.seq, row.sending && this.client.connection, row.failed?.code].join();
    if (view.sign === sign) return;
    view.sign = sign;
    const s = this.#s;
    view.node.classList.toggle("unsent", Boolean(row.sending));
    view.node.classList.toggle("failed", Boolean(row.failed));
    const children = [h("span.sr", {}, `${s.you}: `), h("div.bubble", { dir: "auto" }, row.text)];
    if (row.failed) children.push(this.#makeTrouble(row).node);
    else {
      const note = row.sending ? (this.client.connection === "online" ? s.sending : s.waiting_to_send) : this.#time(row.at);
      children.push(h("div.foot", {}, note));
    }
    view.node.replaceChildren(...children);
  }

  #makeReply(role = "bot") {
    const bubble = h("div.bubble", { dir: "auto" });
    const tail = h("div.tail");
    const name = h("span.sr", {}, `${role === "agent" ? this.#s.agent : this.#s.assistant}: `);
    const shown = role === "agent" ? h("div.name", { "aria-hidden": "true" }, this.#s.agent) : null;
    return { node: h(`div.row.${role}`, {}, name, ...(shown ? [shown] : []), bubble, tail), bubble, tail, blocks: [], sign: null };
  }

  #fillReply(view, row, isLast) {
    const live = row.kind === "live";
    const waiting = live && !row.text;
    const sign = live ? `live ${waiting ? row.phase : ""} ${Boolean(row.halted)}` : `event ${row.seq}`;
    view.bubble.classList.toggle("caret", live && !waiting && !row.halted);
    if (!waiting) this.#fillBubble(view, row.text ?? "", live ? null : (row.citations ?? []));
    if (view.sign !== sign) {
      view.sign = sign;
      view.bubble.classList.toggle("wait", waiting);
      if (waiting) {
        view.blocks = [];
        view.bubble.replaceChildren(dots(), h("span", {}, this.#s[row.phase] ?? this.#s.thinking));
      }
      view.tail.replaceChildren(...(live ? [] : this.#tail(view, row)));
    }
    if (live) return;
    // Changed in place, not made anew: the pressed button keeps its focus.
    for (const [value, button] of Object.entries(view.thumbs ?? {})) button.setAttribute("aria-pressed", String(row.rating === value));
    if (view.again) view.again.hidden = !isLast || !this.#botAnswers;
  }

  /** `citations` are null while the reply streams: its marks are shown, but open nothing yet. */
  #fillBubble(view, text, citations) {
    const blocks = parseMarkdown(text);
    const cited = citations ? citations.length : -1;
    const cite = (n) => {
      if (!citations) return h("span.mark", {}, String(n));
      return n >= 1 && n <= cited ? this.#mark(view, n, citations[n - 1]) : null;
    };
    blocks.forEach((block, i) => {
      const known = view.blocks[i];
      if (known && known.raw === block.raw && known.type === block.type && known.cited === cited) return;
      const node = blockNode(block, cite);
      if (known) known.node.replaceWith(node);
      else {
        if (i === 0) view.bubble.replaceChildren();
        view.bubble.append(node);
      }
      view.blocks[i] = { raw: block.raw, type: block.type, cited, node };
    });
    for (const extra of view.blocks.splice(blocks.length)) extra.node.remove();
  }

  #mark(view, n, citation) {
    return h(
      "button.mark",
      { type: "button", "aria-expanded": "false", "aria-label": this.#s.source_n(n, citation.title), onclick: () => this.#quote(view, n - 1) },
      String(n),
    );
  }

  /** What stands under a finished reply. */
  #tail(view, row) {
    const s = this.#s;
    const parts = [];
    const cards = (row.cards ?? []).filter((card) => card?.title);
    if (cards.length) parts.push(h("div.cards", {}, ...cards.map((card) => this.#card(card))));
    view.citations = row.citations ?? [];
    view.chips = view.citations.map((citation, i) =>
      h(
        "button.source",
        { type: "button", "aria-expanded": "false", "aria-label": s.source_n(i + 1, citation.title), onclick: () => this.#quote(view, i) },
        h("b", {}, String(i + 1)),
        h("span", {}, citation.title || citation.source || citation.id),
      ),
    );
    if (view.chips.length) {
      view.quote = h("div.quote", { hidden: true, role: "note" });
      parts.push(h("div.sources", { role: "group", "aria-label": s.sources }, ...view.chips), view.quote);
    }

    const foot = h("div.foot", {}, h("span", {}, this.#time(row.at)));
    const tag = (text, symbol) => foot.append(h("span.tag", {}, symbol && icon(symbol), text));
    if (row.outcome === "direct" && row.role === "bot") tag(s.approved, "check");
    if (row.finish === "abort") tag(s.stopped);
    if (row.finish === "length") tag(s.cut);
    if (row.revised) tag(s.revised, "info");
    if (row.role === "bot") {
      const act = (symbol, label, onclick, pressed) =>
        h("button.act", { type: "button", title: label, "aria-label": label, "aria-pressed": pressed, onclick }, icon(symbol));
      const rate = (value) => () => {
        this.client.rate(row.seq, value);
        this.#say(s.rated);
      };
      view.thumbs = { up: act("up", s.good, rate("up"), "false"), down: act("thumbdown", s.bad, rate("down"), "false") };
      const copy = act("copy", s.copy, () => this.#copy(plainText(row.text ?? ""), copy));
      view.again = row.turn ? act("again", s.regenerate, () => this.client.regenerate(row.turn)) : null;
      foot.append(h("span.acts", {}, view.thumbs.up, view.thumbs.down, copy, ...(view.again ? [view.again] : [])));
    }
    parts.push(foot);
    return parts;
  }

  #quote(view, index) {
    const citation = view.citations?.[index];
    if (!citation || !view.quote) return;
    const open = view.quote.hidden || view.quoted !== index;
    view.quoted = index;
    view.quote.hidden = !open;
    view.quote.replaceChildren(
      h("p", {}, citation.quote || citation.title || ""),
      h("p.from", {}, [citation.title, citation.source].filter(Boolean).join(" · ")),
    );
    view.chips.forEach((chip, i) => chip.setAttribute("aria-expanded", String(open && i === index)));
    view.bubble.querySelectorAll(".mark").forEach((mark) => {
      mark.setAttribute("aria-expanded", String(open && Number(mark.textContent) === index + 1));
    });
    if (open) view.quote.scrollIntoView({ block: "nearest" });
  }

  #card(card) {
    const s = this.#s;
    const link = linkTo(absolute(card.url ?? "", this.#o.server));
    const picture = card.image ? linkTo(absolute(card.image, new URL("store/", this.#o.server))) : null;
    const pic = h("span.pic", {}, icon("bag"));
    if (picture?.host) {
      const image = h("img", { src: picture.href, alt: "", loading: "lazy", decoding: "async", width: 76, height: 76 });
      image.addEventListener("error", () => pic.replaceChildren(icon("bag")));
      pic.replaceChildren(image);
    }
    const stock = Number.parseInt(card.stock, 10);
    const facts = h("span.facts", {}, h("span.price", {}, this.#price(card.price, card.currency)));
    if (stock === 0) facts.append(h("span.few", {}, s.out_of_stock));
    else if (stock > 0) facts.append(h(stock <= 5 ? "span.few" : "span", {}, stock <= 5 ? s.low_stock(stock) : s.in_stock));
    const body = h("span", {}, h("span.title", {}, String(card.title)), facts);
    return link?.host
      ? h("a.card", { href: link.href, target: "_blank", rel: "noopener", "aria-label": s.view_product(card.title) }, pic, body)
      : h("div.card", {}, pic, body);
  }

  #makeTrouble(row) {
    const s = this.#s;
    const { failed } = row;
    const due = Date.now() + Math.min(120, failed.retry_after_s ?? 0) * 1000;
    const again = () => (row.role === "visitor" ? this.client.retry(row.id) : this.client.regenerate(row.turn));
    const button = failed.retryable || row.role === "visitor" ? h("button.pill", { type: "button", onclick: again }) : null;
    const tick = () => {
      if (!button) return;
      const wait = Math.ceil((due - Date.now()) / 1000);
      button.disabled = wait > 0;
      const label = wait > 0 ? s.try_in(wait) : s.try_again;
      if (button.textContent !== label) button.replaceChildren(icon("again"), label);
      if (wait > 0 && !this.#clock) {
        this.#clock = setTimeout(() => {
          this.#clock = 0;
          for (const view of this.#ticking) if (view.node.isConnected) view.tick();
            else this.#ticking.delete(view);
        }, 1000);
      }
    };
    const node = h("div.trouble", {}, h("span", {}, this.#failure(failed)), ...(button ? [button] : []));
    if (row.role === "visitor") node.append(h("button.pill", { type: "button", onclick: () => this.client.discard(row.id) }, s.discard));
    const view = { node, tick };
    this.#ticking.add(view);
    tick();
    return view;
  }

  #ticking = new Set();

  async #copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // No clipboard API without TLS: the old way, inside our own root.
      const area = h("textarea.sr", { readonly: true });
      area.value = text;
      this.#el.panel.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.replaceChildren(icon("check"));
    this.#say(this.#s.copied);
    setTimeout(() => button.replaceChildren(icon("copy")), 1600);
  }

  // ------------------------------------------------------------------ place and time

  /** How much of the transcript is below what is seen, in pixels. */
  get #below() {
    const { scroll } = this.#el;
    return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
  }

  #scrolled() {
    this.#stick = this.#below < 48;
    if (this.#stick) this.#el.jump.hidden = true;
  }

  /** Go to the end, but not past the beginning of `reply`: one reads from the top. */
  #follow(reply) {
    this.#toEnd();
    if (!reply || reply.offsetTop >= this.#el.scroll.scrollTop) return;
    this.#el.scroll.scrollTop = reply.offsetTop - 12;
    this.#el.jump.hidden = false;
  }

  #toEnd() {
    this.#stick = true;
    this.#el.scroll.scrollTop = this.#el.scroll.scrollHeight;
    this.#el.jump.hidden = true;
  }

  /** Full-screen on phones: as high as what the keyboard leaves, and the page behind stands still. */
  #fit() {
    const full = this.#open && this.#small.matches;
    this.#el.panel.setAttribute("aria-modal", String(full));
    document.documentElement.style.overflow = full ? "hidden" : "";
    const view = globalThis.visualViewport;
    if (!full || !view || view.scale > 1.01) {
      this.#el.panel.style.removeProperty("--viewport");
      this.#el.panel.style.removeProperty("--viewport-top");
      return;
    }
    this.#el.panel.style.setProperty("--viewport", `${view.height}px`);
    this.#el.panel.style.setProperty("--viewport-top", `${view.offsetTop}px`);
    if (this.#stick) this.#toEnd();
  }

  #time(at) {
    const date = new Date(at ?? Date.now());
    if (Number.isNaN(date.getTime())) return "";
    return new Intl.DateTimeFormat(TAGS[this.#language], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" }).format(date);
  }

  #day(at) {
    const date = new Date(at);
    const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(date).setHours(0, 0, 0, 0)) / 86_400_000);
    if (days === 0) return this.#s.today;
    if (days === 1) return this.#s.yesterday;
    return new Intl.DateTimeFormat(TAGS[this.#language], { dateStyle: "medium" }).format(date);
  }

  #price(price, currency) {
    const number = Number(price);
    if (price === undefined || price === null || price === "" || Number.isNaN(number)) return String(price ?? "");
    try {
      return new Intl.NumberFormat(TAGS[this.#language], {
        style: "currency",
        currency: currency || "CNY",
        currencyDisplay: "narrowSymbol",
        minimumFractionDigits: Number.isInteger(number) ? 0 : 2,
      }).format(number);
    } catch {
      return `${currency} ${price}`;
    }
  }
}

function dots() {
  return h("span.dots", { "aria-hidden": "true" }, h("i"), h("i"), h("i"));
}

function absolute(address, base) {
  try {
    return new URL(address, base).href;
  } catch {
    return "";
  }
}
