"""The schedule alone: every request seated once, no seat shared, no position left out."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.serving import Request, Throughput
from jax_eplb.serving.schedule import Schedule


def requests(lengths):
    return [Request(np.arange(prompt) % 7, output, seed=i) for i, (prompt, output) in lengths]


def schedule_of(lengths, num_ranks=2, seats_per_rank=2, prompt_rows=1):
    made = requests(enumerate(lengths))
    return Schedule(
        made, num_ranks=num_ranks, seats_per_rank=seats_per_rank, prompt_rows=prompt_rows
    )


def run(schedule):
    """All steps, each finished before the next is asked for."""
    plans = []
    while not schedule.done:
        plans.append(schedule.next_step())
        schedule.finish(plans[-1])
    return plans


def rows(plan):
    """For each row with a sequence: its place, its request, and what is written when done."""
    for rank, row in zip(*np.nonzero(plan.used), strict=True):
        yield (rank, row), int(plan.owners[rank, row]), int(plan.written[rank, row])


@st.composite
def schedules(draw):
    lengths = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1))
    seats = draw(st.integers(1, 4))
    return schedule_of(lengths, draw(st.integers(1, 5)), seats, draw(st.integers(1, seats)))


@given(schedules())
def test_each_request_reads_its_positions_once_and_in_order_on_one_seat(schedule):
    read, seats = collections.defaultdict(list), collections.defaultdict(set)
    for plan in run(schedule):
        for (rank, row), request, written in rows(plan):
            first = int(plan.positions[rank, row])
            read[request] += range(first, written)
            seats[request].add((rank, int(plan.seats[rank, row])))
            assert plan.seeds[rank, row] == schedule.requests[request].seed
    for index, request in enumerate(schedule.requests):
        # The last token is written, and never read.
        assert read[index] == list(range(len(request.prompt) + request.output_length - 1))
        assert len(seats[index]) == 1
    assert sorted(schedule.latencies) == list(range(len(schedule.requests)))
    assert min(schedule.latencies.values()) >= 0


@given(schedules())
def test_no_two_requests_are_on_a_seat_at_once(schedule):
    holder, steps_left = {}, {}
    for plan in run(schedule):
        used = set()
        for (rank, row), request, _ in rows(plan):
            place = (rank, int(plan.seats[rank, row]))
            assert place not in used
            used.add(place)
            if plan.prompts is not None:
                assert steps_left.get(holder.get(place), 0) == 0, "taken from another"
                holder[place] = request
                steps_left[request] = schedule.requests[request].output_length
            assert holder[place] == request
            steps_left[request] -= 1


@given(schedules())
def test_rows_without_a_request_have_no_tokens_and_prompts_are_whole(schedule):
    for plan in run(schedule):
        np.testing.assert_array_equal(plan.lengths > 0, plan.owners >= 0)
        assert plan.lengths.any()
        if plan.prompts is None:
            assert plan.lengths.max() == plan.width == 1
            continue
        assert not plan.positions.any()
        assert plan.width >= 16
        assert plan.width & (plan.width - 1) == 0  # few widths, so few compilations
        for (rank, row), request, written in rows(plan):
            prompt = schedule.requests[request].prompt
            np.testing.assert_array_equal(plan.prompts[rank, row, :written], prompt)
            assert not plan.prompts[rank, row, written:].any()


@given(schedules())
def test_requests_are_admitted_in_order(schedule):
    steps = [plan for plan in run(schedule) if plan.prompts is not None]
    admitted = [sorted(request for _, request, _ in rows(plan)) for plan in steps]
    assert list(itertools.chain(*admitted)) == list(range(len(schedule.requests)))


def test_requests_of_one_token_do_not_share_a_seat_in_their_step():
    schedule = schedule_of([(3, 1), (4, 1), (5, 3)], num_ranks=1, seats_per_rank=3, prompt_rows=3)
    assert sorted(schedule.next_step().seats[0].tolist()) == [0, 1, 2]
    assert schedule.next_step().owners.tolist() == [[-1, -1, 2]]


def test_the_ranks_with_most_free_seats_come_first():
    schedule = schedule_of([(3, 2)] * 5, num_ranks=4, seats_per_rank=2, prompt_rows=2)
    assert schedule.next_step().owners.tolist() == [[0, 4], [1, -1], [2, -1], [3, -1]]


def test_prompts_wait_until_a_full_batch_of_them_finds_seats():
    # Two ranks of two seats, one prompt a rank and step; the first pair is done after two steps.
    steps = run(schedule_of([(3, 2), (3, 2), (3, 4), (3, 4), (3, 1), (3, 1)]))
    kinds = ["prompt" if plan.prompts is not None else "token" for plan in steps]
    assert kinds == ["prompt", "prompt", "token", "prompt", "token", "token"]


def test_a_step_of_prompts_is_as_wide_as_its_longest_needs():
    widths = [run(schedule_of([(1, 1), (length, 1)]))[0].width for length in (1, 16, 17, 33)]
    assert widths == [16, 16, 32, 64]


def test_throughput_is_counted_from_the_requests_and_the_clock():
    schedule = schedule_of([(3, 2), (5, 4)])
    run(schedule)
    schedule.latencies = {0: 1.0, 1: 3.0}
    figures = Throughput.of(schedule, iterations=5, seconds=4.0)
    assert (figures.requests, figures.output_tokens, figures.iterations) == (2, 6, 5)
    assert (figures.requests_per_second, figures.output_tokens_per_second) == (0.5, 1.5)
    assert (figures.latency_mean, figures.latency_p50) == (2.0, 2.0)
    assert figures.latency_p99 == pytest.approx(2.98)
