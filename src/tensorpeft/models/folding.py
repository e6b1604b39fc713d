"""A protein folding model that is trained through its language model: ESM-2 with ESMFold's folding head.

transformers' `EsmForProteinFolding` detaches the language model from the head, so that an adapter on it would learn
nothing; the parts are the same here. As in LoRTA's experiment, the head is ESMFold's with fewer blocks (12) and the
outer product of AlphaFold 2. It is trained on the backbone alone: side chains and confidence have no loss.

Sources: LoRTA, arXiv 2410.04060, section 4.4 and appendix E.4. ESMFold: Lin et al., Science 379, 2023. AlphaFold 2:
Jumper et al., Nature 596, 2021, whose supplement has the algorithms and equations that are named below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EsmConfig, EsmModel
from transformers import initialization as init
from transformers.models.esm.configuration_esm import (
    EsmFoldConfig,
    StructureModuleConfig,
    TrunkConfig,
    get_default_vocab_list,
)
from transformers.models.esm.modeling_esmfold import EsmFoldingTrunk, EsmFoldPreTrainedModel
from transformers.models.esm.openfold_utils import residue_constants
from transformers.models.esm.openfold_utils.rigid_utils import Rigid
from transformers.utils.generic import ModelOutput

from tensorpeft.tasks.task import Structure

VOCABULARY: tuple[str, ...] = tuple(get_default_vocab_list())  # of all ESM-2 models, in the order of the ids
# AlphaFold's index of each of these tokens; what is no standard amino acid is X.
_RESIDUE_TYPES = [
    residue_constants.restype_order_with_x.get(token, residue_constants.restype_num) for token in VOCABULARY
]
_OUTER_DIM = 32  # AlphaFold's c in algorithm 10
_NUM_BINS, _FIRST_EDGE, _LAST_EDGE = 64, 2.3125, 21.6875  # AlphaFold's distogram, Å
_FAPE_WEIGHT, _INTERMEDIATE_FAPE_WEIGHT, _DISTOGRAM_WEIGHT = 0.5, 0.5, 0.3  # AlphaFold, equation 7


@dataclass
class FoldingOutput(ModelOutput):
    """What a folding model returns.

    Args:
        loss: the mean over the structures; None without true positions.
        positions_ca: (batch, residues, 3), Å: the predicted Cα.
    """

    loss: Tensor | None = None
    positions_ca: Tensor | None = None


class OuterProduct(nn.Module):
    """What the sequence tells the pairs: `Linear(flatten(a_i ⊗ b_j))`, a and b linear in the residues' states.

    AlphaFold's outer product mean (algorithm 10) of an alignment of one sequence.

    Args:
        sequence_dim: channels of a residue.
        pair_dim: channels of a pair.
    """

    def __init__(self, sequence_dim: int, pair_dim: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(sequence_dim)
        self.proj = nn.Linear(sequence_dim, 2 * _OUTER_DIM)
        self.o_proj = nn.Linear(_OUTER_DIM**2, pair_dim)  # transformers starts it at zero, by this name

    def forward(
        self,
        sequence_state: Tensor,  # (batch, residues, sequence_dim)
    ) -> Tensor:  # (batch, residues, residues, pair_dim)
        """The update of the pairs."""
        left, right = self.proj(self.layernorm(sequence_state)).chunk(2, dim=-1)
        return self.o_proj(torch.einsum("bic,bjd->bijcd", left, right).flatten(-2))


class FoldingHead(nn.Module):
    """From the language model's hidden states to backbone frames and a distogram.

    A learned mean of the hidden states of all layers, and an embedding of the amino acid, are the residues' first
    states; those of the pairs are zero. The trunk and its structure module are transformers'.

    Args:
        config: of the whole model; the trunk's is `esmfold_config.trunk`.
    """

    def __init__(self, config: EsmConfig) -> None:
        super().__init__()
        trunk = _trunk_config(config)
        sequence_dim, self.pair_dim = trunk.sequence_state_dim, trunk.pairwise_state_dim
        self.layer_weights = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.project = nn.Sequential(
            nn.LayerNorm(config.hidden_size),
            nn.Linear(config.hidden_size, sequence_dim),
            nn.ReLU(),
            nn.Linear(sequence_dim, sequence_dim),
        )
        self.embedding = nn.Embedding(residue_constants.restype_num + 1, sequence_dim)
        self.trunk = EsmFoldingTrunk(trunk)
        for block in self.trunk.blocks:
            block.sequence_to_pair = OuterProduct(sequence_dim, self.pair_dim)
        self.distogram = nn.Linear(self.pair_dim, _NUM_BINS)

    def forward(
        self,
        hidden_states: Tensor,  # (layers + 1, batch, residues, hidden)
        residue_types: Tensor,  # (batch, residues), AlphaFold's indices
        mask: Tensor,  # (batch, residues), 1: a residue, 0: padding
        num_recycles: int,
    ) -> tuple[Tensor, Tensor]:  # (steps, batch, residues, 7) and (batch, residues, residues, bins)
        """The frames after every step of the structure module, quaternion and Cα in Å, and the distogram's logits."""
        weights = self.layer_weights.softmax(0)
        sequence = torch.einsum("l,lbic->bic", weights, hidden_states.to(weights.dtype))
        sequence = self.project(sequence) + self.embedding(residue_types)
        pairs = sequence.new_zeros(*mask.shape, mask.shape[1], self.pair_dim)
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        found = self.trunk(sequence, pairs, residue_types, places, mask, no_recycles=num_recycles)
        logits = self.distogram(found["s_z"])
        return found["frames"], logits + logits.transpose(1, 2)


class FoldingModel(EsmFoldPreTrainedModel):
    """ESM-2 with a folding head. Made by `build_folding_model`; saved and loaded as any model of transformers.

    With an adapter, the head is trained in full beside it: `modules_to_save=["head"]`. Some of the head's layers start
    at zero, as in AlphaFold, so that in the very first step no gradient passes through it to the language model.

    Args:
        config: of ESM-2, with `is_folding_model` and the trunk in `esmfold_config`.
    """

    config_class = EsmConfig
    config: EsmConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # the parent's says EsmFoldConfig

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        self.esm = _without_heads(EsmModel(config, add_pooling_layer=False))
        self.head = FoldingHead(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FoldingHead):
            init.zeros_(module.layer_weights)
            for block in module.trunk.blocks:
                # transformers 5.23 passes over modules without parameters of their own in classes that are not its own.
                super()._init_weights(block)

    def forward(
        self,
        input_ids: Tensor,  # (batch, residues + 2): <cls>, the residues, <eos>, then padding
        attention_mask: Tensor | None = None,  # likewise, 0: padding; None: where the tokens are not <pad>
        positions: Tensor | None = None,  # (batch, residues, 3, 3), Å, N, Cα and C; NaN: not resolved, or padding
        num_recycles: int | None = None,  # how often the trunk's result is put into it again; None: as configured
        return_loss: bool = True,  # Trainer takes the loss of an evaluation where it finds this name
    ) -> FoldingOutput:
        """The predicted Cα, and `folding_loss` where true positions are given.

        While it trains, the number of recycles is drawn, from 0 to the configured one, as for AlphaFold and ESMFold;
        only the last pass has gradients.
        """
        if attention_mask is None:
            attention_mask = (input_ids != VOCABULARY.index("<pad>")).long()
        if num_recycles is None:
            max_passes: int = _trunk_config(self.config).max_recycles
            num_recycles = int(torch.randint(max_passes, ())) if self.training else max_passes - 1
        states = self.esm(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        types = torch.tensor(_RESIDUE_TYPES, device=input_ids.device)[input_ids[:, 1:-1]]
        # The token after a residue is attended to; the one after <eos> is not.
        mask = attention_mask[:, 2:]
        frames, logits = self.head(torch.stack(states)[:, :, 1:-1], types, mask, num_recycles)
        loss = folding_loss(frames, logits, positions) if positions is not None and return_loss else None
        return FoldingOutput(loss=loss, positions_ca=frames[-1, ..., 4:])

    def fold(
        self,
        structure: Structure,  # whose sequence is folded
        num_recycles: int | None = None,  # None: as configured
    ) -> np.ndarray:  # (residues, 3) float64, Å
        """The predicted positions of the Cα, for `tensorpeft.tasks.structures.lddt_ca`. The mode of the model stays."""
        batch = collate_structures([structure])
        device = next(self.parameters()).device
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
                found = self(**inputs, num_recycles=num_recycles)
        finally:
            self.train(was_training)
        return found.positions_ca[0].double().cpu().numpy()


def build_folding_model(
    esm: EsmModel
    | EsmConfig,  # a model is taken over, without pooler and contact head; a configuration starts at random
    num_blocks: int = 12,  # of the trunk, which are Evoformer's without alignment
    num_recycles: int = 3,
    trunk: Mapping[str, Any] | None = None,  # further fields of transformers' TrunkConfig; None: ESMFold's
) -> FoldingModel:
    """ESM-2 with a new folding head. The defaults are LoRTA's, and where it is silent, ESMFold's.

    Raises:
        ValueError: no ESM-2 vocabulary, a number that is too small, an unknown field, or sizes that do not fit.

    >>> esm = EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=8, num_hidden_layers=2,
    ...                 num_attention_heads=2, intermediate_size=16, position_embedding_type="rotary")
    >>> model = build_folding_model(esm, num_blocks=1, trunk={"sequence_state_dim": 32, "pairwise_state_dim": 32})
    >>> len(model.head.trunk.blocks)
    1
    """
    config = esm if isinstance(esm, EsmConfig) else esm.config
    if config.vocab_size != len(VOCABULARY):
        raise ValueError(f"vocab_size={config.vocab_size}: expected {len(VOCABULARY)}, ESM-2's. Pass an ESM-2 model.")
    for name, value, least in (("num_blocks", num_blocks, 1), ("num_recycles", num_recycles, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}.")
    trunk = dict(trunk or {})
    structure_module = dict(trunk.pop("structure_module", {}))
    _check_fields("trunk", trunk, set(TrunkConfig.__dataclass_fields__) - {"num_blocks", "max_recycles"})
    _check_fields("trunk.structure_module", structure_module, set(StructureModuleConfig.__dataclass_fields__))
    # Chunks save memory where there is no gradient; transformers counts passes, which are one more than recycles.
    fields = {"chunk_size": None, **trunk, "num_blocks": num_blocks, "max_recycles": num_recycles + 1}
    _check_heads({**TrunkConfig().to_dict(), **fields})
    fold = {"fp16_esm": False, "trunk": {**fields, "structure_module": structure_module}}
    added = {"is_folding_model": True, "esmfold_config": fold, "vocab_list": list(VOCABULARY)}
    model = FoldingModel(EsmConfig.from_dict({**config.to_dict(), **added}))
    if isinstance(esm, EsmModel):
        model.esm = _without_heads(esm)
    return model


def _without_heads(esm: Any) -> EsmModel:
    """ESM-2 without what it does not fold with; `modules_to_save=["head"]` would train its contact head, too."""
    esm.pooler = esm.contact_head = None
    return esm


def _trunk_config(config: EsmConfig) -> Any:  # its fields are declared as perhaps None
    if not isinstance(config.esmfold_config, EsmFoldConfig):
        raise ValueError("the configuration has no esmfold_config. Use build_folding_model, or a model that it made.")
    return config.esmfold_config.trunk


def _check_fields(name: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{name}: unknown field {unknown[0]!r}, or one with an argument of its own.")


def _check_heads(trunk: Mapping[str, Any]) -> None:
    for kind in ("sequence", "pairwise"):
        size, width = trunk[f"{kind}_state_dim"], trunk[f"{kind}_head_width"]
        if size % width:
            raise ValueError(
                f"trunk: {kind}_state_dim={size} is no multiple of {kind}_head_width={width}. Change one of them."
            )


def folding_loss(
    frames: Tensor,  # (steps, batch, residues, 7): the structure module's, quaternion and Cα in Å
    distogram: Tensor,  # (batch, residues, residues, bins), logits
    positions: Tensor,  # (batch, residues, 3, 3), Å, N, Cα and C; NaN: not resolved, or padding
) -> Tensor:  # ()
    """`0.5 FAPE(last step) + 0.5 mean over steps FAPE + 0.3 cross-entropy of the Cα distances`, a mean over structures.

    The weights are those of AlphaFold's equation 7. Its first term is of all atoms, here of the backbone. Only residues
    with all three atoms count. Computed in float32.
    """
    with torch.autocast(frames.device.type, enabled=False):
        resolved = positions.isfinite().all(-1).all(-1)
        # Where a mask follows: NaN times zero is NaN.
        n, ca, c = positions.nan_to_num().float().unbind(-2)
        # x from Cα to C, and N in the plane of x and y, as AlphaFold's literature positions of the atoms have it.
        true = Rigid.from_3_points(2 * ca - c, ca, n)
        fape = frame_aligned_point_error(Rigid.from_tensor_7(frames.float()), true, resolved)
        distances = distogram_loss(distogram.float(), ca, resolved)
        losses = _FAPE_WEIGHT * fape[-1] + _INTERMEDIATE_FAPE_WEIGHT * fape.mean(0) + _DISTOGRAM_WEIGHT * distances
        return losses.mean()


def frame_aligned_point_error(
    predicted: Rigid,  # (*, batch, residues)
    true: Rigid,  # (batch, residues)
    mask: Tensor,  # (batch, residues), bool: which residues count, as frames and as points
    clamp: float = 10.0,  # Å
    scale: float = 10.0,  # Å
    epsilon: float = 1e-4,  # Å²
) -> Tensor:  # (*, batch)
    """`1/scale · mean over i, j of min(clamp, √(‖T_i⁻¹ x_j − T_i,true⁻¹ x_j,true‖² + epsilon))`, x the frames' origins.

    Backbone FAPE: AlphaFold, algorithm 28. 0 where no residue counts.
    """

    def local(frames: Rigid) -> Tensor:  # (*, batch, i, j, 3)
        return frames[..., None].invert_apply(frames.get_trans()[..., None, :, :])

    distances = ((local(predicted) - local(true)).square().sum(-1) + epsilon).sqrt().clamp(max=clamp)
    return _mean_of_pairs(distances, mask) / scale


def distogram_loss(
    logits: Tensor,  # (batch, residues, residues, 64)
    ca: Tensor,  # (batch, residues, 3), Å
    mask: Tensor,  # (batch, residues), bool: which residues count
) -> Tensor:  # (batch,)
    """The cross-entropy of the distances of Cα in 64 bins, from below 2.3125 Å to above 21.6875 Å.

    AlphaFold, equation 41, which has Cβ. 0 where no residue counts.
    """
    edges = torch.linspace(_FIRST_EDGE, _LAST_EDGE, _NUM_BINS - 1, device=ca.device)
    distances = (ca[:, :, None] - ca[:, None, :]).norm(dim=-1)
    bins = torch.bucketize(distances, edges)
    return _mean_of_pairs(F.cross_entropy(logits.permute(0, 3, 1, 2), bins, reduction="none"), mask)


def _mean_of_pairs(
    values: Tensor,  # (*, batch, residues, residues)
    mask: Tensor,  # (batch, residues)
) -> Tensor:  # (*, batch)
    pairs = (mask[:, :, None] & mask[:, None, :]).to(values.dtype)
    return (values * pairs).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)


def collate_structures(
    structures: Sequence[Structure],
    token_ids: Mapping[str, int] | None = None,  # such as tokenizer.get_vocab(); None: ESM-2's
) -> dict[str, Tensor]:
    """A batch as `FoldingModel` takes it: `input_ids`, `attention_mask` and `positions`, padded to the longest.

    Raises:
        ValueError: no structures, an empty sequence, a letter without a token, or not three positions per residue.
    """
    ids = {token: number for number, token in enumerate(VOCABULARY)} if token_ids is None else token_ids
    longest = max((len(structure.sequence) for structure in structures), default=0)
    input_ids = torch.full((len(structures), longest + 2), ids["<pad>"])
    positions = torch.full((len(structures), longest, 3, 3), torch.nan)
    for row, structure in enumerate(structures):
        length = len(structure.sequence)
        unknown = sorted(set(structure.sequence) - set(ids))
        if not length or unknown or np.shape(structure.positions) != (length, 3, 3):
            raise ValueError(
                f"structure {structure.key!r}: got a sequence of {length} letters, without a token {unknown}, and "
                f"positions {np.shape(structure.positions)}; expected at least one letter, X for an unknown amino "
                f"acid, and positions ({length}, 3, 3)."
            )
        tokens = [ids[token] for token in ("<cls>", *structure.sequence, "<eos>")]
        input_ids[row, : length + 2] = torch.tensor(tokens)
        positions[row, :length] = torch.as_tensor(structure.positions)
    if not structures:
        raise ValueError("no structures to make a batch of, expected at least one.")
    return {"input_ids": input_ids, "attention_mask": (input_ids != ids["<pad>"]).long(), "positions": positions}
