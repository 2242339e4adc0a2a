"""The conversation: from a visitor's frame to a grounded, checked and remembered reply."""
