/*
 * Which of the two languages to speak. Pure; the demo page uses it too.
 */

/** "zh" | "en" of a BCP 47 tag, or null. */
export function languageOf(tag) {
  if (!tag) return null;
  return /^zh\b/i.test(tag) ? "zh" : /^[a-z]/i.test(tag) && tag !== "auto" ? "en" : null;
}

/** The language to speak: what the merchant set, else the page's, else the browser's, else English. */
export function pickLanguage(wanted, pageLanguage, browserLanguages = []) {
  const set = wanted && wanted !== "auto" ? languageOf(wanted) : null;
  return set ?? languageOf(pageLanguage) ?? languageOf(browserLanguages[0]) ?? "en";
}

export const TAGS = { zh: "zh-CN", en: "en" };

/** `value` as the store gives it: a string or list for both languages, or {zh, en}. */
export function inLanguage(value, language) {
  if (value && typeof value === "object" && !Array.isArray(value)) return value[language] ?? Object.values(value)[0] ?? "";
  return value ?? "";
}
