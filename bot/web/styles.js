/*
 * Style of the open panel, as a constructed CSSStyleSheet: works under `style-src 'self'`, meets no style of the
 * host page. Colours are variables of the host element, which a page may set on it. Distances are
 * logical (start, end), so that a right-to-left language mirrors them.
 */

const DARK = `--scheme: dark; --bg: #141816; --surface: #1f2522;
  --ink: #e9eeea; --soft: #a3aea7; --line: #333b36; --hover: #2a322d;
  --link: var(--link-dark, #9fc9b3); --tint: color-mix(in oklab, var(--accent) 26%, #1a201d); --bad: #ff9c86; --badtint: #3a231e; --star: #f2b84b;
  --shadow: 0 24px 64px -12px rgb(0 0 0 / .7), 0 0 0 1px #333b36;`;

const PANEL = `
:host { --scheme: light; --font: var(--zhanggui-font, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei UI", "Noto Sans CJK SC", sans-serif);
  --bg: #f6f7f4; --surface: #fff; --ink: #1d2420;
  --soft: #5c665f; --line: #e1e5df; --hover: #eef1ec; --link: var(--link-light, #255b41);
  --tint: color-mix(in oklab, var(--accent) 10%, #fff); --bad: #a8321f; --badtint: #fcefec; --star: #a06a00; --radius: var(--zhanggui-radius, 20px);
  --shadow: 0 24px 64px -12px rgb(20 34 26 / .28), 0 4px 16px rgb(20 34 26 / .10); }
@media (prefers-color-scheme: dark) { :host(:not([data-theme="light"])) { ${DARK} } }
:host([data-theme="dark"]) { ${DARK} }

*, *::before, *::after { box-sizing: border-box; }
.panel { color-scheme: var(--scheme); font: 400 15px/1.55 var(--font); color: var(--ink); text-align: start; }
.panel:lang(zh-TW) { --font: var(--zhanggui-font, system-ui, "PingFang TC", "Microsoft JhengHei UI", "Noto Sans CJK TC", sans-serif); }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; margin: 0; cursor: pointer; text-align: inherit;
  -webkit-tap-highlight-color: transparent; touch-action: manipulation; }
button:disabled { cursor: default; }
:focus { outline: none; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.icon { width: 20px; height: 20px; fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; flex: none;
  display: block; }
.icon.filled { fill: currentColor; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.panel { position: fixed; right: calc(var(--side) + env(safe-area-inset-right)); bottom: calc(var(--bottom) + 74px + env(safe-area-inset-bottom));
  width: min(404px, calc(100vw - 40px)); height: min(680px, calc(100dvh - 152px - var(--bottom))); display: grid;
  grid-template-rows: auto minmax(0, 1fr) auto; background: var(--bg); border-radius: var(--radius); overflow: hidden;
  box-shadow: var(--shadow); animation: rise .22s cubic-bezier(.2, .8, .3, 1); }
:host([data-side="left"]) .panel { right: auto; left: calc(var(--side) + env(safe-area-inset-left)); }
.panel[hidden] { display: none; }
@keyframes rise { from { opacity: 0; transform: translateY(14px) scale(.985); } }

.head { display: flex; align-items: center; gap: 12px; padding: 14px 12px; padding-inline-start: 16px; background: var(--accent); color: var(--on-accent); }
.head .face { width: 40px; height: 40px; border-radius: 12px; background: color-mix(in srgb, var(--on-accent) 16%, transparent);
  display: grid; place-items: center; flex: none; overflow: hidden; }
.head .face img { width: 100%; height: 100%; object-fit: cover; }
.head .face .icon { width: 24px; height: 24px; }
.head .who { flex: 1; min-width: 0; }
h2 { margin: 0; font-size: 16px; line-height: 1.3; font-weight: 650; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.status { display: flex; align-items: center; gap: 6px; margin: 1px 0 0; font-size: 12.5px; line-height: 1.35;
  color: color-mix(in srgb, var(--on-accent) 92%, transparent); }
.status::before { content: ""; width: 8px; height: 8px; border-radius: 50%; background: #f2c14e; flex: none; }
.status[data-is="online"]::before { background: #7ee2a0; }
.status[data-is="offline"]::before { background: #ff9c86; }
.head button { width: 36px; height: 36px; border-radius: 10px; display: grid; place-items: center; font-size: 13px; font-weight: 650; flex: none; }
.head button:hover { background: color-mix(in srgb, var(--on-accent) 16%, transparent); }
.head button:focus-visible { outline-color: var(--on-accent); outline-offset: -3px; }
.head .buttons { display: flex; gap: 2px; }

.middle { position: relative; min-height: 0; }
.scroll { position: relative; height: 100%; overflow-y: auto; overscroll-behavior: contain; padding: 18px 16px 12px; scrollbar-width: thin;
  scrollbar-color: var(--line) transparent; }
.scroll:focus-visible { outline-offset: -3px; }
.rows { display: flex; flex-direction: column; gap: 10px; min-height: 100%; }
.row { display: flex; flex-direction: column; align-items: flex-start; max-width: 100%; animation: appear .2s ease; }
@keyframes appear { from { opacity: 0; transform: translateY(6px); } }
.tail { display: contents; }
.row.visitor { align-items: flex-end; }
.bubble { max-width: 88%; padding: 10px 14px; border-radius: 16px; overflow-wrap: anywhere; text-wrap: pretty; line-break: strict; }
.row.bot .bubble, .row.agent .bubble { background: var(--surface); border: 1px solid var(--line); border-end-start-radius: 5px; }
.row.agent .bubble { background: var(--tint); border-color: transparent; }
.row.visitor .bubble { background: var(--accent); color: var(--on-accent); border-end-end-radius: 5px; white-space: pre-wrap; }
.row.visitor.unsent .bubble { opacity: .68; }
.row.visitor.failed .bubble { background: var(--badtint); color: var(--ink); box-shadow: inset 0 0 0 1px var(--bad); opacity: 1; }
.name { font-size: 12px; color: var(--soft); display: flex; align-items: center; gap: 6px; margin: 0 4px 3px; }
.name b { display: grid; place-items: center; width: 20px; height: 20px; border-radius: 50%; background: var(--accent); color: var(--on-accent); font-size: 11px;
  font-weight: 650; }
.bubble > * { margin: 0; }
.bubble > * + * { margin-top: 8px; }
.bubble ul, .bubble ol { padding-inline-start: 22px; }
.bubble li + li { margin-top: 3px; }
.bubble li.in1 { margin-inline-start: 18px; } .bubble li.in2 { margin-inline-start: 36px; }
.bubble .heading { font-weight: 650; }
.bubble strong { font-weight: 650; }
.bubble blockquote { padding-inline-start: 10px; border-inline-start: 3px solid var(--line); color: var(--soft); }
.bubble code { font: .9em/1.5 ui-monospace, monospace; background: var(--hover);
  padding: 1px 5px; border-radius: 5px; }
.bubble pre { background: var(--hover); border-radius: 8px; padding: 8px 10px; overflow-x: auto; }
.bubble pre code { background: none; padding: 0; white-space: pre; }
.bubble a { color: var(--link); text-underline-offset: 2px; font-weight: 500; }
.host { color: var(--soft); font-size: .87em; font-weight: 400; }
.mark { display: inline-grid; place-items: center; min-width: 17px; height: 17px; padding: 0 4px; margin: 0 2px; border-radius: 9px; font-size: 11px;
  font-weight: 650; line-height: 1; color: var(--link); background: var(--tint); vertical-align: 2px; }
button.mark:hover, .mark[aria-expanded="true"] { background: var(--link); color: var(--surface); }
.caret > :last-child:not(ul, ol)::after, .caret > :is(ul, ol):last-child > li:last-child::after { content: ""; display: inline-block; width: 7px; height: 1.05em; margin-inline-start: 3px; border-radius: 2px; vertical-align: -.16em;
  background: var(--link); animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }

.wait { display: flex; align-items: center; gap: 10px; color: var(--soft); font-size: 14px; }
.dots { display: inline-flex; gap: 4px; }
.dots i { width: 7px; height: 7px; border-radius: 50%; background: var(--link); animation: bob 1.2s ease-in-out infinite; }
.dots i:nth-child(2) { animation-delay: .15s; } .dots i:nth-child(3) { animation-delay: .3s; }
@keyframes bob { 0%, 60%, 100% { opacity: .3; transform: none; } 30% { opacity: 1; transform: translateY(-3px); } }

.sources { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 8px; max-width: 100%; padding-inline-start: 2px; }
.source { display: inline-flex; align-items: center; gap: 6px; max-width: 100%; min-height: 28px; padding: 3px 4px; padding-inline-end: 11px; border-radius: 14px;
  border: 1px solid var(--line); background: var(--surface); font-size: 12.5px; line-height: 1.3; color: var(--soft); }
.source b { display: grid; place-items: center; width: 19px; height: 19px; border-radius: 50%; background: var(--tint); color: var(--link); font-size: 11px;
  font-weight: 650; flex: none; }
.source span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 210px; }
.source:hover, .source[aria-expanded="true"] { border-color: var(--link); color: var(--ink); }
.source[aria-expanded="true"] b { background: var(--link); color: var(--surface); }
.quote { margin: 8px 0 0; padding: 10px 12px; width: 100%; max-width: 94%; border-radius: 12px; background: var(--tint); font-size: 13.5px; line-height: 1.55;
  overflow-wrap: anywhere; }
.quote p { margin: 0; white-space: pre-wrap; }
.quote .from { margin-top: 6px; color: var(--soft); font-size: 12px; }

.order { padding: 12px 14px; border-radius: 14px; background: var(--surface); border: 1px solid var(--line); font-size: 14px; }
.order h3 { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; margin: 0 0 6px; font-size: 14px; font-weight: 650; }
.order .state { padding: 1px 10px; border-radius: 10px; background: var(--tint); color: var(--link); font-size: 12.5px; font-weight: 550; }
.order ul { margin: 0 0 6px; padding: 0; list-style: none; } .order dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; margin: 0; }
.order dt { color: var(--soft); } .order dd { margin: 0; overflow-wrap: anywhere; text-align: end; font-variant-numeric: tabular-nums; }
.cards { display: grid; gap: 8px; margin-top: 8px; width: min(100%, 330px); }
.card { display: grid; grid-template-columns: 76px 1fr; gap: 12px; align-items: center; padding: 8px; border-radius: 14px; background: var(--surface);
  border: 1px solid var(--line); color: inherit; text-decoration: none; overflow: hidden; }
a.card:hover { border-color: var(--link); }
.card .pic { width: 76px; height: 76px; border-radius: 9px; background: var(--hover); display: grid; place-items: center; color: var(--soft); overflow: hidden; }
.card img { width: 100%; height: 100%; object-fit: cover; display: block; }
.card .title { font-size: 14px; line-height: 1.4; font-weight: 550; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; }
.card .facts { display: flex; align-items: baseline; gap: 10px; margin-top: 4px; font-size: 12.5px; color: var(--soft); }
.card .price { font-size: 15.5px; font-weight: 650; color: var(--ink); font-variant-numeric: tabular-nums; }
.card .few { color: var(--bad); }

.foot { display: flex; align-items: center; gap: 1px; min-height: 28px; margin: 3px 0 0; padding-inline-start: 3px; color: var(--soft); font-size: 12px; max-width: 100%; flex-wrap: wrap; }
.row.visitor .foot { padding: 0 3px; min-height: 20px; }
.foot .tag { display: inline-flex; align-items: center; gap: 4px; margin-inline-start: 8px; }
.foot .tag .icon { width: 14px; height: 14px; }
.act { display: inline-grid; place-items: center; min-width: 30px; height: 30px; border-radius: 8px; color: var(--soft); }
.act .icon { width: 17px; height: 17px; }
.act:hover { background: var(--hover); color: var(--ink); }
.act[aria-pressed="true"] { color: var(--link); }
.foot .acts { display: inline-flex; margin-inline-start: 8px; }

.line { align-self: center; text-align: center; font-size: 12.5px; color: var(--soft); padding: 4px 12px; }
.line.state { background: var(--tint); color: var(--ink); border-radius: 14px; }
.trouble { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 12px; max-width: 94%; padding: 10px 14px; border-radius: 14px; background: var(--badtint);
  color: var(--ink); font-size: 14px; }
.row.visitor .trouble { margin-top: 6px; }
.pill { display: inline-flex; align-items: center; gap: 6px; min-height: 34px; padding: 4px 14px; border-radius: 17px; border: 1px solid var(--line);
  background: var(--surface); font-size: 13.5px; line-height: 1.35; font-weight: 500; }
.pill .icon { width: 16px; height: 16px; }
.pill:hover:not(:disabled) { border-color: var(--link); color: var(--link); }
.pill:disabled { color: var(--soft); background: transparent; }
.quick { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 4px; }
.quick .pill { border-color: color-mix(in srgb, var(--link) 45%, transparent); color: var(--link); }

.jump { position: absolute; left: 50%; bottom: 10px; transform: translateX(-50%); box-shadow: 0 6px 18px rgb(0 0 0 / .16); }
.jump[hidden] { display: none; }

.composer { padding: 10px 12px calc(8px + env(safe-area-inset-bottom)); background: var(--surface); border-top: 1px solid var(--line); }
.box { display: flex; align-items: flex-end; gap: 6px; padding: 4px; padding-inline-start: 6px; border: 1px solid color-mix(in srgb, var(--soft) 55%, transparent);
  border-radius: 22px; background: var(--surface); }
.box:focus-within { border-color: var(--link); box-shadow: 0 0 0 1px var(--link); }
.box textarea { flex: 1; min-width: 0; resize: none; border: 0; background: none; color: var(--ink); font: inherit; line-height: 22px; padding: 7px 0; max-height: 140px;
  height: 36px; overflow-y: hidden; scrollbar-width: thin; }
.box textarea:focus-visible { outline: none; }
textarea::placeholder { color: var(--soft); opacity: 1; }
.send { width: 36px; height: 36px; border-radius: 50%; display: grid; place-items: center; background: var(--accent); color: var(--on-accent); flex: none;
 }
.send:disabled { background: var(--hover); color: var(--soft); }
.send.stop { background: var(--ink); color: var(--surface); }
.clip { width: 36px; height: 36px; border-radius: 50%; display: grid; place-items: center; color: var(--soft); flex: none; }
.clip:hover { color: var(--ink); background: var(--hover); }
.tray { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 8px; padding: 0; list-style: none; }
.tray li { position: relative; display: flex; align-items: center; gap: 6px; max-width: 100%; padding: 3px; padding-inline-start: 10px; border-radius: 12px; border: 1px solid var(--line);
  background: var(--bg); font-size: 13px; overflow: hidden; }
.tray li.bad { border-color: var(--bad); background: var(--badtint); flex-wrap: wrap; }
.tray li span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 190px; } .tray li.bad span { white-space: normal; max-width: none; }
.tray progress { position: absolute; inset: auto 0 0; width: 100%; height: 4px; accent-color: var(--link); }
.tray button { display: grid; place-items: center; width: 30px; height: 30px; border-radius: 9px; color: var(--soft); flex: none; }
.drop { position: absolute; inset: 8px; z-index: 2; display: grid; place-items: center; border: 2px dashed var(--link); border-radius: 14px; background: var(--surface);
  color: var(--link); font-weight: 600; pointer-events: none; opacity: .94; }
.files { display: flex; flex-direction: column; gap: 6px; align-items: flex-start; margin-bottom: 4px; max-width: 88%; }
.row.visitor .files { align-items: flex-end; }
.files button { display: flex; align-items: center; gap: 10px; max-width: 100%; min-height: 40px; border-radius: 14px; border: 1px solid var(--line); background: var(--surface); overflow: hidden;
  padding: 8px 12px; font-size: 13.5px; text-align: start; }
.files button:has(canvas) { padding: 0; } .files button:hover { border-color: var(--link); }
.files canvas { display: block; max-width: 100%; height: auto; max-height: 220px; }
.files small { display: block; color: var(--soft); font-size: 12px; }
.under { display: flex; align-items: center; gap: 10px; margin-top: 7px; min-height: 32px; }
.under .pill { min-height: 30px; padding: 2px 12px; font-size: 13px; flex: none; white-space: nowrap; }
.under .note { flex: 1; margin: 0; font-size: 11.5px; line-height: 1.35; color: var(--soft); text-align: end; text-wrap: balance; }
.under .note.over { color: var(--bad); font-weight: 600; }
.over-sheet { position: absolute; inset: 0; display: grid; align-items: end; background: rgb(10 16 12 / .42); z-index: 2; }
.sheet { background: var(--surface); border-radius: 18px 18px 0 0; padding: 18px 18px 16px; animation: appear .2s ease; }
.sheet h3 { margin: 0; font-size: 16px; font-weight: 650; }
.sheet p { margin: 4px 0 8px; color: var(--soft); font-size: 14px; }
.stars { display: flex; gap: 4px; border: 0; padding: 0; margin: 0 -6px 10px; }
.stars button { width: 42px; height: 42px; display: grid; place-items: center; color: var(--soft); border-radius: 10px; }
.stars button.on { color: var(--star); } .stars .icon { width: 28px; height: 28px; }
.stars button.on .icon { fill: currentColor; }
.sheet :is(textarea, input) { display: block; width: 100%; padding: 8px 12px; border: 1px solid color-mix(in srgb, var(--soft) 70%, transparent); border-radius: 12px;
  background: var(--bg); color: var(--ink); font: inherit; }
.sheet textarea { height: 84px; resize: none; }
.sheet label { display: block; margin: 10px 0 4px; font-size: 13.5px; font-weight: 550; }
.sheet .error { margin: 4px 0 0; color: var(--bad); font-size: 13px; }
.sheet .list { display: grid; gap: 2px; margin: 4px -8px 0; }
.sheet .list button { display: flex; align-items: center; gap: 12px; width: 100%; min-height: 44px; padding: 6px 8px; border-radius: 12px; }
.sheet .list button:hover { background: var(--hover); }
.sheet .list .switch { margin-inline-start: auto; width: 40px; height: 24px; border-radius: 12px; background: var(--soft); position: relative; }
.sheet .list .switch::after { content: ""; position: absolute; inset-block: 3px; inset-inline-start: 3px; width: 18px; border-radius: 50%; background: var(--surface); }
.sheet .list [aria-checked="true"] .switch { background: var(--link); } .sheet .list [aria-checked="true"] .switch::after { inset-inline-start: 19px; }
.sheet .tongues { display: flex; flex-wrap: wrap; gap: 8px; margin: 10px 0 4px; }
.pill[aria-pressed="true"] { background: var(--tint); border-color: var(--link); color: var(--link); }
.sheet .choices { display: flex; gap: 8px; margin-top: 12px; }
.sheet .choices .pill { flex: 1; justify-content: center; min-height: 42px; border-radius: 21px; }
.primary, .pill.primary { background: var(--accent); color: var(--on-accent); border-color: transparent; }
.pill.primary:hover:not(:disabled) { color: var(--on-accent); filter: brightness(1.08); }
.again { display: grid; padding: 4px 0 6px; }
.hours { margin: 6px 4px 0; font-size: 12.5px; color: var(--soft); }
.again .pill { justify-content: center; min-height: 44px; border-radius: 22px; }
[hidden] { display: none !important; }

@media (max-width: 560px), (max-height: 460px) {
  .panel { inset: 0; left: 0 !important; right: 0 !important; width: 100%; height: var(--viewport, 100dvh); top: var(--viewport-top, 0); bottom: auto; border-radius: 0; }
  .head { padding-top: calc(10px + env(safe-area-inset-top)); padding-bottom: 10px; }
  .head button { width: 44px; height: 44px; }
  .panel :is(textarea, input) { font-size: 16px; }
  :host([data-open]) .launcher { display: none; }
  .act { min-width: 38px; height: 38px; } .pill { min-height: 40px; border-radius: 20px; } .under .pill { min-height: 36px; }
  .send, .clip { width: 40px; height: 40px; } .box textarea { padding: 9px 0; height: 40px; } .tray button { width: 40px; height: 40px; }
}
@media (prefers-reduced-motion: reduce) { *, *::before, *::after { animation-duration: .01ms !important; animation-iteration-count: 1 !important;
  transition-duration: .01ms !important; scroll-behavior: auto !important; } }
@media (forced-colors: active) { .bubble, .pill, .send, .launcher, .panel { border: 1px solid; } .status::before { forced-color-adjust: none; } }
`;

export function panelSheet() {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(PANEL);
  return sheet;
}
