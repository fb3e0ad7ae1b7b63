"""The parts of a hook, none of which may stop a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.runner import Runner


class Parts:
    """Runs the parts of a hook, and switches off the one that fails: a warning, once, says why.

    Args:
        runner (Runner): Whose logger and iteration the warnings have.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._off: set[str] = set()

    def run(self, part: str, function: Callable, *args: Any) -> Any:
        """Call a function, unless its part is off.

        Args:
            part (str): What is switched off if the function fails, in the plural.
            function (Callable): What to call.
            *args: Its arguments.

        Returns:
            Any: What it returns, None if it failed or is off.
        """
        if not self.works(part):
            return None
        try:
            return function(*args)
        except Exception as error:  # whatever disks, devices and other people's models bring about
            self.fail(part, error)
            return None

    def works(self, part: str) -> bool:
        """Whether a part has not failed."""
        return part not in self._off

    def fail(self, part: str, error: Exception) -> None:
        """Switch a part off, and say why."""
        self._off.add(part)
        self._runner.logger.warning(
            f'CollapseHook: {part} are off from iteration {self._runner.iter + 1} on, the training '
            f'goes on. Cause: {type(error).__name__}: {error}'
        )
