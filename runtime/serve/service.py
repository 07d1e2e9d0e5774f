"""What a server serves: one model, under one name."""

import time
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import InputError
from ..manifest import Manifest
from ..sampling_options import Sampling
from ..tokenizer import Tokenizer
from .answers import Asks, Desk
from .errors import ApiError
from .gate import Gate
from .logprobs import Logprobs
from .metrics import Metrics
from .response_store import ResponseStore


class Engines(Asks, Protocol):
    """What is served: an Engine, or Replicas."""

    manifest: Manifest
    tokenizer: Tokenizer | None
    sequences: int

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...


@dataclass(frozen=True)
class Service:
    name: str
    fingerprint: str  # tells answers of this artifact from those of another
    tokenizer: Tokenizer
    desk: Desk
    sampling: Sampling = field(default_factory=Sampling)  # where a request does not say how
    store: ResponseStore = field(default_factory=ResponseStore)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def logprobs(self) -> Logprobs:
        return Logprobs(self.tokenizer)

    @property
    def model(self) -> dict[str, object]:
        """As /v1/models tells of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "osscompile",
        }

    def check_model(self, name: str) -> None:
        """Raises ApiError for another model."""
        if name != self.name:
            raise ApiError(
                404,
                f"model: expected {self.name!r}, which this server has, found {name!r:.100}",
                param="model",
                code="model_not_found",
            )

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def make_service(engine: Engines, name: str, waiting: int) -> Service:
    """`waiting`: how many answers may wait for their turn. Raises InputError for a model without a
    tokenizer."""
    if engine.tokenizer is None:
        raise InputError(
            "serve: expected an artifact with a tokenizer, found none in this one; compile a "
            "checkpoint that has tokenizer.json"
        )
    gate = Gate(engine.sequences, waiting)
    metrics = Metrics(lambda: engine.num_running, lambda: engine.num_waiting)
    fingerprint = f"osc_{engine.manifest.sha256[:16]}"
    desk = Desk(engine, gate, metrics)
    return Service(name, fingerprint, engine.tokenizer, desk, engine.manifest.sampling)
