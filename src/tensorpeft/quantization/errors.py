"""What 4 bits cost a weight: QLoRA, QPiSSA and QDoTA side by side at equal adapter size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tensorpeft.networks.mpo import contract, decompose
from tensorpeft.plugin.base_weight import weight_of
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.quantization.model import Shapes, network_of, plan_layers
from tensorpeft.quantization.residual import alternate, dequantise, quantise

# Rows of activations that are kept of a layer, spread over all that it sees.
_MAX_ROWS = 512


@dataclass(frozen=True)
class LayerErrors:
    """The errors of one layer's 4-bit forms.

    Args:
        name: full name of the layer.
        shape: (out, in).
        adapter_size: elements of the MPO's cores.
        svd_rank: of QPiSSA: the rank whose factors come closest to that size.
        weight: method -> ‖W − Ŵ‖ / ‖W‖, Frobenius.
        output: method -> ‖X (W − Ŵ)ᵀ‖ / ‖X Wᵀ‖ on the layer's own inputs X; empty where no input was given.
    """

    name: str
    shape: tuple[int, int]
    adapter_size: int
    svd_rank: int
    weight: dict[str, float]
    output: dict[str, float]


class _Rows:
    """Every k-th row of all that are added, k the power of two that keeps no more than are wanted."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self._num_seen, self._step = 0, 1

    def add(self, rows: Tensor) -> None:  # (rows, in)
        more = rows[-self._num_seen % self._step :: self._step]
        self.kept = more.clone() if self.kept is None else torch.cat([self.kept, more])
        self._num_seen += len(rows)
        while len(self.kept) > _MAX_ROWS:
            self.kept, self._step = self.kept[::2].clone(), 2 * self._step


def method_names(rounds: int) -> list[str]:
    """The columns, in order. One round is a paper's own way; QPiSSA in several rounds is LoftQ (arXiv 2310.08659)."""
    several = [f"QPiSSA {rounds}", f"QDoTA {rounds}"] if rounds > 1 else []
    return ["QLoRA", "QPiSSA 1", *several[:1], "QDoTA 1", *several[1:]]


@torch.no_grad()
def quantization_errors(
    model: nn.Module,
    config: TensorConfig,
    rounds: int = 5,
    double_quant: bool = True,
    run: Callable[[], object] | None = None,
    on_layer: Callable[[int, int], object] = lambda done, total: None,
) -> list[LayerErrors]:
    """The errors of every layer that `config` targets. Changes nothing in the model.

    QLoRA is `deNF4(NF4(W))`; QPiSSA and QDoTA are `deNF4(NF4(W − L)) + L` with L the truncated SVD or the MPO of W, in
    one shot and after `rounds` rounds (`residual.split`), the pair with the smallest error kept.

    Args:
        model: in full or half precision.
        config: a `DotaConfig`.
        rounds: of the alternating forms.
        double_quant: whether the blocks' scales are quantised too.
        run: runs the model on real inputs; None: no output errors.
        on_layer: called after every layer with the number of layers done and of all.

    Raises:
        ValueError: see `quantize_residual`.
    """
    shapes, _ = plan_layers(model, config)
    inputs: defaultdict[str, _Rows] = defaultdict(_Rows)
    if run is not None:
        with each_input(model, shapes, lambda name, rows: inputs[name].add(rows.flatten(0, -2))):
            run()
    results = []
    for name, layer_shapes in shapes.items():
        weight = weight_of(model.get_submodule(name)).float()
        results.append(_layer_errors(name, weight, layer_shapes, rounds, double_quant, inputs[name].kept))
        on_layer(len(results), len(shapes))
    return results


def _layer_errors(
    name: str, weight: Tensor, shapes: Shapes, rounds: int, double_quant: bool, inputs: Tensor | None
) -> LayerErrors:
    size = sum(torch.Size(shape).numel() for shape in shapes)
    rank = max(round(size / sum(weight.shape)), 1)

    def by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank]

    def by_mpo(matrix: Tensor) -> list[Tensor]:
        return decompose(matrix, *network_of(shapes))

    approximations = {"QLoRA": dequantise(quantise(weight, double_quant))}
    for label, approximate, restore in (
        ("QPiSSA", by_svd, lambda factors: factors[0] @ factors[1]),
        ("QDoTA", by_mpo, contract),
    ):
        for count in sorted({1, rounds}):
            quantised, low, _ = alternate(weight, approximate, restore, count, double_quant)
            approximations[f"{label} {count}"] = dequantise(quantised) + restore(low)
    norm = weight.norm()
    in_weight = {key: ((weight - other).norm() / norm).item() for key, other in approximations.items()}
    in_output: dict[str, float] = {}
    if inputs is not None:
        x = inputs.float()
        exact = (x @ weight.t()).norm()
        in_output = {key: ((x @ (weight - other).t()).norm() / exact).item() for key, other in approximations.items()}
    return LayerErrors(name, (weight.shape[0], weight.shape[1]), size, rank, in_weight, in_output)


@contextmanager
def each_input(
    model: nn.Module,
    names: Iterable[str],  # of layers
    see: Callable[[str, Tensor], object],  # called with a layer's name and its input (*batch, in)
) -> Iterator[None]:
    """While it is open, every named layer's inputs are seen."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(name, args[0].detach())

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
