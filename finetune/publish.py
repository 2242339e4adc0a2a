"""
Releases: what won becomes a new, immutable folder; a pointer says which one is current, and can go back.

    releases/
      current.json            {"release": name, "previous": [names, newest first]}: replaced whole, by a rename
      <name>/                 never changed and never written to again
        model/                merged weights: what a server on CPU loads, and any other
        adapter/              the LoRA, where that is what was trained: what a server on CUDA loads while it runs
        release.json          lineage: data, configuration, code, base, metrics, checksums
        README.md             the model card
        eval.json, eval.html, run.json

Knows files; no server: those that run follow the pointer by themselves (`bot/releases.py` reads it). A name holds the
weights' checksum, so the same name is the same weights, which vLLM's caches rely on (they are keyed by name and path).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bot.catalog import check_folder, resolve_model
from bot.errors import MerchantError
from bot.experiments import FILE as EXPERIMENT_FILE
from bot.releases import POINTER, default_release, read_pointer, resolve_release
from finetune.methods import METHODS, buffer_rank

logger = logging.getLogger(__name__)

PARITY = 0.02  # how much the merged weights' perplexity may differ from the adapter's: bfloat16 rounds, errors do more


def current(releases: Path) -> str | None:
    """Return the name of the current release, None where there is none."""
    return read_pointer(releases).release


def rival(releases: Path, base: str) -> str | None:
    """
    Return what a run trained on `base` is compared with: the current release.

    Where nothing is published that is the shipped one, which servers answer with then, if it is of the same base.
    """
    if (name := current(releases)) is not None:
        return name
    shipped = default_release()
    return shipped.adapter if shipped.base == base else None


def rival_model(releases: Path, base: str) -> tuple[str, Path] | None:
    """Return (name, model folder) of the rival; the shipped release is merged where it was not yet, for a minute."""
    name = rival(releases, base)
    if name is None:
        return None
    return name, releases / name / "model" if name == current(releases) else resolve_release(default_release())


def listed(releases: Path) -> list[dict[str, Any]]:
    """Return every release's lineage, newest first; the current one is marked."""
    now = current(releases)
    found = []
    for path in releases.glob("*/release.json"):
        if not path.parent.name.startswith("."):
            found.append({**json.loads(path.read_text(encoding="utf-8")), "current": path.parent.name == now})
    return sorted(found, key=lambda r: (r["published_at"], r["name"]), reverse=True)


def publish(run: Path, releases: Path, suffix: str | None = None, *, stage: bool = False) -> dict[str, Any]:
    """
    Make the result of `run` a release and the current one; return its lineage. Merging takes a minute and disk space.

    With `stage` the current one stays: for a replay or a live experiment (`rollback --to` makes it current as well).

    Raises:
        MerchantError: no evaluation, the gate or an offline replay was not passed, another result was evaluated, the
            method cannot be served, an experiment is running, or the weights did not survive the merge. Nothing was
            changed.
    """
    from finetune.evaluate import finished  # torch comes with it, which `rollback` and `ab` need not wait for

    head, result = finished(run)
    evaluation = _evaluation(run, result)
    _check_replay(run, result)
    method = METHODS[result["method"]]
    if method.cpu == "evaluate":
        raise MerchantError(f"{run}: method {method.name!r} cannot be published: {method.how}")
    name = release_name(head["base"], method.name, result["sha256"], suffix)
    releases.mkdir(parents=True, exist_ok=True)
    with lock(releases):
        if not stage and (releases / EXPERIMENT_FILE).exists():
            raise MerchantError(
                f"{releases}: an experiment is running, and this would change what it compares with: "
                "`python -m finetune ab stop` first, or publish --stage"
            )
        folder = releases / name
        if folder.exists():
            raise MerchantError(
                f"release {name!r} is published already; `rollback --to {name}` makes it the current one"
            )
        if evaluation["current"] != (against := rival(releases, head["base"])):
            raise MerchantError(
                f"the evaluation compared with {evaluation['current'] or 'no release'}, and the current one is {against or 'none'}: run eval again"  # noqa: E501
            )
        partial = releases / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _fill(partial, run, head, result, method.name)
            check_folder(partial / "model")
            _check_parity(run, partial / "model", head, result)
            lineage = _lineage(name, head, result, evaluation, partial)
            (partial / "release.json").write_text(_json(lineage), encoding="utf-8")
            (partial / "README.md").write_text(model_card(lineage), encoding="utf-8")
            _sync(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if not stage:
            point_to(releases, name)
    return lineage


def rollback(releases: Path, to: str | None = None) -> dict[str, Any]:
    """
    Make the release before the current one, or `to`, the current one; return {"release", "was"}. Nothing is deleted.

    Without a release before it the pointer is emptied: servers go back to the release that is shipped.

    Raises:
        MerchantError: there is no such release, or none is published.
    """
    with lock(releases):
        pointer = read_pointer(releases)
        was = pointer.release
        if was is None and to is None:
            raise MerchantError(f"{releases}: no release is published, so there is nothing to go back from")
        if to is not None and not (releases / to / "release.json").is_file():
            names = ", ".join(r["name"] for r in listed(releases)) or "none"
            raise MerchantError(f"no release {to!r} in {releases}; there are {names}")
        if to == was:
            raise MerchantError(f"release {to!r} is the current one already")
        if to is not None:
            point_to(releases, to)
            return {"release": to, "was": was}
        previous = [n for n in pointer.previous if (releases / n / "release.json").is_file()]
        name = previous[0] if previous else None
        _write_pointer(releases, {"release": name, "previous": previous[1:]})
        return {"release": name, "was": was}


def release_name(base: str, method: str, sha256: str, suffix: str | None = None) -> str:
    """Return the name of a release: its base, its method, the merchant's word where there is one, its weights."""
    lineage = Path(base).parent / "release.json"
    if Path(base).name == "model" and lineage.is_file():  # trained on a release: named after what that one began with
        base = json.loads(lineage.read_text(encoding="utf-8"))["base"]
    stem = re.sub(r"[^a-z0-9.]+", "-", Path(base).name.lower()).strip("-.") or "model"
    word = re.sub(r"[^a-z0-9]+", "-", (suffix or "").lower()).strip("-")[:40]
    return "-".join(part for part in (stem, method, word, sha256[:12]) if part)


def result_name(run: Path, suffix: str | None = None) -> str:
    """Return what the result of a finished run is called once it is published."""
    from finetune.evaluate import finished

    head, result = finished(run)
    return release_name(head["base"], result["method"], result["sha256"], suffix)


def _evaluation(run: Path, result: dict[str, Any]) -> dict[str, Any]:
    try:
        evaluation: dict[str, Any] = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MerchantError(f"{run}: not evaluated; run `python -m finetune eval --run {run}` first") from None
    if evaluation["result_sha256"] != result["sha256"]:
        raise MerchantError(f"{run / 'eval.json'}: of another result; run eval again")
    if not evaluation["gate"]["passed"]:
        raise MerchantError(f"{run}: the gate was not passed: {'; '.join(evaluation['gate']['reasons'])}")
    return evaluation


def _check_replay(run: Path, result: dict[str, Any]) -> None:
    """A replay need not be, but where there is one of this result it must have been passed."""
    try:
        replay = json.loads((run / "replay.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{run / 'replay.json'}: not readable ({exc}); replay again, or delete it") from None
    if replay.get("result_sha256") == result["sha256"] and not replay["verdict"]["passed"]:
        raise MerchantError(f"{run}: the replay was not passed: {'; '.join(replay['verdict']['reasons'])}")


def _fill(partial: Path, run: Path, head: dict[str, Any], result: dict[str, Any], method: str) -> None:
    from finetune.modeling import merge

    if result["kind"] == "model":
        shutil.copytree(run / "result", partial / "model")
    else:
        merge(resolve_model(head["base"]), run / "result", partial / "model")
        if METHODS[method].cuda == "adapter":
            shutil.copytree(run / "result", partial / "adapter")
    for name in ("run.json", "eval.json", "eval.html", "replay.json", "replay.html", "curves.png", "mask_proof.txt"):
        if (run / name).exists():
            shutil.copy(run / name, partial / name)


def _check_parity(run: Path, model: Path, head: dict[str, Any], result: dict[str, Any]) -> None:
    """The released weights must score as the trained ones did: a wrong merge or template shows here, not at a visitor's."""  # noqa: E501
    from finetune.config import RunConfig
    from finetune.evaluate import labelled, per_example_losses, read_held_out
    from finetune.modeling import HfTokenizer, load_for_evaluation, virtual_tokens

    config = RunConfig(**head["config"])
    trained = (run / "result", None) if result["kind"] == "model" else (resolve_model(head["base"]), run / "result")
    perplexities = []
    for base, adapter in (trained, (model, None)):
        examples = labelled(read_held_out(run), HfTokenizer(base), config)[:16]
        loaded = load_for_evaluation(base, adapter, bf16=config.bf16)
        losses = per_example_losses(loaded, examples, config, virtual_tokens(config) if adapter else 0)
        perplexities.append(sum(x[0] for x in losses) / sum(x[1] for x in losses))
        del loaded
    if abs(perplexities[0] - perplexities[1]) > PARITY:
        raise MerchantError(
            f"{run}: the merged weights do not score as the trained ones (loss {perplexities[1]:.3f} instead of {perplexities[0]:.3f}): not published"  # noqa: E501
        )


def _lineage(
    name: str, head: dict[str, Any], result: dict[str, Any], evaluation: dict[str, Any], partial: Path
) -> dict[str, Any]:
    from finetune.train import folder_hash

    lineage: dict[str, Any] = {
        "name": name,
        "published_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base": head["base"],
        "base_sha256": head["base_sha256"],
        "method": result["method"],
        "serve": result["serve"],
        "data_sha256": head["data_sha256"],
        "data_lineage": head.get("data_lineage"),
        "result_sha256": result["sha256"],
        "model_sha256": folder_hash(partial / "model"),
        "prompt_version": head["prompt_version"],
        "chat_template_sha256": head["chat_template_sha256"],
        "config": head["config"],
        "environment": head["environment"],
        "n_steps": result["n_steps"],
        "n_tokens": result["n_tokens"],
        "best_loss": result["best_loss"],
        "metrics": {
            "candidate": evaluation["candidate"],
            "others": evaluation["others"],
            "against": evaluation["against"],
        },
        "gate": evaluation["gate"],
        "replaced": evaluation["current"],
    }
    adapter = partial / "adapter" / "adapter_config.json"
    if adapter.exists():
        config = json.loads(adapter.read_text(encoding="utf-8"))
        ranks = [config["r"], *config.get("rank_pattern", {}).values()]
        lineage["max_lora_rank"] = buffer_rank(max(ranks))
    return lineage


def _made_by(lineage: dict[str, Any]) -> str:
    """Name the teachers whose answers are in the data."""
    steps, at = [], lineage.get("data_lineage")
    while at:
        steps.append(f"{at['work']} by {at['teacher']}")
        at = at.get("before")
    return f"; {', '.join(reversed(steps))}" if steps else ""


def model_card(lineage: dict[str, Any]) -> str:
    """Return README.md of a release."""
    config, metrics = lineage["config"], lineage["metrics"]
    lines = [
        f"# {lineage['name']}",
        "",
        f"{lineage['base']} fine-tuned on one store's dialogues with {lineage['method']}, published {lineage['published_at']}.",  # noqa: E501
        "",
        "## Use",
        "",
        f"For customer service of that store, behind Zhanggui's checks and with its passages in the prompt (layout {lineage['prompt_version']}). "  # noqa: E501
        "Not for other stores' facts, and not without passages: figures are to be quoted from them.",
        "",
        f"Serving: {lineage['serve']['how']}." + (f" Needs max_lora_rank {lineage['max_lora_rank']}." if "max_lora_rank" in lineage else ""),  # noqa: E501
        "",
        "## Training",
        "",
        f"- data: sha256 {lineage['data_sha256']}, masked of personal data before training{_made_by(lineage)}",
        f"- {lineage['n_steps']} steps, {lineage['n_tokens']:,} tokens, learning rate {config['lr'] or 'the method' + chr(39) + 's own'}, rank {config['rank']}, seed {config['seed']}",  # noqa: E501
        f"- code {lineage['environment']['commit'] or 'outside of a checkout'}, torch {lineage['environment']['packages']['torch']}, "  # noqa: E501
        f"transformers {lineage['environment']['packages']['transformers']}, peft {lineage['environment']['packages']['peft']}",  # noqa: E501
        f"- result sha256 {lineage['result_sha256']}, merged weights sha256 {lineage['model_sha256']}",
        "",
        "## Evaluation",
        "",
        "| figure | this release | " + " | ".join(metrics["others"]) + " |",
        "|---|---|" + "---|" * len(metrics["others"]),
    ]  # fmt: skip
    for figure, value in metrics["candidate"].items():
        others = " | ".join(str(o.get(figure)) for o in metrics["others"].values())
        lines.append(f"| {figure} | {value} | {others} |")
    for name, compared in metrics["against"].items():
        for what, i in compared.items():
            lines.append(
                f"\n{what.replace('_', ' ')} against {name}: {i['mean']:+.4f}, 95% interval {i['low']:+.4f} to {i['high']:+.4f}"  # noqa: E501
            )
    return "\n".join(lines) + "\n"


# --- The pointer -----------------------------------------------------------------------------------------------------


def point_to(releases: Path, name: str) -> None:
    """Make `name` the current release; the caller holds the lock."""
    pointer = read_pointer(releases)
    before = [n for n in (pointer.release, *pointer.previous) if n and n != name]
    _write_pointer(releases, {"release": name, "previous": before})


def _write_pointer(releases: Path, pointer: dict[str, Any]) -> None:
    partial = releases / f".{POINTER}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(_json(pointer))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(releases / POINTER)


@contextmanager
def lock(releases: Path) -> Iterator[None]:
    """One publisher at a time; the kernel frees the lock when the process dies."""
    releases.mkdir(parents=True, exist_ok=True)
    with (releases / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MerchantError(f"{releases}: another process is publishing; try again when it is done") from None
        yield


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"
