"""Runs a rank's part of any pipeline schedule: its actions in order, and plain sends and receives between them.

With NCCL the groups must be made when `init_process_group` was given a device: then each has one communicator, which
does one thing at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megaflow.config_parallel import ParallelConfig
from megaflow.parallel.layers import Job
from megaflow.parallel.mesh import PIPELINE_CHANNELS, ParallelContext
from megaflow.parallel.schedule import Action, Schedule, chunk_owners, forward_only, make_schedule
from megaflow.parallel.simulator import Communicator, Transfer, action_ends, transfers

if TYPE_CHECKING:
    from megaflow.data.loader import Batch
    from megaflow.model.llama import Layout, Llama
    from megaflow.parallel.gradients import GradientBuffer

SENDS_UNDER_WAY = 2
"""Messages of a communicator that may be on their way before a rank waits for the oldest: they hold memory."""

Message = tuple[Literal["forward", "backward"], int, int]
"""Phase, micro-batch and chunk: the output of the chunk or, in the backward phase, its input gradient."""


@dataclass(frozen=True)
class Program:
    """What a rank does in a step."""

    steps: list[Action | Transfer]
    """Its actions and the ends of messages among them, in the order in which it posts them."""
    final: dict[Action, list[str]]
    """By action, the parameters whose gradient of the step is whole after it."""


class Pipeline:
    """A model's chunks on this rank and the schedules that run them, for a whole run; made by all ranks together."""

    def __init__(self, model: Llama, parallel: ParallelConfig) -> None:
        self.model = model
        self.parallel = parallel
        self._programs: dict[tuple[int, bool], Program] = {}
        if model.ctx.pp > 1:
            connect(model.ctx, parallel)

    def train(self, batches: Sequence[Batch], gradients: GradientBuffer) -> dict[int, Tensor]:
        """Forward and backward passes of a step's micro-batches; gradients of the objective's sum go to the buffer.

        Returns the losses `[B, S]` by micro-batch on ranks that have the output head, nothing on others.
        """
        return _Step(self.model, batches, gradients).run(self._program(len(batches), training=True))

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> dict[int, Tensor]:
        """What `train` returns, from forward passes alone; micro-batches may differ in size."""
        return _Step(self.model, batches, None).run(self._program(len(batches), training=False))

    def _program(self, micro_batches: int, training: bool) -> Program:
        if (micro_batches, training) not in self._programs:
            rank = self.model.ctx.pp_rank
            name, pp, chunks = self.parallel.schedule, self.parallel.pp, self.parallel.chunks_per_rank
            if training:
                schedule = make_schedule(name, pp, micro_batches, chunks)
            else:
                schedule = forward_only(chunk_owners(name, pp, chunks), micro_batches)
            final = last_gradients(self.model, schedule.ranks[rank]) if training else {}
            self._programs[micro_batches, training] = Program(posts(schedule, rank), final)
        return self._programs[micro_batches, training]


def connect(ctx: ParallelContext, parallel: ParallelConfig) -> None:
    """Sends an element on every way that a schedule's messages take; collective.

    NCCL connects two ranks of a communicator at their first message and holds both up until each has posted it. A
    receive that is posted early would wait for a send that comes after the rank's own.
    """
    schedule = make_schedule(parallel.schedule, parallel.pp, parallel.pp, parallel.chunks_per_rank)
    ends = dict.fromkeys(replace(end, micro_batch=0, chunk=0) for end in transfers(schedule, ctx.pp_rank))
    for channel in PIPELINE_CHANNELS:
        messages = [
            dist.P2POp(
                dist.isend if end.sends else dist.irecv,
                torch.zeros(1, device=ctx.device),
                group=ctx.group(channel),
                group_peer=end.peer,
            )
            for end in ends
            if end.communicator.group == channel
        ]
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()


def posts(schedule: Schedule, rank: int) -> list[Action | Transfer]:
    """A rank's actions with its messages among them.

    A receive is posted before the receiving action that precedes its own, so that the message travels while the rank
    computes. Where that action sends on the same communicator the receive follows the send: a communicator of NCCL does
    one thing at a time, and what is to come may depend on what is to go.
    """
    ends = [action_ends(schedule, action) for action in schedule.ranks[rank]]
    receives = deque(receive for receive, _ in ends if receive is not None)
    posted: list[Action | Transfer] = [receives.popleft()] if receives else []
    for action, (receive, send) in zip(schedule.ranks[rank], ends, strict=True):
        ahead = [receives.popleft()] if receive is not None and receives else []
        sends = [] if send is None else [send]
        behind = any(end.communicator == send.communicator for end in ahead for send in sends)
        posted += [action, *sends, *ahead] if behind else [*ahead, action, *sends]
    return posted


def last_gradients(model: Llama, actions: Sequence[Action]) -> dict[Action, list[str]]:
    """By action, the parameters that get their last gradient of the step in it.

    Norms and tied embeddings are left out: other ranks have a part in theirs.
    """
    final: dict[Action, list[str]] = defaultdict(list)
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    for number, chunk in model.chunks.items():
        backward = [action for action in actions if action.chunk == number and action.kind != "forward"]
        inputs = next(action for action in reversed(backward) if action.kind != "backward_weight")
        weights = next(action for action in reversed(backward) if action.kind != "backward_input")
        layers = {f"layers.{i}" for i in chunk.layers}
        final[weights] += [name for name in matrices if ".".join(name.split(".")[:2]) in layers]
        if not model.config.tie_embeddings:
            final[inputs] += ["embed.weight"] * chunk.embed + ["head.weight"] * chunk.head
    return final


@dataclass(frozen=True)
class _Passed:
    """What a forward pass leaves for its backward pass, besides what autograd keeps."""

    x: Tensor | None
    """The chunk's input; None for tokens."""
    output: GradientEdge
    """The output's place in the graph. The output itself is not kept: it goes when it is sent."""


class _Step:
    """One run through a program."""

    def __init__(self, model: Llama, batches: Sequence[Batch], gradients: GradientBuffer | None) -> None:
        self.model, self.ctx, self.batches, self.gradients = model, model.ctx, batches, gradients
        self.messages: dict[Message, Tensor] = {}
        """What chunks have yielded, or other ranks send, and nobody has taken."""
        self.receiving: dict[Message, dist.Work] = {}
        self.sending: dict[Communicator, deque[tuple[dist.Work, Tensor]]] = defaultdict(deque)
        """Tensors are held until they are sent."""
        self.layouts: dict[int, Layout] = {}
        self.passed: dict[tuple[int, int], _Passed] = {}
        self.jobs: dict[tuple[int, int], list[Job]] = {}
        self.losses: dict[int, Tensor] = {}

    def run(self, program: Program) -> dict[int, Tensor]:
        for step in program.steps:
            if isinstance(step, Transfer):
                self._send(step) if step.sends else self._receive(step)
                continue
            if self.gradients is not None and step in program.final:
                self.gradients.final(program.final[step])
            if step.kind == "forward":
                self._forward(step.micro_batch, step.chunk)
            elif step.kind == "backward_weight":
                self._backward_weight(step.micro_batch, step.chunk)
            else:
                self._backward(step.micro_batch, step.chunk, split=step.kind == "backward_input")
        for under_way in self.sending.values():
            for work, _ in under_way:
                work.wait()
        return self.losses

    def _forward(self, index: int, number: int) -> None:
        batch, chunk = self.batches[index], self.model.chunks[number]
        if index not in self.layouts:
            self.layouts[index] = self.model.layout(batch)
        x = batch.tokens.T if chunk.embed else self._take(("forward", index, number - 1))
        if not chunk.embed and self.gradients is not None:
            x.requires_grad_()
        output = self.model.run_chunk(number, x, self.layouts[index])
        if chunk.head:
            output, self.losses[index] = self.model.losses(output, batch.labels)
        else:
            self.messages["forward", index, number] = output.detach()
        if self.gradients is not None:
            self.passed[index, number] = _Passed(None if chunk.embed else x, get_gradient_edge(output))
        if number == max(self.model.chunks):
            del self.layouts[index]

    def _backward(self, index: int, number: int, split: bool) -> None:
        passed = self.passed.pop((index, number))
        if self.model.chunks[number].head:
            grad = torch.ones((), dtype=torch.float32, device=self.ctx.device)
        else:
            grad = self._take(("backward", index, number + 1))
        if split:
            with self.model.deferred.collect() as self.jobs[index, number]:
                torch.autograd.backward([passed.output], [grad])
        else:
            torch.autograd.backward([passed.output], [grad])
        if passed.x is not None:
            assert passed.x.grad is not None
            self.messages["backward", index, number] = passed.x.grad

    def _backward_weight(self, index: int, number: int) -> None:
        jobs = self.jobs.pop((index, number))
        jobs.reverse()
        while jobs:  # what a job holds goes when it is done
            jobs.pop().run()

    def _take(self, message: Message) -> Tensor:
        if message in self.receiving:
            self.receiving.pop(message).wait()
        return self.messages.pop(message)

    def _receive(self, end: Transfer) -> None:
        sequences, length = self.batches[end.micro_batch].tokens.shape
        length = self.ctx.tp_share(length) if self.ctx.sequence_parallel else length
        shape = length, sequences, self.model.config.hidden_size
        message = end.communicator.phase, end.micro_batch, end.chunk
        self.messages[message] = torch.empty(shape, dtype=self.model.dtype, device=self.ctx.device)
        work = dist.irecv(self.messages[message], group=self._group(end), group_src=end.peer)
        assert work is not None
        self.receiving[message] = work

    def _send(self, end: Transfer) -> None:
        tensor = self.messages.pop((end.communicator.phase, end.micro_batch, end.chunk)).contiguous()
        under_way = self.sending[end.communicator]
        if len(under_way) == SENDS_UNDER_WAY:
            under_way.popleft()[0].wait()
        work = dist.isend(tensor, group=self._group(end), group_dst=end.peer)
        assert work is not None
        under_way.append((work, tensor))

    def _group(self, end: Transfer) -> dist.ProcessGroup:
        return self.ctx.group(end.communicator.group)
