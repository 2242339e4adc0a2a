/*
 * `<zhanggui-chat>`: the launcher button, and the door to everything else. docs/widget.md has its attributes, CSS
 * variables and methods. It imports nothing: nothing else is loaded and no socket opened before the first click, unless
 * this visitor has talked to us before (then when the page is idle, for the unread badge). No globals.
 */

const LANGUAGES = { "zh-CN": "简体中文", "zh-TW": "繁體中文", en: "English" };
const LABELS = {
  "zh-CN": ["打开客服聊天", "收起聊天窗口", "{n} 条未读"],
  "zh-TW": ["開啟客服聊天", "收合聊天視窗", "{n} 則未讀"],
  en: ["Open customer service chat", "Minimise chat", "{n} unread"],
};
const OPTIONS = ["lang", "strings", "dir", "label", "color", "position", "theme", "avatar", "greeting", "hours", "sound", "images", "server", "identity"];
const CHAT =
  "M12 3.5c-5 0-9 3.4-9 7.6 0 2.4 1.3 4.5 3.4 5.9-.1 1-.5 2.1-1.3 3.1-.2.3 0 .7.4.6 1.9-.3 3.4-1.1 4.4-1.9.7.1 1.4.2 2.1.2 5 0 9-3.4 9-7.7s-4-7.8-9-7.8z";
const DOWN = "M6 9.5l6 6 6-6";

// Constructed style sheets work under `style-src 'self'` and meet no style of the host page; `!important` of a shadow
// tree outweighs the page's own. Custom properties are not reset by `all`: they are the page's way to theme.
const LAUNCHER = `
:host { all: initial !important; display: block !important; position: fixed !important; inset: auto 0 0 auto !important;
  z-index: 2147483647 !important; --accent: var(--zhanggui-accent, #2f6f4f); --on-accent: var(--auto-on-accent, #fff);
  --side: var(--zhanggui-side, 20px); --bottom: var(--zhanggui-bottom, 20px); }
:host([hidden]) { display: none !important; }
.launcher { all: unset; position: fixed; right: calc(var(--side) + env(safe-area-inset-right));
  bottom: calc(var(--bottom) + env(safe-area-inset-bottom)); box-sizing: border-box; width: 60px; height: 60px;
  border-radius: 50%; background: var(--accent); color: var(--on-accent); display: grid; place-items: center; cursor: pointer;
  box-shadow: 0 6px 22px rgb(0 0 0 / .22), 0 2px 6px rgb(0 0 0 / .16); transition: transform .18s ease; touch-action: manipulation;
  -webkit-tap-highlight-color: transparent; }
:host([data-side="left"]) .launcher { right: auto; left: calc(var(--side) + env(safe-area-inset-left)); }
.launcher:hover { transform: translateY(-2px); }
.launcher:active { transform: scale(.96); }
.launcher:focus-visible { outline: 3px solid var(--on-accent); outline-offset: -7px; box-shadow: 0 0 0 3px var(--accent), 0 0 0 5px #fff; }
.launcher svg { width: 28px; height: 28px; fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; }
.badge { position: absolute; top: -3px; right: -3px; box-sizing: border-box; min-width: 22px; height: 22px; padding: 0 6px;
  border-radius: 11px; background: #c93a22; color: #fff; font: 600 12px/22px system-ui, sans-serif; text-align: center; box-shadow: 0 0 0 2px #fff; }
.badge[hidden] { display: none; }
@media print { :host { display: none !important; } }
@media (prefers-reduced-motion: reduce) { .launcher { transition: none; } }`;

class ZhangguiChat extends HTMLElement {
  static observedAttributes = OPTIONS.map((name) => `data-${name}`);

  #launcher = document.createElement("button");
  #drawing = shape("svg");
  #badge = document.createElement("span");
  #panel = null; // Promise of the panel, once wanted
  #loaded = null; // the panel itself
  #language = "en";
  #watcher;
  #unread = 0;

  constructor() {
    super();
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(LAUNCHER);
    const root = this.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [sheet];
    this.#drawing.setAttribute("viewBox", "0 0 24 24");
    this.#drawing.setAttribute("aria-hidden", "true");
    this.#drawing.appendChild(shape("path"));
    this.#badge.className = "badge";
    this.#badge.setAttribute("aria-hidden", "true");
    this.#launcher.type = "button";
    this.#launcher.className = "launcher";
    this.#launcher.setAttribute("aria-haspopup", "dialog");
    this.#launcher.addEventListener("click", () => this.toggle());
    this.#launcher.appendChild(this.#drawing);
    this.#launcher.appendChild(this.#badge);
    root.appendChild(this.#launcher);
  }

  connectedCallback() {
    try {
      // The top layer: above every z-index of the page, and no transform of an ancestor moves us.
      this.popover = "manual";
      this.showPopover();
    } catch {
      // an older browser: the z-index has to do
    }
    this.#paint();
    this.#speak();
    // Shops that switch language without loading a page change <html lang>; the last word wins.
    this.#watcher = new MutationObserver(() => this.choose(null));
    this.#watcher.observe(document.documentElement, { attributes: true, attributeFilter: ["lang"] });

    if (recall("sessionStorage", "zhanggui open") === "1" && !isSmall()) this.open({ focus: false }).catch(() => {});
    else if (recall("localStorage", `zhanggui ${this.socketUrl}`)?.includes('"conversation"')) {
      const idle = globalThis.requestIdleCallback ?? ((action) => setTimeout(action, 1500));
      idle(() => this.#load().then((panel) => panel.client.connect()).catch(() => {}));
    }
  }

  disconnectedCallback() {
    this.#watcher.disconnect();
    this.#loaded?.client.disconnect();
  }

  attributeChangedCallback(name) {
    if (!this.isConnected) return;
    if (name === "data-lang" || name === "data-strings" || name === "data-label") this.#speak();
    else this.#paint();
  }

  /** Where the server is; ends with "/". */
  get server() {
    const { server } = this.dataset;
    const { href } = server ? new URL(server, document.baseURI) : new URL(".", import.meta.url);
    return href.endsWith("/") ? href : `${href}/`;
  }

  get socketUrl() {
    return new URL("ws", this.server).href.replace(/^http/, "ws");
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
    remember("sessionStorage", "zhanggui open", "1");
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
    remember("sessionStorage", "zhanggui open", "0");
    this.#loaded?.hide();
    this.#label();
    if (focus) this.#launcher.focus();
  }

  async ask(text) {
    (await this.open()).ask(text);
  }

  /** Speak `language`, a key of LANGUAGES, or with null what the page says. */
  choose(language) {
    remember("localStorage", "zhanggui language", language ?? "");
    this.#speak();
  }

  set unread(n) {
    this.#unread = n;
    this.#label();
  }

  #load() {
    this.#panel ??= import("./panel.js")
      .then(({ openPanel }) => openPanel(this, TOOLS))
      .then((panel) => (this.#loaded = panel));
    return this.#panel;
  }

  #speak() {
    const { lang, strings } = this.dataset;
    const chosen = recall("localStorage", "zhanggui language");
    if (LANGUAGES[chosen]) this.#language = chosen;
    else this.#language = strings ? "custom" : pickLanguage(lang);
    this.#label();
    this.#loaded?.speak();
  }

  #label() {
    const [open, close, unread] = LABELS[this.#language] ?? LABELS.en;
    const n = this.isOpen ? 0 : this.#unread;
    const label = this.isOpen ? close : (this.dataset.label ?? open);
    this.#badge.hidden = n === 0;
    this.#badge.textContent = n > 9 ? "9+" : String(n);
    this.#launcher.setAttribute("aria-label", n ? `${label}, ${unread.replace("{n}", n)}` : label);
    this.#launcher.setAttribute("aria-expanded", String(this.isOpen));
    this.#drawing.firstChild.setAttribute("d", this.isOpen ? DOWN : CHAT);
  }

  #paint() {
    const { color, position } = this.dataset;
    const rtl = getComputedStyle(document.documentElement).direction === "rtl";
    this.dataset.side = position === "left" || (position !== "right" && rtl) ? "left" : "right";
    // Setting a property from a script is no inline style: a strict style-src allows it.
    if (color && CSS.supports("color", color)) this.style.setProperty("--zhanggui-accent", color);
    this.style.setProperty("--auto-on-accent", lightness(this.accent) > 0.183 ? "#10150f" : "#ffffff");
    this.#loaded?.paint();
  }

  /** The accent colour as [r, g, b], however it was written. */
  get accent() {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = getComputedStyle(this.#launcher).backgroundColor;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data.slice(0, 3);
  }
}

function languageOf(tag) {
  if (!tag || tag === "auto") return null;
  if (/^zh\b/i.test(tag)) return /hant|tw|hk|mo/i.test(tag) ? "zh-TW" : "zh-CN";
  return /^[a-z]/i.test(tag) ? "en" : null;
}

function pickLanguage(wanted) {
  return languageOf(wanted) ?? languageOf(document.documentElement.lang) ?? languageOf(navigator.languages[0]) ?? "en";
}

/** Relative luminance (WCAG 2.2), 0 to 1. */
function lightness(rgb) {
  const [r, g, b] = [...rgb].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function shape(name) {
  return document.createElementNS("http://www.w3.org/2000/svg", name);
}

function isSmall() {
  return matchMedia("(max-width: 560px), (max-height: 460px)").matches;
}

/** What was kept under `key`, or null; where the browser blocks storage, reading it throws. */
function recall(storage, key) {
  try {
    return globalThis[storage].getItem(key);
  } catch {
    return null;
  }
}

function remember(storage, key, value) {
  try {
    globalThis[storage].setItem(key, value);
  } catch {
    // forbidden or full: forgotten with the page
  }
}

const TOOLS = { LANGUAGES, lightness, recall, remember }; // for the panel, which imports nothing of this file

if (!customElements.get("zhanggui-chat")) {
  customElements.define("zhanggui-chat", ZhangguiChat);
  // A module has no currentScript: ours is the tag with our address.
  const tag = [...document.querySelectorAll("script[src]")].find((script) => script.src === import.meta.url);
  if (!document.querySelector("zhanggui-chat")) {
    const element = document.createElement("zhanggui-chat");
    for (const name of OPTIONS) if (tag?.dataset[name] !== undefined) element.dataset[name] = tag.dataset[name];
    document.body.appendChild(element); // module scripts run after the document is parsed
  }
}
