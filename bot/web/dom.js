/*
 * Nodes without innerHTML: text goes in as text. Knows nothing of chat.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return an element: `h("button.send", {type: "button", onclick, "aria-label": "…"}, ...children)`.
 * Properties that start with "on" are listeners; `false`, `null` and `undefined` are left out.
 */
export function h(selector, properties = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set text only where it changed, so that live regions and selections are left alone. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const ICONS = {
  chat: "M12 3.5c-5 0-9 3.4-9 7.6 0 2.4 1.3 4.5 3.4 5.9-.1 1-.5 2.1-1.3 3.1-.2.3 0 .7.4.6 1.9-.3 3.4-1.1 4.4-1.9.7.1 1.4.2 2.1.2 5 0 9-3.4 9-7.7s-4-7.8-9-7.8z",
  down: "M6 9.5l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19.5V5M5.5 11.2L12 4.7l6.5 6.5",
  stop: "M8 8h8v8H8z",
  up: "M7 11v9H4.5a.5.5 0 0 1-.5-.5v-8a.5.5 0 0 1 .5-.5H7zm0 0l3.8-7.3c1.3 0 2.2 1 2.2 2.3V9.5h4.9c1.4 0 2.4 1.3 2 2.6l-1.9 6.3c-.3 1-1.1 1.6-2.1 1.6H7",
  thumbdown: "M17 13V4h2.5a.5.5 0 0 1 .5.5v8a.5.5 0 0 1-.5.5H17zm0 0l-3.8 7.3c-1.3 0-2.2-1-2.2-2.3v-3.5H6.1c-1.4 0-2.4-1.3-2-2.6L6 5.6C6.3 4.6 7.1 4 8.1 4H17",
  copy: "M9 9.5a1 1 0 0 1 1-1h8a1 1 0 0 1 1 1v9a1 1 0 0 1-1 1h-8a1 1 0 0 1-1-1zM15 8.5v-3a1 1 0 0 0-1-1H6a1 1 0 0 0-1 1v9a1 1 0 0 0 1 1h3",
  check: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19.5 12a7.5 7.5 0 1 1-2.3-5.4M19.5 4v4h-4",
  person: "M12 12.2a3.9 3.9 0 1 0 0-7.8 3.9 3.9 0 0 0 0 7.8zM4.5 20c.6-3.6 3.7-5.5 7.5-5.5s6.9 1.9 7.5 5.5",
  leaf: "M5 19c0-8.5 4.5-14 14.5-14.5C20 14 15 19 8.5 18.5M5 19c1.5-4 4-7 8-9",
  star: "M12 4l2.5 5.1 5.6.8-4 3.9.9 5.6-5-2.6-5 2.6.9-5.6-4-3.9 5.6-.8z",
  end: "M14.5 8V5.5a1 1 0 0 0-1-1h-7a1 1 0 0 0-1 1v13a1 1 0 0 0 1 1h7a1 1 0 0 0 1-1V16M10 12h10M17 8.8l3.2 3.2L17 15.2",
  info: "M12 11v5.5M12 7.6v.1M12 20.5a8.5 8.5 0 1 0 0-17 8.5 8.5 0 0 0 0 17z",
  more: "M5.6 12a.6.6 0 1 0 1.2 0 .6.6 0 1 0-1.2 0M11.4 12a.6.6 0 1 0 1.2 0 .6.6 0 1 0-1.2 0M17.2 12a.6.6 0 1 0 1.2 0 .6.6 0 1 0-1.2 0",
  clip: "M19 11.5l-7.2 7.2a4.6 4.6 0 0 1-6.5-6.5l7.6-7.6a3.1 3.1 0 0 1 4.4 4.4l-7.5 7.5a1.5 1.5 0 0 1-2.2-2.2l6.8-6.8",
  file: "M13.5 3.5h-6a1 1 0 0 0-1 1v15a1 1 0 0 0 1 1h9a1 1 0 0 0 1-1v-12zM13.5 3.5v4h4",
  save: "M12 4v10.5M7.5 10.5L12 15l4.5-4.5M5 19.5h14",
  mail: "M4.5 6h15a1 1 0 0 1 1 1v10a1 1 0 0 1-1 1h-15a1 1 0 0 1-1-1V7a1 1 0 0 1 1-1zM4 7l8 6 8-6",
  bell: "M6.5 16.5v-5.5a5.5 5.5 0 0 1 11 0v5.5l1.5 1.5H5zM10 20.5h4",
  truck: "M3 6.5h11v9.5H3zM14 10h4l3 3v3h-7M7 18.8a1.6 1.6 0 1 0 0-3.2 1.6 1.6 0 0 0 0 3.2zM17.5 18.8a1.6 1.6 0 1 0 0-3.2 1.6 1.6 0 0 0 0 3.2z",
  bag: "M6 8.5h12l1 11H5zM9 8.5V7a3 3 0 0 1 6 0v1.5",
};

export function icon(name, filled = false) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", "aria-hidden": "true", focusable: "false" })) {
    svg.setAttribute(key, value);
  }
  svg.setAttribute("class", filled ? "icon filled" : "icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}
