"""Measure candidates on a far machine, as `runtime/trials/measure.py` does on this one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from ..errors import RemoteError
from ..remote import Remote, is_alive, upload
from ..runtime.manifest import CPU
from ..runtime.trials.files import Candidate, read_plan
from ..runtime.trials.machines import FUNCTION, TrialMachine
from ..runtime.trials.measure import Attempt, Failure, Seconds, compare_and_time

BATCH_SECONDS = 900  # for a batch of candidates, one of which may hang


class There(TrialMachine):
    """A machine at the other end of a session; its clock times the calls, not ours."""

    def __init__(self, session: Any) -> None:
        self._session, self._device = session, session.cpu(0)

    def load(self, folder: Path, candidate: Candidate) -> Any:
        return upload(self._session, folder / candidate.library)

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, self._device)

    def array(self, written: Any, like: np.ndarray) -> np.ndarray:
        result: np.ndarray = written.numpy()
        return result

    def call(self, kernel: Any, arguments: Sequence[Any]) -> None:
        kernel[FUNCTION](*arguments)

    def seconds(self, kernel: Any, calls: Sequence[Sequence[Any]]) -> float:
        timer = kernel.time_evaluator(FUNCTION, self._device, number=1)
        return float(sum(timer(*arguments).mean for arguments in calls) / len(calls))

    def is_alive(self) -> bool:
        return is_alive(self._session)


def attempt_there(remote: Remote) -> Attempt:
    """Return an attempt that runs in a session of its own. It raises RemoteError, also when a
    candidate crashes, because TVM's server ends with the session."""

    def attempt(folder: Path, libraries: list[str]) -> tuple[Seconds | None, list[Failure]]:
        plan = read_plan(folder)
        if plan.device != CPU:
            raise RemoteError(
                f"{folder}: expected kernels of a CPU, found those of "
                f"{plan.device or plan.runtime}, which are not measured over TVM's RPC; copy the "
                "folder there and measure it without --rpc"
            )
        failures, running = [], plan.default.library

        def tell(message: tuple[Any, ...]) -> None:
            nonlocal running
            match message:
                case "running", library:
                    running = library
                case "failed", library, reason:
                    failures.append(Failure(library, reason))

        session = remote.session(BATCH_SECONDS)
        try:
            return compare_and_time(folder, libraries, There(session), tell), failures
        except Exception as error:  # a broken connection may raise anything
            if is_alive(session):
                raise
            constants = {c.library: c.constants for c in plan.candidates}
            what = constants[running] or "default"
            raise RemoteError(
                f"{remote}: {plan.key.split()[0]} with {what} ended the session there: {error}; a "
                "server of TVM's RPC ends too when what it runs crashes: start it again, and tune "
                "with fewer --trials or emit, measure and ingest instead"
            ) from error

    return attempt
