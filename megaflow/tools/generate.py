"""`megaflow generate`: text from a run's newest checkpoint, on one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaflow.errors import UserError

if TYPE_CHECKING:
    from megaflow.data.tokenizer import Tokenizer
    from megaflow.model.llama import Llama


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw among the likeliest tokens of this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the draws.")] = 0,
) -> None:
    """Continue each prompt with the newest checkpoint of RUN and print prompt and continuation."""
    from megaflow.model import generate as generation

    model, tokenizer = load_run(run)
    sampling = generation.Sampling(temperature, top_p, seed)
    for text in prompt:
        ids = [tokenizer.start_id, *tokenizer.encode(text)]
        ids += generation.generate(model, ids, max_tokens, tokenizer.eos_id, sampling, tokenizer.vocab_size)
        typer.echo(tokenizer.decode(ids))


def load_run(run: Path) -> tuple[Llama, Tokenizer]:
    """The model of the newest sound checkpoint, on the GPU where there is one, and the run's tokenizer.

    Raises:
        UserError: where there is no sound checkpoint or no tokenizer.
    """
    import torch

    from megaflow.checkpoint.store import open_checkpoint
    from megaflow.config import ModelConfig
    from megaflow.data.tokenizer import load_tokenizer
    from megaflow.kernels.dispatch import select_ops
    from megaflow.model.init import copy_weights
    from megaflow.model.llama import Llama
    from megaflow.parallel.mesh import ParallelContext

    checkpoint = open_checkpoint(run / "checkpoints")
    path = next((path for path in (run / "tokenizer.model", run / "tokenizer.json") if path.exists()), None)
    if path is None:
        raise UserError(f"{run}: no tokenizer.model or tokenizer.json here; restore the run's tokenizer")
    trained = checkpoint.manifest.scalars["config"]
    config = ModelConfig.model_validate(trained["model"] | {"weights": None})  # they need not exist any more
    ctx = ParallelContext.single("cuda" if torch.cuda.is_available() else "cpu")
    # Checkpoints hold fp32 weights, and few CPUs are fast in bf16.
    narrow = trained["train"]["precision"] == "bf16" and ctx.device.type == "cuda"
    dtype = torch.bfloat16 if narrow else torch.float32
    model = Llama(config, ctx, select_ops(ctx.device, dtype), dtype)
    copy_weights(model, lambda name: checkpoint.read(f"model/{name}"))
    return model, load_tokenizer(path)
