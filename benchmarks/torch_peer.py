"""Times of PyTorch's grouped products and of transformers' layer; run as a program of its own.

Reads one JSON object from standard input, `{"product": [[G, M, D, F, sizes], …]}` or
`{"layer": [[T, D, F, E, K, seed], …]}`, and prints a list of times in ms, null where it failed, and
the reasons on standard error. It imports neither JAX nor this library.
"""

import importlib
import json
import math
import statistics
import sys
import time


def main() -> None:
    request = json.load(sys.stdin)
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU")
    torch.set_grad_enabled(False)
    times = []
    for kind, cases in request.items():
        for case in cases:
            try:
                times.append((product_ms if kind == "product" else layer_ms)(torch, *case))
            except Exception as error:
                print(f"{case[:5]}: {type(error).__name__}: {error}", file=sys.stderr)
                times.append(None)
            torch.cuda.empty_cache()
    print(json.dumps({"version": torch.__version__, "times": times}))


def burst_ms(torch, call, bursts=9, burst_seconds=0.02, rest_seconds=0.05):
    """As `benchmarks.ceilings.burst_ms`."""

    def seconds(count):
        time.sleep(rest_seconds)
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(3)
    calls = math.ceil(min(100.0, burst_seconds / seconds(1)))
    more = [seconds(2 * calls) - seconds(calls) for _ in range(bursts)]
    return 1e3 * statistics.median(more) / calls


def product_ms(torch, groups, num_rows, depth, width, sizes):
    def drawn(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    rows, weights = drawn(num_rows, depth), drawn(groups, depth, width)
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    return burst_ms(torch, lambda: torch._grouped_mm(rows, weights, offs=ends))


def layer_ms(torch, num_tokens, depth, hidden, num_experts, top_k, inputs):
    """Qwen3's block of experts, compiled, its experts by `grouped_mm`; inputs as .npz."""
    family = "transformers.models.qwen3_moe"
    modeling = importlib.import_module(f"{family}.modeling_qwen3_moe")
    config = importlib.import_module("transformers").Qwen3MoeConfig(
        hidden_size=depth,
        moe_intermediate_size=hidden,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = modeling.Qwen3MoeSparseMoeBlock(config)
    block = block.to(torch.bfloat16).to_empty(device="cuda")
    for weight in block.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)
    arrays = importlib.import_module("numpy").load(inputs)
    block.gate.weight.copy_(torch.tensor(arrays["router"].T))
    tokens = torch.tensor(arrays["tokens"], device="cuda", dtype=torch.bfloat16)[None]
    compiled = torch.compile(block)
    return burst_ms(torch, lambda: compiled(tokens))


if __name__ == "__main__":
    main()
