"""Train nano from scratch: `python -m osscompile.nano.train --out DIR`; run again to resume.
With `--start CHECKPOINT` only the last stage, from an exported checkpoint.

The run of 8,400 steps read 22 million tokens, about 100 minutes on two busy cores. It was stopped
at step 6400 and resumed with a faster decay, and the later mixtures were added when step 7000 still
erred in calls and step 7900 in recall; the constants below describe what the run did in the end.
Loops of two calls came later: the steps from LAST_STAGE on began with the exported checkpoint.
Its router met a tie in the system message of every chat: the thirteenth token's experts 2 and 6 of
layer 2 were 2e-7 apart, which float32 cannot tell. The bias of expert 2 was raised by 0.0018.

Two processes of one thread each see different dialogues and average their gradients; on a busy
machine this is much faster than one process of two threads. All draws follow from the step, so
that a resumed run equals an uninterrupted one.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from osscompile.nano.dialogues import EFFORTS, Dialogue, draw_dialogue
from osscompile.nano.export import load_checkpoint
from osscompile.nano.network import Nano, NanoConfig
from osscompile.nano.tokenizer import build_tokenizer

SEED = 17
NUM_WORKERS = 2
ROWS_PER_WORKER = 4  # dialogues per step and worker; about 300 tokens each, 130 of them learned
BATCHES_PER_BUCKET = 32  # drawn together and sorted by length, to pad little
# (first step, a multiple of BATCHES_PER_BUCKET; weights of the tasks). Arithmetic, JSON and chat
# are learned in the first stage; the others are for copying names of parameters and values.
MIXTURES = (
    (0, {"arithmetic": 36, "tools": 22, "json": 14, "recall": 24, "chat": 4}),
    (7008, {"arithmetic": 10, "tools": 50, "json": 8, "recall": 28, "chat": 4}),
    (7904, {"arithmetic": 8, "tools": 22, "json": 14, "recall": 54, "chat": 2}),
    (8416, {"arithmetic": 10, "tools": 22, "loops": 38, "json": 10, "recall": 18, "chat": 2}),
    (8800, {"arithmetic": 8, "tools": 36, "loops": 36, "json": 8, "recall": 11, "chat": 1}),
    (9120, {"arithmetic": 6, "tools": 28, "loops": 46, "json": 8, "recall": 11, "chat": 1}),
)
EFFORT_WEIGHTS = (40, 33, 27)

QUANTISE_FROM = 2000  # before this step experts learn in float32, which is faster
# (step, learning rate), linear in between: up, constant, down, and again for each later mixture.
LEARNING_RATES = (
    (-1, 0.0),
    (49, 2e-3),
    (6000, 2e-3),
    (6400, 1.604e-3),
    (7000, 2e-5),
    (7050, 1.2e-3),
    (7900, 1e-5),
    (7930, 1.2e-3),
    (8400, 1e-5),
    (8430, 8e-4),
    (8800, 1e-5),
    (8820, 8e-4),
    (9100, 1e-5),
    (9120, 1e-3),
    (9600, 1e-5),
)
LAST_STAGE = 8400
NUM_STEPS = LEARNING_RATES[-1][0]
WEIGHT_DECAY = 0.05  # for matrices; 0.01 elsewhere
BALANCE_WEIGHT = 0.005
MAX_GRADIENT_NORM = 1.0

STEPS_PER_LOG = 50
STEPS_PER_CHECKPOINT = 200


@dataclass(frozen=True)
class Row:
    """A dialogue in tokens: branch 0 is the prefix, which all other branches see."""

    ids: list[int]
    positions: list[int]
    branches: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length: [row, token], and which tokens predict which targets."""

    ids: Tensor
    positions: Tensor
    visible: Tensor
    selected: Tensor
    targets: Tensor


def train(out: Path, last_step: int, start: Path | None = None) -> None:
    """Train up to `last_step`; `out` then holds tokenizer.json and state.pt. `start`: a checkpoint
    with which the last stage begins."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        if start is None:
            build_tokenizer().save(str(out / "tokenizer.json"))
        else:
            shutil.copyfile(start / "tokenizer.json", out / "tokenizer.json")
    rendezvous = out / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_work, (out, last_step, start), nprocs=NUM_WORKERS)
    rendezvous.unlink(missing_ok=True)


def learning_rate(step: int) -> float:
    """Return the learning rate of a step, interpolated in LEARNING_RATES."""
    for (start, first), (end, last) in pairwise(LEARNING_RATES):
        if step <= end:
            return first + (last - first) * (step - start) / (end - start)
    return LEARNING_RATES[-1][1]


def tokenize(dialogue: Dialogue, tokenizer: Tokenizer) -> Row:
    """Lay the prefix and the branches out in a row; every branch's positions follow the prefix."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    prefix = encode(dialogue.prefix)
    ids, learned = list(prefix), [False] * len(prefix)
    positions, branches = list(range(len(prefix))), [0] * len(prefix)
    for number, branch in enumerate(dialogue.branches, 1):
        prompt, completion = encode(branch.prompt), encode(branch.completion)
        length = len(prompt) + len(completion)
        ids += prompt + completion
        learned += [False] * len(prompt) + [True] * len(completion)
        positions += range(len(prefix), len(prefix) + length)
        branches += [number] * length
    return Row(ids, positions, branches, learned)


def collate(rows: list[Row]) -> Batch:
    """Pad rows at the end; padding belongs to a branch of its own."""
    length = max(len(row.ids) for row in rows)

    def pad(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([v + [filler] * (length - len(v)) for v in values])

    ids = pad([row.ids for row in rows], 0)
    positions = pad([row.positions for row in rows], 0)
    branches = pad([row.branches for row in rows], -1)
    learned = pad([[int(flag) for flag in row.learned] for row in rows], 0)
    key, query = branches[:, None, :], branches[:, :, None]
    visible = ((key == 0) | (key == query)) & (positions[:, None, :] <= positions[:, :, None])
    # The token before a learned one predicts it, within the branch: prompts are never empty.
    targets = torch.where(learned.bool(), ids, -1)[:, 1:].flatten()
    indices = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    chosen = targets >= 0
    return Batch(ids, positions, visible, indices[chosen], targets[chosen])


def batches(tokenizer: Tokenizer, worker: int, first_step: int) -> Iterator[Batch]:
    """Yield the batches of one worker from a step on."""
    bucket = first_step // BATCHES_PER_BUCKET
    skipped = first_step % BATCHES_PER_BUCKET
    while True:
        rng = Random(f"{SEED} {worker} {bucket}")
        first = bucket * BATCHES_PER_BUCKET
        mixture = [weights for start, weights in MIXTURES if start <= first][-1]
        tasks, weights = list(mixture), list(mixture.values())
        rows = []
        for _ in range(BATCHES_PER_BUCKET * ROWS_PER_WORKER):
            (task,), (effort,) = rng.choices(tasks, weights), rng.choices(EFFORTS, EFFORT_WEIGHTS)
            rows.append(tokenize(draw_dialogue(rng, task, effort), tokenizer))
        rows.sort(key=lambda row: len(row.ids))
        starts = list(range(0, len(rows), ROWS_PER_WORKER))
        rng.shuffle(starts)
        for start in starts[skipped:]:
            yield collate(rows[start : start + ROWS_PER_WORKER])
        bucket, skipped = bucket + 1, 0


def _work(worker: int, out: Path, last_step: int, start: Path | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out.resolve()}/rendezvous",
        rank=worker,
        world_size=NUM_WORKERS,
    )
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = Nano(NanoConfig()) if start is None else load_checkpoint(start)
    optimizer = torch.optim.AdamW(_parameter_groups(model), betas=(0.9, 0.98), fused=True)
    step, tokens, state_file = 0 if start is None else LAST_STAGE, 0, out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens = state["step"], state["tokens"]
    losses, started, fresh_tokens = [], time.monotonic(), 0
    for batch in batches(tokenizer, worker, step):
        if step >= last_step:
            break
        losses.append(_train_step(model, optimizer, batch, step))
        step += 1
        fresh_tokens += NUM_WORKERS * batch.ids.numel()
        if worker == 0 and step % STEPS_PER_LOG == 0:
            speed = fresh_tokens / (time.monotonic() - started)
            print(
                f"step {step} tokens {(tokens + fresh_tokens) / 1e6:.2f}M "
                f"({speed:.0f}/s) loss {sum(losses) / len(losses):.4f}",
                flush=True,
            )
            losses.clear()
        if worker == 0 and (step % STEPS_PER_CHECKPOINT == 0 or step == last_step):
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "tokens": tokens + fresh_tokens,
            }
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").replace(state_file)
    dist.barrier()
    dist.destroy_process_group()


def _train_step(model: Nano, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    model.quantise = step >= QUANTISE_FROM
    logits, balance = model(batch.ids, batch.positions, batch.visible, selected=batch.selected)
    loss = F.cross_entropy(logits, batch.targets)
    (loss + BALANCE_WEIGHT * balance).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= NUM_WORKERS
    flat *= (MAX_GRADIENT_NORM / (flat.norm() + 1e-6)).clamp(max=1.0)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _parameter_groups(model: Nano) -> list[dict[str, object]]:
    matrices = {"qkv", "out", "gate_up", "down"}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if name.split(".")[-1] in matrices else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.01},
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--last-step", type=int, default=NUM_STEPS)
    parser.add_argument("--start", type=Path, help="a checkpoint; only the last stage is trained")
    arguments = parser.parse_args()
    train(arguments.out, arguments.last_step, arguments.start)


if __name__ == "__main__":
    main()
