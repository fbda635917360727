"""A second process, for the core that small batches leave idle."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from .._process import end_with_parent, end_workers, worker_pool
from ..speed import retain_freed_memory
from .workspace import Workspace


def _prepare() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    retain_freed_memory()


class SecondProcess:
    """A second process that does what it is given, in that order; what it has not begun can be taken back.

    Args:
        workspace: what the work is done in.
    """

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.pool = worker_pool(1, _prepare)
        self.given: list[tuple[Future[Any], Callable[..., Any], tuple[str, ...], Future[Any] | None]] = []

    def __enter__(self) -> SecondProcess:
        return self

    def __call__(self, work: Callable[..., Any], *arguments: str, after: Future[Any] | None = None) -> Future[Any]:
        """Give it something to do.

        Args:
            work: a function of the workspace and of the arguments.
            arguments: further arguments of it.
            after: what must be done before.
        """
        future = self.pool.submit(work, self.workspace.quiet(), *arguments)
        self.given.append((future, work, arguments, after))
        return future

    def finish(self) -> None:
        """Do what was not begun, last first, and wait for the rest."""
        for future, work, arguments, after in reversed(self.given):
            if future.cancel():
                if after is not None:
                    after.result()
                work(self.workspace, *arguments)
        for future, *_ in self.given:
            if not future.cancelled():
                future.result()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            # what it works on can take minutes, and goes on where it was
            end_workers()
        self.pool.shutdown(cancel_futures=True)
