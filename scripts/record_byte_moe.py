"""Record the embedded model's load on its held-out texts, one kind after the other.

    python scripts/record_byte_moe.py [jax_eplb/models/byte_moe/recording.npz]

64 iterations of 4,096 tokens on 8 ranks, all of prompts: 16 of each kind of text, in the order of
`commands.sample_text.KINDS`.
"""

import sys
from importlib import resources
from pathlib import Path

import numpy as np

from jax_eplb import Placement, expert_mesh, save_recording
from jax_eplb.commands.run import activation_dtype
from jax_eplb.commands.sample_text import KINDS
from jax_eplb.mesh import simulate_devices
from jax_eplb.models.weights import load_decoder
from jax_eplb.serving import Engine, Request, ServingConfig

NUM_RANKS, SEQUENCES_OF_RANK, PROMPT_BYTES = 8, 4, 128
WINDOWS_OF_KIND = 16


def main(path: Path) -> None:
    simulate_devices(NUM_RANKS)
    mesh = expert_mesh(NUM_RANKS)
    saved = load_decoder()
    config = saved.config
    placement = Placement.default(
        num_experts=config.num_experts, num_ranks=NUM_RANKS, layer_ids=config.moe_layer_ids
    )
    serving = ServingConfig(
        max_batch_size=SEQUENCES_OF_RANK,
        max_prompts_per_step=SEQUENCES_OF_RANK,
        max_length=PROMPT_BYTES + 1,
    )
    engine = Engine(
        saved, mesh=mesh, placement=placement, serving=serving, dtype=activation_dtype(mesh)
    )
    recorder = engine.recorder()
    engine.run(_requests(), recorder=recorder)
    recording = recorder.recording()
    save_recording(recording, path)
    print(f"{path}: {recording.counts.shape}, {recording.counts[:, 0].sum(axis=1).tolist()}")


def _requests() -> list[Request]:
    """Passages that follow each other, of one kind after the other."""
    folder = resources.files("jax_eplb.models") / "samples"
    requests = []
    for kind in KINDS:
        text = np.frombuffer((folder / f"{kind}.txt").read_bytes(), np.uint8).astype(np.int32)
        for number in range(WINDOWS_OF_KIND * NUM_RANKS * SEQUENCES_OF_RANK):
            prompt = text[number * PROMPT_BYTES : (number + 1) * PROMPT_BYTES]
            requests.append(Request(prompt, 1, seed=len(requests)))
    return requests


if __name__ == "__main__":
    own = resources.files("jax_eplb.models") / "byte_moe" / "recording.npz"
    main(Path(sys.argv[1] if len(sys.argv) > 1 else str(own)))
