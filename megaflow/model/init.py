"""Initial weights: random, or from a Hugging Face LLaMA checkpoint. Equal in every layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaflow.config import ModelConfig
from megaflow.errors import UserError
from megaflow.model.llama import Llama
from megaflow.model.placement import Piece, placement

RESIDUAL_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def initialise(model: Llama, seed: int, into: Callable[[str, Tensor], None] | None = None) -> None:
    """Fill the model with normal weights of `init_std`, and ones in the norms.

    The projections into the residual stream get `init_std / sqrt(2 * num_layers)` (Radford et al., 2019). Every
    canonical tensor is drawn whole on the CPU from its own generator, so that every layout and device starts alike.
    `into`: takes each parameter's name and fp32 value instead, one at a time.
    """
    config = model.config

    def draw(piece: Piece) -> Tensor:
        if len(piece.global_shape) == 1:
            return torch.ones(piece.shape)
        residual = piece.name.endswith(RESIDUAL_OUTPUTS)
        std = config.init_std / (2 * config.num_layers) ** 0.5 if residual else config.init_std
        whole = torch.empty(piece.global_shape).normal_(0.0, std, generator=_generator(seed, piece.name))
        return whole[piece.global_slices()]

    _fill(model, draw, into)


def _fill(model: Llama, part: Callable[[Piece], Tensor], into: Callable[[str, Tensor], None] | None) -> None:
    """Put every parameter together in fp32 from its pieces, padding left zero, and hand it over."""
    parameters = dict(model.named_parameters())
    for name, pieces in placement(model.config, model.ctx, model.chunks).items():
        value = torch.zeros(parameters[name].shape)
        for piece in pieces:
            if 0 not in piece.shape:
                value[piece.local_slices()] = part(piece)
        if into is None:
            parameters[name].copy_(value)
        else:
            into(name, value)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def copy_weights(model: Llama, read: Callable[[str], Tensor]) -> None:
    """Fill the model from whole canonical tensors, fetched by name one at a time."""
    _fill(model, lambda piece: read(piece.name)[piece.global_slices()], None)


@torch.no_grad()
def load_hf_weights(model: Llama, directory: str | Path, into: Callable[[str, Tensor], None] | None = None) -> None:
    """Copy this rank's part of a LLaMA checkpoint in safetensors into the model, reading that part only.

    `into`: takes each parameter's name and fp32 value instead, one at a time.

    Raises:
        UserError: for a folder without safetensors, a tensor missing, unknown or of another shape, a damaged file.
    """
    directory = Path(directory)
    with ExitStack() as stack:
        tensors = _open_tensors(directory, stack)
        table = placement(model.config, model.ctx)
        _check_names(directory, set(tensors), {piece.name for pieces in table.values() for piece in pieces})

        def read(piece: Piece) -> Tensor:
            source = tensors[piece.name].get_slice(piece.name)
            shape = tuple(source.get_shape())
            if shape != piece.global_shape:
                raise UserError(
                    f"{directory}: {piece.name} has shape {list(shape)}, the model's is "
                    f"{list(piece.global_shape)}; make the model section agree with config.json there"
                )
            part: Tensor = source[piece.global_slices()]
            return part

        _fill(model, read, into)


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> open safetensors file."""
    index = directory / "model.safetensors.index.json"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not an index of safetensors files; fetch it again") from None
    files = files or [path.name for path in sorted(directory.glob("*.safetensors"))]
    if not files:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        found = f" ({pickled[0]} is a pickle, which is never loaded)" if pickled else ""
        raise UserError(f"{directory}: no *.safetensors there{found}; save the model with safe_serialization=True")
    tensors: dict[str, Any] = {}
    for name in files:
        try:
            file = stack.enter_context(safe_open(directory / name, framework="pt"))
        except FileNotFoundError:
            raise UserError(f"{index}: names {name}, which is not there; fetch the missing file") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory / name}: not a readable safetensors file ({error}); fetch it again") from None
        tensors.update(dict.fromkeys(file.keys(), file))
    return tensors


def _check_names(directory: Path, found: set[str], wanted: set[str]) -> None:
    # Old exports carry rotary frequencies, and tied models may carry the embedding a second time.
    known = wanted | {name for name in found if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    if missing := sorted(wanted - found):
        hint = "set model.tie_embeddings=true" if missing == ["lm_head.weight"] else "is it a LLaMA of this depth?"
        raise UserError(f"{directory}: no tensor {missing[0]} (and {len(missing) - 1} more); {hint}")
    if extra := sorted(found - known):
        raise UserError(
            f"{directory}: tensor {extra[0]} (and {len(extra) - 1} more) has no place in this model; "
            f"make the model section agree with config.json there"
        )


def check_hf_config(config: ModelConfig, directory: str | Path) -> None:
    """Compares the model section with the `config.json` beside the weights, where there is one.

    Raises:
        UserError: naming the first key that differs, or a kind of model that this one is not.
    """
    path = Path(directory) / "config.json"
    if not path.exists():
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        found = {
            "model_type": theirs.get("model_type", "llama"),
            "rope type": rope.get("rope_type", rope.get("type", "default")),
            "num_heads": theirs["num_attention_heads"],
            "num_kv_heads": theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
            "norm_eps": theirs.get("rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10000.0)),
            "tie_embeddings": theirs.get("tie_word_embeddings", False),
            "hidden_act": theirs.get("hidden_act", "silu"),
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the config of a LLaMA model ({error}); fetch it again") from None
    ours = {"model_type": "llama", "rope type": "default", "hidden_act": "silu"}
    for key, value in found.items():
        expected = ours.get(key, getattr(config, key, None))
        if value != expected:
            remedy = "only plain LLaMA-2 models are supported" if key in ours else f"set model.{key}={value}"
            raise UserError(f"{path}: {key} is {value!r}, the model's is {expected!r}; {remedy}")
