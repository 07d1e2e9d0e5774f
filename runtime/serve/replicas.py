"""Engines on the machines of a Ray cluster, behind one server. It needs ray[serve] (extra `ray`).

Ray starts a replica, watches its health, and starts another where one ends. A conversation is
answered by the replica that answered its beginning, whose KV cache has it, while that lives.
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import open_artifact
from ..engine import Engine
from ..errors import InputError
from ..questions import Questions
from ..usage import Usage
from .errors import ApiError, ReplicaEnded

CLUSTER = os.environ.get("RAY_ADDRESS", "local")  # local: one of our own, on this machine
if CLUSTER == "local" and "ray" not in sys.modules:
    # Ray listens on every address of the machine, and runs what it is sent by who has its token. It
    # reads these while it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.exceptions import RayActorError, RayTaskError  # noqa: E402

APART_SECONDS = 30.0  # after its end a replica is asked last: until then Ray has started another
FIRST_IDS = 64  # by which a prompt of ids is known


class Replica:
    """An engine, in a process of its own."""

    def __init__(self, artifact: str, options: Mapping[str, Any]) -> None:
        self._engine = Engine(artifact, **options)

    async def answer(self, prompt: Any, options: Mapping[str, Any]) -> AsyncIterator[Any]:
        """What is told and what it took, and last None with the reason why it ended."""
        request = self._engine.submit(prompt, **options)
        try:
            async for told in request:
                yield told, request.usage, None
            yield None, request.usage, request.finish_reason
        finally:
            request.cancel()

    def check_health(self) -> None:
        """Ray asks regularly; an error makes it start another."""
        if not self._engine.is_open:
            raise RuntimeError("the engine has ended")


class Replicas:
    """As one engine: `count` replicas with the `options` of Engine, in a Ray cluster that is there
    (RAY_ADDRESS) or on this machine. The artifact has the same path on all machines.

    Raises ArtifactError for one that does not run here, InputError for more than the cluster holds.
    """

    def __init__(self, artifact: str | Path, count: int, options: Mapping[str, Any]) -> None:
        opened = open_artifact(artifact)
        self.manifest = opened.manifest
        self._questions = Questions(opened, options.get("context") or opened.manifest.context)
        self.tokenizer = self._questions.tokenizer
        self.sequences = count * options["sequences"]
        self.num_running, self.num_waiting = 0, 0  # what waits, waits in a replica
        self.ended_at = [-APART_SECONDS] * count  # of each replica, when it last did
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers
        ray.init(CLUSTER, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        resource = "CPU" if opened.manifest.on_cpu else "GPU"
        most = int(ray.cluster_resources().get(resource, 0))
        if count > most:  # Ray would wait for more
            ray.shutdown()
            raise InputError(
                f"--replicas: expected at most {most}, one for each {resource} of the Ray cluster, "
                f"found {count}"
            )
        deployment = serve.deployment(
            Replica,
            ray_actor_options={f"num_{resource.lower()}s": 1},
            max_ongoing_requests=1 << 20,  # the server has a queue of its own
            health_check_period_s=1,
        )
        replica = deployment.bind(str(Path(artifact).resolve()), dict(options))
        server = f"osscompile-{uuid.uuid4().hex[:8]}"  # the cluster may have others
        self._names = [f"{server}-{i}" for i in range(count)]
        self.handles = [
            serve.run(replica, name=name, route_prefix=None).options(stream=True)
            for name in self._names
        ]

    def submit(self, prompt: Any, **options: Any) -> "ReplicaRequest":
        """As `Engine.submit`. Raises InputError for bad arguments."""
        is_chat = isinstance(prompt, Sequence) and any(isinstance(m, Mapping) for m in prompt)
        ask = self._questions.of_messages if is_chat else self._questions.of_ids
        ask(prompt, **options)
        return ReplicaRequest(self, self._order(prompt), prompt, options)

    def close(self) -> None:
        for name in self._names:
            serve.delete(name)
        ray.shutdown()

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, prompt: Sequence[Any]) -> list[int]:
        """The replicas that may answer, best first: by a hash of how the conversation begins, which
        gives each as many, and moves none when another ends."""
        begins = _beginning(prompt)
        places = range(len(self.handles))
        order = sorted(places, key=lambda i: hashlib.sha256(b"%d %s" % (i, begins)).digest())
        now = time.monotonic()
        return sorted(order, key=lambda i: now - self.ended_at[i] < APART_SECONDS)


class ReplicaRequest:
    """An answer that a replica computes: see Request."""

    def __init__(
        self, replicas: Replicas, order: list[int], prompt: Any, options: Mapping[str, Any]
    ) -> None:
        self.usage = Usage()
        self.finish_reason: str | None = None
        self._replicas, self._order = replicas, order
        self._asked = prompt, options
        self._stream: Any = None
        self._is_cancelled = False

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._stream is not None and self.finish_reason is None:
            self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._replicas.num_running += 1
        try:
            for place in self._order:
                async for told in self._read(place):
                    yield told
                if self.finish_reason is not None:
                    return
            raise ApiError(503, "no replica answers; ask again later", code="no_replica")
        except (asyncio.CancelledError, ray.exceptions.TaskCancelledError):
            if not self._is_cancelled:
                raise
            self.finish_reason = "cancelled"
        finally:
            self._replicas.num_running -= 1

    async def _read(self, place: int) -> AsyncIterator[Any]:
        """What one replica tells. It tells nothing if it ends before it has begun: then another may
        be asked. Raises ReplicaEnded if it ends later."""
        has_begun = False
        self._stream = self._replicas.handles[place].answer.remote(*self._asked)
        try:
            async for told, usage, reason in self._stream:
                has_begun = True
                self.usage, self.finish_reason = usage, reason
                if reason is None:
                    yield told
        except RayTaskError as error:
            raise error.cause from error  # Ray's own says where in which file it was raised
        except RayActorError:
            self._replicas.ended_at[place] = time.monotonic()
            if has_begun:
                raise ReplicaEnded from None


def _beginning(prompt: Sequence[Any]) -> bytes:
    """What all turns of a conversation have in common: its messages up to the first of the user,
    or the first ids."""
    if isinstance(prompt[0], int):
        return json.dumps(prompt[:FIRST_IDS]).encode()
    roles = [message.get("role") for message in prompt]
    end = roles.index("user") + 1 if "user" in roles else len(prompt)
    return json.dumps(prompt[:end], sort_keys=True, default=str).encode()
