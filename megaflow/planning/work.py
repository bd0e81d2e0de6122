"""Seconds of a micro-batch in a chunk of the model: matrix products, attention, memory, exposed collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megaflow.parallel.vocabulary import vocabulary_rows
from megaflow.planning.cluster import Cluster
from megaflow.planning.layout import Held, Job, Layout

SCORE_BYTES = (13, 19)
"""Bytes moved for every attention score in bf16 where attention is not flash, forward and backward."""
LOSS_BYTES = (34, 14)
"""Bytes moved for every logit by a cross-entropy in fp32, forward and backward."""
FUSED_LOSS_BYTES = 4
"""By one that reads the logits in bf16 and overwrites them with their gradient."""


@dataclass(frozen=True)
class Practice:
    """How a program runs a layer; the defaults are ours.

    Ours: fused kernels; in a backward pass that is not split the collectives of column-parallel layers run under the
    products of the other gradient, every other collective is waited for.
    """

    overlaps_tensor: bool = False
    """All tensor-parallel collectives are cut in pieces, each under a part of its product."""
    overlaps_context: bool = False
    """Keys and values travel while attention works on those already there."""
    fuses_gradients: bool = False
    """The matrix product adds to the fp32 sum of a weight's gradient itself."""
    flash: bool = True
    """Attention keeps its scores in the cores; without, they go through memory."""
    flash_backward: float = 3.5
    """Matrix products of flash attention backward for each of forward: seven against two; five against two where one
    kernel makes all gradients, in any order (arXiv 2205.14135)."""
    fused_loss: bool = True
    """Gradients of the head are computed in its forward pass, block by block of tokens; else the cross-entropy is a
    function of its own, in fp32."""
    traffic: float = 1.0
    """Bytes that norms, residuals, rotary embedding and SwiGLU move, over those of kernels fused as far as can be."""
    linear_speed: float = 1.0
    """Of the layers' matrix products against bf16, for fp8."""


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds by kind."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    """Tensor-parallel collectives that nothing hides."""
    context: float = 0.0
    """Context-parallel ones."""

    @property
    def seconds(self) -> float:
        return self.matmul + self.attention + self.memory + self.tensor + self.context

    def __add__(self, other: Work) -> Work:
        return self.plus(other, 1)

    def __mul__(self, times: float) -> Work:
        return NOTHING.plus(self, times)

    def plus(self, other: Work, times: float) -> Work:
        """The sum with `times` the other."""
        return Work(
            self.matmul + times * other.matmul,
            self.attention + times * other.attention,
            self.memory + times * other.memory,
            self.tensor + times * other.tensor,
            self.context + times * other.context,
        )


NOTHING = Work()


class Passes(NamedTuple):
    """Work of the three passes; recomputation is a part of the input gradient."""

    forward: Work
    backward_input: Work
    backward_weight: Work

    def plus(self, other: Passes, times: float = 1) -> Passes:
        """The sum with `times` the other."""
        return Passes(
            self.forward.plus(other.forward, times),
            self.backward_input.plus(other.backward_input, times),
            self.backward_weight.plus(other.backward_weight, times),
        )

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward_input.seconds + self.backward_weight.seconds


IDLE = Passes(NOTHING, NOTHING, NOTHING)


class Parts(NamedTuple):
    """What chunks are made of, for one micro-batch."""

    layer: Passes
    recomputed: Passes
    embedding: Passes
    head: Passes

    def of(self, held: Held) -> Passes:
        """The work for that much of the model."""
        work = IDLE.plus(self.layer, held.layers - held.recomputed).plus(self.recomputed, held.recomputed)
        if held.embed:
            work = work.plus(self.embedding)
        return work.plus(self.head) if held.head else work


@dataclass(frozen=True)
class Workload:
    """What a rank does for each micro-batch, by parts of the model."""

    job: Job
    layout: Layout
    cluster: Cluster
    practice: Practice = Practice()

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one rank, before sequence parallelism."""
        return self.layout.micro_batch * self.job.seq_length // self.layout.cp

    @property
    def residual(self) -> float:
        """Elements of a layer's input on one rank."""
        return self.tokens * self.job.model.hidden_size / (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def boundary(self) -> float:
        """Bytes that travel between pipeline ranks for a micro-batch."""
        return self.residual * self.job.element

    def message(self) -> float:
        """Seconds of one such message."""
        stride = self.layout.gpus // self.layout.pp
        return self.cluster.send(self.boundary, stride) if self.layout.pp > 1 else 0.0

    def layer(self, recomputed: bool) -> Passes:
        """One transformer layer."""
        model, layout = self.job.model, self.layout
        tokens, hidden = self.tokens, model.hidden_size
        kv = model.num_kv_heads * model.head_dim
        width, inner = (hidden + 2 * kv) / layout.tp, model.intermediate_size / layout.tp
        attention = self._attention()
        products = [
            self._product(hidden, width, gathers=True),
            self._product(hidden / layout.tp, hidden, gathers=False),
            self._product(hidden, 2 * inner, gathers=True),
            self._product(inner, hidden, gathers=False),
        ]
        forward, backward_input, backward_weight = attention
        for product in products:
            forward, backward_input, backward_weight = (
                a + b for a, b in zip((forward, backward_input, backward_weight), product, strict=True)
            )
        # two norms and two residual additions; q, k and v laid out and rotated, heads put together; SwiGLU
        heads = tokens * (4 * width + 2 * hidden / layout.tp)
        forward += self._touch(10 * self.residual + heads + 3 * tokens * inner)
        backward_input += self._touch(12 * self.residual + heads + 5 * tokens * inner)
        if recomputed and layout.recompute == "full":
            backward_input += forward + products[-1].forward * -1  # the last product's result is nobody's input
        elif recomputed and layout.recompute == "selective":
            again = attention.forward + Work(context=-attention.forward.context)  # keys and values are kept whole
            backward_input += again + self._touch(4 * self.residual + heads + 3 * tokens * inner)
        return Passes(forward, backward_input, backward_weight)

    def embedding(self) -> Passes:
        """Look-up, and the sum over ranks that hold other rows."""
        e = self.job.element
        looked_up = Work(memory=self.cluster.touch(2 * e * self.tokens * self.job.model.hidden_size))
        exposed = Work(tensor=self._collective())
        return Passes(looked_up + exposed, exposed + looked_up, NOTHING)

    def head(self) -> Passes:
        """Final norm, projection to the vocabulary, cross-entropy."""
        rows = vocabulary_rows(self.job.model.vocab_size, self.layout.tp)
        forward, backward_input, backward_weight = self._product(
            self.job.model.hidden_size, rows, gathers=True, head=True
        )
        logits = self.tokens * rows
        norm = self.cluster.touch(self.job.element * 2 * self.residual)
        if self.practice.fused_loss:
            loss = Work(memory=self.cluster.touch(FUSED_LOSS_BYTES * logits) + norm)
            reduced = self._collective() * (1 if self.layout.sequence_parallel else 2)
            exposed = max(0.0, reduced - forward.matmul)  # it runs under the product of the weight's gradient
            products = forward + Work(2 * forward.matmul, memory=backward_weight.memory, tensor=exposed) + loss
            return Passes(products, Work(memory=2 * norm), NOTHING)
        return Passes(
            forward + Work(memory=self.cluster.touch(LOSS_BYTES[0] * logits) + norm),
            backward_input + Work(memory=self.cluster.touch(LOSS_BYTES[1] * logits) + 2 * norm),
            backward_weight,
        )

    def parts(self) -> Parts:
        """Everything that a chunk can be made of."""
        return Parts(self.layer(recomputed=False), self.layer(recomputed=True), self.embedding(), self.head())

    def _touch(self, elements: float) -> Work:
        """Element-wise operations that read and write so many."""
        return Work(memory=self.cluster.touch(self.practice.traffic * self.job.element * elements))

    def _collective(self) -> float:
        """Seconds of an all-gather or reduce-scatter of the activations over tp; an all-reduce is both."""
        size = self.tokens * self.job.model.hidden_size * self.job.element
        return self.cluster.gather(size, self.layout.tp, stride=1)

    def _product(self, inputs: float, outputs: float, gathers: bool, head: bool = False) -> Passes:
        """A linear layer `[T, inputs] x [inputs, outputs]`; column-parallel when it gathers its input, else row-."""
        compute = self.cluster.compute(2 * self.tokens * inputs * outputs / (1 if head else self.practice.linear_speed))
        sums = self.cluster.touch((8 if self.practice.fuses_gradients else 12) * inputs * outputs)
        collective, sp = self._collective(), self.layout.sequence_parallel
        # without sequence parallelism the row-parallel layers reduce both halves forward, the column-parallel backward
        forward = collective * (1 if sp else 0 if gathers else 2)
        backward = collective * ((2 if gathers else 1) if sp else 2 if gathers else 0)
        later = 0.0
        if self.practice.overlaps_tensor:
            forward, backward = (self._left(part, compute) for part in (forward, backward))
        elif gathers and self.layout.splits:  # the other gradient comes later: there is nothing to run under
            backward, later = collective * (1 if sp else 2), collective if sp else 0.0
        elif gathers:
            backward = 2 * max(0.0, collective - compute) if sp else max(0.0, 2 * collective - compute)
        return Passes(
            Work(matmul=compute, tensor=forward),
            Work(matmul=compute, tensor=backward),
            Work(matmul=compute, memory=sums, tensor=later),
        )

    def _left(self, collective: float, compute: float) -> float:
        """What a product cut in tp pieces leaves of its collective: one piece at least."""
        return max(collective / self.layout.tp, collective - compute)

    def _attention(self) -> Passes:
        """Causal attention over whole sequences; keys and values are gathered over cp."""
        model, layout = self.job.model, self.layout
        flops = 2 * self.tokens * self.job.seq_length * model.hidden_size / layout.tp
        size = 2 * layout.micro_batch * self.job.seq_length * model.num_kv_heads * model.head_dim * self.job.element
        gathered = self.cluster.gather(size / layout.tp, layout.cp, stride=layout.tp)
        if self.practice.flash:
            forward = Work(attention=self.cluster.attend(flops))
            backward = forward * self.practice.flash_backward
        else:
            scores = self.tokens * self.job.seq_length * model.num_heads / layout.tp
            products = self.cluster.compute(flops)  # two of half of this, over scores that the mask wastes half of
            forward = Work(2 * products, memory=self.cluster.touch(SCORE_BYTES[0] * scores))
            backward = Work(4 * products, memory=self.cluster.touch(SCORE_BYTES[1] * scores))
        hidden = forward.seconds if self.practice.overlaps_context else 0.0
        exposed = Work(context=max(0.0, gathered - hidden))
        return Passes(forward + exposed, backward + exposed, NOTHING)
