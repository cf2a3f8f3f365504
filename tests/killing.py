"""Processes that are killed until one gets through."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def killed_until_done(work: Callable[..., Any], *arguments: Any, first: float, more: float) -> int:
    """Run ``work`` in forked processes, killing (SIGKILL) each after a while, ``more`` seconds longer every time; returns the kills."""
    for kills in range(100):
        process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        process.start()
        process.join(first + more * kills)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
    raise AssertionError("none of 100 processes got through")
