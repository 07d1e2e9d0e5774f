"""Records of a file that a user names: which of them a compile takes."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..schedules.records import Choose, Records


class WatchedRecords(Mapping[str, Mapping[str, int]]):
    """Those of `file` are `records`; where it has none for a kernel, that of `below` is taken."""

    def __init__(self, below: Records, records: Records, file: Path) -> None:
        self._all, self._records, self._file = {**below, **records}, records, file
        self._found: set[str] = set()  # kernels of the model, by their keys
        self._taken: set[tuple[str, str]] = set()  # constants of a key's record

    def __getitem__(self, key: str) -> Mapping[str, int]:
        return self._all[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def watch(self, key: str, choose: Choose) -> Choose:
        """The same choices for the kernel of this key."""
        self._found.add(key)
        record = self._records.get(key, {})

        def watched(name: str, candidates: Sequence[int], default: int) -> int:
            if record.get(name) in candidates:
                self._taken.add((key, name))
            return choose(name, candidates, default)

        return watched

    def warn_of_unused(self) -> None:
        """To be called when all kernels are scheduled. An older version's file is no error."""
        absent = [key for key in self._records if key not in self._found]
        wrong = [
            f"{name}={value} of {key}"
            for key, record in self._records.items()
            for name, value in record.items()
            if key in self._found and (key, name) not in self._taken
        ]
        reasons = [f"{len(absent)} are of kernels that this model does not have"] if absent else []
        if wrong:
            reasons.append(
                f"{len(wrong)} constants are none that a schedule has, or no candidates of theirs: "
                f"{', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''}"
            )
        if reasons:
            warnings.warn(
                f"{self._file}: expected {len(self._records)} records to use, found that "
                f"{'; '.join(reasons)}; what is not used is left to defaults",
                stacklevel=2,
            )
