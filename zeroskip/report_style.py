"""The style of report pages: one sheet for light, dark, narrow and printed."""

from __future__ import annotations

# Hues are those of Okabe and Ito, told apart by people who do not see all colours; where it matters,
# shape or text says the same.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1b1f23; --muted: #5d6570; --rule: #e3e0d8;
  --accent: #0072b2; --second: #c2570c; --good: #00795a; --bad: #b3400f; --ghost: #c9c6be;
  --shade: #f1efe9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e9e7e1; --muted: #a0a7af; --rule: #30363c;
    --accent: #5cb8ec; --second: #f0a14a; --good: #3ecf9f; --bad: #ff9166; --ghost: #4a5158;
    --shade: #23282d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
header .eyebrow {
  font-size: 13px; letter-spacing: .08em; text-transform: uppercase; color: var(--muted); margin: 0;
}
h1 { font-size: clamp(26px, 4.4vw, 40px); line-height: 1.15; letter-spacing: -.02em;
  margin: 6px 0 12px; overflow-wrap: anywhere; font-weight: 680; }
h2 { font-size: 22px; letter-spacing: -.01em; margin: 56px 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 72ch; }
.lead { font-size: 18px; max-width: 66ch; }
.note, figcaption { color: var(--muted); font-size: 14px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
nav { margin: 20px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
a { color: var(--accent); text-underline-offset: 3px; text-decoration-thickness: 1px; }
code, pre, .mono { font-family: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: .87em; }
td.mono, code { overflow-wrap: anywhere; }
pre { background: var(--shade); border-radius: 8px; padding: 16px; overflow: auto; line-height: 1.5; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px;
  margin: 28px 0 0; padding: 0; list-style: none; }
.tiles li, .panel { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles li { padding: 14px 16px; }
.tiles .name { font-size: 13px; color: var(--muted); display: block; }
.tiles .value { font-size: 26px; font-weight: 650; letter-spacing: -.02em; display: block;
  font-variant-numeric: tabular-nums; line-height: 1.25; }
.tiles .more { overflow-wrap: anywhere; font-size: 13px; color: var(--muted); display: block; line-height: 1.4; }
.verdict { border-left: 4px solid var(--ghost); background: var(--card); border-radius: 0 10px 10px 0;
  padding: 12px 18px; margin: 24px 0 0; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict p { margin: 2px 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(236px, 1fr)); gap: 12px;
  margin: 16px 0; }
.panel { padding: 12px 14px 8px; margin: 0; min-width: 0; }
.panel.wide { padding: 16px 18px; margin: 16px 0; overflow-x: auto; }
.panel .figure { float: right; color: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
.chart { max-width: 760px; }
section > h3 { margin: 24px 0 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .strong { fill: var(--ink); }
.axis { stroke: var(--rule); stroke-width: 1; } .grid-line { stroke: var(--rule); stroke-width: 1; }
.one { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; opacity: .6; }
.ghost { fill: none; stroke: var(--ghost); stroke-width: 1; opacity: .7; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.dot { fill: var(--accent); stroke: var(--card); stroke-width: 1.5; }
.dot.second { fill: var(--second); }
.fill { fill: var(--accent); opacity: .75; } .outline { fill: none; stroke: var(--second);
  stroke-width: 1.5; }
.cell { fill: var(--accent); } .nothing { fill: var(--shade); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--muted);
  margin: 8px 0 0; align-items: center; }
.key i { display: inline-block; width: 18px; height: 10px; margin-right: 6px; border-radius: 2px; }
.key .k-fill { background: var(--accent); opacity: .75; }
.key .k-line { height: 0; border-top: 2px solid var(--second); vertical-align: middle; }
.key .k-fast { color: var(--accent); } .key .k-slow { color: var(--second); }
.key .k-ghost { height: 0; border-top: 2px solid var(--ghost); vertical-align: middle; }
.key .k-scale { width: 110px; background: linear-gradient(90deg, color-mix(in srgb, var(--accent) 6%, transparent),
  var(--accent)); }
.scroll { overflow-x: auto; margin: 14px 0; position: relative; }
table { border-collapse: collapse; font-size: 14px; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px; vertical-align: bottom; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--rule); }
td { vertical-align: top; } .n { text-align: right; white-space: nowrap; }
td .bar { display: inline-block; height: 10px; background: var(--accent); border-radius: 2px;
  min-width: 2px; vertical-align: middle; }
.track { display: block; min-width: 120px; }
.pass, .fail, .dash { font-weight: 600; white-space: nowrap; }
.pass { color: var(--good); } .fail { color: var(--bad); } .dash { color: var(--muted); }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); font-size: 14px; }
summary:focus-visible, a:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 3px; border-radius: 3px; }
footer { margin-top: 64px; color: var(--muted); font-size: 13px; border-top: 1px solid var(--rule);
  padding-top: 16px; }
@media (max-width: 560px) {
  main { padding: 24px 16px 56px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .tiles .value { font-size: 21px; }
  .grid { grid-template-columns: 1fr; } h2 { margin-top: 44px; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #ccc; --accent: #0072b2;
    --second: #c2570c; --ghost: #bbb; --shade: #f4f4f4; --good: #00664b; --bad: #a03000; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } nav { display: none; }
  .panel, .tiles li, .verdict, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .grid { grid-template-columns: repeat(3, 1fr); }
  details:not(.long)::details-content { content-visibility: visible; block-size: auto; }
}
"""
