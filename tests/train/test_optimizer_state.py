"""What the optimizer keeps in fewer bytes: training, checkpoints and changes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megaflow.config import OptimConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.kernels.adamw import csrc_missing, join_master
from megaflow.model.init import initialise
from megaflow.optim.adamw import AdamW
from megaflow.parallel.gradients import GradientBuffer
from megaflow.parallel.parameters import FlatParameters
from megaflow.train.run import plan_run
from tests.tiny import tiny_model
from tests.train.runs import MakeConfig, assert_bitwise_equal, killed, losses, run, weights

BF16: dict[str, Any] = {"train__precision": "bf16"}
SMALL = BF16 | {"optim__gradients": "bf16", "optim__master": "remainder", "optim__moments": "bf16"}


def test_a_split_master_is_the_fp32_master() -> None:
    optimizers = []
    for master in ("fp32", "remainder", "remainder"):
        model = tiny_model(dtype=torch.bfloat16)
        parameters = FlatParameters(model, ParallelConfig())
        gradients = GradientBuffer(parameters, model.ctx, ParallelConfig())
        config = OptimConfig(lr=1e-2, master=master)  # type: ignore[arg-type]
        optimizers.append(AdamW(config, parameters, gradients))
        gradients.flat.normal_(generator=torch.Generator().manual_seed(1))
    for optimizer in optimizers[:2]:
        initialise(optimizer.parameters.model, seed=3, into=optimizer.set_master)
        optimizer.copy_master_to_params()
        for _ in range(3):
            optimizer.step(1e-2, torch.ones(()), torch.zeros(()))
    whole, split, loaded = optimizers
    joined = [join_master(*parts) for parts in zip(split.params, split.master, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(joined, whole.master, strict=True))
    into = loaded.master_to_load()
    for target, master in zip(into, joined, strict=True):
        target.copy_(master)
    loaded.copy_master_to_params(into)
    for tensors in ("params", "master"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(split, tensors), getattr(loaded, tensors), strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_is_bit_identical(make_config: MakeConfig, world: int) -> None:
    whole, broken = make_config("whole", **SMALL), make_config("broken", **SMALL)
    run(whole, world)
    killed(broken, world, rank=world - 1, step=7)
    run(broken, world)
    assert losses(broken) == losses(whole)
    assert_bitwise_equal(whole, broken)


def test_it_follows_the_run_that_keeps_all_in_fp32(make_config: MakeConfig) -> None:
    whole, small = make_config("whole", **BF16), make_config("small", **SMALL)
    run(whole)
    run(small)
    dtypes = {name.partition("/")[0]: tensor.dtype for name, tensor in weights(small).items() if "/model." in name}
    assert dtypes == {"model": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    for (_, ours), (_, theirs) in zip(losses(small), losses(whole), strict=True):
        assert math.isclose(ours, theirs, rel_tol=5e-3)


def test_a_checkpoint_knows_no_way_of_keeping_the_master(make_config: MakeConfig) -> None:
    """Saved split, resumed in fp32, killed, and split again; ties are rounded to another parameter."""
    changes = [{"optim__master": "remainder"}, {}, {"optim__master": "remainder"}]
    whole = make_config("whole", **BF16)
    run(whole)
    for number, change in enumerate(changes):
        config = make_config("moved", **BF16, **change)
        if number < 2:
            killed(config, 1, rank=0, step=5 + 4 * number)
        else:
            run(config)
    for (_, ours), (_, theirs) in zip(losses(config), losses(whole), strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-3)


def test_moments_cannot_change_in_a_run(make_config: MakeConfig) -> None:
    run(make_config("first", **BF16, train__steps=2))
    changed = make_config("first", **BF16, optim__moments="bf16")
    with pytest.raises(UserError, match=r"optim\.moments: bf16 differs from fp32, .* put it back"):
        plan_run(changed, torch.device("cpu"))


@pytest.mark.parametrize(("key", "value"), [("gradients", "bf16"), ("master", "remainder")])
def test_fp32_parameters_have_nothing_to_save(make_config: MakeConfig, key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"optim.{key} {value} is for train.precision bf16; set it to fp32"):
        make_config("refused", **{f"optim__{key}": value})


def test_an_optimizer_that_cannot_keep_it_so_is_refused(make_config: MakeConfig) -> None:
    config = make_config("refused", **SMALL).model_copy(update={"kernels": {"adamw": "torch"}})
    with pytest.raises(UserError, match="kernels: adamw cannot use 'torch': it needs fp32 masters; here there are "):
        plan_run(config, torch.device("cpu"))
    assert not Path(config.run_dir).exists()


def test_the_optimizer_s_library_is_built_for_the_tests() -> None:
    """Else they would all run on something else."""
    assert csrc_missing("adamw", torch.device("cpu")) is None
