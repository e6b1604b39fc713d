"""What each method could reach of a gradient and of a full update."""

import pytest
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor

from tensorpeft.networks.mpo import contract, decompose
from tensorpeft.networks.sketch import exact
from tensorpeft.studies import update_report
from tensorpeft.studies.update import Seen, Sizes, TangentSpace, reaches
from tensorpeft.training.recipe import DataRecipe, Recipe

OUT_MODES, IN_MODES = (2, 3, 4), (3, 2, 4)


def test_the_tangent_space_is_the_range_of_the_jacobian():
    torch.manual_seed(0)
    cores = decompose(torch.randn(24, 24).double(), OUT_MODES, IN_MODES, 3)
    jacobian = torch.autograd.functional.jacobian(lambda *given: contract(given).flatten(), tuple(cores))
    columns = torch.cat([part.reshape(24 * 24, -1) for part in jacobian], dim=1)
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    space = left[:, values > 1e-9 * values[0]]
    assert space.shape[1] < columns.shape[1]  # a bond's basis may be any
    tangent = TangentSpace(cores)
    for seed in range(3):
        matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)).double()
        wanted = (space.t() @ matrix.flatten()).square().sum() / matrix.square().sum()
        assert tangent.share(matrix) == pytest.approx(wanted.item(), rel=1e-9)
    assert tangent.share(contract(cores)) == pytest.approx(1)


def seen(gradient: Tensor, update: Tensor | None) -> Seen:
    return Seen("q", torch.randn(24, 24), gradient, exact(gradient), gradient, update)


def test_shares_are_of_all_weights_together():
    torch.manual_seed(0)
    gradients = [torch.randn(24, 24) * scale for scale in (1.0, 10.0)]
    update = torch.randn(24, 2) @ torch.randn(2, 24)
    found = {
        row.name: row
        for row in reaches([seen(g, update) for g in gradients], Sizes(4, 3, rank=2, frames=3, shared_frames=24))
    }
    values = [torch.linalg.svdvals(g).square() for g in gradients]
    wanted = sum(v[:3].sum() for v in values) / sum(v.sum() for v in values)
    own = found["gradient's frames, r=3, core alone"]
    assert own.trained == 9
    assert own.other == pytest.approx(wanted.item(), rel=1e-4)
    assert found["one pair of frames for all, r=24"].other == pytest.approx(1, rel=1e-4)
    assert found["best matrix of rank 2 of D (LoRA)"].update == pytest.approx(1, rel=1e-4)
    assert found["best matrix of rank 2 of D (LoRA)"].other is None


def over_all(updates, rank):
    """Tucker2 and CP over all weights."""
    *_, tucker, cp = reaches([seen(updates[0], update) for update in updates], Sizes(4, 3, shared_frames=rank))
    count = len(updates)
    assert tucker.name == f"best U G Vᵀ, U and V of all {count}, r={rank} (LoTR, FacT, MetaTT)"
    assert cp.name == f"CP of all {count}, r={rank} (LoRTA), found"
    assert (tucker.trained, cp.trained) == (rank**2 + rank * 48 // count, rank + rank * 48 // count)
    assert tucker.other is cp.other is None
    return tucker.update, cp.update


def test_frames_for_all_layers_hold_what_the_best_of_others_hold():
    torch.manual_seed(0)
    updates = torch.randn(4, 24, 24)
    _, errors = partial_tucker(updates.numpy(), [5, 5], modes=[1, 2], n_iter_max=50)  # tensorly's
    assert over_all(updates, 5)[0] == pytest.approx(1 - float(errors[-1]) ** 2, abs=5e-3)


@pytest.mark.parametrize("seed", range(8))
def test_a_cp_tensor_is_found(seed):
    torch.manual_seed(seed)
    updates = torch.einsum("lr,or,ir->loi", *(torch.randn(size, 3) for size in (4, 24, 24)))
    assert over_all(updates, 3)[1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_cp_tensor_holds_what_matrices_of_all_layers_side_by_side_hold(decay):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(4, 24, 24))
    values = torch.arange(1, 25) ** -decay
    updates = left * values @ right
    tucker, cp = over_all(updates, 8)
    floor = values[:2].square().sum() / values.square().sum()  # two of each, of four
    assert floor.item() - 1e-5 < cp <= tucker + 1e-5


def test_without_an_update_there_are_gradients_alone():
    rows = reaches([seen(torch.randn(24, 24), None)], Sizes(4, 3))
    assert all(row.update is None and row.other is not None for row in rows)


def test_the_order_by_clusters_puts_rows_that_are_alike_beside_each_other():
    torch.manual_seed(0)
    groups = torch.randperm(24) % 3
    update = torch.randn(3, 3)[groups][:, groups] + 1e-3 * torch.randn(24, 24)  # blocks of 8 x 8, in disorder
    found = {row.name: row for row in reaches([seen(update, update)], Sizes(bond=4, num_cores=3, middle=6))}
    in_order, clustered = found["best MPO of D, R=4"], found["best, rows and columns clustered"]
    assert in_order.update is not None
    assert clustered.update is not None
    assert clustered.trained == in_order.trained
    assert clustered.update > in_order.update + 0.1
    wide, narrow = (found[f"best train of D, rows | columns, {name}"] for name in ("middle bond 6", "R=4"))
    assert wide.trained > narrow.trained
    rank = in_order.trained // 48  # of the LoRA that is no larger
    assert found[f"best matrix of rank {rank} of D (LoRA)"].trained == 48 * rank
    # At its start a LoRA moves the rows within those of A; the leading ones of the update are those of its gradient.
    assert found[f"LoRA r={rank}"].other == pytest.approx(rank / 24)
    values = torch.linalg.svdvals(update).square()
    wanted = (values[:rank].sum() / values.sum()).item()
    assert found[f"LoRA r={rank}, A from the gradient"].other == pytest.approx(wanted, rel=1e-4)


def test_no_mpo_keeps_more_than_the_bound_says():
    torch.manual_seed(0)
    noise, exact_mpo = torch.randn(24, 24), contract(decompose(torch.randn(24, 24), OUT_MODES, IN_MODES, 3))
    for update in (noise, exact_mpo):
        rows = reaches([seen(noise, update)], Sizes(bond=3, num_cores=3))
        best = next(k for k, row in enumerate(rows) if row.name == "best MPO of D, R=3")
        for kept, bound in zip(rows[best : best + 6 : 2], rows[best + 1 : best + 6 : 2], strict=True):
            assert bound.name.startswith("no MPO keeps more")
            assert kept.update is not None
            assert bound.update is not None
            assert kept.update <= bound.update + 1e-6
            assert bound.update <= 1 + 1e-6


@pytest.mark.parametrize(
    ("adapter", "of_lora"), [({"method": "lora"}, 1), ({"method": "dota", "init_weights": "random"}, 3)]
)
def test_all_weights_are_trained_in_full_at_the_rate_that_a_comparison_has_for_them(adapter, of_lora):
    data = DataRecipe(train="a", validation="b", start_rows=4)
    recipe = Recipe(
        "a/model", "gsm8k", data, adapter, quantize={"rounds": 1}, trainer={"learning_rate": of_lora * 1e-3}
    )
    full = update_report._as_full(recipe, 5)
    assert full.trainer["learning_rate"] == pytest.approx(0.03e-3)
    assert full.adapter is full.quantize is full.data.start_rows is None
