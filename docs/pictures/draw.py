"""Draws the pictures of the pages in docs/ beside this file: `python docs/pictures/draw.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from megaflow.config import ModelConfig
from megaflow.kernels.attention import Segments
from megaflow.model.memory import activation_bytes
from megaflow.parallel.schedule import make_schedule
from megaflow.parallel.simulator import simulate
from megaflow.planning.drawing import draw_schedule

HERE = Path(__file__).parent
COLOURS = ("#5b8def", "#f0a63c", "#2fa37c", "#c65b7c")
GREY, INK = "#e4e6ea", "#30343b"


def box(axis: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=INK)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1))
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axis.text(middle[0], middle[1] + 0.06, text, ha="center", va="bottom", fontsize=7.5, color=INK)


def grid(axis: Axes) -> None:
    """Sixteen ranks as pp 2 x dp 2 x cp 2 x tp 2."""
    for rank in range(16):
        pp, dp, cp, tp = (rank >> 3) & 1, (rank >> 2) & 1, (rank >> 1) & 1, rank & 1
        x, y = dp * 5.2 + tp * 2.2 + 0.3, 5.6 - pp * 3.2 - cp * 1.15
        box(axis, x, y, 2, 1, COLOURS[dp * 2 + cp], f"rank {rank}\ntp {tp}  cp {cp}")
    for dp in (0, 1):
        axis.text(2.4 + dp * 5.2, 6.95, f"replica dp {dp}: its own sequences", ha="center", fontsize=9)
    for pp in (0, 1):
        axis.text(-0.1, 5.5 - pp * 3.2, f"stage pp {pp}", ha="right", va="center", fontsize=9)
        axis.text(10.4, 5.5 - pp * 3.2, ("first", "last")[pp] + "\nlayers", ha="left", va="center", fontsize=9)
    axis.text(5, 0.55, "same colour: same tokens.   side by side (tp): parts of one layer.   one under the other (cp): "
              "parts of one sequence.", ha="center", fontsize=8.5)  # fmt: skip
    axis.set(xlim=(-1.6, 11.6), ylim=(0.3, 7.4))


def tensor(axis: Axes) -> None:
    """A block under tensor and sequence parallelism on two ranks."""
    for rank, y in ((0, 2.2), (1, 0.4)):
        axis.text(-0.2, y + 0.5, f"tp {rank}", ha="right", va="center", fontsize=9)
        parts = (
            (0, 1.5, GREY, "norm\n[S/2, B, H]"),
            (3, 2.1, COLOURS[rank], "columns of\nqkv or gate, up"),
            (5.2, 1.7, COLOURS[rank], "attention\nor SwiGLU"),
            (7, 2.1, COLOURS[rank], "rows of\nout or down"),
            (10.6, 1.5, GREY, "residual\n[S/2, B, H]"),
        )
        for x, width, colour, text in parts:
            box(axis, x, y, width, 1, colour, text)
        arrow(axis, (1.55, y + 0.5), (2.95, y + 0.5))
        arrow(axis, (9.15, y + 0.5), (10.55, y + 0.5))
    for x, text in ((2.25, "all-gather\nalong S"), (9.85, "reduce-\nscatter")):
        axis.text(x, 1.8, text, ha="center", va="center", fontsize=8.5, color="#b3402f")
    backward = (
        "backward: the output gradient is gathered once and serves both gradients; "
        "the input gradient is scattered while the weight gradient is computed"
    )
    axis.text(6, -0.2, backward, ha="center", fontsize=8)
    axis.set(xlim=(-0.9, 12.4), ylim=(-0.5, 3.5))


def context(axis: Axes) -> None:
    """Who attends to what: eight parts of a sequence with two documents, two ranks."""
    parts, length, documents = 4, 24, (0, 9, 24)
    owner = [0, 1, 1, 0]
    for query in range(length):
        start = max(edge for edge in documents if edge <= query)
        for key in range(length):
            seen = start <= key <= query
            colour = COLOURS[owner[query * parts // length]] if seen else "#f4f5f7"
            axis.add_patch(Rectangle((key, length - 1 - query), 1, 1, facecolor=colour, edgecolor="white", lw=0.4))
    for part in range(parts):
        y = length - (part + 0.5) * length / parts
        axis.text(-0.6, y, f"queries, part {part}\nrank {owner[part]}", ha="right", va="center", fontsize=8.5)
    for edge in range(0, length + 1, length // parts):
        axis.plot([0, length], [edge, edge], color=INK, linewidth=0.8)
    axis.text(4.5, -1.2, "keys of document 0", ha="center", fontsize=8.5)
    axis.text(16.5, -1.2, "keys of document 1", ha="center", fontsize=8.5)
    axis.set(xlim=(-8, length + 0.5), ylim=(-2, length + 0.5), aspect="equal")


def zero(axis: Axes) -> None:
    """The flat buffers of two data ranks."""
    for rank, x in ((0, 0), (1, 8)):
        axis.text(x + 3, 4.9, f"data rank {rank}", ha="center", fontsize=9)
        rows = (("bf16 weights", 3.8), ("fp32 gradient sums", 2.5))
        for name, y in rows:
            for bucket in range(3):
                for part in range(2):
                    mine = part == rank
                    colour = COLOURS[bucket] if mine or name == "bf16 weights" else GREY
                    box(axis, x + bucket * 2 + part, y, 1, 0.7, colour, "own" if mine else "")
            axis.text(x, y + 0.75, name, fontsize=8, va="bottom")
        for name, y in (("fp32 master", 1.2), ("moments", 0.3)):
            for bucket in range(3):
                box(axis, x + 1.5 + bucket, y, 1, 0.6, COLOURS[bucket], "own")
            axis.text(x + 2 + 2.6, y + 0.3, name, fontsize=8, va="center", ha="left")
        arrow(axis, (x + 4.8, 2.4), (x + 4.1, 1.6))
        axis.text(x + 4.7, 2.0, " reduce-scatter,\n bucket by bucket", fontsize=7.5, va="center")
        axis.plot([x + 1.4, x - 0.3, x - 0.3], [1.35, 1.35, 4.15], color=INK, linewidth=1)
        arrow(axis, (x - 0.3, 4.15), (x - 0.02, 4.15))
        axis.text(x - 0.35, 2.0, "all-gather", fontsize=7.5, va="center", ha="right")
    axis.set(xlim=(-1.6, 14.4), ylim=(0, 5.2))


def reshard(axis: Axes) -> None:
    """One weight as four ranks hold it, on disk, and as three others read it."""
    box(axis, 0, 0, 3, 3, GREY)
    for i, (x, y) in enumerate(((0, 1.5), (1.5, 1.5), (0, 0), (1.5, 0))):
        box(axis, x, y, 1.5, 1.5, COLOURS[i], f"tp {i % 2}\ndata {i // 2}")
    axis.text(1.5, 3.15, "saved by tp 2, ZeRO over 2", ha="center", fontsize=9)
    box(axis, 4.6, 0, 3, 3, "#f4f5f7")
    for i, (x, y) in enumerate(((4.6, 1.5), (6.1, 1.5), (4.6, 0), (6.1, 0))):
        box(axis, x + 0.05, y + 0.05, 1.4, 1.4, COLOURS[i], f"o_proj@\n{(0, 64)[i // 2]},{(0, 64)[i % 2]}")
    axis.text(6.1, 3.15, "blocks of the canonical tensor", ha="center", fontsize=9)
    for i in range(3):
        box(axis, 9.2, 2 - i, 3, 1, ("#b9cdf6", "#b5ddcf", "#ecc3d0")[i], f"data {i}")
    axis.text(10.7, 3.15, "read by tp 1, ZeRO over 3", ha="center", fontsize=9)
    arrow(axis, (3.15, 1.5), (4.45, 1.5))
    arrow(axis, (7.75, 1.5), (9.05, 1.5))
    axis.set(xlim=(-0.3, 12.5), ylim=(-0.2, 3.6))


def recompute(axis: Axes) -> None:
    """MiB that a layer of LLaMA-2 7B keeps for 4096 tokens, from the function that `megaflow plan` uses."""
    config = ModelConfig(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, vocab_size=32000)
    kinds: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
    for row, kind in enumerate(kinds):
        held = activation_bytes(config, 4096, recompute=kind)
        kept, working = held.kept / 2**20, held.working / 2**20
        y = 2 - row
        box(axis, 0, y, kept, 0.6, COLOURS[0])
        box(axis, kept, y, working, 0.6, GREY)
        axis.text(-20, y + 0.3, kind, ha="right", va="center", fontsize=9)
        label = f"keeps {kept:,.0f} MiB, needs {working:,.0f} more in its backward pass"
        axis.text(kept + working + 20, y + 0.3, label, va="center", fontsize=8.5)
    axis.set(xlim=(-120, 1500), ylim=(-0.2, 2.9))


def attention(axis: Axes) -> None:
    """Blocks of 64 queries and keys of packed documents: left out, computed, or computed with a mask."""
    lengths, block = [512, 192, 40, 24, 300, 80, 388], 64
    total = sum(lengths)
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    begin, end = Segments.documents(edges, max(lengths), total).seen.tolist()
    computed = 0
    for row in range(total // block):
        first, last = row * block, row * block + block - 1
        for column in range(total // block):
            left, right = column * block, column * block + block
            if right <= begin[first] or left >= end[last]:
                continue
            computed += 1
            whole = begin[last] <= left and right <= end[first]
            axis.add_patch(Rectangle((left, first), block, block, facecolor=COLOURS[0 if whole else 1], edgecolor="w"))
    for start, length in zip(edges.tolist(), lengths, strict=False):
        axis.add_patch(Rectangle((start, start), length, length, fill=False, edgecolor=INK, linewidth=1.2))
    every = (total // block) * (total // block + 1) // 2
    axis.text(
        800, 190, "blue: computed without a mask\norange: with one\nwhite: never looked at", fontsize=9, color=INK
    )
    axis.text(800, 300, f"{computed} of the {every} blocks below\nthe diagonal are computed", fontsize=9, color=INK)
    axis.text(total / 2, -50, "keys: seven documents in one sequence", ha="center", fontsize=9)
    axis.text(-40, total / 2, "queries", rotation=90, va="center", ha="right", fontsize=9)
    axis.set(xlim=(-120, total + 20), ylim=(total + 20, -110), aspect="equal")


def save(name: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> None:
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    draw(axis)
    figure.savefig(HERE / name, dpi=110)


def main() -> None:
    save("grid.png", grid, (9, 4.6))
    save("tensor.png", tensor, (9.5, 3))
    save("context.png", context, (7, 5.6))
    save("zero.png", zero, (10, 3.8))
    save("reshard.png", reshard, (9.5, 3))
    save("recompute.png", recompute, (9.5, 2))
    save("attention.png", attention, (6, 6))
    for name in ("1f1b", "interleaved", "zb_h1", "zb_v"):
        draw_schedule(simulate(make_schedule(name, 4, 8)), HERE / f"{name}.png")


if __name__ == "__main__":
    main()
