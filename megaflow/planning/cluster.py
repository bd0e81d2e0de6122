"""GPUs by their data sheets, the links between them, and what programs reach of both.

Figures are those of NVIDIA's data sheets of A100, H100 and H200 SXM and L40S, and of the Ada white paper for the RTX
4090; those of H100, H200 and L40S were compared with pages that quote the sheets, the others are the ones generally
known. Peaks are dense bf16 with fp32 sums: half of what the sheets print for sparse matrices. Links are per direction,
half of what the sheets print; H800 is H100 with 400 GB/s of NVLink. Memory is what the driver shows. Networks are those
of NVIDIA's own machines, 200 Gbit/s for each A100 and 400 for each H100; for others, usual ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GB = 1e9
MIB = 2**20


@dataclass(frozen=True)
class Efficiency:
    """The share of a data sheet's figure that a training step reaches, and what every operation costs beside.

    `matmul` of A100 and of H100 is fitted to one row each, which `published.py` marks; L40S and RTX 4090 take H100's.
    The others are usual results of microbenchmarks, rounded and fitted to nothing.
    """

    matmul: float = 0.67
    """Of the peak, by large matrix products."""
    attention: float = 0.5
    """Of the peak, by flash attention, both passes."""
    memory: float = 0.8
    """Of the memory's bandwidth, by element-wise kernels."""
    link: float = 0.8
    """Of NVLink or PCIe, by collectives within a node."""
    network: float = 0.8
    """Of the network, by collectives between nodes."""
    kernel: float = 8e-6
    """Seconds that every matrix product loses at its start and end."""
    latency: float = 15e-6
    """Seconds that every collective or message takes beside its bytes."""


@dataclass(frozen=True)
class GPU:
    """One GPU and how it is linked."""

    name: str
    tflops: float
    """Dense bf16 peak, TFLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """To the others of its node, bytes/s per direction."""
    network: float
    """To other nodes, bytes/s per direction."""
    efficiency: Efficiency = field(default_factory=Efficiency)


_AMPERE = Efficiency(matmul=0.76)

GPUS = {
    "a100": GPU("A100 SXM 80 GB", 312, 81920 * MIB, 2039 * GB, 300 * GB, 25 * GB, _AMPERE),
    "a100-40": GPU("A100 SXM 40 GB", 312, 40960 * MIB, 1555 * GB, 300 * GB, 25 * GB, _AMPERE),
    "h100": GPU("H100 SXM 80 GB", 989, 81559 * MIB, 3350 * GB, 450 * GB, 50 * GB),
    "h200": GPU("H200 SXM 141 GB", 989, 143771 * MIB, 4800 * GB, 450 * GB, 50 * GB),
    "h800": GPU("H800 SXM 80 GB", 989, 81559 * MIB, 3350 * GB, 200 * GB, 50 * GB),
    "l40s": GPU("L40S 48 GB", 362, 46068 * MIB, 864 * GB, 32 * GB, 12.5 * GB),
    "rtx4090": GPU("GeForce RTX 4090 24 GB", 165, 24564 * MIB, 1008 * GB, 32 * GB, 3.125 * GB),
}
"""By the name that `--gpu` takes."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in nodes."""

    gpu: GPU
    gpus: int
    node: int = 8
    """GPUs in a node."""

    def compute(self, flops: float) -> float:
        """Seconds of a matrix product."""
        return flops / (self.gpu.tflops * 1e12 * self.gpu.efficiency.matmul) + self.gpu.efficiency.kernel

    def attend(self, flops: float) -> float:
        """Seconds of flash attention."""
        return flops / (self.gpu.tflops * 1e12 * self.gpu.efficiency.attention)

    def touch(self, size: float) -> float:
        """Seconds to move `size` bytes to or from the GPU's memory."""
        return size / (self.gpu.bandwidth * self.gpu.efficiency.memory)

    def gather(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of an all-gather to, or a reduce-scatter from, `size` bytes on each of `ranks` ranks.

        `stride` is the distance between neighbours of the group in the order of the ranks: within a node they use its
        links; over several, the members on a node drive one network card each, and the slower of both counts.
        """
        if ranks == 1:
            return 0.0
        efficiency = self.gpu.efficiency
        speed = self.gpu.link * efficiency.link
        here = max(self.node // stride, 1)  # members on one node
        if here < ranks:
            speed = min(speed if here > 1 else float("inf"), here * self.gpu.network * efficiency.network)
        return size * (ranks - 1) / ranks / speed + efficiency.latency

    def send(self, size: float, stride: int) -> float:
        """Seconds of a message to the rank that is `stride` further."""
        efficiency = self.gpu.efficiency
        inside = stride < self.node
        speed = self.gpu.link * efficiency.link if inside else self.gpu.network * efficiency.network
        return size / speed + efficiency.latency
