/*
 * Frames in, transcript out. Pure: no socket, no DOM, no clock.
 *
 * A transcript is a plain object that is never changed in place: `applyFrame` returns the same one when nothing changes.
 * Frames whose type starts with "local." come from our own client, not from the wire.
 */

export function emptyTranscript() {
  return {
    conversation: null,
    store: "",
    greeting: "",
    quickReplies: [],
    limits: {},
    state: "bot", // "bot" | "waiting" | "human" | "closed"
    items: [], // event frames, by seq
    lastSeq: 0, // what `hello` sends as `after`
    pending: [], // {id, text, at, email?, attachments?, seq?, failed?}
    live: {}, // turn -> {turn, phase, text, next, held, stopping?, failed?}
    ratings: {}, // seq of the reply -> "up" | "down"
    agentTyping: null, // {name} while an agent types
    agent: null, // {name} of the agent who has the conversation
    customer: null, // {id, name} where the store has signed who the visitor is
    human: {}, // {open, opens_at, agents_online, position, expected_wait_s} of the team
  };
}

/** Return the transcript after `frame`. An unknown type changes nothing: an old widget survives a new server. */
export function applyFrame(transcript, frame) {
  switch (frame.type) {
    case "welcome":
      return applyWelcome(transcript, frame);
    case "ack":
      return applyAck(transcript, frame);
    case "status":
      return withLive(joined(transcript, frame), frame.turn, (live) => ({ ...live, phase: frame.phase, failed: undefined }));
    case "delta":
      return applyDelta(transcript, frame);
    case "partial":
      return withLive(joined(transcript, frame), frame.turn, (live) =>
        drain({ ...live, text: frame.text, next: frame.index + 1, phase: "typing", failed: undefined }),
      );
    case "event":
      return applyEvent(transcript, frame);
    case "failed":
      return applyFailed(transcript, frame);
    case "typing": // an agent types
      if (frame.role === "visitor" || (!frame.on && !transcript.agentTyping)) return transcript;
      return { ...transcript, agentTyping: frame.on ? { name: frame.name ?? "" } : null };
    case "queue":
      return { ...transcript, human: withQueue(transcript.human, frame) };

    case "local.ask":
      return {
        ...transcript,
        pending: [...transcript.pending.filter((p) => p.id !== frame.id), ownEntry(frame)],
      };
    case "local.drop":
      return { ...transcript, pending: transcript.pending.filter((p) => p.id !== frame.id) };
    case "local.stop":
      return transcript.live[frame.turn]
        ? withLive(transcript, frame.turn, (live) => ({ ...live, stopping: true }))
        : transcript;
    case "local.regenerate":
      return { ...transcript, live: { ...transcript.live, [frame.turn]: newLive(frame.turn) } };
    case "local.rate":
      return { ...transcript, ratings: { ...transcript.ratings, [frame.seq]: frame.value } };
    default:
      return transcript;
  }
}

function applyWelcome(transcript, frame) {
  // Another conversation, or a server with fewer events (an older backup): only unsent questions stay.
  const same = transcript.conversation === frame.conversation && !(frame.seq < transcript.lastSeq);
  const base = same ? transcript : { ...emptyTranscript(), pending: transcript.pending.filter((p) => p.seq === undefined) };
  return {
    ...base,
    conversation: frame.conversation,
    store: frame.store ?? base.store,
    greeting: frame.greeting ?? base.greeting,
    quickReplies: frame.quick_replies ?? base.quickReplies,
    limits: frame.limits ?? base.limits,
    state: frame.state ?? base.state,
    agentTyping: null,
    agent: frame.agent ?? null,
    customer: frame.customer ?? null,
    human: frame.human ?? {},
  };
}

function applyAck(transcript, frame) {
  const index = transcript.pending.findIndex((p) => p.id === frame.id);
  if (index < 0) return transcript;
  const pending = transcript.pending.slice();
  // The event may have come before its ack; then the question is already an item.
  if (findItem(transcript.items, frame.seq) >= 0) pending.splice(index, 1);
  else pending[index] = { ...pending[index], seq: frame.seq, failed: undefined };
  return { ...transcript, pending };
}

function applyDelta(transcript, frame) {
  const live = transcript.live[frame.turn];
  // A late delta of a finished reply starts nothing; a regenerated one starts with `status` or index 0.
  if (!live && frame.index > 0 && transcript.items.some((e) => isReply(e) && e.turn === frame.turn)) return transcript;
  if (live && frame.index < live.next) return transcript; // seen
  return withLive(transcript, frame.turn, (now) =>
    drain({ ...now, phase: "typing", failed: undefined, held: { ...now.held, [frame.index]: frame.text } }),
  );
}

/** Append the held deltas that are next, in order. */
function drain(live) {
  let { text, next } = live;
  const held = {};
  for (const index of Object.keys(live.held).map(Number).sort((a, b) => a - b)) {
    if (index === next) {
      text += live.held[index];
      next += 1;
    } else if (index > next) held[index] = live.held[index];
  }
  return { ...live, text, next, held };
}

function applyEvent(transcript, frame) {
  if (!Number.isInteger(frame.seq) || findItem(transcript.items, frame.seq) >= 0) return transcript;
  const next = {
    ...transcript,
    items: insert(transcript.items, frame),
    lastSeq: Math.max(transcript.lastSeq, frame.seq),
  };
  if (frame.kind === "state" && frame.state) {
    next.state = frame.state;
    next.agent = frame.state === "human" ? (frame.agent ?? next.agent) : null;
    next.human = withQueue(next.human, frame.state === "waiting" ? frame : {});
    if (frame.state !== "human") next.agentTyping = null;
  }
  if (frame.kind === "rating") {
    next.ratings = { ...next.ratings, [frame.rated]: frame.value };
  }
  if (frame.kind !== "message") return next;

  if (frame.role === "visitor") {
    const known = next.pending.findIndex(
      (p) => p.id === frame.id || p.seq === frame.seq || (p.seq === undefined && !frame.id && p.text === frame.text),
    );
    if (known >= 0) {
      // The row keeps its key.
      const { id } = next.pending[known];
      next.items = next.items.map((item) => (item.seq === frame.seq ? { ...item, id } : item));
      next.pending = next.pending.filter((_, i) => i !== known);
    }
  } else {
    next.agentTyping = null;
    if (isReply(frame)) for (const turn of [frame.turn, ...turnsOf(frame)]) if (next.live[turn]) next.live = without(next.live, turn);
  }
  return next;
}

function applyFailed(transcript, frame) {
  const failed = {
    code: frame.code,
    message: frame.message ?? "",
    retryable: Boolean(frame.retryable),
    retry_after_s: frame.retry_after_s ?? 0,
  };
  if (frame.turn) return withLive(joined(transcript, frame), frame.turn, (live) => ({ ...live, failed, stopping: false }));
  const index = frame.id ? transcript.pending.findIndex((p) => p.id === frame.id) : -1;
  if (index < 0) return transcript; // about the connection, not about a message: the client reports it
  const pending = transcript.pending.slice();
  pending[index] = { ...pending[index], failed };
  return { ...transcript, pending };
}

/** A reply to several questions bears the last one's turn; what was under way for the others is part of it. */
function joined(transcript, frame) {
  const gone = turnsOf(frame).filter((turn) => turn !== frame.turn && transcript.live[turn]);
  return gone.length ? { ...transcript, live: gone.reduce(without, transcript.live) } : transcript;
}

function turnsOf(frame) {
  return Array.isArray(frame.turns) ? frame.turns : [];
}

function withQueue(human, frame) {
  const { open = human.open, opens_at = human.opens_at, position = null, expected_wait_s = null } = frame;
  return { ...human, open, opens_at, position, expected_wait_s };
}

function ownEntry({ id, text, at, email, attachments }) {
  return { id, text, at, ...(email ? { email } : {}), ...(attachments?.length ? { attachments } : {}) };
}

function newLive(turn) {
  return { turn, phase: "searching", text: "", next: 0, held: {} };
}

function withLive(transcript, turn, change) {
  if (!turn) return transcript;
  return { ...transcript, live: { ...transcript.live, [turn]: change(transcript.live[turn] ?? newLive(turn)) } };
}

function without(object, key) {
  const { [key]: _gone, ...rest } = object;
  return rest;
}

function isReply(event) {
  return event.kind === "message" && event.role === "bot";
}

/** Index of the item with `seq`, or -1 minus where it belongs. */
function findItem(items, seq) {
  let low = 0;
  let high = items.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (items[middle].seq < seq) low = middle + 1;
    else high = middle;
  }
  return items[low]?.seq === seq ? low : -1 - low;
}

function insert(items, item) {
  const at = -1 - findItem(items, item.seq);
  return [...items.slice(0, at), item, ...items.slice(at)];
}

/**
 * Return what a person sees, top to bottom: rows {key, kind: "message" | "state" | "note" | "live" | "failed", …}. A reply
 * keeps its key from the first delta to the final event; of several to one turn (regenerated ones) the last is shown.
 */
export function rowsOf(transcript) {
  const { items, pending, live } = transcript;
  const newest = new Map(); // turn -> seq of its last reply
  for (const item of items) if (isReply(item) && item.turn) newest.set(item.turn, item.seq);
  const anchor = new Map(); // turn -> seq of its last question
  for (const item of items) if (item.kind === "message" && item.role === "visitor" && item.turn) anchor.set(item.turn, item.seq);

  const rows = [];
  const placed = new Set();
  const placeLive = (turn) => {
    const reply = live[turn];
    if (!reply || placed.has(turn)) return;
    placed.add(turn);
    const key = `t${turn}`;
    if (!reply.failed) rows.push({ ...reply, key, kind: "live", role: "bot" });
    else {
      if (reply.text) rows.push({ ...reply, key, kind: "live", role: "bot", halted: true });
      rows.push({ key: `f${turn}`, kind: "failed", turn, failed: reply.failed });
    }
  };
  const place = (item) => {
    // Where the system says it in words, or a visitor simply went on asking, the state needs no line.
    const told = item.kind === "state" && (rows.at(-1)?.role === "system" || item.reason === "reopened" || rows.at(-1)?.state === item.state);
    if (item.kind === "state" && !told) rows.push({ ...item, key: `s${item.seq}` });
    if (item.kind === "note") rows.push({ ...item, key: `s${item.seq}` }); // only agents are sent any
    if (item.kind !== "message") return;
    if (isReply(item) && item.turn) {
      const replaced = newest.get(item.turn) !== item.seq;
      const rewritten = live[item.turn] && !live[item.turn].failed;
      if (replaced || rewritten) return;
      rows.push({ ...item, key: `t${item.turn}`, rating: transcript.ratings[item.seq] });
      return;
    }
    if (item.role === "system" && rows.at(-1)?.kind === "state") rows.pop(); // nor where it says it next
    rows.push({ ...item, key: item.role === "visitor" && item.id ? `p${item.id}` : `s${item.seq}` });
    if (item.role === "visitor" && item.turn && anchor.get(item.turn) === item.seq) placeLive(item.turn);
  };

  // Acknowledged questions stand where their number says.
  const acked = pending.filter((p) => p.seq !== undefined).sort((a, b) => a.seq - b.seq);
  for (const item of items) {
    while (acked.length && acked[0].seq < item.seq) rows.push(ownRow(acked.shift()));
    place(item);
  }
  for (const entry of acked) rows.push(ownRow(entry));
  for (const turn of Object.keys(live)) placeLive(turn);
  for (const entry of pending) if (entry.seq === undefined) rows.push(ownRow(entry));
  return rows;
}

function ownRow(entry) {
  return {
    key: `p${entry.id}`,
    kind: "message",
    role: "visitor",
    id: entry.id,
    text: entry.text,
    at: entry.at,
    email: entry.email,
    left: Boolean(entry.email),
    attachments: entry.attachments,
    seq: entry.seq,
    sending: entry.seq === undefined && !entry.failed,
    failed: entry.failed,
  };
}

export function writingTurn(transcript) {
  const open = Object.values(transcript.live).filter((reply) => !reply.failed);
  return open.length ? open[open.length - 1].turn : null;
}

/** The turn whose question has no reply and none under way: it was lost on the server's side. Else null. */
export function unansweredTurn(transcript) {
  if (transcript.state !== "bot" && transcript.state !== "waiting") return null; // waiting for a human, the bot still answers
  for (let i = transcript.items.length - 1; i >= 0; i -= 1) {
    const item = transcript.items[i];
    if (item.kind !== "message") continue;
    if (item.role !== "visitor" || !item.turn || transcript.live[item.turn]) return null;
    return item.turn;
  }
  return null;
}
