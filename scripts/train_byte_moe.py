"""Train the byte-level MoE model on the text of prepare_text.py and write its weights.

    python scripts/prepare_text.py --out data/text
    python scripts/train_byte_moe.py --text data/text --out out/byte_moe

Uses every device that JAX finds, experts spread over them. Run it again to resume: passages are
drawn from the seed and the step alone, so a resumed run sees what an unbroken one would have seen.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_eplb.checkpoint import Checkpoints
from jax_eplb.mesh import expert_mesh
from jax_eplb.models import DecoderConfig, parameters
from jax_eplb.models.config import read_config
from jax_eplb.models.training import Trainer, TrainingConfig, corpus
from jax_eplb.models.weights import SavedDecoder, save_decoder

HELD_OUT_BYTES = 2**18  # of each kind


def main():
    arguments = parse_arguments()
    values = read_config(arguments.config)
    config = DecoderConfig.from_dict(values["model"], str(arguments.config))
    training = TrainingConfig.from_dict(values.get("training"), str(arguments.config))
    if arguments.steps is not None:
        training = dataclasses.replace(training, steps=arguments.steps)
    texts = read_texts(arguments.text, "train", training.kinds)
    held_out = read_texts(arguments.text, "heldout", ("python", "prose", "bible", "maths"))
    mesh = expert_mesh()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    trainer = Trainer(config, training, mesh, dtype=dtype)
    tables = trainer.tables()
    text = corpus(texts, training, mesh)

    params = parameters.initialize(jax.random.key(training.seed), config, mesh, trainer.axis_name)
    state = (params, trainer.optimizer_state(params))
    checkpoints = Checkpoints(arguments.out / "checkpoints")
    first = 0
    if checkpoints.steps:
        restored = checkpoints.restore(state)
        first, state = restored.step, restored.state
    console = Console()
    console.print(
        f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters on {mesh.size} "
        f"{jax.default_backend()} device(s), steps {first} to {training.steps}"
    )
    step_function = jax.jit(trainer.step, donate_argnums=0)
    deadline = time.monotonic() + 60 * arguments.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    losses, begun = None, time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=training.steps, completed=first)
        step = first
        while step < training.steps and time.monotonic() < deadline:
            state, losses = step_function(state, tables, text, jnp.int32(step))
            step += 1
            if step % arguments.report_every == 0 or step == training.steps:
                console.print(progress_line(step, losses, training, begun, step - first))
                progress.update(task, completed=step)
            if step % arguments.save_every == 0:
                checkpoints.save(step, state, trainer.placement())
    if step > first and step % arguments.save_every:  # otherwise it is saved already
        checkpoints.save(step, state, trainer.placement())
    bits = {kind: held_out_bits(trainer, state[0], tables, held_out[kind]) for kind in held_out}
    table = np.asarray(jnp.broadcast_to(jnp.arange(config.num_experts), tables.replica_count.shape))
    by_expert = parameters.on_host(state[0], table, config.num_experts)
    facts = {"steps": step, "held_out_bits_per_byte": bits}
    save_decoder(SavedDecoder(config, by_expert, facts), arguments.out / "weights.safetensors")
    checkpoints.close()
    console.print(json.dumps(facts))


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the byte-level MoE model.")
    parser.add_argument("--config", type=Path, default=Path("configs/byte_moe.yaml"))
    parser.add_argument("--text", type=Path, default=Path("data/text"))
    parser.add_argument("--out", type=Path, default=Path("out/byte_moe"))
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=1000)
    return parser.parse_args()


def read_texts(folder: Path, part: str, kinds) -> dict[str, bytes]:
    texts = {}
    for kind in kinds:
        path = folder / f"{kind}.{part}.bin"
        if not path.exists():
            raise SystemExit(f"{path} is missing; make it with scripts/prepare_text.py")
        texts[kind] = path.read_bytes()
    return texts


def progress_line(step, losses, training, begun, done) -> str:
    counts = np.asarray(losses.expert_tokens, np.float64)  # [L, E]
    skew = (counts.max(axis=1) / counts.mean(axis=1)).mean()
    dead = int((counts < 0.1 * counts.mean(axis=1, keepdims=True)).sum())
    tokens = done * training.sequences_per_step * training.sequence_length
    rate = tokens / (time.monotonic() - begun)
    return (
        f"step {step}: {float(losses.nats) / np.log(2):.3f} bits per byte, hottest expert "
        f"{skew:.1f} times the mean, {dead} nearly unused, {rate:,.0f} tokens/s"
    )


def held_out_bits(trainer: Trainer, params, tables, text: bytes) -> float:
    """Bits per byte of held-out text, in passages of the training length."""
    length, size = trainer.training.sequence_length, 16 * trainer.moe.num_ranks
    text = text[:HELD_OUT_BYTES]
    passages = np.frombuffer(text[: (len(text) - 1) // length * length], np.uint8)
    following = np.frombuffer(text, np.uint8)[length::length][: len(passages) // length]
    passages = np.concatenate([passages.reshape(-1, length), following[:, None]], axis=1)
    run = jax.jit(functools.partial(trainer.losses, params))
    count = len(passages) // size
    nats = [
        run(tables, jnp.asarray(passages[i * size : (i + 1) * size], jnp.int32)).nats
        for i in range(count)
    ]
    return round(float(np.mean([float(x) for x in nats]) / np.log(2)), 4)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
