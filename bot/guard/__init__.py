"""What must never reach a visitor, or never reach the model: one file a danger."""
