/*
 * Cards, files, sheets, a sound: what the panel is made of besides the conversation. The inbox uses some of it too.
 * Pictures of cards come only from the chat server, the shop's page, or an origin that data-images names: a card must not
 * tell a stranger who reads it. Visitors' pictures are drawn on a canvas: a shop's `img-src` need not allow blobs.
 */

import { h, icon, setText } from "./dom.js";
import { linkTo, plainText } from "./markdown.js";

const FEW = 5;

/** The node of a card, or null for a kind nobody knows. `origins` are those pictures may come from. */
export function cardNode(card, t, server, origins) {
  if (card?.kind === "order" && card.id) return orderNode(card, t);
  return card?.title ? productNode(card, t, server, origins) : null;
}

function productNode(card, t, server, origins) {
  const link = linkTo(absolute(card.url ?? "", server));
  const picture = card.image ? linkTo(absolute(card.image, new URL("store/", server))) : null;
  const pic = h("span.pic", {}, icon("bag"));
  if (picture && origins.includes(new URL(picture.href).origin)) {
    const image = h("img", { src: picture.href, alt: "", loading: "lazy", decoding: "async", width: 76, height: 76 });
    image.addEventListener("error", () => pic.replaceChildren(icon("bag")));
    pic.replaceChildren(image);
  }
  const stock = Number.parseInt(card.stock, 10);
  const facts = h("span.facts", {}, h("span.price", {}, priceText(card.price, card.currency, t.lang)));
  if (stock === 0) facts.append(h("span.few", {}, t("out_of_stock")));
  else if (stock > 0) facts.append(h(stock <= FEW ? "span.few" : "span", {}, stock <= FEW ? t("low_stock", { n: stock }) : t("in_stock")));
  const body = h("span", {}, h("span.title", { dir: "auto" }, String(card.title)), facts);
  return link?.host
    ? h("a.card", { href: link.href, target: "_blank", rel: "noopener", "aria-label": t("view_product", { title: card.title }) }, pic, body)
    : h("div.card", {}, pic, body);
}

function orderNode(card, t) {
  const status = String(card.status ?? "");
  const facts = [
    [t("tracking"), [card.carrier, card.tracking].filter(Boolean).join(" ")],
    [t("total"), card.total ? priceText(card.total, card.currency, t.lang) : ""],
  ].filter(([, value]) => value);
  return h(
    "section.order",
    {},
    h("h3", {}, icon("truck"), h("span", {}, t("order", { id: card.id })), status && h("span.state", {}, t(`order_${status}`) || status)),
    h("ul", {}, ...(card.items ?? []).map((item) => h("li", { dir: "auto" }, String(item)))),
    h("dl", {}, ...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
  );
}

function priceText(price, currency, lang) {
  const number = Number(price);
  if (price === undefined || price === null || price === "" || Number.isNaN(number)) return String(price ?? "");
  const minimumFractionDigits = Number.isInteger(number) ? 0 : 2;
  try {
    const style = { style: "currency", currency: currency || "CNY", currencyDisplay: "narrowSymbol", minimumFractionDigits };
    return new Intl.NumberFormat(lang, style).format(number);
  } catch {
    return `${currency} ${price}`;
  }
}

function absolute(address, base) {
  try {
    return new URL(address, base).href;
  } catch {
    return "";
  }
}

const PICTURE_PX = 560; // the longer side of what is drawn; twice what is seen, for sharp screens

/** The files being added. The owner gives client, words(), say(text) for screen readers, onchange(). */
export class Tray {
  node = h("ul.tray", { hidden: true });
  #entries = []; // {file, meta?, part, failed?, aborter, node}
  #o;

  constructor(owner) {
    this.#o = owner;
  }

  get #limits() {
    return this.#o.client.transcript.limits;
  }

  get wanted() {
    return Boolean(this.#limits?.attachment_bytes);
  }

  get types() {
    return this.#limits?.attachment_types ?? [];
  }

  get ready() {
    return this.#entries.flatMap((entry) => entry.meta ?? []);
  }

  get busy() {
    return this.#entries.some((entry) => !entry.meta && !entry.failed);
  }

  clear() {
    for (const entry of [...this.#entries]) this.#remove(entry, false);
  }

  add(files) {
    const most = this.#limits.attachments ?? 5;
    for (const file of files) {
      const n = this.#entries.filter((entry) => !entry.failed).length;
      if (n >= most) this.#refuse(file, this.#o.words()("file_many", { n: most }));
      else this.#start(file);
    }
  }

  #start(file) {
    const t = this.#o.words();
    const bytes = this.#limits.attachment_bytes;
    const name = file.name || t("attachments");
    if (!this.types.includes(file.type)) this.#refuse(file, t("file_type", { name }));
    else if (file.size > bytes) this.#refuse(file, t("file_size", { name, n: Math.floor(bytes / 1048576) }));
    else {
      const aborter = new AbortController();
      const entry = { file, aborter };
      const bar = h("progress", { max: 1, value: 0, "aria-label": t("uploading", { name, n: 0 }) });
      entry.node = h("li", {}, h("span", {}, name), this.#button(entry, name), bar);
      this.#put(entry);
      const onprogress = (part) => {
        bar.value = part;
        bar.setAttribute("aria-label", t("uploading", { name, n: Math.round(part * 100) }));
      };
      this.#o.client.attach(file, { onprogress, signal: aborter.signal }).then(
        (meta) => {
          entry.meta = meta;
          bar.remove();
          this.#o.say(t("uploaded", { name }));
          this.#o.onchange();
        },
        (error) => !aborter.signal.aborted && this.#fail(entry, error, name),
      );
    }
  }

  #fail(entry, error, name) {
    const t = this.#o.words();
    const mb = Math.floor(this.#limits.attachment_bytes / 1048576);
    const said = { unsupported_file: t("file_type", { name }), too_long: t("file_size", { name, n: mb }) };
    const text = said[error.code] ?? t("file_failed", { name });
    entry.failed = text;
    const again = () => {
      this.#remove(entry, false);
      this.#start(entry.file);
    };
    const retry = error.retryable !== false && h("button", { type: "button", title: t("try_again"), "aria-label": t("try_again"), onclick: again }, icon("again"));
    entry.node.className = "bad";
    entry.node.replaceChildren(h("span", {}, text), ...(retry ? [retry] : []), this.#button(entry, name));
    this.#o.say(text);
    this.#o.onchange();
  }

  #refuse(file, text) {
    const entry = { file, failed: text };
    entry.node = h("li.bad", {}, h("span", {}, text), this.#button(entry, file.name));
    this.#put(entry);
    this.#o.say(text);
  }

  #button(entry, name) {
    const label = this.#o.words()("remove", { name });
    return h("button", { type: "button", title: label, "aria-label": label, onclick: () => this.#remove(entry, true) }, icon("close"));
  }

  #put(entry) {
    this.#entries.push(entry);
    this.node.append(entry.node);
    this.node.hidden = false;
    this.#o.onchange();
  }

  #remove(entry, byHand) {
    entry.aborter?.abort();
    this.#entries = this.#entries.filter((each) => each !== entry);
    entry.node.remove();
    this.node.hidden = this.#entries.length === 0;
    this.#o.onchange(byHand);
  }
}

/** The node of sent files; `load(id)` gives the Blob of one. */
export function filesNode(attachments, load, label) {
  return h("div.files", { role: "group", "aria-label": label }, ...attachments.map((file) => fileButton(file, load)));
}

function fileButton(file, load) {
  const size = `${Math.max(1, Math.round((file.size_bytes ?? 0) / 1024))} kB`;
  const name = h("span", {}, file.name, h("small", {}, size));
  const fetched = () => load(file.id).then((blob) => saveBlob(blob, file.name));
  const button = h("button", { type: "button", onclick: () => fetched().catch(() => setText(name, `${file.name} ⚠`)) }, icon("file"), name);
  if (file.kind === "image") drawn(file, load).then((canvas) => button.replaceChildren(canvas), () => {}); // else its name stays
  return button;
}

async function drawn(file, load) {
  const picture = await createImageBitmap(await load(file.id));
  const scale = Math.min(1, PICTURE_PX / Math.max(picture.width, picture.height));
  const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = h("canvas", { width, height, role: "img", "aria-label": file.name });
  canvas.style.width = `${Math.round(width / 2)}px`;
  canvas.getContext("2d").drawImage(picture, 0, 0, width, height);
  return canvas;
}

export function saveBlob(blob, name) {
  const href = URL.createObjectURL(blob);
  h("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

const EMAIL = /^[^\s@<>"]+@[^\s@<>"]+\.[^\s@<>".]{2,}$/;
const COMMENT_CHARS = 2000;

function sheet(title, ...children) {
  return h("div.sheet", { role: "dialog", "aria-modal": "true", "aria-labelledby": "sheet-title" }, h("h3", { id: "sheet-title" }, title), ...children);
}

function choices(no, yes, onno, onyes) {
  return h(
    "div.choices",
    {},
    h("button.pill", { type: "button", onclick: onno }, no),
    h("button.pill.primary", { type: "button", onclick: onyes }, yes),
  );
}

/** `languages`: {key, name, on, lang}; `items`: {label, symbol, act, checked?}, a switch where `checked` is given. */
export function menuSheet(t, { languages, items, onlanguage, onclose }) {
  const entries = items.map(({ label, symbol, act, checked }) => {
    const role = checked === undefined ? {} : { role: "switch", "aria-checked": String(checked) };
    const button = h("button", { type: "button", ...role }, icon(symbol), label, checked !== undefined && h("span.switch"));
    button.addEventListener("click", () => {
      const on = act();
      if (checked !== undefined) button.setAttribute("aria-checked", String(on));
    });
    return button;
  });
  const tongues = languages.map(({ key, name, on, lang }) =>
    h("button.pill", { type: "button", lang, "aria-pressed": String(on), onclick: () => onlanguage(key) }, name),
  );
  return sheet(
    t("more"),
    h("div.list", {}, ...entries),
    h("div.tongues", { role: "group", "aria-label": t("language") }, ...tongues),
    h("div.choices", {}, h("button.pill", { type: "button", onclick: onclose }, t("cancel"))),
  );
}

/** `ondone(score?, comment?)`; both may be left out. */
export function endSheet(t, { ondone, onclose }) {
  let score = 0;
  // Radio buttons as the keyboard knows them: one Tab stop, arrows move and choose.
  const stars = [1, 2, 3, 4, 5].map((n) =>
    h(
      "button",
      { type: "button", role: "radio", "aria-checked": "false", "aria-label": t("stars", { n }), tabindex: n === 1 ? 0 : -1, onclick: () => choose(score === n ? 0 : n) },
      icon("star"),
    ),
  );
  const choose = (n) => {
    score = n;
    stars.forEach((star, i) => {
      star.classList.toggle("on", i < score);
      star.setAttribute("aria-checked", String(i + 1 === score));
      star.tabIndex = i + 1 === (score || 1) ? 0 : -1;
    });
  };
  const arrows = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
  const group = h("div.stars", { role: "radiogroup", "aria-label": t("end_text") }, ...stars);
  group.addEventListener("keydown", (event) => {
    const step = arrows[event.key];
    if (!step) return;
    event.preventDefault();
    const forward = event.key.length > 8 && t.dir === "rtl" ? -step : step;
    choose(Math.min(5, Math.max(1, score + forward)));
    stars[score - 1].focus();
  });
  const comment = h("textarea", { "aria-label": t("comment"), placeholder: t("comment"), maxlength: COMMENT_CHARS });
  const done = () => ondone(score || undefined, comment.value.trim() || undefined);
  return sheet(t("end_title"), h("p", {}, t("end_text")), group, comment, choices(t("end_no"), t("end_yes"), onclose, done));
}

/** `ondone(email, text)` once both are there. */
export function leaveSheet(t, { text, maxChars, ondone, onclose }) {
  const email = h("input", { id: "leave-email", type: "email", autocomplete: "email", inputmode: "email", required: true, dir: "ltr", maxlength: 254, "aria-describedby": "leave-email-error" });
  const body = h("textarea", { id: "leave-text", required: true, maxlength: maxChars, "aria-describedby": "leave-text-error", dir: "auto" });
  body.value = text;
  const errors = [email, body].map((field) => h("p.error", { id: `${field.id}-error`, role: "alert" }));
  const done = () => {
    const faults = [EMAIL.test(email.value.trim()) ? "" : t("leave_bad_email"), body.value.trim() ? "" : t("leave_bad_text")];
    [email, body].forEach((field, i) => {
      errors[i].textContent = faults[i];
      field.setAttribute("aria-invalid", String(Boolean(faults[i])));
    });
    if (faults[0]) email.focus();
    else if (faults[1]) body.focus();
    else ondone(email.value.trim(), body.value.trim());
  };
  return sheet(
    t("leave"),
    h("p", {}, t("leave_text")),
    h("label", { for: "leave-email" }, t("leave_email")),
    email,
    errors[0],
    h("label", { for: "leave-text" }, t("leave_message")),
    body,
    errors[1],
    choices(t("cancel"), t("leave_send"), onclose, done),
  );
}

let audio = null;

/** Play the sound of a new message. Silent where the browser wants a click first. */
export function chime() {
  try {
    audio ??= new AudioContext();
    audio.resume();
    [[660, 0], [880, 0.12]].forEach(([hertz, delay_s]) => {
      const tone = audio.createOscillator();
      const volume = audio.createGain();
      const at = audio.currentTime + delay_s;
      tone.frequency.value = hertz;
      volume.gain.setValueAtTime(0, at);
      volume.gain.linearRampToValueAtTime(0.12, at + 0.02);
      volume.gain.exponentialRampToValueAtTime(0.001, at + 0.3);
      tone.connect(volume).connect(audio.destination);
      tone.start(at);
      tone.stop(at + 0.32);
    });
  } catch {
    // no sound here
  }
}

export function transcriptText(rows, t, store) {
  const time = new Intl.DateTimeFormat(t.lang, { dateStyle: "medium", timeStyle: "short" });
  const entries = rows
    .filter((row) => row.kind === "message")
    .map((row) => {
      const who = { visitor: t("you"), bot: t("assistant"), agent: row.agent?.name || t("agent") }[row.role] ?? store;
      const words = row.role === "visitor" ? row.text : plainText(row.text ?? "");
      const files = (row.attachments ?? []).map((file) => `[${file.name}]`);
      const sources = (row.citations ?? []).map((source, i) => `  [${i + 1}] ${[source.title, source.source].filter(Boolean).join(" · ")}`);
      return [`${time.format(new Date(row.at ?? Date.now()))}  ${who}`, words, ...files, ...sources].filter(Boolean).join("\n");
    });
  return `${[store, ...entries].join("\n\n")}\n`;
}
