"""Costs: tokens and bytes into time.

Axes: W windows, L layers, P ranks, N slots of a rank, D embedding width, F expert hidden width.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one layer's experts take on one rank, what moving them takes, and what else a step does.

    In one layer a rank takes as long as it computes its choices, or as long as it reads its slots'
    weights from memory, whichever is longer; the layer takes as long as its slowest rank.
    `attention_share` is the part of a perfectly balanced step, in which computing is what takes
    time, that does not depend on the placement: attention, shared experts, and all else.

    The defaults are those of bfloat16 experts of any width on H200s (`configs/simulate/`), where an
    expert costs as much to move as 1,418 choices to compute; their share is Qwen3-30B's.
    """

    tokens_per_second: float = 6.76e7  # choices that a rank computes in one layer
    bytes_per_expert: float = 3 * 2048 * 768 * 2
    bytes_per_second: float = 4.5e11  # of weights that move, into one rank
    memory_bytes_per_second: float = 4.8e12
    attention_share: float = 0.45

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; use a number")
            if field.name == "attention_share":
                if not 0 <= value < 1:
                    raise ValueError(f"attention_share is {value}; use 0 or more, below 1")
            elif not (value > 0 and not math.isnan(value)):
                raise ValueError(f"{field.name} is {value}; use a number above 0")

    def step_seconds(
        self, imbalance: np.ndarray, choices: np.ndarray, *, num_ranks: int, num_slots: int
    ) -> np.ndarray:
        """One step through all layers, float64[..., W].

        `imbalance`: [..., W, L]. `choices`: tokens × top-k that a layer routes, [W, L].

        >>> costs = Costs(tokens_per_second=1e6, attention_share=0.5)
        >>> load = np.array([[8000]])
        >>> costs.step_seconds(np.array([[0.5]]), load, num_ranks=8, num_slots=8).round(6).tolist()
        [0.0025]
        """
        mean = np.asarray(choices, np.float64) / num_ranks / self.tokens_per_second  # [W, L]
        reading = self.read_seconds(num_slots // num_ranks)
        experts = np.maximum((1 + np.asarray(imbalance, np.float64)) * mean, reading)
        other = mean * self.attention_share / (1 - self.attention_share)
        return np.where(mean > 0, experts + other, 0.0).sum(axis=-1)

    def read_seconds(self, slots_per_rank: int) -> float:
        """A rank's reading of its slots' weights, in one layer."""
        return slots_per_rank * self.bytes_per_expert / self.memory_bytes_per_second

    def move_seconds(self, received: np.ndarray) -> np.ndarray:
        """What a plan's moves take, as if the model stood still, from the fullest receiver's count.

        >>> Costs(bytes_per_expert=1e6, bytes_per_second=1e9).move_seconds(np.array([3])).tolist()
        [0.003]
        """
        return np.asarray(received, np.float64) * self.bytes_per_expert / self.bytes_per_second

    def least_choices(self, imbalance: float, *, num_ranks: int, num_slots: int) -> float:
        """So few choices in a layer take no longer on the fullest rank than reading the weights.

        Below, balancing gains nothing.
        """
        reading = self.read_seconds(num_slots // num_ranks)
        return reading * self.tokens_per_second * num_ranks / (1 + imbalance)


class Model(NamedTuple):
    """A `model` section: sizes of one MoE layer's experts, and of the whole."""

    embed_dim: int
    expert_hidden_dim: int
    num_moe_layers: int
    experts_per_token: int
    activated_parameters: float  # of all layers, for one token
    bytes_per_parameter: float  # of experts, as stored
    arithmetic: str  # "bfloat16" or "fp8"


class Device(NamedTuple):
    """A `device` section."""

    bfloat16_flops: float
    fp8_flops: float
    efficiency: float  # the part of these that a grouped product reaches
    link_bytes_per_second: float
    memory_bytes_per_second: float


def costs_of(model: Model, device: Device) -> Costs:
    """Costs from sizes and data sheets: three D × F products a choice, two operations a weight.

    What is not computed by routed experts, of the parameters that a token activates, is the share
    of attention and all else.
    """
    weights = 3 * model.embed_dim * model.expert_hidden_dim
    flops = device.fp8_flops if model.arithmetic == "fp8" else device.bfloat16_flops
    routed = model.num_moe_layers * model.experts_per_token * weights
    return Costs(
        tokens_per_second=flops * device.efficiency / (2 * weights),
        bytes_per_expert=weights * model.bytes_per_parameter,
        bytes_per_second=device.link_bytes_per_second,
        memory_bytes_per_second=device.memory_bytes_per_second,
        attention_share=1 - routed / model.activated_parameters,
    )


def read_model(path: str | os.PathLike) -> Model:
    """The `model` section of a file of `configs/simulate/models/`; ValueError names the fault."""
    model = Model(**_read(path, "model", Model))
    if model.arithmetic not in ("bfloat16", "fp8"):
        raise ValueError(f"{path}: arithmetic is {model.arithmetic!r}; use 'bfloat16' or 'fp8'")
    return model


def read_device(path: str | os.PathLike) -> Device:
    """The `device` section of a file of `configs/simulate/devices/`; ValueError names the fault."""
    return Device(**_read(path, "device", Device))


def _read(path: str | os.PathLike, name: str, section: type[NamedTuple]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({error})") from None
    found = values.get(name) if isinstance(values, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping with a {name!r} section")
    wanted = section.__annotations__
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))[0]
        what = "missing" if odd in wanted else "unknown"
        raise ValueError(f"{path}: the {name} setting {odd!r} is {what}; known: {sorted(wanted)}")
    for key, kind in wanted.items():
        value = found[key]
        # YAML 1.1 reads 1e12 as text: it wants 1.0e+12.
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if kind is not str and not number:
            raise ValueError(f"{path}: {key} is {value!r}; use a positive number, as 1.0e+12")
    return found
