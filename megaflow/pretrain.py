"""Trains a model: `torchrun --nproc-per-node N megaflow/pretrain.py --config FILE [section.key=value ...]`.

The whole job in order: read and check the config, join the process group, train, leave. Exit codes: 0 done or stopped
by a signal after saving, 1 another rank has left, 2 the config or a file is wrong (one line on the standard error), 3
stopped after saving because only other ranks were asked to, 130 interrupted twice.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    # torchrun puts this file's folder first on the path, where its modules would shadow other packages' names
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]

from megaflow.config import Config
from megaflow.config_load import describe, load_config
from megaflow.errors import UserError

if TYPE_CHECKING:
    import torch

    from megaflow.train.run import Run

PR_SET_PDEATHSIG = 1  # of prctl(2)
GLOO_SAYS = {
    "by peer": "another rank has left; its own line, or torchrun's summary, says why",
    "Timed out": "another rank has not answered within parallel.timeout: its machine, the network, or the rank hangs",
}
"""Words of errors of collectives, and what they mean."""


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


def prepare(config: Config) -> tuple[Run, torch.device]:
    """Checks the config against the processes torchrun started (one without it) and opens what the run reads."""
    import torch

    from megaflow.train.run import plan_run

    config.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise UserError(f"--nproc-per-node: this machine has {gpus} GPUs; start at most that many")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    return plan_run(config, device), device


def leave_with_launcher() -> None:
    """Asks Linux to kill this process when torchrun dies, so that no rank goes on beside those of the next launch."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def join_and_train(run: Run, device: torch.device) -> bool:
    """Joins the process group, where there is more than one process, and trains; whether this rank is done."""
    import torch
    import torch.distributed as dist

    from megaflow.parallel.mesh import ParallelContext
    from megaflow.train.launch import check_alike
    from megaflow.train.loop import train

    cuda, parallel = device.type == "cuda", run.config.parallel
    if cuda:
        torch.cuda.set_device(device)
        # NCCL warns of sends that wait for other operations of their group: a pipeline's have groups to themselves
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return train(run, ParallelContext.single(device))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=parallel.timeout)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device if cuda else None)
    except dist.DistError as error:
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
        given, why = " ".join(f"{name}={os.environ.get(name)}" for name in names), str(error).splitlines()[0]
        raise UserError(
            f"cannot join the other processes ({given}): {why.rstrip('.')}; start all WORLD_SIZE of them, with one "
            "master, within parallel.timeout"
        ) from None
    check_alike(run, device)  # before any group is made: ranks of other layouts would wait in it for ever
    done = train(run, ParallelContext.create(parallel, device))
    dist.destroy_process_group()
    return done


def main() -> int:
    leave_with_launcher()
    rank = int(os.environ.get("RANK", "0"))
    # until they join, the processes of a machine read the same arguments and files: one of them speaks
    speaks = int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        with contextlib.redirect_stderr(sys.stderr if speaks else io.StringIO()):
            arguments = parse_arguments()
        run, device = prepare(load_config(arguments.config, arguments.overrides))
        speaks = True
        done = join_and_train(run, device)
    except UserError as error:
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)  # where rank 0 has spoken and left, torchrun ends this one meanwhile
        for line in str(error).splitlines() if speaks else []:
            print(f"error: {line}" if rank == 0 else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        said = next((meaning for words, meaning in GLOO_SAYS.items() if words in str(error)), None)
        if said is None:
            raise
        print(f"error: rank {rank}: {said}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
