"""Bytes that a rank sends in a step, by kind of parallelism."""

from __future__ import annotations

from megaflow.planning.layout import Job, Layout
from megaflow.planning.memory import rank_parameters


def volumes(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes that leave a rank of the middle of the pipeline in a step, by ring collectives (n - 1) / n of a tensor.

    Under sequence parallelism a layer gathers and scatters its residuals four times forward and six times backward,
    where the input of the column-parallel layers is gathered again; else it sums them four times, which is twice as
    much each. Full recomputation repeats those of a layer's forward pass but the last, and gathers keys and values
    again; selective repeats none.
    """
    model, element = job.model, job.element
    micro_batches = layout.micro_batches(job)
    tokens = layout.micro_batch * job.seq_length // layout.cp
    layers = model.num_layers / layout.pp
    residual = tokens * model.hidden_size * element
    collectives: float = 10 if layout.sequence_parallel else 8
    if layout.recompute == "full":
        collectives += 3 / layout.recompute_interval if layout.sequence_parallel else 2 / layout.recompute_interval
    gathered = 2 + (1 / layout.recompute_interval if layout.recompute == "full" else 0)
    keys = 2 * tokens * layout.cp * model.num_kv_heads * model.head_dim // layout.tp * element
    boundaries = len(layout.owners) - 1 - (layout.schedule == "zb_v" and layout.pp > 1)
    held = max(rank_parameters(job, layout))
    gradients = (2 if job.grad_reduce == "bf16" else 4) * held
    share = (layout.data - 1) / layout.data
    return {
        "tensor parallel": micro_batches * layers * collectives * residual * (layout.tp - 1) / layout.tp,
        "context parallel": micro_batches * layers * gathered * keys * (layout.cp - 1) / layout.cp,
        "pipeline": micro_batches
        * 2
        * boundaries
        / layout.pp
        * (residual / (layout.tp if layout.sequence_parallel else 1)),
        "gradients": gradients * share * (1 if layout.zero else 2),
        "parameters": element * held * share if layout.zero else 0.0,
    }
