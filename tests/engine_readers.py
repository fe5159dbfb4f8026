"""What each engine does with a file of a placement, restated from its source without ours.

Every reader takes the path and what the engine knows of the model, refuses what the engine would
refuse (by an assertion), and returns the expert of each slot for the model's MoE layers, found the
way the engine finds it. Versions: docs/formats.md.
"""

import io
import json
import pickle
import pickletools
import zipfile
from collections import OrderedDict

import numpy as np
import yaml

# What torch.load(..., weights_only=True) interprets, of the opcodes that arrays and dicts need.
_WEIGHTS_ONLY = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "EMPTY_DICT", "SETITEMS"),
    *("EMPTY_TUPLE", "TUPLE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWFALSE"),
}


def trtllm(path, *, num_experts, num_ranks, moe_layers, **_):
    """`MoeLoadBalancerConfig`, its `setup`, and what each layer asserts of its assignments."""
    config = yaml.safe_load(path.read_text())
    assert set(config) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert type(config["layer_updates_per_iter"]) is int
    num_slots = config["num_slots"]
    assert num_slots >= num_experts
    assert num_slots % num_ranks == 0
    rows = []
    for layer in moe_layers:
        row = config["initial_global_assignments"][layer]  # a KeyError there
        assert isinstance(row, list)
        assert len(row) == num_slots
        assert set(row) == set(range(num_experts))
        rows.append(row)
    return rows


def sglang(path, **model):
    """`compute_initial_expert_location_metadata`, then `init_by_mapping(**data)`."""
    if path.name.endswith(".pt"):
        content = _weights_only(path)
    else:
        assert path.name.endswith(".json")  # otherwise the name itself is parsed as JSON
        content = json.loads(path.read_text())
    assert set(content) == {"physical_to_logical_map"}, "others are unknown arguments there"
    table = np.array(content["physical_to_logical_map"])
    return _rows_by_model_layer(table, **model)


def sglang_jax(path, **model):
    """The same function there, whose `.npy` is an array, or a dict as one object."""
    if path.name.endswith(".npy"):
        loaded = np.load(path, allow_pickle=False)  # there: True
        content = {"physical_to_logical_map": loaded}
    else:
        content = json.loads(path.read_text())
    table = np.array(content["physical_to_logical_map"])
    return _rows_by_model_layer(table, **model)


def _rows_by_model_layer(table, *, num_experts, num_ranks, num_redundant, moe_layers, num_layers):
    layers, num_slots = table.shape
    assert layers == num_layers, "logical_to_all_physical_map is indexed by the layer's id"
    assert num_slots == num_experts + num_redundant
    assert num_slots % num_ranks == 0
    rows = []
    for layer in range(layers):
        slots_of = [[] for _ in range(num_experts)]
        for slot in range(num_slots):
            slots_of[table[layer, slot]].append(slot)
        assert min(map(len, slots_of)) >= 1, "an expert without a slot has nowhere to go"
        if layer in moe_layers:
            rows.append(_invert(slots_of, num_slots))
    return rows


def vllm(path, *, num_experts, num_redundant, num_ranks, moe_layers, **_):
    """`EplbModelState`: the map by MoE layer, and the two tables derived from it."""
    state = json.loads(path.read_text())
    table = np.array(state["physical_to_logical_map"])
    assert table.shape == (state["num_moe_layers"], state["num_physical_experts"])
    assert table.shape == (len(moe_layers), num_experts + num_redundant)
    assert state["num_logical_experts"] == num_experts
    assert num_redundant <= 1023
    assert table.shape[1] % num_ranks == 0
    rows = []
    for row in table:
        slots_of = np.full((num_experts, num_redundant + 1), -1)
        count = np.zeros(num_experts, int)
        for slot, expert in enumerate(row):
            slots_of[expert, count[expert]] = slot
            count[expert] += 1
        assert count.min() >= 1
        rows.append(_invert([held[held >= 0] for held in slots_of], len(row)))
    return rows


def vllm_ascend(path, *, num_experts, num_ranks, moe_layers, **_):
    """`expert_file_to_tensor` and `init_eplb_config`: layers and devices by their place."""
    assert path.name.endswith(".json")
    data = json.loads(path.read_text())
    rows = []
    for position in range(len(moe_layers)):
        assert position < data["moe_layer_count"]
        devices = data["layer_list"][position]["device_list"]
        placement = np.array([device["device_expert"] for device in devices])  # not ragged
        assert placement.shape[0] == num_ranks
        maps = np.full((num_ranks, num_experts), -1)  # local slot of each expert, by rank
        for rank, held in enumerate(placement):
            maps[rank, held] = np.arange(held.size)
        per_rank = int((maps[0] != -1).sum())
        slots_of = [
            [
                rank * per_rank + maps[rank, expert]
                for rank in range(num_ranks)
                if maps[rank, expert] >= 0
            ]
            for expert in range(num_experts)
        ]
        assert min(map(len, slots_of)) >= 1
        rows.append(_invert(slots_of, placement.size))
    return rows


def _invert(slots_of, num_slots):
    row = [-1] * num_slots
    for expert, slots in enumerate(slots_of):
        for slot in slots:
            assert row[slot] == -1
            row[slot] = expert
    assert -1 not in row
    return row


def _weights_only(path):
    """The dict of tensors in an archive of torch.save, by the rules of `weights_only`."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (root,) = {name.split("/")[0] for name in names}
        assert f"{root}/version" in names, "without it the archive is refused"
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        assert archive.read(f"{root}/byteorder") == b"little"
        data = archive.read(f"{root}/data.pkl")
        storages = {n.split("/")[-1]: archive.read(n) for n in names if "/data/" in n}
    assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= _WEIGHTS_ONLY
    assert data[:2] == b"\x80\x02"

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return {
                ("torch._utils", "_rebuild_tensor_v2"): rebuild,
                ("torch", "LongStorage"): "int64",
                ("collections", "OrderedDict"): OrderedDict,
            }[module, name]

        def persistent_load(self, pid):
            kind, dtype, key, location, size = pid
            assert (kind, dtype, location) == ("storage", "int64", "cpu")
            storage = np.frombuffer(storages[key], "<i8")
            assert storage.size == size
            return storage

    def rebuild(storage, offset, shape, strides, requires_grad, hooks):
        assert (offset, requires_grad, hooks) == (0, False, OrderedDict())
        steps = tuple(8 * step for step in strides)
        return np.lib.stride_tricks.as_strided(storage, shape, steps)

    return Unpickler(io.BytesIO(data)).load()


READERS = {
    "trtllm": trtllm,
    "sglang": sglang,
    "sglang-jax": sglang_jax,
    "vllm": vllm,
    "vllm-ascend": vllm_ascend,
}
SUFFIXES = {
    "trtllm": (".yaml",),
    "sglang": (".json", ".pt"),
    "sglang-jax": (".json", ".npy"),
    "vllm": (".json",),
    "vllm-ascend": (".json",),
}
FORMS = [(engine, suffix) for engine, suffixes in SUFFIXES.items() for suffix in suffixes]
