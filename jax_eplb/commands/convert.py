"""`jax-eplb convert`: a plan or a recording of one engine as another reads it."""

import argparse
import json
from pathlib import Path

from jax_eplb.commands.inputs import option_name, read_recording
from jax_eplb.formats import (
    holds_plan,
    load_layer_updates,
    load_placement,
    load_slots,
    save_placement,
    save_recording,
    sglang,
    sglang_jax,
    tensorrt_llm,
)
from jax_eplb.load import Recording
from jax_eplb.placement import Placement


def run(arguments: argparse.Namespace) -> None:
    source, out = Path(arguments.recording), Path(arguments.out)
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out}: is read from; give another path to write to")
    out.parent.mkdir(parents=True, exist_ok=True)
    if holds_plan(source, unsafe_pickle=arguments.unsafe_pickle):
        found = _convert_plan(arguments, source, out)
    else:
        found = _convert_recording(arguments, out)
    if arguments.json:
        print(json.dumps({"output": str(out), "to": arguments.to, **found}))
        return
    print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.items()))
    print(out)


def _convert_plan(arguments: argparse.Namespace, source: Path, out: Path) -> dict:
    if arguments.to == "jax-eplb":
        raise ValueError(
            f"{source}: a plan; jax_eplb's own form of it is TensorRT-LLM's: use --to trtllm"
        )
    placement = _read_placement(arguments, source)
    updates = arguments.layer_updates_per_iter
    if updates is None and arguments.to == "trtllm":
        updates = load_layer_updates(source)
    save_placement(
        placement,
        out,
        engine=arguments.to,
        layer_updates_per_iter=updates or 0,
        num_layers=arguments.num_layers,
    )
    return {
        "kind": "plan",
        "layers": placement.num_layers,
        "experts": placement.num_experts,
        "slots": placement.num_slots,
        "redundant_experts": placement.num_slots - placement.num_experts,
    }


def _read_placement(arguments: argparse.Namespace, source: Path) -> Placement:
    slots = load_slots(source, unsafe_pickle=arguments.unsafe_pickle)
    num_ranks = arguments.ep_size or slots.num_ranks
    if num_ranks is None and arguments.to == "vllm-ascend":
        raise ValueError("--to vllm-ascend needs --ep-size: its file lists each rank's slots")
    if num_ranks is None and slots.rows:
        # Nothing that is written depends on it. A rank a slot allows any number of replicas.
        num_ranks = slots.num_slots
    return load_placement(
        source,
        num_ranks=num_ranks,
        num_experts=arguments.num_experts,
        layer_ids=arguments.layers,
        unsafe_pickle=arguments.unsafe_pickle,
    )


def _convert_recording(arguments: argparse.Namespace, out: Path) -> dict:
    for option in ("layers", "ep_size", "layer_updates_per_iter"):
        if getattr(arguments, option) is not None:
            name = option_name(option)
            raise ValueError(f"{name} is for plans, and {arguments.recording} is a recording")
    recording = read_recording(arguments)
    _save_recording(recording, arguments, out)
    return {
        "kind": "recording",
        "iterations": len(recording.iterations),
        "layers": len(recording.layer_ids),
        "experts": recording.num_experts,
        "unit": recording.unit if arguments.to in ("trtllm", "jax-eplb") else "experts",
    }


def _save_recording(recording: Recording, arguments: argparse.Namespace, out: Path) -> None:
    engines = {"sglang": sglang, "sglang-jax": sglang_jax}
    if arguments.to in engines:
        engines[arguments.to].save_recording(recording, out, num_layers=arguments.num_layers)
        return
    if arguments.num_layers is not None:
        raise ValueError("--num-layers is an option of --to sglang and --to sglang-jax")
    if arguments.to == "trtllm":
        tensorrt_llm.save_recording(recording, out)
    elif arguments.to == "jax-eplb":
        save_recording(recording, out)
    else:
        raise ValueError(
            f"{arguments.recording}: a recording, of which {arguments.to} reads no form; plan from "
            "it (jax-eplb plan) and convert the plan"
        )
