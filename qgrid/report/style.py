"""The style sheet of the page: system fonts, light, readable when printed."""

CSS = """
:root { --ink: #1d2329; --soft: #66707a; --line: #e3e7eb; --band: #f5f7f9; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1500px; margin: 0 auto; padding: 32px 28px 64px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
.lead { color: var(--soft); margin: 4px 0 0; }
.surprises { border-left: 4px solid #e0a030; background: #fdf8ec; padding: 14px 18px;
  margin-top: 24px; border-radius: 0 6px 6px 0; }
.surprises h2 { margin: 0 0 6px; font-size: 16px; }
.surprises ul { margin: 0; padding-left: 20px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 13.5px; }
.results { width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }
.results th { text-align: left; vertical-align: bottom; font-weight: 600; line-height: 1.25;
  padding: 6px 10px; background: var(--band); cursor: help; }
.results thead tr:first-child th { padding-bottom: 0; color: var(--soft); font-size: 12px; }
.results th.band { border-left: 1px solid var(--line); }
.results td { padding: 5px 10px; border-top: 1px solid var(--line); max-width: 22em;
  overflow: hidden; text-overflow: ellipsis; }
.results .number { text-align: right; }
.results th:first-child, .results td:first-child { position: sticky; left: 0; background: #fff;
  font-weight: 600; text-align: left; box-shadow: 1px 0 0 var(--line); }
.results th:first-child { background: var(--band); }
.results tbody + tbody tr:first-child td { border-top: 3px solid var(--line); }
.results tr.base td, .results tr.base td:first-child { background: #f9fbfc; }
.results .tail { color: var(--soft); font-weight: 400; font-size: 12px; }
.results td.fell .tail { color: inherit; }
.results td.fell { color: var(--bad); font-weight: 600; background: #fdeeec; }
.results td.bad { color: var(--bad); font-weight: 600; }
.results td.faint { color: var(--soft); }
.notes { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 12px 2px;
  color: var(--soft); font-size: 13px; }
.notes dt { text-align: right; } .notes dd { margin: 0; overflow-wrap: anywhere; }
.results td.cell { max-width: none; background: var(--band); }
.loads { margin-top: 14px; max-height: 560px; overflow-y: auto; }
.plot { border: 1px solid var(--line); border-radius: 6px; }
.pairs th { text-align: left; font-weight: 500; color: var(--soft); padding: 2px 18px 2px 0;
  vertical-align: top; white-space: nowrap; }
.pairs td { padding: 2px 0; overflow-wrap: anywhere; }
details { margin: 4px 0; } summary { cursor: pointer; } details table { margin: 6px 0 12px 18px; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""
