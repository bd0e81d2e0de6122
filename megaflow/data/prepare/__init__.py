"""Text to corpora: reading, templates, tokenising, shuffling."""
