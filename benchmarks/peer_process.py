"""Serve another engine's planner to the benchmark, in the Python environment that planner needs.

    PYTHON peer_process.py KIND FILE

FILE is the planner's own source, run unchanged. Each line on the standard input names an .npz with
a problem; each line on the standard output names the .npz with its answer. PYTHON needs numpy and
what FILE imports (torch; numba and scipy too for FlashLB); jax and jax_eplb are not imported here.

Axes: W windows, L layers, E experts, S slots, P ranks, N slots of a rank.

A problem: `windows` [W, L, E] (tokens), `num_slots`, `num_ranks`, `num_nodes`, `num_groups`,
`repeats`, `keep_history`, and perhaps `previous` [L, S]. An answer: `slot_to_expert` int64[L, S]
and `seconds` [repeats], or `failure`. The first call is not timed: numba compiles in it.
"""

import argparse
import copy
import dataclasses
import functools
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

import numpy as np

# Stands for the package that FILE belongs to, for its relative imports.
_PACKAGE = "peer_source"


@dataclasses.dataclass(frozen=True)
class Problem:
    windows: np.ndarray  # [W, L, E]
    num_slots: int
    num_ranks: int
    num_nodes: int
    num_groups: int
    previous: np.ndarray | None = None  # int64[L, S]
    keep_history: bool = False  # what the planner itself remembers of the problem before

    @property
    def load(self) -> np.ndarray:
        """Tokens of each expert in all windows, [L, E]."""
        return self.windows.sum(axis=0)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order in which the planners derived from DeepSeek's take them."""
        return self.num_slots, self.num_groups, self.num_nodes, self.num_ranks

    @property
    def hierarchical(self) -> bool:
        """Whether to keep the experts of a group on one node."""
        return self.num_nodes > 1 and self.num_groups % self.num_nodes == 0

    @property
    def current(self) -> np.ndarray:
        """The table to start from, int64[L, S]: the previous one, or the experts in turn."""
        if self.previous is not None:
            return self.previous
        _, num_layers, num_experts = self.windows.shape
        return np.tile(np.arange(self.num_slots) % num_experts, (num_layers, 1))

    def in_slots(self, windows: np.ndarray) -> np.ndarray:
        """Tokens [..., L, E] as counted by slot, [..., L, S]: all on an expert's first slot."""
        experts = np.arange(windows.shape[-1])
        first = (self.current[:, None, :] == experts[:, None]).argmax(axis=-1)  # [L, E]
        tokens = np.zeros((*windows.shape[:-1], self.num_slots), windows.dtype)
        np.put_along_axis(tokens, np.broadcast_to(first, windows.shape), windows, axis=-1)
        return tokens

    def by_rank(self, of_slots: np.ndarray) -> np.ndarray:
        """[..., S] -> [..., P, N]."""
        return of_slots.reshape(*of_slots.shape[:-1], self.num_ranks, -1)


# What is timed: a call as the engine makes it, all its inputs at hand. It returns a table of
# experts, [L, S] or [L, P, N].
Call = Callable[[], Any]


def _tensor(module: Any, array: np.ndarray) -> Any:
    """An array as the planner takes it: of torch, where its file imports torch."""
    torch = getattr(module, "torch", None)
    return torch.from_numpy(np.ascontiguousarray(array)) if torch else array


def _deepseek(module: Any, problem: Problem) -> Call:
    load = _tensor(module, problem.load)
    return lambda: module.rebalance_experts(load, *problem.sizes)[0]


def _vllm(module: Any, problem: Problem) -> Call:
    load = _tensor(module, problem.load)
    old = None if problem.previous is None else _tensor(module, problem.previous)
    return lambda: module.DefaultEplbPolicy.rebalance_experts(load, *problem.sizes, old)


def _sglang(module: Any, problem: Problem) -> Call:
    load = _tensor(module, problem.load)
    by_group = problem.hierarchical
    return lambda: module.rebalance_experts(load, *problem.sizes, enable_hierarchical=by_group)[0]


def _snake(module: Any, problem: Problem) -> Call:
    windows = _tensor(module, problem.windows)
    slots = (problem.num_slots, problem.num_slots // problem.num_ranks)
    groups = (problem.num_groups, problem.num_nodes, problem.hierarchical)
    return lambda: module.rebalance_experts(windows, *slots, *groups)[0]


def _flashlb(module: Any, problem: Problem, depth: int, width: int) -> Call:
    current = _tensor(module, problem.by_rank(problem.current))
    tokens = _tensor(module, problem.by_rank(problem.in_slots(problem.windows)))
    # It lets well-placed layers be, by thresholds that depend on the number of ranks.
    module.get_dynamic_eplb_group = lambda: types.SimpleNamespace(world_size=problem.num_ranks)
    before = getattr(module, "kept_policy", None) if problem.keep_history else None

    def call() -> Any:  # each call starts from the same history; without one, it plans every layer
        policy = copy.deepcopy(before) or module.FlashLB()
        policy.depth, policy.width = depth, width
        module.kept_policy = policy
        return policy.rebalance_experts(current, tokens)[2]

    return call


def _swift(module: Any, problem: Problem) -> Call:
    ranks_per_node = problem.num_ranks // problem.num_nodes
    module.torch.npu = types.SimpleNamespace(device_count=lambda: ranks_per_node)
    current = _tensor(module, problem.by_rank(problem.current))
    tokens = _tensor(module, problem.by_rank(problem.in_slots(problem.load)))
    return lambda: module.SwiftBalanceEplb().rebalance_experts(current, tokens)[2]


KINDS: dict[str, Callable[[Any, Problem], Call]] = {
    "deepseek": _deepseek,
    "vllm": _vllm,
    "sglang": _sglang,
    "snake": _snake,
    "flashlb": functools.partial(_flashlb, depth=4, width=8),
    "flashlb-deep": functools.partial(_flashlb, depth=8, width=32),
    "swift": _swift,
}


class _Policy:
    """Stands for the engines' abstract base class."""


def _stub(name: str, **attributes: Any) -> None:
    """Stand in for a module of the engine, and for the packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.setdefault(
            ".".join(parts[:end]), types.ModuleType(".".join(parts[:end]))
        )
        module.__path__ = []  # so that it passes for a package
    vars(sys.modules[name]).update(attributes)


def load_source(path: str) -> types.ModuleType:
    """Import one planner's file without its engine: it uses no more of it than what is set here."""
    quiet = dict.fromkeys(("debug", "info", "warning", "error"), lambda *_: None)
    _stub("vllm.logger", logger=types.SimpleNamespace(**quiet))
    _stub("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=None)
    _stub("sglang.srt.utils", get_bool_env_var=lambda *_: False)
    _stub("torch_npu")
    _stub(f"{_PACKAGE}.policy_abstract", EplbPolicy=_Policy)
    _stub(f"{_PACKAGE}.abstract", AbstractEplbPolicy=_Policy)
    with open(path, encoding="utf-8") as file:
        code = compile(file.read(), path, "exec")
    module = types.ModuleType(f"{_PACKAGE}.planner")
    module.__file__, module.__package__ = path, _PACKAGE
    sys.modules[module.__name__] = module  # numba and dataclasses look it up
    exec(code, vars(module))
    return module


def read_problem(arrays: Any) -> Problem:
    windows = arrays["windows"]
    if (windows == np.rint(windows)).all():
        windows = windows.astype(np.int64)  # engines count tokens
    sizes = ("num_slots", "num_ranks", "num_nodes", "num_groups")
    return Problem(
        windows=windows,
        previous=arrays.get("previous"),
        keep_history=bool(arrays["keep_history"]),
        **{name: int(arrays[name]) for name in sizes},
    )


def answer(module: Any, kind: str, request: str) -> str:
    """Solve the problem in the file `request`; the path of the answer."""
    path = f"{request.removesuffix('.npz')}.answer.npz"
    try:
        with np.load(request) as arrays:
            problem, repeats = read_problem(arrays), int(arrays["repeats"])
        call = KINDS[kind](module, problem)
        table = np.asarray(call())
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        table = table.astype(np.int64).reshape(len(table), -1)
        np.savez(path, slot_to_expert=table, seconds=np.array(seconds))
    except Exception as error:
        traceback.print_exc()
        np.savez(path, failure=f"{type(error).__name__}: {error}".rstrip(": "))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("file")
    given = parser.parse_args()
    # Answers alone reach the caller: what a planner prints goes to the standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        module = load_source(given.file)
    except ModuleNotFoundError as error:
        print(f"missing {error.name}", file=answers)
        return
    print("ready", file=answers)
    for line in sys.stdin:
        print(answer(module, given.kind, line.rstrip("\n")), file=answers)


if __name__ == "__main__":
    main()
