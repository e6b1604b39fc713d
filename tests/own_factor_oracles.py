"""LoRETTA, FLoRA, NOLA and Quantum-PEFT in plain numpy and float64 by the written formulas; Philox in plain integers.

Nothing is asked of the library but its parameters, by name. With `xp=torch` autograd differentiates the same formulas.
"""

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cases import Model
from tensorpeft import FloraConfig, LorettaConfig, NolaConfig, QuantumPeftConfig

__all__ = [
    "METHODS",
    "Method",
    "bases_of",
    "circuit_matrix",
    "dense_updates",
    "philox_block",
    "random_bases",
    "train_of",
    "trained",
]

Array: TypeAlias = Any  # of numpy, or of torch where gradients are wanted


def train_matrix(cores: list[Array], rows: int, xp: ModuleType) -> Array:  # (rows, columns)
    """All entries of a tensor train by one einsum "AaB,BbC,...->ab...", in row-major order as a matrix."""
    bonds, modes = string.ascii_uppercase, string.ascii_lowercase
    operands = ",".join(bonds[k] + modes[k] + bonds[k + 1] for k in range(len(cores)))
    entries = xp.einsum(f"{operands}->{modes[: len(cores)]}", *cores)
    return entries.reshape(rows, -1)


def loretta_update(
    tensors: Mapping[str, Array],  # down_1, down_2, ..., up_1, ...: (bond_left, mode, bond_right)
    out: int,
    r: int,
    alpha: float,
    xp: ModuleType = np,
) -> Array:  # (out, in)
    """`(alpha / r) B A`, A (r, in) and B (out, r) each a tensor train."""
    down, up = ([tensors[name] for name in numbered(tensors, side)] for side in ("down", "up"))
    return alpha / r * train_matrix(up, out, xp) @ train_matrix(down, r, xp)


def numbered(tensors: Mapping[str, Array], side: str) -> list[str]:
    """`side_1`, `side_2`, ... as long as there are any."""
    names = []
    for k in count(1):
        if f"{side}_{k}" not in tensors:
            return names
        names.append(f"{side}_{k}")


def flora_update(tensors: Mapping[str, Array], r: int, alpha: float, xp: ModuleType = np) -> Array:  # (out, in)
    """`(alpha / r) Σ_pq U[o,p] G[p,q] V[i,q]`."""
    return alpha / r * xp.einsum("op,pq,iq->oi", tensors["U"], tensors["G"], tensors["V"])


def nola_update(
    tensors: Mapping[str, Array],  # alpha, beta (k,)
    shape: tuple[int, int],  # (out, in)
    seed: int,
    r: int,
    alpha: float,
    xp: ModuleType = np,
) -> Array:  # (out, in)
    """`(alpha / r) (Σ_i α_i A_i) (Σ_j β_j B_j)`, A_i (out, r), B_j (r, in); the B_j are divided by √in in float32."""
    (out, in_), k = shape, len(tensors["alpha"])
    up, down = random_bases(seed, "up", out, (k, out, r)), random_bases(seed, "down", in_, (k, r, in_))
    down = (down.astype(np.float32) * np.float32(in_**-0.5)).astype(np.float64)
    if xp is torch:
        up, down = torch.from_numpy(up), torch.from_numpy(down)
    factors = xp.einsum("i,iop->op", tensors["alpha"], up), xp.einsum("j,jpd->pd", tensors["beta"], down)
    return alpha / r * factors[0] @ factors[1]


def quantum_update(
    tensors: Mapping[str, Array],  # up_angles, down_angles, diagonal (r,)
    shape: tuple[int, int],  # (out, in)
    num_layers: int,
    alpha: float,
    xp: ModuleType = np,
) -> Array:  # (out, in)
    """`alpha · U diag(λ) Vᵀ`: the first rows and columns of two whole circuits."""
    r = len(tensors["diagonal"])
    sides = [
        circuit_matrix(tensors[name], (size - 1).bit_length(), num_layers, xp)[:size, :r]
        for name, size in zip(("up_angles", "down_angles"), shape)
    ]
    return alpha * (sides[0] * tensors["diagonal"]) @ sides[1].T


def circuit_matrix(angles: Array, bits: int, num_layers: int, xp: ModuleType = np) -> Array:  # (2^bits, 2^bits)
    """Gate by gate, each a matrix of the whole size: rotations of all bits; for every pair, CZ and two rotations."""
    rest = iter(angles)

    def rotation(bit: int) -> Array:
        cos, sin = xp.cos((angle := next(rest)) / 2), xp.sin(angle / 2)
        gate = xp.stack([xp.stack([cos, -sin]), xp.stack([sin, cos])])
        return xp.kron(xp.kron(xp.eye(2**bit, dtype=gate.dtype), gate), xp.eye(2 ** (bits - bit - 1), dtype=gate.dtype))

    result = xp.eye(2**bits, dtype=xp.float64)
    for bit in range(bits):
        result = rotation(bit) @ result
    for _ in range(num_layers):
        for start in (0, 1):
            for bit in range(start, bits - 1, 2):
                both = [bool(k >> (bits - 1 - bit) & 1 and k >> (bits - 2 - bit) & 1) for k in range(2**bits)]
                signs = xp.ones(2**bits, dtype=xp.float64)
                signs[both] = -1
                result = rotation(bit) @ (signs[:, None] * result)
                result = rotation(bit + 1) @ result
    assert not list(rest)  # an angle per rotation, no more
    return result


WORD = (1 << 64) - 1


def philox_block(counter: int, key: tuple[int, int], num_rounds: int = 10) -> tuple[int, int, int, int]:
    """The four words that Philox 4x64 makes of a 256-bit counter (Salmon et al., 2011, section 3.3)."""
    x0, x1, x2, x3 = ((counter >> 64 * k) & WORD for k in range(4))
    k0, k1 = key
    for _ in range(num_rounds):
        product0, product1 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (product1 >> 64) ^ x1 ^ k0, product1 & WORD, (product0 >> 64) ^ x3 ^ k1, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return x0, x1, x2, x3


def words(key: tuple[int, int]) -> Iterator[int]:
    """The stream of a key. numpy's counter goes up before every block: its first block is of counter 1."""
    for counter in count(1):
        yield from philox_block(counter, key)


def uniform(word: int) -> float:
    """The upper 24 bits as a multiple of 2⁻²³ in [−1, 1): exact in float32."""
    return (word >> 40) / (1 << 23) - 1


@lru_cache
def random_bases(seed: int, side: str, size: int, shape: tuple[int, ...]) -> np.ndarray:  # shape, float64
    """The bases of one side and size: the stream of the key (seed, 2 size + side), row-major."""
    stream = words((seed, 2 * size + {"down": 0, "up": 1}[side]))
    return np.array([uniform(next(stream)) for _ in range(int(np.prod(shape)))]).reshape(shape)


@dataclass(frozen=True)
class Method:
    """A method, and arguments of which no two are equal by chance, nor equal to a size of the models."""

    name: str
    config: type[PeftConfig]
    arguments: dict[str, Any]

    def make(self, model: Model, **more: Any) -> PeftConfig:
        return self.config(**{**self.arguments, "target_modules": model.targets, **more})

    def adapt(self, model: Model, init_weights: bool = False, **more: Any) -> PeftModel:
        torch.manual_seed(3)
        return get_peft_model(model.fresh(), self.make(model, init_weights=init_weights, **more)).eval()


METHODS = {
    "loretta": Method("loretta", LorettaConfig, {"r": 3, "alpha": 7, "tt_rank": 2}),
    "flora": Method("flora", FloraConfig, {"r": 3, "alpha": 7}),
    "nola": Method("nola", NolaConfig, {"r": 3, "alpha": 7, "num_bases": 5, "seed": 2**63 + 11}),
    "quantum-peft": Method("quantum-peft", QuantumPeftConfig, {"r": 3, "alpha": 7, "num_layers": 2}),
}


def trained(model: PeftModel) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters, {layer: {name: tensor}}."""
    layers: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, tensor = re.fullmatch(r"base_model\.model\.(.+)\.\w+_update\.\w+\.(\w+)", name).groups()
            layers.setdefault(layer, {})[tensor] = parameter
    return layers


def shape_of(base: nn.Module, name: str) -> tuple[int, int]:  # (out, in)
    """The shape of a layer's weight in our convention: GPT-2's Conv1D stores (in, out)."""
    layer = base.get_submodule(name)
    return tuple(layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape)


def dense_updates(
    method: Method,
    base: nn.Module,
    layers: Mapping[str, Mapping[str, Array]],
    xp: ModuleType = np,
) -> dict[str, Array]:  # {layer: its weight's shape}
    """Every layer's update, laid out as the layer stores its weight."""
    updates = {}
    for name, tensors in layers.items():
        if xp is np:
            tensors = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
        r, alpha = method.arguments["r"], method.arguments["alpha"]
        shape = shape_of(base, name)
        if method.name == "loretta":
            update = loretta_update(tensors, shape[0], r, alpha, xp)
        elif method.name == "flora":
            update = flora_update(tensors, r, alpha, xp)
        elif method.name == "quantum-peft":
            update = quantum_update(tensors, shape, method.arguments["num_layers"], alpha, xp)
        else:
            update = nola_update(tensors, shape, method.arguments["seed"], r, alpha, xp)
        updates[name] = update.T if isinstance(base.get_submodule(name), Conv1D) else update
    return updates


def train_of(out: int, in_: int, **arguments: Any) -> tuple[dict[str, list[int]], dict[str, list[tuple[int, ...]]]]:
    """LoRETTA's A and B for one weight: the printed modes (`A 8·8·12·8, B 8·8·12·8`) and the shapes of the cores."""
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(in_, out, bias=False)})
    model = get_peft_model(model, LorettaConfig(target_modules=["layer"], **arguments)).base_model.model
    printed = model.layer.updates["default"].extra_repr().split(", ")
    modes = {text[0]: [int(mode) for mode in text[2:].split("·")] for text in printed}
    cores = trained_cores(model.layer.updates["default"])
    shapes = {"A": cores["down"], "B": cores["up"]}
    for side, modes_of_side in modes.items():
        lefts, modes_of_cores, rights = zip(*shapes[side], strict=True)
        assert list(modes_of_cores) == modes_of_side
        assert (*lefts, 1) == (1, *rights)  # the bonds of a train
    return modes, shapes


def trained_cores(update: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of `down_1, down_2, ...` and of `up_1, ...`."""
    tensors = dict(update.named_parameters())
    sides = {side: numbered(tensors, side) for side in ("down", "up")}
    assert sorted(name for names in sides.values() for name in names) == sorted(tensors)
    return {side: [tuple(tensors[name].shape) for name in names] for side, names in sides.items()}


def bases_of(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Every mention of a frozen tensor of a NOLA adapter in a model."""
    found = [item for item in model.named_buffers(remove_duplicate=False) if f"nola_update.{adapter}." in item[0]]
    assert len({name.rpartition(".")[2] for name, _ in found}) == len(found)
    return {name.rpartition(".")[2]: buffer for name, buffer in found}
