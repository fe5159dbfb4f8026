"""Checkpoints rewritten for other placements and as other files."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import Placement, expert_mesh
from jax_eplb.checkpoint import Checkpoints, array_files, tensor_files
from jax_eplb.checkpoint.rewrite import rewrite, work_of
from jax_eplb.checkpoint.sources import open_source
from jax_eplb.checkpoint.tensor_files import (
    TensorSpec,
    TensorWriter,
    open_tensors,
    read_header,
    read_range,
)
from tests import hugging_face_cases as cases
from tests.checkpoint_cases import (
    EXPERTS,
    LAYERS,
    assert_same,
    by_expert,
    planned,
    state_of,
    targets,
)
from tests.test_expert_names import BANKS

pytestmark = pytest.mark.light_compile

SAVED = planned(16, 4)


def placement_of(source, slots, ranks):
    """A placement unlike the default one."""
    generator = np.random.default_rng(0)
    spare = slots - source.num_experts
    rows = [
        generator.permutation([*range(source.num_experts), *range(spare)]) for _ in source.layer_ids
    ]
    return Placement.from_slots(
        rows, num_experts=source.num_experts, num_ranks=ranks, layer_ids=source.layer_ids
    )


def convert(path, out, slots=8, ranks=2, kind="safetensors", layout="experts", **keywords):
    source = open_source(path)
    placement = placement_of(source, slots, ranks)
    rewrite(source, out, placement, kind=kind, layout=layout, **keywords)
    return placement


def bytes_in(folder):
    tensors, _ = open_tensors(folder)
    return {name: read_range(tensor, 0, tensor.nbytes) for name, tensor in tensors.items()}


def assert_holds(folder, arrays):
    found = bytes_in(folder)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], cases.as_bytes(array))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    facts, balancer = {"name": "small"}, {"at": np.arange(4)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state_of(SAVED), SAVED, facts=facts, balancer=balancer)
    return folder


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_safetensors_to_orbax_and_back_keeps_every_byte_and_name(tmp_path, family):
    cases.write(family, tmp_path / "model")
    placement = convert(tmp_path / "model", tmp_path / "orbax", kind="orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert_holds(tmp_path / "back", cases.arrays_of(family))
    assert (tmp_path / "back/config.json").read_text() == '{"model_type": "small"}'
    between = open_source(tmp_path / "orbax")
    np.testing.assert_array_equal(between.placement.slot_to_expert, placement.slot_to_expert)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_orbax_holds_the_experts_of_all_layers_in_one_array(tmp_path, family):
    cases.write(family, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "orbax", kind="orbax")
    tree = ocp.StandardCheckpointer().restore(tmp_path / "orbax/0/pytree")
    arrays, banks = cases.arrays_of(family), BANKS[family.__name__]
    for name, (layers, shape) in banks.items():
        assert tree[name].shape == (len(layers), cases.EXPERTS, *shape)
    if family is cases.deepseek:
        one = arrays["model.layers.2.mlp.experts.4.up_proj.weight"]
        found = tree["model.layers.mlp.experts.up_proj.weight"][1, 4]
        np.testing.assert_array_equal(cases.as_bytes(found), cases.as_bytes(one))
    for name in tree.keys() - banks.keys():
        np.testing.assert_array_equal(cases.as_bytes(tree[name]), cases.as_bytes(arrays[name]))


def numbers(template, name):
    """Layer and slot in a name, as the template has them; None where the name is another's."""
    pattern = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)")
    found = re.fullmatch(pattern.replace(r"\{expert\}", r"(?P<slot>\d+)"), name)
    if found is None:
        return None
    fields = found.groupdict()
    return tuple(int(fields[key]) if key in fields else None for key in ("layer", "slot"))


def expected_in_slots(arrays, bank, name, placement, rank):
    """What a rank's file must hold under a name, from the tensors of the whole model."""
    template, slots = bank.template or name, placement.slots_per_rank
    own = slice(rank * slots, (rank + 1) * slots)
    layer, slot = numbers(template, name)
    if layer is None:
        experts = bank.rows(placement)[:, own]
        return arrays[name][np.arange(len(experts))[:, None], experts]
    experts = bank.rows(placement)[bank.layers.index(layer)]
    if slot is None:
        return arrays[name][experts[own]]
    assert slot // slots == rank
    return arrays[template.replace("{layer}", str(layer)).replace("{expert}", str(experts[slot]))]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_in_slot_order_a_rank_finds_its_experts_in_one_file(tmp_path, family):
    cases.write(family, tmp_path / "model")
    placement = convert(tmp_path / "model", tmp_path / "out", layout="slots")
    arrays, source = cases.arrays_of(family), open_source(tmp_path / "model")
    experts = 0
    for rank in range(placement.num_ranks):
        found, _ = read_header(tmp_path / f"out/rank-{rank:05d}.safetensors")
        for name, tensor in found.items():
            (bank,) = (
                each.bank
                for each in source.banks
                if numbers(each.bank.template or each.keys[0].text, name)
            )
            expected = expected_in_slots(arrays, bank, name, placement, rank)
            assert tensor.shape == expected.shape
            data = read_range(tensor, 0, tensor.nbytes)
            np.testing.assert_array_equal(data, cases.as_bytes(expected))
            experts += tensor.nbytes
    assert experts == source.expert_bytes * placement.num_slots // cases.EXPERTS
    others = {each.keys[0].text for each in source.others}
    assert_holds(tmp_path / "out/others.safetensors", {name: arrays[name] for name in others})


def test_a_rewritten_state_is_restored_by_its_new_placement(saved, tmp_path):
    placement = planned(20, 2, seed=3)
    rewrite(open_source(saved), tmp_path / "out", placement, kind="orbax")
    like = targets(state_of(placement))
    with Checkpoints(tmp_path / "out") as checkpoints:
        assert checkpoints.steps == [3]
        restored = checkpoints.restore(like, balancer={"at": np.zeros(4, int)})
    assert_same(restored.state, state_of(placement))
    assert restored.facts == {"name": "small"}
    assert restored.balancer["at"].tolist() == [0, 1, 2, 3]
    found = ocp.StandardCheckpointer().restore(tmp_path / "out/3/pytree")
    assert found["optimizer"][0] is None  # empty nodes are kept, so that Orbax sees the same tree


def test_a_state_goes_through_safetensors_and_back(saved, tmp_path):
    placement = planned(20, 2, seed=3)
    rewrite(open_source(saved), tmp_path / "a", placement, kind="safetensors")
    between = open_source(tmp_path / "a")
    np.testing.assert_array_equal(between.placement.slot_to_expert, placement.slot_to_expert)
    rewrite(between, tmp_path / "b", placement, kind="orbax")
    with Checkpoints(tmp_path / "b") as checkpoints:
        restored = checkpoints.restore(targets(state_of(placement)))
    assert_same(restored.state, state_of(placement))
    assert restored.facts == {"name": "small"}


def test_layers_of_their_own_are_rewritten_one_by_one(tmp_path):
    placement = planned(16, 4)
    table = np.asarray(placement.slot_to_expert)
    spread = NamedSharding(expert_mesh(4), P("expert"))
    state = {
        f"layer{layer}": jax.device_put(by_expert()[row][table[row]], spread)
        for row, layer in enumerate(LAYERS)
    }
    with Checkpoints(tmp_path / "own") as checkpoints:
        checkpoints.save(1, state, placement)
    convert(tmp_path / "own", tmp_path / "orbax", kind="orbax", slots=14)
    convert(tmp_path / "orbax", tmp_path / "tensors", slots=14)
    assert_holds(
        tmp_path / "tensors",
        {f"layer{layer}": by_expert()[row] for row, layer in enumerate(LAYERS)},
    )
    assert open_source(tmp_path / "tensors").layer_ids == LAYERS


def test_files_are_split_and_listed_in_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_eplb.checkpoint.to_tensors.MAX_FILE_BYTES", 1500)
    cases.write(cases.mixtral, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / tensor_files.INDEX).read_text())
    for file in files:
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        assert all(index["weight_map"][name] == file.name for name in names)
    assert_holds(tmp_path / "out", cases.arrays_of(cases.mixtral))


def test_large_arrays_go_in_parts(tmp_path, monkeypatch):
    for module in ("array_files", "to_tensors"):
        monkeypatch.setattr(f"jax_eplb.checkpoint.{module}.MAX_CHUNK_BYTES", 100)
    cases.write(cases.mixtral, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "orbax", kind="orbax")
    parts = list((tmp_path / "orbax/0/pytree/model.embed_tokens.weight").glob("[0-9]*"))
    assert len(parts) == 4  # 11 rows of 32 bytes, 3 a part
    convert(tmp_path / "orbax", tmp_path / "back")
    assert_holds(tmp_path / "back", cases.arrays_of(cases.mixtral))


def test_the_work_is_told_beforehand(saved, tmp_path):
    source = open_source(saved)
    old = np.asarray(SAVED.slot_to_expert)
    new = old.copy()
    new[0, [0, 1]] = new[0, [1, 0]]  # within rank 0
    new[1, [0, 15]] = new[1, [15, 0]]  # between ranks 0 and 3
    placement = Placement.from_slots(new, num_experts=EXPERTS, num_ranks=4, layer_ids=LAYERS)
    work = work_of(source, placement, "safetensors", "slots")
    one = sum(bank.expert_bytes for bank in source.banks)  # an expert of a layer, all arrays
    arrived = sum(
        len(set(new[row, rank : rank + 4]) - set(old[row, rank : rank + 4]))
        for row in range(3)
        for rank in range(0, 16, 4)
    )
    assert 0 < arrived < work.changed_slots == 4
    assert work.moved_bytes == arrived * one
    assert work.expert_bytes_read == 3 * 16 * one
    assert work.bytes_written == work.expert_bytes_read + work.other_bytes_read
    assert list(work.files) == [f"rank-{r:05d}.safetensors" for r in range(4)] + [
        "others.safetensors"
    ]
    written = []
    rewrite(
        source,
        tmp_path / "out",
        placement,
        kind="safetensors",
        layout="slots",
        on_progress=written.append,
    )
    assert sum(written) == work.bytes_written
    in_order = work_of(source, placement, "orbax", "experts")
    assert in_order.expert_bytes_read == 3 * EXPERTS * one
    distinct = [
        sum(len(set(row[rank : rank + 4])) for row in new) * one for rank in range(0, 16, 4)
    ]
    assert in_order.rank_bytes == distinct


def test_without_a_placement_of_these_sizes_what_moves_is_unknown(saved):
    work = work_of(open_source(saved), planned(16, 2), "orbax", "experts")
    assert (work.changed_slots, work.moved_bytes) == (None, None)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_source_is_refused_and_nothing_is_left(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, state_of(SAVED), SAVED)
    arrays = tmp_path / "run/3/pytree"
    for chunk in ("params.experts.up/2.5.0.0", "params.router/0.0"):
        flip_last_byte(arrays / chunk)
        for kind in ("orbax", "safetensors"):
            with pytest.raises(ValueError, match=f"{chunk}: damaged"):
                convert(tmp_path / "run", tmp_path / "out", kind=kind, slots=16)
        flip_last_byte(arrays / chunk)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "name", ["model.layers.1.block_sparse_moe.experts.3.w2.weight", "model.embed_tokens.weight"]
)
def test_safetensors_written_here_are_checked_when_they_are_read(tmp_path, name):
    cases.write(cases.mixtral, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "own")
    path = tmp_path / "own/model.safetensors"
    data = bytearray(path.read_bytes())
    data[read_header(path)[0][name].start] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=rf"own/model.safetensors: piece 0 of '{name}' is damaged"):
        convert(tmp_path / "own", tmp_path / "out", kind="orbax")


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_what_the_disk_kept_wrong_is_found_by_reading_back(tmp_path, monkeypatch, kind):
    cases.write(cases.mixtral, tmp_path / "model")
    write_file, write = array_files.write_file, TensorWriter.write

    def wrong_file(path, data):
        write_file(path, bytes(len(data)) if path.name == "1.2.0.0" else data)

    def wrong_tensor(self, name, data, offset=0):
        write(self, name, data * 0 if "experts.3." in name else data, offset)

    monkeypatch.setattr(array_files, "write_file", wrong_file)
    monkeypatch.setattr(TensorWriter, "write", wrong_tensor)
    with pytest.raises(ValueError, match="damaged"):
        convert(tmp_path / "model", tmp_path / "out", kind=kind)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path, monkeypatch):
    cases.write(cases.mixtral, tmp_path / "model")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"out: 0.00 GB would be written, but 0.00 GB are free"):
        convert(tmp_path / "model", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch, kind):
    cases.write(cases.mixtral, tmp_path / "model")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_eplb.checkpoint.to_orbax.write_chunk", full)
    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        convert(tmp_path / "model", tmp_path / "out", kind=kind)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_run_that_was_cut_off_is_started_anew(tmp_path):
    cases.write(cases.mixtral, tmp_path / "model")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/rest").write_text("")
    convert(tmp_path / "model", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    assert not (tmp_path / "out/rest").exists()


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path):
    cases.write(cases.mixtral, tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("")
    with pytest.raises(ValueError, match="out: exists and is not empty"):
        convert(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out/precious").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 8}, "is for 8 experts, but .* has 6"),
        ({"layer_ids": (0,)}, r"does not name layers \[1\], but .* has MoE layers \[0, 1\]"),
        ({"layer_ids": (0, 1, 5)}, r"names layers \[5\], but"),
    ],
)
def test_a_plan_for_another_model_is_refused(tmp_path, sizes, message):
    cases.write(cases.mixtral, tmp_path / "model")
    source = open_source(tmp_path / "model")
    sizes = {"num_experts": 6, "num_ranks": 2, "layer_ids": (0, 1)} | sizes
    with pytest.raises(ValueError, match=message):
        rewrite(source, tmp_path / "out", Placement.default(**sizes), kind="orbax")


def test_what_is_no_checkpoint_is_refused(tmp_path, saved):
    with pytest.raises(ValueError, match="none: no such file"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="neither checkpoints of jax_eplb"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"no step 4; there are \[3\]"):
        open_source(saved, step=4)
    assert open_source(saved / "3").num_experts == EXPERTS
    with Checkpoints(tmp_path / "plain") as checkpoints:
        checkpoints.save(1, {"a": np.zeros(3)}, None)
    with pytest.raises(ValueError, match="it has no experts"):
        open_source(tmp_path / "plain")


def test_experts_in_slot_order_are_no_source(tmp_path):
    cases.write(cases.mixtral, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", layout="slots")
    with pytest.raises(ValueError, match=r"jax_eplb.json: its experts are in slot order"):
        open_source(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"layout": "experts"}'])
def test_damaged_notes_are_named(tmp_path, text):
    cases.write(cases.mixtral, tmp_path / "model")
    for file in ("jax_eplb.json", "checksums.json"):
        path = tmp_path / "model" / file
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{path}: damaged")):
            open_source(tmp_path / "model")
        path.unlink()


GROWTH = """
import resource, sys
from pathlib import Path
from jax_eplb import Placement
from jax_eplb.checkpoint.rewrite import rewrite
from jax_eplb.checkpoint.sources import open_source

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def convert(source, out, kind):
    source = open_source(Path(source))
    placement = Placement.default(
        num_experts=source.num_experts, num_ranks=2, layer_ids=source.layer_ids
    )
    rewrite(source, Path(out), placement, kind=kind)

folder = sys.argv[1]
for kind in ("orbax", "safetensors"):
    convert(f"{folder}/small", f"{folder}/small_{kind}", kind)
before = peak()
convert(f"{folder}/large", f"{folder}/large_orbax", "orbax")
convert(f"{folder}/large_orbax", f"{folder}/large_safetensors", "safetensors")
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """90 MB of experts of 1 MB each, and a matrix of 64 MB, after a model of 6 MB."""
    for name, experts, rows in (("small", 2, 32), ("large", 30, 16384)):
        (tmp_path / name).mkdir()
        specs = [
            TensorSpec(f"layers.0.mlp.experts.{e}.{part}_proj.weight", np.dtype("f4"), (256, 1024))
            for e in range(experts)
            for part in ("gate", "up", "down")
        ]
        specs.append(TensorSpec("embed", np.dtype("f4"), (rows, 1024)))
        with TensorWriter(tmp_path / name / "model.safetensors", specs) as writer:
            for spec in specs:
                writer.write(spec.name, np.zeros(spec.nbytes, np.uint8))
    run = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    # A part of an array, of 16 MiB, may be there twice while the next one is read.
    assert int(run.stdout) < 64 * 2**20
