"""`megaflow export`: a run's newest checkpoint as a Hugging Face model folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megaflow.errors import UserError


class DtypeChoice(StrEnum):
    """Dtypes of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to export; default: the newest sound one.")] = None,
    dtype: Annotated[DtypeChoice | None, typer.Option(help="Dtype of the weights; default: the run's.")] = None,
) -> None:
    """Write the weights and the tokenizer of RUN to OUT, for AutoModelForCausalLM and AutoTokenizer of transformers."""
    import torch

    from megaflow.checkpoint.huggingface import export as export_checkpoint
    from megaflow.checkpoint.store import open_checkpoint, step_name
    from megaflow.config import ModelConfig

    directory = run / "checkpoints"
    checkpoint = open_checkpoint(directory if step is None else directory / step_name(step))
    tokenizer = next((path for path in (run / "tokenizer.model", run / "tokenizer.json") if path.exists()), None)
    if tokenizer is None:
        raise UserError(f"{run}: no tokenizer.model or tokenizer.json here; restore the run's tokenizer")
    config = checkpoint.manifest.scalars["config"]
    trained = "bfloat16" if config["train"]["precision"] == "bf16" else "float32"
    export_checkpoint(
        checkpoint,
        ModelConfig.model_validate(config["model"] | {"weights": None}),  # initial weights need not exist any more
        tokenizer,
        out,
        max_positions=config["data"]["seq_length"],
        dtype=getattr(torch, dtype or trained),
    )
    print(f"{out}: step {checkpoint.manifest.step} for transformers")
