"""What keeps the faults of a monitor from the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.runner import Runner


class Guard:
    """Call functions; if one fails, warn once and skip its part from then on.

    Args:
        runner (Runner): Its logger takes the warnings.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._off: set[str] = set()

    def __call__(self, part: str, function: Callable, *args: Any) -> Any:
        """Call a function, unless its part is off.

        Args:
            part (str): What is skipped if the function fails, in the plural.
            function (Callable): What to call.
            *args: Its arguments.

        Returns:
            Any: What it returns, None if it failed or is off.
        """
        if self.is_off(part):
            return None
        try:
            return function(*args)
        except Exception as error:  # disks, devices and user models may raise anything
            self._off.add(part)
            self._runner.logger.warning(
                f'CollapseHook: {part} are off from iteration {self._runner.iter + 1} on, the '
                f'training continues. Cause: {type(error).__name__}: {error}'
            )
            return None

    def is_off(self, part: str) -> bool:
        """Whether a part has failed."""
        return part in self._off
