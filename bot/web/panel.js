/*
 * The open chat. What to show is `rowsOf` of frames.js. Rows are kept: while a reply streams only its last block is made anew, so a selection or the focus elsewhere stays.
 * Screen readers hear a finished reply once, through a live region of its own.
 */

import { ChatClient } from "./client.js";
import { h, icon, setText } from "./dom.js";
import { rowsOf, writingTurn } from "./frames.js";
import { blockNode, parseMarkdown, plainText } from "./markdown.js";
import { cardNode, chime, endSheet, filesNode, leaveSheet, menuSheet, saveBlob, transcriptText, Tray } from "./parts.js";
import { readiness } from "./readiness.js";
import { panelSheet } from "./styles.js";
import { inLanguage, loadWords } from "./words.js";

const TEXT_CHARS = 2000; // until `welcome` says otherwise
const COUNT_FROM = 200; // the counter shows when this few are left
const SMALL = "(max-width: 560px), (max-height: 460px)";
const STARTING_EVERY_MS = 4000;
const PROBLEM_FOR_MS = 8000;
const CLOCK = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };

/** Return the panel of `host`, a `<zhanggui-chat>`; `tools` are what its file shares with us. */
export async function openPanel(host, tools) {
  return new ChatPanel(host, tools, await wordsFor(host));
}

function wordsFor(host) {
  const file = (tag) => new URL(`strings.${tag}.json`, import.meta.url).href;
  if (host.language !== "custom") return loadWords(file(host.language));
  return loadWords(new URL(host.dataset.strings, document.baseURI).href, file("en"));
}

class ChatPanel {
  client;
  #host;
  #tools;
  #t; // words of the language
  #views = new Map(); // row key -> {node, …}
  #el = {};
  #tray;
  #frame = 0; // requested animation frame
  #engine = null; // what /readyz said last
  #engineTimer = 0;
  #replayUpTo = 0;
  #problem = null;
  #stick = true;
  #composing = false;
  #humanAsked = false;
  #opener = null; // what had the focus before a sheet
  #small = matchMedia(SMALL);

  constructor(host, tools, t) {
    this.#host = host;
    this.#tools = tools;
    this.#t = t;
    this.client = new ChatClient({ url: host.socketUrl, locale: this.#locale, identity: host.dataset.identity });
    this.#tray = new Tray({
      client: this.client,
      words: () => this.#t,
      say: (text) => this.#say(text),
      onchange: (byHand) => {
        if (byHand) this.#el.input.focus();
        this.#renderComposer();
      },
    });
    this.#build();
    this.client.addEventListener("transcript", () => this.#changed());
    this.client.addEventListener("connection", () => {
      if (this.client.connection === "online") this.#askReadiness();
      this.#changed();
    });
    this.client.addEventListener("frame", ({ detail }) => this.#heard(detail));
    this.client.addEventListener("problem", ({ detail }) => this.#showProblem(detail));
    document.addEventListener("visibilitychange", () => this.#read());
    for (const name of ["online", "offline"]) globalThis.addEventListener(name, () => this.#renderStatus());
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

  ask(text, { attachments = [] } = {}) {
    if (!text.trim() && !attachments.length) return;
    this.#stick = true;
    this.client.ask(text, { attachments });
    this.#render();
    this.#toEnd();
  }

  async speak() {
    const { language } = this.#host;
    const t = await wordsFor(this.#host);
    if (language !== this.#host.language || (t.lang === this.#t.lang && language !== "custom")) return; // overtaken, or no news
    this.#t = t;
    this.client.locale = this.#locale;
    for (const view of this.#views.values()) view.node.remove();
    this.#views.clear();
    this.#label();
    this.paint();
    this.#render();
  }

  paint() {
    const host = this.#host;
    const rgb = [...host.accent];
    // As a text colour the merchant's may be too faint: yellow on white, navy on black.
    host.style.setProperty("--link-light", readable(rgb, 0, [233, 240, 234], this.#tools.lightness));
    host.style.setProperty("--link-dark", readable(rgb, 255, [46, 56, 50], this.#tools.lightness));
    const { avatar } = host.dataset;
    const face = avatar ? h("img", { src: new URL(avatar, document.baseURI).href, alt: "" }) : icon("leaf");
    face.addEventListener("error", () => this.#el.face.replaceChildren(icon("leaf")));
    this.#el.face.replaceChildren(face);
    this.#changed();
  }

  get #locale() {
    const { lang } = this.#host.dataset;
    return this.#host.language === "custom" && lang && lang !== "auto" ? lang : this.#t.lang;
  }

  get #open() {
    return !this.#el.panel.hidden;
  }

  get #botAnswers() {
    const { state } = this.client.transcript;
    return state === "bot" || state === "waiting";
  }

  #build() {
    const el = this.#el;
    const button = (name, symbol, onclick, look = "") => (el[name] = h(`button${look}`, { type: "button", onclick }, icon(symbol)));
    el.title = h("h2", { id: "title" });
    el.status = h("p.status", { role: "status" });
    el.face = h("span.face");
    button("more", "more", () => this.#openMenu());
    button("minimise", "close", () => this.#host.close());

    el.rows = h("div.rows");
    el.scroll = h("div.scroll", { role: "log", "aria-live": "off", tabindex: "0" }, el.rows);
    el.jump = h("button.pill.jump", { type: "button", hidden: true, onclick: () => this.#toEnd() });
    el.live = h("div.sr", { "aria-live": "polite", "aria-atomic": "true" });
    el.drop = h("div.drop", { hidden: true });
    el.middle = h("div.middle", {}, el.scroll, el.jump, el.drop);

    el.input = h("textarea", {
      rows: 1,
      enterkeyhint: "send",
      autocomplete: "off",
      dir: "auto",
      "aria-describedby": "note",
      oninput: () => this.#typed(),
      onpaste: (event) => this.#take(event, event.clipboardData),
      onkeydown: (event) => this.#key(event),
      oncompositionstart: () => (this.#composing = true),
      oncompositionend: () => (this.#composing = false),
      onblur: () => this.client.typing(false),
    });
    el.input.value = this.#tools.recall("sessionStorage", this.#draftKey) ?? "";
    el.chooser = h("input", { type: "file", multiple: true, hidden: true, onchange: () => this.#chosen() });
    button("clip", "clip", () => el.chooser.click(), ".clip");
    el.send = h("button.send", { type: "button", onclick: () => this.#press() });
    el.human = h("button.pill", { type: "button", onclick: () => this.#wantHuman() });
    el.note = h("p.note", { id: "note" });
    el.box = h("div.box", {}, el.clip, el.chooser, el.input, el.send);
    el.fresh = h("button.pill.primary", { type: "button", onclick: () => this.#startOver() });
    el.again = h("div.again", { hidden: true }, el.fresh);
    el.composer = h("div.composer", {}, this.#tray.node, el.again, el.box, h("div.under", {}, el.human, el.note));
    el.panel = h(
      "section.panel",
      {
        role: "dialog",
        "aria-labelledby": "title",
        tabindex: "-1",
        hidden: true,
        onkeydown: (event) => this.#panelKey(event),
        ondragover: (event) => this.#over(event, true),
        ondragleave: (event) => this.#over(event, false),
        ondrop: (event) => this.#take(event, event.dataTransfer),
      },
      h("div.head", {}, el.face, h("div.who", {}, el.title, el.status), h("div.buttons", {}, el.more, el.minimise)),
      el.middle,
      el.composer,
      el.live,
    );
    el.scroll.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    const root = this.#host.shadowRoot;
    root.adoptedStyleSheets = [...root.adoptedStyleSheets, panelSheet()];
    root.insertBefore(el.panel, root.firstChild); // before the launcher: it is read first
    this.paint();
    this.#label();
  }

  #label() {
    const t = this.#t;
    const el = this.#el;
    el.panel.lang = t.lang;
    el.panel.dir = this.#host.dataset.dir === "rtl" ? "rtl" : t.dir;
    const name = (node, text) => {
      node.setAttribute("aria-label", text);
      node.title = text;
    };
    name(el.more, t("more"));
    name(el.minimise, t("close"));
    name(el.clip, t("attach"));
    el.scroll.setAttribute("aria-label", t("transcript"));
    el.input.setAttribute("aria-label", t("placeholder"));
    el.chooser.setAttribute("aria-label", t("attach"));
    setText(el.drop, t("drop"));
    el.jump.replaceChildren(icon("down"), t("new_messages"));
    setText(el.fresh, t("new_conversation"));
    this.#closeSheet();
    this.#typed();
  }

  get #draftKey() {
    return `zhanggui draft ${this.#host.socketUrl}`;
  }

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
      // What was stored before this page is no news; what came while we were cut off is.
      if (!this.client.transcript.lastSeq) this.#replayUpTo = frame.seq ?? 0;
      this.#humanAsked = false;
      return;
    }
    if (frame.type === "failed") this.#say(this.#failure(frame));
    if (frame.type !== "event") return;
    if (frame.kind === "state") this.#humanAsked = false;
    if (this.#open && frame.seq > this.#replayUpTo) {
      if (frame.kind === "message" && frame.role !== "visitor") {
        const who = { agent: `${frame.agent?.name || this.#t("agent")}: `, bot: `${this.#t("assistant")}: ` }[frame.role] ?? "";
        this.#say(who + plainText(frame.text ?? ""));
      } else if (frame.kind === "state" && rowsOf(this.client.transcript).at(-1)?.seq === frame.seq) this.#say(this.#stateText(frame));
    }
    const news = frame.kind === "message" && (frame.role === "bot" || frame.role === "agent") && frame.seq > this.#replayUpTo;
    if (news && this.#sound && !(this.#open && document.hasFocus())) chime();
    this.#read();
  }

  #say(text) {
    // Emptied first: the same sentence twice is still two announcements.
    this.#el.live.textContent = "";
    setTimeout(() => (this.#el.live.textContent = text), 60);
  }

  #stateText({ state, agent }) {
    return state === "human" && agent?.name ? this.#t("state_agent", { name: agent.name }) : this.#t(`state_${state}`);
  }

  get #sound() {
    return (this.#tools.recall("localStorage", "zhanggui sound") ?? this.#host.dataset.sound) === "on";
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
    this.#host.unread = n;
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
    return this.#t(`failed_${failed.code}`) || this.#t("failed_internal");
  }

  async #askReadiness() {
    clearTimeout(this.#engineTimer);
    if (!this.#open) return;
    const said = await readiness(this.#host.server);
    this.#engine = said?.engine ?? null;
    this.#renderStatus();
    clearTimeout(this.#engineTimer);
    if (this.#open && this.#isStarting) this.#engineTimer = setTimeout(() => this.#askReadiness(), STARTING_EVERY_MS);
  }

  get #isStarting() {
    return /starting$/.test(this.#engine?.phase);
  }

  get #limit() {
    return this.client.transcript.limits?.text_chars ?? TEXT_CHARS;
  }

  /** Characters as the server counts them: code points, not UTF-16 units. */
  get #left() {
    return this.#limit - [...this.#el.input.value].length;
  }

  #typed() {
    const { input } = this.#el;
    this.#tools.remember("sessionStorage", this.#draftKey, input.value);
    input.style.height = "auto";
    const height = Math.min(140, input.scrollHeight);
    if (height) input.style.height = `${height}px`;
    input.style.overflowY = input.scrollHeight > 140 ? "auto" : "hidden";
    const { state } = this.client.transcript;
    if (state === "human" || state === "waiting") this.client.typing(Boolean(input.value.trim()));
    this.#renderComposer();
  }

  #key(event) {
    // 229: Safari's Enter after a composition.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || this.#composing || event.keyCode === 229) return;
    event.preventDefault();
    if (this.#el.input.value.trim()) this.#press();
  }

  #press() {
    const { input } = this.#el;
    const text = input.value.trim();
    const turn = writingTurn(this.client.transcript);
    const attachments = this.#tray.ready;
    if (!text && !attachments.length && turn) {
      this.client.stop(turn);
      return;
    }
    if (!this.#canSend) return;
    input.value = "";
    this.#tray.clear();
    this.ask(text, { attachments });
    this.#typed();
    input.focus();
  }

  get #canSend() {
    const some = this.#el.input.value.trim() || this.#tray.ready.length;
    return Boolean(some) && !this.#tray.busy && this.#left >= 0 && this.client.transcript.state !== "closed";
  }

  #chosen() {
    this.#tray.add([...this.#el.chooser.files]);
    this.#el.chooser.value = ""; // the same file may be chosen again
    this.#el.input.focus();
  }

  #over(event, on) {
    const files = this.#tray.wanted && [...(event.dataTransfer?.types ?? [])].includes("Files");
    if (!files) return;
    event.preventDefault();
    this.#el.drop.hidden = !on;
  }

  #take(event, data) {
    this.#el.drop.hidden = true;
    const files = [...(data?.files ?? [])];
    if (!files.length || !this.#tray.wanted || this.client.transcript.state === "closed") return;
    event.preventDefault();
    this.#tray.add(files);
  }

  #wantHuman() {
    this.#humanAsked = true;
    if (this.client.transcript.state === "closed") this.client.startOver();
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
      else this.#host.close();
      return;
    }
    if (event.key !== "Tab") return;
    const within = this.#el.sheet ?? this.#el.panel;
    const stops = [...within.querySelectorAll("button, textarea, input, a[href], [tabindex='0']")].filter(
      (node) => !node.disabled && node.tabIndex >= 0 && node.offsetParent !== null,
    );
    const active = this.#host.shadowRoot.activeElement;
    const end = event.shiftKey ? stops[0] : stops.at(-1);
    if (stops.length && (active === end || active === this.#el.panel || !within.contains(active))) {
      event.preventDefault();
      (event.shiftKey ? stops.at(-1) : stops[0]).focus();
    }
  }

  #openMenu() {
    const t = this.#t;
    const { transcript } = this.client;
    const has = transcript.items.length > 0;
    const then = (action) => () => {
      this.#closeSheet(true);
      action();
    };
    const items = [
      { label: t("sound"), symbol: "bell", checked: this.#sound, act: () => this.#toggleSound() },
      has && { label: t("save"), symbol: "save", act: then(() => this.#save()) },
      { label: t("leave"), symbol: "mail", act: () => this.#openLeave() },
      has && transcript.state !== "closed" && { label: t("end"), symbol: "end", act: () => this.#openEnd() },
    ].filter(Boolean);
    const { LANGUAGES } = this.#tools;
    const { language, dataset } = this.#host;
    const languages = Object.entries(LANGUAGES).map(([key, name]) => ({ key, name, on: key === language, lang: key }));
    if (dataset.strings && dataset.lang) languages.unshift({ key: null, name: languageName(dataset.lang), on: language === "custom", lang: dataset.lang });
    this.#showSheet(
      menuSheet(t, {
        languages,
        items,
        onlanguage: (key) => {
          this.#closeSheet(true);
          this.#host.choose(key);
        },
        onclose: () => this.#closeSheet(true),
      }),
    );
  }

  #openEnd() {
    const ondone = (score, comment) => {
      this.client.close(score, comment);
      this.#closeSheet(true);
    };
    this.#showSheet(endSheet(this.#t, { ondone, onclose: () => this.#closeSheet(true) }));
  }

  #openLeave() {
    const { input } = this.#el;
    const ondone = (email, text) => {
      if (input.value.trim() && text.startsWith(input.value.trim())) {
        input.value = "";
        this.#typed();
      }
      this.#stick = true;
      this.client.leaveMessage(email, text);
      this.#closeSheet(true);
    };
    const options = { text: input.value, maxChars: this.#limit, ondone, onclose: () => this.#closeSheet(true) };
    this.#showSheet(leaveSheet(this.#t, options));
  }

  #showSheet(node) {
    const opener = this.#el.sheet ? this.#opener : this.#host.shadowRoot.activeElement;
    this.#closeSheet();
    this.#opener = opener;
    this.#el.sheet = h("div.over-sheet", { onclick: (event) => event.target === this.#el.sheet && this.#closeSheet(true) }, node);
    this.#el.panel.append(this.#el.sheet);
    node.querySelector("input, button:not([tabindex='-1'])").focus();
  }

  #closeSheet(focus = false) {
    this.#el.sheet?.remove();
    this.#el.sheet = null;
    if (!focus) return;
    if (this.#opener?.isConnected) this.#opener.focus();
    else (this.#el.box.hidden ? this.#el.fresh : this.#el.input).focus();
  }

  #toggleSound() {
    const on = !this.#sound;
    this.#tools.remember("localStorage", "zhanggui sound", on ? "on" : "off");
    if (on) chime();
    return on;
  }

  #save() {
    const text = transcriptText(rowsOf(this.client.transcript), this.#t, this.#el.title.textContent);
    saveBlob(new Blob([text], { type: "text/plain;charset=utf-8" }), `chat-${new Date().toISOString().slice(0, 10)}.txt`);
  }

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

    const t = this.#t;
    const greeting = this.#host.dataset.greeting ?? inLanguage(transcript.greeting, t.lang);
    if (greeting) put("greeting", () => this.#makeReply(), (view) => this.#fillGreeting(view, greeting));

    let day = new Date().toDateString();
    const last = rows.findLast((row) => row.kind === "message" || row.kind === "live");
    for (const row of rows) {
      if (row.at && new Date(row.at).toDateString() !== day) {
        day = new Date(row.at).toDateString();
        put(`day ${day}`, () => ({ node: h("div.line") }), (view) => setText(view.node, this.#day(row.at)));
      }
      if (row.kind === "state") {
        const text = this.#stateText(row);
        if (text) put(row.key, () => ({ node: h("div.line.state", {}, text) }));
      } else if (row.kind === "failed") {
        put(row.key, () => this.#makeTrouble(row));
      } else if (row.role === "visitor") {
        put(row.key, () => ({ node: h("div.row.visitor"), sign: null }), (view) => this.#fillOwn(view, row));
      } else if (row.role === "bot" || row.role === "agent") {
        put(row.key, () => this.#makeReply(row), (view) => this.#fillReply(view, row, row === last));
      } else put(row.key, () => ({ node: h("div.line.state", {}, row.text ?? "") }));
    }
    if (transcript.agentTyping) {
      const name = transcript.agentTyping.name || transcript.agent?.name || t("agent");
      const text = t("agent_typing", { name });
      put(`typing ${text}`, () => ({ node: h("div.row.agent", {}, h("div.bubble.wait", {}, dots(), h("span", {}, text))) }));
    }
    if (transcript.state === "waiting") this.#putQueue(put, transcript.human);
    if (this.#problem) {
      const key = `problem ${this.#problem.code}`;
      put(key, () => ({ node: h("div.trouble", {}, this.#failure(this.#problem)) }));
    }
    const quick = this.#quickReplies(rows, last);
    if (quick.length) {
      put(`quick ${quick.join("\n")}`, () => ({
        node: h(
          "div.quick",
          { role: "group", "aria-label": t("quick") },
          ...quick.map((text) => h("button.pill", { type: "button", onclick: () => this.#quick(text) }, text)),
        ),
      }));
    }

    for (const [key, view] of this.#views) {
      if (used.has(key)) continue;
      view.node.remove();
      this.#views.delete(key);
    }
    // A node that is moved loses its focus and its animation.
    let at = this.#el.rows.firstChild;
    for (const node of nodes) {
      if (node === at) at = at.nextSibling;
      else this.#el.rows.insertBefore(node, at);
    }

    const name = inLanguage(transcript.store?.names ?? transcript.store?.name ?? transcript.store, t.lang);
    setText(this.#el.title, name || t("title"));
    this.#renderStatus();
    this.#renderComposer();
    const reply = last && last.role !== "visitor" ? this.#views.get(last.key)?.node : null;
    if (this.#stick) this.#follow(reply);
    else if (this.#below > 48) this.#el.jump.hidden = false;
  }

  #putQueue(put, human) {
    const t = this.#t;
    const away = human.open === false || human.agents_online === false;
    const minutes = Math.max(1, Math.ceil((human.expected_wait_s ?? 0) / 60));
    const place = { n: human.position, m: minutes };
    if (human.position && !away) {
      const text = human.expected_wait_s ? t("queue_wait", place) : t("queue", place);
      put("queue", () => ({ node: h("div.line", { role: "status" }) }), (view) => setText(view.node, text));
    }
    if (!away) return;
    const text = human.open === false && human.opens_at ? t("hours_closed", { time: this.#when(human.opens_at) }) : t("hours_away");
    put(`away ${text}`, () => ({
      node: h("div.trouble.away", {}, h("span", {}, text), h("button.pill", { type: "button", onclick: () => this.#openLeave() }, icon("mail"), t("leave"))),
    }));
  }

  #renderStatus() {
    const { connection } = this.client;
    const { state } = this.client.transcript;
    let is = connection === "idle" ? "connecting" : connection;
    const { agent } = this.client.transcript;
    let text = this.#t(is);
    if (is !== "offline" && this.client.restarting) {
      is = "connecting";
      text = this.#t("restarting");
    } else if (is !== "online" && navigator.onLine === false) {
      is = "offline";
      text = this.#t("no_network");
    } else if (is === "online" && state === "human" && agent?.name) text = this.#t("online_agent", { name: agent.name });
    else if (is === "online" && state !== "bot") text = this.#t(`online_${state}`) || text;
    else if (is === "online" && this.#isStarting) {
      is = "starting";
      text = this.#t("starting");
    }
    this.#el.status.dataset.is = is;
    setText(this.#el.status, text);
  }

  #renderComposer() {
    const el = this.#el;
    const t = this.#t;
    const { transcript } = this.client;
    const closed = transcript.state === "closed";
    const writing = writingTurn(transcript);
    const empty = !el.input.value.trim() && !this.#tray.ready.length;
    const stopping = writing && transcript.live[writing].stopping;
    const stops = Boolean(writing) && empty;
    const left = this.#left;

    el.again.hidden = !closed;
    el.box.hidden = closed;
    el.clip.hidden = !this.#tray.wanted;
    el.chooser.accept = this.#tray.types.join();
    el.send.disabled = stops ? Boolean(stopping) : !this.#canSend;
    el.send.classList.toggle("stop", stops);
    const label = stops ? (stopping ? t("stopping") : t("stop")) : t("send");
    if (el.send.getAttribute("aria-label") !== label) {
      el.send.setAttribute("aria-label", label);
      el.send.title = label;
      el.send.replaceChildren(icon(stops ? "stop" : "send", stops));
    }
    const human = transcript.state === "human" || transcript.state === "waiting" || this.#humanAsked;
    el.human.disabled = human;
    const words = human ? t("human_asked") : t("human");
    if (el.human.textContent !== words) el.human.replaceChildren(icon("person"), words);
    el.input.placeholder = t(transcript.state === "human" ? "placeholder_human" : "placeholder");
    el.note.classList.toggle("over", left < 0);
    setText(el.note, left > COUNT_FROM ? (transcript.state === "human" ? "" : t("disclosure")) : left < 0 ? t("over", { n: -left }) : t("left", { n: left }));
  }

  #quickReplies(rows, last) {
    const { transcript } = this.client;
    if (!this.#botAnswers) return [];
    if (rows.length === 0) return transcript.conversation ? [inLanguage(transcript.quickReplies, this.#t.lang) || []].flat() : [];
    return last?.kind === "message" && last.role === "bot" && rows.at(-1) === last ? (last.quick_replies ?? []) : [];
  }

  #quick(text) {
    this.ask(text);
    if (!matchMedia("(pointer: coarse)").matches) this.#el.input.focus();
  }

  #fillGreeting(view, text) {
    this.#fillBubble(view, text, []);
    const { hours } = this.#host.dataset;
    view.tail.replaceChildren(...(hours ? [h("p.hours", {}, hours)] : []));
  }

  /** Plain text, never markdown. */
  #fillOwn(view, row) {
    const sign = [row.seq, row.sending && this.client.connection, row.failed?.code].join();
    if (view.sign === sign) return;
    view.sign = sign;
    const t = this.#t;
    view.node.classList.toggle("unsent", Boolean(row.sending));
    view.node.classList.toggle("failed", Boolean(row.failed));
    view.files ??= row.attachments?.length ? this.#files(row.attachments) : null;
    const children = [h("span.sr", {}, `${t("you")}: `), view.files, row.text && h("div.bubble", { dir: "auto" }, row.text)].filter(Boolean);
    if (row.failed) children.push(this.#makeTrouble(row).node);
    else {
      const note = row.sending ? t(this.client.connection === "online" ? "sending" : "waiting_to_send") : this.#time(row.at);
      if (row.left && row.email) children.push(h("div.foot", {}, icon("mail"), t("left_for", { email: row.email })));
      children.push(h("div.foot", {}, note));
    }
    view.node.replaceChildren(...children);
  }

  #files(attachments) {
    return filesNode(attachments, (id) => this.client.attachmentBlob(id), this.#t("attachments"));
  }

  #makeReply({ role = "bot", agent } = {}) {
    const bubble = h("div.bubble", { dir: "auto" });
    const tail = h("div.tail");
    const who = role === "agent" ? agent?.name || this.#t("agent") : this.#t("assistant");
    const shown = role === "agent" && h("div.name", { "aria-hidden": "true" }, h("b", {}, [...who][0].toUpperCase()), who);
    return { node: h(`div.row.${role}`, {}, h("span.sr", {}, `${who}: `), shown, bubble, tail), bubble, tail, blocks: [], sign: null };
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
        view.bubble.replaceChildren(dots(), h("span", {}, this.#t(row.phase) || this.#t("thinking")));
      }
      view.tail.replaceChildren(...(live ? [] : this.#tail(view, row)));
    }
    if (live) return;
    // Changed in place, not made anew: the pressed button keeps its focus.
    for (const [value, button] of Object.entries(view.thumbs ?? {})) button.setAttribute("aria-pressed", String(row.rating === value));
    if (view.again) view.again.hidden = !isLast || !this.#botAnswers;
  }

  /** `citations` are null while the reply streams: its marks open nothing yet. */
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
      { type: "button", "aria-expanded": "false", "aria-label": this.#t("source_n", { n, title: citation.title }), onclick: () => this.#quote(view, n - 1) },
      String(n),
    );
  }

  #tail(view, row) {
    const t = this.#t;
    const parts = [];
    if (row.attachments?.length) parts.push(this.#files(row.attachments));
    const origins = [this.#host.server, document.baseURI, ...(this.#host.dataset.images ?? "").split(/\s+/).filter(Boolean)].map(originOf);
    const cards = (row.cards ?? []).map((card) => cardNode(card, t, this.#host.server, origins)).filter(Boolean);
    if (cards.length) parts.push(h("div.cards", {}, ...cards));
    view.citations = row.citations ?? [];
    view.chips = view.citations.map((citation, i) =>
      h(
        "button.source",
        { type: "button", "aria-expanded": "false", "aria-label": t("source_n", { n: i + 1, title: citation.title }), onclick: () => this.#quote(view, i) },
        h("b", {}, String(i + 1)),
        " ",
        h("span", {}, citation.title || citation.source || citation.id),
      ),
    );
    if (view.chips.length) {
      view.quote = h("div.quote", { hidden: true, role: "note" });
      parts.push(h("div.sources", { role: "group", "aria-label": t("sources") }, ...view.chips), view.quote);
    }

    const foot = h("div.foot", {}, h("span", {}, this.#time(row.at)));
    const tag = (text, symbol) => foot.append(h("span.tag", {}, symbol && icon(symbol), text));
    if (row.outcome === "direct" && row.role === "bot") tag(t("approved"), "check");
    if (row.finish === "abort") tag(t("stopped"));
    if (row.finish === "length") tag(t("cut"));
    if (row.revised) tag(t("revised"), "info");
    if (row.role === "bot") {
      const act = (symbol, label, onclick, pressed) =>
        h("button.act", { type: "button", title: label, "aria-label": label, "aria-pressed": pressed, onclick }, icon(symbol));
      const rate = (value) => () => {
        this.client.rate(row.seq, value);
        this.#say(t("rated"));
      };
      view.thumbs = { up: act("up", t("good"), rate("up"), "false"), down: act("thumbdown", t("bad"), rate("down"), "false") };
      const copy = navigator.clipboard && act("copy", t("copy"), () => this.#copy(plainText(row.text ?? ""), copy));
      view.again = row.turn ? act("again", t("regenerate"), () => this.client.regenerate(row.turn)) : null;
      foot.append(h("span.acts", {}, view.thumbs.up, view.thumbs.down, copy, view.again));
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

  #makeTrouble(row) {
    const t = this.#t;
    const { failed } = row;
    const due = Date.now() + Math.min(120, failed.retry_after_s ?? 0) * 1000;
    const again = () => (row.role === "visitor" ? this.client.retry(row.id) : this.client.regenerate(row.turn));
    const button = failed.retryable || row.role === "visitor" ? h("button.pill", { type: "button", onclick: again }) : null;
    const tick = () => {
      if (!button) return;
      const wait = Math.ceil((due - Date.now()) / 1000);
      button.disabled = wait > 0;
      const label = wait > 0 ? t("try_in", { n: wait }) : t("try_again");
      button.replaceChildren(icon("again"), label);
      if (wait > 0) setTimeout(tick, 1000);
    };
    const node = h("div.trouble", {}, h("span", {}, this.#failure(failed)), ...(button ? [button] : []));
    if (row.role === "visitor") node.append(h("button.pill", { type: "button", onclick: () => this.client.discard(row.id) }, t("discard")));
    tick();
    return { node };
  }

  async #copy(text, button) {
    await navigator.clipboard.writeText(text);
    button.replaceChildren(icon("check"));
    this.#say(this.#t("copied"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1600);
  }

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
    return this.#format(at ?? Date.now(), CLOCK);
  }

  #day(at) {
    const date = new Date(at);
    const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(date).setHours(0, 0, 0, 0)) / 86_400_000);
    if (days === 0) return this.#t("today");
    if (days === 1) return this.#t("yesterday");
    return this.#format(at, { dateStyle: "medium" });
  }

  #when(at) {
    const today = new Date(at).toDateString() === new Date().toDateString();
    return this.#format(at, today ? CLOCK : { weekday: "long", ...CLOCK });
  }

  #format(at, options) {
    return new Intl.DateTimeFormat(this.#t.lang, options).format(new Date(at));
  }
}

function dots() {
  return h("span.dots", { "aria-hidden": "true" }, h("i"), h("i"), h("i"));
}

function originOf(address) {
  try {
    return new URL(address).origin;
  } catch {
    return null;
  }
}

function languageName(tag) {
  try {
    return new Intl.DisplayNames([tag], { type: "language" }).of(tag);
  } catch {
    return "";
  }
}

/** `rgb` as a CSS colour, moved towards black (0) or white (255) until it has a contrast of 5:1 with `back`. */
function readable(rgb, end, back, lightness) {
  for (let part = 0; ; part += 0.04) {
    const moved = rgb.map((c) => Math.round(c + (end - c) * Math.min(1, part)));
    const [low, high] = [lightness(moved), lightness(back)].sort((x, y) => x - y);
    if ((high + 0.05) / (low + 0.05) >= 5 || part >= 1) return `rgb(${moved.join(" ")})`;
  }
}
