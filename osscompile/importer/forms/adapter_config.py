"""What the config of an adapter says: whether it can be merged, and by how much it counts."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...errors import CheckpointError

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

    alpha: float
    patterns: dict[str, float]
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
        return cls(alpha, patterns, raw.get("use_rslora") is True)

    def __call__(self, module: str, rank: int) -> float:
        """The factor of B A; patterns match the end of the module's name, as in PEFT."""
        alpha = next(
            (a for p, a in self.patterns.items() if re.fullmatch(rf"(.*\.)?({p})", module)),
            self.alpha,
        )
        return alpha / (math.sqrt(rank) if self.by_root else rank)


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
