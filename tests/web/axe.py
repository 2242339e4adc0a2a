"""
axe-core, the accessibility checker, from npm: fetched once by the ordinary client, checked, kept in the user's cache.

It is no part of the repository and of nothing that is served; `pytest.skip` where there is neither a copy nor npm.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bot.settings import default_cache_dir

if TYPE_CHECKING:
    from playwright.sync_api import Page

PACKAGE = "axe-core@4.14.1"
SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"  # of the package as npm packs it
RUN = """async () => (await axe.run(document, {
  runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
})).violations.map((v) => `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map((n) => `${n.target} ${n.failureSummary}`)}`)"""


def script() -> str:
    """Return the source of axe-core; it does not touch the network where the package is kept."""
    kept = default_cache_dir() / "tests" / f"{PACKAGE}.tgz"
    if not kept.is_file() or hashlib.sha256(kept.read_bytes()).hexdigest() != SHA256:
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("axe-core comes from npm, which is not installed")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            done = subprocess.run(
                [npm, "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True, timeout=50, check=False
            )
            packed = next(Path(folder).glob("*.tgz"), None)
            if done.returncode or packed is None:
                pytest.skip(f"axe-core could not be fetched from npm: {done.stderr.strip()[-200:]}")
            found = hashlib.sha256(packed.read_bytes()).hexdigest()
            assert found == SHA256, f"{PACKAGE} is not the package this test knows: sha256 {found}"
            packed.replace(kept)
    with tarfile.open(kept) as package:
        member = package.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def violations(page: Page, source: str) -> list[Any]:
    """Return what axe-core finds wrong with `page` as it is now, shadow roots included."""
    if not page.evaluate("typeof axe !== 'undefined'"):
        page.evaluate(f"() => {{ {source} }}")  # not a script tag: the page's policy would refuse it, and should
    found: list[Any] = page.evaluate(RUN)
    return found
