"""
`evaluate_classifier` and `classify`: what a classifier's run is worth on texts it never saw, and what it says of new ones.

Beside it stand the commonest class and a TF-IDF regression fitted on the same training texts; the difference to either is
paired, with a 95% interval over the texts. Kept in eval.json and, for people, eval.html.
"""  # noqa: E501

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import torch

from bot.errors import MerchantError
from finetune.baseline import majority, tfidf_regression
from finetune.classifier import load_classifier
from finetune.evaluate import finished
from finetune.labelled import read_texts
from finetune.metrics import paired_difference
from finetune.pii import Masker
from finetune.runs import write_report

MAX_ERRORS = 50  # shown in eval.html


def report_of(true: Sequence[int], taken: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, precision, recall and F1 (macro, micro, weighted), the same of each class, and the confusion matrix."""  # noqa: E501
    n = len(labels)
    confusion = [[0] * n for _ in range(n)]
    for t, p in zip(true, taken, strict=True):
        confusion[t][p] += 1
    per_class = {}
    for c, label in enumerate(labels):
        right, of_class, said = confusion[c][c], sum(confusion[c]), sum(row[c] for row in confusion)
        per_class[label] = {**_scores(right, said, of_class), "support": of_class}
    there = {label: s for label, s in per_class.items() if s["support"]}  # a class without texts has no recall
    n_right, n_all = sum(confusion[c][c] for c in range(n)), len(true)

    def mean(name: str, weights: Sequence[float]) -> float:
        return round(sum(s[name] * w for s, w in zip(there.values(), weights, strict=True)) / sum(weights), 4)

    names = ("precision", "recall", "f1")
    supports = [float(s["support"]) for s in there.values()]
    return {
        "n_texts": n_all,
        "accuracy": round(n_right / n_all, 4),
        "macro": {name: mean(name, [1.0] * len(there)) for name in names},
        "micro": _scores(n_right, n_all, n_all),
        "weighted": {name: mean(name, supports) for name in names},
        "per_class": per_class,
        "confusion": {"labels": list(labels), "matrix": confusion},
    }


def _scores(n_right: int, n_said: int, n_there: int) -> dict[str, float]:
    return {
        "precision": round(n_right / n_said, 4) if n_said else 0.0,
        "recall": round(n_right / n_there, 4) if n_there else 0.0,
        "f1": round(2 * n_right / (n_said + n_there), 4) if n_said + n_there else 0.0,
    }


def evaluate_classifier(run: Path) -> dict[str, Any]:
    """
    Measure the run on its test texts, write eval.json and eval.html into it and return the former. Blocks for minutes.

    Raises:
        MerchantError: no finished run, its result was changed, or it kept no texts to measure on.
    """
    head, result = finished(run)
    texts = {side: read_texts(run / f"texts-{side}.jsonl") for side in ("train", "test")}
    if not texts["test"]:
        raise MerchantError(f"{run / 'texts-test.jsonl'}: no text to measure on; train with test above 0")
    classifier = load_classifier(run, head, result)
    labels = classifier.labels
    places = {label: n for n, label in enumerate(labels)}
    true = [places[t.label] for t in texts["test"]]
    learned = [places[t.label] for t in texts["train"]]
    asked = [t.text for t in texts["test"]]
    began = time.perf_counter()
    probabilities = classifier.probabilities(asked)
    seconds = time.perf_counter() - began
    taken = {
        "candidate": probabilities.argmax(1).tolist(),
        "majority": majority(learned, len(asked)),
        "tfidf": tfidf_regression([t.text for t in texts["train"]], learned, asked, len(labels)),
    }
    reports = {name: report_of(true, said, labels) for name, said in taken.items()}
    right = {name: [float(a == b) for a, b in zip(said, true, strict=True)] for name, said in taken.items()}
    sure = probabilities.max(1).values
    evaluation: dict[str, Any] = {
        "run": str(run),
        "task": "classify",
        "result_sha256": result["sha256"],
        "data_sha256": head["data_sha256"],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "candidate": {
            **reports.pop("candidate"),
            "calibration_error": round(_calibration_error(sure, torch.tensor(right["candidate"])), 4),
            "texts_per_s": round(len(asked) / seconds, 2),
        },
        "others": reports,
        "against": {
            name: {"accuracy_gain": asdict(paired_difference(right["candidate"], right[name]))} for name in reports
        },
        "errors": [
            {
                "text": t.text,
                "label": t.label,
                "taken": labels[p],
                "probability": round(float(s), 4),
                "source": t.source,
            }
            for t, p, s in zip(texts["test"], taken["candidate"], sure, strict=True)
            if labels[p] != t.label
        ],
        # `publish` asks for a gate; a classifier answers no visitor.
        "gate": {"passed": False, "reasons": ["a classifier is no release; `finetune classify` uses it"]},
    }
    write_report(run / "eval.json", evaluation, render_html(evaluation))
    return evaluation


def _calibration_error(sure: torch.Tensor, right: torch.Tensor) -> float:
    """Return the expected calibration error over ten bins: how far the probability is from the share that is right."""
    bins = (sure * 10).long().clamp(max=9)
    return sum(
        float(abs(sure[bins == b].mean() - right[bins == b].mean())) * int((bins == b).sum()) / len(sure)
        for b in range(10)
        if bool((bins == b).any())
    )


def classify(run: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """
    Return for each text its label and the probability of every label, the likeliest first.

    Texts are masked as those of the training were.

    Raises:
        MerchantError: no finished run of a classifier.
    """
    head, result = finished(run)
    if head["config"].get("task") != "classify":
        raise MerchantError(f"{str(run)!r} is no classifier's run: train one with --task classify")
    classifier = load_classifier(run, head, result)
    masked = [Masker().mask([t])[0] for t in texts]
    found = []
    for text, line in zip(texts, classifier.probabilities(masked).tolist(), strict=True):
        ranked = sorted(zip(classifier.labels, line, strict=True), key=lambda x: -x[1])
        found.append(
            {
                "text": text,
                "label": ranked[0][0],
                "probability": round(ranked[0][1], 6),
                "probabilities": {label: round(p, 6) for label, p in ranked},
            }
        )
    return found


# --- For people ------------------------------------------------------------------------------------------------------

_STYLE = """body{font:15px/1.5 system-ui,"Noto Sans CJK SC",sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}td.n{text-align:right}
.wide{overflow-x:auto}small{color:#666}.matrix td,.matrix th{padding:.2em .4em;font-size:12px;text-align:right}"""  # noqa: E501


def render_html(evaluation: dict[str, Any]) -> str:
    """Return eval.html: figures beside the baselines, each class, what is taken for what, and the surest errors."""
    columns = {"classifier": evaluation["candidate"], **evaluation["others"]}
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{_STYLE}</style>",
        f"<h1>Evaluation</h1><p><small>{escape(evaluation['run'])}, {evaluation['at']}; "
        f"{evaluation['candidate']['n_texts']} texts that were not trained on</small></p>",
        "<h2>Figures</h2>",
        _table(["", *columns], [["accuracy", *(c["accuracy"] for c in columns.values())]] + [
            [f"{name}, {kind}", *(c[kind][name] for c in columns.values())]
            for kind in ("macro", "micro", "weighted") for name in ("precision", "recall", "f1")
        ]),
        "<h2>Accuracy against the others</h2><p><small>Paired, with 95% intervals.</small></p>",
        _table(["against", "gain", "from", "to"], [
            [name, f"{i['accuracy_gain']['mean']:+.4f}", f"{i['accuracy_gain']['low']:+.4f}", f"{i['accuracy_gain']['high']:+.4f}"]  # noqa: E501
            for name, i in evaluation["against"].items()
        ]),
        "<h2>Each class</h2>",
        _table(["class", "precision", "recall", "f1", "texts"], [
            [label, s["precision"], s["recall"], s["f1"], s["support"]]
            for label, s in evaluation["candidate"]["per_class"].items()
        ]),
        "<h2>What is taken for what</h2><p><small>A line is a class, a column what it was taken for.</small></p>",
        _matrix(evaluation["candidate"]["confusion"]),
        "<h2>The surest errors</h2>",
        _table(["text", "label", "taken for", "probability", "source"], [
            [e["text"], e["label"], e["taken"], e["probability"], Path(e["source"]).name]
            for e in sorted(evaluation["errors"], key=lambda e: -e["probability"])[:MAX_ERRORS]
        ]),
        "</html>\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td{'' if isinstance(c, str) else ' class=n'}>{escape(str(c))}</td>" for c in row) + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _matrix(confusion: dict[str, Any]) -> str:
    labels, matrix = confusion["labels"], confusion["matrix"]
    head = "".join(f"<th title='{escape(label, quote=True)}'>{escape(label[:12])}</th>" for label in labels)
    lines = []
    for label, row in zip(labels, matrix, strict=True):
        total = max(1, sum(row))
        cells = "".join(f"<td style='background:rgba(43,92,158,{n / total:.2f})'>{n or ''}</td>" for n in row)
        lines.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    return f"<div class='wide matrix'><table><tr><th></th>{head}</tr>{''.join(lines)}</table></div>"
