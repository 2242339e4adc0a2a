"""What the bot can do besides quoting and generating, decided by code: hand over, list promotions, greet."""
