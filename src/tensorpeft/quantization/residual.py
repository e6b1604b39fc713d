"""QDoTA's base layer: the residual of a matrix product operator in 4 bits, and the operator's cores beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from bitsandbytes.autograd._functions import matmul_4bit
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit, fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from tensorpeft.networks.cut import Cut, Ready
from tensorpeft.networks.derivatives import is_transformed
from tensorpeft.networks.dtypes import at_least_float32, product_dtype
from tensorpeft.networks.effective import add_apart, effective_linear, effective_weight
from tensorpeft.networks.mpo import MPO, FrozenCores, contract, decompose
from tensorpeft.networks.update import AbstractUpdatableLinear
from tensorpeft.plugin.base_weight import plain_layer, restore_row_order


class Split(NamedTuple):
    """A weight as NF4 residual and cores."""

    residual: Params4bit
    cores: list[Tensor]  # each (bond_left, out_mode, in_mode, bond_right), float32
    errors: list[float]  # ‖W0 − (deNF4(Q) + MPO(T))‖ / ‖W0‖ after each half-step, the first that of one shot


@torch.no_grad()
def split(
    weight: Tensor,  # (out, in), floating point
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    max_bond: int | Sequence[int],  # of all inner bonds, or of each
    rounds: int = 1,
    double_quant: bool = True,
) -> Split:
    """The weight as `deNF4(Q) + MPO(T)`, the pair with the smallest error of all that were met.

    One round is the paper's: `T = MPO(W0)`, `Q = NF4(W0 − MPO(T))`. Each further one repeats
    `T ← MPO(W0 − deNF4(Q))`, `Q ← NF4(W0 − MPO(T))`, as LoftQ (arXiv 2310.08659) does with an SVD. The error need not
    fall at every step, so the best pair is kept.

    Raises:
        ValueError: fewer rounds than 1, or a weight that cannot be decomposed (see `networks.mpo.decompose`).

    Source: DoTA, section 3.3 (QDoTA).
    """

    def by_mpo(matrix: Tensor) -> list[Tensor]:
        return decompose(matrix, out_modes, in_modes, max_bond)

    return Split(*alternate(weight, by_mpo, contract, rounds, double_quant))


Low = TypeVar("Low")


@torch.no_grad()
def alternate(
    weight: Tensor,  # (out, in), floating point
    approximate: Callable[[Tensor], Low],  # a float32 matrix -> a form of it with few parameters
    restore: Callable[[Low], Tensor],  # that form -> the matrix
    rounds: int,
    double_quant: bool,
) -> tuple[Params4bit, Low, list[float]]:
    """The 4-bit residual, the form with few parameters, and the errors after each half-step: see `split`."""
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1, the paper's one shot.")
    exact = at_least_float32(weight)
    scale = exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
    best, errors = None, []
    for quantised, low in _half_steps(exact, weight.dtype, approximate, restore, rounds, double_quant):
        error = ((exact - dequantise(quantised) - restore(low)).norm() / scale).item()
        if best is None or error < min(errors):
            best = (quantised, low)
        errors.append(error)
    assert best is not None
    return *best, errors


def _half_steps(
    exact: Tensor,
    dtype: torch.dtype,
    approximate: Callable[[Tensor], Low],
    restore: Callable[[Low], Tensor],
    rounds: int,
    double_quant: bool,
) -> Iterator[tuple[Params4bit, Low]]:
    low = approximate(exact)
    quantised = quantise((exact - restore(low)).to(dtype), double_quant)
    yield quantised, low
    for _ in range(rounds - 1):
        low = approximate(exact - dequantise(quantised))
        yield quantised, low
        quantised = quantise((exact - restore(low)).to(dtype), double_quant)
        yield quantised, low


def quantise(weight: Tensor, double_quant: bool = True) -> Params4bit:
    """The NF4 form of a matrix, blocks of 64, on the matrix's device.

    Raises:
        ValueError: an entry is not finite; NF4 would spread it over its block.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("cannot quantise the weight: expected finite numbers. Check the checkpoint.")
    stored = Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant)  # type: ignore
    return stored._quantize(weight.device)


def dequantise(stored: Params4bit) -> Tensor:  # (out, in)
    """The matrix of a 4-bit weight, in the dtype of the weight it was made from."""
    return dequantize_4bit(stored.data, stored.quant_state)


class ResidualLinear4bit(Linear4bit, AbstractUpdatableLinear):
    """`y = x (deNF4(Q) + MPO(T_start))ᵀ + b`: a linear layer that is a weight in 4 bits with a part of it in float32.

    To bitsandbytes, transformers and PEFT it is a `Linear4bit` whose 4-bit weight is the residual. An adapter that
    starts from `T_start` replaces it: `y = x (deNF4(Q) + MPO(T))ᵀ + b`, one product with a matrix that is made in
    forward, again in backward, and never kept.

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
        core_shapes: of `T_start`.
        compute_dtype: what the product runs in; None: in the dtype of the input.
        double_quant: whether the blocks' scales are quantised too.
        device: where its tensors are allocated, unset.

    Source: DoTA, section 3.3 (QDoTA).
    """

    start: FrozenCores  # pyright: ignore[reportIncompatibleVariableOverride]  # set here and nowhere else
    dtype_of_model: Tensor  # (0,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        core_shapes: Sequence[Sequence[int]],
        compute_dtype: torch.dtype | None = None,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, bias, compute_dtype, double_quant, "nf4", device=device)
        cores = [torch.empty(tuple(shape), dtype=torch.float32, device=device) for shape in core_shapes]
        # Follows the model's dtype (`model.to`, `from_pretrained(dtype=…)`), which nothing else in this layer does.
        self.register_buffer("dtype_of_model", torch.empty(0, device=device), persistent=False)
        # Named, because from_pretrained(dtype=…) changes torch's default meanwhile.
        self.start = FrozenCores(cores, torch.zeros(4, dtype=torch.int64, device=device))

    @classmethod
    def from_split(
        cls, parts: Split, bias: Tensor | None, compute_dtype: torch.dtype | None = None
    ) -> ResidualLinear4bit:
        """The layer of a weight that has been split."""
        out_features, in_features = parts.residual.quant_state.shape  # type: ignore
        shapes = [core.shape for core in parts.cores]
        layer = cls(in_features, out_features, bias is not None, shapes, compute_dtype, device="meta")
        layer.start = FrozenCores(parts.cores, digest(parts.residual, parts.cores))
        layer.dtype_of_model = torch.empty(0, dtype=parts.residual.quant_state.dtype, device=parts.residual.device)
        fill(layer, parts.residual, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(*batch, in) -> (*batch, out)."""
        return self.forward_with(x, ())

    def forward_with(self, x: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """`x (deNF4(Q) + MPO(T_start) + Σ ΔW)ᵀ + b`."""
        dtype, cuts = x.dtype, self._with_start(cuts)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed()):
            # Decoding: for a few tokens the sum of both parts of the weight is not worth making.
            added = add_apart(x, cuts)
            if added is not None:
                return self._residual_product(x.to(product_dtype(x))).add(added).to(dtype)
        return effective_linear(x, self._dequantised, self.bias, cuts).to(dtype)

    def weight_with(self, cuts: Sequence[Cut], dtype: torch.dtype | None = None) -> Tensor:
        """`deNF4(Q) + MPO(T_start) + Σ ΔW`, by default in the dtype of the model."""
        dtype = self.dtype_of_model.dtype if dtype is None else dtype
        return effective_weight(self._dequantised(), self._with_start(cuts), dtype)

    def _residual_product(self, x: Tensor) -> Tensor:
        """`x deNF4(Q)ᵀ + b`, by the kernel that does not dequantise the whole weight where there is one."""
        stored, bias = self._restored(), None if self.bias is None else self.bias.to(x.dtype)
        return matmul_4bit(x, stored, stored.quant_state, bias=bias)  # type: ignore

    def current_digest(self) -> Tensor:  # (4,), int64
        """The SHA-256 of the 4-bit weight, its statistics and the start, as they are now."""
        return digest(self._restored(), self.start.cores())

    def _dequantised(self) -> Tensor:
        return dequantise(self._restored())

    def _restored(self) -> Params4bit:
        restore_row_order(self)
        fix_4bit_weight_quant_state_from_module(self)
        return self.weight  # type: ignore

    def _with_start(self, cuts: Sequence[Cut]) -> list[Cut]:
        """The start's network and the cuts; an update that begins by subtracting the start takes its place."""
        start = self.start.cores()
        for k, cut in enumerate(cuts):
            if len(cut.start) == len(start) and all(a is b for a, b in zip(cut.start, start)):
                return [cut._replace(start=()), *cuts[:k], *cuts[k + 1 :]]
        return [Cut(MPO, start, ready=Ready(self.start.halves())), *cuts]

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, and the bonds of the start."""
        bonds = "·".join(["1", *(str(core.shape[3]) for core in self.start.cores())])
        return f"{super().extra_repr()}, nf4, start bonds {bonds}"


def nf4_linear(
    shape: Sequence[int],  # (out, in)
    has_bias: bool,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
) -> Linear4bit:
    """A plain 4-bit layer on the meta device."""
    out, in_ = shape
    layer = Linear4bit(in_, out, has_bias, compute_dtype, double_quant, "nf4", device="meta")
    # On AVX512 bitsandbytes repacks weights for its own kernel in the first evaluation: it asserts sizes that real
    # models do not have (out a multiple of 32), and rounds the blocks' scales to bfloat16 for good.
    layer.support_avx512bf16_for_cpu = False
    return layer


def fill(layer: Linear4bit, stored: Params4bit, bias: Tensor | None) -> Linear4bit:
    """The layer, with a weight that is quantised already, and a bias."""
    layer.weight, layer.quant_state, stored.module = stored, stored.quant_state, layer  # type: ignore
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every 4-bit layer by a plain one, one at a time; by default in the dtype of the rest of the model."""
    if dtype is None:
        dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)
    layers: Mapping[str, nn.Module] = dict(model.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, Linear4bit):
            restore_row_order(layer)
            is_residual = isinstance(layer, AbstractUpdatableLinear)
            weight = layer.weight_with((), dtype) if is_residual else dequantise(layer.weight)  # type: ignore
            model.set_submodule(name, plain_layer(layer, weight if dtype is None else weight.to(dtype)))


@torch.no_grad()
def digest(residual: Params4bit, cores: Sequence[Tensor]) -> Tensor:  # (4,), int64
    """The SHA-256 of all that the layer's weight is made of."""
    sha = hashlib.sha256()
    stored = {"weight": residual.data, **residual.quant_state.as_dict(packed=True)}  # type: ignore[union-attr]
    stored.update({f"core_{k}": core for k, core in enumerate(cores, 1)})
    for name in sorted(stored):
        tensor = stored[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.int64).to(cores[0].device)
