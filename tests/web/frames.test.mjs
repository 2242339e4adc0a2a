// What frames do to a transcript. Run: node --test tests/web/*.test.mjs

import assert from "node:assert/strict";
import { test } from "node:test";

import { applyFrame, emptyTranscript, rowsOf, unansweredTurn, writingTurn } from "../../bot/web/frames.js";

const WELCOME = { type: "welcome", conversation: "c1", token: "t", seq: 0, state: "bot", store: "Shop", greeting: "Hi", quick_replies: ["a"] };
const visitor = (seq, text, turn = `q${seq}`) => ({ type: "event", seq, at: "2026-11-22T03:00:00Z", kind: "message", role: "visitor", turn, text });
const bot = (seq, turn, text, more = {}) => ({ type: "event", seq, at: "2026-11-22T03:00:00Z", kind: "message", role: "bot", turn, text, ...more });
const delta = (turn, index, text) => ({ type: "delta", turn, index, text });

function after(...frames) {
  return frames.reduce(applyFrame, emptyTranscript());
}

function texts(transcript) {
  return rowsOf(transcript).map((row) => row.text ?? row.kind);
}

test("events are ordered by seq whatever order they come in, and none is there twice", () => {
  const t = after(WELCOME, bot(2, "q1", "two"), visitor(1, "one"), bot(2, "q1", "two"), visitor(3, "three"), visitor(1, "one"));
  assert.deepEqual(t.items.map((item) => item.seq), [1, 2, 3]);
  assert.equal(t.lastSeq, 3);
  assert.deepEqual(texts(t), ["one", "two", "three"]);
});

test("a repeated event returns the same transcript, so nothing is drawn", () => {
  const t = after(WELCOME, visitor(1, "one"));
  assert.equal(applyFrame(t, visitor(1, "one")), t);
});

test("deltas are appended by index", () => {
  const t = after(WELCOME, visitor(1, "q"), delta("q1", 0, "Hel"), delta("q1", 1, "lo"), delta("q1", 1, "lo"), delta("q1", 0, "Hel"));
  assert.equal(t.live.q1.text, "Hello");
  assert.equal(writingTurn(t), "q1");
});

test("a delta ahead of its turn waits for the gap to be filled", () => {
  let t = after(WELCOME, delta("q1", 0, "a"), delta("q1", 2, "c"));
  assert.equal(t.live.q1.text, "a");
  t = applyFrame(t, delta("q1", 1, "b"));
  assert.equal(t.live.q1.text, "abc");
});

test("a partial replaces the text so far, and deltas go on after it", () => {
  let t = after(WELCOME, delta("q1", 0, "old"), { type: "partial", turn: "q1", index: 6, text: "The whole so far" });
  t = [delta("q1", 6, "!!!"), delta("q1", 7, ", more")].reduce(applyFrame, t);
  assert.equal(t.live.q1.text, "The whole so far, more");
});

test("the final event replaces what was streamed, a revised one too", () => {
  const t = after(WELCOME, visitor(1, "price?"), delta("q1", 0, "It costs 99"), bot(2, "q1", "It costs ¥129", { revised: true }));
  assert.deepEqual(texts(t), ["price?", "It costs ¥129"]);
  assert.equal(rowsOf(t)[1].revised, true);
  assert.equal(writingTurn(t), null);
});

test("a late delta of a finished reply starts nothing", () => {
  const t = after(WELCOME, visitor(1, "q"), bot(2, "q1", "done"));
  assert.equal(applyFrame(t, delta("q1", 4, "late")), t);
});

test("the row of a reply keeps its key from first delta to final event", () => {
  const streaming = after(WELCOME, visitor(1, "q"), delta("q1", 0, "He"));
  const finished = applyFrame(streaming, bot(2, "q1", "Hello"));
  assert.equal(rowsOf(streaming)[1].key, rowsOf(finished)[1].key);
});

test("a question shows at once, then keeps its row when acknowledged and stored", () => {
  const ask = { type: "local.ask", id: "a1", text: "hello", at: "2026-11-22T03:00:00Z" };
  let t = after(WELCOME, ask);
  const key = rowsOf(t)[0].key;
  assert.equal(rowsOf(t)[0].sending, true);
  t = applyFrame(t, { type: "ack", id: "a1", seq: 1, duplicate: false });
  assert.deepEqual([rowsOf(t)[0].sending, rowsOf(t)[0].key], [false, key]);
  t = applyFrame(t, visitor(1, "hello"));
  assert.deepEqual(rowsOf(t).map((row) => row.key), [key]);
  assert.equal(t.pending.length, 0);
});

test("event before ack, or ack alone: the question is there once", () => {
  const ask = { type: "local.ask", id: "a1", text: "hello", at: "2026-11-22T03:00:00Z" };
  const ack = { type: "ack", id: "a1", seq: 1, duplicate: true };
  assert.deepEqual(texts(after(WELCOME, ask, visitor(1, "hello"), ack)), ["hello"]);
  assert.deepEqual(texts(after(WELCOME, ask, ack)), ["hello"]);
  // The stored text may differ (masked): the ack tells which question it was.
  assert.deepEqual(texts(after(WELCOME, ask, visitor(1, "h***o"), ack)), ["h***o"]);
});

test("an acknowledged question without event stands where its number says", () => {
  const t = after(
    WELCOME,
    { type: "local.ask", id: "a1", text: "first", at: "2026-11-22T03:00:00Z" },
    { type: "ack", id: "a1", seq: 1 },
    bot(2, "q1", "reply"),
  );
  assert.deepEqual(texts(t), ["first", "reply"]);
});

test("a failed question can be sent again, a failed turn stands at its question", () => {
  const ask = { type: "local.ask", id: "a1", text: "hello", at: "2026-11-22T03:00:00Z" };
  let t = after(WELCOME, ask, { type: "failed", id: "a1", code: "busy", message: "", retryable: true, retry_after_s: 3 });
  assert.equal(rowsOf(t)[0].failed.retry_after_s, 3);
  t = after(WELCOME, visitor(1, "q"), { type: "status", turn: "q1", phase: "thinking" }, { type: "failed", turn: "q1", code: "engine_failed", retryable: true }, visitor(2, "next"));
  assert.deepEqual(rowsOf(t).map((row) => row.kind), ["message", "failed", "message"]);
  assert.equal(writingTurn(t), null);
  t = applyFrame(t, { type: "local.regenerate", turn: "q1" });
  assert.deepEqual(rowsOf(t).map((row) => row.kind), ["message", "live", "message"]);
});

test("of several replies to one turn the last is shown; while it is written anew the old one is hidden", () => {
  let t = after(WELCOME, visitor(1, "q"), bot(2, "q1", "first"));
  t = applyFrame(t, { type: "local.regenerate", turn: "q1" });
  assert.deepEqual(rowsOf(t).map((row) => row.kind), ["message", "live"]);
  const failed = applyFrame(t, { type: "failed", turn: "q1", code: "busy", retryable: true });
  assert.deepEqual(rowsOf(failed).map((row) => row.text ?? row.kind), ["q", "failed", "first"]);
  t = [delta("q1", 0, "sec"), bot(3, "q1", "second")].reduce(applyFrame, t);
  assert.deepEqual(texts(t), ["q", "second"]);
});

test("another conversation, or a server that forgot events, begins an empty transcript and keeps unsent questions", () => {
  const t = after(WELCOME, visitor(1, "q"), visitor(2, "r"), { type: "local.ask", id: "a1", text: "unsent", at: "2026-11-22T03:00:00Z" });
  assert.deepEqual(texts(applyFrame(t, { ...WELCOME, conversation: "c2" })), ["unsent"]);
  assert.deepEqual(texts(applyFrame(t, { ...WELCOME, seq: 1 })), ["unsent"]);
  assert.deepEqual(texts(applyFrame(t, { ...WELCOME, seq: 2 })), ["q", "r", "unsent"]);
});

test("state events move the conversation, ratings mark their reply", () => {
  let t = after(WELCOME, visitor(1, "q"), bot(2, "q1", "a"), { type: "event", seq: 3, kind: "state", state: "waiting" });
  assert.equal(t.state, "waiting");
  t = applyFrame(t, { type: "event", seq: 4, kind: "rating", rated: 2, value: "up" });
  assert.equal(rowsOf(t)[1].rating, "up");
});

test("a question without reply after a resume is found", () => {
  assert.equal(unansweredTurn(after(WELCOME, visitor(1, "q"))), "q1");
  assert.equal(unansweredTurn(after(WELCOME, visitor(1, "q"), bot(2, "q1", "a"))), null);
  assert.equal(unansweredTurn(after({ ...WELCOME, state: "human" }, visitor(1, "q"))), null);
});

test("an unknown type or a strange frame changes nothing", () => {
  const t = after(WELCOME, visitor(1, "q"));
  for (const frame of [{ type: "hologram" }, {}, { type: "event" }, { type: "ack", id: "x", seq: 9 }, { type: "failed", code: "x" }]) {
    assert.equal(applyFrame(t, frame), t);
  }
});

test("transcripts are never changed in place", () => {
  const freeze = (value) => {
    if (value && typeof value === "object" && !Object.isFrozen(value)) {
      Object.freeze(value);
      Object.values(value).forEach(freeze);
    }
    return value;
  };
  let t = freeze(emptyTranscript());
  const ask = { type: "local.ask", id: "a1", text: "x", at: "2026-11-22T03:00:00Z" };
  for (const frame of [WELCOME, ask, { type: "ack", id: "a1", seq: 1 }, visitor(1, "x"), { type: "status", turn: "q1", phase: "thinking" }, delta("q1", 0, "a"),
    { type: "local.stop", turn: "q1" }, { type: "partial", turn: "q1", index: 3, text: "abc" }, bot(2, "q1", "abcd"), { type: "local.rate", seq: 2, value: "up" }]) {
    t = freeze(applyFrame(t, freeze(frame)));
    rowsOf(t);
  }
});

test("several questions with one reply: it stands under the last, and nothing is left as being written", () => {
  const begun = after(
    WELCOME,
    visitor(1, "one", "q1"),
    { type: "status", turn: "q1", phase: "searching" },
    visitor(2, "two", "q2"),
    { type: "status", turn: "q2", phase: "searching", turns: ["q1", "q2"] },
    delta("q2", 0, "Both."),
  );
  assert.deepEqual(texts(begun), ["one", "two", "Both."]);
  assert.equal(writingTurn(begun), "q2");
  const done = applyFrame(begun, bot(3, "q2", "Both.", { turns: ["q1", "q2"] }));
  assert.deepEqual([texts(done), writingTurn(done), unansweredTurn(done)], [["one", "two", "Both."], null, null]);
});

test("who is there to help: the queue moves, the agent has a name and types for a while", () => {
  const waiting = after({ ...WELCOME, human: { open: true, agents_online: true, position: null } }, { type: "event", seq: 1, kind: "state", state: "waiting", position: 2, expected_wait_s: 90 });
  assert.deepEqual([waiting.state, waiting.human.position, waiting.human.expected_wait_s], ["waiting", 2, 90]);
  const next = applyFrame(waiting, { type: "queue", position: 1, expected_wait_s: null });
  assert.deepEqual([next.human.position, next.human.expected_wait_s, next.human.open], [1, null, true]);
  const human = after(WELCOME, { type: "event", seq: 1, kind: "state", state: "human", agent: { id: "a1", name: "Li" } }, { type: "typing", role: "agent", name: "Li", on: true });
  assert.deepEqual([human.agent.name, human.agentTyping, human.human.position], ["Li", { name: "Li" }, null]);
  assert.equal(applyFrame(human, { type: "typing", role: "visitor", on: true }), human); // our own other tab
  assert.equal(applyFrame(human, { type: "event", seq: 2, kind: "message", role: "agent", text: "hi" }).agentTyping, null);
});

test("a left message and its files stay with the row until it is stored", () => {
  const attachments = [{ id: "a_1", kind: "image", name: "x.png" }];
  const [row] = rowsOf(after(WELCOME, { type: "local.ask", id: "x", text: "call me", at: "2026-11-22T03:00:00Z", email: "a@b.example", attachments }));
  assert.deepEqual([row.left, row.email, row.attachments], [true, "a@b.example", attachments]);
});
