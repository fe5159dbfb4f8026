import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb import Placement, plan
from jax_eplb.simulate.policy import NONE, ORACLE, STATIC, Policy, every, online, threshold
from jax_eplb.simulate.replay import Sizes, follow, score, settings_of
from tests.simulation_cases import HISTORY, NUM_RANKS, NUM_SLOTS, changing_counts

pytestmark = pytest.mark.light_compile

SIZES = Sizes(NUM_SLOTS, NUM_RANKS, "even", "fast")
POLICIES = [
    NONE,
    STATIC,
    every(1),
    every(3),
    online(decay=0.5, max_moves=2),
    online(decay=0.8, interval=2),
    threshold(0.12),
    ORACLE,
]


def even_imbalance(counts: np.ndarray, table: np.ndarray) -> np.ndarray:
    """By the definition, one slot at a time: [L, E] and [L, S] to [L]."""
    found = []
    for load, slots in zip(counts, table, strict=True):
        ranks = np.zeros(NUM_RANKS)
        for slot, expert in enumerate(slots):
            ranks[slot // (NUM_SLOTS // NUM_RANKS)] += load[expert] / (slots == expert).sum()
        found.append(ranks.max() / ranks.mean() - 1)
    return np.array(found)


def replay_by_hand(policy: Policy, first: np.ndarray) -> tuple[np.ndarray, ...]:
    """Imbalance [W, L], moves [W, L] and received [W], window after window, in plain numpy."""
    counts = changing_counts()
    table, before = first, 0.0
    rows = []
    for turn, now in enumerate(counts):
        after = turn - HISTORY
        due = policy.interval is not None and after > 0 and after % policy.interval == 0
        if due and (before > policy.threshold or policy.foresight):
            known = sum(
                policy.decay ** (turn - 1 - past) * counts[past].astype(float)
                for past in range(turn)
            )
            found = plan(
                now if policy.foresight else known,
                NUM_SLOTS,
                NUM_RANKS,
                previous=table,
                max_moves=NUM_SLOTS if policy.max_moves is None else policy.max_moves,
                effort="fast",
            )
            new = np.asarray(found.placement.slot_to_expert)
        else:
            new = table
        moved = new != table
        received = moved.reshape(len(moved), NUM_RANKS, -1).sum(axis=(0, 2)).max()
        imbalance = even_imbalance(now, new)
        rows.append((imbalance, moved.sum(axis=1), received))
        table, before = new, imbalance.mean()
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


@pytest.mark.slow
def test_policies_side_by_side_do_what_each_does_in_a_plain_loop():
    counts = jnp.asarray(changing_counts(), jnp.float32)
    planned = plan(changing_counts()[:HISTORY], NUM_SLOTS, NUM_RANKS, effort="fast").placement
    initial = Placement.default(num_experts=6, num_ranks=NUM_RANKS, num_slots=NUM_SLOTS)
    initial = np.broadcast_to(np.asarray(initial.slot_to_expert), (2, NUM_SLOTS))
    firsts = [np.asarray(planned.slot_to_expert) if p.planned else initial for p in POLICIES]
    settings = settings_of(POLICIES, len(counts), NUM_SLOTS)
    found = follow(counts, jnp.int32(HISTORY), jnp.asarray(firsts), settings, SIZES)
    imbalance = score(counts, found.tables, num_ranks=NUM_RANKS, split="even")
    followed = 0
    for i, (policy, first) in enumerate(zip(POLICIES, firsts, strict=True)):
        by_hand = replay_by_hand(policy, first)
        np.testing.assert_allclose(imbalance[i], by_hand[0], atol=2e-6, err_msg=str(policy))
        np.testing.assert_array_equal(found.moves[i], by_hand[1], err_msg=str(policy))
        np.testing.assert_array_equal(found.received[i], by_hand[2], err_msg=str(policy))
        followed += int(by_hand[1].sum() > 0)
    assert followed == 6  # all but none and static moved something


@pytest.mark.slow
def test_the_future_changes_nothing_but_for_the_oracle():
    counts = changing_counts()
    changed = counts.copy()
    changed[8:] = changed[8:, :, ::-1]
    planned = plan(counts[:HISTORY], NUM_SLOTS, NUM_RANKS, effort="fast").placement
    first = jnp.stack([planned.slot_to_expert] * len(POLICIES))
    settings = settings_of(POLICIES, len(counts), NUM_SLOTS)
    before, after = (
        follow(jnp.asarray(c, jnp.float32), jnp.int32(HISTORY), first, settings, SIZES).tables
        for c in (counts, changed)
    )
    # Window 8 is the first that differs; its placements rest on windows 0 to 7.
    np.testing.assert_array_equal(before[:-1, :9], after[:-1, :9])
    assert (np.asarray(before[-1, 8]) != np.asarray(after[-1, 8])).any()


@pytest.mark.slow
def test_the_balanced_split_leaves_no_more_than_the_even_one():
    counts = jnp.asarray(changing_counts(), jnp.float32)
    tables = jnp.broadcast_to(jnp.array([0, 1, 2, 3, 0, 1, 4, 5]), (1, 12, 2, 8))
    even, balanced = (
        np.asarray(score(counts, tables, num_ranks=2, split=split))
        for split in ("even", "balanced")
    )
    assert (balanced <= even + 1e-6).all()
    # Of two ranks that share experts 0 and 1, the fuller keeps what it must.
    fixed = np.stack([changing_counts()[..., [2, 3]], changing_counts()[..., [4, 5]]]).sum(axis=-1)
    total = changing_counts().sum(axis=-1)
    lightest = np.maximum(fixed.max(axis=0), total / 2) / (total / 2) - 1
    np.testing.assert_allclose(balanced[0], lightest, atol=3e-3)
