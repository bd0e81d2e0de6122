"""Trains a model: `torchrun --nproc-per-node N megaflow/pretrain.py --config FILE [section.key=value ...]`.

The whole job in order: read and check the config, join the process group, train, leave. Exit codes: 0 done or stopped
by a signal after saving, 2 the config or a file is wrong (one line on the standard error), 130 interrupted twice.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

if __package__ in (None, ""):
    # torchrun puts this file's folder first on the path, where its modules would shadow other packages' names
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]

from megaflow.config import Config
from megaflow.config_load import describe, load_config
from megaflow.errors import UserError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megaflow/pretrain.py",
        description="Train a LLaMA-2 model on language groups whose ratios follow a schedule exactly.",
        epilog="settings:\n"
        + "\n".join(f"  {key}  ({kind}; {default})\n      {text}" for key, kind, default, text in describe()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser.parse_args(arguments)


def launch(config: Config) -> None:
    """Trains as `config` says on the processes torchrun started (one process without it)."""
    import torch
    import torch.distributed as dist

    from megaflow.parallel.mesh import ParallelContext
    from megaflow.train.loop import train
    from megaflow.train.run import plan_run

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.check_world(world_size)
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs; start at most that many")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    run = plan_run(config, device)
    if world_size == 1:
        train(run, ParallelContext.single(device))
        return
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=config.parallel.timeout)
    dist.init_process_group(backend, timeout=timeout, device_id=device if cuda else None)
    try:
        train(run, ParallelContext.create(config.parallel.tp, config.parallel.sequence_parallel, device))
    finally:
        dist.destroy_process_group()


def main() -> int:
    rank = int(os.environ.get("RANK", "0"))
    try:
        # every rank reads the same arguments and files: what is wrong with them is said by rank 0 alone
        with contextlib.redirect_stderr(sys.stderr if rank == 0 else io.StringIO()):
            arguments = parse_arguments()
        launch(load_config(arguments.config, arguments.overrides))
    except UserError as error:
        if rank > 0:
            time.sleep(3)  # torchrun ends all ranks when one leaves: who is still here is the only one to know
        for line in str(error).splitlines():
            print(f"error: {line}" if rank == 0 else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
