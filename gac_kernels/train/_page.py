"""The HTML page of the report: `$title` and `$body` are filled in."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1c2126; --soft: #5c646e; --line: #dfe3e8; --wash: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 2.5rem 1.5rem 4rem; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem; padding-bottom: 0.35rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.figures { display: flex; flex-wrap: wrap; gap: 1px; margin: 0 0 2rem; padding: 1px; background: var(--line);
  border-radius: 8px; overflow: hidden; }
.figures div { flex: 1 1 200px; background: var(--wash); padding: 0.8rem 1rem; }
.figures dt { color: var(--soft); font-size: 0.8rem; }
.figures dd { margin: 0.15rem 0 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 470px), 1fr)); gap: 1.25rem; }
figure { margin: 0; padding: 0.9rem 1rem 0.6rem; border: 1px solid var(--line); border-radius: 8px;
  break-inside: avoid; }
figcaption { font-weight: 600; }
figure > svg { display: block; width: 100%; height: auto; }
figure > svg text { font-family: inherit !important; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; margin: 0.1rem 0 0.4rem; padding: 0;
  color: var(--soft); font-size: 0.8rem; }
.legend li { display: flex; align-items: center; gap: 0.4rem; }
.legend sub { line-height: 0; }
.swatch { width: 26px; height: 4px; flex: none; }
.notice { margin: 0 0 0.75rem; padding: 0.6rem 1rem; border-left: 4px solid #c77700; background: var(--wash); }
.note { margin: 0.2rem 0 0; color: var(--soft); font-size: 0.75rem; }
table { border-collapse: collapse; width: 100%; margin: 0 0 1.5rem; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--soft); border-bottom-width: 2px; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; white-space: nowrap; }
.settings th, .settings td { text-align: left; overflow-wrap: anywhere; }
.settings th:first-child { width: 30%; }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.8rem; }
@media print {
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  .charts { grid-template-columns: 1fr 1fr; gap: 4mm; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
}
</style>
</head>
<body>
<h1>$title</h1>
$body
<footer>Written by gac_kernels. A step is one finished optimizer step.</footer>
</body>
</html>
"""
