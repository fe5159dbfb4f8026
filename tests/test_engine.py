"""The engine: the same tokens on any ranks and placement, no step compiled twice, exact counts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_eplb import Placement, Recorder, expert_mesh
from jax_eplb.models import decode, parameters
from jax_eplb.models.decoder import Batch, logits_of
from jax_eplb.serving import Engine, Request, ServingConfig
from tests.placement_cases import random_table
from tests.tiny_model import CONFIG, counted_compilations, random_requests, tiny_decoder

pytestmark = pytest.mark.light_compile

# Requests of one token beside longer ones.
UNEVEN = [(1, 4), (16, 1), (3, 9), (5, 1), (13, 3), (9, 6), (2, 2)]


def placement(num_ranks, num_slots=16, seed=None):
    sizes = {"num_experts": 16, "num_ranks": num_ranks}
    if seed is None:
        return Placement.default(**sizes, num_slots=num_slots, layer_ids=CONFIG.moe_layer_ids)
    table = random_table(np.random.default_rng(seed), 2, 16, num_slots, num_ranks)
    return Placement.from_slots(table, **sizes, layer_ids=CONFIG.moe_layer_ids)


def engine(num_ranks=4, num_slots=16, temperature=0.0):
    """An engine on the default placement, whatever a test has done to it."""
    made = cached_engine(num_ranks, num_slots, temperature)
    made.use_placement(placement(num_ranks, num_slots))
    return made


@functools.cache
def cached_engine(num_ranks, num_slots, temperature):
    """Of few sizes, as each compiles anew; most tests take the first, which `test_run` has too."""
    return Engine(
        tiny_decoder(),
        mesh=expert_mesh(num_ranks),
        placement=placement(num_ranks, num_slots),
        serving=ServingConfig(max_batch_size=2, max_length=32, temperature=temperature),
    )


@functools.cache
def whole_sequence():
    """(tokens [1, 32], length) to logits [32, V]: one rank, one sequence, no cache."""
    mesh, slots = expert_mesh(1), placement(1)
    params = parameters.on_mesh(
        tiny_decoder().params, np.asarray(slots.slot_to_expert), CONFIG, mesh, "expert", jnp.float32
    )
    moe, tables = CONFIG.moe(num_slots=16, num_ranks=1), slots.tables()

    def local(params, tables, tokens, length):
        positions = jnp.arange(32, dtype=jnp.int32)[None]
        batch = Batch(tokens, positions, positions < length, jnp.zeros(1, jnp.int32))
        output = decode(params, tables, batch, None, config=CONFIG, moe=moe, axis_name="expert")
        return logits_of(output.hidden[0], params)

    specs = (parameters.specs(CONFIG, "expert"), P(), P("expert"), P())
    logits = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("expert")))
    return functools.partial(logits, params, tables)


@functools.cache
def step_by_step(temperature, lengths=tuple(UNEVEN)):
    """Outputs of the random requests from whole sequences."""
    outputs = []
    for request in random_requests(lengths):
        text = request.prompt.tolist()
        while len(text) < len(request.prompt) + request.output_length:
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(text)] = text
            last = whole_sequence()(padded, jnp.int32(len(text)))
            key = jax.random.fold_in(jax.random.key(request.seed), len(text))
            noise = np.asarray(jax.random.gumbel(key, (256,), jnp.float32))
            text.append(int((np.asarray(last)[len(text) - 1] + temperature * noise).argmax()))
        outputs.append(text[len(request.prompt) :])
    return outputs


def tokens(engine, requests, **keywords):
    return [output.tolist() for output in engine.run(requests, **keywords).outputs]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "num_ranks", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))]
)
def test_any_number_of_ranks_writes_what_whole_sequences_without_a_cache_give(
    num_ranks, temperature
):
    # With 8 ranks, 2 seats each and 7 requests, some ranks have no token.
    expected = step_by_step(temperature)
    assert tokens(engine(num_ranks, 16, temperature), random_requests(UNEVEN)) == expected


def test_the_temperature_changes_what_is_written():
    assert step_by_step(0.0) != step_by_step(0.7)


@pytest.mark.parametrize("num_slots", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_any_placement_writes_the_same_and_a_change_compiles_nothing(num_slots):
    made, requests = engine(4, num_slots), random_requests(UNEVEN)
    assert tokens(made, requests) == step_by_step(0.0)
    with counted_compilations() as compiled:
        for seed in range(3):
            made.use_placement(placement(4, num_slots, seed))
            assert tokens(made, requests) == step_by_step(0.0)
    assert compiled == []


@pytest.mark.slow
def test_prompts_of_several_widths_serve_in_one_run():
    lengths = ((3, 2), (17, 5), (25, 3), (2, 4), (16, 2), (4, 1))
    assert tokens(engine(), random_requests(lengths)) == step_by_step(0.0, lengths)


@pytest.mark.slow
def test_a_request_gets_the_same_tokens_alone_and_on_another_seat():
    requests, expected = random_requests(UNEVEN), step_by_step(0.7)
    made = engine(temperature=0.7)
    for index in (2, 4):
        assert tokens(made, [requests[index]]) == [expected[index]]
    assert tokens(made, requests[::-1]) == expected[::-1]


@pytest.mark.slow
def test_small_waves_of_the_exchange_write_the_same():
    made = Engine(
        tiny_decoder(),
        mesh=expert_mesh(4),
        placement=placement(4),
        serving=ServingConfig(max_batch_size=2, max_length=32, moe_max_num_tokens=4),
    )
    assert tokens(made, random_requests(UNEVEN)) == step_by_step(0.0)


@pytest.mark.slow
def test_a_warm_engine_compiles_nothing_and_warming_up_leaves_no_trace():
    serving = ServingConfig(max_batch_size=3, max_prompts_per_step=3, max_length=32)
    made = Engine(tiny_decoder(), mesh=expert_mesh(4), placement=placement(4), serving=serving)
    requests = random_requests(UNEVEN)
    with counted_compilations() as compiled:
        made.warm_up(requests)
        assert len([name for name in compiled if "run_step" in name]) == 2  # prompts, one token
    recorder = made.recorder()
    with counted_compilations() as compiled:
        assert tokens(made, requests, recorder=recorder) == step_by_step(0.0)
        recorder.recording()
        made.warm_up(requests)
        assert tokens(made, requests) == step_by_step(0.0)
    assert compiled == []
    assert recorder.recording().iterations[0] == 0


@pytest.mark.parametrize(
    ("num_ranks", "num_slots"),
    [
        (4, 16),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 16), (4, 32), (8, 16))),
    ],
)
def test_every_token_read_is_counted_once_by_expert_and_once_by_rank(num_ranks, num_slots):
    made, requests = engine(num_ranks, num_slots), random_requests(UNEVEN)
    recorder = made.recorder()
    made.run(requests, recorder=recorder)
    kept = recorder.recording()
    read = sum(len(r.prompt) + r.output_length - 1 for r in requests)
    assert kept.rank_tokens is not None
    assert kept.placement is not None
    by_layer = np.full(2, read * CONFIG.experts_per_token)
    np.testing.assert_array_equal(kept.counts.sum(axis=(0, 2)), by_layer)
    np.testing.assert_array_equal(kept.counts.sum(axis=2), kept.rank_tokens.sum(axis=2))
    assert kept.rank_tokens.shape[2] == num_ranks
    assert kept.layer_ids == (1, 2)
    np.testing.assert_array_equal(
        kept.placement.slot_to_expert, placement(num_ranks, num_slots).slot_to_expert
    )


def test_a_placement_moves_the_ranks_load_and_leaves_the_experts():
    requests, made = random_requests([(16, 2)] * 8), engine()
    kept = []
    for seed in (0, 1):
        made.use_placement(placement(4, seed=seed))
        recorder = made.recorder()
        made.run(requests, recorder=recorder)
        kept.append(recorder.recording())
    np.testing.assert_array_equal(kept[0].counts, kept[1].counts)
    assert (kept[0].rank_tokens != kept[1].rank_tokens).any()


def test_without_redundancy_the_ranks_counts_are_their_experts():
    made, recorder = engine(), engine().recorder()
    made.run(random_requests(UNEVEN), recorder=recorder)
    kept = recorder.recording()
    by_rank = kept.counts.reshape(*kept.counts.shape[:2], 4, 4).sum(axis=3)
    np.testing.assert_array_equal(kept.rank_tokens, by_rank)


def test_progress_counts_the_finished_requests_and_throughput_all_of_them():
    heard = []
    result = engine().run(random_requests(UNEVEN), on_progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == len(UNEVEN)
    figures = result.throughput
    assert figures.requests == len(UNEVEN)
    assert figures.output_tokens == sum(output for _, output in UNEVEN)
    assert len(heard) == figures.iterations
    assert figures.output_tokens_per_second == figures.output_tokens / figures.seconds
    assert 0 < figures.latency_p50 <= figures.latency_p99 <= figures.seconds


def test_a_bad_request_is_refused_before_anything_runs():
    made = engine()
    with pytest.raises(ValueError, match="there is no request to serve"):
        made.run([])
    long = Request(np.arange(30), 3)
    fault = "request 1: 30 prompt and 3 output tokens exceed max_length 32"
    with pytest.raises(ValueError, match=fault):
        made.run([Request(np.arange(3), 3), long])
    for token in (256, -1):
        fault = f"request 0: unknown token {token}; this model's are 0 to 255"
        with pytest.raises(ValueError, match=fault):
            made.warm_up([Request(np.array([5, token]), 3)])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layer_ids": (0, 1)}, "the placement's layers are (0, 1), the model's MoE layers (1, 2)"),
        ({"num_experts": 12}, "the placement is for 12 experts, the model has 16"),
        ({"num_ranks": 2}, "the placement is for 2 ranks, the mesh has 4 devices; plan for 4"),
        ({"num_slots": 32}, "the placement has 32 slots, this engine 16; plan for 16, or make"),
    ],
)
def test_a_placement_of_another_model_mesh_or_size_is_refused_and_the_old_one_stays(sizes, message):
    made = engine()
    before = made.placement
    right = {"num_experts": 16, "num_ranks": 4, "num_slots": 16, "layer_ids": (1, 2)}
    with pytest.raises(ValueError, match=re.escape(message)):
        made.use_placement(Placement.default(**right | sizes))
    assert made.placement is before


def test_an_engine_is_not_made_for_a_placement_or_mesh_that_does_not_fit():
    with pytest.raises(ValueError, match="the placement is for 4 ranks, the mesh has 2 devices"):
        Engine(tiny_decoder(), mesh=expert_mesh(2), placement=placement(4))
    with pytest.raises(ValueError, match=re.escape("the mesh has the axes ('data',)")):
        Engine(tiny_decoder(), mesh=expert_mesh(2, "data"), placement=placement(2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be at least 1"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5; use a number of 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"max_prompts_per_step": 0}, "max_prompts_per_step is 0; it must lie between 1 and"),
        ({"max_batch_size": 2, "max_prompts_per_step": 3}, "max_batch_size, 2"),
    ],
)
def test_impossible_serving_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ServingConfig(**sizes)


def test_half_the_seats_take_prompts_in_a_step_unless_told():
    assert ServingConfig(max_batch_size=5).prompt_rows == 3
    assert ServingConfig(max_batch_size=5, max_prompts_per_step=5).prompt_rows == 5


def test_a_recorder_of_the_engine_knows_model_and_range():
    recorder = engine().recorder(1, 3)
    assert isinstance(recorder, Recorder)
    engine().run(random_requests([(3, 6)]), recorder=recorder)
    kept = recorder.recording()
    assert kept.iterations == (1, 2)
    assert kept.counts.sum(axis=2).tolist() == [[3, 3], [3, 3]]  # one token, three choices
