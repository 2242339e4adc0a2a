/*
 * Small tools of the inbox's views: lists whose nodes are kept, dialogs, times. Knows nothing of conversations.
 */

import { h, icon, ICONS } from "./dom.js";

Object.assign(ICONS, {
  back: "M14.5 6l-6 6 6 6",
  spark: "M12 4l1.7 5.3L19 11l-5.3 1.7L12 18l-1.7-5.3L5 11l5.3-1.7zM18.5 16v4M16.5 18h4",
  lock: "M7 11h10a1 1 0 0 1 1 1v7a1 1 0 0 1-1 1H7a1 1 0 0 1-1-1v-7a1 1 0 0 1 1-1zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  search: "M10.8 17a6.2 6.2 0 1 0 0-12.4 6.2 6.2 0 0 0 0 12.4zM15.5 15.5L20 20",
  menu: "M4 7h16M4 12h16M4 17h16",
});

/** A container whose children are made anew only where their `sign` changed, so that focus and selection stay. */
export class Keyed {
  #node;
  #known = new Map(); // key -> {sign, node}

  constructor(node) {
    this.#node = node;
  }

  /** @param {object[]} entries {key, sign, make: () => Node}, in order */
  show(entries) {
    const next = new Map();
    let at = this.#node.firstChild;
    for (const { key, sign, make } of entries) {
      const known = this.#known.get(key);
      const node = known?.sign === sign ? known.node : make();
      if (known && known.node !== node) {
        if (at === known.node) at = at.nextSibling;
        const focused = known.node.contains(document.activeElement) && (document.activeElement.dataset.focus ?? "");
        known.node.replaceWith(node);
        if (focused !== false) (node.querySelector(`[data-focus="${focused}"]`) ?? node.querySelector("button"))?.focus();
      }
      if (node === at) at = at.nextSibling;
      else this.#node.insertBefore(node, at);
      next.set(key, { sign, node });
    }
    for (const [key, { node }] of this.#known) if (!next.has(key)) node.remove();
    this.#known = next;
  }

  clear() {
    this.show([]);
  }
}

/** A button with a symbol and a name; with `text` the name is seen too. */
export function button(symbol, label, onclick, { text = false, look = "", ...more } = {}) {
  const name = text ? {} : { "aria-label": label };
  return h(`button${look}`, { type: "button", title: text ? null : label, onclick, ...name, ...more }, symbol && icon(symbol), text && h("span", {}, label));
}

/**
 * Show a modal dialog; it is gone once closed. `fill(close)` returns its children. Escape closes it, and the focus
 * goes back to where it was (the browser's own doing).
 */
export function openDialog(title, closeLabel, fill) {
  const id = `dialog-${Math.random().toString(36).slice(2)}`;
  const dialog = h("dialog", { "aria-labelledby": id });
  const close = () => dialog.close();
  dialog.append(h("header", {}, h("h2", { id }, title), button("close", closeLabel, close, { look: ".round" })), ...fill(close));
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && close());
  document.body.append(dialog);
  dialog.showModal();
  (dialog.querySelector("[autofocus]") ?? dialog).focus();
  return dialog;
}

/** A labelled field; returns {node, field}. */
export function labelled(label, field) {
  field.id ||= `field-${Math.random().toString(36).slice(2)}`;
  return { node: h("div.field", {}, h("label", { for: field.id }, label), field), field };
}

/** `at` as "14:05" today, "Mon 14:05" this week, else a date. */
export function shortTime(at, lang) {
  const date = new Date(at);
  const days = (Date.now() - date) / 86_400_000;
  const clock = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  if (date.toDateString() === new Date().toDateString()) return new Intl.DateTimeFormat(lang, clock).format(date);
  if (days < 6) return new Intl.DateTimeFormat(lang, { weekday: "short", ...clock }).format(date);
  return new Intl.DateTimeFormat(lang, { month: "short", day: "numeric" }).format(date);
}

/** Seconds since `at` as "0:42", "12:05", "3:20:11". */
export function elapsed(at) {
  const s = Math.max(0, Math.floor((Date.now() - new Date(at)) / 1000));
  const [hours, minutes, seconds] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60), s % 60];
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(seconds)}` : `${minutes}:${two(seconds)}`;
}

/** What is kept in this browser under `key`; null where nothing is, or the browser blocks it. */
export function recall(key, storage = "localStorage") {
  try {
    return globalThis[storage].getItem(key);
  } catch {
    return null;
  }
}

export function remember(key, value, storage = "localStorage") {
  try {
    globalThis[storage].setItem(key, value);
  } catch {
    // forgotten with the page
  }
}
