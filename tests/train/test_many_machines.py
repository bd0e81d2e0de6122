"""Two torchruns, as on two machines: one dies with its rank, comes back, and the run ends as if nothing had been."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from megaflow.checkpoint.store import step_directories
from megaflow.config import Config
from megaflow.config_load import dump_config
from tests.train.runs import MakeConfig, assert_bitwise_equal, losses, run

ROOT = Path(__file__).parents[2]
STEPS, INTERVAL = 80, 16
PATIENCE = 150  # seconds for torchrun to come so far; importing torch takes most of them on a busy core


@dataclass(frozen=True)
class Machine:
    """Where a torchrun runs: this machine, or a network namespace with an address of its own."""

    namespace: str | None = None
    address: str = "127.0.0.1"

    def start(self, config: Path, endpoint: str, hosts_rendezvous: bool, log: Path) -> subprocess.Popen[bytes]:
        """A torchrun with one rank, one of two."""
        command = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", endpoint]
        command += ["--rdzv-conf", f"is_host={int(hosts_rendezvous)}", "--local-addr", self.address]
        command += ["megaflow/pretrain.py", "--config", str(config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if self.namespace:
            environment["GLOO_SOCKET_IFNAME"] = "wire"
        with log.open("ab") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def ranks_of(agent: subprocess.Popen[bytes]) -> list[int]:
    """The processes that a torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float, logs: list[Path]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs if log.exists())
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


@contextmanager
def ended(agents: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever the test comes to, none of its torchruns stays; their ranks end with them."""
    try:
        yield
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def lose_one_and_go_on(
    config: Config,
    machines: list[Machine],
    folder: Path,
    number: signal.Signals = signal.SIGKILL,
    cut: Callable[[], None] = lambda: None,
    mend: Callable[[], None] = lambda: None,
) -> list[str]:
    """Trains on two machines, ends the second torchrun after a checkpoint, starts it again; what each has said.

    `number` is the signal it gets; `cut` is called just before that, `mend` before it is started again.
    """
    file, logs = folder / "config.yaml", [folder / "first.log", folder / "second.log"]
    file.write_text(dump_config(config))
    with socket.socket() as free:
        free.bind(("", 0))
        endpoint = f"{machines[0].address}:{free.getsockname()[1]}"
    agents = [m.start(file, endpoint, i == 0, log) for i, (m, log) in enumerate(zip(machines, logs, strict=True))]
    with ended(agents):
        saved = Path(config.run_dir) / "checkpoints"
        wait_for(lambda: len(step_directories(saved)) > 0, PATIENCE, logs)
        (rank,), (other,) = ranks_of(agents[1]), ranks_of(agents[0])
        cut()
        agents[1].send_signal(number)
        assert agents[1].wait() != 0
        wait_for(lambda: gone(rank) and gone(other), PATIENCE, logs)
        mend()
        agents.append(machines[1].start(file, endpoint, False, logs[1]))
        wait_for(lambda: agents[0].poll() is not None and agents[2].poll() is not None, PATIENCE, logs)
        assert [agents[0].returncode, agents[2].returncode] == [0, 0], "".join(log.read_text() for log in logs)
    return [log.read_text() for log in logs]


@pytest.mark.timeout(400)
def test_a_torchrun_that_is_killed_comes_back(make_config: MakeConfig, tmp_path: Path) -> None:
    """Its rank ends with it, the other one notices at once, and both go on from the last checkpoint."""
    settings = {"train__steps": STEPS, "train__log_interval": 1, "checkpoint__interval": INTERVAL}
    config, expected = make_config("lost", **settings), make_config("undisturbed", **settings)
    said = lose_one_and_go_on(config, [Machine(), Machine()], tmp_path)
    assert ": another rank has left; its own line, or torchrun's summary, says why" in said[0]
    assert "Traceback" not in said[0]
    run(expected, 2)
    assert losses(config) == losses(expected)
    assert_bitwise_equal(config, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_is_asked_to_leave_saves_first(make_config: MakeConfig, tmp_path: Path) -> None:
    """The rank of the other one leaves with code 3, so that its torchrun waits instead of being done."""
    settings = {"train__steps": STEPS, "train__log_interval": 1, "checkpoint__interval": INTERVAL}
    config, expected = make_config("asked", **settings), make_config("undisturbed", **settings)
    said = lose_one_and_go_on(config, [Machine(), Machine()], tmp_path, signal.SIGTERM)
    stopped = int(said[0].split("starts after step ")[2].split()[0])
    assert f"step {stopped}  saved " in said[0]
    assert "(exitcode: 3)" in said[0]
    assert "Traceback" not in said[0]
    run(expected, 2)
    assert losses(config) == losses(expected)
    assert_bitwise_equal(config, expected)


@contextmanager
def two_hosts() -> Iterator[list[Machine]]:
    """Two network namespaces, each with its own address, joined by a wire; skips the test where they cannot be had."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"megaflow-{os.getpid()}-{i}" for i in range(2)]
    hosts = [Machine(name, f"192.0.2.{i + 1}") for i, name in enumerate(names)]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("network namespaces are not allowed here")
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for host in hosts:
            ip("-n", str(host.namespace), "address", "add", f"{host.address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", str(host.namespace), "link", "set", device, "up")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_falls_silent_comes_back(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nothing tells the other machine: its collective runs into `parallel.timeout`."""
    settings = {"train__steps": STEPS, "train__log_interval": 1, "checkpoint__interval": INTERVAL}
    config = make_config("lost", **settings, parallel__timeout=15)
    expected = make_config("undisturbed", **settings)
    with two_hosts() as hosts:

        def wire(state: str) -> None:
            ip("-n", str(hosts[1].namespace), "link", "set", "wire", state)

        said = lose_one_and_go_on(config, hosts, tmp_path, signal.SIGKILL, lambda: wire("down"), lambda: wire("up"))
    assert "error: rank 0: another rank has not answered within parallel.timeout" in said[0]
    assert "Traceback" not in said[0]
    run(expected, 2)
    assert losses(config) == losses(expected)
    assert_bitwise_equal(config, expected)
