/*
 * What /readyz says, for people. `soft=1` asks for status 200 either way: a 503 is an error in a browser's console.
 */

/** Return {ready, index: {ready, n_passages}, engine: {ready, phase, detail}}, or null where it cannot be read. */
export async function readiness(server) {
  let said;
  try {
    const response = await fetch(new URL("readyz?soft=1", server), { credentials: "omit", cache: "no-store" });
    said = await response.json();
  } catch {
    return null; // not reachable, or another origin that does not allow it
  }
  const index = part(said.index);
  const engine = part(said.engine);
  engine.phase = String(said.engine?.phase ?? said.engine?.state ?? (typeof said.engine === "string" ? said.engine : "ready"));
  engine.ready = said.engine?.ready ?? (engine.phase === "ready" || engine.phase === "none");
  return { ready: said.ready ?? said.status === "ready", index, engine };
}

function part(value) {
  if (value && typeof value === "object") return { ...value };
  return { ready: value === true || value === "ready" || value === "ok" };
}
