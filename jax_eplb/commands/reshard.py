"""`jax-eplb reshard`: a checkpoint rewritten for other ranks and slots, expert by expert."""

import argparse
import json
from typing import Any

import numpy as np

from jax_eplb.checkpoint.rewrite import Work, check_placement, rewrite, work_of
from jax_eplb.checkpoint.sources import Source, open_source
from jax_eplb.commands.progress import byte_bars
from jax_eplb.formats import load_placement, load_recording, save_placement
from jax_eplb.placement import Placement, fewest_slots
from jax_eplb.planner import plan

PLACEMENT_FILE = "moe_load_balancer.yaml"


def run(arguments: argparse.Namespace) -> None:
    source = open_source(arguments.checkpoint, arguments.step)
    placement = _placement(arguments, source)
    check_placement(source, placement)
    kind = arguments.format or ("safetensors" if arguments.layout == "slots" else source.kind)
    if kind == "orbax" and arguments.layout == "slots":
        raise ValueError("--layout slots writes safetensors; leave out --format orbax")
    work = work_of(source, placement, kind, arguments.layout)
    if arguments.dry_run:
        if not arguments.json:
            print(_text(source, placement, work, arguments, kind))
    else:
        with byte_bars() as bars:
            task = bars.add_task("resharding", total=work.bytes_written)
            rewrite(
                source,
                arguments.out,
                placement,
                kind=kind,
                layout=arguments.layout,
                on_progress=lambda written: bars.advance(task, written),
            )
        save_placement(placement, arguments.out / PLACEMENT_FILE)
    if arguments.json:
        print(json.dumps({"output": str(arguments.out), "kind": kind, **work._asdict()}))
    elif not arguments.dry_run:
        print(_text(source, placement, work, arguments, kind))
        print(f"all of it read back, checksums equal\n{arguments.out}")


def _placement(arguments: argparse.Namespace, source: Source) -> Placement:
    """The placement of the options, with the default layout in the layers left to it."""
    left = arguments.default_layers
    planned = [layer for layer in source.layer_ids if layer not in left]
    unknown = sorted(set(left) - set(source.layer_ids))
    if unknown or not planned:
        raise ValueError(
            f"--default-layers {','.join(map(str, left))}: {source.path} has MoE layers "
            f"{list(source.layer_ids)}; name some of them"
        )
    sizes: dict[str, Any] = {"num_experts": source.num_experts, "num_ranks": arguments.ep_size}
    num_slots = arguments.num_slots or fewest_slots(*sizes.values())
    if arguments.load_balancer is not None:
        placement = load_placement(arguments.load_balancer, layer_ids=planned, **sizes)
        if arguments.num_slots not in (None, placement.num_slots):
            raise ValueError(
                f"{arguments.load_balancer} has {placement.num_slots} slots, but --num-slots is "
                f"{arguments.num_slots}; leave it out"
            )
    elif arguments.recording is not None:
        placement = _planned(arguments, source, planned, num_slots)
    else:
        placement = Placement.default(num_slots=num_slots, layer_ids=planned, **sizes)
    if not left:
        return placement
    default = Placement.default(num_slots=placement.num_slots, layer_ids=left, **sizes)
    rows = {
        layer: row
        for each in (placement, default)
        for layer, row in zip(each.layer_ids, np.asarray(each.slot_to_expert), strict=True)
    }
    return Placement.from_slots(
        [rows[layer] for layer in source.layer_ids], layer_ids=source.layer_ids, **sizes
    )


def _planned(
    arguments: argparse.Namespace, source: Source, layer_ids: list[int], num_slots: int
) -> Placement:
    recording = load_recording(arguments.recording)
    if recording.num_experts != source.num_experts or list(recording.layer_ids) != layer_ids:
        raise ValueError(
            f"{arguments.recording}: {recording.num_experts} experts in layers "
            f"{list(recording.layer_ids)}, but {source.path} has {source.num_experts} in "
            f"{layer_ids}; give a recording of this model (layers that were not recorded may go "
            "to --default-layers)"
        )
    result = plan(
        recording.expert_counts(), num_slots, arguments.ep_size, layer_ids=recording.layer_ids
    )
    return result.placement


def _text(
    source: Source, placement: Placement, work: Work, arguments: argparse.Namespace, kind: str
) -> str:
    order = "expert order" if arguments.layout == "experts" else "slot order"
    lines = [
        f"{source.path}: {source.kind}, {source.num_experts} experts in "
        f"{len(source.layer_ids)} layers, {len(source.banks)} arrays of each expert, "
        f"{len(source.others)} others",
        f"for {placement.num_slots} slots on {placement.num_ranks} ranks, "
        f"{placement.slots_per_rank} each",
        f"read     {_size(work.expert_bytes_read)} of experts, {_size(work.other_bytes_read)} of "
        "others",
        f"written  {_size(work.bytes_written)} to {arguments.out}: {kind}, in {order}",
    ]
    for name, size in work.files.items() if kind == "safetensors" else ():
        lines.append(f"         {_size(size)}  {name}")
    if work.changed_slots is None:
        held = "no placement" if source.placement is None else "a placement of other sizes"
        lines.append(f"moved    unknown: the checkpoint has {held}")
    else:
        total = placement.num_layers * placement.num_slots
        lines.append(
            f"moved    {work.changed_slots} of {total} slots change; "
            f"{_size(work.moved_bytes or 0)} of experts are new to their rank"
        )
    low, high = min(work.rank_bytes), max(work.rank_bytes)
    each = _size(high) if low == high else f"{_size(low)} to {_size(high)}"
    lines.append(f"a rank reads {each} of experts when it loads")
    return "\n".join(lines)


def _size(size: int) -> str:
    """
    >>> _size(1_234_000_000), _size(512)
    ('1.23 GB', '512 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"
