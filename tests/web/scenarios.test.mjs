// The scenarios of tests/clients.json against client.js; tests/bot/test_clients_agree.py has them against client.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { ChatClient } from "../../bot/web/client.js";

const { scenarios } = JSON.parse(readFileSync(new URL("../clients.json", import.meta.url), "utf-8"));
const PATIENCE_MS = 60_000;

class FakeSocket {
  sent = [];
  over = false;
  send(text) {
    if (this.over) throw new Error("closed");
    this.sent.push(JSON.parse(text));
  }
  close() {
    this.over = true;
  }
  end(code) {
    this.over = true;
    this.onclose?.({ code });
  }
}

/** `value` with the questions' real ids. */
function filled(value, ids) {
  if (Array.isArray(value)) return value.map((each) => filled(each, ids));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, filled(v, ids)]));
  return ids.get(value) ?? value;
}

function pick(frame, wanted) {
  return Object.fromEntries(Object.keys(wanted).map((name) => [name, frame[name]]));
}

for (const scenario of scenarios) {
  test(scenario.name, (context) => {
    context.mock.timers.enable({ apis: ["setTimeout", "Date"] });
    const sockets = [];
    let disk = {};
    const client = new ChatClient({
      url: "ws://x/ws",
      store: { load: () => disk, save: (value) => (disk = value) },
      random: () => 0.5,
      makeSocket: () => {
        sockets.push(new FakeSocket());
        return sockets.at(-1);
      },
    });
    const ids = new Map();
    let place = -1;
    let socket;
    const next = () => {
      place += 1;
      let waited = 0;
      for (; sockets.length <= place && waited < PATIENCE_MS; waited += 50) context.mock.timers.tick(50);
      assert.ok(sockets[place], "the client did not come back");
      socket = sockets[place];
      socket.onopen();
      return waited;
    };
    client.connect();
    next();
    for (const step of scenario.steps) {
      if (step.expect) {
        const frame = socket.sent.shift();
        const wanted = filled(step.expect, ids);
        assert.ok(frame, `it did not send ${JSON.stringify(wanted)}`);
        assert.deepEqual(pick(frame, wanted), wanted);
      } else if (step.send) socket.onmessage({ data: JSON.stringify(filled(step.send, ids)) });
      else if (step.do) ids.set(step.as, client.ask(step.text));
      else if (step.cut) socket.end(1006);
      else if (step.close) socket.end(step.close);
      else if (step.back) assert.ok(next() >= (step.not_before_ms ?? 0), "it came back too soon");
      else assert.deepEqual(pick(client, step.is), step.is);
    }
    const { items, live, pending } = client.transcript;
    assert.deepEqual(items.map((item) => item.seq), scenario.seen);
    for (const [name, text] of Object.entries(scenario.replies ?? {})) {
      const id = ids.get(name);
      const reply = items.find((item) => item.role === "bot" && (item.turn === id || item.turns?.includes(id)));
      assert.equal(reply?.text, text);
      assert.equal(live[id], undefined);
    }
    for (const [name, code] of Object.entries(scenario.failed ?? {})) {
      const id = ids.get(name);
      assert.equal((live[id] ?? pending.find((entry) => entry.id === id))?.failed?.code, code);
    }
    client.disconnect();
  });
}
