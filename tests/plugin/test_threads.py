"""Several threads in one model: plain forwards of one adapter are safe, also where what they keep is not there yet."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from cases import CASES, MODELS, logits, perturb, tokens

THREADS, ROUNDS = 4, 3
ROWS = [tokens(seed=seed) for seed in range(THREADS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forwards_in_several_threads_give_what_each_gives_alone(case):
    model = get_peft_model(MODELS[0].fresh(), case.make(target_modules=MODELS[0].targets))
    perturb(model)
    wanted = [logits(model.eval(), rows) for rows in ROWS]
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(ROUNDS):
            model.train()  # what evaluation keeps is freed
            model.eval()
            found = list(threads.map(lambda rows: logits(model, rows), ROWS))
            assert all(map(torch.equal, found, wanted))
