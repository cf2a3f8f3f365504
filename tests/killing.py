"""Processes that are killed until one gets through."""

import multiprocessing
from collections.abc import Callable
from typing import Any

_PRELOADED = ["torch", "open_clip", "geomreg.integrations.recipes.finetune"]


def killed_until_done(work: Callable[..., Any], *arguments: Any, first: float, more: float) -> int:
    """Run ``work`` in processes, killing (SIGKILL) each after a while, ``more`` seconds longer every time; returns the kills.

    They are forks of a server that has imported everything and run nothing: forks of this process could not use autograd once it has.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    for kills in range(100):
        ready = context.Event()
        process = context.Process(target=_begin, args=(ready, work, *arguments))
        process.start()
        assert ready.wait(120)
        process.join(first + more * kills)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
    raise AssertionError("none of 100 processes got through")


def _begin(ready: Any, work: Callable[..., Any], *arguments: Any) -> None:
    ready.set()  # only now, with this module and that of ``work`` imported
    work(*arguments)
