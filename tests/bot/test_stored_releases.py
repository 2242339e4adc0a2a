"""`bot.releases`: the pointer, releases' folders, and the shipped one merged into the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bot import releases as module
from bot.errors import MerchantError
from bot.releases import bare, default_release, follow_pointer, load_release, named, read_pointer, resolve_release
from tests.releases import make_adapter, make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("releases") / "base")


def write_release(folder: Path, name: str, **fields: Any) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "release.json").write_text(json.dumps({"name": name, "base": "qwen", **fields}), encoding="utf-8")
    return folder


def point(folder: Path, release: str | None, *previous: str) -> None:
    (folder / "current.json").write_text(json.dumps({"release": release, "previous": list(previous)}))


def shipped(base: Path, folder: Path, name: str = "demo-1", **fields: Any) -> Path:
    """A release as it is shipped: the LoRA and its lineage in one folder."""
    make_adapter(base, folder)
    weights = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    lineage = {"name": name, "base": str(base), "base_sha256": weights, **fields}
    (folder / "release.json").write_text(json.dumps(lineage), encoding="utf-8")
    return folder


class TestThePointer:
    def test_it_names_the_release_and_says_when_it_was_written_again(self, tmp_path: Path) -> None:
        assert read_pointer(tmp_path).release is None
        point(tmp_path, "b", "a")
        first = read_pointer(tmp_path)
        assert (first.release, first.previous) == ("b", ("a",))
        assert read_pointer(tmp_path) == first
        (tmp_path / "current.json").unlink()
        point(tmp_path, "b", "a")
        assert read_pointer(tmp_path) != first

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"release": 3, "previous": []}', '{"release": "a"}'])
    def test_one_that_cannot_be_read_names_the_remedy(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "current.json").write_text(text)
        with pytest.raises(MerchantError, match="delete it, then `rollback --to NAME`"):
            read_pointer(tmp_path)

    def test_following_it_gives_the_release_those_before_it_and_the_shipped_one(self, tmp_path: Path) -> None:
        wanted = follow_pointer(tmp_path, bare("base"))
        assert (wanted().default, wanted().named, wanted().fault) == (bare("base"), None, "")
        for name in ("a", "b"):
            write_release(tmp_path / name, name)
        point(tmp_path, "b", "a")
        found = wanted()
        assert (found.default.adapter, found.default.model, found.named) == ("b", "qwen", "b")
        assert [r.name for r in found.fallbacks] == ["a", "base"]
        assert wanted() == found
        point(tmp_path, None)
        assert wanted().default == bare("base")

    def test_a_release_that_is_gone_or_named_like_a_path_is_a_fault_and_an_older_one_is_wanted(
        self, tmp_path: Path
    ) -> None:
        wanted = follow_pointer(tmp_path, bare("base"))
        write_release(tmp_path / "a", "a")
        for gone in ("b", "../a", ""):
            point(tmp_path, gone, "a")
            assert wanted().default.name == "a"
            assert wanted().named == gone
            assert wanted().fault
        (tmp_path / "current.json").write_text("{")
        assert wanted().default == bare("base")
        assert "not readable" in wanted().fault


class TestAReleasesFolder:
    def test_a_published_one_has_weights_and_perhaps_a_lora(self, tmp_path: Path) -> None:
        folder = write_release(tmp_path / "a", "a")
        release = load_release(folder)
        assert (release.model, release.adapter, release.model_dir, release.adapter_dir) == (
            "qwen",
            "a",
            folder / "model",
            None,
        )
        (folder / "adapter").mkdir()
        assert load_release(folder).adapter_dir == folder / "adapter"

    def test_one_that_was_trained_on_a_release_is_of_the_model_that_one_began_with(self, tmp_path: Path) -> None:
        first = write_release(tmp_path / "a", "a")
        second = write_release(tmp_path / "b", "b", base=str(first / "model"))
        assert load_release(second).model == "qwen"

    @pytest.mark.parametrize(
        ("fields", "says"),
        [({"name": "../x"}, "is no name"), ({"name": None}, "is no name"), ({"base": ""}, "base: missing")],
    )
    def test_what_is_none_is_refused(self, tmp_path: Path, fields: dict[str, Any], says: str) -> None:
        write_release(tmp_path / "a", "a")
        (tmp_path / "a" / "release.json").write_text(json.dumps({"name": "a", "base": "qwen"} | fields))
        with pytest.raises(MerchantError, match=says):
            load_release(tmp_path / "a")

    def test_one_without_anything_to_serve_is_refused(self, tmp_path: Path) -> None:
        write_release(tmp_path / "a", "a")
        (tmp_path / "a" / "model").rmdir()
        with pytest.raises(MerchantError, match="neither model/ nor a LoRA"):
            load_release(tmp_path / "a")

    def test_model_takes_a_catalog_name_a_model_folder_or_a_releases_folder(self, tmp_path: Path, base: Path) -> None:
        assert named("qwen2.5-coder-0.5b-instruct").adapter is None
        assert (named(str(base)).model, named(str(base)).adapter) == ("base", None)
        assert named(str(write_release(tmp_path / "a", "a"))).adapter == "a"


class TestTheShippedRelease:
    def test_it_is_served_where_nothing_was_published_and_the_bare_model_where_none_is_shipped(
        self, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "nothing")
        assert default_release() == bare("qwen2.5-coder-0.5b-instruct")
        monkeypatch.setattr(module, "SHIPPED", shipped(base, tmp_path / "shipped"))
        assert (default_release().adapter, default_release().model) == ("demo-1", "base")

    def test_it_is_merged_into_the_cache_once(self, tmp_path: Path, base: Path) -> None:
        release = load_release(shipped(base, tmp_path / "shipped"))
        seen: list[tuple[str, int, int]] = []
        folder = resolve_release(release, tmp_path / "cache", lambda *step: seen.append(step))
        assert folder == (tmp_path / "cache" / "models" / "demo-1").resolve()
        assert seen[-1][0] == "merging"
        assert seen[-1][1] == seen[-1][2]
        stamp = json.loads((folder / "zhanggui.json").read_text())
        weights = (folder / "model.safetensors").read_bytes()
        assert stamp["weights_sha256"] == hashlib.sha256(weights).hexdigest()
        assert weights != (base / "model.safetensors").read_bytes()
        before = (folder / "model.safetensors").stat().st_mtime_ns
        assert resolve_release(release, tmp_path / "cache") == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == before
        assert not list((tmp_path / "cache" / "models").glob(".*.partial"))

    def test_a_damaged_or_an_outdated_merge_is_made_anew(self, tmp_path: Path, base: Path) -> None:
        home = shipped(base, tmp_path / "shipped")
        folder = resolve_release(load_release(home), tmp_path / "cache")
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:-10])
        resolve_release(load_release(home), tmp_path / "cache")
        assert (folder / "model.safetensors").read_bytes() == weights
        config = home / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 999}))
        resolve_release(load_release(home), tmp_path / "cache")
        assert (folder / "model.safetensors").read_bytes() != weights

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"base_sha256": "0" * 64}, "not the weights that release 'demo-1' was trained on"),
            ({"adapter_sha256": "0" * 64}, "get the release anew"),
            ({"name": "smollm2-135m-instruct"}, "is a model of the catalog"),
        ],
    )
    def test_another_base_another_adapter_or_a_models_name_leave_nothing_in_the_cache(
        self, tmp_path: Path, base: Path, fields: dict[str, Any], says: str
    ) -> None:
        release = load_release(shipped(base, tmp_path / "shipped", **fields))
        with pytest.raises(MerchantError, match=says):
            resolve_release(release, tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.safetensors"))

    def test_a_full_disk_is_said_before_anything_is_written(
        self, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = load_release(shipped(base, tmp_path / "shipped"))
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(MerchantError, match=r"needs 0 MB .* set ZHANGGUI_CACHE"):
            resolve_release(release, tmp_path / "cache")
