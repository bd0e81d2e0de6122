"""What the compiler makes of every kernel, on a machine without a GPU: registers, spills, memory accesses.

    python -m benchmarks.kernels_aot             compares with kernels_aot.json and prints the table
    python -m benchmarks.kernels_aot --write     makes that file anew, after a change that is meant

The kernels are those that the operations launch at LLaMA-2's shapes, and every configuration of `tuned.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of benchmarks/, wherever this is started
from benchmarks.aot import Compiled, compile_all
from megaflow.kernels import cross_entropy, linear_cross_entropy
from megaflow.kernels.attention import Segments
from megaflow.kernels.cross_entropy import Objective, Vocabulary
from megaflow.kernels.dispatch import OPERATIONS

BASELINE = Path(__file__).with_suffix(".json")
ARCHS = (80, 90)
TOKENS, SEQUENCES = 16384, 4
MORE_REGISTERS = 8
"""Than in the baseline, of a thread: no regression yet."""


def op(name: str, backend: str = "triton") -> Callable[..., Any]:
    """A backend of an operation."""
    return {found.name: found.function for found in OPERATIONS[name]}[backend]


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory; numbers want a gradient, and may be written over."""
    made = torch.empty(*shape, dtype=dtype, device="meta")
    return made.requires_grad_() * 1 if dtype.is_floating_point else made


def backward(results: Tensor | tuple[Tensor, ...]) -> None:
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])


def norm(hidden: int, added: bool) -> None:
    x, weight = tensor(TOKENS, hidden), tensor(hidden)
    total, out = op("rms_norm")(x, tensor(TOKENS, hidden) if added else None, weight, 1e-5)
    backward((total, out) if added else out)


def rotary(heads: int, kv_heads: int) -> None:
    tables = (torch.empty(TOKENS, 64, device="meta") for _ in range(2))
    backward(op("rotary")(tensor(TOKENS, (heads + 2 * kv_heads) * 128), heads + kv_heads, *tables))


def swiglu(width: int) -> None:
    backward(op("swiglu")(tensor(TOKENS, 2 * width)))


def embedding(vocabulary: int, hidden: int) -> None:
    backward(op("embedding")(tensor(TOKENS, dtype=torch.int32), tensor(vocabulary, hidden), None))


def loss(columns: int, objective: Objective) -> None:
    """The kernels of a vocabulary that is whole, and those of a shard."""
    logits, labels = tensor(4096, columns).detach(), tensor(4096, dtype=torch.int32)
    cross_entropy.fused(logits, labels, Vocabulary(0, columns), objective, True)
    cross_entropy.fused(logits, labels, Vocabulary(0, columns), objective, False)
    cross_entropy.shard_statistics(logits, labels, Vocabulary(columns, 2 * columns), objective)
    log_sum = torch.empty(4096, device="meta")
    cross_entropy.shard_gradient(logits, labels, log_sum, Vocabulary(columns, 2 * columns), objective)


def scale() -> None:
    linear_cross_entropy.scale(tensor(TOKENS, 4096).detach(), torch.empty((), device="meta"))


def attention(
    head_dim: int,
    group: int = 1,
    seq_length: int = TOKENS // SEQUENCES,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "triton",
) -> None:
    kv_heads = 4096 // head_dim // group
    edges = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
    packed = tensor(seq_length, SEQUENCES, (group + 2) * kv_heads, head_dim, dtype=dtype)
    segments = Segments.documents(edges, seq_length, seq_length * SEQUENCES)
    backward(op("attention", backend)(group * kv_heads, segments, packed))


CASES: dict[str, Callable[[], None]] = {
    "norm, 4096": partial(norm, 4096, False),
    "norm and sum, 4096": partial(norm, 4096, True),
    "norm and sum, 5120": partial(norm, 5120, True),
    "norm and sum, 8192": partial(norm, 8192, True),
    "rotary, 32 heads": partial(rotary, 32, 32),
    "rotary, 64 and 8 heads": partial(rotary, 64, 8),
    "SwiGLU, 11008": partial(swiglu, 11008),
    "SwiGLU, 13824": partial(swiglu, 13824),
    "embedding": partial(embedding, 32000, 4096),
    "loss, 32000": partial(loss, 32000, Objective()),
    "loss, 55296, smoothed": partial(loss, 55296, Objective(0.1, 1e-4)),
    "scale": scale,
    "attention, 64": partial(attention, 64),
    "attention, 128": partial(attention, 128),
    "attention, 128, 8 share": partial(attention, 128, group=8),
    "attention, 80": partial(attention, 80),
    "attention, 192": partial(attention, 192),
    "attention, 256": partial(attention, 256),
    "attention, fp32": partial(attention, 128, dtype=torch.float32),
    "attention, 256, fp32": partial(attention, 256, dtype=torch.float32),
}
HOPPER: dict[str, Callable[[], None]] = {
    "attention, 128, odd length": partial(attention, 128, seq_length=4095),
    "hopper attention, 64": partial(attention, 64, backend="hopper"),
    "hopper attention, 128": partial(attention, 128, backend="hopper"),
    "hopper attention, 128, 8 share": partial(attention, 128, group=8, backend="hopper"),
}


def compiled(arch: int) -> dict[str, Compiled]:
    """Every kernel for a compute capability, by case and name."""
    cases = CASES | HOPPER if arch == 90 else CASES
    rows: dict[str, Compiled] = {}
    for case, found in compile_all(cases, arch):
        name = f"sm_{arch}, {case}: {found.kernel}"
        rows[name if name not in rows else f"{name} ({sum(key.startswith(name) for key in rows) + 1})"] = found
    return rows


def faults(rows: Mapping[str, Compiled]) -> list[str]:
    """What no kernel may have, whatever the baseline says, a line each."""
    lines = []
    for name, row in rows.items():
        copies = row.loads.get(128) or row.bulk
        if row.spills:
            lines.append(f"{name}: {row.spills} bytes of spills")
        if not copies:
            lines.append(f"{name}: nothing is read 16 bytes at a time")
        if "attention" in name and "fp32" not in name and "delta" not in name and not row.products:
            lines.append(f"{name}: no matrix instruction")
    return lines


def regressions(rows: Mapping[str, Compiled], baseline: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is worse than in the baseline or not in it, a line each."""
    lines = [f"{name}: is no longer launched" for name in sorted(baseline.keys() - rows.keys())]
    for name, row in rows.items():
        if (before := baseline.get(name)) is None:
            lines.append(f"{name}: is new")
            continue
        if row.registers > before["registers"] + MORE_REGISTERS:
            lines.append(f"{name}: {row.registers} registers, {before['registers']} before")
        for what, now, then in (
            ("bytes of spills", row.spills, before["spills"]),
            ("bytes of shared memory", row.shared, before["shared"]),
            ("accesses narrower than 16 bytes", narrow(asdict(row)), narrow(before)),
        ):
            if now > then:
                lines.append(f"{name}: {now} {what}, {then} before")
        if row.products != before["products"]:
            lines.append(f"{name}: products by {row.products or 'nothing'}, {before['products'] or 'nothing'} before")
    return lines


def narrow(row: Mapping[str, Any]) -> int:
    """Instructions that access less than 16 bytes of global memory a thread."""
    return sum(count for kind in ("loads", "stores") for width, count in row[kind].items() if int(width) < 128)


def table(rows: Mapping[str, Compiled]) -> str:
    """As markdown."""
    columns = "kernel", "blocks, warps, stages", "registers", "spills, B", "shared, B", "loads, bits: count", "stores"
    lines = ["| " + " | ".join((*columns, "products")) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        loads, stores = (
            ", ".join(f"{width}: {count}" for width, count in counts.items()) for counts in (row.loads, row.stores)
        )
        cells = name, row.config, row.registers, row.spills, row.shared, loads, stores, row.products
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def read_baseline() -> dict[str, dict[str, Any]]:
    """The committed rows."""
    baseline: dict[str, dict[str, Any]] = json.loads(BASELINE.read_text())
    return baseline


def main(
    write: Annotated[bool, typer.Option("--write", help="make the baseline anew")] = False,
    arch: Annotated[list[int] | None, typer.Option(help="compute capability; all of them by default")] = None,
) -> None:
    """Compile every kernel, print the table, and fail where something is worse than in the baseline."""
    rows: dict[str, Compiled] = {}
    for number in arch or ARCHS:
        rows |= compiled(number)
    print(table(rows))
    if write:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items())
        BASELINE.write_text("{\n" + lines + "\n}\n")
        return
    baseline = {name: row for name, row in read_baseline().items() if row["arch"] in (arch or ARCHS)}
    worse = faults(rows) + regressions(rows, baseline)
    print("\n".join(worse) if worse else f"\n{len(rows)} kernels, none is worse than in {BASELINE.name}")
    if worse:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
