"""Text classification: a text, or a pair of texts, gets a label, or several."""
