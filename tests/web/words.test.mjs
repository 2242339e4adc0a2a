// The words of the widget and the inbox: every language has every text, and a merchant's own file is only data.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";

import { inLanguage, wordsOf } from "../../bot/web/words.js";

const WEB = new URL("../../bot/web/", import.meta.url);
const table = (name) => JSON.parse(readFileSync(new URL(name, WEB), "utf8"));
const marks = (text) => [...text.matchAll(/\{(\w+)\}/g)].map((match) => match[1]).sort();

test("every language has every text, with the same places to fill in", () => {
  const files = readdirSync(WEB).filter((name) => /^(strings|inbox)\..+\.json$/.test(name));
  assert.ok(files.length >= 3);
  for (const name of files) {
    const [base] = name.split(".");
    const english = table(`${base}.en.json`);
    const own = table(name);
    const singular = (key) => /_one$/.test(key); // Chinese has none
    assert.deepEqual(Object.keys(own).filter((key) => !singular(key)), Object.keys(english).filter((key) => !singular(key)), name);
    for (const [key, text] of Object.entries(own)) {
      assert.equal(typeof text, "string", `${name} ${key}`);
      assert.deepEqual(marks(text), marks(english[key]), `${name} ${key}`);
    }
  }
});

test("every text a script asks for is there, and every text is asked for", () => {
  const scripts = readdirSync(WEB).filter((name) => name.endsWith(".js")).map((name) => [name, readFileSync(new URL(name, WEB), "utf8")]);
  for (const base of ["strings", "inbox"]) {
    const english = table(`${base}.en.json`);
    const inbox = (name) => /^(inbox|desk)/.test(name);
    const own = scripts.filter(([name]) => inbox(name) === (base === "inbox") && !/^page|^widget/.test(name)).map(([, source]) => source).join("\n");
    for (const [, key] of own.matchAll(/\b(?:t|#t|words\(\))\("([a-z_]+)"/g)) assert.ok(key in english, `${base}: ${key}`);
    const built = /^(failed|state|online|order|reason|status|code|theme|card|tab|lang|act|line|rated|key|empty|outcome)_|_one$/; // asked for by a computed name
    for (const key of Object.keys(english)) {
      if (!built.test(key)) assert.ok(own.includes(`"${key}"`) || ["lang", "dir"].includes(key), `${base}: nobody asks for ${key}`);
    }
  }
});

test("numbers choose the plural, and what is missing is empty", () => {
  const t = wordsOf({ lang: "en", left: "{n} characters left", left_one: "{n} character left", bad: 7 });
  assert.equal(t("left", { n: 1 }), "1 character left");
  assert.equal(t("left", { n: 2 }), "2 characters left");
  assert.equal(t("bad") + t("constructor") + t("nothing"), "");
  assert.deepEqual([t.lang, t.dir], ["en", "ltr"]);
  const arabic = wordsOf({ lang: "ar", dir: "rtl", left: "{n} حرف", left_few: "{n} أحرف" });
  assert.deepEqual([arabic("left", { n: 3 }), arabic("left", { n: 100 }), arabic.dir], ["3 أحرف", "100 حرف", "rtl"]);
});

test("what the store gives in several languages is taken in one", () => {
  assert.equal(inLanguage({ zh: "您好", en: "Hello" }, "zh-TW"), "您好");
  assert.equal(inLanguage({ zh: "您好", en: "Hello" }, "en"), "Hello");
  assert.deepEqual(inLanguage(["a"], "en"), ["a"]);
});
