"""What a run would cost on a cluster before it is started: memory of every rank, time of a step, the best layouts.

Nothing here imports torch.
"""
