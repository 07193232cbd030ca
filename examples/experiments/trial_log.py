"""The trials of a search in a file that outlives its jobs, and the search if that is cut off."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from processes import first
from search_length import Trial

BEGUN = "begun"


class Log:
    """The trials of a method in a file that outlives the job; the first rank writes."""

    def __init__(self, path: Path, method: str) -> None:
        self._path, self._method = path, method
        self.trials = [trial for name, trial in read(path) if name == method]

    def begin(self, length: int) -> None:
        self._write(Trial(length, False, outcome=BEGUN))

    def end(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._write(trial)

    def _write(self, trial: Trial) -> None:
        if first():
            with self._path.open("a") as file:
                file.write(json.dumps({"method": self._method} | asdict(trial)) + "\n")


def read(path: Path, outcome: str | None = None) -> list[tuple[str, Trial]]:
    """Trials by method, below the line of settings; the last word on a length counts. Those that
    ended, or those of an outcome.
    """
    found: dict[tuple[str, int], Trial] = {}
    for line in path.read_text().splitlines()[1:]:
        entry = json.loads(line)
        method = entry.pop("method")
        found[method, entry["tokens"]] = Trial(**entry)
    return [
        (method, trial)
        for (method, _), trial in found.items()
        if (trial.outcome != BEGUN if outcome is None else trial.outcome == outcome)
    ]


def open_log(path: Path, settings: dict[str, Any], resume: bool) -> None:
    """A file of trials that begins with the settings on which they depend.

    Raises:
        ValueError: one that is there is not to be gone on with, is damaged, or of other settings.
    """
    ended: list[dict[str, Any]] = []
    if path.exists():
        if not resume:
            raise ValueError(
                f"{path} has trials of a search that goes on or was cut off: --resume, another "
                f"--json, or remove it"
            )
        try:
            written, *_ = [json.loads(line) for line in path.read_text().splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: remove what is half written, or all of it: {error}"
            ) from None
        if written != settings:
            raise ValueError(f"{path} has the trials of {written}, not of {settings}")
        ended = [{"method": method} | asdict(trial) for method, trial in read(path)]
    lines = [json.dumps(each) + "\n" for each in (settings, *ended)]
    path.write_text("".join(lines))
