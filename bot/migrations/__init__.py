"""Schema history of `bot.storage`, run by it at start. Nothing else imports this."""
