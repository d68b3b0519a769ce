"""Training step of our GPT against Hugging Face's GPT-2 (SDPA) on the same weights and the same batch.

    python -m tests.benchmarks.training_step
    python -m tests.benchmarks.training_step --emb-dim 256 --n-heads 8 --n-layers 6 --batch 8 --profile

Both models take turns, so that a busy machine slows both alike; the order changes every round. Times are seconds for
one step: forward pass, loss and backward pass, and the same with an AdamW step (torch's fused kernel for both). The
losses of both models must agree in every round. `--clock cpu` counts processor time instead of time on the wall: use
it with `--threads 1` where other programs are running. `--profile` adds the operations that take most of the time,
and the share of the matrix products, which both models have in common: no implementation is faster than that share.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from shared.model.gpt import GPTConfig, GPTModel
from shared.pretraining.processes import cpu_name


def copy_weights(ours: GPTModel, theirs: GPT2LMHeadModel) -> None:
    """Give `theirs` the weights of `ours`."""
    state = ours.state_dict()
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    copied = {
        "transformer.wte.weight": state["token_embedding.weight"],
        "transformer.wpe.weight": state["position_embedding.weight"],
        "transformer.ln_f.weight": state["final_norm.weight"],
        "transformer.ln_f.bias": state["final_norm.bias"],
        "lm_head.weight": state["token_embedding.weight"],
    }
    for i in range(ours.config.n_layers):
        for mine, other in names.items():
            for kind in ("weight", "bias"):
                tensor = state[f"blocks.{i}.{mine}.{kind}"]
                copied[f"transformer.h.{i}.{other}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
    theirs.load_state_dict(copied)


def our_loss(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next tokens."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def their_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """The same by the library's own loss, as its documentation and `Trainer` call it."""
    return model(ids, labels=ids, use_cache=False).loss


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed_step(
    loss_of: Callable,
    model: torch.nn.Module,
    ids: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    clock: Callable[[], float],
) -> tuple[float, float, float]:
    """Return the loss, and the seconds of forward, loss and backward, without and with the optimiser's step."""
    optimizer.zero_grad()
    synchronize(ids.device)
    start = clock()
    loss = loss_of(model, ids)
    loss.backward()
    synchronize(ids.device)
    middle = clock()
    optimizer.step()
    synchronize(ids.device)
    return loss.item(), middle - start, clock() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def hardware(device: torch.device) -> str:
    """Name processor, threads and versions."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads{load}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def spread(times: list[float]) -> str:
    """Median, and the range of the middle half."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return f"{middle:8.3f} s  ({low:.3f} to {high:.3f})"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--emb-dim", type=int, default=768)
    parser.add_argument("--n-heads", type=int, default=12)
    parser.add_argument("--n-layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--profile", action="store_true", help="show the slowest operations of each model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    device = torch.device(options.device)

    ours = GPTModel(
        GPTConfig(
            vocab_size=options.vocab_size,
            context_length=options.tokens + 1,
            emb_dim=options.emb_dim,
            n_heads=options.n_heads,
            n_layers=options.n_layers,
            dropout=options.dropout,
        )
    )
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.vocab_size,
            n_positions=options.tokens + 1,
            n_embd=options.emb_dim,
            n_head=options.n_heads,
            n_layer=options.n_layers,
            resid_pdrop=options.dropout,
            embd_pdrop=options.dropout,
            attn_pdrop=options.dropout,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    copy_weights(ours, theirs)
    ids = torch.randint(options.vocab_size, (options.batch, options.tokens + 1), device=device)
    runs, clock = {}, CLOCKS[options.clock]
    for name, loss_of, model in (("ours", our_loss, ours), ("transformers", their_loss, theirs)):
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        runs[name] = (loss_of, model, ids, optimizer, clock)

    print(hardware(device))
    print(
        f"{ours.n_parameters:,} parameters, {options.batch} x {options.tokens} tokens, float32, {options.clock} time\n"
    )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        losses = {}
        for name in sorted(runs, reverse=number % 2 == 1):
            losses[name], *seconds = timed_step(*runs[name])
            if number:  # the first round warms up
                times[name].append(tuple(seconds))
        if not options.dropout and not abs(losses["ours"] - losses["transformers"]) < 1e-3:
            raise SystemExit(f"the models disagree in round {number}: {losses}")

    for i, label in enumerate(("forward, loss, backward", "with the optimiser's step")):
        print(label)
        for name in runs:
            print(f"  {name:13} {spread([t[i] for t in times[name]])}")
        ratios = [a[i] / b[i] for a, b in zip(times["ours"], times["transformers"], strict=True)]
        print(
            f"  ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.2f} (aim: at most 0.80)\n"
        )
    if options.profile:
        for name, run in runs.items():
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            with profile(activities=activities) as profiler:
                timed_step(*run)
            events = profiler.key_averages()
            products = sum(
                e.self_cpu_time_total for e in events if e.key in ("aten::mm", "aten::addmm", "aten::bmm")
            )
            everything = sum(e.self_cpu_time_total for e in events)
            print(f"{name}: matrix products {products / 1e6:.3f} of {everything / 1e6:.3f} s")
            print(events.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=48))


if __name__ == "__main__":
    main()
