"""When a stage's task is tried again: a budget that every new checkpoint of the run restores."""

from typing import Any

from prefect import Task
from prefect.logging import get_run_logger

from ditty.config.launchspec import LaunchSpec
from ditty.runs.rundir import RunDir

MOST_DOUBLINGS = 9


def passing(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: could an identical attempt succeed?"""
    return getattr(state.result(raise_on_failure=False), "retryable", False)


class Budget:
    """The retries of one task: `launch.retries` in a row without a new checkpoint between them.

    A training that loses its machine again and again, and gets on each time, may go on for as long
    as it takes. One that does not get on waits twice as long each time, and ends after the budget.
    """

    def __init__(self, launch: LaunchSpec, run: RunDir):
        self.launch, self.run = launch, run
        self.made = 0  # in all
        self.used = 0  # since the last new checkpoint
        self.waits = 0  # of these, without the first one after it
        self.saved = self.run.newest_step()

    def given_to(self, task: Task[Any, Any]) -> Task[Any, Any]:
        """A copy of `task` that is tried again within this budget."""
        return task.with_options(
            retries=self.launch.retries,
            retry_delay_seconds=self.launch.retry_delay_seconds,
            retry_condition_fn=self.allows,
        )

    def allows(self, task: Any, task_run: Any, state: Any) -> bool:
        """Prefect's `retry_condition_fn`: is there a retry left, and could it succeed?

        Prefect asks this before it reads how often and how late `task` is tried again.
        """
        if not passing(task, task_run, state):
            return False
        newest = self.run.newest_step()
        gets_on = newest > self.saved
        if gets_on:
            self.saved, self.used, self.waits = newest, 0, 0
        if self.used >= self.launch.retries:
            get_run_logger().error(
                "launch.retries: %d without a new checkpoint are used up", self.launch.retries
            )
            return False
        self.made, self.used = self.made + 1, self.used + 1
        doublings = min(self.waits, MOST_DOUBLINGS)
        # Where it got on it is what ended it that passes, not what it does: nothing to wait for.
        delay = 0.0 if gets_on else self.launch.retry_delay_seconds * 2**doublings
        self.waits += not gets_on
        # Never the last one: after that Prefect does not ask whether there is a new checkpoint.
        left = max(self.launch.retries - self.used, 1)
        task.retry_delay_seconds, task.retries = delay, self.made + left
        return True
