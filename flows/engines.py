"""Where the shards of the data are made: threads or processes here, or a cluster's workers.

Each shard is a task, and a worker that is lost costs the shard that it was making. What remembers
the shards is the store, under a lock: within the stage's task Prefect would hold back their records
until that has ended. Prefect's own process runner is not used: it fails the flow when a worker is
killed, whatever `retries` says.
"""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from ditty.config.choices import Engine
from ditty.errors import Crashed, DittyError
from ditty.planning import preflight
from ditty.stages import datashards
from ditty.stages.datashards import ShardWork
from ditty.stages.stageline import StageRef
from ditty.store.artifacts import Manifest
from flows.caching import Reference, reference
from flows.retries import passing

ALIVE_SECONDS = 1.0  # between two looks at whether the flow's process is there
LOST_WORKERS = 3  # that a shard may cost before it is the one to blame, as with Dask

Build = Callable[[StageRef, ShardWork], Manifest]


@task(
    name="shard",
    task_run_name="{ref.title}",
    retries=LOST_WORKERS,
    retry_delay_seconds=0,
    retry_condition_fn=passing,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def make_shard(ref: StageRef, work: ShardWork, build: Build) -> Reference:
    """One shard, wherever this runs."""
    return reference(ref, build(ref, work))


def run_shards(shards: Sequence[StageRef], work: ShardWork) -> None:
    """A `datashards.Run` on the engine of the spec.

    Raises:
        DittyError: that of the first shard that failed.
        Crashed: workers, or the way to the cluster, were lost; the shards that were made stay.
        Exception: threads or processes of this machine raised it, of any kind: a bug.
    """
    build: Build = datashards.build
    try:
        with ExitStack() as stack:
            if work.data.engine is Engine.PROCESSES:
                build = stack.enter_context(Processes(work.data.num_proc)).build
            runner = stack.enter_context(task_runner(work))
            given = {"work": work, "build": build}
            futures = [runner.submit(make_shard, {"ref": ref, **given}) for ref in shards]
            for future in futures:
                future.result()
    except DittyError:
        raise
    except Exception as error:  # each cluster has its own for workers that are gone
        if work.data.engine not in preflight.CLUSTERS:
            raise
        raise Crashed(
            f"data.engine: {work.data.engine} at {work.data.engine_address} did not make all "
            f"{len(shards)} shards: {type(error).__name__}: {error}. Those that were made are "
            "kept: run again"
        ) from error


def task_runner(work: ShardWork) -> TaskRunner[Any]:
    """Prefect's, for `data.engine`; `preflight` has seen that its package is here."""
    data = work.data
    if data.engine is Engine.DASK:
        from prefect_dask import DaskTaskRunner

        return DaskTaskRunner(address=data.engine_address)
    if data.engine is Engine.RAY:
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(address=data.engine_address)
    return ThreadPoolTaskRunner(max_workers=data.num_proc // work.processes)


class Processes:
    """Processes that make shards for threads of this one; each is replaced when it is lost."""

    def __init__(self, count: int):
        self._threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._free: queue.Queue[ProcessPoolExecutor] = queue.Queue()
        for _ in range(count):
            self._free.put(self._start())

    def _start(self) -> ProcessPoolExecutor:
        """One process, when it is first needed: of a pool of several all are lost with one."""
        spawn = multiprocessing.get_context("spawn")
        arguments = (os.getpid(), self._threads)
        return ProcessPoolExecutor(1, spawn, initializer=_in_worker, initargs=arguments)

    def build(self, ref: StageRef, work: ShardWork) -> Manifest:
        """`datashards.build` in one of the processes.

        Raises:
            Crashed: it was lost meanwhile.
        """
        process = self._free.get()
        try:
            return process.submit(datashards.build, ref, work).result()
        except BrokenProcessPool as error:
            process.shutdown()
            process = self._start()
            raise Crashed(f"the process that made {ref.title} was killed") from error
        finally:
            self._free.put(process)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        while not self._free.empty():
            self._free.get().shutdown()


def _in_worker(parent: int, threads: int) -> None:
    """Set up a worker process: its share of the cores, and its end with the flow's process.

    A pool's process outlives one that was killed: it holds both ends of the queue it waits at.
    """
    os.environ["RAYON_NUM_THREADS"] = str(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ALIVE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="ditty parent").start()
