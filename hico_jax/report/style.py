"""How a report looks: the frame of the page and its style sheet, light and dark."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style></head>
<body><main><header>{header}</header>
{body}{footer}</main></body></html>
"""

STYLE = """
:root{--ink:#1d2733;--quiet:#5c6773;--paper:#fbfbf9;--panel:#fff;--rule:#e1e4e8;--link:#1f6288;
--good:#2f7d4f;--bad:#b3402a;--caution:#fff8ec;--edge:#dfb65c;--code:#f1f3f4}
@media(prefers-color-scheme:dark){:root{--ink:#e8ecf0;--quiet:#9aa5b1;--paper:#12181e;--panel:#1a222a;--rule:#2b3641;
--link:#8cc8ec;--good:#82cf9c;--bad:#f39a82;--caution:#2a2417;--edge:#8f7434;--code:#222c35}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:clamp(1rem,4vw,3rem) clamp(1rem,4vw,2rem) 4rem}
h1{font-size:clamp(1.6rem,5vw,2.3rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .6rem;text-wrap:balance}
h2{font-size:1.25rem;letter-spacing:-.01em;margin:0 0 .5rem}
p{margin:0 0 .8rem;max-width:44rem}
.lead{font-size:1.1rem;color:var(--quiet)}
a{color:var(--link);text-decoration-thickness:1px;text-underline-offset:.15em}
code{font:.875em ui-monospace,"SF Mono",Menlo,Consolas,monospace;
background:var(--code);padding:.1em .3em;border-radius:4px}
pre{margin:0;padding:.8rem 1rem;overflow-x:auto;background:var(--code);border-radius:8px;line-height:1.45}
pre code{padding:0;background:none}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.7rem;margin:1.4rem 0}
.facts div{display:flex;flex-direction:column-reverse;justify-content:flex-end;background:var(--panel);
border:1px solid var(--rule);border-radius:10px;padding:.8rem 1rem}
.facts dd{margin:0;font-size:1.5rem;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.facts dt{color:var(--quiet);font-size:.85rem;line-height:1.35}
nav{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;font-size:.9rem;border-block:1px solid var(--rule);padding:.7rem 0}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.part{margin-top:2.4rem;scroll-margin-top:1rem}
.caution{background:var(--caution);border-left:4px solid var(--edge);
border-radius:0 10px 10px 0;padding:1.1rem 1.3rem .6rem}
.blocks{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:1.1rem}
.block{grid-column:1/-1;margin:0;min-width:0}
@media(min-width:48rem){.half{grid-column:auto}}
.lines,.heatmap,.strip{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:.8rem}
.lines .chart{display:block;margin:0 auto;width:100%;max-width:36rem}
.heatmap .chart,.strip .chart{display:block;margin:0 auto;min-width:24rem}
.block.text p:last-child{margin-bottom:0}
.name{font-weight:600;font-size:.95rem;margin:0 0 .4rem}
figcaption{color:var(--quiet);font-size:.9rem;line-height:1.45;margin-top:.5rem;max-width:48rem}
.source{white-space:nowrap}
img{display:block;max-width:100%;height:auto;border-radius:8px;border:1px solid var(--rule)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--quiet);border-bottom:1px solid var(--rule);vertical-align:bottom}
th,td{padding:.42rem .9rem .42rem 0}td{border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child td{border-bottom:0}th:last-child,td:last-child{padding-right:0}
.n{text-align:right;white-space:nowrap}
.keyvalues dl{margin:0;display:grid;gap:0}
.keyvalues div{display:grid;grid-template-columns:minmax(8rem,16rem) 1fr;
gap:.2rem 1rem;padding:.4rem 0;border-bottom:1px solid var(--rule)}
.keyvalues div:last-child{border-bottom:0}
.keyvalues dt{color:var(--quiet)}.keyvalues dd{margin:0;overflow-wrap:anywhere}
@media(max-width:30rem){.keyvalues div{grid-template-columns:1fr}}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}.muted{color:var(--quiet)}.strong{font-weight:600}
footer{margin-top:3rem;border-top:1px solid var(--rule);padding-top:1rem;color:var(--quiet);font-size:.88rem}
@media print{body{background:#fff}.part{break-inside:avoid}}
"""
