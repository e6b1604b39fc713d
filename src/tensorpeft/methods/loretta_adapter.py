"""LoRETTA (arXiv 2402.11417), the adapter form: bottlenecks of tensor trains after the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

from torch import Tensor

from tensorpeft.modes import modes_near_8
from tensorpeft.networks.bottleneck import BottleneckUpdate
from tensorpeft.networks.tensor_train import random_train
from tensorpeft.plugin.config import Bases, TensorConfig, check_is_bool, check_modes, check_rank
from tensorpeft.plugin.registration import register
from tensorpeft.sites import Site

# The last linear layers of the attention and the MLP blocks: a bottleneck behind one is behind its block.
_LAST_LAYERS = {
    model: names.split()
    for models, names in {
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo2 phi3": "o_proj down_proj",
        "bert roberta xlm-roberta electra deberta deberta-v2 esm": "output.dense",
        "opt bart mbart pegasus": "self_attn.out_proj encoder_attn.out_proj fc2",
        "gpt_neox bloom falcon": "dense dense_4h_to_h",
        "t5 mt5 umt5": "o wo",
        "distilbert": "out_lin lin2",
        "gpt2": "c_proj",
        "gptj": "out_proj fc_out",
        "modernbert": "Wo",
        "vit": "output.dense o_proj fc2",
        "phi": "dense fc2",
    }.items()
    for model in models.split()
}


@register("lorettaadapter")
@dataclass
class LorettaAdapterConfig(TensorConfig):
    """`z + B relu(A z + a) + b` behind the attention and the MLP blocks, A and B tensor trains.

    Not linear, so it cannot be merged or exported: those calls raise an error that says so. A block of width 768 at the
    defaults has 2,392 parameters, 832 of them in the two biases; the same bottleneck in full has 99,136.

    Args:
        target_modules: as for every method, but the layers that it stands *behind*. None: the last linear layers of the
            attention and MLP blocks of the architecture.
        bottleneck: width between the two matrices.
        tt_rank: bond dimension of both trains.
        modes: {size: [mode, …]} for a layer's size, or the bottleneck's, to be split otherwise than into modes near 8;
            at least 2 modes.
        init_weights: True: A's cores are Gaussian with the variance of a new linear layer's weight, B's last core is
            zero, so that nothing is added. False: B's last core is Gaussian too, which is *not* the identity.

    Raises:
        ValueError: a width or bond below 1, modes that are not at least 2 whole numbers with the product that they are
            for.

    Source: LoRETTA (adp). The paper trains the normalisation layers too: pass them as `modules_to_save`.

    >>> LorettaAdapterConfig(task_type="SEQ_CLS").bottleneck
    64
    """

    default_targets: ClassVar[Mapping[str, list[str]]] = _LAST_LAYERS

    bottleneck: int = field(default=64, metadata={"help": "Width of the bottlenecks."})
    tt_rank: int = field(default=5, metadata={"help": "Bond dimension of the trains."})
    modes: dict[int, list[int]] | None = field(default=None, metadata={"help": "{size: modes} that override ours."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the adapter starts as the identity."})

    def __post_init__(self) -> None:
        """Check all that can be known without a model."""
        super().__post_init__()
        check_rank("bottleneck", self.bottleneck)
        check_rank("tt_rank", self.tt_rank)
        check_is_bool("init_weights", self.init_weights)
        self.modes = check_modes(self.modes)

    def build(self, sites: Sequence[Site], bases: Bases) -> Mapping[str, BottleneckUpdate]:
        """A bottleneck per site. Reads no weight."""
        return {site.name: self._build_one(site) for site in sites}

    def _build_one(self, site: Site) -> BottleneckUpdate:
        size, width = self._modes(site.out), self._modes(self.bottleneck)
        down = random_train([*size, *width], self.tt_rank, std=1 / sqrt(3 * site.out))
        up: list[Tensor] = random_train([*width, *size], self.tt_rank, std=1.0)
        up[-1].mul_(0.0 if self.init_weights else 1 / sqrt(3 * self.bottleneck))
        return BottleneckUpdate(down, up, self.bottleneck, site.out)

    def _modes(self, size: int) -> Sequence[int]:
        return (self.modes or {}).get(size) or modes_near_8(size)
