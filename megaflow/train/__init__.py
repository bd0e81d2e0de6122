"""Training: `run.py` opens a run, `loop.py` drives it, `step.py` is one optimizer step, `report.py` tells of it."""
