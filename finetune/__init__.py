"""Fine-tuning: dialogues in, a release that won out. Imports of `bot` only its pure parts; see tests/test_layers.py."""
