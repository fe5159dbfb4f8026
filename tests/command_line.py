"""The command line in this process, and a recording for it to read."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jax_eplb import Recording
from jax_eplb.cli import main

LAYERS = (3, 4, 7)
ITERATIONS = (10, 11, 12, 13)


def skewed_counts(num_experts: int = 12) -> np.ndarray:
    """int64[4, 3, E]: another hot expert in each layer, and chance."""
    generator = np.random.default_rng(5)
    weights = np.exp(generator.normal(0, 1, (1, 3, num_experts)))
    return generator.poisson(100 * weights, (4, 3, num_experts)).astype(np.int64)


def skewed_recording(**keywords) -> Recording:
    known = {"num_experts": 12, "experts_per_token": 2, "layer_ids": LAYERS}
    return Recording(skewed_counts(), **{**known, "iterations": ITERATIONS, **keywords})


def write_statistics(directory: Path, counts: np.ndarray) -> Path:
    """TensorRT-LLM's directory, by hand: the counts dealt over the files of two ranks."""
    directory.mkdir()
    meta = {"num_experts": counts.shape[2], "num_experts_per_token": 2}
    (directory / "meta_info.json").write_text(json.dumps(meta))
    first = counts // 3
    for rank, part in enumerate((first, counts - first)):
        tensors = {
            f"{iteration}_{layer}": np.ascontiguousarray(part[w, position])
            for w, iteration in enumerate(ITERATIONS)
            for position, layer in enumerate(LAYERS)
        }
        save_file(tensors, directory / f"rank{rank}.safetensors")
    return directory


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def succeed(capsys, *arguments) -> str:
    """Standard output of a command that must not fail."""
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    return out


def fail(capsys, *arguments) -> str:
    """Standard error of a command that must refuse its input, and print nothing else."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    before, error, message = err.partition(f"jax-eplb {arguments[0]}: error: ")
    assert error, err
    assert arguments[0] == "run" or not before  # its progress bars come first
    return message
