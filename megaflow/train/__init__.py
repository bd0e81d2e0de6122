"""The training loop: `loop.py` runs, `step.py` is one optimizer step, `metrics.py` and `evaluate.py` say how it goes."""
