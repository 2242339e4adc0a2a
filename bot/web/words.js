/*
 * The words our pages show by themselves, from a JSON file for each language (docs/widget.md). Beside "key" may stand
 * "key_one", "key_few" …, the plural categories of Intl.PluralRules.
 */

async function loadTable(address) {
  const response = await fetch(address, { credentials: "omit" });
  if (!response.ok) throw new Error(`${address}: status ${response.status}`);
  return response.json();
}

/** Return `t(key, values?)`, with `t.lang` and `t.dir`, of the file at `address`; `fallback` has what it lacks. */
export async function loadWords(address, fallback = address) {
  const [base, own] = await Promise.all([
    loadTable(fallback),
    address === fallback ? {} : loadTable(address).catch((error) => console.warn("zhanggui: %s", error.message)),
  ]);
  return wordsOf({ ...base, ...own });
}

/** `loadWords` of a table that is here. A value that is no string counts as missing. */
export function wordsOf(table) {
  const has = (key) => Object.hasOwn(table, key) && typeof table[key] === "string";
  const lang = has("lang") ? table.lang : "en";
  const rules = new Intl.PluralRules(lang);
  const t = (key, values = {}) => {
    const counted = "n" in values ? `${key}_${rules.select(values.n)}` : key;
    const text = has(counted) ? table[counted] : has(key) ? table[key] : "";
    return text.replace(/\{(\w+)\}/g, (mark, name) => (name in values ? String(values[name]) : mark));
  };
  return Object.assign(t, { lang, dir: table.dir === "rtl" ? "rtl" : "ltr" });
}

/** `value` as the store gives it: a string or list for all languages, or {zh, en}. */
export function inLanguage(value, language) {
  if (value && typeof value === "object" && !Array.isArray(value)) {
    return value[language] ?? value[language.split("-")[0]] ?? Object.values(value)[0] ?? "";
  }
  return value ?? "";
}
