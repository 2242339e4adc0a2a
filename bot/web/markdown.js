/*
 * The small part of Markdown that replies use, as plain objects, and as nodes without innerHTML. Whatever is not in the
 * grammar stays text, HTML and images included (a remote image would tell its server what the visitor reads).
 *
 * A block is {type, spans | items | text, raw}, a span a string or {type, spans | text | n, href?, host?}. `raw` is the
 * block's source: a streaming view keeps the nodes of blocks whose source did not change.
 */

import { h } from "./dom.js";

const BULLET = /^(\s*)[-*•]\s+(\S.*)$/;
const NUMBERED = /^(\s*)(\d{1,3})[.)、．]\s*(\S.*)$/;
const HEADING = /^#{1,6}\s+(.+?)\s*#*$/;
const QUOTED = /^>\s?(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const FENCE = /^\s*(```|~~~)/;
const MOST_DEPTH = 4;

/** Return the blocks of `text`. Linear in its length: no pattern here backtracks over more than a line. */
export function parseMarkdown(text) {
  const blocks = [];
  let lines = []; // of the open paragraph
  const flush = () => {
    if (lines.length) blocks.push({ type: "p", spans: parseInline(lines.join("\n")), raw: lines.join("\n") });
    lines = [];
  };
  const all = text.replace(/\r\n?/g, "\n").split("\n");
  for (let i = 0; i < all.length; i += 1) {
    const line = all[i];
    if (FENCE.test(line)) {
      flush();
      const fence = line.trim().slice(0, 3);
      const code = [];
      for (i += 1; i < all.length && !all[i].trim().startsWith(fence); i += 1) code.push(all[i]);
      blocks.push({ type: "code", text: code.join("\n"), raw: `${line}\n${code.join("\n")}` });
    } else if (!line.trim()) flush();
    else if (RULE.test(line)) flush();
    else if (isItem(line)) {
      flush();
      const start = i;
      const ordered = NUMBERED.test(line) && !BULLET.test(line);
      const items = [];
      for (; i < all.length; i += 1) {
        const item = parseItem(all[i]);
        if (item && (item.depth > 0 || item.ordered === ordered)) items.push(item);
        else if (!item && all[i].trim() && /^\s{2,}/.test(all[i]) && items.length) {
          items[items.length - 1].source += `\n${all[i].trim()}`; // a continued item
        } else if (!all[i].trim() && i + 1 < all.length && parseItem(all[i + 1])?.ordered === ordered) continue;
        else break;
      }
      blocks.push({
        type: ordered ? "ol" : "ul",
        start: ordered ? Number(NUMBERED.exec(line)[2]) : 1,
        items: items.map(({ source, depth }) => ({ spans: parseInline(source), depth })),
        raw: all.slice(start, i).join("\n"),
      });
      i -= 1;
    } else if (HEADING.test(line)) {
      flush();
      blocks.push({ type: "h", spans: parseInline(HEADING.exec(line)[1]), raw: line });
    } else if (QUOTED.test(line)) {
      flush();
      const quoted = [];
      for (; i < all.length && QUOTED.test(all[i]); i += 1) quoted.push(QUOTED.exec(all[i])[1]);
      i -= 1;
      blocks.push({ type: "quote", spans: parseInline(quoted.join("\n")), raw: quoted.join("\n") });
    } else lines.push(line);
  }
  flush();
  return blocks;
}

function isItem(line) {
  return parseItem(line) !== null;
}

function parseItem(line) {
  const bullet = BULLET.exec(line);
  if (bullet) return { ordered: false, depth: depthOf(bullet[1]), source: bullet[2] };
  const numbered = NUMBERED.exec(line);
  // "3.5 kg" and "10.00" begin no list: after the point there must be a space, or no digit.
  if (numbered && !/^\s*\d+[.)]\d/.test(line)) return { ordered: true, depth: depthOf(numbered[1]), source: numbered[3] };
  return null;
}

function depthOf(indent) {
  return Math.min(2, Math.floor(indent.replace(/\t/g, "    ").length / 2));
}

// Marks in the order they are tried; the longest first.
const PAIRS = [
  ["**", "b"],
  ["__", "b"],
  ["~~", "s"],
  ["*", "i"],
  ["_", "i"],
];
const URL_HERE = /^(?:https?:\/\/|mailto:)[^\s<>"'`，。；：！？、（）【】《》「」“”‘’]+/i;
const MAIL_HERE = /^[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+/;

export function parseInline(text, depth = 0) {
  const spans = [];
  let plain = "";
  const push = (span) => {
    if (plain) spans.push(plain);
    plain = "";
    spans.push(span);
  };
  let i = 0;
  while (i < text.length) {
    const char = text[i];
    const taken =
      char === "\n"
        ? { span: { type: "br" }, length: 1 }
        : char === "\\" && /[\\`*_~[\]()#+\-.!>]/.test(text[i + 1] ?? "")
          ? { span: text[i + 1], length: 2 }
          : char === "`"
            ? takeCode(text, i)
            : char === "["
              ? (takeCitation(text, i) ?? takeLink(text, i, depth))
              : char === "*" || char === "_" || char === "~"
                ? takePair(text, i, depth)
                : /[hm]/i.test(char) && !/[A-Za-z0-9]/.test(text[i - 1] ?? "")
                  ? takeUrl(text, i)
                  : null;
    const mail = !taken && /[A-Za-z0-9]/.test(char) && !/[A-Za-z0-9._%+@-]/.test(text[i - 1] ?? "") ? takeMail(text, i) : null;
    const found = taken ?? mail;
    if (!found) {
      plain += char;
      i += 1;
      continue;
    }
    if (typeof found.span === "string") plain += found.span;
    else push(found.span);
    i += found.length;
  }
  if (plain) spans.push(plain);
  return spans;
}

function takeCode(text, at) {
  const end = text.indexOf("`", at + 1);
  if (end <= at + 1) return null;
  return { span: { type: "code", text: text.slice(at + 1, end) }, length: end + 1 - at };
}

function takeCitation(text, at) {
  const match = /^\[(\d{1,2})\](?!\()/.exec(text.slice(at, at + 5));
  return match ? { span: { type: "cite", n: Number(match[1]) }, length: match[0].length } : null;
}

function takeLink(text, at, depth) {
  const close = text.indexOf("](", at);
  if (close < 0 || close - at > 300) return null;
  const end = text.indexOf(")", close);
  if (end < 0) return null;
  const link = linkTo(text.slice(close + 2, end).trim());
  if (!link || text.slice(at + 1, close).includes("\n")) return null;
  const label = text.slice(at + 1, close);
  // An image stays what it is, as text and without its address being fetched.
  if (text[at - 1] === "!") return null;
  const spans = depth < MOST_DEPTH ? parseInline(label, MOST_DEPTH) : [label];
  return { span: { type: "a", ...link, spans: withoutLinks(spans) }, length: end + 1 - at };
}

function withoutLinks(spans) {
  return spans.flatMap((span) => (span.type === "a" ? span.spans : span.type === "cite" ? [`[${span.n}]`] : [span]));
}

function takePair(text, at, depth) {
  if (depth >= MOST_DEPTH) return null;
  for (const [mark, type] of PAIRS) {
    if (!text.startsWith(mark, at)) continue;
    const from = at + mark.length;
    if (/\s/.test(text[from] ?? " ")) continue;
    // Underscores inside words and product codes are letters: QH_1001_B.
    if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[at - 1] ?? "")) continue;
    let end = text.indexOf(mark, from);
    while (end >= 0 && (/\s/.test(text[end - 1]) || (mark.length === 1 && text[end + 1] === mark))) {
      end = text.indexOf(mark, end + (text[end + 1] === mark ? 2 : 1));
    }
    // "***both***": the inner mark closes first.
    if (mark.length === 2 && text[from] === mark[0] && end >= 0 && text[end + 2] === mark[0]) end += 1;
    if (end <= from || text.slice(from, end).includes("\n\n")) continue;
    if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[end + mark.length] ?? "")) continue;
    return { span: { type, spans: parseInline(text.slice(from, end), depth + 1) }, length: end + mark.length - at };
  }
  // A run of marks that opens nothing is text as a whole; looking at each again would be quadratic.
  const run = /^[*_~]+/.exec(text.slice(at, at + 400))[0];
  return { span: run, length: run.length };
}

function takeUrl(text, at) {
  const match = URL_HERE.exec(text.slice(at, at + 2000));
  if (!match) return null;
  const address = match[0].replace(/[.,;:!?)\]}*_~]+$/, "");
  const link = linkTo(address);
  return link ? { span: { type: "a", ...link, spans: [address] }, length: address.length } : null;
}

function takeMail(text, at) {
  const match = MAIL_HERE.exec(text.slice(at, at + 256));
  if (!match) return null;
  const address = match[0].replace(/[.-]+$/, "");
  return { span: { type: "a", href: `mailto:${address}`, host: "", spans: [address] }, length: address.length };
}

/** Return {href, host} of an address people may follow, else null: http(s), mailto and tel only. */
export function linkTo(address) {
  if (/[\s\u0000-\u001f]/.test(address)) return null;
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol === "http:" || url.protocol === "https:") {
    // user:password@ in an address only ever serves to disguise the host.
    return url.username || url.password ? null : { href: url.href, host: url.host };
  }
  return url.protocol === "mailto:" || url.protocol === "tel:" ? { href: url.href, host: "" } : null;
}

/** Return the words of `text` without the marks, to be read aloud. */
export function plainText(text) {
  const words = (spans) =>
    spans.map((span) => {
      if (typeof span === "string") return span;
      if (span.type === "br") return "\n";
      if (span.type === "cite") return "";
      return span.text ?? words(span.spans);
    }).join("");
  return parseMarkdown(text)
    .map((block) => block.text ?? (block.items ? block.items.map((item) => words(item.spans)).join("\n") : words(block.spans)))
    .join("\n");
}

/** Return the node of one block. `cite(n)` returns the node of a citation mark. */
export function blockNode(block, cite) {
  switch (block.type) {
    case "code":
      return h("pre", {}, h("code", {}, block.text));
    case "ul":
    case "ol": {
      const list = h(block.type, block.type === "ol" && block.start !== 1 ? { start: block.start } : {});
      for (const item of block.items) list.append(h(item.depth ? `li.in${item.depth}` : "li", {}, ...spanNodes(item.spans, cite)));
      return list;
    }
    case "h":
      return h("p.heading", {}, ...spanNodes(block.spans, cite));
    case "quote":
      return h("blockquote", {}, ...spanNodes(block.spans, cite));
    default:
      return h("p", {}, ...spanNodes(block.spans, cite));
  }
}

const TAGS = { b: "strong", i: "em", s: "s" };

function spanNodes(spans, cite) {
  return spans.map((span) => {
    if (typeof span === "string") return document.createTextNode(span);
    switch (span.type) {
      case "br":
        return h("br");
      case "code":
        return h("code", {}, span.text);
      case "cite":
        return cite(span.n) ?? document.createTextNode(`[${span.n}]`);
      case "a": {
        const label = spanNodes(span.spans, () => null);
        const link = h("a", { href: span.href, rel: "noopener noreferrer nofollow ugc" }, ...label);
        if (span.host) link.setAttribute("target", "_blank");
        // A label may say anything: where it leads is shown too.
        const said = link.textContent;
        const where = span.host || span.href.replace(/^\w+:/, "").split("?")[0];
        if (said !== where && linkTo(said)?.host !== where) link.append(" ", h("bdi.host", {}, `(${where})`));
        return link;
      }
      default:
        return h(TAGS[span.type], {}, ...spanNodes(span.spans, cite));
    }
  });
}
