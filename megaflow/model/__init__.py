"""LLaMA-2: layers, the table of what is cut where, initial weights, generation, cost."""
