"""How long candidates of `tune.py` take on the GPU that is here, in a process that a bad one may take along."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from benchmarks.kernels_attention import packed_documents, whole_sequences
from benchmarks.kernels_problem import Model, distance
from benchmarks.kernels_timing import GpuTimer, Times
from benchmarks.tune_candidates import SEQUENCES, TOKENS, WIDTH, Config, is_kernel, operation, use
from benchmarks.worker import JobDied, Worker, is_fatal, one_line
from megaflow.kernels.attention import Segments

LIMIT = 5e-3
"""How far a candidate's results may be from those of the present configuration."""
RUNS = 10
PATIENCE = 60.0
"""Seconds after which a candidate is taken for one that never ends."""


class Group(NamedTuple):
    """What one winner is chosen for."""

    kernel: str
    head_dim: int


class Job(NamedTuple):
    """For the process that times: a candidate after the other."""

    group: Group
    arch: int
    before: Config
    configs: list[Config]


@cache
def inputs(head_dim: int, packed: bool) -> tuple[Segments, torch.Tensor, torch.Tensor]:
    """Segments, all three of attention's tensors side by side, and a gradient."""
    heads = WIDTH // head_dim
    model = Model("tuned", WIDTH, heads, 0, SEQUENCES, TOKENS)
    lengths = packed_documents(model) if packed else whole_sequences(model)
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    segments = Segments.documents(edges, max(lengths), model.tokens)
    torch.manual_seed(0)
    x = torch.randn(TOKENS, SEQUENCES, 3 * heads, head_dim, device="cuda").bfloat16().requires_grad_()
    return segments, x, torch.randn(TOKENS, SEQUENCES, heads, head_dim, device="cuda").bfloat16()


@cache
def timer() -> GpuTimer:
    return GpuTimer()


def run(group: Group, packed: bool, count: int) -> tuple[list[float], list[torch.Tensor]]:
    """Milliseconds of each run of the kernel alone, among the others of its operation, and the operation's results."""
    segments, x, grad = inputs(group.head_dim, packed)
    function, backward = operation(group.kernel), "backward" in group.kernel
    events: list[tuple[Any, Any]] = []
    launch = JITFunction.run

    def timed(self: Any, *args: Any, **options: Any) -> Any:
        if not is_kernel(self.fn, group.kernel):
            return launch(self, *args, **options)
        torch.cuda._sleep(400_000)  # the host queues the launch meanwhile
        timer().buffer.max()  # nothing of the inputs is left in the cache
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = launch(self, *args, **options)
        end.record()
        events.append((start, end))
        return result

    JITFunction.run = timed
    try:
        with torch.set_grad_enabled(backward):
            out = function(WIDTH // group.head_dim, segments, x)
            results = [out.detach()]
            for _ in range(count if backward else count - 1):
                if backward:
                    results = list(torch.autograd.grad(out, [x], grad, retain_graph=True))
                else:
                    function(WIDTH // group.head_dim, segments, x)
        torch.cuda.synchronize()
    finally:
        JITFunction.run = launch
    return [start.elapsed_time(end) for start, end in events], results


def time_job(job: Job) -> Iterator[dict[str, Any]]:
    """A message before and after every candidate."""
    use(*job.group, job.arch, job.before)
    expected = [run(job.group, packed, 1)[1] for packed in (False, True)]
    for number, config in enumerate(job.configs):
        yield {"number": number}
        found: dict[str, Any] = {"number": number}
        try:
            use(*job.group, job.arch, config)
            for packed, wanted in zip((False, True), expected, strict=True):
                run(job.group, packed, 2)  # loads the code
                samples, results = run(job.group, packed, RUNS)
                error = max(distance(x, y.float()) for x, y in zip(results, wanted, strict=True))
                if not error < LIMIT:
                    raise AssertionError(f"its results are {error:.1e} off")
                found["packed" if packed else "causal"] = Times.of(samples).as_dict()
        except Exception as error:
            yield {"number": number, "dropped": one_line(error)}
            if is_fatal(error):
                raise
        else:
            yield found


def time_group(worker: Worker, job: Job, until: float) -> list[dict[str, Any]]:
    """What became of every configuration, the present one first; where one takes its process along, another goes on."""
    rows: list[dict[str, Any]] = [{} for _ in job.configs]
    begun = 0
    while begun < len(job.configs) and time.time() < until:
        current_number = None
        try:
            for message in worker.run(job._replace(configs=job.configs[begun:])):
                current_number = message["number"] + begun
                rows[current_number] |= {key: value for key, value in message.items() if key != "number"}
                if time.time() > until and len(message) > 1:
                    break
            break
        except JobDied as died:
            if current_number is None:  # of the present configuration, which the others are compared with
                return [{"dropped": f"nothing to compare with: {died}"} for _ in rows]
            if not rows[current_number]:
                rows[current_number]["dropped"] = str(died)
            begun = current_number + 1
    return [row or {"dropped": "no time was left"} for row in rows]
