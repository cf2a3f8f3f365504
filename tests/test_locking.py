"""Lock: one process at a time, whatever becomes of its children."""

import errno
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest

from geomreg import locking
from geomreg.locking import Lock


def hold(file, ready, child):
    """Take it, start a child that lives on, and wait to be killed."""
    lock = Lock.take(file)
    if child and os.fork() == 0:
        (file.parent / "child").write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    while child and not (file.parent / "child").exists():
        time.sleep(0.01)
    ready.set()
    time.sleep(60)
    del lock


@pytest.mark.parametrize("child", [False, True])
@pytest.mark.slow
def test_a_kill_ends_it_though_a_child_lives_on(tmp_path, child):
    file = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(file, ready, child))
    process.start()
    try:
        assert ready.wait(60)
        assert Lock.take(file) is None
        process.kill()
        process.join()
        lock = Lock.take(file)
        assert lock is not None
        if child:
            os.kill(int((tmp_path / "child").read_text()), 0)  # still there
        lock.release(remove=True)
    finally:
        process.kill()
        if child and (tmp_path / "child").exists():
            os.kill(int((tmp_path / "child").read_text()), 9)
    assert not file.exists()


def test_a_process_has_it_once(tmp_path):
    """The system would give it to the same process again, and end it when the second file is closed."""
    first = Lock.take(tmp_path / ".lock")
    assert first is not None
    (tmp_path / "link").symlink_to(tmp_path)
    for file in (tmp_path / ".lock", tmp_path / "link" / ".lock"):
        assert Lock.take(file) is None
    first.release()
    second = Lock.take(tmp_path / ".lock")
    assert second is not None
    second.release()


def test_where_there_are_no_locks_everybody_gets_one(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    for number, system in enumerate((None, SimpleNamespace(LOCK_EX=2, LOCK_NB=4, lockf=none))):
        monkeypatch.setattr(locking, "fcntl", system)
        lock = Lock.take(tmp_path / str(number))
        assert lock is not None
        lock.release()
