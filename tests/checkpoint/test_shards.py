"""What ranks hold of global tensors as rectangles: every layout of parameters and optimizer state loads any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaflow.checkpoint.shards import shards_of
from megaflow.checkpoint.store import CheckpointStore, open_checkpoint
from megaflow.config import ModelConfig, OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.kernels.dispatch import select_ops
from megaflow.model.chunks import chunks_of
from megaflow.model.llama import Llama
from megaflow.model.placement import Piece, placement
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.mesh import ParallelContext
from megaflow.parallel.parameters import FlatParameters, FlatRange
from megaflow.train.state import TrainState
from tests.distributed import run_ranks
from tests.tiny import tiny_config


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=2), st.data())
def test_a_range_is_at_most_three_rectangles_of_its_storage(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel())
    start, end = sorted(data.draw(st.integers(0, len(whole))) for _ in range(2))
    covered = torch.full(shape, -1)
    rectangles = list(FlatRange(whole[start:end], start, tuple(shape)).rectangles())
    assert len(rectangles) <= 3
    for offset, rectangle in rectangles:
        assert rectangle.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        cut = tuple(slice(o, o + n) for o, n in zip(offset, rectangle.shape, strict=True))
        assert bool((covered[cut] == -1).all())
        covered[cut] = rectangle
    inside = (torch.arange(len(whole)) >= start) & (torch.arange(len(whole)) < end)
    assert torch.equal(covered.flatten(), torch.where(inside, whole, -1))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.data())
def test_ranges_of_a_parameter_of_two_tensors_put_both_together(
    upper: int, lower: int, padding: int, columns: int, data: st.DataObject
) -> None:
    """Rows of one tensor above those of another above padding, which nobody saves; cut anywhere in three."""
    shape = (upper + lower + padding, columns)
    parameter = torch.arange(shape[0] * columns)
    edges = sorted(data.draw(st.integers(0, len(parameter))) for _ in range(2))
    pieces = [
        Piece("a", (upper + 2, columns), (2, 0), (0, 0), (upper, columns)),
        Piece("b", (lower, columns + 3), (0, 3), (upper, 0), (lower, columns)),
    ]
    found = {"a": torch.full((upper + 2, columns), -1), "b": torch.full((lower, columns + 3), -1)}
    for start, end in zip([0, *edges], [*edges, len(parameter)], strict=True):
        part = FlatRange(parameter[start:end], start, shape)
        for name, shard in shards_of({"p": pieces}, {"p": part}, "g").items():
            assert (name, shard.global_shape) == (f"g/{name[2:]}", tuple(found[name[2:]].shape))
            for offset, block in shard.blocks:
                cut = tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))
                assert bool((found[name[2:]][cut] == -1).all())
                found[name[2:]][cut] = block
    rows = parameter.view(shape)
    assert torch.equal(found["a"][2:], rows[:upper])
    assert torch.equal(found["b"][:, 3:], rows[upper : upper + lower])


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "pp2 zb_v x dp2": {"pp": 2, "schedule": "zb_v"},
    "tp4": {"tp": 4, "sequence_parallel": True},
    "dp4 not sharded": {"zero": False},
    "pp2 x dp2": {"pp": 2},
    "dp2 x cp2": {"cp": 2},
    "tp2 x cp2": {"tp": 2, "cp": 2},
}


def state_of(parallel: ParallelConfig, ctx: ParallelContext, config: ModelConfig, dtype: torch.dtype) -> TrainState:
    chunks = chunks_of(config, parallel, 16, ctx.pp_rank)
    model = Llama(config, ctx, select_ops("cpu", dtype), dtype, chunks)
    parameters = FlatParameters(model, parallel, bucket_bytes=8000)
    optimizer = AdamW(OptimConfig(lr=1.0), parameters, GradientBuffer(parameters, ctx, parallel))
    return TrainState(None, placement(config, ctx, chunks), parameters, optimizer, None)  # type: ignore[arg-type]


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor of a name in the checkpoint."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(name.encode()) * len(name)))


def check(state: TrainState, fill: bool = False) -> None:
    """Compares everything that a rank holds with what it should be, or makes it so."""
    optimizer = state.optimizer
    groups = {"model": optimizer.master, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    for group, own in groups.items():
        for name in state.parameters.parameters:
            part = state.parameters.range_of(name, own)
            wanted = torch.zeros(part.shape)
            for piece in state.placement[name]:
                whole = values(f"{group}/{piece.name}", piece.global_shape)
                wanted[piece.local_slices()] = whole[piece.global_slices()]
            wanted = wanted.flatten()[part.start : part.start + len(part.values)]
            if fill:
                part.values.copy_(wanted)
            assert torch.equal(part.values, wanted), (group, name)


def save(state: TrainState, folder: Path, step: int = 1) -> None:
    check(state, fill=True)
    tensors = state.tensors_to_save()
    CheckpointStore(folder, state.parameters.ctx).save(step, tensors, {})


def load(state: TrainState, folder: Path) -> None:
    tensors = state.tensors_to_load(state.optimizer.master)
    assert CheckpointStore(folder, state.parameters.ctx).load(tensors) is not None
    check(state)
    state.optimizer.copy_master_to_params()
    state.parameters.wait()
    for name, parameter in state.parameters.parameters.items():
        for piece in state.placement[name]:
            wanted = values(f"model/{piece.name}", piece.global_shape)[piece.global_slices()]
            assert torch.equal(parameter.detach()[piece.local_slices()], wanted.to(parameter.dtype)), name


def exchange(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Every layout saves, then loads what one process and two others have saved."""
    layouts = {name: ParallelConfig(**keys) for name, keys in LAYOUTS.items()}
    contexts = {name: ParallelContext.create(parallel, "cpu") for name, parallel in layouts.items()}
    for name, parallel in layouts.items():
        save(state_of(parallel, contexts[name], config, dtype), folder / name)
    names = [*LAYOUTS, "one process"]
    for i, (name, parallel) in enumerate(layouts.items()):
        for other in {"one process", names[(i + 1) % len(names)], names[(i + 3) % len(names)]}:
            load(state_of(parallel, contexts[name], config, dtype), folder / other)


@pytest.mark.parametrize(("tie", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_any_layout_loads_any_other_bit_by_bit(tmp_path: Path, tie: bool, dtype: torch.dtype) -> None:
    config = tiny_config(tie_embeddings=tie)

    def alone() -> TrainState:
        return state_of(ParallelConfig(), ParallelContext.single(), config, dtype)

    save(alone(), tmp_path / "one process")
    run_ranks(4, exchange, tmp_path, config, dtype)
    for name in LAYOUTS:
        load(alone(), tmp_path / name)
        tensors = open_checkpoint(tmp_path / name).manifest.tensors
        for tensor in tensors.values():
            assert sum(torch.Size(block.shape).numel() for block in tensor.blocks) == torch.Size(tensor.shape).numel()
        assert ("model/lm_head.weight" in tensors) != tie
