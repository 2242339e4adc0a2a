// The markdown subset: what it knows, what it refuses, and that it stays fast on hostile text.

import assert from "node:assert/strict";
import { test } from "node:test";

import { linkTo, parseInline, parseMarkdown, plainText } from "../../bot/web/markdown.js";

const flat = (text) => JSON.stringify(parseInline(text));

test("bold, italics, code and line breaks, next to Chinese too", () => {
  assert.deepEqual(parseInline("满**199减30**元"), ["满", { type: "b", spans: ["199减30"] }, "元"]);
  assert.deepEqual(parseInline("*a* `b*c*`\nd"), [{ type: "i", spans: ["a"] }, " ", { type: "code", text: "b*c*" }, { type: "br" }, "d"]);
  assert.deepEqual(parseInline("***both***"), [{ type: "b", spans: [{ type: "i", spans: ["both"] }] }]);
});

test("what only looks like markdown stays text", () => {
  for (const text of ["2 * 3 * 4", "QH_1001_B and QH_1002_C", "5*", "** bold **", "a [b] c", "~ 3 kg", "[x](javascript:alert(1))", "<b>x</b>"]) {
    assert.deepEqual(parseInline(text).filter((span) => typeof span !== "string"), [], text);
    assert.equal(parseInline(text).join(""), text);
  }
});

test("links: only http, https, mailto and tel, and the host is known", () => {
  assert.deepEqual(parseInline("[shop](https://qinghe.example/p)"), [
    { type: "a", href: "https://qinghe.example/p", host: "qinghe.example", spans: ["shop"] },
  ]);
  assert.equal(parseInline("见https://qinghe.example/p。谢谢")[1].href, "https://qinghe.example/p");
  assert.equal(parseInline("(https://qinghe.example/p).")[1].href, "https://qinghe.example/p");
  assert.equal(parseInline("邮箱help@qinghe.example谢谢")[1].href, "mailto:help@qinghe.example");
  assert.equal(parseInline("[call](tel:400-820-6618)")[0].href, "tel:400-820-6618");
  for (const bad of ["javascript:alert(1)", "data:text/html,x", "vbscript:x", "file:///etc/passwd", "//evil.example", "https://good.example@evil.example/", "java\nscript:x", "blob:https://x/1"]) {
    assert.equal(linkTo(bad), null, bad);
  }
});

test("images are never made", () => {
  assert.ok(!/"img"|image/.test(flat("![x](http://evil.example/x.png)")));
  assert.equal(parseInline("![x](http://evil.example/x.png)")[0], "![x](");
});

test("citation marks are found, array-like text with a link is not one", () => {
  assert.deepEqual(parseInline("30 天 [1]。"), ["30 天 ", { type: "cite", n: 1 }, "。"]);
  assert.equal(parseInline("[1](https://a.example)")[0].type, "a");
});

test("lists, headings, quotes and fences", () => {
  const blocks = parseMarkdown("# Title\ntext\nmore\n\n- a\n  - b\n- c\n\n3. x\n4. y\n\n> q\n\n```\n**raw**\n```\nend");
  assert.deepEqual(blocks.map((b) => b.type), ["h", "p", "ul", "ol", "quote", "code", "p"]);
  assert.deepEqual(blocks[2].items.map((item) => item.depth), [0, 1, 0]);
  assert.equal(blocks[3].start, 3);
  assert.equal(blocks[5].text, "**raw**");
});

test("numbers that begin a line are not lists", () => {
  assert.deepEqual(parseMarkdown("3.5 kg\n10.00 元").map((b) => b.type), ["p"]);
  assert.deepEqual(parseMarkdown("1、打开订单\n2、申请退货").map((b) => b.type), ["ol"]);
});

test("while text streams in, finished blocks keep their source", () => {
  const whole = "First.\n\n- a\n- b\n\nLast **bold** one";
  const first = parseMarkdown(whole.slice(0, 20));
  const last = parseMarkdown(whole);
  assert.equal(first[0].raw, last[0].raw);
});

test("what is read aloud has no marks", () => {
  assert.equal(plainText("**7 天** [1]\n\n- [退货](https://a.example)"), "7 天 \n退货");
});

test("hostile text takes no time", () => {
  for (const piece of ["*", "_", "**a ", "[", "[a](", "`", "~~", "> ", "- ", "https://", "a@", "a.a@", "*_", "1. ", "***a", "![", "\\", "[1]", "**a*b_c~~"]) {
    const text = piece.repeat(8000 / piece.length);
    const start = performance.now();
    parseMarkdown(text);
    assert.ok(performance.now() - start < 1500, `${piece}: ${performance.now() - start} ms`);
  }
});
