"""Small checkpoints by the names that Hugging Face's models have, each tensor unlike all others."""

import json

import ml_dtypes
import numpy as np

from jax_eplb.checkpoint.tensor_files import TensorSpec, TensorWriter, write_index

EXPERTS = 6
HIDDEN, WIDTH = 8, 4


def mixtral():
    tensors = {}
    for layer in (0, 1):
        for expert in range(EXPERTS):
            at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            tensors |= {
                f"{at}.w1.weight": ("F32", (WIDTH, HIDDEN)),
                f"{at}.w2.weight": ("F32", (HIDDEN, WIDTH)),
                f"{at}.w3.weight": ("F32", (WIDTH, HIDDEN)),
            }
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = ("F32", (EXPERTS, HIDDEN))
    return tensors | {"model.embed_tokens.weight": ("F32", (11, HIDDEN))}


def deepseek():
    """A dense layer first, float8 with block scales, a shared expert, and a bias of the router."""
    tensors = {"model.layers.0.mlp.gate_proj.weight": ("BF16", (WIDTH, HIDDEN))}
    for layer in (1, 2):
        for expert in range(EXPERTS):
            for part in ("gate", "up", "down"):
                at = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                shape = (HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN)
                tensors[f"{at}.weight"] = ("F8_E4M3", shape)
                tensors[f"{at}.weight_scale_inv"] = ("F32", (1, 1))
        at = f"model.layers.{layer}.mlp"
        tensors[f"{at}.shared_experts.up_proj.weight"] = ("BF16", (WIDTH, HIDDEN))
        tensors[f"{at}.gate.e_score_correction_bias"] = ("F32", (EXPERTS,))
    return tensors


def gpt_oss():
    """Experts along the first axis; MXFP4: blocks and scales of uint8."""
    tensors = {}
    for layer in (0, 1):
        at = f"model.layers.{layer}.mlp"
        tensors |= {
            f"{at}.experts.gate_up_proj_blocks": ("U8", (EXPERTS, 2 * WIDTH, 2, 16)),
            f"{at}.experts.gate_up_proj_scales": ("U8", (EXPERTS, 2 * WIDTH, 2)),
            f"{at}.experts.gate_up_proj_bias": ("BF16", (EXPERTS, 2 * WIDTH)),
            f"{at}.experts.down_proj": ("BF16", (EXPERTS, WIDTH, HIDDEN)),
            f"{at}.experts.down_proj_bias": ("BF16", (EXPERTS, HIDDEN)),
            f"{at}.router.weight": ("BF16", (EXPERTS, HIDDEN)),
        }
    return tensors


def jax_eplb_decoder():
    """A stack of layers: experts along the second axis."""
    return {
        "sparse.moe.experts.gate_up": ("BF16", (2, EXPERTS, HIDDEN, 2 * WIDTH)),
        "sparse.moe.experts.down": ("BF16", (2, EXPERTS, WIDTH, HIDDEN)),
        "sparse.moe.router": ("BF16", (2, HIDDEN, EXPERTS)),
        "norm": ("BF16", (HIDDEN,)),
        "scale": ("F32", ()),
    }


FAMILIES = [mixtral, deepseek, gpt_oss, jax_eplb_decoder]
_DTYPES = {"F32": "f4", "U8": "u1", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


def arrays_of(family):
    """Every tensor's values, random bytes drawn by its place."""
    arrays = {}
    for seed, (name, (code, shape)) in enumerate(family().items()):
        dtype = np.dtype(_DTYPES[code])
        size = int(np.prod(shape)) * dtype.itemsize
        data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        arrays[name] = data.view(dtype).reshape(shape)
    return arrays


def write(family, folder, files=2):
    """Write the tensors over so many files, with an index, and a config beside them."""
    folder.mkdir()
    arrays = arrays_of(family)
    names, index = list(arrays), {}
    for number in range(files):
        own = names[number::files]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        specs = [TensorSpec(name, arrays[name].dtype, arrays[name].shape) for name in own]
        with TensorWriter(folder / file, specs, {"format": "pt"}) as writer:
            for name in own:
                writer.write(name, as_bytes(arrays[name]))
        index |= dict.fromkeys(own, file)
    write_index(folder, index, sum(array.nbytes for array in arrays.values()))
    (folder / "config.json").write_text(json.dumps({"model_type": "small"}))
    return folder


def as_bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
