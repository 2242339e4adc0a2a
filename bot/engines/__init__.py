"""Implementations of `bot.engine.Engine`, one file per foreign library. Importing this package imports none of them."""
