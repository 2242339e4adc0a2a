/*
 * Beside the conversation: who the visitor is, a summary, and what the bot's replies rest on. Reads the desk.
 */

import { h, icon } from "./dom.js";
import { button, Keyed, shortTime } from "./inbox_dom.js";

export class Side {
  node;
  #o;
  #parts;
  #id = null;
  #busy = false;

  /** @param {object} owner {desk, words: () => t, back, fail(error)} */
  constructor(owner) {
    this.#o = owner;
    this.head = h("header");
    const body = h("div.body");
    this.#parts = new Keyed(body);
    this.node = h("section.side", {}, this.head, body);
    this.label();
  }

  label() {
    const t = this.#o.words();
    this.node.setAttribute("aria-label", t("details"));
    this.head.replaceChildren(button("back", t("back"), () => this.#o.back(), { look: ".round.only-narrow" }), h("h2", {}, t("details")));
    this.#parts.clear();
  }

  open(id) {
    this.#id = id;
    this.#busy = false;
    this.#parts.clear();
    this.draw();
  }

  draw() {
    const t = this.#o.words();
    const { desk } = this.#o;
    const card = desk.cards.get(this.#id);
    const summary = desk.open.get(this.#id)?.summary;
    this.node.hidden = !card;
    if (!card) return;
    const part = (key, title, data, make) => ({
      key,
      sign: JSON.stringify([data, t.lang, this.#busy]),
      make: () => h("section", {}, h("h3", {}, title), ...make(data)),
    });
    const who = [card.customer, card.language, card.visitor_online, card.created_at, card.reason];
    const sources = this.#sources(summary);
    this.#parts.show(
      [
        part("who", t("visitor"), who, () => this.#who(card)),
        summary && part("summary", t("summary"), summary, () => this.#summary(summary)),
        sources.length && part("sources", t("bot_sources"), sources, () => [this.#list(sources)]),
      ].filter(Boolean),
    );
  }

  #who(card) {
    const t = this.#o.words();
    const reason = card.reason && (t(`reason_${card.reason}`) || card.reason);
    const facts = [
      [t("name"), card.customer?.name],
      [t("email"), card.customer?.email && h("a", { href: `mailto:${card.customer.email}` }, card.customer.email)],
      [t("customer_id"), card.customer?.id ?? t("not_identified")],
      [t("language"), t(`lang_${card.language}`)],
      [t("presence"), t(card.visitor_online ? "online_now" : "offline_now")],
      [t("began"), shortTime(card.created_at, t.lang)],
      [t("reason"), reason],
    ].filter(([, value]) => value);
    return [h("dl", {}, ...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", { dir: "auto" }, value)]))];
  }

  #summary(summary) {
    const t = this.#o.words();
    const list = (title, items) => (items?.length ? [h("h4", {}, title), h("ul", {}, ...items.map((item) => h("li", { dir: "auto" }, item)))] : []);
    return [
      summary.text && h("p.text", { dir: "auto" }, summary.text),
      ...list(t("questions"), summary.questions),
      ...list(t("unanswered"), summary.unanswered),
      ...list(t("mentioned"), summary.mentioned),
      h("p.small", {}, [t("n_messages", { n: summary.n_messages ?? 0 }), (summary.rating?.up || summary.rating?.down) && t("ratings", summary.rating)].filter(Boolean).join(" · ")),
      button("spark", t(this.#busy ? "summarizing" : "summarize"), () => this.#summarize(), { text: true, disabled: this.#busy }),
    ].filter(Boolean);
  }

  /** What the bot's replies rest on: of the summary, and of events since. */
  #sources(summary) {
    const found = new Map((summary?.sources ?? []).map((source) => [source.id, source]));
    for (const item of this.#o.desk.open.get(this.#id)?.transcript.items ?? []) {
      for (const citation of item.citations ?? []) found.set(citation.id, citation);
    }
    return [...found.values()].slice(-12);
  }

  #list(sources) {
    return h(
      "ul.sources",
      {},
      ...sources.map((source) =>
        h("li", {}, h("b", {}, icon("file"), source.title || source.id), source.quote && h("p", { dir: "auto" }, source.quote), h("small", {}, source.source ?? "")),
      ),
    );
  }

  async #summarize() {
    const id = this.#id;
    this.#busy = true;
    this.draw();
    try {
      await this.#o.desk.act("summarize", id);
    } catch (error) {
      this.#o.fail(error);
    }
    if (id !== this.#id) return;
    this.#busy = false;
    this.draw();
  }
}
