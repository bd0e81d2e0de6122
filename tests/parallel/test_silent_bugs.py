"""Mistakes that trainers have made without noticing: the loss falls all the same, only less. Each test is named after
what would go wrong; what the whole runs of other tests show anyway is not repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.config import ModelConfig, OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.data.loader import Batch, cut_batch
from megaflow.kernels.dispatch import select_ops
from megaflow.model.chunks import chunks_of
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.layers import DeferredGradients, column_parallel_linear
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters
from megaflow.parallel.regions import leave_tensor_region
from megaflow.parallel.runner import Pipeline
from megaflow.train.step import StepOutcome, train_step
from tests.distributed import run_ranks
from tests.tiny import make_batch, tiny_config, tiny_model

DECAY = 0.1


@dataclass
class Trainer:
    """This rank's part of a run, step by step."""

    parallel: ParallelConfig
    ctx: ParallelContext
    config: ModelConfig

    def __post_init__(self) -> None:
        self.model = tiny_model(self.config, self.ctx)
        self.parameters = FlatParameters(self.model, self.parallel, bucket_bytes=2**14)
        self.gradients = GradientBuffer(self.parameters, self.ctx, self.parallel)
        self.optimizer = AdamW(OptimConfig(lr=1e-2, weight_decay=DECAY, clip=0.0), self.parameters, self.gradients)
        self.pipeline = Pipeline(self.model, self.parallel)

    @classmethod
    def single(cls) -> Trainer:
        return cls(ParallelConfig(), ParallelContext.single(), tiny_config())

    @classmethod
    def ranked(cls, **settings: object) -> Trainer:
        parallel = ParallelConfig.model_validate(settings)
        return cls(parallel, ParallelContext.create(parallel, "cpu"), tiny_config())

    def step(self, batches: list[Batch], lr: float = 1e-2) -> StepOutcome:
        outcome = train_step(self.pipeline, self.gradients, self.optimizer, batches, 1, lr, stop=False)
        self.parameters.wait()
        return outcome


def rows(count: int, seed: int = 5) -> list[Batch]:
    """Batches of one sequence, with loss on all tokens of the first, on few of the second, and so on."""
    generator = torch.Generator().manual_seed(seed)
    return [make_batch([[16]], generator, masked=(0.0, 0.9, 0.5, 0.97)[i % 4]) for i in range(count)]


def join(batches: list[Batch]) -> Batch:
    names = ("tokens", "labels", "positions", "sources")
    joined = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    edges = torch.arange(0, 16 * len(batches) + 1, 16, dtype=torch.int32)
    return replace(batches[0], **joined, cu_seqlens=edges)


def test_a_micro_batch_with_few_tokens_of_loss_weighs_as_much_as_one_with_many() -> None:
    """And the last one is not skipped: the gradient is that of all four sequences at once."""
    norms, sums = [], []
    for size in (4, 2, 1):
        trainer, given = Trainer.single(), rows(4)
        outcome = trainer.step([join(given[i : i + size]) for i in range(0, 4, size)], lr=0.0)
        norms.append(outcome.grad_norm)
        sums.append(trainer.gradients.flat.clone())
    for norm, total in zip(norms[1:], sums[1:], strict=True):
        torch.testing.assert_close(norm, norms[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(total, sums[0], rtol=1e-4, atol=1e-5)


def weigh_by_rank() -> tuple[float, dict[str, Tensor]]:
    trainer = Trainer.ranked(zero=False)
    mine = rows(4)[2 * trainer.ctx.dp_rank :][:2]
    outcome = trainer.step(mine, lr=0.0)
    return float(outcome.grad_norm), trainer.gradients.sums


def test_a_rank_with_few_tokens_of_loss_weighs_as_much_as_one_with_many() -> None:
    single = Trainer.single()
    norm = float(single.step(rows(4), lr=0.0).grad_norm)
    for found, sums in run_ranks(2, weigh_by_rank):
        assert found == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(sums, single.gradients.sums, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_last_step_leak_into_the_next() -> None:
    trainer = Trainer.single()
    first, second = (trainer.step(rows(2), lr=0.0).grad_norm for _ in range(2))
    assert torch.equal(first, second)


def test_padding_of_the_vocabulary_leaks_into_the_softmax() -> None:
    model, (batch,) = tiny_model(), rows(1)
    vocab = model.config.vocab_size
    assert model.head.weight.shape[0] > vocab
    expected = model.loss(batch).losses
    with torch.no_grad():
        model.head.weight[vocab:] = 50.0
        model.embed.weight[vocab:] = torch.nan
    objective, losses = model.loss(batch)
    objective.backward()
    assert torch.equal(losses, expected)
    for weight in (model.head.weight, model.embed.weight):
        assert weight.grad is not None
        assert not weight.grad[vocab:].any()
        assert weight.grad[:vocab].any()


def decay_alone(zero: bool) -> list[str]:
    """Names of parameters that one step without any gradient changes in another way than by weight decay."""
    trainer = Trainer.ranked(zero=zero)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.parameters.items()}
    (batch,) = rows(1)
    trainer.step([replace(batch, labels=torch.full_like(batch.labels, -100))], lr=0.5)
    wrong = []
    for name, parameter in trainer.parameters.parameters.items():
        kept = 1 - 0.5 * DECAY if parameter.ndim > 1 else 1.0
        if not torch.allclose(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("zero", [False, True])
def test_norms_decay_where_the_state_is_sharded(zero: bool) -> None:
    """And matrices do not, or twice: slices of ranks end in the midst of parameters."""
    assert run_ranks(2, decay_alone, zero) == [[], []]


def train_and_compare(settings: dict[str, object]) -> list[str]:
    """Names of parameters that are whole on both ranks and differ after three steps."""
    trainer = Trainer.ranked(**settings)
    ctx = trainer.ctx
    for seed in range(3):
        trainer.step([cut_batch(batch, ctx.cp, ctx.cp_rank) for batch in rows(2, seed)[ctx.dp_rank :: ctx.dp]])
    found = []
    for name, parameter in trainer.parameters.parameters.items():
        if ctx.tp == 1 or parameter.ndim == 1:
            both = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(both, parameter.detach())
            if not torch.equal(*both):
                found.append(name)
    return found


@pytest.mark.parametrize(
    "settings",
    [{"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"zero": True}, {"zero": False}, {"cp": 2}],
    ids=["tp", "tp+sp", "zero", "dp", "cp"],
)
def test_copies_of_a_weight_drift_apart(settings: dict[str, object]) -> None:
    assert run_ranks(2, train_and_compare, settings) == [[], []]


def transposed_layers(sequence_parallel: bool) -> list[float]:
    """How far gradients of cut layers are from the whole product's, all tensors given transposed in memory."""
    ctx = ParallelContext.create(ParallelConfig(tp=2, sequence_parallel=sequence_parallel), "cpu")
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((2, 8, 6), (10, 6), (2, 8, 10)))

    def part(whole: Tensor) -> Tensor:
        """Of `[B, S, H]`, transposed to `[S, B, H]`."""
        rows = slice(4 * ctx.tp_rank, 4 * ctx.tp_rank + 4) if sequence_parallel else slice(None)
        return whole.transpose(0, 1)[rows]

    columns = slice(5 * ctx.tp_rank, 5 * ctx.tp_rank + 5)
    mine = part(x).detach().requires_grad_()
    out = column_parallel_linear(mine, torch.nn.Parameter(weight[columns].clone()), ctx, DeferredGradients())
    torch.autograd.backward(out, grad[..., columns].transpose(0, 1))
    assert mine.grad is not None
    partial = (grad[..., columns] @ weight[columns]).transpose(0, 1).requires_grad_()
    total = leave_tensor_region(partial.clone(memory_format=torch.preserve_format), ctx)
    wanted = part(grad @ weight)
    return [float((mine.grad - wanted).abs().max()), float((total - wanted).abs().max())]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_tensor_that_is_not_contiguous_is_reduced_into_a_copy(sequence_parallel: bool) -> None:
    for deviations in run_ranks(2, transposed_layers, sequence_parallel):
        assert max(deviations) < 1e-5


def numbered() -> Batch:
    """Two sequences of two documents each, every token of them another, the label the next token's number."""
    generator = torch.Generator().manual_seed(0)
    batch = make_batch([[5, 11], [12, 4]], generator, masked=0.0)
    tokens = torch.arange(32).view(2, 16)
    return replace(batch, tokens=tokens, labels=tokens + 1)


def test_labels_or_positions_are_made_after_the_cut_of_a_sequence() -> None:
    whole, seen = numbered(), []
    for rank in range(4):
        part = cut_batch(whole, 4, rank)
        seen += part.tokens.flatten().tolist()
        assert torch.equal(part.labels, part.tokens + 1)
        assert torch.equal(part.positions, whole.positions.flatten()[part.tokens.long()])
    assert sorted(seen) == list(range(32))


def losses_of_cut(changed: int | None) -> Tensor:
    """This rank's losses, by place in the whole batch; NaN where others have them."""
    trainer = Trainer.ranked(cp=2)
    whole = numbered()
    tokens = whole.tokens.clone()
    if changed is not None:
        tokens.view(-1)[changed] = 77
    places = cut_batch(whole, 2, trainer.ctx.cp_rank).tokens
    out = torch.full((32,), torch.nan)
    losses = trainer.model.loss(cut_batch(replace(whole, tokens=tokens), 2, trainer.ctx.cp_rank)).losses
    out[places.flatten().long()] = losses.flatten()
    return out


def test_a_document_sees_the_one_before_where_sequences_are_cut() -> None:
    """Or the tokens after: a changed token moves the losses of its own document from there on, and no other."""
    before = torch.stack(run_ranks(2, losses_of_cut, None)).nansum(0)
    after = torch.stack(run_ranks(2, losses_of_cut, 2)).nansum(0)
    moved = (before != after).nonzero().flatten().tolist()
    assert moved == [2, 3, 4]


def stages(tie: bool) -> list[Llama]:
    """The two stages of a model, as ranks of a pipeline of two replicas would hold them."""
    config = tiny_config(num_layers=4, tie_embeddings=tie)
    models = []
    for rank in (0, 1):
        ctx = ParallelContext(torch.device("cpu"), rank=2 * rank, world_size=4, pp=2, pp_rank=rank, dp=2)
        chunks = chunks_of(config, ParallelConfig(pp=2, layers_per_chunk=[1, 3]), 16, rank)
        models.append(Llama(config, ctx, select_ops("cpu", torch.float32), chunks=chunks))
    return models


def test_a_stage_takes_its_layers_for_the_first_ones_of_the_model() -> None:
    """Then a checkpoint loaded by another number of stages puts layers in the wrong places (Megatron-LM 7452)."""
    tables = [placement(model.config, model.ctx, model.chunks) for model in stages(tie=False)]
    whole = placement(tiny_config(num_layers=4), ParallelContext.single())
    assert tables[0] | tables[1] == whole
    assert {name.split(".")[1] for name in tables[1] if name.startswith("layers.")} == {"1", "2", "3"}


def test_ends_of_a_pipeline_share_out_a_tied_embedding_differently() -> None:
    """Then the sum of their gradients adds parts that do not belong together (Megatron-LM 844)."""
    parts = []
    for model in stages(tie=True):
        parameters = FlatParameters(model, ParallelConfig(pp=2, layers_per_chunk=[1, 3]))
        name = "embed.weight" if model.ctx.pp_rank == 0 else "head.weight"
        part = parameters.range_of(name, parameters.own(parameters.flat))
        parts.append((part.start, len(part.values), part.shape))
        assert parameters.bucket_of[name].names == (name,)
    assert parts[0] == parts[1]
    assert 0 < parts[0][1] < parts[0][2][0] * parts[0][2][1]


def test_a_step_draws_random_numbers() -> None:
    """Then a resumed or recomputed step would need the generator's state, which no checkpoint holds."""
    trainer, before = Trainer.single(), torch.get_rng_state()
    trainer.step(rows(2))
    assert torch.equal(torch.get_rng_state(), before)
