/*
 * The demo shop at `/`: a believable store around the widget. Reads /store.json (written by the server from the
 * store folder) and /readyz; works without the first, for a merchant who has no product list.
 */

import { h, setText } from "./dom.js";
import { readiness } from "./readiness.js";
import { inLanguage } from "./words.js";

const TAGS = { zh: "zh-CN", en: "en" };
const SERVER = new URL(".", import.meta.url);
const FIRST = 12; // products shown before "more"
const MORE = 24;
const POLL_MS = { starting: 2500, settled: 30_000 };

const WORDS = {
  zh: {
    skip: "跳到商品",
    nav_products: "全部商品",
    nav_promotions: "今日优惠",
    nav_demo: "关于演示",
    over: "厨房 · 床品 · 茶与咖啡 · 灯具 · 收纳",
    headline: "把日子，过得从容一点",
    lead: "经得起用的家居好物，从杭州寄到你家。满 ¥99 包邮，7 天无理由退货。",
    shop_now: "逛逛商品",
    ask_us: "问问客服",
    promotions: "今日优惠",
    until: (day) => `${day}截止`,
    code: "优惠码",
    automatic: "自动生效",
    demo_title: "这是掌柜的演示商店",
    demo_text:
      "商品、优惠和政策都是虚构的，客服是真的：右下角的助手只依据这家店的资料回答，给出来源，不知道就直说，随时可以转人工。中文英文都能聊。",
    try: "试着问问",
    products: "全部商品",
    filter: "按类别筛选",
    all: "全部",
    count: (n) => `${n} 件商品`,
    more: "显示更多",
    ask_product: "问问这款",
    about_product: (title) => `想了解一下「${title}」`,
    few: (n) => `仅剩 ${n} 件`,
    sold_out: "暂时缺货",
    empty: "这家店没有商品列表，可以直接在聊天里提问。",
    fine: "演示页面 · 由掌柜（Zhanggui）驱动的自托管双语客服",
    phone: "电话",
    email: "邮箱",
    wechat: "微信公众号",
    url: "网站",
    hours: "客服时间",
    server_ready: "聊天服务在线",
    server_wait: "正在连接服务…",
    server_bad: "聊天服务未响应，正在重试",
    index_ready: (n) => (n ? `资料库就绪 · ${n} 条` : "资料库就绪"),
    index_wait: "资料库建立中…",
    engine_ready: "AI 模型就绪",
    engine_none: "未启用 AI 模型，用审核过的答案回答",
    engine_starting: "AI 模型启动中，常见问题已可回答",
    engine_restarting: "AI 模型重启中，常见问题仍可回答",
    engine_stopped: "AI 模型已停止，常见问题仍可回答",
    generic_headline: (name) => `欢迎光临${name}`,
    store: "我们的店铺",
  },
  en: {
    skip: "Skip to products",
    nav_products: "Products",
    nav_promotions: "Offers",
    nav_demo: "About this demo",
    over: "Kitchen · Bedding · Tea & coffee · Lighting · Storage",
    headline: "Home, at an easier pace",
    lead: "Things for the house that last, sent from Hangzhou. Free delivery from ¥99, returns within 7 days.",
    shop_now: "Browse products",
    ask_us: "Ask us anything",
    promotions: "Today's offers",
    until: (day) => `until ${day}`,
    code: "Code",
    automatic: "Applied automatically",
    demo_title: "This is Zhanggui's demo store",
    demo_text:
      "Products, offers and policies are made up; the assistant is real. It answers from this store's own documents, shows its sources, says when it does not know, and hands over to a human whenever you ask. In Chinese and in English.",
    try: "Try asking",
    products: "All products",
    filter: "Filter by category",
    all: "All",
    count: (n) => (n === 1 ? "1 product" : `${n} products`),
    more: "Show more",
    ask_product: "Ask about it",
    about_product: (title) => `Tell me about the ${title}`,
    few: (n) => `Only ${n} left`,
    sold_out: "Out of stock",
    empty: "This store has no product list; just ask in the chat.",
    fine: "Demo page · self-hosted bilingual customer service by Zhanggui (掌柜)",
    phone: "Phone",
    email: "E-mail",
    wechat: "WeChat",
    url: "Website",
    hours: "Hours",
    server_ready: "Chat server online",
    server_wait: "Connecting…",
    server_bad: "Chat server does not answer; trying again",
    index_ready: (n) => (n ? `Knowledge ready · ${n} passages` : "Knowledge ready"),
    index_wait: "Building the knowledge index…",
    engine_ready: "AI model ready",
    engine_none: "No AI model: approved answers only",
    engine_starting: "AI model starting; approved answers already work",
    engine_restarting: "AI model restarting; approved answers still work",
    engine_stopped: "AI model stopped; approved answers still work",
    generic_headline: (name) => `Welcome to ${name}`,
    store: "Our store",
  },
};

const CATEGORIES = {
  kitchen: { zh: "厨房", en: "Kitchen" },
  bedding: { zh: "床品", en: "Bedding" },
  "tea-coffee": { zh: "茶与咖啡", en: "Tea & coffee" },
  lighting: { zh: "灯具", en: "Lighting" },
  storage: { zh: "收纳", en: "Storage" },
  bath: { zh: "卫浴", en: "Bath" },
  appliances: { zh: "小家电", en: "Appliances" },
  fragrance: { zh: "家居香氛", en: "Fragrance" },
};

// Beside the store's own quick replies: what shows off, and in the demo store has an answer (the last has none).
const DEMO_QUESTIONS = {
  zh: ["铸铁锅可以用洗碗机吗？", "WARM25 现在还能用吗？", "寄到德国运费多少？", "可以用比特币付款吗？"],
  en: ["Can cast iron go in the dishwasher?", "Is code WARM25 still valid?", "What does shipping to Germany cost?", "Can I pay with bitcoin?"],
};

const $ = (id) => document.getElementById(id);
const chat = () => document.querySelector("zhanggui-chat");

let language = "zh";
let store = null; // what /store.json said
let category = "all";
let shown = FIRST;
let health = { state: "wait", said: null };

const words = () => WORDS[language];
const isDemo = () => (store?.name ?? "").includes("青禾");

function chooseLanguage() {
  const asked = new URLSearchParams(location.search).get("lang");
  let kept = null;
  try {
    kept = localStorage.getItem("zhanggui page language");
  } catch {
    // blocked: the browser's language it is
  }
  return asked ?? kept ?? navigator.language;
}

function speak(wanted) {
  language = /^zh/i.test(wanted) ? "zh" : "en";
  document.documentElement.lang = TAGS[language];
  for (const node of document.querySelectorAll("[data-t]")) setText(node, words()[node.dataset.t]);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", words()[node.dataset.label]);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
  draw();
}

// ------------------------------------------------------------------ drawing

function draw() {
  const name = inLanguage(store?.names ?? store?.name, language) || words().store;
  document.title = isDemo() ? "青禾家居 Qinghe Home" : name;
  for (const id of ["name", "foot-name"]) setText($(id), name);
  setText($("over"), isDemo() ? words().over : "");
  setText($("headline"), isDemo() ? words().headline : words().generic_headline(name));
  setText($("lead"), isDemo() ? words().lead : inLanguage(store?.greeting, language));
  drawCollage();
  drawPromotions();
  drawQuestions();
  drawFilters();
  drawProducts();
  drawContact();
  drawReadiness();
}

function inThisLanguage(rows) {
  const own = (rows ?? []).filter((row) => !row.lang || row.lang === language);
  return own.length ? own : (rows ?? []); // a store with one language shows what it has
}

function picture(product) {
  if (!product.image) return null;
  return new URL(product.image, new URL("store/", SERVER)).href;
}

function drawCollage() {
  const products = inThisLanguage(store?.products).filter((product) => product.image);
  const wanted = ["QH1001", "QH1061", "QH1031"];
  const picked = wanted.map((sku) => products.find((p) => (p.sku ?? p.id).startsWith(sku))).filter(Boolean);
  for (const product of byTurns(products)) {
    if (picked.length >= 3) break;
    if (!picked.some((p) => p.category === product.category)) picked.push(product);
  }
  const sources = picked.slice(0, 3).map(picture);
  if (sources.join() === [...$("collage").children].map((image) => image.src).join()) return;
  $("collage").replaceChildren(...sources.map((src) => h("img", { src, alt: "", width: 320, height: 320 })));
}

function drawPromotions() {
  const now = Date.now();
  const valid = inThisLanguage(store?.promotions).filter(
    (p) => !(Date.parse(p.valid_from) > now) && !(Date.parse(p.valid_until) <= now),
  );
  $("promotions").hidden = valid.length === 0;
  for (const node of document.querySelectorAll("[data-needs='promotions']")) node.hidden = valid.length === 0;
  $("promotion-list").dataset.n = Math.min(valid.length, 6);
  $("promotion-list").replaceChildren(
    ...valid.slice(0, 6).map((promotion) =>
      h(
        "li",
        {},
        h("h3", {}, promotion.title),
        h("p", {}, promotion.description ?? ""),
        h(
          "p.terms",
          {},
          promotion.code ? h("span.code", {}, `${words().code} `, h("b", {}, promotion.code)) : h("span", {}, words().automatic),
          promotion.valid_until ? h("span", {}, words().until(lastDay(promotion.valid_until))) : null,
        ),
      ),
    ),
  );
}

/** The end is exclusive: what ends at midnight is last valid the day before. */
function lastDay(until) {
  const date = new Date(Date.parse(until) - 1000);
  return new Intl.DateTimeFormat(TAGS[language], { month: language === "zh" ? "long" : "short", day: "numeric", timeZone: store?.timezone }).format(date);
}

function drawQuestions() {
  const own = inLanguage(store?.quick_replies, language) || [];
  const questions = [...new Set([...own, ...(isDemo() ? DEMO_QUESTIONS[language] : [])])].slice(0, 8);
  $("questions").replaceChildren(
    ...questions.map((text) => h("button", { type: "button", onclick: () => ask(text) }, text)),
  );
  document.querySelector(".try").hidden = questions.length === 0;
}

function drawFilters() {
  const categories = [...new Set(inThisLanguage(store?.products).map((p) => p.category).filter(Boolean))];
  if (!categories.includes(category)) category = "all";
  const button = (id, label) =>
    h("button", { type: "button", "aria-pressed": String(id === category), onclick: () => filter(id) }, label);
  $("filters").hidden = categories.length < 2;
  $("filters").replaceChildren(
    button("all", words().all),
    ...categories.map((id) => button(id, CATEGORIES[id]?.[language] ?? id)),
  );
}

function filter(id) {
  category = id;
  shown = FIRST;
  const index = [...$("filters").children].findIndex((node) => node === document.activeElement);
  drawFilters();
  drawProducts();
  $("filters").children[index]?.focus();
}

/** One of each category, then the second of each …: the front of the shop shows all it has. */
function byTurns(products) {
  const shelves = new Map();
  for (const product of products) shelves.set(product.category, [...(shelves.get(product.category) ?? []), product]);
  const turns = [];
  for (let i = 0; turns.length < products.length; i += 1) for (const shelf of shelves.values()) if (shelf[i]) turns.push(shelf[i]);
  return turns;
}

function drawProducts() {
  const all = inThisLanguage(store?.products);
  const wanted = category === "all" ? byTurns(all) : all.filter((product) => product.category === category);
  $("empty").hidden = all.length > 0 || store === null;
  setText($("count"), all.length ? words().count(wanted.length) : "");
  $("grid").replaceChildren(...wanted.slice(0, shown).map(productNode));
  $("more").hidden = wanted.length <= shown;
  setText($("more"), `${words().more} (${wanted.length - Math.min(shown, wanted.length)})`);
}

function productNode(product) {
  const src = picture(product);
  const stock = Number(product.stock ?? Number.NaN);
  const state = product.stock === "" || Number.isNaN(stock) ? null : stock === 0 ? words().sold_out : stock <= 5 ? words().few(stock) : null;
  return h(
    "li",
    {},
    h(
      "div.picture",
      {},
      src ? h("img", { src, alt: "", loading: "lazy", decoding: "async", width: 320, height: 320 }) : null,
      state ? h("span.state", {}, state) : null,
    ),
    h("h3", { title: product.description ?? "" }, product.title),
    h(
      "p.buy",
      {},
      h("span.price", {}, price(product)),
      h("button", { type: "button", onclick: () => ask(words().about_product(product.title)), "aria-label": `${words().ask_product}: ${product.title}` }, words().ask_product),
    ),
  );
}

function price(product) {
  const number = Number(product.price ?? Number.NaN);
  if (product.price === "" || Number.isNaN(number)) return "";
  try {
    return new Intl.NumberFormat(TAGS[language], {
      style: "currency",
      currency: product.currency || store?.currency || "CNY",
      currencyDisplay: "narrowSymbol",
      minimumFractionDigits: Number.isInteger(number) ? 0 : 2,
    }).format(number);
  } catch {
    return `${product.currency} ${product.price}`;
  }
}

function drawContact() {
  const contact = store?.contact ?? {};
  const links = { phone: (v) => `tel:${v.replace(/[^\d+]/g, "")}`, email: (v) => `mailto:${v}` };
  const lines = ["phone", "email", "wechat"]
    .filter((key) => contact[key])
    .map((key) => h("p", {}, `${words()[key]} `, links[key] ? h("a", { href: links[key](contact[key]) }, contact[key]) : contact[key]));
  if (contact.text) lines.push(h("p", {}, contact.text));
  if (store?.business_hours && typeof store.business_hours === "string") {
    lines.push(h("p", {}, `${words().hours} ${inLanguage(store.business_hours, language)}`));
  }
  $("contact").replaceChildren(...lines);
  setText($("foot-about"), isDemo() ? words().over : "");
}

// ------------------------------------------------------------------ readiness

function drawReadiness() {
  const { state, said } = health;
  const set = (id, is, text) => {
    $(id).dataset.is = is;
    setText($(id).firstElementChild, text);
  };
  set("ready-server", state, words()[`server_${state}`]);
  $("ready-index").hidden = $("ready-engine").hidden = !said;
  if (!said) return;
  set("ready-index", said.index.ready ? "ready" : "wait", said.index.ready ? words().index_ready(said.index.n_passages) : words().index_wait);
  const { phase, detail, ready } = said.engine;
  const known = ["none", "starting", "restarting", "stopped"].includes(phase) ? phase : ready ? "ready" : "starting";
  const is = known === "none" ? "off" : known === "stopped" ? "bad" : known === "ready" ? "ready" : "wait";
  // The engine's own detail ("loading weights") is for people who look after it; it is English only.
  set("ready-engine", is, words()[`engine_${known}`] + (is === "wait" && detail && language === "en" ? ` (${detail})` : ""));
}

async function watchReadiness() {
  const said = await readiness(SERVER);
  health = { state: said ? "ready" : "bad", said };
  drawReadiness();
  const settled = said && said.index.ready && (said.engine.ready || said.engine.phase === "none");
  setTimeout(watchReadiness, settled ? POLL_MS.settled : POLL_MS.starting);
}

// ------------------------------------------------------------------ beginning

async function ask(text) {
  await customElements.whenDefined("zhanggui-chat");
  await chat()?.ask(text);
}

async function loadStore() {
  try {
    const response = await fetch(new URL("store.json", SERVER), { credentials: "omit" });
    if (response.ok) return await response.json();
  } catch {
    // no list of products: the chat works without
  }
  return {};
}

for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    try {
      localStorage.setItem("zhanggui page language", button.dataset.language);
    } catch {
      // blocked: for this page only
    }
    speak(button.dataset.language);
  });
}
$("chat").addEventListener("click", () => chat()?.open());
$("more").addEventListener("click", () => {
  const from = shown;
  shown += MORE;
  drawProducts();
  $("grid").children[from]?.querySelector("button")?.focus({ preventScroll: true });
});

speak(chooseLanguage());
watchReadiness();
store = await loadStore();
draw();
