"""Checkpoints: any layout loads any other, every damage is found and named, and a failed save leaves nothing behind."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megaflow.checkpoint import storage, store
from megaflow.checkpoint.background import CheckpointSaver
from megaflow.checkpoint.shards import Shards
from megaflow.checkpoint.store import CheckpointStore, open_checkpoint, step_directories
from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.parallel.mesh import ParallelContext
from tests.distributed import run_ranks

SHAPES = {
    "model/rows": ((10, 6), torch.float32, 0),
    "model/columns": ((7, 9), torch.uint8, 1),
    "model/norm": ((5,), torch.bfloat16, None),
    "exp_avg/rows": ((3, 4), torch.float32, 0),
    "count": ((), torch.int64, None),
}


def whole(seed: int) -> dict[str, torch.Tensor]:
    """The global tensors of a step: three dtypes, odd sizes, one without dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype) for name, (shape, dtype, _) in SHAPES.items()
    }


def local(tensors: dict[str, torch.Tensor], ctx: ParallelContext) -> dict[str, Shards | torch.Tensor]:
    """A rank's part: cut over tp where SHAPES says, as views into larger storage; the rest whole."""
    parts: dict[str, Shards | torch.Tensor] = {}
    for name, tensor in tensors.items():
        dim = SHAPES[name][2]
        if dim is None:
            parts[name] = tensor.clone()
            continue
        size = tensor.shape[dim]
        start, stop = (size * r // ctx.tp for r in (ctx.tp_rank, ctx.tp_rank + 1))
        padded = torch.zeros(3 + tensor.shape[0], 2 + tensor.shape[1], dtype=tensor.dtype)
        part = tensor.narrow(dim, start, stop - start)
        view = padded[3 : 3 + part.shape[0], 2 : 2 + part.shape[1]]
        view.copy_(part)
        offset = [0, 0]
        offset[dim] = start
        parts[name] = Shards(name, tuple(tensor.shape), tensor.dtype, [(tuple(offset), view)])
    return parts


def context(tp: int) -> ParallelContext:
    return ParallelContext.create(ParallelConfig(tp=tp), "cpu") if dist.is_initialized() else ParallelContext.single()


def save(directory: Path, tp: int, step: int) -> None:
    ctx = context(tp)
    CheckpointStore(directory, ctx).save(step, local(whole(step), ctx), {"step": step, "consumed": {"en": [1, 2]}})


def load(directory: Path, tp: int) -> int | None:
    """Load, check every value against the step that was loaded, and return that step."""
    ctx = context(tp)
    parts = local({name: torch.zeros_like(t) for name, t in whole(0).items()}, ctx)
    manifest = CheckpointStore(directory, ctx).load(parts)
    if manifest is None:
        return None
    assert manifest.scalars == {"step": manifest.step, "consumed": {"en": [1, 2]}}
    for name, want in local(whole(manifest.step), ctx).items():
        got = parts[name]
        pairs = zip(got.blocks, want.blocks, strict=True) if isinstance(got, Shards) else [((0, got), (0, want))]
        for (_, a), (_, b) in pairs:
            assert torch.equal(a, b), name
    return manifest.step


def error_of(fn, *args) -> str:
    """The UserError a call raises."""
    with pytest.raises(UserError) as caught:
        fn(*args)
    return str(caught.value)


def log_warnings(fn, *args) -> tuple[object, list[str]]:
    """A call's result and the checkpoint warnings it logged (works in forked ranks, where caplog does not)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    store.logger.addHandler(handler)
    try:
        return fn(*args), lines
    finally:
        store.logger.removeHandler(handler)


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.iterdir())


@pytest.mark.parametrize(("world", "tp"), [(4, 2), (4, 4), (1, 1)])
def test_any_layout_loads_any_other(tmp_path: Path, world: int, tp: int) -> None:
    if world == 1:
        save(tmp_path, 1, 7)
    else:
        run_ranks(world, save, tmp_path, tp, 7)
    assert load(tmp_path, 1) == 7
    for other_world, other_tp in [(4, 2), (4, 1), (4, 4), (3, 3)]:
        assert run_ranks(other_world, load, tmp_path, other_tp) == [7] * other_world


def test_replicas_are_saved_once_and_shared_out(tmp_path: Path) -> None:
    run_ranks(4, save_wide, tmp_path)
    (checkpoint,) = step_directories(tmp_path)
    sizes = []
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes.append(sum(file.get_tensor(key).nbytes for key in file.keys()))  # noqa: SIM118
    total = sum(record.nbytes for record in open_checkpoint(tmp_path).manifest.tensors.values())
    assert sum(sizes) == total
    assert max(sizes) <= 1.1 * total / 4


def save_wide(directory: Path) -> None:
    """Eight replicated tensors, the largest last."""
    ctx = context(1)
    CheckpointStore(directory, ctx).save(1, {f"t{i}": torch.ones(100 + 10 * i) for i in range(8)}, {})


def test_bits_survive(tmp_path: Path) -> None:
    """Negative zero, infinities, NaN payloads and subnormals come back as the same bits, in every dtype."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensors = {
        "bf16": patterns.view(torch.bfloat16),
        "f16": patterns.view(torch.float16),
        "f32": torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45]),
        "f64": torch.tensor([1e-320, -0.0], dtype=torch.float64),
        "i8": torch.tensor([-128, 127], dtype=torch.int8),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }
    store = CheckpointStore(tmp_path)
    store.save(1, tensors, {})
    loaded = {name: torch.zeros_like(t) for name, t in tensors.items()}
    assert store.load(loaded) is not None
    for name, tensor in tensors.items():
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, loaded[name]))
        assert torch.equal(ours, theirs), name
        if name != "empty":
            assert torch.equal(open_checkpoint(tmp_path).read(name).reshape(-1).view(torch.uint8), ours), name


def test_reader_assembles_tensors_and_shows_the_manifest(tmp_path: Path) -> None:
    run_ranks(4, save, tmp_path, 2, 3)
    for directory in (tmp_path, tmp_path / "step-00000003"):
        checkpoint = open_checkpoint(directory)
        assert checkpoint.names() == sorted(SHAPES)
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in whole(3).items())
        assert checkpoint.manifest.layout == {"world_size": 4, "pp": 1, "dp": 2, "cp": 1, "tp": 2}
        assert checkpoint.manifest.step == 3


def test_a_checkpoint_that_is_pruned_under_its_reader_is_one_line(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": torch.zeros(3)}, {})
    reader = open_checkpoint(tmp_path)
    for step in (2, 3):
        store.save(step, {"a": torch.zeros(3)}, {})
    assert error_of(reader.read, "a").startswith(f"{tmp_path}/step-00000001: was removed while it was read")


def test_240_flipped_bits_none_silent(tmp_path: Path) -> None:
    run_ranks(4, save, tmp_path, 2, 1)
    run_ranks(4, save, tmp_path, 2, 2)
    first, second = step_directories(tmp_path)
    rng = random.Random(0)
    positions = [(path, position) for path in files(second) for position in (0, 7, 8, path.stat().st_size - 1)]
    places = files(second)
    while len(positions) < 240:
        path = rng.choice(places)
        positions.append((path, rng.randrange(path.stat().st_size)))
    for path, position in positions:
        mask = 1 << rng.randrange(8)
        flip(path, position, mask)
        assert str(path) in error_of(open_checkpoint, second)
        flip(path, position, mask)
    assert open_checkpoint(second).manifest.step == 2
    for path in places:
        flip(path, rng.randrange(path.stat().st_size))
        step, lines = log_warnings(load, tmp_path, 1)
        assert step == 1
        assert str(path) in " ".join(lines)
        (refused,) = tmp_path.glob("refused-*")
        refused.rename(second)
        shutil.rmtree(second)
        save(tmp_path, 1, 2)
        places[:] = files(second)
    assert first.exists()


@pytest.mark.parametrize("name", ["manifest.json", "rank-00003.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "missing", "empty"])
def test_ranks_agree_on_the_older_checkpoint(tmp_path: Path, name: str, damage: str) -> None:
    run_ranks(4, save, tmp_path, 2, 1)
    run_ranks(4, save, tmp_path, 2, 2)
    path = tmp_path / "step-00000002" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        flip(path, len(data) // 2)
    else:
        path.write_bytes({"truncated": data[:-1], "longer": data + b"\n", "empty": b""}[damage])
    assert str(path) in error_of(open_checkpoint, path.parent)
    results = run_ranks(3, log_warnings, load, tmp_path, 3)
    assert [step for step, _ in results] == [1, 1, 1]
    (line,) = results[0][1]
    assert str(path) in line
    assert "\n" not in line
    assert [lines for _, lines in results[1:]] == [[], []]


def load_from_a_failing_disk(directory: Path) -> int | None:
    """Load while rank 1's reads of step 2 fail, after the files passed their checks."""
    if dist.get_rank() == 1:
        opened = storage.safe_open

        def failing(path: Path, framework: str):
            if "step-00000002" in str(path):
                raise SafetensorError("Error while reading")
            return opened(path, framework=framework)

        storage.safe_open = failing
    return load(directory, 2)


def test_a_disk_that_fails_while_loading(tmp_path: Path) -> None:
    for step in (1, 2):
        run_ranks(4, save, tmp_path, 2, step)
    assert run_ranks(4, load_from_a_failing_disk, tmp_path) == [1] * 4


def test_refused_checkpoints_neither_count_nor_block(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, 1, step)
    flip(tmp_path / "step-00000002" / "rank-00000.safetensors", 50)
    assert load(tmp_path, 1) == 1
    assert [p.name for p in step_directories(tmp_path)] == ["step-00000001"]
    save(tmp_path, 1, 2)
    assert load(tmp_path, 1) == 2
    assert len(list(tmp_path.glob("refused-step-00000002-*"))) == 1


def test_none_there_none_sound_and_foreign_directories(tmp_path: Path) -> None:
    assert load(tmp_path, 1) is None
    assert "no checkpoint here" in error_of(open_checkpoint, tmp_path)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "model.pt").write_bytes(b"x")
    (tmp_path / "step-best").mkdir()
    message = error_of(load, tmp_path, 1)
    assert "step-00000005/manifest.json: No such file" in message
    assert "\n" not in message
    save(tmp_path, 1, 3)
    flip(tmp_path / "step-00000003" / "manifest.json", 30)
    for fn in (lambda: load(tmp_path, 1), lambda: open_checkpoint(tmp_path)):
        message = error_of(fn)
        assert "step-00000005/manifest.json" in message
        assert "step-00000003/manifest.json" in message
    assert not list(tmp_path.glob("refused-*")), "nothing is moved when nothing could be loaded"


def test_another_models_checkpoint_is_refused_by_tensor(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(1, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}, {})
    for tensors, name in [
        ({"a": torch.ones(2, 3)}, "tensor b is F32 [1] there and none in this run"),
        ({"a": torch.ones(3, 2), "b": torch.ones(1)}, "tensor a is F32 [2, 3] there and F32 [3, 2] in this run"),
        ({"a": torch.ones(2, 3), "b": torch.ones(1).half()}, "tensor b is F32 [1] there and F16 [1]"),
        ({"a": torch.ones(2, 3), "b": torch.ones(1), "c": torch.ones(1)}, "tensor c is none there"),
    ]:
        assert name in error_of(CheckpointStore(tmp_path).load, tensors)
        assert all((t == 1).all() for t in tensors.values()), "refused before anything is overwritten"


def test_keeps_the_newest_and_removes_what_is_unfinished(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000009").mkdir(parents=True)
    (tmp_path / ".tmp-step-00000009" / "rank-00000.safetensors").write_bytes(b"x")
    store = CheckpointStore(tmp_path, keep=3)
    assert not list(tmp_path.iterdir())
    for step in (1, 20, 300, 4, 100000000):
        store.save(step, whole(step), {})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000020", "step-00000300", "step-100000000"]
    with pytest.raises(ValueError, match="at least 2"):
        CheckpointStore(tmp_path, keep=1)


def test_a_committed_step_is_not_written_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": torch.zeros(3)}, {})
    before = {p: p.read_bytes() for p in files(tmp_path / "step-00000001")}
    assert store.save(1, {"a": torch.ones(3)}, {}) == tmp_path / "step-00000001"
    assert {p: p.read_bytes() for p in files(tmp_path / "step-00000001")} == before


def save_and_die(directory: Path, step: int, module: str, function: str, after: bool, asynchronous: bool) -> None:
    """Save, but be gone without clean-up just before or after the first call of a function."""
    owner = {"storage": storage, "store": store, "Path": Path, "os": os}[module]
    original = getattr(owner, function)

    def die(*args, **kwargs):
        if after:
            original(*args, **kwargs)
        os._exit(9)

    saver = CheckpointSaver(CheckpointStore(directory), asynchronous, say=print, patience=60)
    setattr(owner, function, die)
    with saver:
        saver.save(step, whole(step), {"step": step, "consumed": {"en": [1, 2]}})


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("module", "function", "after", "committed"),
    [
        ("Path", "mkdir", False, 1),
        ("storage", "write_safetensors", False, 1),
        ("storage", "write_safetensors", True, 1),
        ("os", "fsync", False, 1),
        ("store", "fsync_directory", False, 1),
        ("Path", "rename", False, 1),
        ("Path", "rename", True, 2),
        ("store", "step_directories", False, 2),
    ],
)
def test_killed_while_saving(
    tmp_path: Path, module: str, function: str, after: bool, committed: int, asynchronous: bool
) -> None:
    save(tmp_path, 1, 1)
    pid = os.fork()
    if pid == 0:
        save_and_die(tmp_path, 2, module, function, after, asynchronous)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert load(tmp_path, 1) == committed
    assert not list(tmp_path.glob(".tmp-*"))
    save(tmp_path, 1, 2)
    assert load(tmp_path, 1) == 2


def save_on_a_full_disk(directory: Path, step: int, full: int) -> str:
    """Save while one rank's disk takes no byte; the error this rank sees."""
    if dist.get_rank() == full:

        def no_space(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = no_space  # type: ignore[assignment]
    return error_of(save, directory, 2, step)


@pytest.mark.parametrize("full", [0, 3])
def test_one_ranks_failure_is_everyones(tmp_path: Path, full: int) -> None:
    run_ranks(4, save, tmp_path, 2, 1)
    messages = run_ranks(4, save_on_a_full_disk, tmp_path, 2, full)
    assert len(set(messages)) == 1
    assert f"rank {full}: [Errno 28] No space left on device" in messages[0]
    assert "step-00000002" in messages[0]
    assert "\n" not in messages[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"], "what was written gives its space back"
    assert run_ranks(4, load, tmp_path, 2) == [1] * 4


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))  # type: ignore[attr-defined]
    monkeypatch.setattr(storage, "write_safetensors", None)
    message = error_of(CheckpointStore(tmp_path).save, 1, {"a": torch.zeros(1000)}, {})
    assert re.search(rf"{tmp_path}\S*: the checkpoint needs 4000 bytes, 100 are free", message)
    assert not list(tmp_path.iterdir())


def test_overlapping_or_missing_blocks_are_not_saved(tmp_path: Path) -> None:
    blocks = [((0,), torch.zeros(3)), ((2,), torch.zeros(2))]
    with pytest.raises(BaseException, match="overlapping"):
        CheckpointStore(tmp_path).save(1, {"a": Shards("a", (4,), torch.float32, blocks)}, {})
    assert not list(tmp_path.iterdir())


def test_no_pickle_is_written_or_read(tmp_path: Path) -> None:
    """Every file is JSON or safetensors, and the code names no way to read anything else."""
    save(tmp_path, 1, 1)
    assert {p.suffix for p in files(tmp_path / "step-00000001")} == {".json", ".safetensors"}
    for path in Path(store.__file__).parent.glob("*.py"):
        calls = re.findall(
            r"\bimport pickle|\bpickle\.|torch\.(?:load|save)\b|FileSystem(?:Reader|Writer)", path.read_text()
        )
        assert not calls, path
