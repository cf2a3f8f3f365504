import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from processes import announce, free_port

from geomreg.integrations.recipes import waiting
from geomreg.integrations.recipes.waiting import alone, together

ADVICE = "Start it again."


def accelerator():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state(*([] if state is PartialState or state is GradientState else [True]))
    return Accelerator(cpu=True)


def test_a_single_process_has_no_thread_and_no_connection():
    threads = threading.active_count()
    one = SimpleNamespace(num_processes=1, is_main_process=True)
    with together(one, "test", ADVICE), alone(one) as main:
        assert main
        assert threading.active_count() == threads
        assert not waiting._WATCHES
    with pytest.raises(KeyError, match="own"), together(one, "test", ADVICE), alone(one):
        raise KeyError("own")


def test_without_together_the_others_wait_in_a_collective():
    waited = []
    for main in (True, False):
        with alone(SimpleNamespace(num_processes=2, is_main_process=main, wait_for_everyone=lambda: waited.append(True))) as found:
            assert found is main
    assert len(waited) == 2


def long_block(one, main):
    """Longer than LIMIT, which is for those who give no sign of life; with work that holds the interpreter now and then."""
    for seconds in (2.5, 0.0):
        with alone(one) as here:
            if here:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    sum(range(2_000_000))
    return "through"


def error_of_the_main_one(one, main):
    with alone(one) as here:
        if here:
            raise KeyError("of the main one")


def error_of_the_other(one, main):
    """While the main one works alone; a loading process's error is a long one."""
    if not main:
        raise ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback: ...\nValueError: expected a, got b. Do c.")
    with alone(one) as here:
        if here:
            time.sleep(100)


def killed_while_the_main_one_works(one, main):
    with alone(one) as here:
        if here:
            time.sleep(100)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def main_one_is_killed(one, main):
    with alone(one) as here:
        if here:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_step(one, main):
    if not main:
        os.kill(os.getpid(), signal.SIGKILL)
    one.wait_for_everyone()


def no_signal_reaches_the_main_one(one, main):
    """As in a collective of NCCL."""
    if not main:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
    time.sleep(100)


def stopped(one, main):
    """Of a machine that was switched off nobody closes the connections."""
    if not main:
        os.kill(os.getpid(), signal.SIGSTOP)
    with alone(one) as here:
        if here:
            time.sleep(100)


def same_error_everywhere(one, main):
    """Nobody speaks of the other one."""
    time.sleep(0.5 * (not main))
    raise OSError("the same")


GONE = "test: expected all processes to go on, got none any more on rank {}: it was killed. Start it again."
OF_ONE = "test: expected all processes to go on, got an error on rank {}: {}"
CASES = {  # what the main process and the other say; None: killed
    long_block: ("through", "through"),
    error_of_the_main_one: ("KeyError 'of the main one'", "RuntimeError " + OF_ONE.format(0, "'of the main one'")),
    error_of_the_other: ("RuntimeError " + OF_ONE.format(1, "expected a, got b. Do c."), "ValueError Caught ValueError in"),
    killed_while_the_main_one_works: ("RuntimeError " + GONE.format(1), None),
    main_one_is_killed: (None, "RuntimeError " + GONE.format(0)),
    killed_in_a_step: ("RuntimeError " + GONE.format(1), None),
    no_signal_reaches_the_main_one: ("geomreg: " + GONE.format(1), None),
    stopped: ("RuntimeError test: expected all processes to go on, got no sign of life from rank 1 for 2 s. Start it again.", None),
    same_error_everywhere: ("OSError the same", "OSError the same"),
}


def on_rank(rank, port, work, folder):
    announce(rank, 2, port)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    waiting.BEAT, waiting.LIMIT, waiting.GRACE, waiting.END = 0.1, 1.5, 1.0, 1.0
    one = accelerator()
    with open(folder / f"{rank}.txt", "w", buffering=1) as sys.stderr:
        try:
            with together(one, "test", ADVICE):
                said = work(one, one.is_main_process)
                one.wait_for_everyone()
        except BaseException as error:
            said = f"{type(error).__name__} {error}".replace("\n", " ")
        print(said, file=sys.stderr)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("work", CASES, ids=lambda one: one.__name__)
def test_what_ends_one_process_ends_the_other_with_one_line(tmp_path, work):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["geomreg.integrations.recipes.waiting"])
    port = free_port()
    both = [context.Process(target=on_rank, args=(rank, port, work, tmp_path)) for rank in range(2)]
    for one in both:
        one.start()
    try:
        for one, said in zip(both, CASES[work], strict=True):
            if said is not None:
                one.join(60)
                assert one.exitcode is not None
    finally:
        for one in both:
            one.kill()
            one.join()
    for rank, said in enumerate(CASES[work]):
        if said is not None:
            (line,) = (tmp_path / f"{rank}.txt").read_text().splitlines()
            assert line.startswith(said)
