"""Random programs give and leave, streamed, what they give and leave in eager. By the ten thousand: see programs.py."""

from __future__ import annotations

import pytest
import torch

from comfyui_patchconv.streaming import call
from comfyui_patchconv.streaming.plan.eagerly import eager_schedule

from .comparing import copied, seed_all
from .programs import RARE_FROM, Settings, check, random_program, settings_of

WRONG_ONCE = [
    731,
    754,
    992,
    1207,
    1465,
    2970,
    3401,
    3640,
    3673,
    3853,
    4013,
    4168,
    4879,
    5710,
    6279,
    6627,
    10728,
    12847,
    102487,
]

SEEDS = [*range(160), *WRONG_ONCE, *range(RARE_FROM, RARE_FROM + 40)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program_gives_and_leaves_what_eager_does(seed: int) -> None:
    program, inputs = random_program(seed)
    check(program, inputs, settings_of(seed))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1_000, 1_040))
@pytest.mark.parametrize("budget", [None, 1])
def test_a_random_program_in_strips_of_one_row_gives_what_eager_does(seed: int, budget: int | None) -> None:
    program, inputs = random_program(seed)
    check(program, inputs, Settings(strip_bytes=1, budget=budget, mode="no_grad", calls=2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2_000, 2_060))
def test_a_random_program_by_eagers_schedule_gives_what_eager_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "choose", lambda roots, keep, tuning, budget, held, *_: eager_schedule(roots, keep, held))
    program, inputs = random_program(seed)
    check(program, inputs, settings_of(seed))


@pytest.mark.filterwarnings("ignore")
def test_a_seed_always_draws_the_same_program() -> None:
    for seed in range(5):
        (one, given), (other, same) = random_program(seed), random_program(seed)
        assert one.text == other.text
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(given, same))


@pytest.mark.filterwarnings("ignore")
def test_a_program_changes_nothing_but_its_inputs() -> None:
    for seed in range(20):
        program, inputs = random_program(seed)
        before = {name: value.clone() for name, value in program.constants.items()}
        with torch.no_grad():
            seed_all(seed)
            program(*copied(inputs))
        assert all(torch.equal(value, before[name]) for name, value in program.constants.items())
