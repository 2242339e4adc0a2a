/*
 * What /readyz says, for people. `soft=1` asks for status 200 either way: a 503 is an error in a browser's console.
 */

/** Return {ready, index: {ready, n_passages}, engine: {ready, phase, detail}}, or null where it cannot be read. */
export async function readiness(server) {
  try {
    return await (await fetch(new URL("readyz?soft=1", server), { credentials: "omit", cache: "no-store" })).json();
  } catch {
    return null; // not reachable, or another origin that does not allow it
  }
}
