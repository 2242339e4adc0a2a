/*
 * The conversation in the middle: what was said, and the field to answer in. Reads the desk, asks it to act.
 */

import { cardNode } from "./parts.js";
import { h, icon, setText } from "./dom.js";
import { rowsOf } from "./frames.js";
import { button, Keyed, recall, remember, shortTime } from "./inbox_dom.js";
import { blockNode, parseMarkdown } from "./markdown.js";

const BASE = new URL(".", document.baseURI).href;

/** What a visitor is called. */
export function nameOf(card, t) {
  return card.customer?.name || card.customer?.email || card.customer?.id || `${t("visitor")} ${card.id.slice(-4)}`;
}

export class Thread {
  node;
  #o;
  #el = {};
  #rows;
  #id = null;
  #mode = "say"; // or "note"
  #suggestions = null; // {busy} | {list} | {error}
  #choice = 0; // of the canned replies
  #stick = true;
  #composing = false;

  /** @param {object} owner {desk, words: () => t, back, side, transfer, fail(error), say(text)} */
  constructor(owner) {
    this.#o = owner;
    const el = this.#el;
    el.title = h("h2", { tabindex: "-1" });
    el.state = h("p.state");
    el.actions = h("div.actions");
    el.log = h("div.log", { role: "log", tabindex: "0", "aria-live": "off" });
    el.log.addEventListener("scroll", () => (this.#stick = el.log.scrollHeight - el.log.scrollTop - el.log.clientHeight < 60), { passive: true });
    this.#rows = new Keyed(el.log);
    el.typing = h("p.typing", { role: "status" });
    el.suggestions = h("div.suggestions", { hidden: true });
    el.canned = h("ul.canned", { id: "canned", role: "listbox", hidden: true });
    el.input = h("textarea", {
      rows: 2,
      dir: "auto",
      "aria-autocomplete": "list",
      "aria-controls": "canned",
      oninput: () => this.#typed(),
      onkeydown: (event) => this.#key(event),
      oncompositionstart: () => (this.#composing = true),
      oncompositionend: () => (this.#composing = false),
      onblur: () => this.#id && this.#o.desk.typing(this.#id, false),
    });
    el.composer = h("div.composer");
    el.back = h("div.back");
    el.info = h("div.only-narrow");
    el.empty = h("div.empty");
    el.whole = h("div.whole", {}, h("header", {}, el.back, h("div.who", {}, el.title, el.state), el.actions, el.info), el.log, el.typing, el.composer);
    this.node = h("section.thread", {}, el.empty, el.whole);
    this.label();
  }

  get #t() {
    return this.#o.words();
  }

  get #card() {
    return this.#o.desk.cards.get(this.#id);
  }

  /** Everything that depends on the language alone. */
  label() {
    const t = this.#t;
    const el = this.#el;
    this.node.setAttribute("aria-label", t("conversation"));
    el.log.setAttribute("aria-label", t("conversation"));
    el.canned.setAttribute("aria-label", t("canned"));
    el.empty.replaceChildren(icon("chat"), h("p", {}, t("nothing_open")), h("p.hint", {}, t("nothing_open_hint")));
    el.back.replaceChildren(button("back", t("back"), () => this.#o.back(), { look: ".round" }));
    el.info.replaceChildren(button("info", t("details"), () => this.#o.side(), { look: ".round.only-narrow" }));
    const mode = (name) => h("button", { type: "button", onclick: () => this.setMode(name) }, t(name === "say" ? "reply" : "note"));
    el.modes = { say: mode("say"), note: mode("note") };
    el.send = h("button.primary", { type: "button", onclick: () => this.send() });
    el.suggest = button("spark", t("suggest"), () => this.suggest(), { text: true });
    el.count = h("span.count", { role: "status" });
    el.why = h("p.why");
    el.composer.replaceChildren(
      el.suggestions,
      el.canned,
      h("div.modes", { role: "group", "aria-label": t("write_as") }, el.modes.say, el.modes.note, h("span.hint", {}, t("canned_hint"))),
      el.input,
      el.why,
      h("div.send", {}, el.suggest, el.count, el.send),
    );
    this.#rows.clear();
    this.setMode(this.#mode);
  }

  open(id) {
    if (id === this.#id) return;
    if (this.#id) this.#o.desk.typing(this.#id, false);
    this.#id = id;
    this.#rows.clear();
    this.#suggestions = null;
    this.#stick = true;
    this.#el.input.value = (id && recall(`zhanggui inbox draft ${id}`, "sessionStorage")) ?? "";
    this.setMode("say");
    this.#grow();
    this.draw();
  }

  focus() {
    if (this.#card) this.#el.title.focus();
  }

  write(mode) {
    this.setMode(mode);
    this.#el.input.focus();
  }

  setMode(mode) {
    this.#mode = mode;
    this.#el.composer.classList.toggle("is-note", mode === "note");
    for (const [name, node] of Object.entries(this.#el.modes)) node.setAttribute("aria-pressed", String(name === mode));
    this.#el.input.setAttribute("aria-label", this.#t(mode === "note" ? "note_placeholder" : "reply_placeholder"));
    this.#el.input.placeholder = this.#t(mode === "note" ? "note_placeholder" : "reply_placeholder");
    this.#drawComposer();
  }

  // ------------------------------------------------------------------ what one may do

  get mine() {
    const card = this.#card;
    return card?.state === "human" && card.owner?.id === this.#o.desk.agent?.id;
  }

  /** The actions that are possible now: {name: label}. */
  get actions() {
    const card = this.#card;
    if (!card) return [];
    const { isMerchant } = this.#o.desk;
    const holds = this.mine || (card.state === "human" && isMerchant);
    return [
      card.state === "waiting" && "accept",
      card.state === "bot" && "take_over",
      holds && "transfer",
      (holds || card.state === "waiting") && "return",
      (holds || card.state === "waiting") && "close",
    ].filter(Boolean);
  }

  async act(name) {
    if (!this.actions.includes(name)) return;
    if (name === "transfer") {
      this.#o.transfer(this.#card);
      return;
    }
    const { desk, fail } = this.#o;
    const id = this.#id;
    try {
      await desk.act(name, id);
      if (name === "accept" || name === "take_over") this.write("say");
    } catch (error) {
      fail(error);
    }
  }

  async suggest() {
    const id = this.#id;
    if (!this.#card || this.#suggestions?.busy) return;
    this.#suggestions = { busy: true };
    this.#drawSuggestions();
    try {
      const { suggestions } = await this.#o.desk.act("suggest", id);
      if (id === this.#id) this.#suggestions = { list: suggestions };
    } catch (error) {
      if (id === this.#id) this.#suggestions = null;
      this.#o.fail(error);
    }
    this.#drawSuggestions();
    this.#el.suggestions.querySelector("button")?.focus();
  }

  send() {
    const { input } = this.#el;
    const text = input.value.trim();
    if (!this.#canSend) return;
    this.#o.desk.write(this.#mode, this.#id, text);
    input.value = "";
    this.#suggestions = null;
    this.#drawSuggestions();
    this.#stick = true;
    this.#typed();
    this.draw();
    input.focus();
  }

  get #left() {
    return (this.#o.desk.limits.text_chars ?? 2000) - [...this.#el.input.value.trim()].length;
  }

  get #canSend() {
    return Boolean(this.#el.input.value.trim()) && this.#left >= 0 && (this.#mode === "note" || this.mine);
  }

  // ------------------------------------------------------------------ writing

  #typed() {
    const { input } = this.#el;
    remember(`zhanggui inbox draft ${this.#id}`, input.value, "sessionStorage");
    this.#grow();
    if (this.mine && this.#mode === "say") this.#o.desk.typing(this.#id, Boolean(input.value.trim()));
    this.#choice = 0;
    this.#drawCanned();
    this.#drawComposer();
  }

  #grow() {
    const { input } = this.#el;
    input.style.height = "auto";
    input.style.height = `${Math.min(200, input.scrollHeight + 2)}px`;
  }

  /** The canned replies that fit what was typed after "/". */
  get #found() {
    const typed = /(?:^|\s)\/(\S*)$/.exec(this.#el.input.value.slice(0, this.#el.input.selectionStart));
    if (!typed) return [];
    const word = typed[1].toLowerCase();
    const { canned } = this.#o.desk;
    const fits = canned.filter((each) => `${each.shortcut} ${each.zh} ${each.en}`.toLowerCase().includes(word));
    return fits.sort((a, b) => b.shortcut.toLowerCase().startsWith(word) - a.shortcut.toLowerCase().startsWith(word)).slice(0, 6);
  }

  #textOf(each) {
    const [own, other] = this.#card?.language === "zh" ? [each.zh, each.en] : [each.en, each.zh];
    return own || other;
  }

  #take(each) {
    const { input } = this.#el;
    const end = input.selectionStart;
    const start = input.value.slice(0, end).lastIndexOf("/");
    input.setRangeText(this.#textOf(each), start, end, "end");
    input.focus();
    this.#typed();
  }

  #key(event) {
    if (event.isComposing || this.#composing || event.keyCode === 229) return;
    const found = this.#el.canned.hidden ? [] : this.#found;
    if (found.length && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      event.preventDefault();
      this.#choice = (this.#choice + (event.key === "ArrowDown" ? 1 : -1) + found.length) % found.length;
      this.#drawCanned();
    } else if (found.length && (event.key === "Enter" || event.key === "Tab") && !event.shiftKey) {
      event.preventDefault();
      this.#take(found[this.#choice]);
    } else if (event.key === "Escape" && !this.#el.canned.hidden) {
      event.stopPropagation();
      this.#el.canned.hidden = true;
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.send();
    }
  }

  // ------------------------------------------------------------------ drawing

  draw() {
    const t = this.#t;
    const el = this.#el;
    const card = this.#card;
    const view = this.#o.desk.open.get(this.#id);
    el.empty.hidden = Boolean(card);
    el.whole.hidden = !card;
    if (!card) return;
    setText(el.title, nameOf(card, t));
    const owner = card.owner ? t("with", { name: card.owner.id === this.#o.desk.agent?.id ? t("you") : card.owner.name }) : t(`state_${card.state}`);
    setText(el.state, [owner, t(card.visitor_online ? "online_now" : "offline_now")].join(" · "));
    this.#drawActions();
    const rows = view ? rowsOf(view.transcript) : [];
    const pending = this.#o.desk.pending.filter((entry) => entry.conversation === this.#id);
    this.#rows.show([
      ...rows.map((row) => ({ key: row.key, sign: [row.kind, row.seq, row.text?.length, row.rating, row.phase, Boolean(this.mine)].join(), make: () => this.#row(row) })),
      ...pending.map((entry) => ({ key: entry.id, sign: `${entry.failed} ${this.#o.desk.connection}`, make: () => this.#pending(entry) })),
    ]);
    setText(el.typing, view?.typing ? t("visitor_typing") : "");
    if (this.#stick) el.log.scrollTop = el.log.scrollHeight;
    this.#drawComposer();
  }

  #drawActions() {
    const t = this.#t;
    const { actions } = this;
    const sign = `${actions} ${t.lang}`;
    if (this.#el.actions.dataset.sign === sign) return;
    this.#el.actions.dataset.sign = sign;
    const symbols = { accept: "check", take_over: "person", transfer: "send", return: "again", close: "end" };
    this.#el.actions.replaceChildren(
      ...actions.map((name) => button(symbols[name], t(`act_${name}`), () => this.act(name), { text: true, look: name === "accept" || name === "take_over" ? ".primary" : "" })),
    );
  }

  #drawComposer() {
    const t = this.#t;
    const el = this.#el;
    const note = this.#mode === "note";
    const left = this.#left;
    el.send.disabled = !this.#canSend;
    setText(el.send, t(note ? "add_note" : "send"));
    setText(el.count, left < 200 ? t("chars_left", { n: left }) : "");
    el.suggest.hidden = note;
    setText(el.why, note || this.mine || !this.#card ? "" : t(this.#card.state === "waiting" ? "why_accept" : this.#card.state === "bot" ? "why_take_over" : "why_not_yours"));
  }

  #drawCanned() {
    const { canned, input } = this.#el;
    const found = this.#found;
    canned.hidden = found.length === 0;
    if (!found.length) {
      input.removeAttribute("aria-activedescendant");
      return;
    }
    input.setAttribute("aria-activedescendant", `canned-${this.#choice}`);
    canned.replaceChildren(
      ...found.map((each, i) =>
        h(
          "li",
          { id: `canned-${i}`, role: "option", "aria-selected": String(i === this.#choice), onmousedown: (event) => event.preventDefault(), onclick: () => this.#take(each) },
          h("b", {}, `/${each.shortcut}`),
          h("span", {}, this.#textOf(each)),
        ),
      ),
    );
  }

  #drawSuggestions() {
    const t = this.#t;
    const box = this.#el.suggestions;
    const shown = this.#suggestions;
    box.hidden = !shown;
    if (!shown) return;
    const dismiss = () => {
      this.#suggestions = null;
      this.#drawSuggestions();
      this.#el.input.focus();
    };
    const head = h("div.head", {}, h("h3", {}, t("suggestions")), button("close", t("dismiss"), dismiss, { look: ".round" }));
    if (shown.busy) box.replaceChildren(head, h("p", { role: "status" }, t("suggesting")));
    else if (!shown.list.length) box.replaceChildren(head, h("p", { role: "status" }, t("no_suggestion")));
    else {
      const use = (text) => () => {
        this.#el.input.value = text;
        this.#suggestions = null;
        this.#drawSuggestions();
        this.#typed();
        this.#el.input.focus();
      };
      box.replaceChildren(
        head,
        ...shown.list.map(({ text, citations }) =>
          h(
            "article",
            {},
            h("div.words", { dir: "auto" }, ...parseMarkdown(text).map((block) => blockNode(block, () => null))),
            h("p.from", {}, (citations ?? []).map((citation) => citation.title).join(" · ")),
            button("check", t("use"), use(text), { text: true }),
          ),
        ),
      );
    }
  }

  #row(row) {
    const t = this.#t;
    const time = row.at ? h("time", { datetime: row.at }, shortTime(row.at, t.lang)) : null;
    if (row.kind === "state") return h("p.line", {}, this.#stateText(row), " ", time);
    if (row.kind === "failed") return h("p.line", {}, t("code_interrupted"));
    if (row.role === "system") return h("p.line", {}, row.text, " ", time);
    if (row.kind === "note") {
      return h("article.row.note", {}, h("p.name", {}, icon("lock"), `${row.by?.name ?? ""} · ${t("note_hidden")}`, " ", time), h("div.bubble", { dir: "auto" }, row.text));
    }
    const who = { visitor: nameOf(this.#card, t), bot: t("bot"), agent: row.agent?.name ?? t("agent") }[row.role];
    const article = h(`article.row.${row.role}`, {}, h("p.name", {}, row.role === "bot" && icon("spark"), who, " ", time));
    if (row.attachments?.length) article.append(this.#files(row.attachments));
    if (row.text || row.kind === "live") article.append(this.#bubble(row));
    if (row.left) article.append(h("p.tags", {}, icon("mail"), h("a", { href: `mailto:${row.email}` }, row.email)));
    const cards = (row.cards ?? []).map((card) => cardNode(card, this.#cardWords, BASE, [new URL(BASE).origin])).filter(Boolean);
    if (cards.length) article.append(h("div.cards", {}, ...cards));
    article.append(...this.#sources(row));
    const tags = [row.outcome && t(`outcome_${row.outcome}`), row.finish === "abort" && t("cut_off"), row.rating && t(`rated_${row.rating}`)].filter(Boolean);
    if (tags.length) article.append(h("p.tags", {}, tags.join(" · ")));
    if (row.role === "agent" && row.seq) article.append(h("p.tags", {}, button("star", t("make_draft"), () => this.#draft(row.seq), { text: true, look: ".quiet" })));
    return article;
  }

  /** The few words cards need, in the inbox's own table. */
  get #cardWords() {
    const t = this.#t;
    return Object.assign((key, values) => t(`card_${key}`, values), { lang: t.lang, dir: t.dir });
  }

  #bubble(row) {
    const t = this.#t;
    if (row.kind === "live" && !row.text) return h("div.bubble.wait", {}, t("bot_writes"));
    if (row.role !== "bot") return h("div.bubble", { dir: "auto" }, row.text);
    return h("div.bubble", { dir: "auto" }, ...parseMarkdown(row.text).map((block) => blockNode(block, (n) => h("sup", {}, `[${n}]`))));
  }

  #sources(row) {
    const { citations = [] } = row;
    if (!citations.length) return [];
    const t = this.#t;
    return [
      h(
        "details.sources",
        {},
        h("summary", {}, t("n_sources", { n: citations.length })),
        h("ol", {}, ...citations.map((citation) => h("li", {}, h("b", {}, citation.title || citation.id), " ", h("span", {}, citation.quote ?? ""), " ", h("small", {}, citation.source ?? "")))),
      ),
    ];
  }

  #files(attachments) {
    const address = (file) => new URL(`v1/conversations/${encodeURIComponent(this.#id)}/attachments/${encodeURIComponent(file.id)}`, BASE).href;
    return h(
      "div.files",
      {},
      ...attachments.map((file) =>
        h(
          "a",
          { href: address(file), target: "_blank", rel: "noopener", download: file.kind === "image" ? null : file.name },
          file.kind === "image" ? h("img", { src: address(file), alt: file.name, loading: "lazy" }) : icon("file"),
          file.kind === "image" ? null : file.name,
        ),
      ),
    );
  }

  #pending(entry) {
    const t = this.#t;
    const note = entry.type === "note";
    const { desk } = this.#o;
    const foot = entry.failed
      ? h("p.tags.bad", {}, t(`code_${entry.failed}`) || t("code_internal"), button("again", t("try_again"), () => desk.retry(entry.id), { text: true, look: ".quiet" }), button("close", t("discard"), () => desk.discard(entry.id), { text: true, look: ".quiet" }))
      : h("p.tags", {}, t(desk.connection === "online" ? "sending" : "waits"));
    return h(`article.row.unsent.${note ? "note" : "agent"}`, {}, h("p.name", {}, note && icon("lock"), t(note ? "note_hidden" : "you")), h("div.bubble", { dir: "auto" }, entry.text), foot);
  }

  #stateText(row) {
    const t = this.#t;
    const name = row.agent?.name ?? row.by?.name ?? "";
    const said = row.state === "human" ? t("line_human", { name }) : t(`line_${row.state}`);
    const reason = row.reason ? (t(`reason_${row.reason}`) || row.reason) : "";
    return [said, row.state === "waiting" && reason, row.score && `${"★".repeat(row.score)}${row.comment ? ` ${row.comment}` : ""}`].filter(Boolean).join(" · ");
  }

  async #draft(seq) {
    const { desk, fail, say } = this.#o;
    try {
      const draft = await desk.api("POST", "drafts", { conversation: this.#id, seq });
      desk.drafts.set(draft.id, draft);
      say(this.#t("draft_made"));
    } catch (error) {
      fail(error);
    }
  }
}
