"""A merchant's own files -> tables and documents -> the store. `command.py` is the way in, `reading.py` the core."""
