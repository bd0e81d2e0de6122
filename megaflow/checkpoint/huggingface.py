"""A checkpoint as a Hugging Face model folder, which AutoModelForCausalLM and AutoTokenizer load as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megaflow.checkpoint.storage import DTYPES, write_safetensors
from megaflow.checkpoint.store import Checkpoint
from megaflow.checkpoint.tokenizer_export import export_tokenizer
from megaflow.config import ModelConfig
from megaflow.data.tokenizer import load_tokenizer
from megaflow.errors import UserError

GROUP = "model/"


def export(
    checkpoint: Checkpoint,
    config: ModelConfig,
    tokenizer: str | Path,
    out: str | Path,
    *,
    max_positions: int,
    dtype: torch.dtype,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint's weights, one tensor in memory at a time, and its tokenizer to a new folder.

    Args:
        checkpoint: holds the weights as `model/<Hugging Face name>`.
        tokenizer: the run's SentencePiece `.model` or `tokenizer.json`.
        max_positions: longest sequence the model was trained on.
        dtype: dtype of the exported weights.
        shard_bytes: a weight file is closed before it grows beyond this.

    Raises:
        UserError: when `out` exists or cannot be written, or the tokenizer cannot be expressed.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder or remove it")
    folder = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        export_tokenizer(tokenizer, folder)
        ids = load_tokenizer(tokenizer)
        special = {"bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id, "pad_token_id": ids.pad_id}
        write_json(folder / "config.json", llama_config(config, max_positions, dtype) | special)
        write_json(folder / "generation_config.json", {"_from_model_config": True} | special)
        write_weights(checkpoint, folder, dtype, shard_bytes)
        folder.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_weights(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """model.safetensors, or several numbered files with an index, in the order of the layers."""
    tensors = {n.removeprefix(GROUP): t for n, t in checkpoint.manifest.tensors.items() if n.startswith(GROUP)}
    if not tensors:
        raise UserError(f"{checkpoint.path}: holds no tensor {GROUP}*: not a checkpoint of a model")
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in sorted(tensors, key=layer_order):
        nbytes = tensors[name].nbytes // DTYPES[tensors[name].dtype].itemsize * dtype.itemsize
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
        total += nbytes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        entries = [(name, dtype, tensors[name].shape) for name in names]
        write_safetensors(folder / file, entries, lambda n: checkpoint.read(GROUP + n).to(dtype), {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def layer_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which layer 10 follows layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def llama_config(config: ModelConfig, max_positions: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
