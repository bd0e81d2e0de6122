"""Initial weights and import: equal in every layout, and clear about files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaflow.config import ModelConfig
from megaflow.errors import UserError
from megaflow.kernels.dispatch import select_ops
from megaflow.model.init import initialise, load_hf_weights
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.parallel.mesh import ParallelContext
from tests.tiny import tiny_config

CONFIG = tiny_config()


def empty_model(config: ModelConfig = CONFIG, tp: int = 1, tp_rank: int = 0) -> Llama:
    ctx = ParallelContext(torch.device("cpu"), world_size=tp, rank=tp_rank, tp=tp, tp_rank=tp_rank)
    return Llama(config, ctx, select_ops("cpu", torch.float32))


def canonical(models: list[Llama]) -> dict[str, Tensor]:
    """The whole tensors that the ranks' parts make up; NaN where no rank has a part."""
    tensors: dict[str, Tensor] = {}
    for model in models:
        parameters = dict(model.named_parameters())
        for parameter, pieces in placement(model.config, model.ctx).items():
            for piece in pieces:
                whole = tensors.setdefault(piece.name, torch.full(piece.global_shape, torch.nan))
                whole[piece.global_slices()] = parameters[parameter].detach()[piece.local_slices()]
    return tensors


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_every_layout_starts_alike(tp: int, tie: bool) -> None:
    config = tiny_config(tie_embeddings=tie)
    single, cut = [empty_model(config)], [empty_model(config, tp, rank) for rank in range(tp)]
    for model in single + cut:
        initialise(model, seed=3)
    expected, out = canonical(single), canonical(cut)
    assert expected.keys() == out.keys()
    assert ("lm_head.weight" in out) != tie
    for name, tensor in expected.items():
        assert torch.equal(out[name], tensor), name


def test_placement_lists_every_parameter_and_covers_it() -> None:
    model = empty_model(tp=4, tp_rank=3)
    table = placement(model.config, model.ctx)
    assert set(table) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        covered = sum(torch.Size(piece.shape).numel() for piece in table[name])
        # of the vocabulary's rows the last rank holds 199 - 3 * 64 and pads the rest
        padding = 0 if parameter.ndim == 1 or "layers" in name else 57 * CONFIG.hidden_size
        assert covered == parameter.numel() - padding, name


def test_standard_deviations() -> None:
    model = empty_model(tiny_config(hidden_size=128, intermediate_size=256, init_std=0.02, num_layers=8))
    initialise(model, seed=0)
    tensors = canonical([model])
    assert float(tensors["model.layers.3.self_attn.q_proj.weight"].std()) == pytest.approx(0.02, rel=0.03)
    assert float(tensors["model.layers.3.self_attn.o_proj.weight"].std()) == pytest.approx(0.005, rel=0.03)
    assert float(tensors["model.layers.3.mlp.down_proj.weight"].std()) == pytest.approx(0.005, rel=0.03)
    assert torch.equal(tensors["model.norm.weight"], torch.ones(128))


def test_seed_and_name_decide_the_weights() -> None:
    first, second = empty_model(), empty_model()
    initialise(first, seed=1)
    initialise(second, seed=2)
    a, b = canonical([first]), canonical([second])
    assert not torch.equal(a["lm_head.weight"], b["lm_head.weight"])
    assert not torch.equal(a["model.layers.0.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    model = empty_model()
    initialise(model, seed=5)
    save_file(canonical([model]), tmp_path / "model.safetensors")
    return tmp_path


def edit(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("tp", [1, 2])
def test_import_of_one_file_and_of_several(export: Path, tmp_path: Path, tp: int) -> None:
    tensors = load_file(export / "model.safetensors")
    several = tmp_path / "several"
    several.mkdir()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, several / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (several / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (export, several):
        models = [empty_model(tp=tp, tp_rank=rank) for rank in range(tp)]
        for model in models:
            load_hf_weights(model, folder)
        out = canonical(models)
        assert all(torch.equal(out[name], tensors[name]) for name in tensors)


def test_rotary_frequencies_of_old_exports_are_passed_over(export: Path) -> None:
    edit(export, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    load_hf_weights(empty_model(), export)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "no tensor model.norm.weight"),
        ({"lm_head__weight": None}, "set model.tie_embeddings=true"),
        ({"lm_head__bias": torch.ones(3)}, "tensor lm_head.bias .* has no place in this model"),
        ({"model__norm__weight": torch.ones(31)}, r"model.norm.weight has shape \[31\], the model's is \[32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(export: Path, changes: dict[str, Tensor | None], message: str) -> None:
    edit(export, **changes)
    with pytest.raises(UserError, match=message):
        load_hf_weights(empty_model(), export)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.safetensors there; save"):
        load_hf_weights(empty_model(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        load_hf_weights(empty_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x09nonsense")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_hf_weights(empty_model(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(UserError, match=r"names gone\.safetensors, which is not there"):
        load_hf_weights(empty_model(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[1")
    with pytest.raises(UserError, match="not an index"):
        load_hf_weights(empty_model(), tmp_path)
