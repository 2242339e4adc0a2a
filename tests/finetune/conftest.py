"""Without the extra `train` only importing and masking can be tested; both need no torch."""

from __future__ import annotations

import importlib.util

NEEDED = ("torch", "transformers", "peft", "sacrebleu", "tensorboard", "matplotlib", "optuna")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
collect_ignore = (
    [
        "test_examples.py",
        "test_train.py",
        "test_classify.py",
        "test_search.py",
        "test_publish.py",
        "test_prefer.py",
        "test_distill.py",
        "test_ablate.py",
        "test_jobs.py",
        "test_cases.py",
        "test_replay.py",
        "test_ab.py",
    ]
    if missing
    else []
)
