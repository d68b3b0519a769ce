"""Time and memory of `shared.model.attention.MultiHeadAttention` beside `torch.nn.MultiheadAttention`.

    python -m tests.benchmarks.attention_speed                  the aim: batch 8, 1,024 tokens, 768 dimensions, 12 heads
    python -m tests.benchmarks.attention_speed --rounds 3 --batch 2 --tokens 256      a short look

One step is a forward and a backward pass in training mode, float32. All variants have the same weights and give the
same numbers, which is checked first. They take turns round by round, so that what else the machine does hits all of
them; each round starts with another variant. The ratio is taken within a round, and its median and quartiles are
shown. Memory is every allocation and release of tensor memory during one step, as torch's profiler records
them: the highest running sum is the peak, weights and input not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from shared.model.attention import MultiHeadAttention, causal_mask
from shared.pretraining.processes import cpu_name

OURS, TORCH = "ours", "torch.nn.MultiheadAttention"


def variants(emb_dim: int, n_heads: int, tokens: int, causal: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the layers to compare, with equal weights, as functions of x (batch, tokens, emb_dim)."""
    torch.manual_seed(0)
    ours = MultiHeadAttention(emb_dim, n_heads, causal=causal, qkv_bias=True)
    theirs = nn.MultiheadAttention(emb_dim, n_heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    # torch's layer wants the mask itself next to is_causal, and True where a query may not attend.
    refused = ~causal_mask(tokens) if causal else None
    return {
        OURS: ours,
        TORCH: lambda x: theirs(x, x, x, need_weights=False, attn_mask=refused, is_causal=causal)[0],
        "ours, need_weights=True": lambda x: ours(x, need_weights=True)[0],
        f"{TORCH}, need_weights=True": lambda x: theirs(
            x, x, x, need_weights=True, average_attn_weights=False, attn_mask=refused
        )[0],
    }


def step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run one forward and one backward pass and return the gradient of x."""
    x = x.detach().requires_grad_()
    output = layer(x)
    output.backward(torch.ones_like(output))
    return x.grad


def seconds(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the time of one step in seconds."""
    started = time.perf_counter()
    step(layer, x)
    return time.perf_counter() - started


def peak_bytes(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the largest amount of tensor memory that one step holds at a time, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(layer, x)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_time(options: argparse.Namespace, causal: bool) -> pd.DataFrame:
    """Return a table of step times, the ratio to torch's layer included."""
    layers = variants(options.emb_dim, options.heads, options.tokens, causal)
    x = torch.randn(options.batch, options.tokens, options.emb_dim)
    reference = step(layers[TORCH], x)
    for name, layer in layers.items():  # also the warm-up
        difference = (step(layer, x) - reference).abs().max().item()
        assert difference < 1e-4, f"{name}: gradients differ by {difference:.1e}"
    times: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(seconds(layers[name], x))
    rows = []
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times[TORCH], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "variant": name,
                "median s": round(statistics.median(found), 3),
                "fastest s": round(min(found), 3),
                "ratio to torch": round(statistics.median(ratios), 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
            }
        )
    return pd.DataFrame(rows).set_index("variant")


def measure_memory(options: argparse.Namespace, lengths: list[int]) -> pd.DataFrame:
    """Return the peak in MiB by variant and sequence length, one sequence a batch."""
    rows = {}
    for length in lengths:
        layers = variants(options.emb_dim, options.heads, length, causal=False)
        x = torch.randn(1, length, options.emb_dim)
        rows[length] = {name: round(peak_bytes(layer, x) / 2**20, 1) for name, layer in layers.items()}
    return pd.DataFrame(rows).rename_axis(columns="tokens")


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in {"batch": 8, "tokens": 1024, "emb_dim": 768, "heads": 12, "rounds": 8}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(options.threads)
    print(f"{cpu_name()}, {options.threads} thread(s), torch {torch.__version__}")
    print(
        f"batch {options.batch}, {options.tokens} tokens, {options.emb_dim} dimensions, {options.heads} heads, "
        f"{options.rounds} rounds in turns"
    )
    for causal in (False, True):
        print(f"\nForward and backward, {'causal' if causal else 'bidirectional'}")
        print(measure_time(options, causal).to_string())
    print("\nPeak memory of one step in MiB, batch 1, bidirectional")
    print(measure_memory(options, [256, 512, 1024, 2048]).to_string())


if __name__ == "__main__":
    main()
