"""What the config of an adapter says: whether it can be merged, and by how much it counts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ...errors import CheckpointError

T = TypeVar("T")

# Fields that change what is computed in ways that are not merged here, and what they must be.
NEEDED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "use_rslora": (False, True, None),
    "use_dora": (False, True, None),
    "arrow_config": (None,),
    # Others change the base as well, so that the adapter alone says nothing.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def check_fields(raw: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError naming the field of what is not merged here."""
    for key, values in NEEDED.items():
        found = raw.get(key)
        if not any(type(found) is type(value) and found == value for value in values):
            _refuse(path, key, f"expected {values[0]!r}, found {found!r:.200}")


@dataclass(frozen=True)
class Scaling:
    """By how much a module's product counts (PEFT: lora_alpha / r, rslora: / sqrt(r))."""

    path: Path
    alpha: float
    patterns: dict[str, float]
    rank: int | None  # None: those of the tensors
    ranks: dict[str, int]
    by_root: bool

    @classmethod
    def of(cls, raw: dict[str, Any], path: Path) -> "Scaling":
        alpha, patterns = raw.get("lora_alpha"), raw.get("alpha_pattern") or {}
        numbers = [alpha, *patterns.values()] if isinstance(patterns, dict) else []
        if not numbers or any(
            type(n) not in (int, float) or not math.isfinite(n) or abs(n) > 1e6 for n in numbers
        ):
            _refuse(
                path,
                "lora_alpha, alpha_pattern",
                f"expected numbers, found {numbers or patterns!r:.200}",
            )
        assert isinstance(alpha, int | float)
        for pattern in patterns:
            if not _is_harmless(pattern):
                _refuse(path, "alpha_pattern", f"expected names of modules, found {pattern!r:.200}")
        rank, ranks = raw.get("r"), raw.get("rank_pattern") or {}
        counts = [rank or 1, *ranks.values()] if isinstance(ranks, dict) else [0]
        if any(type(count) is not int or count < 1 for count in counts):
            _refuse(path, "r, rank_pattern", f"expected ranks, found {rank!r:.99}, {ranks!r:.99}")
        for pattern in ranks:
            if not _is_harmless(pattern):
                _refuse(path, "rank_pattern", f"expected names of modules, found {pattern!r:.200}")
        return cls(path, alpha, patterns, rank, ranks, raw.get("use_rslora") is True)

    def __call__(self, module: str, rank: int) -> float:
        """The factor of B A, whose tensors have this rank. Raises CheckpointError for another than
        the config says: which of them was trained with, nobody knows."""
        alpha = _of_module(self.patterns, module, self.alpha)
        expected = _of_module(self.ranks, module, self.rank)
        if expected is not None and expected != rank:
            raise CheckpointError(
                f"{self.path}: r, rank_pattern: expected {rank}, as the tensors of "
                f"{module:.200} have, found {expected}; take the adapter_config.json that was "
                "written beside these tensors"
            )
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _of_module(patterns: Mapping[str, T], module: str, otherwise: T) -> T:
    """The value whose pattern matches the end of the module's name, as in PEFT."""
    matching = (v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", module))
    return next(matching, otherwise)


def _is_harmless(pattern: str) -> bool:
    """A regular expression that cannot take for ever: few repetitions, none of a group."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    repetitions = sum(pattern.count(sign) for sign in "*+{")
    return len(pattern) < 200 and repetitions <= 4 and not re.search(r"\)[*+?{]", pattern)


def _refuse(path: Path, key: str, problem: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {key}: {problem}; this kind of adapter is not merged here: merge it with PEFT's "
        "`merge_and_unload()`, and compile the model that it saves"
    )
