"""Checkpoints that any layout can load, that notice every flipped bit, and that Hugging Face can read."""
