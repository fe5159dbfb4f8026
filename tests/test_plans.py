"""Plans of all engines: what is written, each engine's own rules read; any of them we read back."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings

from jax_eplb import formats
from jax_eplb.formats import ENGINES, holds_plan, load_placement, load_slots, save_placement
from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from tests.engine_readers import FORMS, READERS
from tests.placement_cases import random_tables_without_duplicates, seeds, sizes

pytestmark = pytest.mark.light_compile

LAYERS = (1, 2, 4)


def random_placement(size, seed) -> Placement:
    num_experts, num_slots, num_ranks = size
    if num_slots > num_experts * num_ranks:  # some rank then holds an expert twice
        num_slots = num_experts * num_ranks
    generator = np.random.default_rng(seed)
    table = random_tables_without_duplicates(
        generator, len(LAYERS), num_experts, num_slots, num_ranks
    )
    return Placement.from_slots(
        table, num_experts=num_experts, num_ranks=num_ranks, layer_ids=LAYERS
    )


def small_placement() -> Placement:
    rows = [[2, 1, 0, 1], [0, 2, 1, 0], [1, 0, 2, 1]]
    return Placement.from_slots(rows, num_experts=3, num_ranks=2, layer_ids=LAYERS)


def same(one: Placement, other: Placement) -> bool:
    return (
        np.array_equal(one.slot_to_expert, other.slot_to_expert)
        and one.layer_ids == other.layer_ids
        and (one.num_experts, one.num_ranks) == (other.num_experts, other.num_ranks)
    )


@pytest.mark.parametrize(("engine", "suffix"), FORMS)
@given(size=sizes, seed=seeds)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_each_engine_reads_what_is_written_for_it_and_so_do_we(
    tmp_path_factory, engine, suffix, size, seed
):
    placement = random_placement(size, seed)
    path = tmp_path_factory.mktemp("plan") / f"plan{suffix}"
    save_placement(placement, path, engine=engine)
    rows = READERS[engine](
        path,
        num_experts=placement.num_experts,
        num_redundant=placement.num_slots - placement.num_experts,
        num_ranks=placement.num_ranks,
        moe_layers=list(LAYERS),
        num_layers=5,
    )
    assert rows == placement.slot_to_expert.tolist()
    read = load_placement(
        path, num_ranks=placement.num_ranks, num_experts=placement.num_experts, layer_ids=LAYERS
    )
    assert same(read, placement)


@pytest.mark.parametrize(("engine", "suffix"), FORMS)
def test_a_plan_is_told_by_what_is_in_it_not_by_its_name(tmp_path, engine, suffix):
    save_placement(small_placement(), tmp_path / f"a{suffix}", engine=engine)
    shutil.move(tmp_path / f"a{suffix}", tmp_path / "plan.dat")
    assert holds_plan(tmp_path / "plan.dat")
    read = load_placement(tmp_path / "plan.dat", num_ranks=2, layer_ids=LAYERS)
    assert same(read, small_placement())


def test_without_layer_ids_the_layers_are_those_of_the_file(tmp_path):
    ids = {}
    for engine in ENGINES:
        path = tmp_path / ("a.yaml" if engine == "trtllm" else f"{engine}.json")
        save_placement(small_placement(), path, engine=engine)
        ids[engine] = load_placement(path, num_ranks=2).layer_ids
    assert ids.pop("trtllm") == LAYERS
    assert ids.pop("sglang") == ids.pop("sglang-jax") == (0, 1, 2, 3, 4)
    assert set(ids.values()) == {(0, 1, 2)}


def test_ranks_and_experts_come_from_the_file_or_the_caller(tmp_path):
    save_placement(small_placement(), tmp_path / "a.json", engine="vllm-ascend")
    assert load_placement(tmp_path / "a.json").num_ranks == 2
    with pytest.raises(ValueError, match=r"a\.json: the file is for 2 ranks, but 4 were asked for"):
        load_placement(tmp_path / "a.json", num_ranks=4)
    save_placement(small_placement(), tmp_path / "b.json", engine="vllm")
    with pytest.raises(ValueError, match=r"b\.json: the file does not say for how many ranks"):
        load_placement(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"b\.json: the file is for 3 experts, but 2 were asked"):
        load_placement(tmp_path / "b.json", num_ranks=2, num_experts=2)


@pytest.mark.parametrize(
    ("engine", "layer_ids", "message"),
    [
        ("sglang", (1, 2, 5), "layer 5 missing from physical_to_logical_map, which has layer 0, 1"),
        ("vllm", (1, 2), "physical_to_logical_map has 3 MoE layers, but there are 2: 1, 2"),
        ("vllm-ascend", (1, 2, 3, 4), "layer_list has 3 MoE layers, but there are 4"),
    ],
)
def test_a_plan_of_other_layers_is_refused(tmp_path, engine, layer_ids, message):
    save_placement(small_placement(), tmp_path / "a.json", engine=engine)
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        load_placement(tmp_path / "a.json", num_ranks=2, layer_ids=layer_ids)


def test_mappings_and_bare_arrays_are_read(tmp_path):
    rows = small_placement().slot_to_expert.tolist()
    ascend = {
        "moe_layer_count": 1,
        "layer_list": [{"device_list": [{"device_expert": [2, 1]}, {"device_expert": [0, 1]}]}],
    }
    assert load_placement(ascend).slot_to_expert.tolist() == rows[:1]
    both = {"physical_to_logical_map": rows}
    assert load_placement(both, num_ranks=2).slot_to_expert.tolist() == rows
    assert load_placement({**both, "num_logical_experts": 3}, num_ranks=2).num_experts == 3
    config = {"num_slots": 4, "initial_global_assignments": {7: rows[0]}}
    assert load_placement(config, num_ranks=2).layer_ids == (7,)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert load_placement(tmp_path / "a.json", num_ranks=2, layer_ids=LAYERS).layer_ids == LAYERS
    (tmp_path / "b.json").write_text(json.dumps(config))
    assert load_placement(tmp_path / "b.json", num_ranks=2).layer_ids == (7,)
    assert load_slots(tmp_path / "b.json").num_slots == 4


def test_a_pickled_placement_needs_the_callers_word(tmp_path):
    content = np.array({"physical_to_logical_map": np.array([[0, 1, 0, 1]])}, object)
    np.save(tmp_path / "a.npy", content)
    for read in (holds_plan, load_slots, lambda path: load_placement(path, num_ranks=2)):
        with pytest.raises(ValueError, match=r"a\.npy: holds a pickle"):
            read(tmp_path / "a.npy")
    assert holds_plan(tmp_path / "a.npy", unsafe_pickle=True)
    read = load_placement(tmp_path / "a.npy", num_ranks=2, unsafe_pickle=True)
    assert read.slot_to_expert.tolist() == [[0, 1, 0, 1]]


def test_only_tensorrt_llms_files_have_layer_updates(tmp_path):
    save_placement(small_placement(), tmp_path / "a.yaml", layer_updates_per_iter=3)
    assert formats.load_layer_updates(tmp_path / "a.yaml") == 3
    save_placement(small_placement(), tmp_path / "a.pt", engine="sglang")
    assert formats.load_layer_updates(tmp_path / "a.pt") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tgi"}, "engine is 'tgi'; use one of trtllm, sglang, sglang-jax, vllm, "),
        ({"engine": "vllm", "layer_updates_per_iter": 2}, "is an option of trtllm; vllm has none"),
        ({"num_layers": 5}, "num_layers is an option of sglang and sglang-jax; trtllm has none"),
    ],
)
def test_options_of_another_engine_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save_placement(small_placement(), tmp_path / "a.json", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_slot_is_not_written(tmp_path, engine):
    empty = Placement(np.array([[0, 1, 2, 3]]), 3, 2, (5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 5, slot 3: is empty, which no engine's file"):
        save_placement(empty, tmp_path / "a.json", engine=engine)
    assert not list(tmp_path.iterdir())


def test_recordings_are_no_plans(tmp_path):
    recording = Recording(np.array([[[3, 1, 2]]]), 3, 1)
    for name in ("a.npz", "a.safetensors", "a.npy", "statistics"):
        formats.save_recording(recording, tmp_path / name)
        assert not holds_plan(tmp_path / name)
    for suffix in (".json", ".pt"):
        formats.sglang.save_recording(recording, tmp_path / f"b{suffix}")
        assert not holds_plan(tmp_path / f"b{suffix}")
        with pytest.raises(ValueError, match=r"b\.\w+: a recording, where a plan was expected"):
            load_placement(tmp_path / f"b{suffix}", num_ranks=1)
    with pytest.raises(ValueError, match=r"a\.npz: a recording, where a plan was expected"):
        load_placement(tmp_path / "a.npz", num_ranks=1)


@pytest.mark.parametrize(
    ("array", "is_plan"),
    [
        ([[0, 1, 2, 0], [2, 1, 0, 1]], True),
        ([[0, 1, 2, 0], [2, 1, 1, 1]], False),  # no slot of expert 0
        ([[0, 0], [0, 0]], True),
        ([[3, 1], [0, 2]], False),
        ([[[0, 1]]], False),
        ([[-1, 0]], False),
        ([[0.0, 1.0]], False),
    ],
)
def test_an_array_without_a_name_is_a_plan_where_it_holds_all_experts(tmp_path, array, is_plan):
    np.save(tmp_path / "a.npy", np.array(array))
    assert holds_plan(tmp_path / "a.npy") == is_plan
