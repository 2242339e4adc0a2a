// The protocol client against a socket that is a plain object: no network, no browser.

import assert from "node:assert/strict";
import { test } from "node:test";

import { backoffMs, ChatClient } from "../../bot/web/client.js";

class FakeSocket {
  sent = [];
  closed = false;
  send(text) {
    if (this.closed) throw new Error("closed");
    this.sent.push(JSON.parse(text));
  }
  close() {
    this.closed = true;
  }
  receive(frame) {
    this.onmessage({ data: typeof frame === "string" ? frame : JSON.stringify(frame) });
  }
  cut() {
    this.closed = true;
    this.onclose?.({});
  }
}

function harness(context, saved = {}) {
  context.mock.timers.enable({ apis: ["setTimeout", "Date"] });
  const sockets = [];
  const disk = { value: saved };
  const store = { load: () => structuredClone(disk.value), save: (value) => (disk.value = structuredClone(value)) };
  const client = new ChatClient({
    url: "ws://x/ws",
    locale: "en",
    store,
    random: () => 0.5,
    makeSocket: () => {
      const socket = new FakeSocket();
      sockets.push(socket);
      return socket;
    },
  });
  const open = (frame = {}) => {
    const socket = sockets.at(-1);
    socket.onopen();
    socket.receive({ type: "welcome", conversation: "c1", token: "s3cret", seq: 0, state: "bot", ...frame });
    return socket;
  };
  return { client, sockets, disk, open, tick: (ms) => context.mock.timers.tick(ms), store };
}

test("says hello, keeps conversation and token, and resumes after the last event", (context) => {
  const { client, sockets, disk, open, tick } = harness(context);
  client.connect();
  const first = open();
  assert.deepEqual(first.sent[0], { type: "hello", protocol: 1, locale: "en" });
  assert.equal(client.connection, "online");
  assert.equal(disk.value.token, "s3cret");
  first.receive({ type: "event", seq: 1, kind: "message", role: "bot", turn: "t", text: "hi" });
  first.cut();
  assert.equal(client.connection, "connecting");
  tick(1000);
  sockets[1].onopen();
  assert.deepEqual(sockets[1].sent[0], { type: "hello", protocol: 1, conversation: "c1", token: "s3cret", after: 1, locale: "en" });
});

test("a question goes out again under the same id until it is acknowledged", (context) => {
  const { client, open, tick } = harness(context);
  client.connect();
  const first = open();
  const id = client.ask("hello");
  assert.deepEqual(first.sent.at(-1), { type: "ask", id, text: "hello" });
  first.cut();
  tick(1000);
  const second = open();
  assert.deepEqual(second.sent.at(-1), { type: "ask", id, text: "hello" });
  second.receive({ type: "ack", id, seq: 1, duplicate: true });
  second.cut();
  tick(1000);
  assert.deepEqual(open({ seq: 1 }).sent.map((frame) => frame.type), ["hello"]);
});

test("a question asked offline, or before a reload, is sent once there is a connection", (context) => {
  const { client, disk, store } = harness(context);
  client.connect();
  const id = client.ask("kept over a reload");
  client.disconnect();
  assert.deepEqual(disk.value.asks.map((ask) => ask.id), [id]);
  const sockets = [];
  const reloaded = new ChatClient({ url: "ws://x/ws", store, makeSocket: () => (sockets.push(new FakeSocket()), sockets.at(-1)) });
  reloaded.connect();
  sockets[0].onopen();
  sockets[0].receive({ type: "welcome", conversation: "c1", token: "t", seq: 0 });
  assert.equal(sockets[0].sent.at(-1).id, id);
  sockets[0].receive({ type: "ack", id, seq: 1 });
  assert.deepEqual(disk.value.asks, []);
  reloaded.disconnect();
});

test("an unanswered question makes a new connection after a while", (context) => {
  const { client, sockets, open, tick } = harness(context);
  client.connect();
  open();
  client.ask("anyone?");
  tick(15_000);
  tick(1000);
  assert.equal(sockets.length, 2);
});

test("pings every 25 s, and takes silence for a dead connection", (context) => {
  const { client, sockets, open, tick } = harness(context);
  client.connect();
  const socket = open();
  tick(25_000);
  assert.equal(socket.sent.at(-1).type, "ping");
  socket.receive({ type: "pong" });
  tick(25_000);
  assert.equal(socket.sent.filter((frame) => frame.type === "ping").length, 2);
  tick(8000);
  assert.equal(socket.closed, true);
  tick(1000);
  assert.equal(sockets.length, 2);
});

test("the delay grows, is half random, and never passes 30 s", () => {
  assert.deepEqual([0, 1, 2, 3].map((n) => backoffMs(n, () => 1)), [500, 1000, 2000, 4000]);
  assert.deepEqual([0, 1, 2, 3].map((n) => backoffMs(n, () => 0)), [250, 500, 1000, 2000]);
  assert.equal(backoffMs(50, () => 1), 30_000);
});

test("shows offline after the second failed try, and goes on trying", (context) => {
  const { client, sockets, tick } = harness(context);
  client.connect();
  sockets[0].cut();
  assert.equal(client.connection, "connecting");
  tick(1000);
  sockets[1].cut();
  assert.equal(client.connection, "offline");
  for (let i = 0; i < 20; i += 1) {
    tick(30_000);
    sockets.at(-1).cut();
  }
  assert.equal(sockets.length, 22);
});

test("an unknown conversation is forgotten, and unsent questions go to the new one", (context) => {
  const { client, sockets, disk, open } = harness(context, { conversation: "gone", token: "old", seen: 7 });
  client.connect();
  const id = client.ask("still here");
  sockets[0].onopen();
  assert.equal(sockets[0].sent[0].conversation, "gone");
  sockets[0].receive({ type: "failed", code: "unknown_conversation", message: "no", retryable: false });
  const second = open({ conversation: "c2" });
  assert.equal(second.sent[0].conversation, undefined);
  assert.equal(second.sent.at(-1).id, id);
  assert.deepEqual([disk.value.conversation, disk.value.seen], ["c2", 0]);
});

test("a server restored from an older backup: the client reads it from the start", (context) => {
  const { client, sockets, open, tick } = harness(context);
  client.connect();
  const first = open();
  for (const seq of [1, 2, 3]) first.receive({ type: "event", seq, kind: "message", role: "bot", turn: `t${seq}`, text: "x" });
  first.cut();
  tick(1000);
  open({ seq: 1 });
  sockets[2].onopen();
  assert.equal(sockets[2].sent[0].after, 0);
});

test("a reply lost with the server is offered again", (context) => {
  const { client, open, tick } = harness(context);
  client.connect();
  const first = open();
  first.receive({ type: "event", seq: 1, kind: "message", role: "visitor", turn: "t1", text: "q" });
  first.receive({ type: "delta", turn: "t1", index: 0, text: "Half a" });
  first.cut();
  tick(1000);
  const second = open({ seq: 1 });
  tick(10_000);
  assert.equal(client.transcript.live.t1.failed.code, "interrupted");
  client.regenerate("t1");
  assert.deepEqual(second.sent.at(-1), { type: "regenerate", turn: "t1" });
  assert.equal(client.transcript.live.t1.failed, undefined);
});

test("ratings and handoffs made while offline are sent later, typing is not", (context) => {
  const { client, sockets, open } = harness(context);
  client.connect();
  client.rate(2, "down");
  client.handoff();
  client.typing(true);
  assert.deepEqual(open().sent.map((frame) => frame.type), ["hello", "rate", "handoff"]);
  assert.equal(sockets.length, 1);
});

test("a failed question is sent again with its id; after a conflict with a new one", (context) => {
  const { client, open } = harness(context);
  client.connect();
  const socket = open();
  const id = client.ask("q");
  socket.receive({ type: "failed", id, code: "busy", retryable: true });
  client.retry(id);
  assert.equal(socket.sent.at(-1).id, id);
  socket.receive({ type: "failed", id, code: "conflict", retryable: false });
  client.retry(id);
  assert.notEqual(socket.sent.at(-1).id, id);
});

test("garbage from the wire is ignored", (context) => {
  const { client, open } = harness(context);
  client.connect();
  const socket = open();
  for (const text of ["", "{", "null", "7", '"x"', "[]", '{"type":"event"}', '{"type":"delta"}', '{"type":5}']) socket.receive(text);
  assert.equal(client.connection, "online");
  assert.equal(client.transcript.items.length, 0);
});

test("nothing is sent after disconnect, and no timer is left", (context) => {
  const { client, sockets, open, tick } = harness(context);
  client.connect();
  open();
  client.disconnect();
  tick(120_000);
  assert.equal(sockets.length, 1);
  assert.equal(client.connection, "idle");
});
