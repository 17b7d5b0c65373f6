"""SIGKILL at random moments of training, on one process and on two: all is whole, and the end is the same bit for bit.

`MEMLAYERS_KILLS=200` kills so often.
"""

import pytest
from killing import KILLS

from memlayers.config import validate
from memlayers.train.config import TrainConfig
from tests.train.kill_cases import kill_and_resume


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_kills_lose_nothing_and_change_nothing(fields, tmp_path, world):
    data = {"type": "task", "task": {"type": "passkey", "digits": 1}, "regime": "D"}

    def make(out):
        return validate(
            TrainConfig,
            fields(
                data=data,
                curriculum={"segments": [1, 2, 3], "threshold": 0.05, "window": 2},
                schedule={"type": "linear", "warmup_steps": 3},
                batch_size=2,
                max_steps=24,
                log_every=3,
                checkpoint_every=2,
                num_processes=world,
                output_dir=str(out),
            ),
        )

    found = kill_and_resume(make, tmp_path, KILLS, seed=world, world=world)
    print(found)
    assert found["killed"] >= KILLS
