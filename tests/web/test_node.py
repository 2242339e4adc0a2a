"""The JavaScript tests (`*.test.mjs`), so that one command runs everything; and the widget's size budget."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
WEB = HERE.parents[1] / "bot" / "web"
LOADER = ("widget.js",)  # all that is fetched before the first click
WIDGET = (
    *LOADER,
    *(
        "panel.js",
        "client.js",
        "dom.js",
        "frames.js",
        "markdown.js",
        "parts.js",
        "readiness.js",
        "styles.js",
        "words.js",
    ),
)
LANGUAGES = ("strings.zh-CN.json", "strings.zh-TW.json", "strings.en.json")  # a visitor fetches one


def test_the_javascript_tests_pass() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; the protocol client's own tests need it")
    files = sorted(str(path) for path in HERE.glob("*.test.mjs"))
    done = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def size_bytes(names: tuple[str, ...]) -> int:
    return sum(len(gzip.compress((WEB / name).read_bytes(), 9)) for name in names)


def test_the_widget_stays_under_its_size_budget() -> None:
    assert size_bytes(LOADER) < 6_000
    for language in LANGUAGES:
        assert size_bytes((*WIDGET, language)) < 45_000, language


def imports_of(name: str) -> set[str]:
    source = (WEB / name).read_text(encoding="utf-8")
    return set(re.findall(r"""(?:from|import\()\s*"\./([\w.-]+)\"""", source))


def test_every_import_is_in_the_folder_and_counted() -> None:
    assert {path.name for path in WEB.glob("strings.*.json")} == set(LANGUAGES)
    found = {"widget.js"}
    while more := {each for name in found for each in imports_of(name)} - found:
        found |= more
    assert found == set(WIDGET)
    assert imports_of("widget.js") == {"panel.js"}  # and that at the first click
    for path in WEB.glob("*.js"):
        for imported in imports_of(path.name):
            assert (WEB / imported).is_file(), f"{path.name} imports {imported}"


def test_no_html_is_ever_parsed_from_a_string() -> None:
    forbidden = re.compile(r"\.(innerHTML|outerHTML|insertAdjacentHTML|srcdoc)\b|document\.write|\beval\(|new Function")
    for path in WEB.glob("*.js"):
        assert not forbidden.search(path.read_text(encoding="utf-8")), path.name
    for path in WEB.glob("*.html"):
        page = path.read_text(encoding="utf-8")
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page), path.name
