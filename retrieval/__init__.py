"""Finding what the store has written down: files -> passages -> index -> hits. Imports nothing of ours."""
