/*
 * The lists on the left: conversations by tab, messages that were left, FAQ drafts, the search. Reads the desk.
 */

import { h, icon } from "./dom.js";
import { button, elapsed, Keyed, labelled, shortTime } from "./inbox_dom.js";
import { faultText } from "./inbox_dialogs.js";
import { nameOf } from "./inbox_thread.js";

export const TABS = ["waiting", "mine", "others", "left", "drafts", "search"];

export class Lists {
  node;
  tab = "waiting";
  #o;
  #el = {};
  #entries;
  #found = { cards: [], next: null, said: "" };

  /** @param {object} owner {desk, words: () => t, open(id), unread(id) => number, selected() => id, menu, say(text)} */
  constructor(owner) {
    this.#o = owner;
    const el = this.#el;
    el.head = h("header");
    el.tabs = h("div.tabs", { role: "group" });
    el.status = h("p.connection", { role: "status" });
    el.tools = h("div.tools");
    el.list = h("ul.cards", { id: "list" });
    el.empty = h("p.empty");
    el.notice = h("div.notice", { role: "status" });
    this.#entries = new Keyed(el.list);
    this.node = h("nav.lists", {}, el.head, el.status, el.tabs, el.tools, h("div.scroller", { tabindex: "-1" }, el.list, el.empty), el.notice);
    this.label();
  }

  get notice() {
    return this.#el.notice;
  }

  label() {
    const t = this.#o.words();
    const el = this.#el;
    this.node.setAttribute("aria-label", t("inbox"));
    el.tabs.setAttribute("aria-label", t("queues"));
    el.tabs.replaceChildren(
      ...TABS.map((name) => h("button", { type: "button", "data-tab": name, onclick: () => this.choose(name) }, h("span", {}, t(`tab_${name}`)), h("b.n"))),
    );
    el.head.replaceChildren(
      h("span.face", {}, icon("leaf")),
      (el.store = h("p.store")),
      (el.me = h("button.me", { type: "button", "aria-haspopup": "dialog", onclick: () => this.#o.menu() })),
    );
    this.#entries.clear();
    this.#found.said = "";
    this.choose(this.tab);
  }

  choose(tab) {
    this.tab = tab;
    const t = this.#o.words();
    this.#el.tools.replaceChildren(...(tab === "search" ? [this.#searchForm(t)] : []));
    this.draw();
    if (tab === "search") this.#el.tools.querySelector("input").focus();
  }

  /** The conversations of the chosen tab, as they are shown. */
  get cards() {
    return this.#cardsOf(this.tab);
  }

  #cardsOf(tab) {
    const { desk } = this.#o;
    const all = [...desk.cards.values()];
    const me = desk.agent?.id;
    const newest = (a, b) => b.last_at.localeCompare(a.last_at);
    switch (tab) {
      case "waiting":
        return all.filter((card) => card.state === "waiting").sort((a, b) => (a.position ?? 1e9) - (b.position ?? 1e9) || a.state_at.localeCompare(b.state_at));
      case "mine":
        return all.filter((card) => card.state === "human" && card.owner?.id === me).sort(newest);
      case "others":
        return all.filter((card) => (card.state === "human" && card.owner?.id !== me) || (card.state === "bot" && desk.isMerchant)).sort(newest);
      case "search":
        return this.#found.cards.map((card) => desk.cards.get(card.id) ?? card);
      default:
        return [];
    }
  }

  #counts() {
    const { desk } = this.#o;
    return {
      waiting: this.#cardsOf("waiting").length,
      mine: this.#cardsOf("mine").reduce((n, card) => n + this.#o.unread(card.id), 0) || this.#cardsOf("mine").length,
      others: this.#cardsOf("others").length,
      left: this.#leftOpen().length,
      drafts: [...desk.drafts.values()].filter((draft) => draft.status === "pending").length,
    };
  }

  #leftOpen() {
    return [...this.#o.desk.left.values()].filter((message) => !message.done_at).sort((a, b) => b.at.localeCompare(a.at));
  }

  draw() {
    const t = this.#o.words();
    const { desk } = this.#o;
    const el = this.#el;
    el.store.textContent = desk.store?.name ?? t("inbox");
    const me = desk.agents.find((agent) => agent.id === desk.agent?.id);
    const status = me?.status ?? "offline";
    el.me.replaceChildren(h("i.dot", { "data-is": status }), h("span", {}, desk.agent?.name ?? ""), h("span.sr", {}, `, ${t(`status_${status}`)}`));
    const off = desk.connection !== "online";
    el.status.hidden = !off && desk.hours?.open !== false;
    el.status.dataset.is = off ? "off" : "closed";
    el.status.textContent = off
      ? t(desk.restarting ? "restarting" : navigator.onLine === false ? "no_network" : desk.connection === "offline" ? "offline" : "connecting")
      : t("closed_now", { time: desk.hours?.opens_at ? shortTime(desk.hours.opens_at, t.lang) : "–" });
    const counts = this.#counts();
    for (const tab of el.tabs.children) {
      const { tab: name } = tab.dataset;
      const n = counts[name];
      tab.setAttribute("aria-pressed", String(name === this.tab));
      tab.lastChild.textContent = n ? String(n) : "";
      tab.lastChild.classList.toggle("hot", name === "waiting" || (name === "mine" && this.#cardsOf("mine").some((card) => this.#o.unread(card.id))));
    }
    const entries = { left: () => this.#leftEntries(t), drafts: () => this.#draftEntries(t) }[this.tab]?.() ?? this.cards.map((card) => this.#cardEntry(card, t));
    if (this.tab === "search" && this.#found.next) entries.push({ key: "more", sign: t.lang, make: () => h("li.more", {}, button("down", t("more"), () => this.#search(true), { text: true })) });
    this.#entries.show(entries);
    el.empty.hidden = entries.length > 0;
    el.empty.textContent = this.tab === "search" ? this.#found.said : t(`empty_${this.tab}`);
  }

  /** What changes by the clock alone. */
  tick() {
    for (const node of this.#el.list.querySelectorAll("[data-since]")) node.textContent = elapsed(node.dataset.since);
  }

  #cardEntry(card, t) {
    const unread = this.#o.unread(card.id);
    const selected = this.#o.selected() === card.id;
    const sign = JSON.stringify([card, unread, selected, t.lang]);
    const make = () => {
      const waits = card.state === "waiting";
      const last = card.last ? `${card.last.role === "visitor" ? "" : `${t(card.last.role === "bot" ? "bot" : "agent")}: `}${card.last.text}` : "";
      const reason = waits && card.reason ? t(`reason_${card.reason}`) || card.reason : "";
      const who = card.owner && card.owner.id !== this.#o.desk.agent?.id ? card.owner.name : "";
      return h(
        "li",
        {},
        h(
          "button.card",
          { type: "button", "data-id": card.id, "data-focus": card.id, "aria-current": selected ? "true" : null, onclick: () => this.#o.open(card.id) },
          h("span.top", {}, h("i.dot", { "data-is": card.visitor_online ? "online" : "offline" }), h("b.name", { dir: "auto" }, nameOf(card, t)), waits ? h("time.wait", { "data-since": card.state_at }, elapsed(card.state_at)) : h("time", {}, shortTime(card.last_at, t.lang))),
          h("span.last", { dir: "auto" }, last),
          h(
            "span.tags",
            {},
            waits && card.position && h("em", {}, t("position", { n: card.position })),
            reason && h("em.why", {}, reason),
            this.tab !== "waiting" && this.tab !== "mine" && h("em", {}, who || t(`state_${card.state}`)),
            card.customer && h("em", {}, t("identified")),
            h("em", {}, card.language === "zh" ? "中" : "EN"),
            unread > 0 && h("strong.unread", {}, String(unread), h("span.sr", {}, t("unread"))),
          ),
        ),
      );
    };
    return { key: card.id, sign, make };
  }

  #leftEntries(t) {
    return this.#leftOpen().map((message) => ({
      key: message.id,
      sign: JSON.stringify([message, t.lang]),
      make: () =>
        h(
          "li.paper",
          {},
          h("p.top", {}, h("a", { href: `mailto:${message.email}` }, message.email), h("time", {}, shortTime(message.at, t.lang))),
          h("p.text", { dir: "auto" }, message.text),
          h("div.choices", {}, button("chat", t("open"), () => this.#o.open(message.conversation), { text: true, look: ".quiet" }), button("check", t("done"), () => this.#done(message), { text: true })),
        ),
    }));
  }

  async #done(message) {
    const { desk, say, words } = this.#o;
    try {
      const done = await desk.api("POST", `messages/${message.id}/done`);
      desk.left.set(message.id, done);
      this.draw();
    } catch (error) {
      say(faultText(error, words()));
    }
  }

  #draftEntries(t) {
    const { desk } = this.#o;
    const pending = [...desk.drafts.values()].filter((draft) => draft.status === "pending");
    pending.sort((a, b) => b.created_at.localeCompare(a.created_at));
    return pending.map((draft) => ({ key: draft.id, sign: JSON.stringify([draft.id, t.lang, desk.isMerchant]), make: () => this.#draft(draft, t) }));
  }

  #draft(draft, t) {
    const { desk, say } = this.#o;
    const readonly = !desk.isMerchant;
    const question = labelled(t("question"), h("textarea", { rows: 2, dir: "auto", maxlength: 2000, readonly }));
    const answer = labelled(t("answer"), h("textarea", { rows: 4, dir: "auto", maxlength: 8000, readonly }));
    question.field.value = draft.question;
    answer.field.value = draft.answer;
    const decide = (how) => async () => {
      const body = how === "approve" ? { question: question.field.value.trim(), answer: answer.field.value.trim() } : {};
      try {
        const decided = await desk.api("POST", `drafts/${draft.id}/${how}`, body);
        desk.drafts.set(draft.id, decided);
        say(t(how === "approve" ? "draft_approved" : "draft_rejected"));
        this.draw();
      } catch (error) {
        say(faultText(error, t));
      }
    };
    return h(
      "li.paper",
      {},
      h("p.top", {}, h("span", {}, draft.created_by?.name ?? t("bot")), h("time", {}, shortTime(draft.created_at, t.lang))),
      question.node,
      answer.node,
      h(
        "div.choices",
        {},
        button("chat", t("open"), () => this.#o.open(draft.conversation), { text: true, look: ".quiet" }),
        !readonly && button("close", t("reject"), decide("reject"), { text: true, look: ".quiet" }),
        !readonly && button("check", t("approve"), decide("approve"), { text: true }),
      ),
      readonly && h("p.hint", {}, t("merchant_decides")),
    );
  }

  #searchForm(t) {
    const field = h("input", { type: "search", "aria-label": t("search_words"), placeholder: t("search_words"), minlength: 2, maxlength: 100 });
    const submit = (event) => {
      event.preventDefault();
      this.#search(false);
    };
    return h("form.search", { onsubmit: submit, role: "search" }, field, button("search", t("tab_search"), () => {}, { look: ".round", type: "submit" }));
  }

  async #search(more) {
    const { desk, words } = this.#o;
    const t = words();
    const q = this.#el.tools.querySelector("input").value.trim();
    if (q.length < 2) return;
    const query = new URLSearchParams({ q, limit: "30", ...(more ? { before: this.#found.next } : {}) });
    try {
      const { conversations, next } = await desk.api("GET", `conversations?${query}`);
      this.#found = { cards: more ? [...this.#found.cards, ...conversations] : conversations, next, said: conversations.length ? "" : t("nothing_found") };
    } catch (error) {
      this.#found = { cards: [], next: null, said: faultText(error, t) };
    }
    this.draw();
  }
}
