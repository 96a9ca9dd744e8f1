"""Pseudo-NTKs of real networks: seconds and memory of PseudoNTK, beside torch.func and beside what cannot be avoided.

    python -m benchmarks.empirical [--networks cnn resnet18] [--rows 256 2048] [--threads 2] [--repeats 3] [--json FILE]
    python -m benchmarks.empirical --gpu DATASET [--precisions none tf32 bfloat16] [--tile 4096] [--width 64]

On 32×32×3 images in float32: a convolutional network of 94 538 parameters and a ResNet18 of 16 channels, 701 466. Every measurement
runs in a process of its own (one warm-up call of few rows, then the best of `repeats`), in seconds of the processor with one
thread, else of the wall; its peak memory is that of the call above what the process held before, as the system counts it.
torch.func is vmap(grad) of the whole parameter set in chunks, then G Gᵀ; where G and a chunk do not fit half of the free memory
it is skipped, which is printed.

The floor is the sum of four measured parts: a forward pass, a backward pass to the layers' inputs, forming every row's gradients of
convolutions and Linear layers (batched products of the layers' shapes alone), and n²·P flops, one triangle's, at the rate of a
product of (n, 4096) with (4096, n). PseudoNTK may be below it where it forms no gradients.

--gpu: kernel_matrix of the whole DATASET (uint8 images) with ResNet18 of `width` channels for each precision, in TFLOP/s of n²·P
flops, and the largest normwise error against float64 on 256 rows. Needs CUDA in torch and CuPy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from ntkdask import threads
from ntkdask.arrays import to_device, to_host
from ntkdask.kernels import PseudoNTK
from ntkdask.modules import ResNet18
from ntkdask.modules.build import build
from ntkdask.modules.torch_threads import task_threads
from ntkdask.planning.tiles import Plan
from ntkdask.wording import format_bytes
from ntkdask.workflows.kernel_matrix.build import kernel_matrix

SHAPE = (32, 32, 3)
CHUNK_ROWS = 64
PASS_ROWS = 256
PRODUCT_COLUMNS = 4096
METHODS = ("PseudoNTK", "torch.func", "floor")


def small_cnn(channels: int = 32) -> nn.Module:
    """Three convolutions to `channels`, 2·`channels` and 4·`channels`, GAP and a readout: 94 538 parameters for 32."""
    c = channels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(3, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        return nn.Sequential(*layers, nn.Linear(4 * c, 10)).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": small_cnn,
    "resnet18": lambda: build(ResNet18(width=16)),
    "tiny": lambda: small_cnn(2),
}


def images(n: int) -> np.ndarray:
    """(n, 32, 32, 3) float32, standard normal."""
    return np.random.default_rng(0).standard_normal((n, *SHAPE), dtype=np.float32)


def n_parameters(module: nn.Module) -> int:
    """Scalars of all parameters."""
    return sum(p.numel() for p in module.parameters())


def with_torch_func(module: nn.Module, x: np.ndarray, chunk: int = CHUNK_ROWS) -> np.ndarray:
    """The pseudo-NTK by torch.func: every row's whole gradient, side by side in memory, then one product."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def value(weights: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        y = torch.func.functional_call(module, (weights, buffers), (row[None],))
        return y.sum() / y.shape[1] ** 0.5

    rows = torch.from_numpy(x).permute(0, 3, 1, 2)
    each = torch.func.vmap(torch.func.grad(value), (None, 0))
    g = torch.empty(len(x), n_parameters(module))
    for start in range(0, len(x), chunk):
        found = each(parameters, rows[start : start + chunk])
        torch.cat([block.reshape(len(block), -1) for block in found.values()], dim=1, out=g[start : start + chunk])
    return (g @ g.T).numpy()


def layer_shapes(module: nn.Module) -> list[tuple[int, int, int]]:
    """(outputs, inputs, terms) of the gradient Σ_t g_t a_tᵀ of each convolution and Linear layer for one image."""
    found: list[tuple[int, int, int]] = []

    def note(layer: nn.Module, _: Any, out: torch.Tensor) -> None:
        weight: Any = layer.weight
        found.append((weight.shape[0], weight[0].numel(), out[0, 0].numel() if out.ndim == 4 else 1))

    hooks = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    try:
        with torch.no_grad():
            module(torch.zeros(1, SHAPE[2], *SHAPE[:2]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def floor_parts(module: nn.Module, n: int, repeats: int) -> dict[str, float]:
    """Seconds of what n rows cannot avoid, part by part; passes and forming are measured on fewer rows and scaled."""
    rows = min(n, PASS_ROWS)
    x = torch.from_numpy(images(rows)).permute(0, 3, 1, 2)

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        given = x.clone().requires_grad_()
        torch.autograd.grad(module(given).sum(), given)

    required = [p.requires_grad for p in module.parameters()]
    for p in module.parameters():
        p.requires_grad_(False)
    try:
        ahead, there_and_back = best(forward, repeats), best(both, repeats)
    finally:
        for p, flag in zip(module.parameters(), required, strict=True):
            p.requires_grad_(flag)
    forming = 0.0
    few = min(rows, CHUNK_ROWS)
    for outputs, inputs, terms in layer_shapes(module):
        g, a = torch.ones(few, outputs, terms), torch.ones(few, terms, inputs)
        out = torch.empty(few, outputs, inputs)
        forming += best(lambda g=g, a=a, out=out: torch.bmm(g, a, out=out), repeats) / few
    rate = product_rate(n, repeats)
    return {
        "forward": ahead * n / rows,
        "backward": (there_and_back - ahead) * n / rows,
        "gradients": forming * n,
        "products": n * n * n_parameters(module) / rate,
    }


def product_rate(n: int, repeats: int) -> float:
    """Flops a second of a float32 product (n, 4096) × (4096, n)."""
    a, b = torch.ones(n, PRODUCT_COLUMNS), torch.ones(PRODUCT_COLUMNS, n)
    out = torch.empty(n, n)
    return 2 * n * n * PRODUCT_COLUMNS / best(lambda: torch.mm(a, b, out=out), repeats)


def best(call: Callable[[], object], repeats: int, warm: bool = False) -> float:
    """Least seconds of `repeats` calls; warm: without one before that is not timed.

    Of the processor where there is one thread: what else runs on the machine then hardly counts. Else of the wall.
    """
    clock = time.process_time if threads.current() == 1 else time.perf_counter
    if not warm:
        call()
    taken = []
    for _ in range(repeats):
        started = clock()
        call()
        taken.append(clock() - started)
    return min(taken)


def measure(method: str, network: str, n: int, repeats: int) -> dict[str, Any]:
    """{"seconds", "peak_bytes"} or {"skipped": why}, and the parts of the floor; in this process, whose peak should be its own."""
    module = NETWORKS[network]()
    if method == "floor":
        parts = floor_parts(module, n, repeats)
        return {"seconds": sum(parts.values()), "parts": parts}
    x = images(n)
    gradients = 4 * n * n_parameters(module)
    if method == "torch.func" and 1.5 * gradients > psutil.virtual_memory().available / 2:
        return {"skipped": f"its gradients take {format_bytes(gradients)}"}
    kernel = PseudoNTK(module)
    call = (lambda rows: kernel(rows)) if method == "PseudoNTK" else (lambda rows: with_torch_func(module, rows))
    call(x[: min(n, 2 * CHUNK_ROWS)])
    before = resident_peak(reset=True)
    seconds = best(lambda: call(x), repeats, warm=True)
    return {"seconds": seconds, "peak_bytes": resident_peak() - before}


def resident_peak(reset: bool = False) -> int:
    """Highest resident bytes of this process, since the last reset where the system allows one; reset: the resident bytes now."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return _status("VmHWM")
        return _status("VmRSS")
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def compare(network: str, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every method in a process of its own; prints a table."""
    results: dict[str, Any] = {}
    for method in METHODS:
        command = [sys.executable, "-m", "benchmarks.empirical", "--one", method, network, str(n)]
        command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[method] = json.loads(answer.stdout.splitlines()[-1])
    floor = results["floor"]["seconds"]
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in results["floor"]["parts"].items())
    print(f"{network}, n = {n}, load {os.getloadavg()[0]:.1f}: floor {floor:.3f} s ({parts})", flush=True)
    for method in METHODS[:2]:
        found = results[method]
        if "skipped" in found:
            print(f"  {method:10s} skipped: {found['skipped']}")
            continue
        ratio = found["seconds"] / floor
        print(
            f"  {method:10s} {found['seconds']:.3f} s, {ratio:.2f} of the floor, {format_bytes(found['peak_bytes'])} more memory"
        )
    return {"network": network, "n": n, **results}


def on_gpu(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole dataset's pseudo-NTK for each precision; prints seconds, TFLOP/s and error."""
    from ntkdask.datasets import open_dataset

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device.")
    data, described = open_dataset(arguments.gpu), ResNet18(width=arguments.width)
    found = []
    for name in arguments.precisions:
        precision = None if name == "none" else name
        kernel = PseudoNTK(described, precision=precision, memory_bytes=arguments.memory_bytes)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            started = time.perf_counter()
            kernel_matrix(kernel, data, url=Path(folder) / "k", plan=Plan(arguments.tile))
            seconds = time.perf_counter() - started
        rate = data.n**2 * n_parameters(build(described)) / seconds / 1e12
        error = sampled_error(described, precision, data.rows(0, min(data.n, 256)))
        found.append({"precision": name, "seconds": seconds, "tflops": rate, "error": error})
        print(f"{name}: {seconds:.1f} s, {rate:.1f} TFLOP/s, error {error:.2e} of float64")
    return found


def sampled_error(module: Any, precision: str | None, rows: np.ndarray, device: bool = True) -> float:
    """Largest |k − exact|/√(k_ii·k_jj) over images (uint8), exact in float64."""
    x = to_device(rows.astype(np.float32) / np.float32(255), device)
    exact = to_host(PseudoNTK(module, precision="float64")(x)).astype(np.float64)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    return float((np.abs(to_host(PseudoNTK(module, precision=precision)(x)) - exact) / scale).max())


def main(given: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=["cnn", "resnet18"])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--threads", type=int, default=threads.current())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "NETWORK", "ROWS"), help=argparse.SUPPRESS)
    parser.add_argument("--gpu", metavar="DATASET")
    parser.add_argument(
        "--precisions", nargs="+", choices=["none", "tf32", "bfloat16"], default=["none", "tf32", "bfloat16"]
    )
    parser.add_argument("--tile", type=int, default=4096)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--memory-bytes", type=int, default=2**35)
    parser.add_argument("--folder", help="where the matrices go for as long as they are measured")
    a = parser.parse_args(given)
    if a.one:
        method, network, n = a.one
        with threads.limited(a.threads), task_threads():
            print(json.dumps(measure(method, network, int(n), a.repeats)))
        return
    print(f"torch {torch.__version__}, {threads.blas_name()}, {a.threads} threads")
    found = on_gpu(a) if a.gpu else [compare(network, n, a) for network in a.networks for n in a.rows]
    if a.json:
        Path(a.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
