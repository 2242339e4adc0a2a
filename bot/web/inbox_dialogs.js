/*
 * The inbox's dialogs and its sign-in page. Each asks the desk by itself; faults are shown where they were made.
 */

import { h, icon } from "./dom.js";
import { button, labelled, openDialog } from "./inbox_dom.js";

/** What to say of a refused request. */
export function faultText(error, t) {
  const text = t(`code_${error.code}`, { name: error.owner?.name ?? "" }) || t("code_internal");
  return error.retryAfter ? `${text} (${error.retryAfter} s)` : text;
}

/** The sign-in form; `onlanguage` changes the language of the page. */
export function signInPage(desk, t, languages, onlanguage) {
  const login = labelled(t("login"), h("input", { name: "login", autocomplete: "username", autocapitalize: "none", spellcheck: "false", required: true }));
  const password = labelled(t("password"), h("input", { name: "password", type: "password", autocomplete: "current-password", required: true }));
  const fault = h("p.bad", { role: "alert" });
  const go = h("button.primary", { type: "submit" }, t("sign_in"));
  const submit = async (event) => {
    event.preventDefault();
    go.disabled = true;
    fault.textContent = "";
    try {
      await desk.signIn(login.field.value.trim(), password.field.value);
    } catch (error) {
      fault.textContent = faultText(error, t);
      password.field.select();
    }
    go.disabled = false;
  };
  const form = h("form", { onsubmit: submit }, h("span.face", {}, icon("leaf")), h("h1", {}, t("inbox")), login.node, password.node, fault, go, h("p.hint", {}, t("sign_in_hint")));
  const tongues = h("div.tongues", { role: "group", "aria-label": t("language") }, ...languageButtons(languages, t.lang, onlanguage));
  return h("main.signin", {}, form, tongues);
}

function languageButtons(languages, current, onlanguage) {
  return Object.entries(languages).map(([tag, name]) => h("button", { type: "button", lang: tag, "aria-pressed": String(tag === current), onclick: () => onlanguage(tag) }, name));
}

/** The agent's own menu. `state` is {presence, sound, notifications, shortcuts, theme}; `act(name, value)` changes one. */
export function menuDialog(desk, t, languages, state, act) {
  openDialog(desk.agent.name, t("dismiss"), (close) => {
    const then = (name, value) => () => {
      close();
      act(name, value);
    };
    const flip = (name, label, symbol) => {
      const node = h("button", { type: "button", role: "switch", "aria-checked": String(state[name]) }, icon(symbol), label, h("span.switch"));
      node.addEventListener("click", async () => node.setAttribute("aria-checked", String(await act(name))));
      return node;
    };
    const theme = (name) => h("button", { type: "button", "aria-pressed": String(state.theme === name), onclick: then("theme", name) }, t(`theme_${name}`));
    return [
      h(
        "div.list",
        {},
        flip("online", t("available"), "person"),
        flip("notifications", t("notifications"), "bell"),
        flip("sound", t("sound"), "bell"),
        flip("shortcuts", t("shortcuts_on"), "check"),
        h("button", { type: "button", onclick: then("help") }, icon("info"), t("shortcuts")),
        desk.isMerchant && h("button", { type: "button", onclick: then("canned") }, icon("copy"), t("canned")),
        h("button", { type: "button", onclick: then("password") }, icon("lock"), t("change_password")),
        h("button", { type: "button", onclick: then("signout") }, icon("end"), t("sign_out")),
      ),
      h("div.tongues", { role: "group", "aria-label": t("language") }, ...languageButtons(languages, t.lang, (tag) => then("language", tag)())),
      h("div.tongues", { role: "group", "aria-label": t("theme") }, ...["auto", "light", "dark"].map(theme)),
    ];
  });
}

export const SHORTCUTS = [
  ["?", "key_help"],
  ["j / k", "key_next"],
  ["1 – 6", "key_tabs"],
  ["a", "key_accept"],
  ["r", "key_reply"],
  ["n", "key_note"],
  ["s", "key_suggest"],
  ["/", "key_canned"],
  ["t", "key_transfer"],
  ["b", "key_return"],
  ["x", "key_close"],
  ["Enter", "key_send"],
  ["Esc", "key_leave"],
];

export function shortcutsDialog(t) {
  openDialog(t("shortcuts"), t("dismiss"), () => [h("dl.keys", {}, ...SHORTCUTS.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, t(what))]))]);
}

export function transferDialog(desk, t, card) {
  openDialog(t("act_transfer"), t("dismiss"), (close) => {
    const others = desk.agents.filter((agent) => agent.id !== card.owner?.id);
    const options = [["queue", t("the_queue")], ...others.map((agent) => [agent.id, `${agent.name} · ${t(`status_${agent.status}`)}`])];
    const group = h("fieldset", {}, h("legend", {}, t("transfer_to")));
    options.forEach(([value, label], i) => group.append(h("label.choice", {}, h("input", { type: "radio", name: "to", value, checked: i === 0, autofocus: i === 0 }), label)));
    const note = labelled(t("transfer_note"), h("textarea", { rows: 3, maxlength: 2000, dir: "auto" }));
    const fault = h("p.bad", { role: "alert" });
    const go = async () => {
      const to = group.querySelector("input:checked").value;
      const text = note.field.value.trim();
      try {
        await desk.act("transfer", card.id, { to, ...(text ? { note: text } : {}) });
        close();
      } catch (error) {
        fault.textContent = faultText(error, t);
      }
    };
    return [group, note.node, fault, h("div.choices", {}, button("send", t("act_transfer"), go, { text: true, look: ".primary" }))];
  });
}

export function passwordDialog(desk, t, say) {
  openDialog(t("change_password"), t("dismiss"), (close) => {
    const old = labelled(t("password_old"), h("input", { type: "password", autocomplete: "current-password", required: true, autofocus: true }));
    const next = labelled(t("password_new"), h("input", { type: "password", autocomplete: "new-password", minlength: 10, maxlength: 200, required: true }));
    const fault = h("p.bad", { role: "alert" });
    const submit = async (event) => {
      event.preventDefault();
      try {
        await desk.api("PUT", "session/password", { old: old.field.value, new: next.field.value });
        close();
        say(t("password_changed"));
      } catch (error) {
        fault.textContent = faultText(error, t);
      }
    };
    return [h("form", { onsubmit: submit }, old.node, next.node, h("p.hint", {}, t("password_hint")), fault, h("div.choices", {}, h("button.primary", { type: "submit" }, t("save"))))];
  });
}

/** The canned replies, for merchants: one form for each, and an empty one. */
export function cannedDialog(desk, t) {
  openDialog(t("canned"), t("dismiss"), () => {
    const box = h("div.cannedlist");
    const draw = () => box.replaceChildren(...[{ shortcut: "", zh: "", en: "" }, ...desk.canned].map((each) => cannedForm(desk, t, each, draw)));
    draw();
    return [box];
  });
}

function cannedForm(desk, t, each, redraw) {
  const shortcut = labelled(t("shortcut"), h("input", { value: each.shortcut, maxlength: 40, required: true, pattern: "\\S+", autocapitalize: "none" }));
  const zh = labelled(t("lang_zh"), h("textarea", { rows: 2, maxlength: 2000, lang: "zh" }));
  const en = labelled(t("lang_en"), h("textarea", { rows: 2, maxlength: 2000, lang: "en" }));
  zh.field.value = each.zh;
  en.field.value = each.en;
  const fault = h("p.bad", { role: "alert" });
  const run = async (method) => {
    const body = { shortcut: shortcut.field.value.trim(), zh: zh.field.value.trim(), en: en.field.value.trim() };
    try {
      await desk.api(method, each.id ? `canned/${each.id}` : "canned", method === "DELETE" ? undefined : body);
      await desk.reload();
      redraw();
    } catch (error) {
      fault.textContent = faultText(error, t);
    }
  };
  const submit = (event) => {
    event.preventDefault();
    run(each.id ? "PUT" : "POST");
  };
  const drop = each.id && button("close", t("discard"), () => run("DELETE"), { text: true, look: ".quiet" });
  return h("form", { onsubmit: submit }, shortcut.node, zh.node, en.node, fault, h("div.choices", {}, drop, h("button.primary", { type: "submit" }, t(each.id ? "save" : "add"))));
}
