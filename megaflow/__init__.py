"""megaflow: continued training of LLaMA-2 models into a new language, with exact language ratios in every step."""

__version__ = "0.1.0"
