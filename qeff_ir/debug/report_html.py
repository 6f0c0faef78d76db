"""A report as one HTML file: no network, no library, light and dark.

It shows the data of `qeff_ir.debug.recorder.Recorder`, the same that ``--report FILE.json`` writes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

_LISTED = 40
"""Changes listed for one pass; more are counted. Large models would make a page that no browser likes."""
_TEXT_LINES, _TEXT_WIDTH = 400, 240
"""Lines of the IR shown for one pass, and characters of a line; what is left out is counted."""
_MARKS = {"added": "+", "removed": "−", "rewired": "~"}
_UNITS = ("B", "KiB", "MiB", "GiB")


def to_html(data: dict[str, Any]) -> str:
    """The page.

    Args:
        data: `Recorder.data`. Any text in it is escaped.
    """
    style = files("qeff_ir.debug").joinpath("report.css").read_text(encoding="utf-8")
    script = files("qeff_ir.debug").joinpath("report.js").read_text(encoding="utf-8")
    title = escape(data["model"] or "module")
    body = [
        _head(data),
        _failure(data["failed"]),
        _timeline(data["passes"]),
        "<h2>What each pass changed</h2>\n",
        *map(_pass, data["passes"]),
        _origins(data["origins"]),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title} · qeff report</title>\n'
        f"<style>\n{style}</style>\n<main>\n{''.join(body)}</main>\n<script>\n{script}</script>\n</html>\n"
    )


def _head(data: dict[str, Any]) -> str:
    passes: list[dict[str, Any]] = data["passes"]
    seconds = sum(p["seconds"] for p in passes)
    nodes = f"{passes[0]['nodes'][0]} → {passes[-1]['nodes'][1]}" if passes else "–"
    rewrites = sum(sum(p["fired"].values()) for p in passes)
    missed = sum(len(p["missed"]) for p in passes)
    facts = [
        ("passes", str(len(passes))),
        ("nodes", nodes),
        ("rewrites", str(rewrites)),
        ("sites left alone", str(missed)),
        ("time", _seconds(seconds)),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return (
        f"<header><p class=eyebrow>qeff pass report</p><h1>{escape(data['model'] or 'module')}</h1>"
        f"<pre class=pipeline>{_breakable(data['pipeline'])}</pre><dl class=tiles>{tiles}</dl></header>\n"
    )


def _failure(failed: dict[str, Any] | None) -> str:
    """What ended the pipeline, in the words of the error; nothing when it came to its end."""
    if failed is None:
        return ""
    kind = escape(failed["error"] + (f" [{failed['code']}]" if failed["code"] else ""))
    title = f"{escape(failed['id'])} failed, and was undone <small>{kind}</small>"
    bundle = failed.get("bundle")
    command = f"qeff bisect {shlex.quote(bundle)}" if bundle else ""
    more = f"<p>Bundle: <code>{escape(bundle)}</code></p><p>Next: <code>{escape(command)}</code></p>" if bundle else ""
    text = f"<h2>{title}</h2><pre>{escape(failed['message'])}</pre>{more}"
    return f"<section class=failure role=alert>{text}</section>\n"


def _breakable(pipeline: str) -> str:
    """A long pipeline, which may be wrapped after its commas only."""
    return escape(pipeline).replace(",", ",<wbr>")


def _timeline(passes: Sequence[dict[str, Any]]) -> str:
    slowest = max((p["seconds"] for p in passes), default=0.0) or 1.0
    largest = max((max(p["nodes"]) for p in passes), default=0) or 1
    rows = "".join(_timeline_row(p, slowest, largest) for p in passes)
    return (
        "<section><h2>Time and graph size</h2><div class=scroll><table class=bars><thead><tr><th>pass</th>"
        "<th>time</th><th></th><th>nodes after</th><th></th><th>rewrites</th>"
        "<th>left alone</th><th>error</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>\n"
    )


def _timeline_row(run: dict[str, Any], slowest: float, largest: int) -> str:
    before, after = run["nodes"]
    change = f"<small>{after - before:+d}</small>".replace("-", "−") if after != before else ""
    missed = len(run["missed"])
    left = f"<span class=warn>{missed}</span>" if missed else "<span class=dim>–</span>"
    error = "<span class=dim>–</span>" if run["error"] is None else f"{run['error']:.1e}"
    fired = sum(run["fired"].values()) or "<span class=dim>–</span>"
    return (
        f'<tr{"" if run["modified"] else " class=idle"}><th><a href="#{_anchor(run)}">{escape(run["id"])}</a></th>'
        f"<td class=n>{_seconds(run['seconds'])}</td><td>{_bar([(run['seconds'] / slowest, 'time')])}</td>"
        f"<td class=n>{after} {change}</td><td>{_size_bar(before / largest, after / largest)}</td>"
        f"<td class=n>{fired}</td><td class=n>{left}</td><td class=n>{error}</td></tr>"
    )


def _size_bar(before: float, after: float) -> str:
    """The graph after the pass, and behind it what the pass took away."""
    return _bar([(before, "gone"), (after, "size")] if before >= after else [(after, "grown"), (before, "size")])


def _bar(parts: Iterable[tuple[float, str]]) -> str:
    rects = "".join(f'<rect class={kind} width="{max(share * 100, 0.6):.2f}" height="10"/>' for share, kind in parts)
    return f'<svg class=bar viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>'


def _pass(run: dict[str, Any]) -> str:
    found = run["diff"]
    kinds = [c["kind"] for c in found["nodes"]]
    counts = " ".join(f"<b class={k}>{mark}{kinds.count(k)}</b>" for k, mark in _MARKS.items() if k in kinds)
    parts = [_counters(run), _lines("Interface", found["interface"]), _lines("Facts", found["facts"])]
    parts += [_weights(found), _nodes(found["nodes"]), _text(found["text"])]
    inner = "".join(parts) or "<p class=dim>This pass changed nothing.</p>"
    state = "" if run["modified"] else " class=idle"
    return (
        f'<details id="{_anchor(run)}"{state}><summary><span>{escape(run["id"])}</span>'
        f"<span class=counts>{counts or '<span class=dim>no change</span>'}</span></summary>{inner}</details>\n"
    )


def _counters(run: dict[str, Any]) -> str:
    fired = "".join(f"<li><b>{count}</b> {escape(name)}</li>" for name, count in run["fired"].items())
    missed = "".join(
        f"<li class=warn>{escape(m['source'])}<small>{escape(m['reason'])}</small></li>" for m in run["missed"]
    )
    return (f"<h3>Fired</h3><ul class=chips>{fired}</ul>" if fired else "") + (
        f"<h3>Left alone</h3><ul class=missed>{missed}</ul>" if missed else ""
    )


def _lines(title: str, lines: Sequence[str]) -> str:
    kinds = {"+": "added", "-": "removed", "~": "rewired"}
    items = "".join(f"<li class={kinds.get(text[:1], '')}>{escape(text)}</li>" for text in lines)
    return f"<h3>{title}</h3><ul class=diff>{items}</ul>" if items else ""


def _weights(found: dict[str, Any]) -> str:
    added = [f"+ {name}, {_bytes(size)}" for name, size in found["weights_added"].items()]
    removed = [f"- {name}, {_bytes(size)}" for name, size in found["weights_removed"].items()]
    before, after = found["weight_bytes"]
    return _lines(f"Weights and constants <small>{_bytes(before)} → {_bytes(after)}</small>", added + removed)


def _nodes(changes: Sequence[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for change in changes[:_LISTED]:
        groups.setdefault((change["source"], change["made_by"]), []).append(change)
    parts: list[str] = []
    for (source, made_by), members in groups.items():
        items = "".join(
            f"<li class={c['kind']}>{_MARKS[c['kind']]} {escape(c['op'])} <i>%{escape(c['name'])}</i>"
            + (f"<small>{escape(c['detail'])}</small>" if c["detail"] else "")
            + "</li>"
            for c in members
        )
        by = escape(made_by or "the frontend")
        parts.append(f"<h4>{escape(source or 'no module')} <small>made by {by}</small></h4><ul class=diff>{items}</ul>")
    if len(changes) > _LISTED:
        parts.append(f"<p class=dim>and {len(changes) - _LISTED} more nodes: the JSON report has them all</p>")
    return f"<h3>Nodes</h3>{''.join(parts)}" if parts else ""


def _text(lines: Sequence[str]) -> str:
    """The IR before and after a pass, as a diff that is closed until somebody opens it."""
    if not lines:
        return ""
    kinds = {"+": "added", "-": "removed", "@": "dim", " ": "same"}
    shown = "\n".join(f"<span class={kinds[line[0]]}>{_cut(line)}</span>" for line in lines[:_TEXT_LINES])
    left = len(lines) - _TEXT_LINES
    more = f"<p class=dim>and {left} more lines: the JSON report has them all</p>" if left > 0 else ""
    return (
        f"<details class=text><summary><span>IR before and after</span><span class=counts>{len(lines)} lines</span>"
        f"</summary><pre class=scroll>{shown}</pre>{more}</details>"
    )


def _cut(line: str) -> str:
    return escape(line if len(line) <= _TEXT_WIDTH else f"{line[:_TEXT_WIDTH]}…")


def _origins(origins: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{escape(o['source'] or 'no module')}</th><td>{escape(o['pass'] or 'the frontend')}</td>"
        f"<td class=n>{sum(o['ops'].values())}</td><td>{_ops(o['ops'])}</td></tr>"
        for o in origins
    )
    return (
        "<section><h2>Where each final node came from</h2>"
        '<input type=search id=find placeholder="Search modules, passes, operators" aria-label="Search origins">'
        "<output id=count></output><div class=scroll><table id=origins><thead><tr><th>Hugging Face module</th>"
        f"<th>made by</th><th>nodes</th><th>operators</th></tr></thead><tbody>{rows}</tbody></table></div></section>\n"
    )


def _ops(ops: dict[str, int]) -> str:
    return ", ".join(f"{escape(op)}{f' ×{count}' if count > 1 else ''}" for op, count in ops.items())


def _anchor(run: dict[str, Any]) -> str:
    return "pass-" + escape(run["id"].replace("#", "-"), quote=True)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _bytes(size: int) -> str:
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
