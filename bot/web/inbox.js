/*
 * The agents' page: signs in, puts the three panes together, and holds what belongs to none of them: which
 * conversation is chosen, what is unread, notifications, the keyboard. What agents and server say is desk.js's.
 */

import { Desk } from "./desk.js";
import { h } from "./dom.js";
import { chime } from "./parts.js";
import { cannedDialog, faultText, menuDialog, passwordDialog, shortcutsDialog, signInPage, transferDialog } from "./inbox_dialogs.js";
import { recall, remember } from "./inbox_dom.js";
import { Lists, TABS } from "./inbox_lists.js";
import { nameOf, Thread } from "./inbox_thread.js";
import { Side } from "./inbox_side.js";
import { loadWords } from "./words.js";

const LANGUAGES = { "zh-CN": "简体中文", "zh-TW": "繁體中文", en: "English" };
const NOTICE_MS = 6000;
const KEYS = { a: "accept", t: "transfer", b: "return", x: "close" };

const desk = new Desk();
const seen = readSeen();
let t;
let panes = null; // {lists, thread, side} while somebody is signed in
let drawing = 0;
let noticeTimer = 0;
let announcer;

const selected = () => decodeURIComponent(location.hash.slice(2)) || null;

function chosenLanguage() {
  const kept = recall("zhanggui inbox language");
  if (LANGUAGES[kept]) return kept;
  const [first = "en"] = navigator.languages;
  if (!/^zh/i.test(first)) return "en";
  return /hant|tw|hk|mo/i.test(first) ? "zh-TW" : "zh-CN";
}

async function speak(language) {
  t = await loadWords(`inbox.${language}.json`, "inbox.en.json");
  document.documentElement.lang = t.lang;
  if (panes) {
    for (const pane of Object.values(panes)) pane.label();
    draw();
  } else if (!desk.agent) showSignIn();
}

function chooseLanguage(language) {
  remember("zhanggui inbox language", language);
  return speak(language);
}

function chooseTheme(theme) {
  if (theme !== "light" && theme !== "dark") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

// ---------------------------------------------------------------------- pages

function showSignIn() {
  panes = null;
  document.title = t("inbox");
  document.body.replaceChildren(signInPage(desk, t, LANGUAGES, chooseLanguage));
  document.querySelector("input").focus();
}

function showDesk() {
  const words = () => t;
  const side = new Side({ desk, words, back: () => setPane("thread"), fail });
  const thread = new Thread({
    desk,
    words,
    back: () => (location.hash = ""),
    side: () => setPane("side"),
    transfer: (card) => transferDialog(desk, t, card),
    fail,
    say,
  });
  const lists = new Lists({ desk, words, open: choose, unread, selected, menu, say });
  panes = { lists, thread, side };
  announcer = h("div.sr", { "aria-live": "polite" });
  document.body.replaceChildren(h("main.desk", {}, h("h1.sr", {}, t("inbox")), lists.node, thread.node, side.node), announcer);
  route();
  draw();
}

/** On a phone one pane is seen at a time. */
function setPane(name) {
  document.body.dataset.pane = name;
  if (name === "side") panes.side.node.querySelector("button").focus();
  if (name === "thread") panes.thread.focus();
}

function choose(id) {
  if (selected() === id) setPane("thread");
  else location.hash = `/${encodeURIComponent(id)}`;
}

function route() {
  if (!panes) return;
  const id = selected();
  if (id) desk.follow(id);
  panes.thread.open(id);
  panes.side.open(id);
  setPane(id ? "thread" : "list");
  read();
  draw();
}

function draw() {
  if (drawing || !panes) return;
  drawing = setTimeout(() => {
    drawing = 0;
    if (!panes) return;
    followOwn();
    read();
    for (const pane of Object.values(panes)) pane.draw();
    const n = total();
    document.title = `${n ? `(${n}) ` : ""}${t("inbox")}${desk.store ? ` · ${desk.store.name}` : ""}`;
  }, 16);
}

/** One's own conversations are followed whether they are on the screen or not, so that what is unread is known. */
function followOwn() {
  const keep = new Set([selected()]);
  for (const card of desk.cards.values()) if (card.state === "human" && card.owner?.id === desk.agent?.id) keep.add(card.id);
  for (const id of [...desk.open.keys()]) if (!keep.has(id)) desk.leave(id);
  for (const id of [...keep].slice(0, desk.limits.open_conversations ?? 30)) if (id && desk.store) desk.follow(id);
}

// ---------------------------------------------------------------------- what is unread

function readSeen() {
  try {
    return JSON.parse(recall("zhanggui inbox seen")) ?? {};
  } catch {
    return {};
  }
}

function unread(id) {
  const items = desk.open.get(id)?.transcript.items ?? [];
  let n = 0;
  for (let i = items.length - 1; i >= 0 && items[i].seq > (seen[id] ?? 0); i -= 1) {
    if (items[i].kind === "message" && items[i].role !== "system") {
      if (items[i].role !== "visitor") break; // answered: read
      n += 1;
    }
  }
  return n;
}

function total() {
  let n = 0;
  for (const card of desk.cards.values()) {
    if (card.state === "waiting") n += 1;
    else if (card.state === "human" && card.owner?.id === desk.agent?.id) n += unread(card.id);
  }
  return n;
}

/** What is on the screen of somebody who looks is read. */
function read() {
  const id = selected();
  const seq = desk.open.get(id)?.transcript.lastSeq ?? 0;
  if (!id || !document.hasFocus() || document.visibilityState !== "visible" || seq <= (seen[id] ?? 0)) return;
  seen[id] = seq;
  const newest = Object.entries(seen).slice(-300); // of conversations long gone nothing is kept
  remember("zhanggui inbox seen", JSON.stringify(Object.fromEntries(newest)));
}

// ---------------------------------------------------------------------- telling

function say(text) {
  if (!panes) return;
  panes.lists.notice.textContent = text;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => (panes ? (panes.lists.notice.textContent = "") : null), NOTICE_MS);
}

function fail(error) {
  say(faultText(error, t));
}

const notifies = () => globalThis.Notification?.permission === "granted" && recall("zhanggui inbox notifications") === "on";
const sounds = () => recall("zhanggui inbox sound") === "on";

/** Tell somebody who may be looking elsewhere. */
function notify(card, text) {
  announcer.textContent = `${nameOf(card, t)}: ${text}`;
  if (document.hasFocus() && selected() === card.id) return;
  if (sounds()) chime();
  if (!notifies() || document.hasFocus()) return;
  try {
    const shown = new Notification(nameOf(card, t), { body: text, tag: card.id, icon: "favicon.svg" });
    shown.onclick = () => {
      focus();
      choose(card.id);
      shown.close();
    };
  } catch {
    // Chrome on Android knows the class but lets only service workers use it: the title's number has to do
  }
}

desk.addEventListener("card", ({ detail: { card, before } }) => {
  if (panes && card.state === "waiting" && before?.state !== "waiting") notify(card, t("someone_waits"));
});
desk.addEventListener("event", ({ detail: { conversation, frame, isNews } }) => {
  const card = desk.cards.get(conversation);
  const mine = card?.owner?.id === desk.agent?.id || conversation === selected();
  if (panes && isNews && mine && frame.kind === "message" && frame.role === "visitor") notify(card, frame.text || t("sent_file"));
});
desk.addEventListener("change", () => {
  if (panes || !desk.agent) draw();
  else showDesk();
});
desk.addEventListener("signedout", showSignIn);

// ---------------------------------------------------------------------- the agent's menu

function menu() {
  const me = desk.agents.find((agent) => agent.id === desk.agent.id);
  const state = {
    online: me?.status === "online",
    notifications: notifies(),
    sound: sounds(),
    shortcuts: shortcutsOn(),
    theme: recall("zhanggui inbox theme") ?? "auto",
  };
  menuDialog(desk, t, LANGUAGES, state, async (name, value) => {
    switch (name) {
      case "online":
        state.online = !state.online;
        desk.presence(state.online ? "online" : "away");
        return state.online;
      case "notifications":
        remember("zhanggui inbox notifications", notifies() ? "off" : "on");
        if (globalThis.Notification?.permission === "default") await Notification.requestPermission(); // this was a click
        if (globalThis.Notification?.permission !== "granted") say(t("notifications_blocked"));
        return notifies();
      case "sound":
        remember("zhanggui inbox sound", sounds() ? "off" : "on");
        if (sounds()) chime();
        return sounds();
      case "shortcuts":
        remember("zhanggui inbox shortcuts", shortcutsOn() ? "off" : "on");
        return shortcutsOn();
      case "theme":
        remember("zhanggui inbox theme", value);
        return chooseTheme(value);
      case "language":
        return chooseLanguage(value);
      case "help":
        return shortcutsDialog(t);
      case "canned":
        return cannedDialog(desk, t);
      case "password":
        return passwordDialog(desk, t, say);
      default:
        return desk.signOut().catch(fail);
    }
  });
}

// ---------------------------------------------------------------------- the keyboard

// Single letters can be turned off: speech input and some keyboards press them by accident (WCAG 2.1.4).
const shortcutsOn = () => recall("zhanggui inbox shortcuts") !== "off";

function step(by) {
  const ids = panes.lists.cards.map((card) => card.id);
  if (!ids.length) return;
  const at = ids.indexOf(selected());
  choose(ids[at < 0 ? 0 : Math.min(ids.length - 1, Math.max(0, at + by))]);
}

function onkey(event) {
  if (!panes || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (typing) panes.thread.focus();
    else if (document.body.dataset.pane !== "list") location.hash = "";
    return;
  }
  if (typing || !shortcutsOn()) return;
  const { thread, lists } = panes;
  const commands = {
    "?": () => shortcutsDialog(t),
    j: () => step(1),
    k: () => step(-1),
    r: () => thread.write("say"),
    n: () => thread.write("note"),
    s: () => thread.suggest(),
  };
  const tab = TABS[Number(event.key) - 1];
  const command = commands[event.key] ?? (KEYS[event.key] && (() => thread.act(KEYS[event.key]))) ?? (tab && (() => lists.choose(tab)));
  if (!command) return;
  event.preventDefault();
  command();
}

document.addEventListener("keydown", onkey);
addEventListener("hashchange", route);
addEventListener("focus", draw);
addEventListener("online", draw);
addEventListener("offline", draw);
setInterval(() => panes?.lists.tick(), 1000);

chooseTheme(recall("zhanggui inbox theme"));
await speak(chosenLanguage());
try {
  await desk.resume();
} catch (error) {
  const text = document.querySelector("[role=alert]");
  if (text) text.textContent = faultText(error, t);
}
