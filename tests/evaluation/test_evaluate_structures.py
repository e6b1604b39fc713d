import numpy as np
import pytest
import torch
from torch import nn

from evaluation.evaluated import LLAMA
from tensorpeft.evaluation import evaluate_task
from tensorpeft.tasks.task import Structure, StructureTask

TASK = StructureTask("chains", "Fold.", load=None)


def straight(residues, step=3.0, key=""):
    """A chain along the first axis; N and C are 1 Å off to the sides."""
    positions = np.zeros((residues, 3, 3), np.float32)
    positions[:, :, 0] = step * np.arange(residues)[:, None]
    positions[:, 0, 1], positions[:, 2, 1] = -1, 1
    return Structure("A" * residues, positions, key)


class Folder(nn.Module):
    """Knows the answer, but for the spacing."""

    def __init__(self, step, whole):
        super().__init__()
        self.step, self.whole = step, whole
        self.weight = nn.Parameter(torch.zeros(1))

    def fold(self, structure):
        assert not torch.is_grad_enabled()
        positions = torch.from_numpy(straight(len(structure.sequence), self.step).positions) + self.weight
        return positions if self.whole else positions[:, 1].numpy()


@pytest.mark.parametrize("whole", [True, False])
def test_lddt_of_every_chain_and_its_mean(whole):
    done = []
    chains = [straight(2, key="A"), straight(3, key="B")]
    found = evaluate_task(Folder(3.6, whole), None, TASK, chains, on_row=done.append)
    # A: one distance is off by 0.6, within 1, 2 and 4 Å. B: two are off by 0.6, one by 1.2, within 2 and 4 Å.
    scores = [3 / 4, (3 / 4 + 3 / 4 + 2 / 4) / 3]
    assert [row["metrics"]["LDDT-Cα"] for row in found.rows] == pytest.approx(scores)
    assert found.metrics == {"LDDT-Cα": pytest.approx(sum(scores) / 2)}
    assert (found.mode, [row["key"] for row in found.rows], done) == ("structures", ["A", "B"], [1, 1])


def test_a_chain_that_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="task chains, chain 'far': LDDT: no two of the residues"):
        evaluate_task(Folder(3.0, True), None, TASK, [straight(2, step=50.0, key="far")])


def test_a_model_that_does_not_fold_is_refused():
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM has no method fold\(structure\)"):
        evaluate_task(LLAMA.fresh(), None, TASK, [straight(3)])
