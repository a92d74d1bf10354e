"""Ranks: processes of one gloo group that wait for functions, started once for each number of them.

To start two processes and a group takes a sixth of a second, and what torch and Lightning do for the first time in a
process takes another second. So the processes stay, and each call finds them as it would find new ones: the same
random state, default type, warning filters, environment and folder. A rank that raises, dies or hangs fails its caller
and ends the others, and the next call starts new ones. It also does where earlier calls have left many groups, whose
threads wake up a hundred times a second: torch caches what it knows of them, so that they cannot be ended.
"""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

PATIENCE = 5  # seconds that other ranks have to fail, too, after one has
GROUPS = 16  # that calls may leave
ENVIRONMENT = dict(os.environ)  # before a test sets anything, such as the seed of Lightning


def run(function: Callable[..., Any], size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Return what ``function(*args)`` returned in each of several processes of one gloo group, in the order of ranks.

    A process that raises, dies or hangs fails the caller with its traceback. The function and its arguments are
    pickled: what a test has patched is not patched there.
    """
    if size not in _pools or not _pools[size].alive:
        _pools[size] = Pool(size)
    return _pools[size].run(Task(function, args, timeout, list(warnings.filters), Path.cwd()))


class Task(NamedTuple):
    """What a rank is to call, and what it is to find when it does."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    timeout: float
    filters: list[Any]
    folder: Path


class Pool:
    """Processes of one gloo group."""

    def __init__(self, size: int) -> None:
        self.folder = TemporaryDirectory()
        self.owner = os.getpid()
        self.groups = 1
        fork = multiprocessing.get_context("fork")
        pipes = [fork.Pipe() for _ in range(size)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            fork.Process(target=_serve, args=(rank, size, Path(self.folder.name), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and all(process.is_alive() for process in self.processes)

    def run(self, task: Task) -> list[Any]:
        payload = pickle.dumps(task)
        try:
            for connection in self.connections:
                connection.send_bytes(payload)
            done = self._wait(time.monotonic() + task.timeout + 10)  # their own watchdogs go off first
        except BaseException:  # such as a test that has taken too long
            self.close()
            raise
        paths = [Path(self.folder.name, str(rank)) for rank in range(len(self.processes))]
        if done:
            answers = [torch.load(path.with_suffix(".pt"), weights_only=True) for path in paths]
            if self.groups > GROUPS:
                self.close()
            return answers
        self.kill()
        texts = {path.name: path.with_suffix(".txt") for path in paths}
        told = [f"rank {name}:\n{text.read_text()}" for name, text in texts.items() if text.exists()]
        codes = [process.exitcode for process in self.processes]
        self.close()
        raise AssertionError("\n".join([f"ranks ended with {codes}", *told]))

    def _wait(self, deadline: float) -> bool:
        """Whether every rank has called its function, before the deadline."""
        waiting = dict(zip(self.connections, self.processes, strict=True))
        failed = False
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait([*waiting, *(process.sentinel for process in waiting.values())], left)
            for connection, process in list(waiting.items()):
                if connection in ready and (groups := _answered(connection)):
                    self.groups = groups
                    del waiting[connection]
                elif connection in ready or process.sentinel in ready:
                    failed, deadline = True, min(deadline, time.monotonic() + PATIENCE)
                    process.join(1)
                    del waiting[connection]
        return not waiting and not failed

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def close(self) -> None:
        if self.owner == os.getpid():
            self.kill()
            self.folder.cleanup()


_pools: dict[int, Pool] = {}


@atexit.register
def close() -> None:
    """End the processes of all pools."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


def _answered(connection: Connection) -> int:
    """Return how many groups a rank has; 0 if it has ended."""
    try:
        return int(connection.recv())
    except (EOFError, OSError):
        return 0


# ------------------------------------------------------------------------------------------------ in a rank


def _serve(rank: int, size: int, folder: Path, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    with _telling(folder / f"{rank}.txt", 60):
        # a file instead of a port: no other process can be faster to take it
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    parent, environment, zero = os.getppid(), dict(os.environ), rank_zero_only.rank
    while _asked(connection, parent):
        task = pickle.loads(connection.recv_bytes())
        with _telling(folder / f"{rank}.txt", task.timeout), warnings.catch_warnings():
            rank_zero_only.rank = zero
            _begin(task, environment)
            torch.save(task.function(*task.args), folder / f"{rank}.pt")
        connection.send(len(torch.distributed.distributed_c10d._world.pg_map))


def _asked(connection: Connection, parent: int) -> bool:
    """Wait for a task, as long as there is somebody who could send one."""
    try:
        while not connection.poll(1):
            if os.getppid() != parent:
                return False
    except (EOFError, OSError):
        return False
    return True


@contextmanager
def _telling(path: Path, timeout: float) -> Iterator[None]:
    """End the process with its traceback in a file if it raises, or takes too long."""
    with path.open("w") as told:
        faulthandler.dump_traceback_later(timeout, file=told, exit=True)
        try:
            yield
        except BaseException:
            told.write(traceback.format_exc())
            told.flush()
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _begin(task: Task, environment: dict[str, str]) -> None:
    """Forget what the last task has left."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(task.folder)
    warnings.resetwarnings()
    warnings.filters[:] = task.filters
    warnings.simplefilter("default", append=True)  # lets warnings notice that its filters have changed
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
