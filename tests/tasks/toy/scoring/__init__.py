"""Text scoring: a text gets a number."""
