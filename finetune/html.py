"""The evaluation as one HTML page: verdict, figures, intervals drawn as SVG, samples side by side. No script, no network."""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,"Noto Sans CJK SC",sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;width:100%}td,th{border:1px solid #ccc;padding:.35em .6em;text-align:left;vertical-align:top}
.pass{color:#176b2c}.fail{color:#a3211b}small{color:#666}td.q{width:28%;white-space:pre-wrap}.wrap{white-space:pre-wrap}"""  # noqa: E501
_OF_CASES = (
    "fact_accuracy",
    "refusal_accuracy",
    "no_answer_accuracy",
    "n_errors",
    "ttft_ms_p50",
    "e2e_ms_p50",
)
_SHOWN = (
    "perplexity",
    "rouge_l",
    "chrf",
    "bleu",
    "language_match",
    "length_ratio",
    "n_forbidden",
    "ungrounded_figures",
    "tokens_per_s",
)


def render_html(evaluation: Mapping[str, Any]) -> str:
    """Return eval.html for an eval.json."""
    gate = evaluation["gate"]
    names = ["candidate", *evaluation["others"]]
    columns = {"candidate": evaluation["candidate"], **evaluation["others"]}
    verdict = "passed" if gate["passed"] else "not passed"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{STYLE}</style>",
        f"<h1>Evaluation <span class={'pass' if gate['passed'] else 'fail'}>gate {verdict}</span></h1>",
        f"<p><small>{escape(evaluation['run'])}, {escape(evaluation['at'])}; {evaluation['n_held_out']} held-out dialogues, "  # noqa: E501
        f"{evaluation['n_replies']} replies; current release: {escape(str(evaluation['current'] or 'none'))}</small></p>",  # noqa: E501
    ]
    if gate["reasons"]:
        parts.append("<ul class=fail>" + "".join(f"<li>{escape(r)}</li>" for r in gate["reasons"]) + "</ul>")
    parts.append("<h2>Figures</h2><table><tr><th></th>" + "".join(f"<th>{escape(n)}</th>" for n in names) + "</tr>")
    for figure in _SHOWN:
        values = [columns[n].get(figure) for n in names]
        if any(v is not None for v in values):
            cells = "".join(f"<td>{escape(_text(v))}</td>" for v in values)
            parts.append(f"<tr><td>{figure.replace('_', ' ')}</td>{cells}</tr>")
    parts.append("</table><h2>The candidate against the others</h2><p><small>Paired, with 95% intervals.</small></p>")
    for name, compared in evaluation["against"].items():
        parts.append(f"<h3>{escape(name)}</h3><table>")
        for what, interval in compared.items():
            parts.append(
                f"<tr><td>{what.replace('_', ' ')}</td><td>{interval['mean']:+.4f} "
                f"[{interval['low']:+.4f}, {interval['high']:+.4f}]</td><td>{_drawn(interval)}</td></tr>"
            )
        parts.append("</table>")
    for label, measured in evaluation.get("cases", {}).items():
        parts += _cases(label, measured)
    parts.append(
        "<h2>Samples</h2><table><tr><th>question</th><th>human</th>"
        + "".join(f"<th>{escape(n)}</th>" for n in names)
        + "</tr>"
    )
    for sample in evaluation["samples"]:
        cells = "".join(f"<td class=wrap>{escape(sample[n])}</td>" for n in ("human", *names))
        parts.append(f"<tr><td class=q>{escape(sample['question'][-600:])}</td>{cells}</tr>")
    parts.append("</table></html>\n")
    return "\n".join(parts)


def _cases(label: str, measured: Mapping[str, Any]) -> list[str]:
    """Return one file of cases: accuracies, also by language, gains with their intervals, and what each one said."""
    contestants = measured["contestants"]
    names = list(contestants)
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    direct = "on" if measured["direct"] else "off"
    parts = [
        f"<h2>Cases {escape(label)}</h2><p><small>{escape(measured['file'])}, of {escape(measured['store'])}; "
        f"direct path {direct}, {measured['concurrency']} at a time</small></p><table><tr><th></th>{head}</tr>"
    ]

    def row(title: str, values: list[Any]) -> None:
        parts.append(f"<tr><td>{escape(title)}</td>{''.join(f'<td>{escape(_text(v))}</td>' for v in values)}</tr>")

    for figure in ("n", "passed", *_OF_CASES):
        row(figure.replace("_", " "), [contestants[n].get(figure) for n in names])
    for lang in sorted({lang for n in names for lang in contestants[n]["by_language"] or {}}):
        for figure in ("fact_accuracy", "refusal_accuracy"):
            values = [(contestants[n]["by_language"] or {}).get(lang, {}).get(figure) for n in names]
            row(f"{figure.replace('_', ' ')}, {lang or 'no language'}", values)
    parts.append("</table>")
    for name, gains in measured["against"].items():
        parts.append(f"<h3>{escape(label)}: the candidate against {escape(name)}</h3><table>")
        every = {what: gain for what, gain in gains.items() if what != "by_language"}
        for lang, of_lang in gains["by_language"].items():
            every |= {f"{what}, {lang or 'no language'}": gain for what, gain in of_lang.items()}
        for what, gain in every.items():
            parts.append(
                f"<tr><td>{escape(what.replace('_', ' '))}</td><td>{gain['mean']:+.4f} "
                f"[{gain['low']:+.4f}, {gain['high']:+.4f}]</td><td>{_drawn(gain)}</td></tr>"
            )
        parts.append("</table>")
    parts.append(f"<details><summary>Every case</summary><table><tr><th>case</th>{head}</tr>")
    for sample in measured["samples"]:
        cells = ""
        for name in names:
            said = sample["said"].get(name)
            if said is None:
                cells += "<td>–</td>"
                continue
            grade = "pass" if said["passed"] else "fail"
            facts = f", {said['n_found']} of {sample['n_facts']} facts" if sample["n_facts"] else ""
            cells += (
                f"<td class=wrap><span class={grade}>{grade}, {escape(said['outcome'])}{facts}</span>\n"
                f"{escape(said['text'])}</td>"
            )
        asked = f"{escape(sample['id'])} ({escape(sample['expect'])})\n{escape(sample['question'])}"
        parts.append(f"<tr><td class=q>{asked}</td>{cells}</tr>")
    parts.append("</table></details>")
    return parts


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _drawn(interval: Mapping[str, float]) -> str:
    """Return an interval as a line with a dot, zero marked, on a scale of its own."""
    reach = max(abs(interval["low"]), abs(interval["high"]), 1e-9)

    def x(value: float) -> float:
        return 150 + 140 * value / reach

    return (
        f'<svg width=300 height=22 role=img><line x1=150 y1=2 x2=150 y2=20 stroke="#999"/>'
        f'<line x1={x(interval["low"]):.1f} y1=11 x2={x(interval["high"]):.1f} y2=11 stroke="#2b5c9e" stroke-width=3 />'
        f'<circle cx={x(interval["mean"]):.1f} cy=11 r=5 fill="#2b5c9e"/></svg>'
    )
