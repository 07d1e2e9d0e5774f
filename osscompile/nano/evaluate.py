"""Judge nano on held-out cases by greedy free-running decoding.

`python -m osscompile.nano.evaluate CHECKPOINT --count 200` prints accuracy and the mean length of
the analysis per category and reasoning effort.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

from osscompile.nano import CHECKPOINT
from osscompile.nano.cases import (
    CATEGORIES,
    MAX_NEW_TOKENS,
    Case,
    accuracy,
    analysis_of,
    held_out_cases,
    judge,
    stop_ids,
)
from osscompile.nano.dialogues import EFFORTS
from osscompile.nano.export import load_checkpoint
from osscompile.nano.network import LayerCache, Nano

CASES_PER_BATCH = 32
PROMPTS_SEED = 2024


def decode_greedily(model: Nano, prompts: list[list[int]], stops: set[int]) -> list[list[int]]:
    """Decode a batch of prompts with a KV cache, each up to and including its stop token."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    positions = torch.arange(longest).expand_as(ids)
    exists = positions < lengths[:, None]
    caches = [LayerCache() for _ in range(model.config.num_layers)]
    visible = torch.ones(longest, longest, dtype=torch.bool).tril() & exists[:, None, :]
    last = torch.arange(len(prompts)) * longest + lengths - 1
    logits, _ = model(ids, positions, visible, caches=caches, selected=last)
    key_positions = positions
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in range(MAX_NEW_TOKENS):
        chosen = logits.argmax(-1)
        for output, token in zip(outputs, chosen.tolist(), strict=True):
            if not output or output[-1] not in stops:
                output.append(token)
        if all(output[-1] in stops for output in outputs):
            break
        position = (lengths + step)[:, None]
        key_positions = torch.cat((key_positions, position), 1)
        exists = torch.cat((exists, torch.ones_like(position, dtype=torch.bool)), 1)
        logits, _ = model(chosen[:, None], position, exists[:, None], key_positions, caches)
    return outputs


def evaluate_batched(model: Nano, tokenizer: Tokenizer, cases: list[Case]) -> list[str]:
    """Return the completions of all cases, in their order."""
    prompts = [case.prompt_ids(tokenizer) for case in cases]
    order = sorted(range(len(cases)), key=lambda index: len(prompts[index]))
    completions = [""] * len(cases)
    for start in range(0, len(order), CASES_PER_BATCH):
        batch = order[start : start + CASES_PER_BATCH]
        with torch.inference_mode():
            outputs = decode_greedily(model, [prompts[i] for i in batch], stop_ids(tokenizer))
        for index, output in zip(batch, outputs, strict=True):
            completions[index] = tokenizer.decode(output, skip_special_tokens=False)
    return completions


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=200, help="cases per category")
    parser.add_argument("--seed", type=int, default=PROMPTS_SEED)
    parser.add_argument("--show-errors", type=int, default=0, help="errors shown per category")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_checkpoint(arguments.checkpoint)
    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    print(f"{'category':<12} {'cases':>5} {'right %':>8}   analysis tokens low / medium / high")
    for category in CATEGORIES:
        cases = held_out_cases(category, arguments.count, arguments.seed)
        texts = evaluate_batched(model, tokenizer, cases)
        verdicts = [judge(case, text) for case, text in zip(cases, texts, strict=True)]
        lengths: dict[str, list[int]] = defaultdict(list)
        for case, text in zip(cases, texts, strict=True):
            lengths[case.effort].append(len(tokenizer.encode(analysis_of(text)).ids))
        means = " / ".join(
            f"{sum(lengths[effort]) / max(1, len(lengths[effort])):.1f}" for effort in EFFORTS
        )
        print(f"{category:<12} {len(cases):>5} {accuracy(verdicts):>8.1f}   {means}", flush=True)
        wrong = [
            (case, text)
            for case, text, right in zip(cases, texts, verdicts, strict=True)
            if not right
        ]
        for case, text in wrong[: arguments.show_errors]:
            print(
                f"  {case.prompt[-200:]!r}\n    expected {case.expected!r}\n    found    {text!r}"
            )


if __name__ == "__main__":
    main()
