"""How often and in what order calls are made; by a clock of our own, never by time."""

from dataclasses import astuple

import pytest
import torch
from stage import FIXED, Stage


def test_every_round_makes_each_call_once_in_an_order_of_its_own(monkeypatch):
    stage = Stage(monkeypatch, lambda label, number: 1.0)
    stage.run(batch_sizes=(1, 16))
    labels = [*FIXED, "rollout"]
    each = [(label, batch) for batch in (1, 16) for label in labels]
    assert stage.log[:24] == [one for one in each for _ in range(2)], "warm-up"
    rounds = [stage.log[start : start + 12] for start in range(24, len(stage.log), 12)]
    assert len(rounds) == 6
    for one in rounds:
        assert sorted(one[:6]) == sorted(each[:6]), "neighbours in time are compared"
        assert sorted(one[6:]) == sorted(each[6:])
    assert len({tuple(one) for one in rounds}) == 6
    again = Stage(monkeypatch, lambda label, number: 1.0)
    again.run(batch_sizes=(1, 16))
    assert again.log == stage.log


COST = {"forward": 2.0, "reciprocam": 3.0, "naive H": 9.0, "rollout": 6.0}


def test_ratios_are_taken_round_by_round(monkeypatch):
    # The machine slows down from round to round: 1, 2, 3, 4, 5 times.
    stage = Stage(monkeypatch, lambda label, number: COST.get(label, 2.5) * (1 + number))
    rows = {row.method: row for row in stage.run(rounds=5, batch_sizes=(8,))}
    naive = rows["naive H"]
    assert astuple(naive.ms) == pytest.approx((27_000, 18_000, 36_000)), (
        "median and quartiles of 9 to 45 s"
    )
    assert naive.fps == pytest.approx(8 / 27)
    assert astuple(naive.to_forward) == pytest.approx((4.5, 4.5, 4.5)), "drift cancels out"
    assert astuple(naive.to_reciprocam) == pytest.approx((3, 3, 3))
    assert astuple(rows["forward"].to_forward) == (1, 1, 1)
    assert astuple(rows["forward"].to_reciprocam) == pytest.approx((2 / 3,) * 3)
    assert {row.rounds for row in rows.values()} == {5}


def test_the_spread_is_that_of_the_ratios(monkeypatch):
    seconds = {"forward": [1, 2, 1, 2, 1], "rollout": [1, 4, 3, 8, 5]}  # ratios 1, 2, 3, 4, 5
    stage = Stage(monkeypatch, lambda label, number: seconds.get(label, [1] * 5)[number])
    rows = {row.method: row for row in stage.run(rounds=5)}
    assert astuple(rows["rollout"].to_forward) == pytest.approx((3, 2, 4))
    assert astuple(rows["rollout"].to_reciprocam) == pytest.approx((4, 3, 5))


@pytest.mark.parametrize(
    ("cost", "rounds", "timed"),
    [(10, 30, 30), (11, 30, 15), (25, 30, 8), (25, 9, 5), (500, 30, 8), (500, 40, 5), (500, 4, 4)],
)
def test_slow_calls_are_timed_in_fewer_rounds(monkeypatch, cost, rounds, timed):
    every = -(-rounds // timed)

    def seconds(label, number):
        return cost * (1 + every * number) if label == "rollout" else 1.0 + number

    rows = {row.method: row for row in Stage(monkeypatch, seconds).run(rounds=rounds)}
    assert rows["rollout"].rounds == timed
    assert astuple(rows["rollout"].to_forward) == pytest.approx((cost,) * 3), (
        "of the rounds that have both"
    )
    assert rows["naive H"].rounds == rounds


def test_progress_ends_where_it_said(monkeypatch):
    seen = []
    stage = Stage(monkeypatch, lambda label, number: 30.0 if label == "rollout" else 1.0)
    stage.run(rounds=16, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1] == (6 + 5 * 16 + 8, 6 + 5 * 16 + 8)


def test_where_memory_runs_out_the_row_says_so_and_the_others_go_on(monkeypatch):
    def seconds(label, number):
        if label == "naive H":
            raise RuntimeError("not enough memory: you tried to allocate\nmore")
        return 1.0

    rows = {row.method: row for row in Stage(monkeypatch, seconds).run()}
    assert rows["naive H"].note == "RuntimeError: not enough memory: you tried to allocate"
    assert rows["naive H"].ms is None
    assert rows["rollout"].ms is not None


def test_threads_are_set_and_set_back_also_after_an_error(monkeypatch):
    before, seen = torch.get_num_threads(), set()

    def seconds(label, number):
        seen.add(torch.get_num_threads())
        return 1.0

    rows = Stage(monkeypatch, seconds).run(threads=before + 1)
    assert {row.threads for row in rows} == seen == {before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        Stage(monkeypatch, lambda label, number: 1 / 0).run(threads=before + 1)
    assert torch.get_num_threads() == before
