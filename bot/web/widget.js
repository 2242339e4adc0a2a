/*
 * `<zhanggui-chat>`: the launcher button, and the door to everything else. Installed by one script tag:
 *
 *   <script type="module" src="https://chat.example/widget.js" data-lang="auto" data-color="#2f6f4f"
 *           data-position="right"></script>
 *
 * Attributes, each optional: data-lang "auto" | "zh" | "en"; data-color, any CSS hex colour; data-position
 * "right" | "left"; data-theme "auto" | "light" | "dark"; data-server, where the chat server is if not where this
 * file came from; data-identity, the visitor's identity signed by the store.
 *
 * Nothing else is loaded and no socket opened before the first click, unless this visitor has talked to us before
 * (then when the page is idle, for the unread badge). No globals; the page may call `open()`, `close()` and
 * `ask(text)` of the element.
 */

import { h, icon } from "./dom.js";
import { pickLanguage } from "./language.js";

const LABELS = {
  zh: { open: "打开客服聊天", unread: (n) => `打开客服聊天，${n} 条未读`, close: "收起聊天窗口" },
  en: { open: "Open customer service chat", unread: (n) => `Open customer service chat, ${n} unread`, close: "Minimise chat" },
};
const OPTIONS = ["lang", "color", "position", "theme", "server", "identity"];

// Constructed style sheets work under `style-src 'self'` and meet no style of the host page.
const BASE = `
:host { all: initial; position: fixed; z-index: 2147483000; inset: auto 0 0 auto; color-scheme: light dark;
  --accent: #2f6f4f; --on-accent: #fff;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei UI", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", sans-serif;
  --bg: #f6f7f4; --surface: #fff; --ink: #1d2420; --soft: #5c665f; --line: #e1e5df; --hover: #eef1ec;
  --link: var(--link-light, #255b41); --tint: color-mix(in oklab, var(--accent) 10%, #fff);
  --bad: #a8321f; --badtint: #fcefec; --shadow: 0 24px 64px -12px rgb(20 34 26 / .28), 0 4px 16px rgb(20 34 26 / .10);
  --side: 20px; font: 400 15px/1.55 var(--font); color: var(--ink); }
:host([data-position="left"]) { inset: auto auto 0 0; }
:host([hidden]) { display: none; }
*, *::before, *::after { box-sizing: border-box; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; margin: 0; cursor: pointer;
  -webkit-tap-highlight-color: transparent; touch-action: manipulation; }
button:disabled { cursor: default; }
:focus { outline: none; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.icon { width: 20px; height: 20px; fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round;
  stroke-linejoin: round; flex: none; display: block; }
.icon.filled { fill: currentColor; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.launcher { position: fixed; right: calc(var(--side) + env(safe-area-inset-right)); bottom: calc(20px + env(safe-area-inset-bottom));
  width: 60px; height: 60px; border-radius: 50%; background: var(--accent); color: var(--on-accent); display: grid;
  place-items: center; box-shadow: 0 10px 28px -6px color-mix(in srgb, var(--accent) 60%, transparent), 0 3px 10px rgb(0 0 0 / .16);
  transition: transform .18s ease, box-shadow .18s ease; }
:host([data-position="left"]) .launcher { right: auto; left: calc(var(--side) + env(safe-area-inset-left)); }
.launcher:hover { transform: translateY(-2px); }
.launcher:active { transform: scale(.96); }
.launcher:focus-visible { outline: 3px solid var(--surface); outline-offset: -6px;
  box-shadow: 0 0 0 3px var(--link), 0 10px 28px -6px rgb(0 0 0 / .3); }
.launcher .icon { width: 28px; height: 28px; }
.launcher[aria-expanded="true"] .icon { transform: translateY(1px); }
.badge { position: absolute; top: -3px; right: -3px; min-width: 22px; height: 22px; padding: 0 6px; border-radius: 11px;
  background: #c93a22; color: #fff; font: 600 12px/22px var(--font); text-align: center; box-shadow: 0 0 0 2px #fff; }
.badge[hidden] { display: none; }
@media (prefers-color-scheme: dark) { :host(:not([data-theme="light"])) { DARK } }
:host([data-theme="dark"]) { DARK }
:host([data-theme="light"]) { color-scheme: light; }
@media print { :host { display: none; } }
@media (prefers-reduced-motion: reduce) { *, *::before, *::after { animation-duration: .01ms !important;
  animation-iteration-count: 1 !important; transition-duration: .01ms !important; scroll-behavior: auto !important; } }
`.replace(
  /\{ DARK \}/g,
  `{ color-scheme: dark; --bg: #141816; --surface: #1f2522; --ink: #e9eeea; --soft: #a3aea7; --line: #333b36; --hover: #2a322d;
  --link: var(--link-dark, #9fc9b3); --tint: color-mix(in oklab, var(--accent) 26%, #1a201d);
  --bad: #ff9c86; --badtint: #3a231e; --shadow: 0 24px 64px -12px rgb(0 0 0 / .7), 0 0 0 1px #333b36; }`,
);

class ZhangguiChat extends HTMLElement {
  static observedAttributes = OPTIONS.map((name) => `data-${name}`);

  #launcher;
  #badge;
  #panel = null; // Promise of the panel, once wanted
  #loaded = null; // the panel itself
  #language = "en";
  #chosen = null; // the visitor's own choice
  #watcher;
  #unread = 0;

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(BASE);
    root.adoptedStyleSheets = [sheet];
    this.#badge = h("span.badge", { hidden: true, "aria-hidden": "true" });
    this.#launcher = h(
      "button.launcher",
      { type: "button", "aria-haspopup": "dialog", "aria-expanded": "false", onclick: () => this.toggle() },
      icon("chat"),
      this.#badge,
    );
    root.append(this.#launcher);
  }

  connectedCallback() {
    this.#chosen = remembered(localStorageOf(), "zhanggui language");
    this.#paint();
    this.#speak();
    // Shops that switch language without loading a page change <html lang>; the last word wins.
    this.#watcher = new MutationObserver(() => {
      this.#chosen = null;
      this.#speak();
    });
    this.#watcher.observe(document.documentElement, { attributes: true, attributeFilter: ["lang"] });

    const wasOpen = remembered(sessionStorageOf(), "zhanggui open") === "1";
    if (wasOpen && !isSmall()) this.open({ focus: false });
    else if (remembered(localStorageOf(), `zhanggui ${this.socketUrl}`)?.includes('"conversation"')) {
      const idle = globalThis.requestIdleCallback ?? ((action) => setTimeout(action, 1500));
      idle(() => this.#load().then((panel) => panel.client.connect()).catch(() => {}));
    }
  }

  disconnectedCallback() {
    this.#watcher?.disconnect();
    this.#loaded?.client.disconnect();
  }

  attributeChangedCallback(name) {
    if (!this.isConnected) return;
    if (name === "data-lang") this.#speak();
    else this.#paint();
  }

  /** Where the server is: what the page says, else where this file came from. */
  get server() {
    return new URL(this.dataset.server ?? ".", this.dataset.server ? document.baseURI : import.meta.url).href;
  }

  get socketUrl() {
    const url = new URL("ws", this.server.endsWith("/") ? this.server : `${this.server}/`);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    return url.href;
  }

  get isOpen() {
    return this.hasAttribute("data-open");
  }

  get language() {
    return this.#language;
  }

  toggle() {
    if (this.isOpen) this.close();
    else this.open();
  }

  async open({ focus = true } = {}) {
    this.setAttribute("data-open", "");
    this.#launcher.setAttribute("aria-expanded", "true");
    remember(sessionStorageOf(), "zhanggui open", "1");
    this.#label();
    try {
      const panel = await this.#load();
      if (this.isOpen) panel.show({ focus });
      return panel;
    } catch (error) {
      this.close({ focus: false }); // a part did not load: the launcher stays, the next click tries again
      this.#panel = null;
      throw error;
    }
  }

  close({ focus = true } = {}) {
    this.removeAttribute("data-open");
    this.#launcher.setAttribute("aria-expanded", "false");
    remember(sessionStorageOf(), "zhanggui open", "0");
    this.#loaded?.hide();
    this.#label();
    if (focus) this.#launcher.focus();
  }

  /** Open the panel and ask `text`, as if the visitor had typed it. */
  async ask(text) {
    const panel = await this.open();
    panel.ask(text);
  }

  #load() {
    this.#panel ??= import("./panel.js").then(({ ChatPanel }) => {
      this.#loaded = new ChatPanel({
        host: this,
        server: this.server,
        socketUrl: this.socketUrl,
        identity: this.dataset.identity,
        language: this.#language,
        onclose: () => this.close(),
        onlanguage: (language) => {
          this.#chosen = language;
          remember(localStorageOf(), "zhanggui language", language);
          this.#speak();
        },
        onunread: (n) => {
          this.#unread = n;
          this.#label();
        },
      });
      return this.#loaded;
    });
    return this.#panel;
  }

  #speak() {
    const chosen = this.#chosen === "zh" || this.#chosen === "en" ? this.#chosen : null;
    this.#language = chosen ?? pickLanguage(this.dataset.lang, document.documentElement.lang, navigator.languages);
    this.#label();
    this.#loaded?.setLanguage(this.#language);
  }

  #label() {
    const labels = LABELS[this.#language];
    const n = this.isOpen ? 0 : this.#unread;
    this.#badge.hidden = n === 0;
    this.#badge.textContent = n > 9 ? "9+" : String(n);
    this.#launcher.setAttribute("aria-label", this.isOpen ? labels.close : n ? labels.unread(n) : labels.open);
    this.#launcher.querySelector(".icon").replaceWith(icon(this.isOpen ? "down" : "chat"));
  }

  #paint() {
    const color = /^#([0-9a-f]{3}|[0-9a-f]{6})$/i.test(this.dataset.color ?? "") ? this.dataset.color : null;
    if (!color) return;
    // Setting a property from a script is no inline style: a strict style-src allows it.
    this.style.setProperty("--accent", color);
    this.style.setProperty("--on-accent", lightness(rgbOf(color)) > 0.183 ? "#10150f" : "#ffffff");
    // As a text colour the merchant's colour may be too faint (yellow on white, navy on black): move it until it reads.
    this.style.setProperty("--link-light", readable(color, 0, [233, 240, 234]));
    this.style.setProperty("--link-dark", readable(color, 255, [46, 56, 50]));
  }
}

function rgbOf(hex) {
  const digits = hex.length === 4 ? [...hex.slice(1)].map((c) => c + c).join("") : hex.slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}

/** Relative luminance (WCAG 2.2), 0 to 1. */
function lightness(rgb) {
  const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** `hex`, moved towards black (0) or white (255) until it has a contrast of 5:1 with `back`. */
function readable(hex, end, back) {
  const from = rgbOf(hex);
  for (let part = 0; ; part += 0.04) {
    const rgb = from.map((c) => Math.round(c + (end - c) * Math.min(1, part)));
    const [low, high] = [lightness(rgb), lightness(back)].sort((x, y) => x - y);
    if ((high + 0.05) / (low + 0.05) >= 5 || part >= 1) return `rgb(${rgb.join(" ")})`;
  }
}

function isSmall() {
  return matchMedia("(max-width: 560px), (max-height: 460px)").matches;
}

// Reading these throws where the browser blocks them.
function localStorageOf() {
  try {
    return globalThis.localStorage;
  } catch {
    return null;
  }
}

function sessionStorageOf() {
  try {
    return globalThis.sessionStorage;
  } catch {
    return null;
  }
}

function remembered(storage, key) {
  try {
    return storage.getItem(key);
  } catch {
    return null;
  }
}

function remember(storage, key, value) {
  try {
    storage.setItem(key, value);
  } catch {
    // forbidden or full: forgotten with the page
  }
}

if (!customElements.get("zhanggui-chat")) {
  customElements.define("zhanggui-chat", ZhangguiChat);
  // A module has no currentScript: ours is the tag with our address.
  const tag = [...document.querySelectorAll("script[src]")].find((script) => script.src === import.meta.url);
  if (!document.querySelector("zhanggui-chat")) {
    const element = document.createElement("zhanggui-chat");
    for (const name of OPTIONS) if (tag?.dataset[name] !== undefined) element.dataset[name] = tag.dataset[name];
    document.body.append(element); // module scripts run after the document is parsed
  }
}
